//! Both halves against each other over byte streams.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use bytes::Bytes;
use futures::executor::block_on;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use proptest::prelude::*;

use super::suite::{CONFIG_BYTES, ENC_BYTES};
use super::*;

mod early;

const LIMIT: u64 = 1 << 20;
const EXPIRY: u64 = 1_000;
const NOW: u64 = 10;
/// One sealed frame on the wire: length (2), ciphertext (512), tag (16).
const SEALED_FRAME: usize = 530;
/// Response nonce (16), final length (1), tag (16).
const ANSWER_OVERHEAD: usize = 16 + 17;
/// Header (7), enc (1120), final length (1), tag (16).
const REQUEST_OVERHEAD: usize = 7 + ENC_BYTES + 17;

/// A transport that delivers `bytes` in pieces of the given sizes, sleeping before each.
fn pieces(
    bytes: &[u8],
    sizes: &[usize],
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + Unpin + 'static {
    let mut rest = Bytes::copy_from_slice(bytes);
    let mut sizes = sizes.iter().copied().cycle();
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let size = sizes.next().unwrap().min(rest.len());
        parts.push(Ok(rest.split_to(size)));
    }
    let sleep = || {
        let mut slept = false;
        futures::future::poll_fn(move |cx| {
            cx.waker().wake_by_ref();
            if std::mem::replace(&mut slept, true) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
    };
    Box::pin(stream::iter(parts).then(move |part| async move {
        sleep().await;
        part
    }))
}

fn whole(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + Unpin + 'static {
    stream::iter([Ok(Bytes::copy_from_slice(bytes))])
}

fn keyring() -> (Keyring, Recipient) {
    let keyring = Keyring::new(1 << 16);
    let config = keyring.generate(EXPIRY).unwrap();
    (keyring, Recipient::from_config(&config.encoded).unwrap())
}

fn request(body: &[u8]) -> Request<Bytes> {
    Request::post("/v1/chat/completions")
        .header("content-type", "application/json")
        .body(Bytes::copy_from_slice(body))
        .unwrap()
}

fn receive(keyring: &Keyring, bytes: &[u8]) -> Result<Received, ReceiveError> {
    block_on(keyring.receive(whole(bytes), LIMIT, NOW))
}

fn seal_answer(responder: Responder, pieces: &[&[u8]]) -> Vec<Bytes> {
    let mut headers = HeaderMap::new();
    headers.insert(
        "content-type",
        HeaderValue::from_static("text/event-stream"),
    );
    let pieces: Vec<_> = pieces
        .iter()
        .map(|p| Ok(Bytes::copy_from_slice(p)))
        .collect();
    let stream = responder
        .respond::<_, io::Error>(StatusCode::OK, &headers, stream::iter(pieces))
        .unwrap();
    block_on(stream.collect::<Vec<_>>())
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

fn open_answer(
    pending: PendingAnswer,
    transport: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Result<(StatusCode, Vec<u8>), AnswerError> {
    block_on(async {
        let mut answer = pending.open(transport).await?;
        let mut body = Vec::new();
        while let Some(piece) = answer.body.next().await {
            body.extend_from_slice(&piece?);
        }
        Ok((answer.status, body))
    })
}

/// A request and its answer, both on the wire.
fn exchange(body: &[u8], pieces: &[&[u8]]) -> (Keyring, Bytes, PendingAnswer, Vec<u8>) {
    let (keyring, recipient) = keyring();
    let (sent, pending) = recipient.encapsulate(&request(body)).unwrap();
    let received = receive(&keyring, &sent).unwrap();
    assert_eq!(received.request.unwrap().body(), body);
    let answer = seal_answer(received.responder, pieces).concat();
    (keyring, sent, pending, answer)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_chunking_of_the_transport_gives_the_same_request(
        body in proptest::collection::vec(any::<u8>(), 0..40_000),
        sizes in proptest::collection::vec(1usize..3_000, 1..8),
    ) {
        let (keyring, recipient) = keyring();
        let (sent, _) = recipient.encapsulate(&request(&body)).unwrap();
        let transport = pieces(&sent, &sizes);
        let received = block_on(keyring.receive(transport, LIMIT, NOW)).unwrap().request.unwrap();
        prop_assert_eq!(&received.body()[..], &body[..]);
        prop_assert_eq!(received.uri(), "/v1/chat/completions");
    }

    #[test]
    fn any_chunking_of_the_transport_gives_the_same_answer(
        events in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..2_000), 0..20),
        sizes in proptest::collection::vec(1usize..3_000, 1..8),
    ) {
        let events: Vec<&[u8]> = events.iter().map(|e| &e[..]).collect();
        let (_, _, pending, answer) = exchange(b"q", &events);
        let (status, body) = open_answer(pending, pieces(&answer, &sizes)).unwrap();
        prop_assert_eq!(status, StatusCode::OK);
        prop_assert_eq!(body, events.concat());
    }

    #[test]
    fn requests_and_answers_have_only_the_specified_sizes(
        body in 0usize..70_000,
        answer in 0usize..20_000,
    ) {
        let (_, sent, _, sealed) = exchange(&vec![1; body], &[&vec![2; answer]]);
        // Sixteen KiB of plaintext at a time, each with its length (4 or 2 bytes) and tag.
        let plaintext = (10..).map(|n| 1usize << n).find(|padded| {
            let whole = padded / 16384;
            let rest = padded % 16384;
            let chunks = whole * (4 + 16384 + 16) + if rest > 0 { 2 + rest + 16 } else { 0 };
            REQUEST_OVERHEAD + chunks >= sent.len()
        }).unwrap();
        let chunks = (plaintext / 16384) * 20 + if plaintext % 16384 > 0 { 18 } else { 0 };
        prop_assert_eq!(sent.len(), REQUEST_OVERHEAD + plaintext + chunks);
        prop_assert!(plaintext >= body && (plaintext == 1024 || plaintext < 2 * (body + 200)));

        let frames = (sealed.len() - ANSWER_OVERHEAD) / SEALED_FRAME;
        prop_assert_eq!(sealed.len(), ANSWER_OVERHEAD + frames * SEALED_FRAME);
        prop_assert!(frames.is_power_of_two() && frames >= 8);
        let needed = answer / 510 + 4;
        prop_assert!(frames <= needed.next_power_of_two().max(8));
    }
}

#[test]
fn a_request_cut_at_any_byte_is_refused() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    for n in 0..sent.len() {
        let error = receive(&keyring, &sent[..n]).err().unwrap();
        // A cut inside the final chunk leaves a tag that is short, which does not authenticate.
        assert!(
            matches!(error, ReceiveError::Truncated | ReceiveError::Forged),
            "{n}: {error}"
        );
    }
    // None of them used the request up.
    assert!(receive(&keyring, &sent).is_ok());
}

