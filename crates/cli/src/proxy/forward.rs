//! The proxy's HTTP server: takes requests of OpenAI clients, carries them to the verified service
//! and answers with what comes back, as it comes back.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use axum::Router;
use axum::body::{Body, HttpBody as _, to_bytes};
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use casemate_channel::ohttp::{
    ANSWER_MEDIA_TYPE, Answer, AnswerError, EncapsulateError, KEY_PROBLEM, PROBLEM_MEDIA_TYPE,
};
use casemate_channel::receipt::{InvalidRequestId, RequestId};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use serde::Deserialize;

use super::ready;
use super::receipts::{self, NoBundle, Saver};
use super::refusal::{self, KEY_REFUSED, Log, NOT_VERIFIED, Refusal};
use super::session::{Current, Session};
use crate::direct::{Direct, DirectBody};
use crate::service::{DirectError, NotVerified};

/// The largest request body that is carried; an enclave accepts no more either.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// The largest answer that is held back until it is whole.
const MAX_WHOLE: usize = 16 * 1024 * 1024;
/// Media type of answers that are passed on as they come.
const EVENT_STREAM: &str = "text/event-stream";
/// The largest refusal of a service's host that is read.
const MAX_PROBLEM: usize = 16 * 1024;
/// Most seconds that a client is told to wait because the service's host says so; OpenAI's clients heed up to a minute.
const LONGEST_WAIT: u32 = 60;

/// Fields of a request that the service needs. Everything else stays here: it would only tell more
/// about the user.
const REQUEST_FIELDS: [HeaderName; 3] =
    [header::AUTHORIZATION, header::CONTENT_TYPE, header::ACCEPT];
/// Fields of an answer that are about one connection, and so not passed on.
const CONNECTION_FIELDS: [HeaderName; 8] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    HeaderName::from_static("keep-alive"),
];

#[derive(Clone)]
struct Shared {
    session: Arc<Session>,
    saver: Option<Saver>,
    origin: String,
    log: Log,
}

/// The server's routes; `address` is where it listens, `saver` saves receipts if that is wanted.
pub(super) fn router(session: Arc<Session>, saver: Option<Saver>, address: SocketAddr) -> Router {
    let shared = Shared {
        session,
        saver,
        origin: format!("http://{address}"),
        log: Log::default(),
    };
    let log = shared.log.clone();
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route(
            "/readyz",
            get(async |State(shared): State<Shared>| ready::ready(&shared.session).await),
        )
        .route("/v1/attestation", get(attestation))
        .route("/v1/receipts/{id}", get(receipt))
        .route("/v1/{*path}", axum::routing::any(forward))
        .fallback(async || {
            let message = "this proxy serves the paths under /v1/, /livez and /readyz; clients are given its address with \
                           /v1 at its end";
            Refusal::new(StatusCode::NOT_FOUND, "not_found", message)
        })
        .method_not_allowed_fallback(async || method_not_allowed())
        .layer(middleware::from_fn_with_state(log, refusal::log))
        .layer(middleware::from_fn(say_that_it_closes))
        .with_state(shared)
}

/// The server closes a connection on which a request was answered before its body was read to the end. A client that is
/// not told would send its next request on it, and lose that.
async fn say_that_it_closes(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let ended = Arc::new(AtomicBool::new(body.is_end_stream()));
    let end = stream::poll_fn({
        let ended = Arc::clone(&ended);
        move |_| {
            ended.store(true, Ordering::Relaxed);
            Poll::Ready(None)
        }
    });
    let body = Body::from_stream(body.into_data_stream().chain(end));
    let mut response = next.run(Request::from_parts(parts, body)).await;
    if !ended.load(Ordering::Relaxed) {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

async fn attestation(State(shared): State<Shared>) -> Result<Response, Refusal> {
    let current = shared.session.use_service().await?;
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], current.verdict.clone()).into_response())
}

fn method_not_allowed() -> Refusal {
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "use GET or POST",
    )
}

