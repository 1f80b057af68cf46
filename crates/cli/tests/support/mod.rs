//! An enclave for tests: a toy service behind the channel's server half, with evidence of the fake
//! TEE and a credential of its own issuer. Each part can be made to misbehave.

#![allow(dead_code, reason = "two test programs use it, each a part")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use casemate_attest::UnixTime;
use casemate_attest::measure::Measurement;
use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_channel::ohttp::{
    ANSWER_MEDIA_TYPE, GATEWAY_PATH, KEYSET_HINT, Keyring, ReceiveError, Received,
};
use casemate_channel::receipt::{
    AnswerHasher, FetchedReceipt, RECEIPT_FIELD, RECEIPTS_PATH, Receipt, RequestHash, RequestId,
    Salt,
};
use casemate_channel::tls::{ServerKey, service_exporter};
use casemate_channel::verify::{ATTESTATION_PATH, AttestationResponse};
use casemate_container::signing::SigningKey;
use casemate_listen::{Counters, Establish, Limits, Server};
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::policies::PolicyFile;
use casemate_testkit::statements;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// What is wrong with the enclave, if anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// Attestation answers 503.
    NoAttestation,
    /// Attestation is asked and says nothing.
    SilentAttestation,
    /// Attestation answers something else.
    NotAttestation,
    /// Evidence is over another nonce.
    StaleEvidence,
    /// The credential is for another service.
    OtherService,
    /// The host says that the key is unknown, though it is not.
    KeyDenied,
    /// As before, and the service has a new key after each request.
    KeyDeniedAndRotated,
    /// Receipts are signed by another key than the keyset's.
    OtherReceiptKey,
    /// Receipts are those of another request.
    OtherReceipt,
    /// The host answers 500 to requests.
    HostBroken,
    /// The host answers 503 to requests, with this in `Retry-After`.
    HostBusy(&'static str),
    /// The host takes requests and says nothing.
    Silent,
    /// The host answers in clear.
    HostInClear,
    /// The host cuts answers off after this many bytes.
    CutAnswer(usize),
}

pub(crate) struct Enclave {
    tee: Arc<FakeTee>,
    /// Which replica of its service it is.
    replica: u64,
    measurement: Measurement,
    issuer: SigningKey,
    receipt_key: SigningKey,
    /// The keyset that was shown last.
    keyset: Mutex<Vec<u8>>,
    /// The receipts of answers that have one.
    receipts: Mutex<HashMap<RequestId, FetchedReceipt>>,
    keyring: Keyring,
    config: Mutex<Vec<u8>>,
    fault: Mutex<Fault>,
    /// The time, for the enclave and for its user.
    pub(crate) clock: AtomicU64,
    pub(crate) attestations: AtomicUsize,
    /// Encapsulated requests that came in.
    pub(crate) requests: AtomicUsize,
    /// Inner requests that were processed.
    pub(crate) processed: AtomicUsize,
    /// Generations that were dropped before their end.
    pub(crate) dropped: AtomicUsize,
    /// Of the server of attested TLS, once there is one.
    pub(crate) tls_connections: Mutex<Option<Arc<Counters>>>,
    /// Lets `/v1/gated` send its next event.
    pub(crate) gate: Notify,
}

impl Enclave {
    pub(crate) fn new(now: u64) -> Arc<Enclave> {
        Enclave::replica(now, Arc::new(FakeTee::ephemeral(now).unwrap()), 0)
    }

    /// Another enclave of the same service, with keys of its own.
    pub(crate) fn another(&self) -> Arc<Enclave> {
        let now = self.now().as_secs();
        Enclave::replica(now, Arc::clone(&self.tee), self.replica + 1)
    }

    fn replica(now: u64, tee: Arc<FakeTee>, replica: u64) -> Arc<Enclave> {
        let keyring = Keyring::default();
        let config = keyring.generate(u64::MAX).unwrap().encoded;
        Arc::new(Enclave {
            tee,
            replica,
            measurement: Measurement {
                mr_td: [1; 48],
                mr_config_id: [2; 48],
                rtmr: [[3; 48]; 4],
            },
            issuer: SigningKey::from_seed(&[1; 32]),
            receipt_key: SigningKey::from_seed(&[4; 32]),
            keyset: Mutex::default(),
            receipts: Mutex::default(),
            keyring,
            config: Mutex::new(config),
            fault: Mutex::default(),
            clock: AtomicU64::new(now),
            attestations: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            processed: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            tls_connections: Mutex::default(),
            gate: Notify::new(),
        })
    }