#[test]
fn a_request_with_any_byte_changed_is_refused() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    for n in 0..sent.len() {
        let mut changed = sent.to_vec();
        changed[n] ^= 0x10;
        assert!(receive(&keyring, &changed).is_err(), "byte {n}");
    }
    assert!(receive(&keyring, &sent).is_ok());
}

#[test]
fn bytes_after_a_request_are_refused() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    let longer = [&sent[..], &[0]].concat();
    assert!(matches!(
        receive(&keyring, &longer),
        Err(ReceiveError::Forged)
    ));
}

#[test]
fn an_answer_cut_at_any_byte_is_noticed() {
    let (_, _, pending, answer) = exchange(b"q", &[b"data: one\n\n", b"data: two\n\n"]);
    for n in 0..answer.len() {
        let error = open_answer(pending.again(), whole(&answer[..n])).unwrap_err();
        assert!(
            matches!(error, AnswerError::Truncated | AnswerError::Forged),
            "{n}: {error}"
        );
    }
}

#[test]
fn an_answer_with_any_byte_changed_is_noticed() {
    let (_, _, pending, answer) = exchange(b"q", &[b"data: one\n\n"]);
    for n in 0..answer.len() {
        let mut changed = answer.clone();
        changed[n] ^= 0x04;
        assert!(
            open_answer(pending.again(), whole(&changed)).is_err(),
            "byte {n}"
        );
    }
}

#[test]
fn an_answer_to_another_request_is_refused() {
    let (keyring, recipient) = keyring();
    let (_, first) = recipient.encapsulate(&request(b"first")).unwrap();
    let (sent, _) = recipient.encapsulate(&request(b"second")).unwrap();
    let responder = receive(&keyring, &sent).unwrap().responder;
    let answer = seal_answer(responder, &[b"secret"]).concat();
    let error = open_answer(first, whole(&answer)).unwrap_err();
    assert!(matches!(error, AnswerError::Forged));
}

#[test]
fn a_request_is_served_once() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    assert!(receive(&keyring, &sent).is_ok());
    assert!(matches!(
        receive(&keyring, &sent),
        Err(ReceiveError::Replayed)
    ));
}

