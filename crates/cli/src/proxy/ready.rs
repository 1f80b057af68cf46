//! `/readyz`: whether a request would be served now, and what was proven last.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use casemate_channel::ohttp::Answer;
use futures::{Stream, StreamExt as _};
use http::StatusCode;

use super::forward::{carry, send_direct};
use super::refusal::Refusal;
use super::session::Session;

/// What the service is asked. Which answer it gives, also to somebody without an API key, does not matter.
const QUESTION: &str = "/v1/models";
/// The longest answer to it that is read to its end.
const MAX_ANSWER: usize = 64 * 1024;

/// The answer to `/readyz`.
pub(super) async fn ready(session: &Arc<Session>) -> Response {
    let refused = match state_of(session).await {
        Ok(()) => return format!("ready\n{}\n", proven(session)).into_response(),
        Err(refused) => refused,
    };
    let message = format!("not ready: {}; {}", refused.message, proven(session));
    let refusal = Refusal {
        retry_after: Some(1),
        ..Refusal::new(StatusCode::SERVICE_UNAVAILABLE, refused.code, message)
    };
    refusal.to_response()
}

/// What was proven last, and when.
fn proven(session: &Session) -> String {
    let current = session.latest();
    format!(
        "{} was verified at {}, which holds until {}, and last answered at {}",
        session.service().url(),
        current.attestation.verified_at,
        current.service.valid_until(),
        session.presence().last_answer(),
    )
}

async fn state_of(session: &Arc<Session>) -> Result<(), Refusal> {
    if let Some(known) = known(session) {
        return known;
    }
    let session = Arc::clone(session);
    // A client that does not wait for the answer leaves it to the next.
    let asking = tokio::spawn(async move {
        let presence = session.presence();
        let _one_at_a_time = presence.asking.lock().await;
        if let Some(known) = known(&session) {
            return known;
        }
        let patience = presence.pace.patience;
        let asked = tokio::time::timeout(patience, ask(&session));
        let asked = asked.await.unwrap_or_else(|_| {
            let reason = format!("{}: no answer in {patience:?}", session.service().url());
            Err(Refusal::unreachable(&reason))
        });
        presence.asked(asked)
    });
    asking
        .await
        .unwrap_or_else(|_| Err(Refusal::unreachable("asking it failed")))
}

/// What can be said without asking the service.
fn known(session: &Session) -> Option<Result<(), Refusal>> {
    match session.presence().known() {
        // Whether it can be verified again is the question.
        Some(Ok(())) if session.valid().is_none() => None,
        known => known,
    }
}

/// Asks the service. That it answered is remembered where its answer is received.
async fn ask(session: &Session) -> Result<(), Refusal> {
    if session.presence().unverified() {
        let outdated = session.latest();
        session.renew(&outdated).await?;
    }
    let mut question = http::Request::new(Bytes::new());
    *question.uri_mut() = http::Uri::from_static(QUESTION);
    match session.service().direct() {
        Some(direct) => {
            let answer = send_direct(session, direct, question).await?;
            read(answer.into_body()).await;
        }
        None => {
            let (_, Answer { body, .. }) = carry(session, &question).await?;
            read(body).await;
        }
    }
    Ok(())
}

/// Reads an answer to its end, so that its connection can be used again. Its beginning has proven enough.
async fn read<E>(mut body: impl Stream<Item = Result<Bytes, E>> + Unpin) {
    let mut length = 0;
    while let Some(Ok(piece)) = body.next().await {
        length += piece.len();
        if length > MAX_ANSWER {
            return;
        }
    }
}
