//! The proxy between a client and an enclave for tests, all in this process.

mod readiness;
mod receipts;
#[path = "../../tests/support/mod.rs"]
pub(super) mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use casemate_attest::Policy;
use futures::StreamExt;
use reqwest::{Client, StatusCode};
use serde_json::Value;
use support::{Enclave, Fault};
use tokio::net::TcpListener;

use super::forward;
use super::presence::Pace;
use super::receipts::Saver;
use super::session::{Session, keep_fresh};
use crate::service::{Clock, Service};

pub(super) const NOW: u64 = 1_795_000_000;
pub(super) const MAXIMUM_AGE: u64 = 300;

/// Some policy with a service.
pub(crate) fn sample_policy() -> Policy {
    Policy::from_toml(&Enclave::new(NOW).policy(MAXIMUM_AGE)).unwrap()
}

struct Setup {
    enclave: Arc<Enclave>,
    session: Arc<Session>,
    proxy: SocketAddr,
    client: Client,
}

impl Setup {
    async fn new() -> Setup {
        Setup::with_maximum_age(MAXIMUM_AGE).await
    }

    async fn with_maximum_age(maximum_age: u64) -> Setup {
        Setup::with(maximum_age, None).await
    }

    async fn with(maximum_age: u64, saver: Option<Saver>) -> Setup {
        let enclave = Enclave::new(NOW);
        let address = enclave.serve().await;
        Setup::at(enclave, address, maximum_age, saver).await
    }

    /// A proxy to the service at `address`, whose policy and clock are those of `enclave`.
    async fn at(
        enclave: Arc<Enclave>,
        address: SocketAddr,
        maximum_age: u64,
        saver: Option<Saver>,
    ) -> Setup {
        let service = service(&enclave, address, maximum_age);
        Setup::of(enclave, service, saver, Pace::default()).await
    }

