//! The proxy on attested TLS, between a client and an enclave for tests, all in this process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use casemate_attest::{Class, Policy};
use casemate_channel::keyset::ChannelBinding;
use casemate_channel::receipt::{Bundle, Exchange, RequestBytes, verify_bundle};
use casemate_channel::tls::rustls;
use futures::StreamExt;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::net::TcpListener;

use super::forward;
use super::receipts::Saver;
use super::session::Session;
use super::tests::support::{Enclave, Fault, TlsFault};
use super::tests::{MAXIMUM_AGE, NOW, eventually, refusal};
use crate::service::{Clock, NotVerified, Service, Verification};

struct Setup {
    enclave: Arc<Enclave>,
    proxy: SocketAddr,
    client: reqwest::Client,
}

pub(super) fn service(enclave: &Arc<Enclave>, address: SocketAddr) -> Service {
    let policy = Policy::from_toml(&enclave.policy(MAXIMUM_AGE)).unwrap();
    let clock: Clock = {
        let enclave = enclave.clone();
        Arc::new(move || enclave.now())
    };
    Service::with_clock(&format!("tls://{address}"), policy, None, clock).unwrap()
}

async fn verify(fault: TlsFault) -> (Arc<Enclave>, Verification) {
    let enclave = Enclave::new(NOW);
    let address = enclave.serve_tls(fault).await;
    let verification = service(&enclave, address).verify().await.unwrap();
    (enclave, verification)
}

impl Setup {
    async fn new() -> Setup {
        Setup::of(TlsFault::None).await
    }

    async fn of(fault: TlsFault) -> Setup {
        Setup::with(fault, None).await
    }