async fn forward(State(shared): State<Shared>, request: Request) -> Result<Response, Refusal> {
    let inner = inner_request(request, &shared.origin).await?;
    if let Some(direct) = shared.session.service().direct() {
        return forward_direct(&shared, direct, inner).await;
    }
    let (current, answer) = carry(&shared.session, &inner).await?;
    let streams = has_media_type(&answer.headers, EVENT_STREAM);
    let mut response = match &shared.saver {
        Some(saver) => {
            let authorization = inner.headers().get(header::AUTHORIZATION);
            let Answer {
                status,
                headers,
                body,
            } = answer;
            let session = &shared.session;
            let body = saver.watch(session, Some(&current), authorization, &headers, body);
            to_response(
                status,
                headers,
                passed_on(body, streams, &shared.log).await?,
            )
        }
        None => to_response(
            answer.status,
            answer.headers,
            passed_on(answer.body, streams, &shared.log).await?,
        ),
    };
    remove_connection_fields(&mut response);
    Ok(response)
}

/// The same over attested TLS.
async fn forward_direct(
    shared: &Shared,
    direct: &Arc<Direct>,
    inner: http::Request<Bytes>,
) -> Result<Response, Refusal> {
    let authorization = inner.headers().get(header::AUTHORIZATION).cloned();
    let answer = send_direct(&shared.session, direct, inner).await?;
    let (parts, body) = answer.into_parts();
    let log = &shared.log;
    let body = match &shared.saver {
        Some(saver) => Body::from_stream(told(
            saver.watch(
                &shared.session,
                None,
                authorization.as_ref(),
                &parts.headers,
                body,
            ),
            log,
        )),
        None => Body::from_stream(told(body, log)),
    };
    let mut response = Response::from_parts(parts, body);
    remove_connection_fields(&mut response);
    Ok(response)
}

/// Sends a request on a verified connection, and remembers what was verified for it.
pub(super) async fn send_direct(
    session: &Session,
    direct: &Arc<Direct>,
    inner: http::Request<Bytes>,
) -> Result<http::Response<DirectBody>, Refusal> {
    // A service that can no longer be verified is not used, though connections to it may wait.
    session.use_service().await?;
    let sent = session.service().send_direct(direct, inner).await;
    let (answer, verification) = match sent {
        Ok(sent) => sent,
        Err(error @ DirectError::NotVerified(NotVerified::Denied(_))) => {
            let refusal = Refusal::from(error);
            session.presence().failed(refusal.clone());
            return Err(refusal);
        }
        Err(error) => {
            session.presence().doubt();
            return Err(error.into());
        }
    };
    session.presence().answered(session.service().now());
    if let Some(verification) = verification {
        session.remember(verification);
    }
    Ok(answer)
}

fn remove_connection_fields(response: &mut Response) {
    for name in CONNECTION_FIELDS {
        response.headers_mut().remove(name);
    }
}

/// A receipt, completed so that it can be verified offline.
async fn receipt(
    State(shared): State<Shared>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Refusal> {
    let inner = inner_request(request, &shared.origin).await?;
    let id: RequestId = id.parse().map_err(|error: InvalidRequestId| {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "receipt_not_found",
            error.to_string(),
        )
    })?;
    let inner = receipts::request_for(&id, inner.headers().get(header::AUTHORIZATION));
    let session = &shared.session;
    let completed = match session.service().direct() {
        Some(direct) => {
            let (parts, body) = send_direct(session, direct, inner).await?.into_parts();
            receipts::complete(session, None, &id, parts.status, parts.headers, body).await
        }
        None => {
            let (current, answer) = carry(session, &inner).await?;
            receipts::anywhere(session, &current, &id, &inner, answer).await
        }
    };
    match completed {
        Ok(bundle) => {
            let mut headers = HeaderMap::new();
            let json = HeaderValue::from_static("application/json");
            headers.insert(header::CONTENT_TYPE, json);
            let no_store = HeaderValue::from_static("no-store");
            headers.insert(header::CACHE_CONTROL, no_store);
            Ok(to_response(
                StatusCode::OK,
                headers,
                bundle.to_json().into(),
            ))
        }
        Err(NoBundle::Answer(status, headers, body)) => {
            let mut response = to_response(status, headers, body.into());
            remove_connection_fields(&mut response);
            Ok(response)
        }
        Err(NoBundle::Refusal(refusal)) => Err(refusal),
    }
}

