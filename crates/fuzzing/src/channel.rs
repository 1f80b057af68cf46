//! Keysets, the attestation response, and encrypted requests and answers.

use std::convert::Infallible;
use std::sync::LazyLock;

use bytes::Bytes;
use casemate_attest::{Policy, UnixTime};
use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_channel::ohttp::plain::{
    AnswerDecoder, ChunkReader, decode_request, encode_request, put, put_last,
};
use casemate_channel::ohttp::{Keyring, Recipient};
use casemate_channel::verify::{AttestationResponse, Challenge, verify_service};
use casemate_container::ModelDigest;
use casemate_container::signing::SigningKey;
use casemate_release::credential::Credential;
use futures::executor::block_on;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, Request, StatusCode};

use crate::attest::{NOW, honest};
use crate::{Walk, damage};

fn recipient_config() -> Vec<u8> {
    let config = Keyring::default().generate(NOW + 3600);
    config.expect("the first key").encoded
}

fn honest_keyset() -> Keyset {
    Keyset {
        ohttp_config: recipient_config(),
        receipt_key: [4; 32],
        tls_key_digest: Some([6; 32]),
        model_name: "smollm2".into(),
        model_digest: [5; 32],
        model_version: 7,
        adapter_digests: vec![[7; 32], [8; 32]],
        compute: "int8-g32".into(),
        policy_version: 3,
        not_before: NOW,
        expires_at: NOW + 3600,
    }
}

/// A keyset, and its key configuration. What is accepted is its own one encoding.
pub(crate) fn keyset(data: &[u8]) {
    if let Ok(keyset) = Keyset::decode(data) {
        assert_eq!(
            keyset.encode().as_deref(),
            Ok(data),
            "a second encoding was accepted"
        );
        let _ = Recipient::from_config(&keyset.ohttp_config);
    }
    if let Ok(recipient) = Recipient::from_config(data) {
        assert_eq!(recipient.key_id(), data[0]);
        // A key that nobody can encrypt to is an error, not a panic.
        let _ = recipient.encapsulate(&question());
    }
}

pub(crate) fn keyset_seeds() -> Vec<Vec<u8>> {
    let full = honest_keyset();
    let mut small = full.clone();
    small.ohttp_config = vec![1, 2, 3];
    small.tls_key_digest = None;
    small.adapter_digests.clear();
    let [full, small] = [full, small].map(|keyset| keyset.encode().expect("an honest keyset"));
    vec![full, small, recipient_config()]
}

/// An honest service of this process.
struct Service {
    response: AttestationResponse,
    challenge: Challenge,
    policy: Policy,
}

fn service() -> &'static Service {
    static SERVICE: LazyLock<Service> = LazyLock::new(|| {
        let honest = honest();
        let issuer = SigningKey::from_seed(&[1; 32]);
        let keyset = Keyset {
            adapter_digests: vec![],
            ..honest_keyset()
        };
        let keyset = keyset.encode().expect("an honest keyset");
        let digest = KeysetDigest::of(&keyset);
        let nonce = [9; 32];
        let binding = ChannelBinding::Key;
        let data = report_data(Purpose::Serving, Role::Service, &digest, &nonce, &binding);
        let credential = Credential {
            evidence_digest: [6; 32],
            keyset_digest: digest.0,
            model_digest: ModelDigest([5; 32]),
            model_version: 7,
            adapter_digests: vec![],
            service: "demo".into(),
            policy_version: 3,
            log_size: 1,
            log_head: [8; 32],
            issued_at: NOW,
            expires_at: NOW + 1800,
        };
        let issuer_hex = issuer.verifying_key().to_string();
        let text = honest.policy_text.replace(&"0a".repeat(32), &issuer_hex);
        let service = Service {
            response: AttestationResponse {
                evidence: honest
                    .tee
                    .quote(&honest.measurement, &data, NOW)
                    .expect("a quote"),
                keyset,
                credential: credential.issue(&issuer).expect("an honest credential"),
            },
            challenge: Challenge::from_parts(nonce, UnixTime::from_secs(NOW)),
            policy: Policy::from_toml(&text).expect("a policy"),
        };
        assert!(
            service.accepts(&service.response),
            "the honest service is refused"
        );
        service
    });
    &SERVICE
}

impl Service {
    fn accepts(&self, response: &AttestationResponse) -> bool {
        let now = UnixTime::from_secs(NOW);
        verify_service(response, &self.challenge, &self.policy, now)
            .1
            .is_ok()
    }
}

/// An honest answer of a service.
pub(crate) fn honest_response() -> &'static AttestationResponse {
    &service().response
}

/// A service's answer as a document. It reads back as written and is not accepted: nobody signed it.
pub(crate) fn response(data: &[u8]) {
    let Ok(response) = AttestationResponse::from_json(data) else {
        return;
    };
    let again = AttestationResponse::from_json(response.to_json().as_bytes());
    assert_eq!(again.expect("what was written"), response);
    let service = service();
    if response != service.response {
        assert!(!service.accepts(&response), "accepted without a signature");
    }
}

