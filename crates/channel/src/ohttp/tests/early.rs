//! Requests that are refused by their head, while the rest of them is still to come.

use std::cell::Cell;

use futures::FutureExt;

use super::super::chunks::{put, put_last, put_varint};
use super::super::message::{decode_request_head, encode_request};
use super::super::suite::{PublicKey, RequestSealer};
use super::*;

/// A request in chunks of these sizes of plaintext, in turn.
fn in_chunks(keyring: &Keyring, plaintext: &[u8], sizes: &[usize]) -> Vec<u8> {
    let config = keyring.generate(EXPIRY).unwrap();
    let (id, key) = PublicKey::from_config(&config.encoded).unwrap();
    let (head, mut sealer) = RequestSealer::new(id, &key).unwrap();
    let mut out = head.to_vec();
    let (mut rest, mut sizes) = (plaintext, sizes.iter().cycle());
    while !rest.is_empty() {
        let size = (*sizes.next().unwrap()).min(rest.len());
        put(&sealer.seal(&rest[..size], false).unwrap(), &mut out);
        rest = &rest[size..];
    }
    put_last(&sealer.seal(&[], true).unwrap(), &mut out);
    out
}

/// These bytes, and then nothing for ever.
fn begun(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + Unpin + 'static {
    whole(bytes).chain(stream::pending())
}

/// Refuses whoever brings no key.
fn asks(headers: &HeaderMap) -> Result<(), &'static str> {
    headers
        .contains_key("authorization")
        .then_some(())
        .ok_or("no key")
}

/// What comes of a request that stops after these bytes, if anything does.
fn at_once(keyring: &Keyring, bytes: &[u8]) -> Option<Result<Arrived<&'static str>, ReceiveError>> {
    keyring
        .receive_if(begun(bytes), LIMIT, NOW, asks)
        .now_or_never()
}

#[test]
fn who_is_refused_by_the_head_is_answered_before_the_rest_comes() {
    let (keyring, recipient) = keyring();
    let (sent, pending) = recipient.encapsulate(&request(&[7; 100_000])).unwrap();
    let early = LOOKED_AT_EARLY as usize + 1;
    assert!(at_once(&keyring, &sent[..early - 1]).is_none());
    let Some(Ok(Arrived::Refused("no key", responder))) = at_once(&keyring, &sent[..early]) else {
        panic!("not refused");
    };
    let answer = seal_answer(responder, &[b"no"]).concat();
    let answer = open_answer(pending, whole(&answer)).unwrap();
    assert_eq!(answer, (StatusCode::OK, b"no".to_vec()));
    // It has been answered: nobody can have it judged again, now that its sender may have a key.
    let again = at_once(&keyring, &sent[..early]).unwrap();
    assert!(matches!(again, Err(ReceiveError::Replayed)));
    assert!(matches!(
        receive(&keyring, &sent),
        Err(ReceiveError::Replayed)
    ));
}

/// So that it looks like any other to who watches.
#[test]
fn a_short_request_is_read_to_its_end_whoever_sends_it() {
    let (keyring, recipient) = keyring();
    for body in [0, 1000, 30_000] {
        let (sent, _) = recipient.encapsulate(&request(&vec![7; body])).unwrap();
        assert!(sent.len() as u64 <= LOOKED_AT_EARLY);
        assert!(at_once(&keyring, &sent).is_none());
        let never = |_: &HeaderMap| -> Result<(), ()> { panic!("asked") };
        let received = block_on(keyring.receive_if(whole(&sent), LIMIT, NOW, never));
        assert!(matches!(received, Ok(Arrived::Whole(_))));
    }
}

#[test]
fn who_is_admitted_is_read_to_the_end() {
    let (keyring, recipient) = keyring();
    let mut with_key = request(&[7; 100_000]);
    let key = HeaderValue::from_static("Bearer k");
    with_key.headers_mut().insert("authorization", key);
    let (sent, _) = recipient.encapsulate(&with_key).unwrap();
    assert!(at_once(&keyring, &sent[..sent.len() - 1]).is_none());
    let received = block_on(keyring.receive_if(whole(&sent), LIMIT, NOW, asks));
    let Ok(Arrived::Whole(received)) = received else {
        panic!("not admitted");
    };
    assert_eq!(received.request.unwrap().body(), with_key.body());
}

#[test]
fn two_copies_that_are_refused_at_once_are_answered_once() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(&[7; 100_000])).unwrap();
    let copy = || keyring.receive_if(pieces(&sent, &[100]), LIMIT, NOW, asks);
    let both = block_on(futures::future::join(copy(), copy()));
    assert!(matches!(
        both,
        (Ok(Arrived::Refused(..)), Err(ReceiveError::Replayed))
    ));
}

#[test]
fn what_is_forged_is_not_asked_about() {
    let (keyring, recipient) = keyring();
    let (sent, _) = recipient.encapsulate(&request(&[7; 100_000])).unwrap();
    let mut forged = sent.to_vec();
    forged[7 + ENC_BYTES + 100] ^= 1;
    let never = |_: &HeaderMap| -> Result<(), ()> { panic!("asked") };
    let refused = block_on(keyring.receive_if(whole(&forged), LIMIT, NOW, never));
    assert!(matches!(refused, Err(ReceiveError::Forged)));
    // And takes no room in the memory of those served.
    assert!(receive(&keyring, &sent).is_ok());
}

/// The beginning of a request with fields that take so many bytes, or say so.
fn head(fields: u64) -> Vec<u8> {
    let mut out = vec![0];
    for part in ["POST", "https", "", "/v1/completions"] {
        put_varint(part.len() as u64, &mut out);
        out.extend_from_slice(part.as_bytes());
    }
    put_varint(fields, &mut out);
    out
}

