//! Our halves against the library `ohttp`, in both directions, and the recorded exchange of
//! docs/channel.md read by both.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use ::ohttp as library;
use bytes::Bytes;
use futures::executor::block_on;
use futures::{AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt, stream};

use super::suite::{ANSWER_NONCE_BYTES, REQUEST_HEAD_BYTES, RequestOpener};
use super::*;

const BODY: &[u8] = br#"{"model":"smollm2","messages":[{"role":"user","content":"Hello"}]}"#;
const EVENTS: [&[u8]; 2] = [b"data: {\"one\":1}\n\n", b"data: [DONE]\n\n"];

fn request(body: impl Into<Bytes>) -> http::Request<Bytes> {
    http::Request::post("/v1/chat/completions")
        .header("content-type", "application/json")
        .body(body.into())
        .unwrap()
}

/// A writer into memory whose other end stays reachable.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl AsyncWrite for Sink {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn whole(
    bytes: &[u8],
) -> impl futures::Stream<Item = Result<Bytes, Infallible>> + Send + Unpin + use<> {
    stream::iter([Ok(Bytes::copy_from_slice(bytes))])
}

fn respond(responder: Responder) -> Vec<u8> {
    let mut headers = http::HeaderMap::new();
    headers.insert(
        "content-type",
        http::HeaderValue::from_static("text/event-stream"),
    );
    let body = stream::iter(EVENTS.map(|e| Ok::<_, Infallible>(Bytes::from_static(e))));
    let answer = responder
        .respond(http::StatusCode::OK, &headers, body)
        .unwrap();
    block_on(answer.map(Result::unwrap).collect::<Vec<_>>()).concat()
}

fn library_config(seed: &[u8; 32]) -> library::KeyConfig {
    use library::hpke::{Aead, Kdf, Kem};
    let suite = library::SymmetricSuite::new(Kdf::HkdfSha256, Aead::Aes128Gcm);
    library::KeyConfig::derive(0, Kem::XWing, vec![suite], seed).unwrap()
}

/// Frames to binary HTTP, written apart from `frames` and `message`.
fn check_answer_frames(plaintext: &[u8]) {
    assert_eq!(plaintext.len(), 8 * 512);
    let mut data = Vec::new();
    for frame in plaintext.chunks(512) {
        let length = usize::from(frame[0]) << 8 | usize::from(frame[1]);
        data.extend_from_slice(&frame[2..2 + length]);
        assert!(frame[2 + length..].iter().all(|&b| b == 0));
    }
    let answer = bhttp::Message::read_bhttp(&mut io::Cursor::new(&data[..])).unwrap();
    assert_eq!(answer.control().status().unwrap().code(), 200);
    assert_eq!(
        answer.header().get(b"content-type"),
        Some(&b"text/event-stream"[..])
    );
    assert_eq!(answer.content(), EVENTS.concat());
}

#[test]
fn the_library_as_user_is_served() {
    let keyring = Keyring::default();
    let config = keyring.generate(10).unwrap().encoded;
    let body = vec![7; 20_000];
    let padded = message::encode_request(&request(body.clone())).unwrap();
    assert_eq!(padded.len(), 1 << 15);

    let sink = Sink::default();
    let client = library::ClientRequest::from_encoded_config(&config).unwrap();
    let mut writer = client.encapsulate_stream(sink.clone()).unwrap();
    block_on(async {
        writer.write_all(&padded).await.unwrap();
        writer.close().await.unwrap();
    });
    let received = block_on(keyring.receive(whole(&sink.take()), 1 << 16, 0)).unwrap();
    assert_eq!(received.request.unwrap().body(), &body);

    let answer = respond(received.responder);
    let mut reader = writer.response(&answer[..]).unwrap();
    let mut plaintext = Vec::new();
    block_on(reader.read_to_end(&mut plaintext)).unwrap();
    check_answer_frames(&plaintext);
}

#[test]
fn the_library_as_service_is_understood() {
    let config = library_config(&[1; 32]);
    let recipient = Recipient::from_config(&config.encode().unwrap()).unwrap();
    let body = vec![7; 20_000];
    let (sent, pending) = recipient.encapsulate(&request(body.clone())).unwrap();

    let mut reader = library::Server::new(config)
        .unwrap()
        .decapsulate_stream(&sent[..]);
    let mut plaintext = Vec::new();
    block_on(reader.read_to_end(&mut plaintext)).unwrap();
    assert_eq!(message::decode_request(&plaintext).unwrap().body(), &body);

    let mut data =
        message::encode_answer_head(http::StatusCode::ACCEPTED, &Default::default()).unwrap();
    message::encode_answer_piece(b"answer", &mut data);
    data.extend(message::ANSWER_END);
    let sink = Sink::default();
    let mut writer = reader.response(sink.clone()).unwrap();
    block_on(async {
        writer.write_all(&frames::build(&data)).await.unwrap();
        for _ in 1..8 {
            writer.write_all(&frames::build(&[])).await.unwrap();
        }
        writer.close().await.unwrap();
    });
    let (status, body) = block_on(async {
        let answer = pending.open(whole(&sink.take())).await.unwrap();
        let body: Vec<_> = answer.body.map(Result::unwrap).collect().await;
        (answer.status, body.concat())
    });
    assert_eq!(
        (status, &body[..]),
        (http::StatusCode::ACCEPTED, &b"answer"[..])
    );
}