    /// Serves until the test's runtime ends; returns the address.
    pub(crate) async fn serve(self: &Arc<Enclave>) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(self.clone().serve_on(listener));
        address
    }

    async fn serve_on(self: Arc<Enclave>, listener: TcpListener) {
        let router = Router::new()
            .route(ATTESTATION_PATH, get(attestation))
            .route(GATEWAY_PATH, post(gateway))
            .with_state(self);
        axum::serve(listener, router).await.unwrap();
    }

    /// Serves as one of several replicas: attestation is that of the replica at `front`, requests go where their keyset
    /// is held.
    pub(crate) async fn serve_replicas(
        replicas: Vec<Arc<Enclave>>,
        front: Arc<AtomicUsize>,
    ) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let held = replicas.clone();
        let attest = async move |query: Query<NonceQuery>| {
            let enclave = replicas[front.load(Ordering::SeqCst)].clone();
            attestation(State(enclave), query).await
        };
        let relay = async move |request: Request| {
            let hint = request.headers()[KEYSET_HINT].to_str().unwrap().to_owned();
            let holds = |enclave: &&Arc<Enclave>| {
                KeysetDigest::of(&enclave.keyset.lock().unwrap()).to_string() == hint
            };
            let enclave = held.iter().find(holds).unwrap().clone();
            gateway(State(enclave), request).await
        };
        let router = Router::new()
            .route(ATTESTATION_PATH, get(attest))
            .route(GATEWAY_PATH, post(relay));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        address
    }

    pub(crate) fn now(&self) -> UnixTime {
        UnixTime::from_secs(self.clock.load(Ordering::SeqCst))
    }

    pub(crate) fn advance(&self, seconds: u64) {
        self.clock.fetch_add(seconds, Ordering::SeqCst);
    }

    pub(crate) fn set_fault(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    fn fault(&self) -> Fault {
        *self.fault.lock().unwrap()
    }

    /// Makes a new key and forgets the former ones.
    pub(crate) fn rotate(&self) {
        let ids = self.keyring.ids();
        *self.config.lock().unwrap() = self.keyring.generate(u64::MAX).unwrap().encoded;
        ids.into_iter().for_each(|id| self.keyring.erase(id));
    }

    /// A policy that accepts this enclave.
    pub(crate) fn policy(&self, maximum_age: u64) -> String {
        let file = PolicyFile {
            version: 3,
            maximum_evidence_age: maximum_age,
            ..PolicyFile::new(self.tee.root_spki_sha256(), self.measurement)
        };
        let issuer = self.issuer.verifying_key().to_string();
        file.for_users((&hex::encode(statements::MODEL), 7), &issuer, "demo")
            .to_toml()
    }

    fn attest(&self, nonce: [u8; 32]) -> AttestationResponse {
        self.attest_bound(nonce, None, &ChannelBinding::Key)
    }

    fn attest_bound(
        &self,
        mut nonce: [u8; 32],
        tls_key_digest: Option<[u8; 32]>,
        binding: &ChannelBinding,
    ) -> AttestationResponse {
        let now = self.now().as_secs();
        let keyset = Keyset {
            receipt_key: *self.receipt_key.verifying_key().as_bytes(),
            tls_key_digest,
            ..statements::keyset(self.config.lock().unwrap().clone(), now)
        };
        let keyset = keyset.encode().unwrap();
        keyset.clone_into(&mut self.keyset.lock().unwrap());
        let digest = KeysetDigest::of(&keyset);
        let mut credential = statements::credential(&digest, now);
        if self.fault() == Fault::OtherService {
            credential.service = "other".into();
        }
        if self.fault() == Fault::StaleEvidence {
            nonce[0] ^= 1;
        }
        let data = report_data(Purpose::Serving, Role::Service, &digest, &nonce, binding);
        AttestationResponse {
            evidence: self.tee.quote(&self.measurement, &data, now).unwrap(),
            keyset,
            credential: credential.issue(&self.issuer).unwrap(),
        }
    }

    /// The toy service.
    fn inner(
        self: &Arc<Enclave>,
        request: &http::Request<Bytes>,
    ) -> (
        StatusCode,
        HeaderMap,
        stream::BoxStream<'static, Result<Bytes, Infallible>>,
    ) {
        self.processed.fetch_add(1, Ordering::SeqCst);
        let mut headers = HeaderMap::new();
        let media_type = match request.uri().path() {
            "/v1/long" => "application/json",
            _ => "text/event-stream",
        };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
        headers.insert("x-toy", HeaderValue::from_static("yes"));
        let once = |text: String| stream::iter([Ok(Bytes::from(text))]).boxed();
        let (status, body) = match request.uri().path() {
            "/v1/echo" => {
                let names: Vec<_> = request.headers().keys().map(|n| n.as_str()).collect();
                let text = serde_json::json!({
                    "method": request.method().as_str(),
                    "target": request.uri().to_string(),
                    "fields": names,
                    "body": String::from_utf8_lossy(request.body()),
                });
                (StatusCode::OK, once(text.to_string()))
            }
            "/v1/gated" => {
                let enclave = self.clone();
                let events = stream::iter(0..4).then(move |i| {
                    let enclave = enclave.clone();
                    async move {
                        enclave.gate.notified().await;
                        Ok(Bytes::from(format!("data: {i}\n\n")))
                    }
                });
                (StatusCode::OK, events.boxed())
            }
            "/v1/endless" => (StatusCode::OK, self.clone().endless().boxed()),
            path @ ("/v1/answer" | "/v1/gated-answer") => {
                let id = self.make_receipt(request, b"answer");
                let value = HeaderValue::from_str(id.as_str()).unwrap();
                headers.insert(RECEIPT_FIELD, value);
                let gated = path == "/v1/gated-answer";
                let enclave = self.clone();
                let answer = stream::once(async move {
                    if gated {
                        enclave.gate.notified().await;
                    }
                    Ok(Bytes::from("answer"))
                });
                (StatusCode::OK, answer.boxed())
            }
            path if path.starts_with(RECEIPTS_PATH) => {
                let id = path[RECEIPTS_PATH.len()..].parse().unwrap();
                match self.receipts.lock().unwrap().get(&id) {
                    Some(fetched) => (StatusCode::OK, once(fetched.to_json())),
                    None => (StatusCode::NOT_FOUND, once("no such receipt".into())),
                }
            }
            "/v1/long" => (StatusCode::OK, once("x".repeat(100_000))),
            "/v1/teapot" => (StatusCode::IM_A_TEAPOT, once(r#"{"error":{}}"#.into())),
            _ => (StatusCode::NOT_FOUND, once("no such path".into())),
        };
        (status, headers, body)
    }

    /// Makes and keeps the receipt of an answer.
    fn make_receipt(&self, request: &http::Request<Bytes>, answer: &[u8]) -> RequestId {
        let mut receipts = self.receipts.lock().unwrap();
        let counter = receipts.len() as u64 + 1;
        let id = |n: u64| {
            let bits = u128::from(self.replica) << 64 | u128::from(n);
            RequestId::new("chatcmpl", bits.to_be_bytes())
        };
        let (request_salt, answer_salt) = (Salt::random(), Salt::random());
        let mut hasher = AnswerHasher::new(&answer_salt);
        hasher.update(answer);
        let stated = if self.fault() == Fault::OtherReceipt {
            id(u64::MAX)
        } else {
            id(counter)
        };
        let target = request.uri().to_string();
        let request_hash = RequestHash::of(&request_salt, "POST", &target, request.body());
        let keyset = Keyset::decode(&self.keyset.lock().unwrap()).unwrap();
        let now = self.now().as_secs();
        let receipt = Receipt {
            id: stated,
            counter,
            ..statements::receipt(&keyset, request_hash, hasher.finish(), now)
        };
        let key = if self.fault() == Fault::OtherReceiptKey {
            &self.issuer
        } else {
            &self.receipt_key
        };
        let fetched = FetchedReceipt {
            receipt: receipt.sign(key).unwrap(),
            request_salt,
            answer_salt,
        };
        receipts.insert(id(counter), fetched);
        id(counter)
    }

    fn endless(self: Arc<Enclave>) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        let guard = DropGuard(self);
        stream::repeat(()).then(move |()| {
            let _ = &guard;
            async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok(Bytes::from_static(b"data: token\n\n"))
            }
        })
    }
}