#[test]
fn what_begins_as_no_request_is_answered_early() {
    let keyring = Keyring::new(100);
    let too_long = MessageFault::Limit("head of the request");
    for (mut plaintext, fault) in [
        (vec![1; 20], MessageFault::Encoding),
        (head(16 << 10), too_long),
        (head(8 << 20), too_long),
        (head(u64::MAX >> 2), too_long),
    ] {
        plaintext.resize(50_000, b'x');
        let sent = in_chunks(&keyring, &plaintext, &[1 << 14]);
        // Without its last chunk.
        let arrived = at_once(&keyring, &sent[..sent.len() - 17]).unwrap();
        let Ok(Arrived::NoRequest(received)) = arrived else {
            panic!("{fault}");
        };
        assert_eq!(received.request.unwrap_err(), fault);
    }
}

/// Each of its bytes would hold room for eighteen.
#[test]
fn a_head_in_tiny_chunks_is_not_waited_for_longer_than_one_in_large_ones() {
    let keyring = Keyring::new(100);
    let mut plaintext = head(10_000);
    plaintext.resize(plaintext.len() + 9_999, b'x');
    let sent = in_chunks(&keyring, &plaintext, &[1]);
    let early = LOOKED_AT_EARLY as usize;
    assert!(at_once(&keyring, &sent[..early]).is_none());
    let Some(Ok(Arrived::NoRequest(received))) = at_once(&keyring, &sent[..early + 1]) else {
        panic!("it is waited for");
    };
    let fault = MessageFault::Limit("head of the request");
    assert_eq!(received.request.unwrap_err(), fault);
}

#[test]
fn the_largest_head_is_that_of_the_specification() {
    let with_field = |length: usize| {
        let mut request = request(b"body");
        let value = HeaderValue::from_str(&"v".repeat(length)).unwrap();
        request.headers_mut().insert("x", value);
        request
    };
    let fits = |length: usize| encode_request(&with_field(length)).is_ok();
    let largest = (1..1 << 14).rev().find(|length| fits(*length)).unwrap();
    let too_long = encode_request(&with_field(largest + 1)).unwrap_err();
    assert_eq!(too_long, MessageFault::Limit("head of the request"));
    // All of it but the lengths of the content and the trailers, the content, and the padding.
    let encoded = encode_request(&with_field(largest)).unwrap();
    let used = encoded.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    assert_eq!(used - 1 - "body".len(), MAX_REQUEST_HEAD);

    // It is there in time, in chunks of any size but tiny ones.
    let mut long = with_field(largest);
    *long.body_mut() = vec![7; 100_000].into();
    let encoded = encode_request(&long).unwrap();
    for size in [16, 100, 8191, 8192, 16_383, 16_384] {
        let keyring = Keyring::new(100);
        let sent = in_chunks(&keyring, &encoded, &[size]);
        let early = at_once(&keyring, &sent[..LOOKED_AT_EARLY as usize + 1]);
        let refused = matches!(early, Some(Ok(Arrived::Refused("no key", _))));
        assert!(refused, "chunks of {size}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_head_is_asked_about_once_in_whatever_chunks_it_comes(
        body in 50_000usize..70_000,
        chunks in proptest::collection::vec(20usize..20_000, 1..6),
        sizes in proptest::collection::vec(1usize..3_000, 1..8),
        admitted in any::<bool>(),
    ) {
        let keyring = Keyring::new(100);
        let request = request(&vec![7; body]);
        let chunks: Vec<_> = chunks.into_iter().map(|size| size.min(1 << 14)).collect();
        let sent = in_chunks(&keyring, &encode_request(&request).unwrap(), &chunks);
        let asked = Cell::new(0);
        let admit = |headers: &HeaderMap| {
            asked.set(asked.get() + 1);
            assert_eq!(headers, request.headers());
            admitted.then_some(()).ok_or("no key")
        };
        let arrived = block_on(keyring.receive_if(pieces(&sent, &sizes), LIMIT, NOW, admit));
        prop_assert_eq!(asked.get(), 1);
        match arrived.unwrap() {
            Arrived::Whole(received) => {
                prop_assert!(admitted);
                let received = received.request.unwrap();
                prop_assert_eq!(received.body(), request.body());
            }
            Arrived::Refused(..) => prop_assert!(!admitted),
            Arrived::NoRequest(_) => prop_assert!(false, "it is one"),
        }
    }

    #[test]
    fn a_head_is_there_when_its_last_byte_is(
        fields in proptest::collection::vec(("[a-z]{1,10}", "[a-z]{0,300}"), 0..20),
        body in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut request = request(&body);
        for (name, value) in fields {
            let name = http::HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        let encoded = encode_request(&request).unwrap();
        let complete = (0..=encoded.len())
            .find(|length| decode_request_head(&encoded[..*length]).unwrap().is_some())
            .unwrap();
        for length in complete..=encoded.len() {
            let head = decode_request_head(&encoded[..length]).unwrap().unwrap();
            prop_assert_eq!(head.headers(), request.headers());
            prop_assert_eq!(head.uri(), request.uri());
            prop_assert_eq!(head.method(), request.method());
        }
        // Right behind it stands the length of the body.
        let mut behind = Vec::new();
        put_varint(body.len() as u64, &mut behind);
        behind.extend_from_slice(&body);
        prop_assert_eq!(&encoded[complete..complete + behind.len()], &behind[..]);
    }
}
