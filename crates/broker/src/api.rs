//! The public HTTP interface: RCAR, issuance, and what operators watch. Decisions are [`crate::broker`]'s.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, COOKIE, RETRY_AFTER, SET_COOKIE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use casemate_container::one_line;
use casemate_release::issuance;
use casemate_release::rcar::{
    self, DenialInformation, ErrorInformation, ResourcePath, SESSION_COOKIE,
};
use tokio::sync::Semaphore;

use crate::broker::{Broker, Rejection};
use crate::sessions::SessionFault;

/// Longest time from the end of a request's head to the last byte of its body, by default.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for a worker.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(15);
/// Requests whose appraisal may run at once.
const WORKERS: usize = 8;

#[derive(Clone)]
struct Shared {
    broker: Arc<Broker>,
    workers: Arc<Semaphore>,
    body_timeout: Duration,
}

/// All public routes.
pub fn router(broker: Arc<Broker>) -> Router {
    router_with(broker, BODY_TIMEOUT)
}

/// All public routes, with another limit on how long a body may take.
pub fn router_with(broker: Arc<Broker>, body_timeout: Duration) -> Router {
    let workers = Arc::new(Semaphore::new(WORKERS));
    let shared = Shared {
        broker,
        workers,
        body_timeout,
    };
    Router::new()
        .route(rcar::AUTH_PATH, post(auth))
        .route(rcar::ATTEST_PATH, post(attest))
        .route("/kbs/v0/resource/{repository}/{kind}/{tag}", get(resource))
        .route(issuance::CHALLENGE_PATH, post(challenge))
        .route(issuance::CREDENTIAL_PATH, post(credential))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(async || Failure::simple(StatusCode::NOT_FOUND, "not_found", "no such endpoint"))
        .with_state(shared)
}

/// An error response in the protocol's shape.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    information: ErrorInformation,
}

impl Failure {
    fn simple(status: StatusCode, kind: &str, detail: &str) -> Self {
        let information = ErrorInformation {
            kind: kind.into(),
            detail: detail.into(),
            denial: None,
        };
        Self {
            status,
            information,
        }
    }
}

impl From<Rejection> for Failure {
    fn from(rejection: Rejection) -> Self {
        let (status, kind) = match &rejection {
            Rejection::Malformed(_)
            | Rejection::Keyset(_)
            | Rejection::Policy(_)
            | Rejection::Rollback(_)
            | Rejection::NoProvider
            | Rejection::OtherProvider { .. } => (StatusCode::BAD_REQUEST, "malformed"),
            Rejection::Session(SessionFault::Full) => {
                (StatusCode::SERVICE_UNAVAILABLE, "too_many_sessions")
            }
            Rejection::Session(SessionFault::NothingReleased) => {
                (StatusCode::FORBIDDEN, "nothing_released")
            }
            Rejection::Session(_) => (StatusCode::UNAUTHORIZED, "session"),
            Rejection::Evidence(_) => (StatusCode::UNAUTHORIZED, "evidence_denied"),
            Rejection::NotAllowed(_) => (StatusCode::FORBIDDEN, "not_allowed"),
            Rejection::NoResource(_) => (StatusCode::NOT_FOUND, "resource_not_found"),
            Rejection::NoPolicy => (StatusCode::SERVICE_UNAVAILABLE, "no_policy"),
            Rejection::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "storage"),
        };
        let denial = match &rejection {
            Rejection::Evidence(denial) | Rejection::NotAllowed(denial) => {
                Some(Box::new(DenialInformation::from(denial)))
            }
            _ => None,
        };
        let detail = match &rejection {
            Rejection::Store(error) => {
                let error = one_line(error);
                tracing::error!(%error, "the store failed; nothing was released");
                "the broker's storage failed; nothing was released".into()
            }
            other => other.to_string(),
        };
        Self {
            status,
            information: ErrorInformation {
                kind: kind.into(),
                detail,
                denial,
            },
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.information)).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(RETRY_AFTER, axum::http::HeaderValue::from_static("5"));
        }
        response
    }
}

async fn auth(State(shared): State<Shared>, body: Body) -> Result<Response, Failure> {
    let body = read(&shared, body, rcar::MAX_REQUEST_BYTES).await?;
    let (session, challenge) = work(&shared, move |broker| broker.auth(&body)).await?;
    let cookie = format!("{SESSION_COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict");
    Ok(([(SET_COOKIE, cookie), no_store()], axum::Json(challenge)).into_response())
}