fn to_response(status: StatusCode, headers: HeaderMap, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Sends a request to the verified service; returns the verification under which it was answered, and the answer.
///
/// A request is sent at most twice. The second time only where the first was refused by a host that says its service does
/// not hold the key, so before any byte of an answer, and only to another key that the service has attested since. The
/// refusal itself proves nothing: whoever carries messages can say so of a request that the service will answer, or has.
/// Both copies then go to keys that the user's policy accepts, and nobody else can read them; but the service may have
/// done the work twice.
pub(super) async fn carry(
    session: &Session,
    inner: &http::Request<Bytes>,
) -> Result<(Arc<Current>, Answer), Refusal> {
    let current = session.use_service().await?;
    match exchange(session, &current, inner).await {
        Err(Failure::KeyUnknown) => {
            let renewed = session.renew(&current).await.map_err(|error| Refusal {
                message: format!("the service changed its key and then failed: {error}"),
                ..Refusal::from(error)
            })?;
            if renewed.service.recipient() == current.service.recipient() {
                // That it verifies does not mean that it can be reached.
                session.presence().doubt();
                return Err(Failure::KeyUnknown.into());
            }
            let answer = exchange(session, &renewed, inner).await?;
            Ok((renewed, answer))
        }
        other => Ok((current, other?)),
    }
}

/// The body of an answer for the client. Nobody can use a part of what is no stream of events, so that is passed on when
/// its end is there, and one that is cut short becomes an error that a client understands. What is longer than any such
/// answer is passed on as it comes.
async fn passed_on(
    mut body: impl Stream<Item = Result<Bytes, AnswerError>> + Send + Unpin + 'static,
    streams: bool,
    log: &Log,
) -> Result<Body, Refusal> {
    let mut pieces = Vec::new();
    let mut length = 0;
    while !streams && length <= MAX_WHOLE {
        match body.next().await {
            Some(piece) => {
                let piece = piece.map_err(Failure::Answer)?;
                length += piece.len();
                pieces.push(Ok::<_, AnswerError>(piece));
            }
            None => {
                let bytes: Vec<Bytes> = pieces.into_iter().flatten().collect();
                return Ok(Body::from(bytes.concat()));
            }
        }
    }
    Ok(Body::from_stream(
        stream::iter(pieces).chain(told(body, log)),
    ))
}

/// The body of an answer of which the client has the head: the log alone can tell why it is cut short.
fn told<E: Display, S: Stream<Item = Result<Bytes, E>>>(
    body: S,
    log: &Log,
) -> impl Stream<Item = Result<Bytes, E>> + use<E, S> {
    let log = log.clone();
    body.inspect_err(move |error| {
        let _ = log.tell("answer_cut_off", &error.to_string());
    })
}

/// The request as the service will see it.
async fn inner_request(request: Request, origin: &str) -> Result<http::Request<Bytes>, Refusal> {
    let (parts, body) = request.into_parts();
    if !matches!(parts.method, Method::GET | Method::POST) {
        return Err(method_not_allowed());
    }
    // A page of some other site, open in the user's browser, must not speak in the user's name.
    let foreign = |value: &HeaderValue| value.as_bytes() != origin.as_bytes();
    if parts.headers.get(header::ORIGIN).is_some_and(foreign) {
        let message = "requests of web pages are not served";
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "foreign_origin",
            message,
        ));
    }
    let body = to_bytes(body, MAX_BODY).await.map_err(|error| {
        let limited = std::error::Error::source(&error)
            .is_some_and(|source| source.is::<http_body_util::LengthLimitError>());
        if limited {
            let message = format!("the request is larger than {MAX_BODY} bytes");
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
        } else {
            let message = "the request could not be read";
            Refusal::new(StatusCode::BAD_REQUEST, "unreadable_request", message)
        }
    })?;
    let mut inner = http::Request::new(body);
    *inner.method_mut() = parts.method;
    *inner.uri_mut() = parts.uri;
    *inner.headers_mut() = allowed_fields(&parts.headers);
    Ok(inner)
}

fn allowed_fields(headers: &HeaderMap) -> HeaderMap {
    let mut allowed = HeaderMap::new();
    for name in REQUEST_FIELDS {
        for value in headers.get_all(&name) {
            allowed.append(name.clone(), value.clone());
        }
    }
    allowed
}

/// Why there is no answer of the service.
pub(super) enum Failure {
    Encapsulate(EncapsulateError),
    Unreachable(String),
    /// The service's host says that the service does not hold the key.
    KeyUnknown,
    /// The service's host refused otherwise, and says how many seconds to wait.
    Host(StatusCode, Option<u32>),
    Answer(AnswerError),
}

