use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Extension};
use casemate_channel::ohttp::{
    ANSWER_MEDIA_TYPE, AnswerError, Keyring, PROBLEM_MEDIA_TYPE, PendingAnswer, Recipient,
};
use casemate_release::api_key;
use futures::stream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::*;
use crate::receipts::{self, Receipts, Signer};
use crate::serving::tests::{add_signer_of_the_same_key_id, until};

mod strangers;

/// Sends an inner answer through the channel; returns its head's fields and its pieces.
async fn through_the_channel(
    inner: Response<Body>,
) -> (StatusCode, HeaderMap, Vec<Result<Bytes, AnswerError>>) {
    let keyring = Keyring::default();
    let config = keyring.generate(10).unwrap().encoded;
    let recipient = Recipient::from_config(&config).unwrap();
    let request = Request::get("/v1/models").body(Bytes::new()).unwrap();
    let (sent, pending) = recipient.encapsulate(&request).unwrap();
    let transport = stream::iter([Ok::<_, axum::Error>(sent)]);
    let received = keyring.receive(transport, 1 << 16, 0).await.unwrap();
    let outer = encrypt(received.responder, inner);
    assert_eq!(outer.status(), StatusCode::OK);
    assert_eq!(outer.headers()[header::CONTENT_TYPE], ANSWER_MEDIA_TYPE);
    let answer = pending
        .open(outer.into_body().into_data_stream())
        .await
        .unwrap();
    (answer.status, answer.headers, answer.body.collect().await)
}

#[tokio::test]
async fn status_and_needed_fields_travel_inside() {
    let inner = Response::builder()
        .status(StatusCode::TOO_MANY_REQUESTS)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::RETRY_AFTER, "3")
        .header("x-internal", "1")
        .body(Body::from("{}"))
        .unwrap();
    let (status, headers, pieces) = through_the_channel(inner).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(headers[header::CONTENT_TYPE], "application/json");
    assert_eq!(headers[header::RETRY_AFTER], "3");
    assert_eq!(headers.len(), 2);
    let pieces: Vec<_> = pieces.into_iter().map(Result::unwrap).collect();
    assert_eq!(pieces.concat(), b"{}");
}

#[tokio::test]
async fn an_inner_body_that_fails_does_not_look_whole() {
    let pieces = [
        Ok(Bytes::from("part")),
        Err(std::io::Error::other("broken")),
    ];
    let inner = Response::new(Body::from_stream(stream::iter(pieces)));
    let (_, _, pieces) = through_the_channel(inner).await;
    assert_eq!(pieces[0].as_ref().unwrap(), "part");
    assert!(pieces.last().unwrap().is_err());
}

