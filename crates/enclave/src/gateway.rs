//! The one door for prompts: opens encapsulated requests, calls the API, encrypts its answer as it is made.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody as _};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use casemate_channel::ohttp::{
    MessageFault, PROBLEM_MEDIA_TYPE, REQUEST_MEDIA_TYPE, ReceiveError, Responder,
};
use casemate_channel::receipt::RECEIPT_FIELD;

use crate::access::{self, Access};
use crate::api::ApiError;
use crate::arrival::Arrivals;
use crate::metrics::Metrics;
use crate::relay::{self, Hint, Peers};
use crate::serving::{Serving, Shown};
use crate::workers::Workers;

/// Largest encapsulated request, in bytes: the API's limit, padded to the next power of two, and room for framing.
pub const MAX_ENCAPSULATED: u64 = 2 * (crate::api::MAX_REQUEST_BYTES as u64) + (64 << 10);

/// Requests that may be arriving at the same time, each with its buffer.
pub const ARRIVING: usize = 64;

/// What the gateway needs.
#[derive(Clone)]
pub struct Gateway {
    /// Holds the private keys.
    pub serving: Arc<Serving>,
    /// Who may ask the API.
    pub access: Arc<Access>,
    /// The API behind the channel.
    pub api: Router,
    /// Where it runs.
    pub workers: Workers,
    /// Of the requests that are arriving.
    pub arrivals: Arc<Arrivals>,
    /// The other replicas of the service.
    pub peers: Arc<Peers>,
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
        let Some(hint) = Hint::of(request.headers()) else {
            self.metrics.refused();
            return plain(
                StatusCode::BAD_REQUEST,
                "casemate-keyset is one keyset digest, casemate-relayed is 1",
            );
        };
        if let Some(keyset) = hint.keyset
            && !self.serving.holds(&keyset, (self.clock)())
        {
            if hint.relayed {
                self.metrics.refused();
                return plain(
                    StatusCode::MISDIRECTED_REQUEST,
                    "this replica does not hold the keyset",
                );
            }
            let transport = request.into_body().into_data_stream();
            return self.peers.relay(&keyset, transport).await;
        }
        if !self.serving.serves((self.clock)()) {
            self.metrics.refused();
            return ended();
        }
        let Some(arriving) = self.arrivals.enter().await else {
            self.metrics.refused();
            return busy();
        };
        let transport = arriving.counted(request.into_body().into_data_stream());
        let keyring = &self.serving.keyring;
        let received = tokio::select! {
            received = keyring.receive(transport, MAX_ENCAPSULATED, (self.clock)()) => received,
            () = arriving.overdue() => {
                self.metrics.refused();
                return too_slow();
            }
        };
        drop(arriving);
        let received = match received {
            Ok(received) => received,
            Err(error) => {
                self.metrics.refused();
                return self.refuse(&error);
            }
        };
        if !self.serving.serves((self.clock)()) {
            self.metrics.refused();
            return ended();
        }
        self.metrics.accepted();
        // From here on everything is answered inside the channel, faults of the message included.
        let inner = match received.request {
            Ok(mut request) => {
                if let Some(signer) = self.serving.signer(received.key_id) {
                    request.extensions_mut().insert(signer);
                }
                self.call(request).await
            }
            Err(fault) => bad_message(&fault),
        };
        encrypt(received.responder, inner)
    }

    /// Answers a request that came over attested TLS: as if it had been decrypted, with the same limits. What the
    /// connection showed must still hold when the request is there.
    pub async fn handle_direct(self, request: Request<Body>, shown: &Shown) -> Response<Body> {
        if !shown.holds((self.clock)()) {
            self.metrics.refused();
            return ended();
        }
        let (parts, body) = request.into_parts();
        // What has no body takes nobody's place.
        let body = if body.is_end_stream() {
            Bytes::new()
        } else {
            let Some(arriving) = self.arrivals.enter().await else {
                return busy();
            };
            let body = Body::from_stream(arriving.counted(body.into_data_stream()));
            let arrived = tokio::select! {
                arrived = axum::body::to_bytes(body, crate::api::MAX_REQUEST_BYTES) => arrived,
                () = arriving.overdue() => return too_slow(),
            };
            match arrived {
                Ok(body) => body,
                Err(_) => {
                    return plain(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "the request is too large, or was cut off",
                    );
                }
            }
        };
        if !shown.holds((self.clock)()) {
            self.metrics.refused();
            return ended();
        }
        self.metrics.accepted();
        let mut request = Request::from_parts(parts, body);
        request.extensions_mut().insert(shown.signer());
        let (mut answer, body) = self.call(request).await.into_parts();
        answer.headers = answer_headers(&answer.headers);
        Response::from_parts(answer, body)
    }

    async fn call(&self, request: Request<Bytes>) -> Response<Body> {
        let request = request.map(Body::from);
        let (access, api) = (Arc::clone(&self.access), self.api.clone());
        let answered = self
            .workers
            .run(async move { access.handle(request, api).await });
        answered.await.unwrap_or_else(|| {
            ApiError::internal("the request could not be processed").into_response()
        })
    }

    fn refuse(&self, error: &ReceiveError) -> Response<Body> {
        error.to_response().map(Body::from)
    }
}