pub(crate) fn response_seeds() -> Vec<Vec<u8>> {
    vec![service().response.to_json().into_bytes()]
}

/// Damage to one part of an honest answer. What is accepted has the same keyset and credential.
pub(crate) fn service_damage(data: &[u8]) {
    let (part, edits) = data.split_first().unwrap_or((&0, &[]));
    let service = service();
    let mut response = service.response.clone();
    match part % 3 {
        0 => damage::apply(edits, &mut response.keyset),
        1 => damage::apply(edits, &mut response.credential),
        _ => {
            let mut text = response.to_json().into_bytes();
            damage::apply(edits, &mut text);
            match AttestationResponse::from_json(&text) {
                Ok(changed) => response = changed,
                Err(_) => return,
            }
        }
    }
    if service.accepts(&response) {
        assert_eq!(response.keyset, service.response.keyset);
        assert_eq!(response.credential, service.response.credential);
    }
}

pub(crate) fn walks() -> Vec<Walk> {
    let response = &service().response;
    let request = request_seeds()[0].len() - 2;
    let walk = |target, what, prefix, len| Walk {
        target,
        what,
        prefix,
        len,
    };
    vec![
        walk("service_damage", "a keyset", &[0], response.keyset.len()),
        walk(
            "service_damage",
            "a service's credential",
            &[1],
            response.credential.len(),
        ),
        walk(
            "service_damage",
            "an attestation response",
            &[2],
            response.to_json().len(),
        ),
        walk("ohttp_request", "an encrypted request", &[1, 255], request),
        // A nonce, eight frames, the end: as an answer of this size is padded.
        walk(
            "ohttp_answer",
            "an encrypted answer",
            &[255],
            16 + 8 * 530 + 17,
        ),
    ]
}

pub(crate) fn service_damage_seeds() -> Vec<Vec<u8>> {
    damage::seeds_of_parts(3)
}

fn question() -> Request<Bytes> {
    Request::post("/v1/chat/completions")
        .header("content-type", "application/json")
        .body(Bytes::from_static(b"{\"messages\": []}"))
        .expect("a plain request")
}

/// `bytes` in pieces of `size`.
fn pieces(
    bytes: &[u8],
    size: u8,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + Unpin + 'static {
    let size = usize::from(size).max(1) * 3;
    let parts: Vec<_> = bytes
        .chunks(size)
        .map(|part| Ok(Bytes::copy_from_slice(part)))
        .collect();
    stream::iter(parts)
}

const LIMIT: u64 = 1 << 20;

/// An encrypted request: bytes as they are, or damage to an honest one. Only the honest one is received, and once.
pub(crate) fn request(data: &[u8]) {
    static KEYS: LazyLock<(Keyring, Recipient)> = LazyLock::new(|| {
        let keyring = Keyring::new(usize::MAX / 4);
        let config = keyring.generate(NOW + 3600).expect("the first key");
        (
            keyring,
            Recipient::from_config(&config.encoded).expect("our own configuration"),
        )
    });
    let (keyring, recipient) = &*KEYS;
    let [which, size, bytes @ ..] = data else {
        return;
    };
    let receive = |bytes: &[u8]| block_on(keyring.receive(pieces(bytes, *size), LIMIT, NOW));
    if which % 2 == 0 {
        assert!(receive(bytes).is_err(), "received, although nobody sent it");
        return;
    }
    let (sent, _) = recipient
        .encapsulate(&question())
        .expect("an honest request");
    let mut arrived = sent.to_vec();
    damage::apply(bytes, &mut arrived);
    match receive(&arrived) {
        Ok(received) => {
            assert_eq!(arrived, *sent, "damage went unnoticed");
            let request = received.request.expect("an honest request");
            assert_eq!(request.body(), question().body());
            assert!(receive(&arrived).is_err(), "received twice");
        }
        Err(error) => {
            assert_ne!(arrived, *sent, "an honest request is refused: {error}");
            error.to_response();
        }
    }
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let recipient = Recipient::from_config(&recipient_config()).expect("our own configuration");
    let (sent, _) = recipient
        .encapsulate(&question())
        .expect("an honest request");
    let mut seeds = vec![[&[0, 200], &sent[..]].concat()];
    seeds.extend(
        damage::seeds()
            .into_iter()
            .map(|seed| [&[1, 255], &seed[..]].concat()),
    );
    seeds
}

