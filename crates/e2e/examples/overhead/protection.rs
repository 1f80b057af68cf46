//! The CPU time of the enclave's protection code alone: opening one encapsulated request and encrypting one answer of
//! given pieces, by a thread that does nothing else.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::http::{HeaderMap, Request, StatusCode};
use bytes::Bytes;
use casemate_channel::ohttp::{Keyring, Recipient};
use futures::{StreamExt, stream};
use rustix::time::{ClockId, clock_gettime};

const ROUNDS: u32 = 200;

/// CPU time per request.
pub(crate) async fn cost(request: &[u8], pieces: &[Bytes]) -> Result<Duration> {
    let keyring = Keyring::default();
    let config = keyring.generate(u64::MAX).context("a free key id")?.encoded;
    let recipient = Recipient::from_config(&config)?;
    let mut total = Duration::ZERO;
    for _ in 0..ROUNDS {
        let request = Request::post("/v1/chat/completions")
            .header("content-type", "application/json")
            .body(Bytes::copy_from_slice(request))?;
        let (sent, _) = recipient.encapsulate(&request)?;
        let transport = stream::iter([Ok::<_, std::io::Error>(sent)]);
        let pieces = stream::iter(pieces.to_vec()).map(Ok::<_, std::io::Error>);

        let started = clock_gettime(ClockId::ThreadCPUTime);
        let received = keyring.receive(transport, 1 << 20, 0).await?;
        received.request.context("the request is valid")?;
        let mut answer = Box::pin(received.responder.respond(
            StatusCode::OK,
            &HeaderMap::new(),
            pieces,
        )?);
        while let Some(frame) = answer.next().await {
            frame?;
        }
        let ended = clock_gettime(ClockId::ThreadCPUTime);
        total += Duration::try_from(ended)? - Duration::try_from(started)?;
    }
    Ok(total / ROUNDS)
}
