//! Requests without an API key of the grant, while their body still comes.

use casemate_channel::ohttp::Answer;
use casemate_release::api_key::{ApiKey, ApiKeys, Limits, hash};
use futures::FutureExt;
use tokio::sync::mpsc;

use super::*;

const KEY: &str = "cm-the key of this grant";

fn keyed(key: &str) -> api_key::Access {
    let key = ApiKey {
        name: "alice".into(),
        hash: hash(key.as_bytes()),
        limits: Limits::default(),
    };
    api_key::Access::Keyed(ApiKeys::new(vec![key]).unwrap())
}

/// As [`counting`], for who has [`KEY`].
fn asking() -> Gateway {
    let mut gateway = counting();
    let metrics = Arc::clone(&gateway.metrics);
    let access = Access::new(&keyed(KEY), access::monotonic(), metrics);
    gateway.access = Arc::new(access);
    gateway
}

/// A request through a door: its bytes, and how its answer is read.
struct Sent {
    door: Door,
    key: Option<&'static str>,
    bytes: Bytes,
    pending: Option<PendingAnswer>,
}

impl Sent {
    fn new(door: Door, gateway: &Gateway, key: Option<&'static str>, bytes: usize) -> Sent {
        let body = Bytes::from(vec![b' '; bytes]);
        let mut sent = Sent {
            door,
            key,
            bytes: body.clone(),
            pending: None,
        };
        if door == Door::Encrypted {
            let config = gateway.serving.keyring.generate(1000).unwrap().encoded;
            let request = sent.with_key(Request::post("/v1/completions").body(body).unwrap());
            let recipient = Recipient::from_config(&config).unwrap();
            let (bytes, pending) = recipient.encapsulate(&request).unwrap();
            (sent.bytes, sent.pending) = (bytes, Some(pending));
        }
        sent
    }

    /// So many encrypted bytes that are no request.
    fn no_request(gateway: &Gateway, bytes: usize) -> Sent {
        let config = gateway.serving.keyring.generate(1000).unwrap().encoded;
        let recipient = Recipient::from_config(&config).unwrap();
        let (bytes, pending) = recipient.encapsulate_plaintext(&vec![b'x'; bytes]).unwrap();
        Sent {
            door: Door::Encrypted,
            key: None,
            bytes,
            pending: Some(pending),
        }
    }

    fn with_key<B>(&self, mut request: Request<B>) -> Request<B> {
        if let Some(key) = self.key {
            let value = HeaderValue::from_str(&format!("Bearer {key}")).unwrap();
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        request
    }

    /// What is answered if a body of these pieces comes; the outer answer.
    async fn offer<S>(&self, gateway: &Gateway, pieces: S) -> Response<Body>
    where
        S: futures::Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let request = Request::post("/v1/completions")
            .header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE)
            .body(Body::from_stream(pieces))
            .unwrap();
        match self.door {
            Door::Encrypted => gateway.clone().handle(request).await,
            Door::Direct => {
                let (shown, _) = gateway.serving.tls(0).unwrap();
                let request = self.with_key(request);
                gateway.clone().handle_direct(request, &shown).await
            }
        }
    }

    /// The API's answer in an outer one.
    async fn read(&mut self, outer: Response<Body>) -> (StatusCode, Bytes) {
        match self.pending.take() {
            Some(pending) => {
                assert_eq!(outer.status(), StatusCode::OK);
                let answer = pending.open(outer.into_body().into_data_stream()).await;
                let Answer { status, body, .. } = answer.unwrap();
                let pieces: Vec<_> = body.map(Result::unwrap).collect().await;
                (status, pieces.concat().into())
            }
            None => {
                let status = outer.status();
                let body = axum::body::to_bytes(outer.into_body(), 1 << 20).await;
                (status, body.unwrap())
            }
        }
    }
}

fn denied(gateway: &Gateway) -> u64 {
    figure(gateway, "casemate_denied_total{reason=\"key\"}")
}

#[tokio::test(start_paused = true)]
async fn who_has_no_key_is_answered_before_its_body_comes_at_either_door() {
    for door in DOORS {
        let gateway = asking();
        for (times, key) in (1..).zip([None, Some("cm-another"), Some("")]) {
            let mut sent = Sent::new(door, &gateway, key, 1 << 20);
            // Some of it, and nothing more.
            let begun = sent.bytes.slice(..50_000);
            let outer = sent.offer(&gateway, hurried(begun)).now_or_never();
            let outer = outer.unwrap_or_else(|| panic!("{door:?}: it is waited for"));
            assert_eq!(outer.headers()[header::CONNECTION], "close");
            // Neither a place nor room is left to it, whatever its answer takes.
            assert_eq!((gateway.arrivals.free(), gateway.arriving.held()), (1, 0));
            let (status, body) = sent.read(outer).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{door:?}");
            assert_eq!(code_of(&body), "invalid_api_key");
            assert_eq!(denied(&gateway), times);
        }
        assert_eq!(figure(&gateway, "casemate_requests_refused_total"), 0);
        assert_eq!(figure(&gateway, "casemate_requests_total"), 3);
    }
}