#[test]
fn repeats_and_unknown_keys_are_refused_by_their_head_alone() {
    use futures::FutureExt;
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    assert!(receive(&keyring, &sent).is_ok());
    // The rest of the request never comes, and nobody waits for it.
    let head_only = || whole(&sent[..7 + ENC_BYTES]).chain(stream::pending());
    let refused = keyring
        .receive(head_only(), LIMIT, NOW)
        .now_or_never()
        .unwrap();
    assert!(matches!(refused, Err(ReceiveError::Replayed)));
    keyring.erase(0);
    let refused = keyring
        .receive(head_only(), LIMIT, NOW)
        .now_or_never()
        .unwrap();
    assert!(matches!(refused, Err(ReceiveError::UnknownKey(0))));
}

#[test]
fn two_copies_under_way_at_once_are_served_once() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    let copy = || keyring.receive(pieces(&sent, &[100]), LIMIT, NOW);
    let (a, b) = block_on(futures::future::join(copy(), copy()));
    assert!(matches!((a, b), (Ok(_), Err(ReceiveError::Replayed))));
}

#[test]
fn a_key_that_cannot_remember_more_serves_no_more() {
    let keyring = Keyring::new(2);
    let config = keyring.generate(EXPIRY).unwrap();
    let recipient = Recipient::from_config(&config.encoded).unwrap();
    let send = |recipient: &Recipient| {
        let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
        receive(&keyring, &sent)
    };
    assert!(!keyring.wants_rotation());
    assert!(send(&recipient).is_ok());
    assert!(send(&recipient).is_ok());
    assert!(keyring.wants_rotation());
    let error = send(&recipient).err().unwrap();
    assert!(matches!(error, ReceiveError::KeyUsedUp(id) if id == config.id));
    assert!(error.is_about_the_key());

    let next = Recipient::from_config(&keyring.generate(EXPIRY).unwrap().encoded).unwrap();
    assert!(!keyring.wants_rotation());
    assert!(send(&next).is_ok());
}

#[test]
fn several_keys_serve_until_they_expire_or_are_erased() {
    let keyring = Keyring::default();
    let configs = [EXPIRY, EXPIRY + 1, EXPIRY].map(|expiry| keyring.generate(expiry).unwrap());
    let recipients = configs
        .each_ref()
        .map(|c| Recipient::from_config(&c.encoded).unwrap());
    assert_eq!(keyring.ids(), [0, 1, 2]);
    let send = |i: usize, now| {
        let (sent, _) = recipients[i].encapsulate(&request(b"body")).unwrap();
        block_on(keyring.receive(whole(&sent), LIMIT, now)).map(|_| ())
    };
    for i in 0..3 {
        assert!(send(i, EXPIRY - 1).is_ok());
    }
    assert!(matches!(send(0, EXPIRY), Err(ReceiveError::UnknownKey(0))));
    assert!(send(1, EXPIRY).is_ok());

    keyring.erase(2);
    assert!(matches!(send(2, NOW), Err(ReceiveError::UnknownKey(2))));
    keyring.erase_expired(EXPIRY);
    assert_eq!(keyring.ids(), [1]);
    assert!(matches!(send(0, NOW), Err(ReceiveError::UnknownKey(0))));
}

#[test]
fn key_ids_are_not_reused_while_their_key_lives() {
    let keyring = Keyring::default();
    for _ in 0..256 {
        keyring.generate(EXPIRY).unwrap();
    }
    assert_eq!(keyring.generate(EXPIRY), Err(NoFreeKeyId));
    keyring.erase(77);
    assert_eq!(keyring.generate(EXPIRY).unwrap().id, 77);
}

#[test]
fn a_request_over_the_limit_is_refused_at_the_exact_byte() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(&[1; 5000])).unwrap();
    let receive = |limit| block_on(keyring.receive(whole(&sent), limit, NOW));
    let limit = sent.len() as u64 - 1;
    assert!(matches!(receive(limit), Err(ReceiveError::TooLarge { limit: l }) if l == limit));
    assert!(receive(limit + 1).is_ok());
}

