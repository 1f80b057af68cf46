//! The one door for prompts: opens encapsulated requests, calls the API, encrypts its answer as it is made.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use casemate_channel::ohttp::{ANSWER_MEDIA_TYPE, MessageFault, REQUEST_MEDIA_TYPE, ReceiveError};
use futures::{Stream, StreamExt, stream};
use tower::ServiceExt;

use crate::metrics::Metrics;
use crate::serving::Serving;

/// Largest encapsulated request, in bytes: the API's limit, padded to the next power of two, and room for framing.
const MAX_ENCAPSULATED: u64 = 2 * (crate::api::MAX_REQUEST_BYTES as u64) + (64 << 10);

/// What the gateway needs.
#[derive(Clone)]
pub struct Gateway {
    /// Holds the private keys.
    pub serving: Arc<Serving>,
    /// The API behind the channel.
    pub api: Router,
    /// Counts requests by outcome.
    pub metrics: Arc<Metrics>,
    /// Seconds since the Unix epoch.
    pub clock: fn() -> u64,
}

impl Gateway {
    /// Answers one encapsulated request.
    pub async fn handle(self, request: Request<Body>) -> Response<Body> {
        let media_type = request.headers().get(header::CONTENT_TYPE);
        if media_type.is_none_or(|value| value != REQUEST_MEDIA_TYPE) {
            self.metrics.refused();
            return plain(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "expected message/ohttp-chunked-req",
            );
        }
        let transport = request.into_body().into_data_stream();
        let keyring = &self.serving.keyring;
        let received = keyring
            .receive(transport, MAX_ENCAPSULATED, (self.clock)())
            .await;
        let received = match received {
            Ok(received) => received,
            Err(error) => {
                self.metrics.refused();
                return self.refuse(&error);
            }
        };
        self.metrics.accepted();
        // From here on everything is answered inside the channel, faults of the message included.
        let inner = match received.request {
            Ok(request) => self.call(request).await,
            Err(fault) => bad_message(&fault),
        };
        let (parts, body) = inner.into_parts();
        let headers = answer_headers(&parts.headers);
        let body = data_stream(body);
        match received.responder.respond(parts.status, &headers, body) {
            Ok(encrypted) => Response::builder()
                .header(header::CONTENT_TYPE, ANSWER_MEDIA_TYPE)
                .header(header::CACHE_CONTROL, "no-store")
                // Asks proxies in between to pass each piece on at once.
                .header("x-accel-buffering", "no")
                .body(Body::from_stream(encrypted))
                .expect("constant headers are valid"),
            Err(_) => plain(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the answer cannot be encoded",
            ),
        }
    }

    async fn call(&self, request: Request<Bytes>) -> Response<Body> {
        let request = request.map(Body::from);
        match self.api.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    fn refuse(&self, error: &ReceiveError) -> Response<Body> {
        error.to_response().map(Body::from)
    }
}

/// The head of an answer is padded into frames; only what a client needs goes in.
fn answer_headers(headers: &HeaderMap) -> HeaderMap {
    [
        header::CONTENT_TYPE,
        header::CACHE_CONTROL,
        header::RETRY_AFTER,
    ]
    .into_iter()
    .filter_map(|name| headers.get(&name).map(|value| (name, value.clone())))
    .collect()
}

/// The answer's pieces. An inner body cannot fail: errors of the API are answers, errors of a stream are events.
fn data_stream(body: Body) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    body.into_data_stream()
        .filter_map(|piece| async move { piece.ok().map(Ok) })
}

fn bad_message(fault: &MessageFault) -> Response<Body> {
    let body = serde_json::json!({"error": {
        "message": format!("the encrypted message is not a valid request: {fault}"),
        "type": "invalid_request_error", "param": null, "code": "invalid_message",
    }});
    let mut response = Response::new(Body::from_stream(stream::iter([Ok::<_, Infallible>(
        Bytes::from(body.to_string()),
    )])));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response
}