/// Nobody can see which of these was refused: all are read to their ends, and answered on a connection that stays.
#[tokio::test(start_paused = true)]
async fn a_short_encrypted_request_is_answered_like_any_other_whoever_sends_it() {
    let gateway = asking();
    let mut shapes = Vec::new();
    for (key, expected) in [
        (None, StatusCode::UNAUTHORIZED),
        (Some(KEY), StatusCode::OK),
        (None, StatusCode::BAD_REQUEST),
    ] {
        let mut sent = match expected {
            StatusCode::BAD_REQUEST => Sent::no_request(&gateway, 32 << 10),
            _ => Sent::new(Door::Encrypted, &gateway, key, 20_000),
        };
        let all_but_its_end = hurried(sent.bytes.slice(..sent.bytes.len() - 1));
        let waited_for = sent.offer(&gateway, all_but_its_end).now_or_never();
        assert!(waited_for.is_none(), "{expected}");
        let outer = sent.offer(&gateway, stream::iter([Ok(sent.bytes.clone())]));
        let (head, body) = outer.await.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        shapes.push((
            sent.bytes.len(),
            head.status,
            head.headers.clone(),
            body.len(),
        ));
        let outer = Response::from_parts(head, Body::from(body));
        assert_eq!(sent.read(outer).await.0, expected);
    }
    assert_eq!(shapes[0], shapes[1]);
    assert_eq!(shapes[0], shapes[2]);
    assert!(!shapes[0].2.contains_key(header::CONNECTION));
    assert_eq!(denied(&gateway), 1);
}

/// What begins as no request is answered early, where it is long enough.
#[tokio::test(start_paused = true)]
async fn what_begins_as_no_request_is_the_last_on_its_connection() {
    let gateway = asking();
    let mut sent = Sent::no_request(&gateway, 64 << 10);
    let begun = hurried(sent.bytes.slice(..50_000));
    let outer = sent.offer(&gateway, begun).now_or_never();
    let outer = outer.expect("it is not waited for");
    assert_eq!(outer.headers()[header::CONNECTION], "close");
    let (status, body) = sent.read(outer).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(code_of(&body), "invalid_message");
}

#[tokio::test(start_paused = true)]
async fn who_has_a_key_is_waited_for_at_either_door() {
    for door in DOORS {
        let gateway = asking();
        let sent = Sent::new(door, &gateway, Some(KEY), 100_000);
        let begun = sent.bytes.slice(..50_000);
        assert!(
            sent.offer(&gateway, hurried(begun))
                .now_or_never()
                .is_none()
        );
        let mut sent = Sent::new(door, &gateway, Some(KEY), 100_000);
        let outer = sent.offer(&gateway, stream::iter([Ok(sent.bytes.clone())]));
        let outer = outer.await;
        assert_eq!(sent.read(outer).await, (StatusCode::OK, "100000".into()));
        assert_eq!(denied(&gateway), 0);
    }
}

#[tokio::test]
async fn who_loses_its_key_while_its_body_comes_is_not_answered() {
    for door in DOORS {
        let gateway = asking();
        let mut sent = Sent::new(door, &gateway, Some(KEY), 100_000);
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let pieces = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let mut answer = Box::pin(sent.offer(&gateway, pieces));
        sender.send(Ok(sent.bytes.slice(..50_000))).unwrap();
        assert!(futures::poll!(answer.as_mut()).is_pending());
        assert!(gateway.arriving.held() >= 50_000);
        gateway.access.replace(&keyed("cm-a new key"));
        sender.send(Ok(sent.bytes.slice(50_000..))).unwrap();
        drop(sender);
        let outer = answer.await;
        let (status, body) = sent.read(outer).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{door:?}");
        assert_eq!(code_of(&body), "invalid_api_key");
    }
}

#[tokio::test]
async fn a_request_that_was_refused_by_its_head_is_not_judged_again() {
    let gateway = asking();
    let mut sent = Sent::new(Door::Encrypted, &gateway, Some("cm-a new key"), 100_000);
    let begun = || hurried(sent.bytes.slice(..50_000));
    let first = sent.offer(&gateway, begun()).await;
    gateway.access.replace(&keyed("cm-a new key"));
    let second = sent.offer(&gateway, begun()).await;
    assert_eq!(second.status(), StatusCode::CONFLICT);
    assert_eq!(sent.read(first).await.0, StatusCode::UNAUTHORIZED);
}

/// As many as there are places, and as many again, none of whom has a key: whoever has one finds a place all the same.
#[tokio::test]
async fn strangers_with_large_bodies_take_nobodys_place_or_room() {
    for door in DOORS {
        let mut gateway = asking();
        gateway.arrivals = Arc::new(Arrivals::new(4));
        for _ in 0..16 {
            let sent = Sent::new(door, &gateway, None, 1 << 20);
            let begun = hurried(sent.bytes.slice(..50_000));
            let outer = sent.offer(&gateway, begun).now_or_never();
            // Its answer is never read.
            std::mem::forget(outer.unwrap_or_else(|| panic!("{door:?}: it is waited for")));
        }
        assert_eq!((gateway.arrivals.free(), gateway.arriving.held()), (4, 0));
        let mut sent = Sent::new(door, &gateway, Some(KEY), 1000);
        let outer = sent.offer(&gateway, stream::iter([Ok(sent.bytes.clone())]));
        let outer = outer.await;
        assert_eq!(sent.read(outer).await, (StatusCode::OK, "1000".into()));
    }
}