/// Counts when it is dropped.
struct DropGuard(Arc<Enclave>);

impl Drop for DropGuard {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(serde::Deserialize)]
struct NonceQuery {
    nonce: String,
}

async fn attestation(
    State(enclave): State<Arc<Enclave>>,
    Query(query): Query<NonceQuery>,
) -> Response {
    enclave.attestations.fetch_add(1, Ordering::SeqCst);
    match enclave.fault() {
        Fault::NoAttestation => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Fault::SilentAttestation => std::future::pending().await,
        Fault::NotAttestation => "{\"hello\":1}".into_response(),
        _ => {
            let mut nonce = [0; 32];
            hex::decode_to_slice(&query.nonce, &mut nonce).unwrap();
            enclave.attest(nonce).to_json().into_response()
        }
    }
}

async fn gateway(State(enclave): State<Arc<Enclave>>, request: Request) -> Response {
    enclave.requests.fetch_add(1, Ordering::SeqCst);
    match enclave.fault() {
        Fault::KeyDenied => return problem(&ReceiveError::UnknownKey(0)),
        Fault::KeyDeniedAndRotated => {
            enclave.rotate();
            return problem(&ReceiveError::UnknownKey(0));
        }
        Fault::HostBroken => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Fault::HostBusy(wait) => {
            let wait = [(header::RETRY_AFTER, wait)];
            return (StatusCode::SERVICE_UNAVAILABLE, wait).into_response();
        }
        Fault::Silent => std::future::pending::<()>().await,
        Fault::HostInClear => return "Paris".into_response(),
        _ => {}
    }
    let transport = request.into_body().into_data_stream();
    let now = enclave.now().as_secs();
    let Received {
        request, responder, ..
    } = match enclave.keyring.receive(transport, 1 << 25, now).await {
        Ok(received) => received,
        Err(error) => return problem(&error),
    };
    let request = request.unwrap();
    if request.uri().path() == "/v1/silent" {
        let _guard = DropGuard(enclave.clone());
        std::future::pending::<()>().await;
    }
    let (status, headers, body) = enclave.inner(&request);
    let answer = responder.respond(status, &headers, body).unwrap();
    let answer: stream::BoxStream<'static, Result<Bytes, std::io::Error>> = match enclave.fault() {
        Fault::CutAnswer(bytes) => {
            let whole: Vec<_> = answer.map(Result::unwrap).collect().await;
            let mut whole = whole.concat();
            whole.truncate(bytes);
            stream::iter([Ok(Bytes::from(whole))]).boxed()
        }
        _ => answer.map(|item| Ok(item.unwrap())).boxed(),
    };
    (
        [(header::CONTENT_TYPE, ANSWER_MEDIA_TYPE)],
        Body::from_stream(answer),
    )
        .into_response()
}

