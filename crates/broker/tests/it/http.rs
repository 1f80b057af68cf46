//! The same decisions over HTTP: statuses, bodies, limits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use casemate_attest::TeeKind;
use casemate_broker::api;
use casemate_listen::{Ended, Limits, Server};
use casemate_release::client::{Attested, Challenged, Exchange};
use casemate_release::credential::VerifiedCredential;
use casemate_release::issuance::{self, CredentialResponse, IssuanceChallenge};
use casemate_release::random::SystemRandom;
use casemate_release::rcar::{self, ErrorInformation};
use reqwest::{Client, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::support::{DATA_KEY, MODEL, Rig, path, settings};

struct Served {
    rig: Rig,
    address: SocketAddr,
    client: Client,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Ended>,
}

impl Served {
    async fn new(rig: Rig) -> Self {
        Self::with_body_timeout(rig, api::BODY_TIMEOUT).await
    }

    async fn with_body_timeout(rig: Rig, body_timeout: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let router = api::router_with(rig.broker.clone(), body_timeout);
        let server = tokio::spawn(
            Server::new(Limits::default()).serve(listener, router, async {
                let _ = stopped.await;
            }),
        );
        let client = Client::builder().no_proxy().build().unwrap();
        Self {
            rig,
            address,
            client,
            stop,
            server,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn post(&self, path: &str, cookie: Option<&str>, body: Vec<u8>) -> Response {
        let mut request = self.client.post(self.url(path)).body(body);
        if let Some(cookie) = cookie {
            request = request.header("cookie", cookie);
        }
        request.send().await.unwrap()
    }

    async fn get(&self, path: &str, cookie: Option<&str>) -> Response {
        let mut request = self.client.get(self.url(path));
        if let Some(cookie) = cookie {
            request = request.header("cookie", cookie);
        }
        request.send().await.unwrap()
    }

    async fn challenged(&self) -> Challenged {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom).unwrap();
        let response = self.post(rcar::AUTH_PATH, None, exchange.request()).await;
        assert_eq!(response.status(), StatusCode::OK);
        let cookies: Vec<String> = response
            .headers()
            .get_all("set-cookie")
            .iter()
            .map(|value| value.to_str().unwrap().to_owned())
            .collect();
        assert!(cookies.iter().any(|cookie| cookie.contains("HttpOnly")));
        let body = response.bytes().await.unwrap();
        exchange
            .challenge(&body, cookies.iter().map(String::as_str))
            .unwrap()
    }

    async fn attested(&self) -> Attested {
        let challenged = self.challenged().await;
        let evidence = self.rig.quote(1, &challenged.report_data());
        let body = challenged.attestation(&evidence).unwrap();
        let response = self
            .post(rcar::ATTEST_PATH, Some(&challenged.cookie()), body)
            .await;
        assert_eq!(response.status(), StatusCode::OK);
        challenged
            .attested(&response.bytes().await.unwrap())
            .unwrap()
    }
}

fn resource_url() -> String {
    format!("{}/{}", rcar::RESOURCE_PATH, path())
}

async fn information(response: Response) -> ErrorInformation {
    assert_eq!(response.headers()["content-type"], "application/json");
    serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_gets_its_key_and_its_credential() {
    let served = Served::new(Rig::new()).await;
    let attested = served.attested().await;
    let response = served.get(&resource_url(), Some(&attested.cookie())).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["cache-control"], "no-store");
    let jwe = response.bytes().await.unwrap();
    let grant = attested
        .grant(&jwe, &served.rig.provider.verifying_key())
        .unwrap();
    assert_eq!(grant.data_key().expose(), &DATA_KEY);

    let cookie = attested.cookie();
    let response = served
        .post(issuance::CHALLENGE_PATH, Some(&cookie), vec![])
        .await;
    let challenge = IssuanceChallenge::parse(&response.bytes().await.unwrap()).unwrap();
    let request = served.rig.credential_request_over(
        &challenge.nonce(),
        &served.rig.keyset(),
        casemate_channel::keyset::Purpose::Credential,
    );
    let body = request.to_json().unwrap();
    let response = served
        .post(issuance::CREDENTIAL_PATH, Some(&cookie), body)
        .await;
    assert_eq!(response.status(), StatusCode::OK);
    let envelope = CredentialResponse::parse(&response.bytes().await.unwrap()).unwrap();
    let now = served.rig.clock.seconds();
    VerifiedCredential::verify(&envelope, &served.rig.broker.issuer(), now).unwrap();

    let metrics = served.get("/metrics", None).await.text().await.unwrap();
    for line in [
        "casemate_broker_decisions_total{action=\"release\",verdict=\"development\"} 1",
        "casemate_broker_decisions_total{action=\"credential\",verdict=\"development\"} 1",
        "casemate_broker_decisions_total{action=\"release\",verdict=\"genuine\"} 0",
        "casemate_broker_sessions{state=\"attested\"} 0",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line} in\n{metrics}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_is_a_jwt_that_verifies_under_the_key_it_carries() {
    use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    let served = Served::new(Rig::new()).await;
    let attested = served.attested().await;
    let parts: Vec<&str> = attested.token().split('.').collect();
    let json = |part: &str| -> serde_json::Value {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
    };
    let (header, claims) = (json(parts[0]), json(parts[1]));
    assert_eq!(header["alg"], "EdDSA");
    assert_eq!(header["jwk"], served.rig.broker.token_jwk());
    let key = URL_SAFE_NO_PAD
        .decode(header["jwk"]["x"].as_str().unwrap())
        .unwrap();
    UnparsedPublicKey::new(&ED25519, key)
        .verify(
            format!("{}.{}", parts[0], parts[1]).as_bytes(),
            &URL_SAFE_NO_PAD.decode(parts[2]).unwrap(),
        )
        .unwrap();
    let now = served.rig.clock.seconds();
    assert_eq!(
        (claims["iat"].as_u64(), claims["exp"].as_u64()),
        (Some(now), Some(now + 3600))
    );
    assert_eq!(claims["casemate"]["verdict"], "development");
    assert_eq!(claims["tee-pubkey"]["kty"], "EC");
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_say_what_was_found_expected_and_what_to_do() {
    let served = Served::new(Rig::new()).await;
    let challenged = served.challenged().await;
    let evidence = served.rig.quote(2, &challenged.report_data());
    let body = challenged.attestation(&evidence).unwrap();
    let response = served
        .post(rcar::ATTEST_PATH, Some(&challenged.cookie()), body)
        .await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    let information = information(response).await;
    assert_eq!(information.kind, "evidence_denied");
    let denial = information.denial.unwrap();
    assert_eq!(denial.class, "refused");
    for part in [
        &denial.claim,
        &denial.found,
        &denial.expected,
        &denial.remedy,
    ] {
        assert!(!part.is_empty());
    }

    let attested = served.attested().await;
    served.rig.set_policy(2, 9, &[MODEL]).unwrap();
    let response = served.get(&resource_url(), Some(&attested.cookie())).await;
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    let information = self::information(response).await;
    assert_eq!(information.kind, "not_allowed");
    assert_eq!(information.denial.unwrap().class, "refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_are_the_protocols() {
    let served = Served::new(Rig::new()).await;
    let status = async |response: Response| {
        let status = response.status();
        (status, information(response).await.kind)
    };
    let no_session = (StatusCode::UNAUTHORIZED, "session".to_owned());
    assert_eq!(
        status(served.get(&resource_url(), None).await).await,
        no_session
    );
    let unknown = Some("kbs-session-id=0000");
    assert_eq!(
        status(served.get(&resource_url(), unknown).await).await,
        no_session
    );
    assert_eq!(
        status(served.post(rcar::ATTEST_PATH, unknown, vec![]).await).await,
        no_session
    );

    let attested = served.attested().await;
    let cookie = attested.cookie();
    // A second, different session: the broker does not choose.
    let two = format!("{cookie}; kbs-session-id=0000");
    assert_eq!(
        status(served.get(&resource_url(), Some(&two)).await).await,
        no_session
    );

    let other = format!("{}/default/model/other", rcar::RESOURCE_PATH);
    let not_found = (StatusCode::NOT_FOUND, "resource_not_found".to_owned());
    assert_eq!(
        status(served.get(&other, Some(&cookie)).await).await,
        not_found
    );
    let odd = format!("{}/default/model/a%2e%2e%20b", rcar::RESOURCE_PATH);
    let malformed = (StatusCode::BAD_REQUEST, "malformed".to_owned());
    assert_eq!(
        status(served.get(&odd, Some(&cookie)).await).await,
        malformed
    );
    assert_eq!(
        status(served.post(rcar::AUTH_PATH, None, b"{".to_vec()).await).await,
        malformed
    );
    let old = br#"{"version":"0.1.0","tee":"tdx","extra-params":""}"#.to_vec();
    assert_eq!(
        status(served.post(rcar::AUTH_PATH, None, old).await).await,
        malformed
    );

    let no_endpoint = (StatusCode::NOT_FOUND, "not_found".to_owned());
    assert_eq!(status(served.get("/policy", None).await).await, no_endpoint);
    let nothing_released = (StatusCode::FORBIDDEN, "nothing_released".to_owned());
    // The denial above ended its session.
    let response = served
        .post(issuance::CHALLENGE_PATH, Some(&cookie), vec![])
        .await;
    assert_eq!(status(response).await, no_session);
    let cookie = served.attested().await.cookie();
    let response = served
        .post(issuance::CHALLENGE_PATH, Some(&cookie), vec![])
        .await;
    assert_eq!(status(response).await, nothing_released);
    let response = served.get(rcar::AUTH_PATH, None).await;
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_beyond_their_limit_are_refused() {
    let served = Served::new(Rig::new()).await;
    let response = served
        .post(
            rcar::AUTH_PATH,
            None,
            vec![b' '; rcar::MAX_REQUEST_BYTES + 1],
        )
        .await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let challenged = served.challenged().await;
    let evidence = served.rig.quote(1, &challenged.report_data());
    let body = challenged.attestation(&evidence).unwrap();
    let long = vec![b' '; rcar::MAX_ATTESTATION_BYTES + 1];
    let cookie = challenged.cookie();
    let response = served.post(rcar::ATTEST_PATH, Some(&cookie), long).await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    // It was refused before it reached the session.
    let response = served.post(rcar::ATTEST_PATH, Some(&cookie), body).await;
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_do_not_arrive_are_not_waited_for() {
    let rig = Rig::new();
    let served = Served::with_body_timeout(rig, Duration::from_millis(200)).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = "POST /kbs/v0/auth HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut reply = [0; 12];
    tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut reply))
        .await
        .expect("an answer although the body is missing")
        .unwrap();
    assert_eq!(&reply, b"HTTP/1.1 408");
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_beyond_their_limit_are_refused() {
    let served = Served::new(Rig::new()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = format!(
        "GET /livez HTTP/1.1\r\nhost: x\r\nlong: {}\r\n\r\n",
        "x".repeat(64 * 1024)
    );
    let _ = stream.write_all(head.as_bytes()).await;
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply).await;
    assert!(
        reply.starts_with(b"HTTP/1.1 431"),
        "{}",
        String::from_utf8_lossy(&reply)
    );
    assert_eq!(served.get("/livez", None).await.status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_means_that_a_policy_is_in_force() {
    let served = Served::new(Rig::empty(settings())).await;
    assert_eq!(served.get("/livez", None).await.status(), StatusCode::OK);
    let response = served.get("/readyz", None).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(response.headers().contains_key("retry-after"));
    let request = Exchange::new(TeeKind::Tdx, &SystemRandom)
        .unwrap()
        .request();
    let response = served.post(rcar::AUTH_PATH, None, request).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    served.rig.set_policy(1, 1, &[MODEL]).unwrap();
    assert_eq!(served.get("/readyz", None).await.status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_guests_at_once_each_get_their_own_answer() {
    let served = Arc::new(Served::new(Rig::new()).await);
    let mut guests = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let served = served.clone();
        guests.spawn(async move {
            let attested = served.attested().await;
            let response = served.get(&resource_url(), Some(&attested.cookie())).await;
            let jwe = response.bytes().await.unwrap();
            attested
                .grant(&jwe, &served.rig.provider.verifying_key())
                .unwrap();
        });
    }
    while let Some(guest) = guests.join_next().await {
        guest.unwrap();
    }
    assert_eq!(served.rig.broker.verify_log(&[]).unwrap().size, 3 + 24);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_ends_idle_connections_and_the_server() {
    let served = Served::new(Rig::new()).await;
    let idle = TcpStream::connect(served.address).await.unwrap();
    assert_eq!(served.get("/livez", None).await.status(), StatusCode::OK);
    let Served {
        stop,
        server,
        address,
        ..
    } = served;
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(5), server)
        .await
        .unwrap()
        .unwrap();
    assert!(TcpStream::connect(address).await.is_err());
    drop(idle);
}
