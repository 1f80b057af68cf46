use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::IntoResponse as _;
use axum::routing::{get, post};
use casemate_channel::ohttp::KEY_PROBLEM;
use futures::{TryStreamExt as _, stream};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::*;
use crate::linger::Lingering;

const HELD: KeysetDigest = KeysetDigest([7; 32]);
const LIMITS: Limits = Limits {
    bytes: 1000,
    arrival: Duration::from_secs(30),
};

/// A replica as its peers see it.
struct Replica {
    /// Whether it keeps those waiting who ask what it holds.
    slow: AtomicBool,
    /// Lets one of those go on.
    answer_now: Notify,
    keysets: Vec<KeysetDigest>,
    asked: AtomicUsize,
    /// Requests that were relayed here: their fields and body, or that they were cut off.
    relayed: Mutex<Vec<(HeaderMap, Option<Vec<u8>>)>>,
    answer: fn() -> Response<Body>,
}

impl Replica {
    fn holding(keysets: &[KeysetDigest], answer: fn() -> Response<Body>) -> Arc<Replica> {
        Arc::new(Replica {
            slow: AtomicBool::new(false),
            answer_now: Notify::new(),
            keysets: keysets.to_vec(),
            asked: AtomicUsize::new(0),
            relayed: Mutex::default(),
            answer,
        })
    }

    async fn serve(self: &Arc<Replica>) -> (Peer, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = format!("http://{}", listener.local_addr().unwrap());
        let list = async |State(replica): State<Arc<Replica>>| {
            replica.asked.fetch_add(1, Ordering::SeqCst);
            if replica.slow.load(Ordering::SeqCst) {
                replica.answer_now.notified().await;
            }
            let keysets = replica.keysets.iter().map(ToString::to_string).collect();
            axum::Json(KeysetList { keysets }).into_response()
        };
        let gateway = async |State(replica): State<Arc<Replica>>, request: Request| {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.ok().map(|b| b.to_vec());
            replica.relayed.lock().unwrap().push((parts.headers, body));
            (replica.answer)()
        };
        let router = Router::new()
            .route(KEYSETS_PATH, get(list))
            .route(GATEWAY_PATH, post(gateway))
            .with_state(self.clone());
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (peer.parse().unwrap(), serving)
    }
}

fn plain(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
}

fn answer() -> Response<Body> {
    encapsulated(Body::from("sealed answer"))
}

fn peers(peers: &[&Peer]) -> Peers {
    let peers = peers.iter().map(|&peer| peer.clone()).collect();
    Peers::new(peers, LIMITS, Arc::default()).unwrap()
}

fn request(pieces: &[&'static str]) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
    let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Bytes::from(*piece))).collect();
    stream::iter(pieces)
}

/// As the gateway answers it.
async fn relayed<S>(peers: &Peers, keyset: &KeysetDigest, transport: S) -> Response<Body>
where
    S: Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
{
    let outcome = peers.relay(keyset, transport).await;
    outcome.unwrap_or_else(Refusal::outside)
}

