//! The broker is away for longer than a credential holds: what users, operators and prompts meet then, and what brings
//! the service back.

use std::time::{Duration, Instant};

use axum::http::{Request, header};
use bytes::Bytes;
use casemate_channel::keyset::Keyset;
use casemate_channel::ohttp::{GATEWAY_PATH, REQUEST_MEDIA_TYPE, Recipient};
use casemate_channel::tls::{client_config, server_name};
use casemate_channel::verify::AttestationResponse;
use casemate_e2e::search::messages;
use casemate_e2e::watch::{metric, quiet};
use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{EnclaveSettings, Role, http_get};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Life of a credential. Requests are served for a minute longer, because clocks differ.
const CREDENTIAL_SECONDS: u64 = 10;
/// For everything that is waited for: several times the longest pause between two renewals.
const PATIENCE: Duration = Duration::from_secs(300);
const EXPIRED: &str = "the credential has expired";

fn chat() -> String {
    json!({
        "model": TINY, "temperature": 0, "max_tokens": 4,
        "messages": [{"role": "user", "content": "go on"}],
    })
    .to_string()
}

/// What a user's client hears from a proxy.
async fn ask_proxy(url: &str) -> (u16, Value) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(format!("{url}/v1/chat/completions"));
    let response = request.body(chat()).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

/// A user without a proxy who does not look at what was attested: the enclave alone keeps him out.
struct Stranger {
    client: reqwest::Client,
    gateway: String,
    recipient: Recipient,
    /// Open since before the end.
    tls: TlsStream<TcpStream>,
}

impl Stranger {
    async fn meet(enclave: &str, attested_tls: &str) -> Stranger {
        let nonce = "5d".repeat(32);
        let reply = http_get(enclave, &format!("/v1/attestation?nonce={nonce}")).unwrap();
        let shown = AttestationResponse::from_json(reply.body.as_bytes()).unwrap();
        let keyset = Keyset::decode(&shown.keyset).unwrap();
        Stranger {
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
            gateway: format!("{enclave}{GATEWAY_PATH}"),
            recipient: Recipient::from_config(&keyset.ohttp_config).unwrap(),
            tls: handshake(attested_tls).await.unwrap(),
        }
    }

    /// A prompt, encrypted. The status is the inner one where there is one.
    async fn ask_encrypted(&self) -> (u16, String) {
        let request = Request::post("/v1/chat/completions")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Bytes::from(chat()))
            .unwrap();
        let (sent, pending) = self.recipient.encapsulate(&request).unwrap();
        let response = self
            .client
            .post(&self.gateway)
            .header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE)
            .body(sent)
            .send()
            .await
            .unwrap();
        let status = response.status().as_u16();
        if status != 200 {
            return (status, response.text().await.unwrap());
        }
        let answer = pending.open(response.bytes_stream()).await.unwrap();
        let status = answer.status.as_u16();
        let pieces: Vec<_> = answer.body.collect().await;
        let body: Vec<u8> = pieces
            .into_iter()
            .flat_map(|piece| piece.unwrap())
            .collect();
        (status, String::from_utf8(body).unwrap())
    }

    /// A prompt on the connection that is open; with the head of the answer, in lower case.
    async fn ask_directly(&mut self) -> (u16, String) {
        let body = chat();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        self.tls.write_all(head.as_bytes()).await.unwrap();
        self.tls.write_all(body.as_bytes()).await.unwrap();
        self.tls.flush().await.unwrap();
        let mut reply = Vec::new();
        loop {
            if let Some(message) = messages(&reply).pop() {
                let status = message.head.split(' ').nth(1).unwrap();
                let body = String::from_utf8_lossy(&message.body);
                return (status.parse().unwrap(), message.head.clone() + &body);
            }
            let mut piece = [0; 4096];
            let read = self.tls.read(&mut piece).await.unwrap();
            assert!(read > 0, "closed after {}", String::from_utf8_lossy(&reply));
            reply.extend_from_slice(&piece[..read]);
        }
    }
}

async fn handshake(attested_tls: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let address = attested_tls.trim_start_matches("tls://");
    let connector = TlsConnector::from(client_config().unwrap());
    let stream = TcpStream::connect(address).await?;
    connector.connect(server_name(), stream).await
}