fn problem(error: &ReceiveError) -> Response {
    error.to_response().map(Body::from)
}

/// What is wrong with attested TLS, if anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsFault {
    None,
    /// The keyset names another key.
    OtherKey,
    /// The keyset names none.
    NoKey,
    /// Evidence is bound to another connection.
    OtherConnection,
    /// Evidence is bound to no connection.
    Unbound,
    /// Evidence is over another nonce.
    OtherNonce,
    /// Connections are closed soon after an answer.
    ShortIdle,
}

/// The enclave's other door.
struct Door {
    enclave: Arc<Enclave>,
    key: ServerKey,
    fault: TlsFault,
}

impl Enclave {
    /// Serves attested TLS until the test's runtime ends; returns the address.
    pub(crate) async fn serve_tls(self: &Arc<Enclave>, fault: TlsFault) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(self.clone().serve_tls_on(listener, fault));
        address
    }

    async fn serve_tls_on(self: Arc<Enclave>, listener: TcpListener, fault: TlsFault) {
        let door = Door {
            enclave: self.clone(),
            key: ServerKey::generate().unwrap(),
            fault,
        };
        let mut limits = Limits::default();
        if fault == TlsFault::ShortIdle {
            // Long enough for the user to judge the evidence.
            limits.idle = Duration::from_secs(1);
        }
        let server = Server::new(limits);
        *self.tls_connections.lock().unwrap() = Some(server.counters());
        server.serve(listener, door, std::future::pending()).await;
    }
}