#[test]
fn other_suites_are_refused() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(b"body")).unwrap();
    // X25519, HKDF-SHA384, AES-256-GCM, ChaCha20-Poly1305.
    for (at, value) in [(1, [0x00, 0x20]), (3, [0, 2]), (5, [0, 2]), (5, [0, 3])] {
        let mut other = sent.to_vec();
        other[at..at + 2].copy_from_slice(&value);
        assert!(matches!(
            receive(&keyring, &other),
            Err(ReceiveError::Malformed)
        ));
    }

    let config = keyring.generate(EXPIRY).unwrap().encoded;
    assert!(Recipient::from_config(&config).is_ok());
    for (at, value) in [(1, 0x00), (CONFIG_BYTES - 1, 3), (CONFIG_BYTES - 1, 2)] {
        let mut other = config.clone();
        other[at] = value;
        assert!(Recipient::from_config(&other).is_err());
    }
    assert!(Recipient::from_config(&config[..config.len() - 1]).is_err());
    assert!(Recipient::from_config(&[&config[..], &[0]].concat()).is_err());
    assert!(Recipient::from_config(&[]).is_err());
}

#[test]
fn what_decrypts_but_is_no_request_is_answered_inside_the_channel() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate_plaintext(b"hello").unwrap();
    let received = receive(&keyring, &sent).unwrap();
    assert_eq!(received.request.unwrap_err(), MessageFault::Padding);
    assert!(matches!(
        receive(&keyring, &sent),
        Err(ReceiveError::Replayed)
    ));
}