#[tokio::test]
async fn a_message_that_is_no_request_is_answered_in_the_api_s_shape() {
    let (status, _, pieces) = through_the_channel(bad_message(&MessageFault::Padding)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let json: serde_json::Value = serde_json::from_slice(pieces[0].as_ref().unwrap()).unwrap();
    assert_eq!(json["error"]["code"], "invalid_message");
}

/// Answers with the receipt key that would sign.
async fn signing(Extension(signer): Extension<Arc<Signer>>) -> String {
    signer.verifying_key().unwrap().to_string()
}

#[tokio::test]
async fn receipts_are_signed_under_the_keyset_that_the_connection_showed() {
    let gateway = gateway(|| 0);
    let (shown, _) = gateway.serving.tls(0).unwrap();
    add_signer_of_the_same_key_id(&gateway.serving);
    let request = Request::post("/v1/completions").body(Body::empty());
    let answer = gateway.handle_direct(request.unwrap(), &shown).await;
    let answer = axum::body::to_bytes(answer.into_body(), 100).await.unwrap();
    assert_eq!(answer, shown.signer().verifying_key().unwrap().to_string());
}

/// A gateway of an identity until 100, by the clock given.
fn gateway(clock: fn() -> u64) -> Gateway {
    let metrics = Arc::new(Metrics::default());
    let limits = relay::Limits {
        bytes: 1,
        arrival: crate::arrival::ARRIVAL,
    };
    Gateway {
        access: Arc::new(Access::new(
            &api_key::Access::Open,
            access::monotonic(),
            Arc::clone(&metrics),
        )),
        api: Router::new().fallback(signing),
        workers: Workers::new(tokio::runtime::Handle::current()),
        arrivals: Arc::new(Arrivals::new(1)),
        arriving: Arc::default(),
        waiting: Arc::default(),
        lingering: Lingering::default(),
        peers: Arc::new(Peers::new(Vec::new(), limits, Arc::clone(&metrics)).unwrap()),
        metrics,
        clock,
        serving: Arc::new(until(100)),
    }
}

/// What a connection that showed that identity is answered.
async fn answered_at(clock: fn() -> u64) -> Response<Body> {
    let gateway = gateway(clock);
    let (shown, _) = gateway.serving.tls(0).unwrap();
    let request = Request::post("/v1/completions").body(Body::empty());
    gateway.handle_direct(request.unwrap(), &shown).await
}

/// What an encrypted request is answered whose key is held for longer than the identity.
async fn encrypted_at(clock: fn() -> u64) -> StatusCode {
    let gateway = gateway(clock);
    let config = gateway.serving.keyring.generate(1000).unwrap().encoded;
    let recipient = Recipient::from_config(&config).unwrap();
    let request = Request::get("/v1/models").body(Bytes::new()).unwrap();
    let (sent, _) = recipient.encapsulate(&request).unwrap();
    let request = Request::post("/").header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE);
    gateway
        .handle(request.body(Body::from(sent)).unwrap())
        .await
        .status()
}

#[tokio::test]
async fn encrypted_requests_are_not_served_beyond_the_credential() {
    assert_eq!(encrypted_at(|| 99).await, StatusCode::OK);
    let refused = StatusCode::SERVICE_UNAVAILABLE;
    assert_eq!(encrypted_at(|| 100).await, refused);
    // The end comes while the request arrives.
    static LATE: AtomicU64 = AtomicU64::new(98);
    let late = || LATE.fetch_add(1, Ordering::Relaxed);
    assert_eq!(encrypted_at(late).await, refused);
}

#[tokio::test]
async fn a_connection_is_not_served_beyond_what_it_showed() {
    assert_eq!(answered_at(|| 99).await.status(), StatusCode::OK);
    let answer = answered_at(|| 100).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.headers()[header::CONNECTION], "close");
    assert_eq!(answer.headers()[header::CONTENT_TYPE], PROBLEM_MEDIA_TYPE);
}

#[tokio::test]
async fn a_request_that_arrives_past_the_end_is_not_served() {
    static LATE: AtomicU64 = AtomicU64::new(99);
    // The end comes while the request arrives.
    let answer = answered_at(|| LATE.fetch_add(1, Ordering::Relaxed)).await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
}

/// The two ways in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Door {
    Encrypted,
    Direct,
}

const DOORS: [Door; 2] = [Door::Encrypted, Door::Direct];