/// A service that can be killed with all its connections, and started again at the same address.
pub(crate) struct Mortal {
    enclave: Arc<Enclave>,
    tls: bool,
    pub(crate) address: SocketAddr,
    alive: Option<Runtime>,
}

impl Mortal {
    pub(crate) fn start(enclave: &Arc<Enclave>, tls: bool) -> Mortal {
        let mut mortal = Mortal {
            enclave: enclave.clone(),
            tls,
            // Where nobody else in these tests listens: its port stays free while it is dead.
            address: "127.77.0.1:0".parse().unwrap(),
            alive: None,
        };
        mortal.revive();
        mortal
    }

    pub(crate) fn revive(&mut self) {
        let listener = std::net::TcpListener::bind(self.address).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.address = listener.local_addr().unwrap();
        let runtime = Runtime::new().unwrap();
        let (enclave, tls) = (self.enclave.clone(), self.tls);
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            match tls {
                true => enclave.serve_tls_on(listener, TlsFault::None).await,
                false => enclave.serve_on(listener).await,
            }
        });
        self.alive = Some(runtime);
    }

    pub(crate) fn kill(&mut self) {
        let runtime = self.alive.take().unwrap();
        // A thread of its own may wait for the end, also where the caller is asynchronous.
        let ending = std::thread::spawn(|| runtime.shutdown_timeout(Duration::from_secs(60)));
        ending.join().unwrap();
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        if self.alive.is_some() {
            self.kill();
        }
    }
}

impl Establish<TcpStream> for Door {
    type Io = TlsStream<TcpStream>;

    async fn establish(&self, stream: TcpStream) -> std::io::Result<(Self::Io, Router)> {
        let stream = TlsAcceptor::from(self.key.config()).accept(stream).await?;
        let exporter = service_exporter(stream.get_ref().1).unwrap();
        let binding = match self.fault {
            TlsFault::OtherConnection => ChannelBinding::TlsExporter([7; 32]),
            TlsFault::Unbound => ChannelBinding::Key,
            _ => ChannelBinding::TlsExporter(exporter),
        };
        let digest = match self.fault {
            TlsFault::OtherKey => Some([7; 32]),
            TlsFault::NoKey => None,
            _ => Some(self.key.digest()),
        };
        let (enclave, fault) = (self.enclave.clone(), self.fault);
        let attestation = async move |Query(query): Query<NonceQuery>| {
            enclave.attestations.fetch_add(1, Ordering::SeqCst);
            if enclave.fault() == Fault::NoAttestation {
                return StatusCode::SERVICE_UNAVAILABLE.into_response();
            }
            let mut nonce = [0; 32];
            hex::decode_to_slice(&query.nonce, &mut nonce).unwrap();
            nonce[1] ^= u8::from(fault == TlsFault::OtherNonce);
            let answer = enclave.attest_bound(nonce, digest, &binding);
            answer.to_json().into_response()
        };
        let enclave = self.enclave.clone();
        let router = Router::new()
            .route(ATTESTATION_PATH, get(attestation))
            .fallback(async move |request: Request| direct(&enclave, request).await);
        Ok((stream, router))
    }
}

/// The toy service without encryption.
async fn direct(enclave: &Arc<Enclave>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 25).await.unwrap();
    let (status, headers, body) = enclave.inner(&http::Request::from_parts(parts, body));
    let body = body.map(|item| Ok::<_, std::io::Error>(item.unwrap()));
    let body = match enclave.fault() {
        Fault::CutAnswer(bytes) => {
            let cut = move |item: std::io::Result<Bytes>| item.map(|piece| piece.slice(..bytes));
            let end = stream::once(async {
                // After the head and the first piece have left.
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(body.take(1).map(cut).chain(end))
        }
        _ => Body::from_stream(body),
    };
    (status, headers, body).into_response()
}