#[test]
fn errors_and_short_answers_look_alike() {
    let length = |status, body: &'static [u8]| {
        let (keyring, recipient) = keyring();
        let (sent, _) = recipient.encapsulate(&request(b"q")).unwrap();
        let responder = receive(&keyring, &sent).unwrap().responder;
        let body = stream::iter([Ok::<_, io::Error>(Bytes::from_static(body))]);
        let sealed = responder.respond(status, &HeaderMap::new(), body).unwrap();
        block_on(sealed.map(|piece| piece.unwrap().len()).collect::<Vec<_>>())
    };
    let error = length(StatusCode::BAD_REQUEST, br#"{"error":{"message":"no"}}"#);
    let answer = length(StatusCode::OK, br#"{"choices":[]}"#);
    assert_eq!(error, answer);
    assert_eq!(
        error.iter().sum::<usize>(),
        ANSWER_OVERHEAD + 8 * SEALED_FRAME
    );
}

#[test]
fn each_event_leaves_before_the_next_is_made() {
    let (keyring, recipient) = keyring();
    let (sent, pending) = recipient.encapsulate(&request(b"q")).unwrap();
    let responder = receive(&keyring, &sent).unwrap().responder;
    let made = Arc::new(AtomicUsize::new(0));
    let counter = made.clone();
    let body = stream::iter(0..100).map(move |i| {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok::<_, io::Error>(Bytes::from(format!("data: {i}\n\n")))
    });
    let sealed = responder
        .respond(StatusCode::OK, &HeaderMap::new(), body)
        .unwrap()
        .boxed();

    // The user's half pulls the service's half through a pipe without a buffer.
    block_on(async {
        let mut answer = pending.open(sealed).await.unwrap();
        assert_eq!(
            made.load(Ordering::SeqCst),
            0,
            "the head waits for no event"
        );
        for i in 0..100 {
            let event = answer.body.next().await.unwrap().unwrap();
            assert_eq!(event, format!("data: {i}\n\n"));
            assert_eq!(
                made.load(Ordering::SeqCst),
                i + 1,
                "event {i} was held back"
            );
        }
        assert!(answer.body.next().await.is_none());
    });
}

#[test]
fn a_body_that_fails_cuts_the_answer_off() {
    let (keyring, recipient) = keyring();
    let (sent, pending) = recipient.encapsulate(&request(b"q")).unwrap();
    let responder = receive(&keyring, &sent).unwrap().responder;
    let body = stream::iter([
        Ok(Bytes::from_static(b"part")),
        Err(io::Error::other("engine")),
    ]);
    let mut sealed = responder
        .respond(StatusCode::OK, &HeaderMap::new(), body)
        .unwrap()
        .boxed();
    let wire = block_on(async {
        let mut wire = Vec::new();
        while let Some(Ok(bytes)) = sealed.next().await {
            wire.extend_from_slice(&bytes);
        }
        assert!(sealed.next().await.is_none());
        wire
    });
    let error = open_answer(pending, whole(&wire)).unwrap_err();
    assert!(matches!(error, AnswerError::Truncated));
}

#[test]
fn dropping_the_answer_drops_the_body() {
    struct Noticed(Arc<AtomicUsize>);
    impl Drop for Noticed {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let (keyring, recipient) = keyring();
    let (sent, pending) = recipient.encapsulate(&request(b"q")).unwrap();
    let responder = receive(&keyring, &sent).unwrap().responder;
    let drops = Arc::new(AtomicUsize::new(0));
    let guard = Noticed(drops.clone());
    let body = stream::repeat_with(move || {
        let _ = &guard;
        Ok::<_, io::Error>(Bytes::from_static(b"token"))
    });
    let sealed = responder
        .respond(StatusCode::OK, &HeaderMap::new(), body)
        .unwrap()
        .boxed();
    let mut answer = block_on(pending.open(sealed)).unwrap();
    assert!(block_on(answer.body.next()).unwrap().is_ok());
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(answer);
    assert_eq!(drops.load(Ordering::SeqCst), 1);
}

/// Seals an answer that an honest service would never send: `frames` as they are.
fn answer_of_frames(frames: &[Vec<u8>]) -> Result<(StatusCode, Vec<u8>), AnswerError> {
    let (_, recipient) = keyring();
    let (sent, pending) = recipient.encapsulate(&request(b"q")).unwrap();
    let nonce = [3; suite::ANSWER_NONCE_BYTES];
    let mut cipher = pending.cipher(&sent[7..7 + ENC_BYTES], &nonce);
    let mut wire = nonce.to_vec();
    for frame in frames {
        let mut chunk = frame.clone();
        cipher.seal(&mut chunk, false).unwrap();
        chunks::put(&chunk, &mut wire);
    }
    let mut last = Vec::new();
    cipher.seal(&mut last, true).unwrap();
    chunks::put_last(&last, &mut wire);
    open_answer(pending, whole(&wire))
}

#[test]
fn answers_that_are_not_padded_as_specified_are_refused() {
    let head = message::encode_answer_head(StatusCode::OK, &HeaderMap::new()).unwrap();
    let mut message = head;
    message::encode_answer_piece(b"body", &mut message);
    message.extend(message::ANSWER_END);
    let frames = |data: &[u8], total: usize| -> Vec<Vec<u8>> {
        let mut all = vec![frames::build(data).to_vec()];
        all.resize(total, frames::build(&[]).to_vec());
        all
    };
    let good = answer_of_frames(&frames(&message, 8)).unwrap();
    assert_eq!(good, (StatusCode::OK, b"body".to_vec()));

    for total in [1, 7, 9, 12] {
        let error = answer_of_frames(&frames(&message, total)).unwrap_err();
        assert!(
            matches!(error, AnswerError::Padding),
            "{total} frames: {error}"
        );
    }
    let mut short = frames(&message, 8);
    short[7].truncate(511);
    assert!(matches!(
        answer_of_frames(&short),
        Err(AnswerError::Padding)
    ));
    let mut dirty = frames(&message, 8);
    dirty[7][511] = 1;
    assert!(matches!(
        answer_of_frames(&dirty),
        Err(AnswerError::Padding)
    ));
    let mut after = frames(&message, 8);
    after[7] = frames::build(b"x").to_vec();
    assert!(matches!(
        answer_of_frames(&after),
        Err(AnswerError::Message(MessageFault::Encoding))
    ));
    let unfinished = frames(&message[..message.len() - 1], 8);
    assert!(matches!(
        answer_of_frames(&unfinished),
        Err(AnswerError::Message(MessageFault::Incomplete))
    ));
    let mut empty_chunk = frames(&message, 8);
    empty_chunk.insert(4, Vec::new());
    assert!(matches!(
        answer_of_frames(&empty_chunk),
        Err(AnswerError::Malformed)
    ));
}

#[test]
fn refusals_outside_the_channel_say_only_their_kind() {
    let about_the_key = ReceiveError::UnknownKey(3).to_response();
    assert_eq!(about_the_key.status(), 400);
    assert_eq!(about_the_key.headers()["content-type"], PROBLEM_MEDIA_TYPE);
    let body: serde_json::Value = serde_json::from_slice(about_the_key.body()).unwrap();
    assert_eq!(body["type"], KEY_PROBLEM);
    assert_eq!(
        ReceiveError::KeyUsedUp(3).to_response().body(),
        about_the_key.body()
    );

    let forged = ReceiveError::Forged.to_response();
    assert_eq!(forged.status(), 400);
    assert_eq!(forged.body(), ReceiveError::Truncated.to_response().body());
    assert_eq!(
        ReceiveError::TooLarge { limit: 1 }.to_response().status(),
        413
    );
    assert_eq!(ReceiveError::Replayed.to_response().status(), 409);
}