    async fn of(
        enclave: Arc<Enclave>,
        service: Service,
        saver: Option<Saver>,
        pace: Pace,
    ) -> Setup {
        let first = service.verify().await.unwrap();
        let session = Session::with_pace(service, first, pace);
        let session = Arc::new(session.ok().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = listener.local_addr().unwrap();
        let router = forward::router(session.clone(), saver, proxy);
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let client = Client::builder()
            .tls_certs_only([])
            .no_proxy()
            .build()
            .unwrap();
        Setup {
            enclave,
            session,
            proxy,
            client,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.proxy)
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    /// The status and the error's code.
    async fn refusal(&self, path: &str) -> (StatusCode, String) {
        refusal(self.get(path).await).await
    }
}

pub(super) async fn refusal(response: reqwest::Response) -> (StatusCode, String) {
    let status = response.status();
    let body: Value = response.json().await.unwrap();
    assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    assert!(body["error"]["type"].is_string());
    (status, body["error"]["code"].as_str().unwrap().to_owned())
}

fn service(enclave: &Arc<Enclave>, address: SocketAddr, maximum_age: u64) -> Service {
    let policy = Policy::from_toml(&enclave.policy(maximum_age)).unwrap();
    let clock: Clock = {
        let enclave = enclave.clone();
        Arc::new(move || enclave.now())
    };
    Service::with_clock(&format!("http://{address}"), policy, None, clock).unwrap()
}

pub(super) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn carries_method_target_body_and_allowed_fields_only() {
    let setup = Setup::new().await;
    let response = setup
        .client
        .post(setup.url("/v1/echo?a=1&b=%20"))
        .header("authorization", "Bearer key")
        .header("content-type", "application/json")
        .header("accept", "text/event-stream")
        .header("cookie", "secret")
        .header("user-agent", "somebody")
        .header("x-forwarded-for", "10.0.0.1")
        .body("{\"model\":\"m\"}")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-toy"], "yes");
    let echo: Value = response.json().await.unwrap();
    assert_eq!(echo["method"], "POST");
    assert_eq!(echo["target"], "/v1/echo?a=1&b=%20");
    assert_eq!(
        echo["fields"],
        serde_json::json!(["authorization", "content-type", "accept"])
    );
    assert_eq!(echo["body"], "{\"model\":\"m\"}");

    let echo: Value = setup.get("/v1/echo").await.json().await.unwrap();
    assert_eq!(
        (&echo["method"], &echo["body"]),
        (&"GET".into(), &"".into())
    );
}

#[tokio::test]
async fn passes_on_the_status_and_error_of_the_service() {
    let setup = Setup::new().await;
    let response = setup.get("/v1/teapot").await;
    assert_eq!(response.status(), StatusCode::IM_A_TEAPOT);
    assert_eq!(response.text().await.unwrap(), r#"{"error":{}}"#);
    assert_eq!(
        setup.get("/v1/long").await.text().await.unwrap(),
        "x".repeat(100_000)
    );
}

#[tokio::test]
async fn an_event_arrives_before_the_next_is_made() {
    let setup = Setup::new().await;
    // The head is there though no event is.
    let response = setup.get("/v1/gated").await;
    assert_eq!(response.status(), 200);
    let mut body = response.bytes_stream();
    for i in 0..4 {
        // Only now may the service make event i; were one held back, this would wait for ever.
        setup.enclave.gate.notify_one();
        let event = tokio::time::timeout(Duration::from_secs(10), body.next()).await;
        assert_eq!(event.unwrap().unwrap().unwrap(), format!("data: {i}\n\n"));
    }
    assert!(body.next().await.is_none());
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_generation() {
    let setup = Setup::new().await;
    let mut body = setup.get("/v1/endless").await.bytes_stream();
    for _ in 0..3 {
        body.next().await.unwrap().unwrap();
    }
    assert_eq!(setup.enclave.dropped.load(Ordering::SeqCst), 0);
    drop(body);
    eventually("the generation ends", || {
        setup.enclave.dropped.load(Ordering::SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_begins_ends_the_generation() {
    let setup = Setup::new().await;
    let request = setup.client.get(setup.url("/v1/silent"));
    let waiting = tokio::spawn(request.send());
    eventually("the request arrives", || {
        setup.enclave.requests.load(Ordering::SeqCst) == 1
    })
    .await;
    waiting.abort();
    eventually("the generation ends", || {
        setup.enclave.dropped.load(Ordering::SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn refuses_other_methods_paths_and_foreign_pages() {
    let setup = Setup::new().await;
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"] {
        let method = method.parse().unwrap();
        let response = setup
            .client
            .request(method, setup.url("/v1/echo"))
            .send()
            .await
            .unwrap();
        let expected = (
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed".to_owned(),
        );
        assert_eq!(refusal(response).await, expected);
    }
    let post = setup
        .client
        .post(setup.url("/v1/attestation"))
        .send()
        .await
        .unwrap();
    assert_eq!(refusal(post).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(
        setup.refusal("/metrics").await,
        (StatusCode::NOT_FOUND, "not_found".into())
    );

    let page = |origin: String| {
        setup
            .client
            .get(setup.url("/v1/echo"))
            .header("origin", origin)
    };
    let foreign = page("http://evil.example".into()).send().await.unwrap();
    assert_eq!(
        refusal(foreign).await,
        (StatusCode::FORBIDDEN, "foreign_origin".into())
    );
    let own = page(format!("http://{}", setup.proxy))
        .send()
        .await
        .unwrap();
    assert_eq!(own.status(), 200);
    assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn refuses_a_request_that_is_too_large() {
    let setup = Setup::new().await;
    let post = |size| {
        setup
            .client
            .post(setup.url("/v1/echo"))
            .body(vec![b'a'; size])
            .send()
    };
    let expected = (
        StatusCode::PAYLOAD_TOO_LARGE,
        "request_too_large".to_owned(),
    );
    assert_eq!(
        refusal(post(4 * 1024 * 1024 + 1).await.unwrap()).await,
        expected
    );
    assert_eq!(post(4 * 1024 * 1024).await.unwrap().status(), 200);
}

#[tokio::test]
async fn says_so_when_it_closes_the_connection() {
    let setup = Setup::new().await;
    let post = async |path, size, origin: Option<&'static str>| {
        let mut request = setup.client.post(setup.url(path)).body(vec![b'a'; size]);
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        let response = request.send().await.unwrap();
        let connection = response.headers().get("connection").cloned();
        let closes = connection.is_some_and(|value| value == "close");
        (response.status(), closes)
    };
    let large = 5 * 1024 * 1024;
    let refused = [
        ("/v1/echo", None, StatusCode::PAYLOAD_TOO_LARGE),
        (
            "/v1/echo",
            Some("http://evil.example"),
            StatusCode::FORBIDDEN,
        ),
        ("/v1/attestation", None, StatusCode::METHOD_NOT_ALLOWED),
        ("/metrics", None, StatusCode::NOT_FOUND),
    ];
    for (path, origin, status) in refused {
        assert_eq!(post(path, large, origin).await, (status, true), "{path}");
        // The client's next request does not fall into a connection that has ended, and its own stays open.
        assert_eq!(post("/v1/echo", 1, None).await, (StatusCode::OK, false));
    }
    for path in ["/v1/echo", "/livez", "/metrics"] {
        let response = setup.get(path).await;
        assert_eq!(response.headers().get("connection"), None, "{path}");
    }
}

#[tokio::test]
async fn shows_the_verified_transcript_and_that_it_is_no_tee() {
    let setup = Setup::new().await;
    let verdict: Value = setup.get("/v1/attestation").await.json().await.unwrap();
    assert_eq!(verdict["verdict"], "trusted");
    assert_eq!(verdict["tee"], false);
    assert_eq!(verdict["claims"]["service"], "demo");
    assert_eq!(verdict["claims"]["model"]["digest"], "05".repeat(32));
    let checks = verdict["transcript"]["checks"].as_array().unwrap();
    assert!(
        checks
            .iter()
            .any(|c| c["name"] == "credential.issuer" && c["status"] == "passed")
    );
    assert_eq!(setup.get("/livez").await.status(), 200);
    assert_eq!(setup.get("/readyz").await.status(), 200);
}

#[tokio::test]
async fn serves_until_expiry_while_renewal_fails_and_then_fails_closed() {
    let setup = Setup::new().await;
    setup.enclave.set_fault(Fault::NoAttestation);
    let current = setup.session.valid().unwrap();
    assert!(setup.session.renew(&current).await.is_err());
    setup.enclave.advance(MAXIMUM_AGE - 1);
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert_eq!(setup.get("/readyz").await.status(), 200);

    setup.enclave.advance(1);
    let unreachable = |status| (status, "service_unreachable".to_owned());
    let bad_gateway = unreachable(StatusCode::BAD_GATEWAY);
    assert_eq!(setup.refusal("/v1/echo").await, bad_gateway);
    assert_eq!(
        setup.refusal("/readyz").await,
        unreachable(StatusCode::SERVICE_UNAVAILABLE)
    );
    assert_eq!(setup.refusal("/v1/attestation").await, bad_gateway);
    assert_eq!(setup.get("/livez").await.status(), 200);
    let body = setup.get("/v1/echo").await.text().await.unwrap();
    assert!(
        body.contains("503 Service Unavailable"),
        "names the reason: {body}"
    );

    // Evidence that is refused is something else.
    setup.enclave.set_fault(Fault::OtherService);
    let not_verified = (
        StatusCode::SERVICE_UNAVAILABLE,
        "service_not_verified".to_owned(),
    );
    assert_eq!(setup.refusal("/v1/echo").await, not_verified);
    let body = setup.get("/v1/echo").await.text().await.unwrap();
    assert!(
        body.contains("credential.service"),
        "names the reason: {body}"
    );
    assert_eq!(setup.enclave.processed.load(Ordering::SeqCst), 1);

    setup.enclave.set_fault(Fault::None);
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert_eq!(setup.get("/readyz").await.status(), 200);
}

#[tokio::test]
async fn a_clock_that_is_set_back_prolongs_nothing() {
    let setup = Setup::with_maximum_age(1).await;
    setup.enclave.set_fault(Fault::NoAttestation);
    setup.enclave.clock.fetch_sub(1000, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(
        setup.refusal("/v1/echo").await,
        (StatusCode::BAD_GATEWAY, "service_unreachable".to_owned())
    );
    assert_eq!(setup.enclave.processed.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn renews_in_the_background_before_expiry() {
    let setup = Setup::with_maximum_age(4).await;
    let first = setup.session.valid().unwrap();
    let renewal = tokio::spawn(keep_fresh(setup.session.clone()));
    let start = Instant::now();
    while setup.enclave.attestations.load(Ordering::SeqCst) < 2 {
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "not before expiry"
        );
        assert_eq!(setup.get("/v1/echo").await.status(), 200);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(start.elapsed() > Duration::from_secs(1), "far too early");
    eventually("the new verification is in use", || {
        !Arc::ptr_eq(&first, &setup.session.valid().unwrap())
    })
    .await;
    renewal.abort();
}

#[tokio::test]
async fn many_requests_after_expiry_verify_once() {
    let setup = Setup::new().await;
    setup.enclave.advance(MAXIMUM_AGE);
    let requests = (0..8).map(|_| setup.get("/v1/echo"));
    for response in futures::future::join_all(requests).await {
        assert_eq!(response.status(), 200);
    }
    assert_eq!(setup.enclave.attestations.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_rotated_key_is_learnt_and_the_request_sent_once_more() {
    let setup = Setup::new().await;
    setup.enclave.rotate();
    let response = setup
        .client
        .post(setup.url("/v1/echo"))
        .body("hello")
        .send()
        .await
        .unwrap();
    let echo: Value = response.json().await.unwrap();
    assert_eq!(echo["body"], "hello");
    let counts = |e: &Enclave| {
        [&e.attestations, &e.requests, &e.processed].map(|count| count.load(Ordering::SeqCst))
    };
    assert_eq!(counts(&setup.enclave), [2, 2, 1]);
    // From then on the new key is used.
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert_eq!(counts(&setup.enclave), [2, 3, 2]);
}

#[tokio::test]
async fn a_host_that_denies_the_attested_key_gets_no_second_copy() {
    let setup = Setup::new().await;
    setup.enclave.set_fault(Fault::KeyDenied);
    let expected = (StatusCode::BAD_GATEWAY, "key_refused".to_owned());
    assert_eq!(setup.refusal("/v1/echo").await, expected);
    assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), 1);
    assert_eq!(setup.enclave.attestations.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_host_that_denies_every_key_gets_one_second_copy_at_most() {
    let setup = Setup::new().await;
    // Each request is denied, and another key attested after it.
    setup.enclave.set_fault(Fault::KeyDeniedAndRotated);
    let expected = (StatusCode::BAD_GATEWAY, "key_refused".to_owned());
    assert_eq!(setup.refusal("/v1/echo").await, expected);
    assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), 2);
    assert_eq!(setup.enclave.attestations.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_host_that_breaks_or_answers_in_clear_is_not_believed() {
    let setup = Setup::new().await;
    for (fault, code) in [
        (Fault::HostBroken, "refused_by_host"),
        (Fault::HostInClear, "answer_refused"),
        (Fault::CutAnswer(0), "answer_refused"),
        (Fault::CutAnswer(100), "answer_refused"),
    ] {
        setup.enclave.set_fault(fault);
        let expected = (StatusCode::BAD_GATEWAY, code.to_owned());
        assert_eq!(setup.refusal("/v1/echo").await, expected, "{fault:?}");
    }
}

#[tokio::test]
async fn a_busy_service_is_asked_again_after_a_while_that_is_bounded() {
    let setup = Setup::new().await;
    for (said, told) in [("7", "7"), ("4000000000", "60"), ("never", "1")] {
        setup.enclave.set_fault(Fault::HostBusy(said));
        let response = setup.get("/v1/echo").await;
        assert_eq!(response.headers()["retry-after"], told, "{said}");
        let expected = (StatusCode::SERVICE_UNAVAILABLE, "service_busy".to_owned());
        assert_eq!(refusal(response).await, expected);
    }
}

#[tokio::test]
async fn an_answer_that_is_cut_off_does_not_look_whole() {
    let setup = Setup::new().await;
    // The whole body of the answer and more, but not the last chunk.
    setup.enclave.set_fault(Fault::CutAnswer(16 + 7 * 530));
    let response = setup.get("/v1/echo").await;
    assert_eq!(response.status(), 200);
    assert!(response.bytes().await.is_err());
}

#[tokio::test]
async fn an_answer_that_is_no_stream_is_whole_or_an_error() {
    let setup = Setup::new().await;
    setup.enclave.set_fault(Fault::CutAnswer(16 + 100 * 530));
    let expected = (StatusCode::BAD_GATEWAY, "answer_refused".to_owned());
    assert_eq!(setup.refusal("/v1/long").await, expected);
    setup.enclave.set_fault(Fault::None);
    let whole = setup.get("/v1/long").await.bytes().await.unwrap();
    assert_eq!(whole.len(), 100_000);
}