async fn attest(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let session = session(&shared, &headers)?;
    let body = read(&shared, body, rcar::MAX_ATTESTATION_BYTES).await?;
    let response = work(&shared, move |broker| broker.attest(&session, &body)).await?;
    Ok(([no_store()], axum::Json(response)).into_response())
}

async fn resource(
    State(shared): State<Shared>,
    headers: HeaderMap,
    Path((repository, kind, tag)): Path<(String, String, String)>,
) -> Result<Response, Failure> {
    let session = session(&shared, &headers)?;
    let path: ResourcePath = format!("{repository}/{kind}/{tag}")
        .parse()
        .map_err(|error| {
            shared.broker.metrics().count_rejected();
            Failure::from(Rejection::Malformed(
                casemate_release::ReleaseError::Malformed(error),
            ))
        })?;
    let jwe = work(&shared, move |broker| broker.resource(&session, &path)).await?;
    Ok((
        [(CONTENT_TYPE, "application/json".into()), no_store()],
        jwe.to_json(),
    )
        .into_response())
}

async fn challenge(State(shared): State<Shared>, headers: HeaderMap) -> Result<Response, Failure> {
    let session = session(&shared, &headers)?;
    let challenge = work(&shared, move |broker| broker.challenge(&session)).await?;
    Ok(([no_store()], axum::Json(challenge)).into_response())
}

async fn credential(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let session = session(&shared, &headers)?;
    let body = read(&shared, body, issuance::MAX_REQUEST_BYTES).await?;
    let response = work(&shared, move |broker| broker.credential(&session, &body)).await?;
    Ok(([no_store()], axum::Json(response)).into_response())
}

async fn readyz(State(shared): State<Shared>) -> Result<Response, Failure> {
    let ready = work(&shared, |broker| {
        broker.head()?;
        broker.policy().ok_or(Rejection::NoPolicy)
    });
    ready.await?;
    Ok("ready\n".into_response())
}

async fn metrics(State(shared): State<Shared>) -> Result<Response, Failure> {
    let text = work(&shared, |broker| {
        Ok(broker
            .metrics()
            .render(broker.session_counts(), broker.head()?.size))
    });
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text.await?).into_response())
}

fn no_store() -> (axum::http::HeaderName, String) {
    (CACHE_CONTROL, "no-store".into())
}

fn session(shared: &Shared, headers: &HeaderMap) -> Result<String, Failure> {
    let mut found = None;
    for header in headers.get_all(COOKIE) {
        let session = header.to_str().ok().and_then(rcar::session_of_cookie);
        match (found, session) {
            // Two different sessions: refuse to choose.
            (Some(a), Some(b)) if a != b => {
                found = None;
                break;
            }
            (_, Some(session)) => found = Some(session),
            (_, None) => {}
        }
    }
    found.map(str::to_owned).ok_or_else(|| {
        shared.broker.metrics().count_rejected();
        Rejection::Session(SessionFault::Missing).into()
    })
}

async fn read(shared: &Shared, body: Body, limit: usize) -> Result<Bytes, Failure> {
    let failure = match tokio::time::timeout(shared.body_timeout, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => return Ok(bytes),
        Ok(Err(_)) => Failure::simple(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_large",
            &format!("the body was cut off or has more than {limit} bytes"),
        ),
        Err(_) => Failure::simple(
            StatusCode::REQUEST_TIMEOUT,
            "timeout",
            "the body came too slowly",
        ),
    };
    shared.broker.metrics().count_rejected();
    Err(failure)
}

/// Runs a decision on a thread that may block on disk and cryptography.
async fn work<T: Send + 'static>(
    shared: &Shared,
    decide: impl FnOnce(&Broker) -> Result<T, Rejection> + Send + 'static,
) -> Result<T, Failure> {
    let busy = || {
        Failure::simple(
            StatusCode::SERVICE_UNAVAILABLE,
            "busy",
            "the broker is overloaded",
        )
    };
    let permit = tokio::time::timeout(QUEUE_TIMEOUT, shared.workers.clone().acquire_owned())
        .await
        .map_err(|_| busy())?
        .map_err(|_| busy())?;
    let broker = shared.broker.clone();
    let outcome = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        decide(&broker)
    })
    .await;
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(rejection)) => {
            if !matches!(rejection, Rejection::Evidence(_) | Rejection::NotAllowed(_)) {
                shared.broker.metrics().count_rejected();
            }
            Err(rejection.into())
        }
        Err(_) => Err(Failure::simple(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the broker failed on this request; nothing was released",
        )),
    }
}