    async fn with(fault: TlsFault, saver: Option<Saver>) -> Setup {
        let enclave = Enclave::new(NOW);
        let service = service(&enclave, enclave.serve_tls(fault).await);
        let first = service.verify().await.unwrap();
        let session = Arc::new(Session::new(service, first).ok().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = listener.local_addr().unwrap();
        let router = forward::router(session, saver, proxy);
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let client = reqwest::Client::builder().tls_certs_only([]).no_proxy();
        Setup {
            enclave,
            proxy,
            client: client.build().unwrap(),
        }
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        let url = format!("http://{}{path}", self.proxy);
        let request = self.client.get(url).header("cookie", "secret");
        request.bearer_auth("key").send().await.unwrap()
    }

    /// Asks for an answer with a receipt; returns its id.
    async fn ask(&self) -> String {
        let url = format!("http://{}/v1/answer", self.proxy);
        let response = self.client.post(url).body("question").send().await.unwrap();
        let id = response.headers()["casemate-receipt"].to_str().unwrap();
        let id = id.to_owned();
        assert_eq!(response.text().await.unwrap(), "answer");
        id
    }

    /// The bundle proves the exchange, by the exporter that it holds.
    fn assert_proves(&self, json: &[u8]) {
        let bundle = Bundle::from_json(json).ok().unwrap();
        let binding = bundle.attestation.binding;
        assert!(matches!(binding, ChannelBinding::TlsExporter(_)));
        let policy = Policy::from_toml(&self.enclave.policy(MAXIMUM_AGE)).unwrap();
        let exchange = Exchange {
            request: Some(RequestBytes {
                method: "POST",
                target: "/v1/answer",
                body: b"question",
            }),
            answer: Some(b"answer"),
        };
        let (transcript, outcome) = verify_bundle(&bundle, &exchange, &policy, None);
        assert!(outcome.is_ok(), "{}", transcript.to_table(false));
    }

    fn attestations(&self) -> usize {
        self.enclave.attestations.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn requests_go_over_the_connection_that_was_verified() {
    let setup = Setup::new().await;
    for _ in 0..3 {
        let response = setup.get("/v1/echo?a=1").await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-toy"], "yes");
        let echo: Value = response.json().await.unwrap();
        assert_eq!(echo["target"], "/v1/echo?a=1");
        let mut fields: Vec<_> = echo["fields"].as_array().unwrap().clone();
        fields.sort_by_key(|field| field.to_string());
        assert_eq!(fields, ["accept", "authorization", "host"]);
    }
    // The connection was kept, and no second one verified.
    assert_eq!(setup.attestations(), 1);
    assert_eq!(
        setup.enclave.requests.load(Ordering::SeqCst),
        0,
        "sent encrypted"
    );
}

#[tokio::test]
async fn every_further_connection_is_verified_for_itself() {
    let setup = Setup::new().await;
    let first = setup.get("/v1/gated").await;
    let second = setup.get("/v1/gated").await;
    assert_eq!(setup.attestations(), 2);
    drop((first, second));
}

#[tokio::test]
async fn a_connection_is_not_used_when_its_verification_has_run_out() {
    let setup = Setup::new().await;
    setup.get("/v1/echo").await.bytes().await.unwrap();
    setup.enclave.advance(MAXIMUM_AGE);
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert_eq!(setup.attestations(), 2);
    setup.enclave.advance(MAXIMUM_AGE);
    setup.enclave.set_fault(Fault::NoAttestation);
    let (status, code) = refusal(setup.get("/v1/echo").await).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert_eq!(code, "service_unreachable");
    assert_eq!(setup.enclave.processed.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_connection_that_was_closed_while_it_waited_is_replaced() {
    let setup = Setup::of(TlsFault::ShortIdle).await;
    let counters = setup.enclave.tls_connections.lock().unwrap().clone();
    let closed = || counters.as_ref().unwrap().open() == 0;
    for requests in 1..4 {
        eventually("the connection is closed", closed).await;
        // And its end arrives.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let response = setup.get("/v1/echo").await;
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
        assert_eq!(setup.attestations(), 1 + requests);
    }
}

#[tokio::test]
async fn pieces_pass_over_tls_before_the_next_exist() {
    let setup = Setup::new().await;
    let mut body = setup.get("/v1/gated").await.bytes_stream();
    for i in 0..4 {
        setup.enclave.gate.notify_one();
        let piece = body.next().await.unwrap().unwrap();
        assert_eq!(piece, format!("data: {i}\n\n"));
    }
    assert!(body.next().await.is_none());
}

#[tokio::test]
async fn who_hangs_up_stops_the_generation_over_tls() {
    let setup = Setup::new().await;
    let mut response = setup.get("/v1/endless").await;
    response.chunk().await.unwrap().unwrap();
    drop(response);
    let dropped = || setup.enclave.dropped.load(Ordering::SeqCst) == 1;
    eventually("the generation ends", dropped).await;
}

#[tokio::test]
async fn an_answer_that_was_cut_off_over_tls_does_not_look_whole() {
    let setup = Setup::new().await;
    setup.enclave.set_fault(Fault::CutAnswer(1000));
    let mut response = setup.get("/v1/long").await;
    assert_eq!(response.status(), 200);
    let mut received = 0;
    let error = loop {
        match response.chunk().await {
            Ok(Some(piece)) => received += piece.len(),
            Ok(None) => panic!("looks whole after {received} bytes"),
            Err(error) => break error,
        }
    };
    assert_eq!(received, 1000, "{error}");
}

#[tokio::test]
async fn evidence_that_is_not_about_this_key_and_connection_is_refused() {
    for (fault, claim) in [
        (TlsFault::OtherKey, "tls.key"),
        (TlsFault::NoKey, "tls.key"),
        (TlsFault::OtherConnection, "report_data"),
        (TlsFault::Unbound, "report_data"),
        (TlsFault::OtherNonce, "report_data"),
    ] {
        let (enclave, verification) = verify(fault).await;
        let denial = verification.outcome.unwrap_err();
        assert_eq!(
            (denial.class, denial.claim),
            (Class::NotGenuine, claim),
            "{fault:?}"
        );
        let failed: Vec<_> = verification.transcript.failed().map(|c| c.name).collect();
        assert_eq!(failed[0], claim);
        assert_eq!(enclave.processed.load(Ordering::SeqCst), 0);
    }
    let (_, verification) = verify(TlsFault::None).await;
    assert!(verification.outcome.is_ok() && verification.transcript.is_clean());
}

#[tokio::test]
async fn a_receipt_over_tls_comes_with_the_evidence_of_a_connection() {
    let directory = tempfile::tempdir().unwrap();
    let saver = Saver::new(directory.path().to_owned());
    let setup = Setup::with(TlsFault::None, Some(saver)).await;
    let mut bundles = Vec::new();
    for attestations in 1..=2 {
        let id = setup.ask().await;
        let fetched = setup.get(&format!("/v1/receipts/{id}")).await;
        assert_eq!(fetched.status(), 200);
        let fetched = fetched.bytes().await.unwrap();
        setup.assert_proves(&fetched);
        let file = directory.path().join(format!("{id}.json"));
        eventually("the receipt is saved", || file.exists()).await;
        assert_eq!(std::fs::read(file).unwrap(), fetched);
        assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), 0);
        // Another connection, under another keyset, whose evidence is its own.
        assert!(setup.attestations() >= attestations);
        setup.enclave.advance(MAXIMUM_AGE);
        bundles.push(fetched);
    }
    let binding = |json: &[u8]| Bundle::from_json(json).ok().unwrap().attestation.binding;
    assert_ne!(binding(&bundles[0]), binding(&bundles[1]));

    let unknown = format!("/v1/receipts/cmpl-{}", "0".repeat(32));
    let unknown = setup.get(&unknown).await;
    assert_eq!(unknown.status(), 404);
    assert_eq!(unknown.text().await.unwrap(), "no such receipt");
}

#[tokio::test]
async fn a_keyset_that_only_a_later_connection_showed_is_remembered_for_its_receipts() {
    let setup = Setup::new().await;
    // The waiting connection is busy, so the answer comes on another one, and under a keyset that has begun since.
    let busy = setup.get("/v1/gated").await;
    setup.enclave.advance(1);
    let id = setup.ask().await;
    assert_eq!(setup.attestations(), 2);
    let bundle = setup.get(&format!("/v1/receipts/{id}")).await;
    assert_eq!(bundle.status(), 200);
    setup.assert_proves(&bundle.bytes().await.unwrap());
    drop(busy);
}

async fn handshake_refused(address: SocketAddr, found: &str) {
    let enclave = Enclave::new(NOW);
    let verification = service(&enclave, address).verify().await.unwrap();
    let denial = verification.outcome.unwrap_err();
    assert_eq!(
        (denial.class, denial.claim),
        (Class::NotGenuine, "tls.handshake")
    );
    assert!(denial.found.contains(found), "{denial}");
    let failed = verification.transcript.failed().next().unwrap();
    assert_eq!(failed.name, "tls.handshake");
}

#[tokio::test]
async fn a_server_of_tls_1_2_or_of_plain_http_is_refused() {
    let enclave = Enclave::new(NOW);
    handshake_refused(enclave.serve().await, "").await;

    let pair = rcgen::generate_simple_self_signed(vec!["casemate.invalid".into()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let old = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![pair.cert.der().clone()], key.into())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(old));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            assert!(acceptor.accept(stream).await.is_err());
        }
    });
    handshake_refused(address, "ProtocolVersion").await;
}

#[tokio::test]
async fn nobody_at_the_port_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let refused = service(&Enclave::new(NOW), address).verify().await;
    assert!(matches!(refused, Err(NotVerified::Unreachable(_))));
}