/// Damage to an encrypted answer. What is handed out is a part of the honest body; all of it only where there is none.
pub(crate) fn answer(data: &[u8]) {
    static KEYS: LazyLock<(Keyring, Recipient)> = LazyLock::new(|| {
        let keyring = Keyring::new(usize::MAX / 4);
        let config = keyring.generate(NOW + 3600).expect("the first key");
        (
            keyring,
            Recipient::from_config(&config.encoded).expect("our own configuration"),
        )
    });
    const PARTS: [&[u8]; 3] = [b"data: one\n\n", b"data: two\n\n", &[0x20; 600]];
    let (keyring, recipient) = &*KEYS;
    let (size, edits) = data.split_first().unwrap_or((&0, &[]));
    let (sent, pending) = recipient
        .encapsulate(&question())
        .expect("an honest request");
    let received = block_on(keyring.receive(pieces(&sent, 255), LIMIT, NOW));
    let responder = received.expect("an honest request").responder;
    let body = stream::iter(PARTS.map(|part| Ok::<_, Infallible>(Bytes::from_static(part))));
    let sealed = responder.respond(StatusCode::OK, &HeaderMap::new(), body);
    let sealed: Vec<_> = block_on(sealed.expect("an honest answer").collect());
    let honest: Vec<u8> = sealed
        .into_iter()
        .flat_map(|part| part.expect("no error"))
        .collect();
    let mut arrived = honest.clone();
    damage::apply(edits, &mut arrived);

    let mut opened = Vec::new();
    let outcome = block_on(async {
        let mut answer = pending.open(pieces(&arrived, *size)).await?;
        while let Some(piece) = answer.body.next().await {
            opened.extend_from_slice(&piece?);
        }
        Ok::<_, casemate_channel::ohttp::AnswerError>(())
    });
    assert!(
        PARTS.concat().starts_with(&opened),
        "something else was handed out"
    );
    assert_eq!(outcome.is_ok(), arrived == honest, "{outcome:?}");
    if outcome.is_ok() {
        assert_eq!(opened, PARTS.concat());
    }
}

pub(crate) fn answer_seeds() -> Vec<Vec<u8>> {
    damage::seeds_of_parts(3)
}

/// What is inside and around the encryption: requests, answers in any pieces, chunks in any pieces.
pub(crate) fn message(data: &[u8]) {
    let [which, size, bytes @ ..] = data else {
        return;
    };
    let size = usize::from(*size).max(1);
    match which % 3 {
        0 => {
            if let Ok(request) = decode_request(bytes) {
                let again = encode_request(&request).expect("what was accepted");
                let again = decode_request(&again).expect("what was written");
                assert_eq!(
                    (again.method(), again.uri()),
                    (request.method(), request.uri())
                );
                assert_eq!(
                    (again.headers(), again.body()),
                    (request.headers(), request.body())
                );
            }
        }
        1 => assert_eq!(
            decode_answer(bytes, bytes.len().max(1)),
            decode_answer(bytes, size)
        ),
        _ => {
            let read = |size: usize| {
                let mut reader = ChunkReader::new();
                let mut chunks = Vec::new();
                for piece in bytes.chunks(size) {
                    chunks.extend(reader.push(piece).ok()?);
                }
                Some((chunks, reader.finish().ok()?))
            };
            let whole = read(bytes.len().max(1));
            assert_eq!(whole, read(size));
            if let Some((chunks, last)) = whole {
                let mut again = Vec::new();
                chunks.iter().for_each(|chunk| put(chunk, &mut again));
                put_last(&last, &mut again);
                assert_eq!(again, bytes, "a second framing was accepted");
            }
        }
    }
}

/// The head of an answer once it is there, the body so far, and whether that is all.
type Decoded = (Option<(StatusCode, HeaderMap)>, Vec<u8>, bool);

/// An answer that arrives in pieces of `size`; nothing for one that is refused.
fn decode_answer(bytes: &[u8], size: usize) -> Option<Decoded> {
    let mut decoder = AnswerDecoder::new();
    let (mut head, mut body) = (None, Vec::new());
    for piece in bytes.chunks(size) {
        if head.is_some() {
            body.extend(decoder.body(piece).ok()?);
        } else if let Some((found, rest)) = decoder.head(piece).ok()? {
            head = Some((found.status, found.headers));
            body.extend(decoder.body(&rest).ok()?);
        }
    }
    Some((head, body, decoder.is_done()))
}

pub(crate) fn message_seeds() -> Vec<Vec<u8>> {
    let request = encode_request(&question()).expect("an honest request");
    let mut answer = vec![3, 0x40, 200];
    for text in ["content-type", "text/event-stream"] {
        answer.push(text.len() as u8);
        answer.extend_from_slice(text.as_bytes());
    }
    answer.extend_from_slice(b"\0\x05hello\x03you\0\0");
    let mut chunks = Vec::new();
    put(&[7; 40], &mut chunks);
    put(&[8; 17], &mut chunks);
    put_last(&[9; 16], &mut chunks);
    vec![
        [&[0, 1], &request[..]].concat(),
        [&[1, 3], &answer[..]].concat(),
        [&[2, 5], &chunks[..]].concat(),
    ]
}