impl Door {
    /// What is answered to a body of these pieces, whatever they say.
    async fn offer<S>(self, gateway: &Gateway, pieces: S) -> Response<Body>
    where
        S: futures::Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let request = Request::post("/v1/completions")
            .header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE)
            .body(Body::from_stream(pieces))
            .unwrap();
        match self {
            Door::Encrypted => gateway.clone().handle(request).await,
            Door::Direct => {
                let (shown, _) = gateway.serving.tls(0).unwrap();
                gateway.clone().handle_direct(request, &shown).await
            }
        }
    }

    /// What the API answers to a body, and the fields of the answer.
    async fn ask(self, gateway: &Gateway, body: &[u8]) -> (StatusCode, HeaderMap, Bytes) {
        let (head, body) = match self {
            Door::Encrypted => {
                let (sent, pending) = encapsulated(gateway, body);
                let outer = self.offer(gateway, stream::iter([Ok(sent)])).await;
                assert_eq!(outer.status(), StatusCode::OK);
                let answer = pending.open(outer.into_body().into_data_stream());
                let answer = answer.await.unwrap();
                let pieces: Vec<_> = answer.body.map(Result::unwrap).collect().await;
                ((answer.status, answer.headers), pieces.concat().into())
            }
            Door::Direct => {
                let pieces = stream::iter([Ok(Bytes::copy_from_slice(body))]);
                let answer = self.offer(gateway, pieces).await;
                let head = (answer.status(), answer.headers().clone());
                let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await;
                (head, body.unwrap())
            }
        };
        (head.0, head.1, body)
    }

    /// A body of at least so many bytes, of which the last is missing.
    fn unfinished(self, gateway: &Gateway, bytes: usize) -> Bytes {
        let body = vec![b' '; bytes];
        match self {
            Door::Encrypted => {
                let mut sent = encapsulated(gateway, &body).0;
                sent.split_to(sent.len() - 1)
            }
            Door::Direct => body.into(),
        }
    }

    /// Whether it is refused so, in the way of this door.
    async fn refuses(self, answer: Response<Body>, status: u16, code: &str) {
        assert_eq!(answer.status(), status, "{self:?}");
        let again = answer.headers().get(header::RETRY_AFTER);
        assert_eq!(again.is_some(), status == 503, "{self:?} {status}");
        let body = axum::body::to_bytes(answer.into_body(), 1000).await;
        let body = body.unwrap();
        match self {
            Door::Encrypted => {
                let text = String::from_utf8(body.to_vec()).unwrap();
                assert!(!text.contains("\"error\""), "{text}");
            }
            Door::Direct => assert_eq!(code_of(&body), code),
        }
    }
}

fn encapsulated(gateway: &Gateway, body: &[u8]) -> (Bytes, PendingAnswer) {
    let config = gateway.serving.keyring.generate(1000).unwrap().encoded;
    let recipient = Recipient::from_config(&config).unwrap();
    let request = Request::post("/v1/completions");
    let request = request.body(Bytes::copy_from_slice(body)).unwrap();
    recipient.encapsulate(&request).unwrap()
}

/// A gateway to an API that counts the bytes of bodies.
fn counting() -> Gateway {
    let mut gateway = gateway(|| 0);
    let api = Router::new().fallback(async |body: Bytes| body.len().to_string());
    // As much as arrives: the API's own limit is not what is tested here.
    gateway.api = api.layer(DefaultBodyLimit::disable());
    gateway
}

fn code_of(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap();
    json["error"]["code"].as_str().unwrap().to_owned()
}

fn figure(gateway: &Gateway, name: &str) -> u64 {
    let text = gateway.metrics.render(None);
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().parse().unwrap()
}

/// These bytes now, and then nothing.
fn hurried(bytes: impl Into<Bytes>) -> impl futures::Stream<Item = io::Result<Bytes>> + Send {
    stream::iter([Ok(bytes.into())]).chain(stream::pending())
}

/// These bytes, somewhat faster than they must come.
fn steady(mut bytes: Bytes) -> impl futures::Stream<Item = io::Result<Bytes>> + Send {
    let pieces = std::iter::from_fn(move || {
        let piece = bytes.split_to(bytes.len().min(1 << 10));
        (!piece.is_empty()).then_some(piece)
    });
    let pieces = stream::iter(pieces).then(async |piece| {
        sleep(Duration::from_millis(200)).await;
        Ok(piece)
    });
    pieces.chain(stream::pending())
}

fn trickle() -> impl futures::Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold((), |()| async {
        sleep(Duration::from_millis(100)).await;
        Some((Ok(Bytes::from_static(b"x")), ()))
    })
}