struct Vector {
    seed: [u8; 32],
    key_config: Vec<u8>,
    request: Vec<u8>,
    answer: Vec<u8>,
}

fn vector() -> Vector {
    let text = include_str!("../../../../docs/vectors/channel.txt");
    let field = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        hex::decode(line.trim()).unwrap()
    };
    Vector {
        seed: field("seed:").try_into().unwrap(),
        key_config: field("key_config:"),
        request: field("request:"),
        answer: field("answer:"),
    }
}

/// Prints the new recording where `CASEMATE_PRINT_VECTORS` is set, for when the format changes.
#[test]
fn an_exchange_of_today_has_the_shape_of_the_recorded_one() {
    let vector = vector();
    let keyring = Keyring::default();
    let config = keyring.derive(10, &vector.seed);
    let recipient = Recipient::from_config(&config.encoded).unwrap();
    let (sent, _) = recipient.encapsulate(&request(BODY)).unwrap();
    let received = block_on(keyring.receive(whole(&sent), 1 << 16, 0)).unwrap();
    let answer = respond(received.responder);
    if std::env::var_os("CASEMATE_PRINT_VECTORS").is_some() {
        println!("seed: {}", hex::encode(vector.seed));
        println!("key_config: {}", hex::encode(&config.encoded));
        println!("request: {}", hex::encode(&sent));
        println!("answer: {}", hex::encode(&answer));
    }
    assert_eq!(config.encoded, vector.key_config);
    assert_eq!(sent.len(), vector.request.len());
    assert_eq!(sent[..7], vector.request[..7]);
    assert_ne!(
        sent[7..],
        vector.request[7..],
        "every request has its own secret"
    );
    assert_eq!(answer.len(), vector.answer.len());
    assert_ne!(
        answer[..16],
        vector.answer[..16],
        "every answer has its own nonce"
    );
}

#[test]
fn the_recorded_request_is_read_by_both() {
    let vector = vector();
    let keyring = Keyring::default();
    assert_eq!(keyring.derive(10, &vector.seed).encoded, vector.key_config);
    let received = block_on(keyring.receive(whole(&vector.request), 1 << 16, 0)).unwrap();
    let ours = received.request.unwrap();
    assert_eq!(ours.method(), "POST");
    assert_eq!(ours.uri(), "/v1/chat/completions");
    assert_eq!(ours.headers()["content-type"], "application/json");
    assert_eq!(ours.body(), BODY);

    let server = library::Server::new(library_config(&vector.seed)).unwrap();
    assert_eq!(server.config().encode().unwrap(), vector.key_config);
    let mut reader = server.decapsulate_stream(&vector.request[..]);
    let mut plaintext = Vec::new();
    block_on(reader.read_to_end(&mut plaintext)).unwrap();
    assert_eq!(plaintext.len(), 1024);
    let theirs = bhttp::Message::read_bhttp(&mut io::Cursor::new(&plaintext[..])).unwrap();
    assert_eq!(theirs.control().method(), Some(&b"POST"[..]));
    assert_eq!(theirs.control().path(), Some(&b"/v1/chat/completions"[..]));
    assert_eq!(theirs.content(), BODY);
}

#[test]
fn the_recorded_answer_is_read_with_the_recorded_key() {
    let vector = vector();
    let (private, _) = suite::PrivateKey::derive(&vector.seed);
    let head = vector.request.first_chunk::<REQUEST_HEAD_BYTES>().unwrap();
    let secret = RequestOpener::new(head, &private)
        .unwrap()
        .answer_secret()
        .unwrap();
    let nonce = vector.answer.first_chunk::<ANSWER_NONCE_BYTES>().unwrap();
    let mut cipher = secret.cipher(&head[7..], nonce).unwrap();
    let mut reader = chunks::ChunkReader::new();
    let mut plaintext = Vec::new();
    for mut chunk in reader.push(&vector.answer[ANSWER_NONCE_BYTES..]).unwrap() {
        cipher.open(&mut chunk, false).unwrap();
        plaintext.extend(chunk);
    }
    let mut last = reader.finish().unwrap();
    cipher.open(&mut last, true).unwrap();
    assert!(last.is_empty());
    check_answer_frames(&plaintext);
}