/// Encrypts an answer piece by piece. Errors of the API are answers and errors of a stream are events; should a body fail
/// nevertheless, the answer is cut off, so that nobody takes the part for the whole.
fn encrypt(responder: Responder, inner: Response<Body>) -> Response<Body> {
    let (parts, body) = inner.into_parts();
    let headers = answer_headers(&parts.headers);
    match responder.respond(parts.status, &headers, body.into_data_stream()) {
        Ok(encrypted) => relay::encapsulated(Body::from_stream(encrypted)),
        Err(_) => plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the answer cannot be encoded",
        ),
    }
}

/// The head of an answer is padded into frames; only what a client needs goes in.
fn answer_headers(headers: &HeaderMap) -> HeaderMap {
    [
        header::CONTENT_TYPE,
        header::CACHE_CONTROL,
        header::RETRY_AFTER,
        HeaderName::from_static(RECEIPT_FIELD),
    ]
    .into_iter()
    .chain(access::limit_fields())
    .filter_map(|name| headers.get(&name).map(|value| (name, value.clone())))
    .collect()
}

fn bad_message(fault: &MessageFault) -> Response<Body> {
    let body = serde_json::json!({"error": {
        "message": format!("the encrypted message is not a valid request: {fault}"),
        "type": "invalid_request_error", "param": null, "code": "invalid_message",
    }});
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn busy() -> Response<Body> {
    let mut busy = plain(
        StatusCode::SERVICE_UNAVAILABLE,
        "too many requests are arriving",
    );
    let soon = HeaderValue::from_static("1");
    busy.headers_mut().insert(header::RETRY_AFTER, soon);
    busy
}

fn too_slow() -> Response<Body> {
    plain(
        StatusCode::REQUEST_TIMEOUT,
        "the request did not arrive in time",
    )
}

/// The keyset that was shown is not served any more. The connection ends with this answer: what is shown on the next one
/// may hold.
fn ended() -> Response<Body> {
    let body = r#"{"type":"about:blank","title":"the credential has expired","status":503}"#;
    let mut response = plain(StatusCode::SERVICE_UNAVAILABLE, body);
    let fields = response.headers_mut();
    let problem = HeaderValue::from_static(PROBLEM_MEDIA_TYPE);
    fields.insert(header::CONTENT_TYPE, problem);
    fields.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use axum::extract::Extension;
    use casemate_channel::ohttp::{ANSWER_MEDIA_TYPE, AnswerError, Keyring, Recipient};
    use casemate_release::api_key::ApiKeys;
    use futures::{StreamExt, stream};
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::receipts::Signer;
    use crate::serving::tests::{add_signer_of_the_same_key_id, until};

    /// Sends an inner answer through the channel; returns its head's fields and its pieces.
    async fn through_the_channel(
        inner: Response<Body>,
    ) -> (StatusCode, HeaderMap, Vec<Result<Bytes, AnswerError>>) {
        let keyring = Keyring::default();
        let config = keyring.generate(10).unwrap().encoded;
        let recipient = Recipient::from_config(&config).unwrap();
        let request = Request::get("/v1/models").body(Bytes::new()).unwrap();
        let (sent, pending) = recipient.encapsulate(&request).unwrap();
        let transport = stream::iter([Ok::<_, axum::Error>(sent)]);
        let received = keyring.receive(transport, 1 << 16, 0).await.unwrap();
        let outer = encrypt(received.responder, inner);
        assert_eq!(outer.status(), StatusCode::OK);
        assert_eq!(outer.headers()[header::CONTENT_TYPE], ANSWER_MEDIA_TYPE);
        let answer = pending
            .open(outer.into_body().into_data_stream())
            .await
            .unwrap();
        (answer.status, answer.headers, answer.body.collect().await)
    }

    #[tokio::test]
    async fn status_and_needed_fields_travel_inside() {
        let inner = Response::builder()
            .status(StatusCode::TOO_MANY_REQUESTS)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::RETRY_AFTER, "3")
            .header("x-internal", "1")
            .body(Body::from("{}"))
            .unwrap();
        let (status, headers, pieces) = through_the_channel(inner).await;
        assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(headers[header::CONTENT_TYPE], "application/json");
        assert_eq!(headers[header::RETRY_AFTER], "3");
        assert_eq!(headers.len(), 2);
        let pieces: Vec<_> = pieces.into_iter().map(Result::unwrap).collect();
        assert_eq!(pieces.concat(), b"{}");
    }

    #[tokio::test]
    async fn an_inner_body_that_fails_does_not_look_whole() {
        let pieces = [
            Ok(Bytes::from("part")),
            Err(std::io::Error::other("broken")),
        ];
        let inner = Response::new(Body::from_stream(stream::iter(pieces)));
        let (_, _, pieces) = through_the_channel(inner).await;
        assert_eq!(pieces[0].as_ref().unwrap(), "part");
        assert!(pieces.last().unwrap().is_err());
    }

    #[tokio::test]
    async fn a_message_that_is_no_request_is_answered_in_the_api_s_shape() {
        let (status, _, pieces) = through_the_channel(bad_message(&MessageFault::Padding)).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        let json: serde_json::Value = serde_json::from_slice(pieces[0].as_ref().unwrap()).unwrap();
        assert_eq!(json["error"]["code"], "invalid_message");
    }

    /// Answers with the receipt key that would sign.
    async fn signing(Extension(signer): Extension<Arc<Signer>>) -> String {
        signer.verifying_key().unwrap().to_string()
    }

    #[tokio::test]
    async fn receipts_are_signed_under_the_keyset_that_the_connection_showed() {
        let gateway = gateway(|| 0);
        let (shown, _) = gateway.serving.tls(0).unwrap();
        add_signer_of_the_same_key_id(&gateway.serving);
        let request = Request::post("/v1/completions").body(Body::empty());
        let answer = gateway.handle_direct(request.unwrap(), &shown).await;
        let answer = axum::body::to_bytes(answer.into_body(), 100).await.unwrap();
        assert_eq!(answer, shown.signer().verifying_key().unwrap().to_string());
    }

    /// A gateway of an identity until 100, by the clock given.
    fn gateway(clock: fn() -> u64) -> Gateway {
        let metrics = Arc::new(Metrics::default());
        let limits = relay::Limits {
            bytes: 1,
            arrival: crate::arrival::ARRIVAL,
        };
        let keys = ApiKeys::new(Vec::new()).unwrap();
        Gateway {
            access: Arc::new(Access::new(
                &keys,
                access::monotonic(),
                Arc::clone(&metrics),
            )),
            api: Router::new().fallback(signing),
            workers: Workers::new(tokio::runtime::Handle::current()),
            arrivals: Arc::new(Arrivals::new(1)),
            peers: Arc::new(Peers::new(Vec::new(), limits, Arc::clone(&metrics)).unwrap()),
            metrics,
            clock,
            serving: Arc::new(until(100)),
        }
    }

    /// What a connection that showed that identity is answered.
    async fn answered_at(clock: fn() -> u64) -> Response<Body> {
        let gateway = gateway(clock);
        let (shown, _) = gateway.serving.tls(0).unwrap();
        let request = Request::post("/v1/completions").body(Body::empty());
        gateway.handle_direct(request.unwrap(), &shown).await
    }

    /// What an encrypted request is answered whose key is held for longer than the identity.
    async fn encrypted_at(clock: fn() -> u64) -> StatusCode {
        let gateway = gateway(clock);
        let config = gateway.serving.keyring.generate(1000).unwrap().encoded;
        let recipient = Recipient::from_config(&config).unwrap();
        let request = Request::get("/v1/models").body(Bytes::new()).unwrap();
        let (sent, _) = recipient.encapsulate(&request).unwrap();
        let request = Request::post("/").header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE);
        gateway
            .handle(request.body(Body::from(sent)).unwrap())
            .await
            .status()
    }

    #[tokio::test]
    async fn encrypted_requests_are_not_served_beyond_the_credential() {
        assert_eq!(encrypted_at(|| 99).await, StatusCode::OK);
        let refused = StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(encrypted_at(|| 100).await, refused);
        // The end comes while the request arrives.
        static LATE: AtomicU64 = AtomicU64::new(98);
        let late = || LATE.fetch_add(1, Ordering::Relaxed);
        assert_eq!(encrypted_at(late).await, refused);
    }

    #[tokio::test]
    async fn a_connection_is_not_served_beyond_what_it_showed() {
        assert_eq!(answered_at(|| 99).await.status(), StatusCode::OK);
        let answer = answered_at(|| 100).await;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.headers()[header::CONNECTION], "close");
        assert_eq!(answer.headers()[header::CONTENT_TYPE], PROBLEM_MEDIA_TYPE);
    }

    #[tokio::test]
    async fn a_request_that_arrives_past_the_end_is_not_served() {
        static LATE: AtomicU64 = AtomicU64::new(99);
        // The end comes while the request arrives.
        let answer = answered_at(|| LATE.fetch_add(1, Ordering::Relaxed)).await;
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