/// Waits for what other tasks are about to do.
async fn eventually(what: &str, done: impl Fn() -> bool) {
    let waits = async {
        while !done() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(20), waits).await.expect(what);
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_trickles_is_given_up_at_either_door() {
    for door in DOORS {
        let gateway = counting();
        let answer = door.offer(&gateway, trickle()).await;
        door.refuses(answer, 408, "request_timeout").await;
        assert_eq!(figure(&gateway, "casemate_requests_refused_total"), 1);
        assert_eq!((gateway.arrivals.free(), gateway.arriving.held()), (1, 0));
        assert_eq!(door.ask(&gateway, b"{}").await.0, StatusCode::OK);
    }
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_is_told_to_come_back_while_all_hurry_at_either_door() {
    for door in DOORS {
        let mut gateway = counting();
        gateway.arrivals = Arc::new(Arrivals::new(2));
        let uploads: Vec<_> = (0..2)
            .map(|_| {
                let body = door.unfinished(&gateway, 100 << 10);
                let gateway = gateway.clone();
                tokio::spawn(async move { door.offer(&gateway, steady(body)).await })
            })
            .collect();
        eventually("both arrive", || gateway.arriving.held() >= 10 << 10).await;
        let answer = door.offer(&gateway, hurried("x")).await;
        door.refuses(answer, 503, "overloaded").await;
        assert_eq!(figure(&gateway, "casemate_requests_refused_total"), 1);
        // Who leaves makes room.
        for upload in uploads {
            upload.abort();
            assert!(upload.await.unwrap_err().is_cancelled());
        }
        assert_eq!((gateway.arrivals.free(), gateway.arriving.held()), (2, 0));
        assert_eq!(door.ask(&gateway, b"{}").await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_or_cut_off_is_called_so_at_either_door() {
    for door in DOORS {
        let gateway = counting();
        let limit = match door {
            Door::Encrypted => usize::try_from(MAX_ENCAPSULATED).unwrap(),
            Door::Direct => MAX_REQUEST_BYTES,
        };
        let answer = door.offer(&gateway, hurried(vec![0; limit + 1])).await;
        door.refuses(answer, 413, "request_too_large").await;
        let cut = || Err(io::ErrorKind::UnexpectedEof.into());
        let pieces = stream::iter([Ok(Bytes::from_static(b"{")), cut()]);
        let answer = door.offer(&gateway, pieces).await;
        door.refuses(answer, 400, "incomplete_request").await;
        assert_eq!(figure(&gateway, "casemate_requests_refused_total"), 2);
        assert_eq!((gateway.arrivals.free(), gateway.arriving.held()), (1, 0));
    }
    let gateway = counting();
    let largest = vec![b' '; MAX_REQUEST_BYTES];
    let answer = Door::Direct.ask(&gateway, &largest).await;
    assert_eq!(answer.0, StatusCode::OK);
}

/// As much as large bodies of others may hold, less some.
fn others(bodies: &Arc<Bodies>, less: usize) -> Room {
    let room = bodies.room();
    room.grow((48 << 20) - less).unwrap();
    room
}

const LARGE: usize = 200 << 10;

/// Bodies that came in one burst each and then stopped have shut neither door, by places or by bytes.
#[tokio::test(start_paused = true)]
async fn bursts_that_stop_shut_neither_door() {
    for door in DOORS {
        for short_of_places in [true, false] {
            let mut gateway = counting();
            let places = if short_of_places { 4 } else { 8 };
            gateway.arrivals = Arc::new(Arrivals::new(places));
            let uploads: Vec<_> = (0..4)
                .map(|_| {
                    let body = door.unfinished(&gateway, 128 << 10);
                    let gateway = gateway.clone();
                    tokio::spawn(async move { door.offer(&gateway, hurried(body)).await })
                })
                .collect();
            eventually("all arrive", || gateway.arriving.held() >= 512 << 10).await;
            let held = gateway.arriving.held();
            let others = (!short_of_places).then(|| others(&gateway.arriving, held));
            sleep(Duration::from_secs(1)).await;
            let size = if short_of_places { 2 } else { LARGE };
            let answer = door.ask(&gateway, &vec![b' '; size]).await;
            assert_eq!(answer.0, StatusCode::OK, "{door:?} {short_of_places}");
            // Some made way, others did not have to.
            let gone: Vec<_> = uploads
                .into_iter()
                .filter(|task| task.is_finished())
                .collect();
            assert!((1..4).contains(&gone.len()), "{door:?} {}", gone.len());
            for upload in gone {
                door.refuses(upload.await.unwrap(), 408, "request_timeout")
                    .await;
            }
            drop(others);
        }
    }
}

#[tokio::test]
async fn a_body_that_finds_no_room_to_arrive_is_refused_at_either_door() {
    for door in DOORS {
        let gateway = counting();
        let others = others(&gateway.arriving, LARGE - 1);
        let answer = door.offer(&gateway, hurried(vec![0; LARGE])).await;
        door.refuses(answer, 503, "overloaded").await;
        assert_eq!(figure(&gateway, "casemate_requests_refused_total"), 1);
        // A small one has room all the same, and a large one when others have gone.
        assert_eq!(door.ask(&gateway, b"{}").await.0, StatusCode::OK);
        drop(others);
        assert_eq!(gateway.arriving.held(), 0);
        assert_eq!(door.ask(&gateway, &[b' '; LARGE]).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn bodies_that_wait_for_a_thread_are_bounded_at_either_door() {
    for door in DOORS {
        // One thread, which does nothing until it is told to.
        let preparing = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let (go_on, told) = mpsc::channel::<()>();
        preparing.spawn(async move { told.recv() });
        let mut gateway = counting();
        gateway.workers = Workers::new(preparing.handle().clone());
        let ask = |bytes| {
            let gateway = gateway.clone();
            tokio::spawn(async move { door.ask(&gateway, &vec![b' '; bytes]).await })
        };
        let first = ask(LARGE);
        let held = || gateway.waiting.held();
        eventually("it waits", || held() == 256 << 10).await;
        let others = others(&gateway.waiting, 256 << 10);

        let refused = timeout(Duration::from_secs(20), ask(LARGE)).await;
        let (status, fields, body) = refused.expect("it does not wait").unwrap();
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(fields[header::RETRY_AFTER], "1");
        assert_eq!(code_of(&body), "overloaded");
        let denied = figure(&gateway, "casemate_denied_total{reason=\"room\"}");
        assert_eq!(denied, 1);
        assert_eq!(gateway.arriving.held(), 0);

        let small = ask(1000);
        eventually("it waits, too", || held() == (48 << 20) + 1024).await;
        go_on.send(()).unwrap();
        assert_eq!(first.await.unwrap().2, LARGE.to_string());
        assert_eq!(small.await.unwrap().2, "1000");
        assert_eq!(held(), (48 << 20) - (256 << 10));
        drop(others);
        preparing.shutdown_background();
    }
}

#[tokio::test]
async fn a_body_has_room_until_nobody_has_it_any_more() {
    static PARSED: Notify = Notify::const_new();
    static ANSWERED: Notify = Notify::const_new();
    async fn parses(body: Bytes) -> &'static str {
        PARSED.notified().await;
        drop(body);
        ANSWERED.notified().await;
        "done"
    }
    for door in DOORS {
        let mut gateway = counting();
        let receipts = Arc::new(Receipts::new(receipts::Limits::default(), || 0));
        gateway.api = receipts::wrap(Router::new().fallback(parses), receipts);
        let metrics = Arc::clone(&gateway.metrics);
        metrics.bodies_waiting(Arc::clone(&gateway.waiting));
        let held = || figure(&gateway, "casemate_request_bytes_waiting");
        let asked = gateway.clone();
        let answer = tokio::spawn(async move { door.ask(&asked, &[b' '; 1500]).await });
        eventually("it waits", || held() == 2048).await;
        PARSED.notify_one();
        eventually("it is parsed", || held() == 0).await;
        assert!(!answer.is_finished());
        ANSWERED.notify_one();
        assert_eq!(answer.await.unwrap().2, "done");
    }
}