/// How often the log of a program says something.
fn said(stage: &mut Stage, role: Role, what: &str) -> usize {
    let log = stage.deployment.program(role).unwrap().log().to_owned();
    std::fs::read_to_string(log).unwrap().matches(what).count()
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

#[test]
fn without_a_broker_the_service_ends_with_its_credential_and_comes_back_with_the_broker() {
    let settings = EnclaveSettings {
        attested_tls: true,
        ..EnclaveSettings::default()
    };
    let mut stage = Stage::until_enclave_with(settings, |deployment| {
        deployment.credentials_for(CREDENTIAL_SECONDS);
    })
    .unwrap();
    let facts = stage.deployment.start_enclave().unwrap();
    let (enclave, attested_tls) = (facts.url, facts.attested_tls.unwrap());
    let pid = stage.deployment.program(Role::Enclave).unwrap().pid();
    let proxies = [enclave.clone(), attested_tls.clone()]
        .map(|url| stage.deployment.start_proxy_to(&url).unwrap().url);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for proxy in &proxies {
            let (status, answer) = ask_proxy(proxy).await;
            assert_eq!(status, 200, "{answer}");
        }
        stage.deployment.stop(Role::Broker);
        let mut stranger = Stranger::meet(&enclave, &attested_tls).await;

        // It serves on, at both doors, and says that it cannot renew.
        let failed = "keyset and credential could not be renewed";
        until("a renewal fails", async || {
            said(&mut stage, Role::Enclave, failed) > 0
        })
        .await;
        let (status, answer) = stranger.ask_encrypted().await;
        assert_eq!(status, 200, "{answer}");
        let (status, answer) = stranger.ask_directly().await;
        assert_eq!(status, 200, "{answer}");

        // The credential has ended: operators see it, and no proxy sends a prompt any more.
        let not_ready = async || {
            let reply = http_get(&enclave, "/readyz").unwrap();
            assert!(reply.status == 200 || reply.body == format!("{EXPIRED}\n"));
            reply.status == 503
        };
        until("the credential ends", not_ready).await;
        for proxy in &proxies {
            let (status, answer) = ask_proxy(proxy).await;
            assert_eq!(status, 503, "{answer}");
            let error = &answer["error"];
            assert_eq!(error["code"], "service_not_verified", "{answer}");
            assert_eq!(error["type"], "proxy_error", "{answer}");
            assert_eq!(error["param"], Value::Null, "{answer}");
            assert!(
                error["message"].as_str().unwrap().contains("credential"),
                "{answer}"
            );
            assert_eq!(http_get(proxy, "/readyz").unwrap().status, 503);
        }

        // A minute later, whoever sends one all the same is refused, and nothing is computed for him.
        until("the encrypted door closes", async || {
            // One that is silent for a minute is closed, so there is always a young one.
            if let Ok(tls) = handshake(&attested_tls).await {
                stranger.tls = tls;
            }
            let (status, answer) = stranger.ask_encrypted().await;
            assert!(
                status == 200 || answer.contains(EXPIRED),
                "{status} {answer}"
            );
            status == 503
        })
        .await;
        quiet(&enclave, PATIENCE).unwrap();
        let counted = |name: &str| metric(&enclave, name).unwrap();
        let counters = [
            "requests_total",
            "prompt_tokens_total",
            "completion_tokens_total",
        ];
        let counters = counters.map(|name| format!("casemate_{name}"));
        let before = counters.clone().map(|name| counted(&name));
        let refused = counted("casemate_requests_refused_total");
        for _ in 0..3 {
            let (status, answer) = stranger.ask_encrypted().await;
            assert_eq!(status, 503);
            let problem: Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(problem["title"], EXPIRED);
        }
        let (status, answer) = stranger.ask_directly().await;
        assert!(status == 503 && answer.contains(EXPIRED), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        // Its key is gone, so there are no new connections either.
        until("handshakes end", async || {
            handshake(&attested_tls).await.is_err()
        })
        .await;
        assert_eq!(counters.map(|name| counted(&name)), before);
        assert_eq!(counted("casemate_requests_refused_total"), refused + 4.0);

        // The broker comes back. Nobody else does anything.
        let renewed = said(&mut stage, Role::Enclave, "keyset and credential renewed");
        let attested = counted("casemate_attestations_total");
        stage.deployment.start_broker_again().unwrap();
        until("the enclave renews", async || {
            http_get(&enclave, "/readyz").unwrap().status == 200
        })
        .await;
        assert_eq!(stage.deployment.program(Role::Enclave).unwrap().pid(), pid);
        for proxy in &proxies {
            let (status, answer) = ask_proxy(proxy).await;
            assert_eq!(status, 200, "{answer}");
        }
        let again = said(&mut stage, Role::Enclave, "keyset and credential renewed");
        assert!(again > renewed);
        assert!(counted("casemate_attestations_total") >= attested + 2.0);
        assert!(said(&mut stage, Role::Proxy, "verified the service again") > 0);
        // The key that was shown before is not known any more.
        let (status, answer) = stranger.ask_encrypted().await;
        assert!(
            status == 400 && answer.contains("the key is not held"),
            "{status} {answer}"
        );
    });
}