async fn text(response: Response<Body>) -> (StatusCode, String) {
    let status = response.status();
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn tells_to_verify_again(response: Response<Body>) -> bool {
    assert_eq!(response.headers()[header::CONTENT_TYPE], PROBLEM_MEDIA_TYPE);
    let (status, text) = text(response).await;
    status == StatusCode::BAD_REQUEST && text.contains(KEY_PROBLEM)
}

#[tokio::test]
async fn a_request_goes_only_to_the_replica_that_holds_its_keyset() {
    let other = Replica::holding(&[KeysetDigest([8; 32])], answer);
    let holder = Replica::holding(&[KeysetDigest([6; 32]), HELD], answer);
    let ((first, _), (second, _)) = (other.serve().await, holder.serve().await);
    let peers = peers(&[&first, &second]);
    let response = relayed(&peers, &HELD, request(&["enc", "rypted"])).await;
    assert_eq!(response.headers()[header::CONTENT_TYPE], ANSWER_MEDIA_TYPE);
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    assert_eq!(
        text(response).await,
        (StatusCode::OK, "sealed answer".into())
    );
    assert!(other.relayed.lock().unwrap().is_empty());

    let carried = holder.relayed.lock().unwrap().pop().unwrap();
    assert_eq!(carried.1.as_deref(), Some(&b"encrypted"[..]));
    assert_eq!(carried.0[KEYSET_HINT], HELD.to_string());
    assert_eq!(carried.0[RELAYED_MARK], "1");
    assert_eq!(carried.0[header::CONTENT_TYPE], REQUEST_MEDIA_TYPE);
    let mut names: Vec<_> = carried.0.keys().map(|name| name.as_str()).collect();
    names.sort_unstable();
    // Nothing of the sender's own fields can be among them: they are not even given to the relay.
    let expected = [
        "accept",
        KEYSET_HINT,
        RELAYED_MARK,
        "content-type",
        "host",
        "transfer-encoding",
    ];
    assert_eq!(names, expected);

    // The second request asks nobody.
    relayed(&peers, &HELD, request(&["again"])).await;
    assert_eq!(holder.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn made_up_keysets_cause_no_more_questions() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    let nobodys = |i| KeysetDigest([i; 32]);
    let crowd = async |keysets: std::ops::Range<u8>| {
        let keysets: Vec<_> = keysets.map(nobodys).collect();
        let all = keysets
            .iter()
            .map(|keyset| relayed(&peers, keyset, request(&["x"])));
        for response in futures::future::join_all(all).await {
            assert!(tells_to_verify_again(response).await);
        }
    };
    let questions = || replica.asked.load(Ordering::SeqCst);
    // All of them came before the question began.
    crowd(100..140).await;
    assert_eq!(questions(), 1);
    // Who comes while the peer is asked may look for a keyset that it began to hold after it had answered, so one more
    // question, and one for all of them.
    replica.slow.store(true, Ordering::SeqCst);
    let late = async {
        while questions() < 2 {
            tokio::task::yield_now().await;
        }
        let latecomers = crowd(160..200);
        let answered = async {
            replica.slow.store(false, Ordering::SeqCst);
            replica.answer_now.notify_one();
        };
        tokio::join!(latecomers, answered);
    };
    tokio::join!(crowd(140..150), late);
    assert_eq!(questions(), 3);
    // One after the other, each causes a question, at a distance.
    let start = Instant::now();
    for i in 0..3 {
        crowd(i..i + 1).await;
    }
    assert_eq!(questions(), 6);
    assert!(start.elapsed() >= 2 * PAUSE);
    assert!(replica.relayed.lock().unwrap().is_empty());
    assert_eq!(peers.directory.known().len(), 1);
}

#[tokio::test]
async fn who_asked_and_left_takes_nobodys_answer_away() {
    let replica = Replica::holding(&[HELD], answer);
    replica.slow.store(true, Ordering::SeqCst);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    let mut leaves = Box::pin(relayed(&peers, &HELD, request(&["x"])));
    let mut stays = Box::pin(relayed(&peers, &HELD, request(&["y"])));
    assert!(futures::poll!(leaves.as_mut()).is_pending());
    assert!(futures::poll!(stays.as_mut()).is_pending());
    while replica.asked.load(Ordering::SeqCst) == 0 {
        assert!(futures::poll!(leaves.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
    drop(leaves);
    replica.slow.store(false, Ordering::SeqCst);
    replica.answer_now.notify_one();
    assert_eq!(stays.await.status(), 200);
    assert_eq!(replica.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_peer_that_lists_nothing_for_once_is_not_forgotten() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    assert_eq!(relayed(&peers, &HELD, request(&["x"])).await.status(), 200);
    replica.slow.store(true, Ordering::SeqCst);
    let unknown = relayed(&peers, &KeysetDigest([9; 32]), request(&["x"])).await;
    assert!(tells_to_verify_again(unknown).await);
    assert_eq!(replica.asked.load(Ordering::SeqCst), 2);
    assert_eq!(relayed(&peers, &HELD, request(&["x"])).await.status(), 200);
    assert_eq!(replica.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn more_requests_than_may_wait_are_told_to_come_back() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    let waiting = peers.waiting.acquire_many(WAITING as u32).await.unwrap();
    let response = relayed(&peers, &HELD, request(&["x"])).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    drop(waiting);
    let mut places = Vec::new();
    for _ in 0..RELAYS {
        places.push(peers.places.enter().await.unwrap().arrived());
    }
    let response = relayed(&peers, &HELD, request(&["x"])).await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(replica.relayed.lock().unwrap().is_empty());
    drop(places);
    assert_eq!(relayed(&peers, &HELD, request(&["x"])).await.status(), 200);
}

/// A peer that answers by the head of a request, and waits for no more of it.
async fn early() -> Peer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = format!("http://{}", listener.local_addr().unwrap());
    let refusing = async |request: Request| {
        let _rest = Lingering::default().over(request.into_body());
        answer()
    };
    let router = Router::new().route(GATEWAY_PATH, post(refusing));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    peer.parse().unwrap()
}

#[tokio::test]
async fn an_answer_before_the_requests_end_is_passed_on() {
    let peers = peers(&[&early().await]);
    peers.directory.known().insert(HELD, 0);
    // The head of a request, of which the rest never comes.
    let begun = request(&["x"]).chain(stream::pending());
    let answer = timeout(Duration::from_secs(20), relayed(&peers, &HELD, begun));
    let answer = answer.await.expect("nobody waits for the rest");
    assert_eq!(peers.places.free(), RELAYS - 1);
    let sealed = (StatusCode::OK, "sealed answer".to_owned());
    assert_eq!(text(answer).await, sealed);
    assert_eq!(peers.places.free(), RELAYS);
}

#[tokio::test]
async fn a_request_that_was_answered_is_not_carried_beyond_its_time() {
    let limits = Limits {
        bytes: 1 << 30,
        arrival: Duration::from_millis(300),
    };
    // It answers, and goes on reading.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = format!("http://{}", listener.local_addr().unwrap());
    let endless = async |request: Request| {
        let rest = request.into_body().into_data_stream();
        let answer = stream::iter([Ok(Bytes::from("sealed"))]);
        let rest = rest.map_ok(|_| Bytes::from("."));
        encapsulated(Body::from_stream(answer.chain(rest)))
    };
    let router = Router::new().route(GATEWAY_PATH, post(endless));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let peers = Peers::new(vec![peer.parse().unwrap()], limits, Arc::default()).unwrap();
    peers.directory.known().insert(HELD, 0);
    let trickle = stream::unfold((), async |()| {
        tokio::time::sleep(Duration::from_millis(10)).await;
        Some((Ok(Bytes::from_static(b"x")), ()))
    });
    let answer = relayed(&peers, &HELD, trickle).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let all = to_bytes(answer.into_body(), 1 << 20);
    let all = timeout(Duration::from_secs(20), all).await;
    assert!(all.expect("it is cut off").is_err());
    assert_eq!(peers.places.free(), RELAYS);
}

#[tokio::test]
async fn a_place_is_held_until_the_answer_ends() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    let response = relayed(&peers, &HELD, request(&["x"])).await;
    assert_eq!(peers.places.free(), RELAYS - 1);
    text(response).await;
    assert_eq!(peers.places.free(), RELAYS);
}

#[tokio::test]
async fn a_replica_that_died_is_forgotten_and_the_sender_verifies_again() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, serving) = replica.serve().await;
    let peers = peers(&[&peer]);
    assert_eq!(relayed(&peers, &HELD, request(&["x"])).await.status(), 200);
    serving.abort();
    let _ = serving.await;
    assert!(tells_to_verify_again(relayed(&peers, &HELD, request(&["x"])).await).await);
    assert!(peers.directory.known().is_empty());
}

#[tokio::test]
async fn without_peers_every_other_keyset_is_unknown() {
    assert!(tells_to_verify_again(relayed(&peers(&[]), &HELD, request(&["x"])).await).await);
}

#[tokio::test]
async fn pieces_of_an_answer_pass_before_the_next_exist() {
    static GATE: Notify = Notify::const_new();
    fn gated() -> Response<Body> {
        encapsulated(Body::from_stream(stream::iter(0..3).then(async |i| {
            GATE.notified().await;
            Ok::<_, Infallible>(Bytes::from(format!("piece {i}")))
        })))
    }
    let replica = Replica::holding(&[HELD], gated);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    let response = relayed(&peers, &HELD, request(&["x"])).await;
    let mut body = response.into_body().into_data_stream();
    for i in 0..3 {
        GATE.notify_one();
        // The replica makes no further piece before this one was received.
        assert_eq!(body.next().await.unwrap().unwrap(), format!("piece {i}"));
    }
    assert!(body.next().await.is_none());
}

#[tokio::test]
async fn peers_answers_pass_in_the_known_forms_only() {
    fn problem(status: StatusCode, size: usize) -> Response<Body> {
        let mut response = plain(status, "x".repeat(size));
        let value = HeaderValue::from_static(PROBLEM_MEDIA_TYPE);
        response.headers_mut().insert(header::CONTENT_TYPE, value);
        response
            .headers_mut()
            .insert("set-cookie", HeaderValue::from_static("a=b"));
        response
    }
    type Peer = fn() -> Response<Body>;
    let cases: [(Peer, u16); 9] = [
        (|| plain(StatusCode::MISDIRECTED_REQUEST, ""), 400),
        (|| problem(StatusCode::CONFLICT, 10), 409),
        (|| problem(StatusCode::PAYLOAD_TOO_LARGE, 10), 413),
        (|| problem(StatusCode::CONFLICT, MAX_REFUSAL + 1), 502),
        (|| plain(StatusCode::CONFLICT, "in clear"), 502),
        (|| plain(StatusCode::OK, "in clear"), 502),
        (|| plain(StatusCode::FOUND, ""), 502),
        (|| plain(StatusCode::SERVICE_UNAVAILABLE, "busy"), 503),
        (|| problem(StatusCode::UNAUTHORIZED, 10), 502),
    ];
    for (answer, expected) in cases {
        let replica = Replica::holding(&[HELD], answer);
        let (peer, _) = replica.serve().await;
        let response = relayed(&peers(&[&peer]), &HELD, request(&["x"])).await;
        assert_eq!(response.status(), expected, "{:?}", answer());
        assert!(response.headers().get("set-cookie").is_none());
        let retry = response.headers().contains_key(header::RETRY_AFTER);
        assert_eq!(retry, expected == 503);
        assert!(!text(response).await.1.contains("in clear"));
    }
}

#[tokio::test]
async fn a_request_that_is_too_large_or_too_slow_is_cut_off() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, _) = replica.serve().await;
    let limits = Limits {
        bytes: 10,
        arrival: Duration::from_millis(50),
    };
    let peers = Peers::new(vec![peer], limits, Arc::default()).unwrap();
    let response = relayed(&peers, &HELD, request(&["0123456789"])).await;
    assert_eq!(response.status(), 200);
    let response = relayed(&peers, &HELD, request(&["0123456789", "0"])).await;
    assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    sender.send(Ok(Bytes::from("start"))).await.unwrap();
    let slow = stream::unfold(receiver, async |mut receiver| {
        let item = receiver.recv().await?;
        Some((item, receiver))
    });
    let response = relayed(&peers, &HELD, slow).await;
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
    drop(sender);
    let relayed = replica.relayed.lock().unwrap();
    let whole: Vec<_> = relayed
        .iter()
        .filter_map(|(_, body)| body.as_deref())
        .collect();
    assert_eq!(whole, [b"0123456789"]);
}

#[tokio::test]
async fn relayed_uploads_that_trickle_give_way() {
    let replica = Replica::holding(&[HELD], answer);
    let (peer, _) = replica.serve().await;
    let peers = peers(&[&peer]);
    assert_eq!(relayed(&peers, &HELD, request(&["x"])).await.status(), 200);
    // Nothing comes of these, and nothing more would be waited for.
    let mut hostile: Vec<_> = (0..RELAYS)
        .map(|_| {
            Box::pin(relayed(
                &peers,
                &HELD,
                stream::pending::<Result<Bytes, Infallible>>(),
            ))
        })
        .collect();
    for upload in &mut hostile {
        assert!(futures::poll!(upload.as_mut()).is_pending());
    }
    assert_eq!(peers.places.free(), 0);
    let others = futures::future::select_all(hostile);
    let honest = relayed(&peers, &HELD, request(&["y"]));
    let (response, (given_up, _, _)) = tokio::join!(honest, others);
    assert_eq!(response.status(), 200);
    assert_eq!(given_up.status(), StatusCode::REQUEST_TIMEOUT);
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_sent_little_and_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = format!("http://{}", listener.local_addr().unwrap());
    // Accepts connections, and never looks at them.
    let accepting = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept().await.unwrap());
        }
    });
    let limits = Limits {
        bytes: 1 << 30,
        arrival: Duration::from_millis(500),
    };
    let peers = Peers::new(vec![peer.parse().unwrap()], limits, Arc::default()).unwrap();
    peers.directory.known().insert(HELD, 0);
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    let piece = Bytes::from(vec![0; 64 << 10]);
    let endless = stream::repeat_with(move || {
        counted.fetch_add(piece.len(), Ordering::SeqCst);
        Ok(piece.clone())
    });
    // The sender hurries, but not even its time is noticed by who waits for the peer.
    let response = timeout(Duration::from_secs(60), relayed(&peers, &HELD, endless));
    let response = response.await.expect("it is given up");
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
    // What the system's buffers for two sockets hold, and no part of a gigabyte.
    let taken = taken.load(Ordering::SeqCst);
    assert!(taken < 32 << 20, "{taken} bytes");
    assert_eq!(peers.places.free(), RELAYS);
    accepting.abort();
}

#[test]
fn the_fields_outside_have_one_form() {
    let hint = |fields: &[(&'static str, &str)]| {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        Hint::of(&headers)
    };
    let text = HELD.to_string();
    let named = Hint {
        keyset: Some(HELD),
        relayed: false,
    };
    assert_eq!(
        hint(&[]),
        Some(Hint {
            keyset: None,
            relayed: false
        })
    );
    assert_eq!(hint(&[(KEYSET_HINT, &text)]), Some(named));
    assert_eq!(
        hint(&[(KEYSET_HINT, &text), (RELAYED_MARK, "1")]),
        Some(Hint {
            relayed: true,
            ..named
        })
    );
    for bad in [
        &[(KEYSET_HINT, "07")][..],
        &[(KEYSET_HINT, &text[..].to_owned().replace('7', "A"))],
        &[(KEYSET_HINT, ""), (RELAYED_MARK, "1")],
        &[(KEYSET_HINT, &text), (KEYSET_HINT, &text)],
        &[(RELAYED_MARK, "0")],
        &[(RELAYED_MARK, "")],
        &[(RELAYED_MARK, "1"), (RELAYED_MARK, "1")],
    ] {
        assert_eq!(hint(bad), None, "{bad:?}");
    }
}