/// Sends a request and receives the beginning of its answer, which nobody but the service can make; the session remembers
/// that it could, or that it has to ask.
pub(super) async fn exchange(
    session: &Session,
    current: &Current,
    inner: &http::Request<Bytes>,
) -> Result<Answer, Failure> {
    let answer = send(session, current, inner).await;
    match &answer {
        Ok(_) => session.presence().answered(session.service().now()),
        // The client's fault.
        Err(Failure::Encapsulate(_) | Failure::Host(StatusCode::PAYLOAD_TOO_LARGE, _)) => {}
        Err(_) => session.presence().doubt(),
    }
    answer
}

async fn send(
    session: &Session,
    current: &Current,
    inner: &http::Request<Bytes>,
) -> Result<Answer, Failure> {
    let recipient = current.service.recipient();
    let (encapsulated, pending) = recipient.encapsulate(inner).map_err(Failure::Encapsulate)?;
    let response = session
        .service()
        .send(encapsulated, current.service.keyset_digest())
        .await
        .map_err(Failure::Unreachable)?;
    let status = response.status();
    if !status.is_success() {
        return Err(refusal_of_host(response).await);
    }
    if !has_media_type(response.headers(), ANSWER_MEDIA_TYPE) {
        return Err(Failure::Answer(AnswerError::Malformed));
    }
    pending
        .open(response.bytes_stream())
        .await
        .map_err(Failure::Answer)
}

fn has_media_type(headers: &HeaderMap, expected: &str) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|v| v.as_bytes() == expected.as_bytes())
}

async fn refusal_of_host(mut response: reqwest::Response) -> Failure {
    #[derive(Deserialize)]
    struct Problem {
        r#type: String,
    }
    let refused = Failure::Host(response.status(), retry_after(response.headers()));
    if has_media_type(response.headers(), PROBLEM_MEDIA_TYPE) {
        let mut json = Vec::new();
        while let Ok(Some(bytes)) = response.chunk().await {
            json.extend_from_slice(&bytes);
            if json.len() > MAX_PROBLEM {
                return refused;
            }
        }
        if serde_json::from_slice(&json).is_ok_and(|problem: Problem| problem.r#type == KEY_PROBLEM)
        {
            return Failure::KeyUnknown;
        }
    }
    refused
}

/// Seconds to wait, as far as somebody who is not trusted may ask for them.
fn retry_after(headers: &HeaderMap) -> Option<u32> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?;
    let seconds: u32 = seconds.parse().ok()?;
    Some(seconds.min(LONGEST_WAIT))
}

impl From<NotVerified> for Refusal {
    fn from(error: NotVerified) -> Refusal {
        match error {
            NotVerified::Unreachable(reason) => Refusal::unreachable(&reason),
            NotVerified::Denied(denial) => Refusal::not_verified(&denial.to_string()),
        }
    }
}

impl From<DirectError> for Refusal {
    fn from(error: DirectError) -> Refusal {
        match error {
            DirectError::NotVerified(NotVerified::Denied(denial)) => Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                NOT_VERIFIED,
                format!("a new connection could not be verified: {denial}"),
            ),
            DirectError::NotVerified(error) => error.into(),
            DirectError::Failed(reason) => Refusal::unreachable(&reason),
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Refusal {
        let bad_gateway = StatusCode::BAD_GATEWAY;
        match failure {
            Failure::Encapsulate(EncapsulateError::Message(fault)) => {
                let message = format!("the request cannot be sent: {fault}");
                Refusal::new(StatusCode::BAD_REQUEST, "unsendable_request", message)
            }
            Failure::Encapsulate(EncapsulateError::Encryption) => Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "encryption_failed",
                "the request could not be encrypted",
            ),
            Failure::Unreachable(reason) => Refusal::unreachable(&reason),
            Failure::KeyUnknown => Refusal::new(
                bad_gateway,
                KEY_REFUSED,
                "the service's host refuses the key that the service has just attested",
            ),
            Failure::Host(StatusCode::PAYLOAD_TOO_LARGE, _) => Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "request_too_large",
                "the request is larger than the service accepts",
            ),
            Failure::Host(
                status @ (StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS),
                wait,
            ) => Refusal {
                retry_after: Some(wait.unwrap_or(1)),
                ..Refusal::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "service_busy",
                    format!("the service, or a gateway before it, has no room now: {status}"),
                )
            },
            Failure::Host(status, _) => {
                let message = format!("the service's host refused the request: {status}");
                Refusal::new(bad_gateway, "refused_by_host", message)
            }
            Failure::Answer(error) => {
                Refusal::new(bad_gateway, "answer_refused", error.to_string())
            }
        }
    }
}
