//! The CPU time of the enclave's protection code alone: opening one encapsulated request, encrypting one answer of given
//! pieces, and its receipt, by a thread that does nothing else.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::http::{HeaderMap, Request, StatusCode};
use bytes::Bytes;
use casemate_channel::ohttp::{Keyring, Recipient};
use casemate_channel::receipt::{AnswerHash, AnswerHasher, Receipt, RequestHash, Salt};
use casemate_container::signing::SigningKey;
use casemate_testkit::statements;
use futures::{StreamExt, stream};
use rustix::time::{ClockId, clock_gettime};

const ROUNDS: u32 = 200;
/// Some time; receipts carry one.
const NOW: u64 = 1_790_000_000;

/// CPU time per request.
pub(super) async fn cost(request: &[u8], pieces: &[Bytes]) -> Result<Duration> {
    let keyring = Keyring::default();
    let config = keyring.generate(u64::MAX).context("a free key id")?.encoded;
    let recipient = Recipient::from_config(&config)?;
    let key = SigningKey::generate();
    let keyset = statements::keyset(vec![0; 1300], NOW);
    let nothing = (RequestHash([0; 32]), AnswerHash([0; 32]));
    let honest = statements::receipt(&keyset, nothing.0, nothing.1, NOW);
    let mut total = Duration::ZERO;
    for round in 0..ROUNDS {
        let body = request;
        let request = Request::post("/v1/chat/completions")
            .header("content-type", "application/json")
            .body(Bytes::copy_from_slice(body))?;
        let (sent, _) = recipient.encapsulate(&request)?;
        let transport = stream::iter([Ok::<_, std::io::Error>(sent)]);
        let streamed = stream::iter(pieces.to_vec()).map(Ok::<_, std::io::Error>);

        let started = clock_gettime(ClockId::ThreadCPUTime);
        let received = keyring.receive(transport, 1 << 20, 0).await?;
        received.request.context("the request is valid")?;
        let mut answer = Box::pin(received.responder.respond(
            StatusCode::OK,
            &HeaderMap::new(),
            streamed,
        )?);
        while let Some(frame) = answer.next().await {
            frame?;
        }
        let (request_salt, answer_salt) = (Salt::random(), Salt::random());
        let request_hash = RequestHash::of(&request_salt, "POST", "/v1/chat/completions", body);
        let mut hasher = AnswerHasher::new(&answer_salt);
        for piece in pieces {
            hasher.update(piece);
        }
        let receipt = Receipt {
            counter: u64::from(round) + 1,
            request_hash,
            answer_hash: hasher.finish(),
            ..honest.clone()
        };
        std::hint::black_box(
            receipt
                .sign(&key)
                .context("a receipt that keeps the rules")?,
        );
        let ended = clock_gettime(ClockId::ThreadCPUTime);
        total += Duration::try_from(ended)? - Duration::try_from(started)?;
    }
    Ok(total / ROUNDS)
}
