//! The one door for prompts: opens encapsulated requests, calls the API, encrypts its answer as it is made.
//!
//! [`Gateway::handle`] is that door; [`Gateway::handle_direct`] the same for connections that end in here. Both let a body
//! arrive in the same way, refuse in the same way ([`Refusal`]), and hand on to the same threads. Whoever has no API key
//! of the grant is refused by the head of the request, without waiting for its body.

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody as _};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use casemate_channel::ohttp::{
    Arrived, MessageFault, REQUEST_MEDIA_TYPE, ReceiveError, Received, Responder, TransportError,
    padded_request_bytes,
};
use casemate_channel::receipt::RECEIPT_FIELD;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};

use crate::access::{self, Access};
use crate::api::{ApiError, MAX_REQUEST_BYTES};
use crate::arrival::Arrivals;
use crate::bodies::{Bodies, Room};
use crate::linger::Lingering;
use crate::metrics::{Denied, Metrics};
use crate::refusal::Refusal;
use crate::relay::{self, Hint, Peers};
use crate::serving::{Serving, Shown};
use crate::workers::Workers;

/// Largest encapsulated request, in bytes: the API's limit, padded to the next power of two, and room for framing.
pub const MAX_ENCAPSULATED: u64 = 2 * (MAX_REQUEST_BYTES as u64) + (64 << 10);

/// Requests that may be arriving at the same time, where the doors have connections enough. What they hold is counted by
/// [`Bodies`], and a place is little beside its connection, so there are as many as leave half of the smaller door's
/// connections to newcomers: somebody gives way only to who can connect and ask.
pub const ARRIVING: usize = 512;

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
    /// Bytes of those.
    pub arriving: Arc<Bodies>,
    /// Bytes of those that have arrived and are not parsed yet.
    pub waiting: Arc<Bodies>,
    /// Reads on for a moment when a request is refused that still comes.
    pub lingering: Lingering,
    /// The other replicas of the service.
    pub peers: Arc<Peers>,
    /// Counts requests by outcome.
    pub metrics: Arc<Metrics>,
    /// Seconds since the Unix epoch.
    pub clock: fn() -> u64,
}

/// A body's bytes, as they come.
type Transport = BoxStream<'static, Result<Bytes, TransportError>>;

impl Gateway {
    /// Answers one encapsulated request.
    pub async fn handle(self, request: Request<Body>) -> Response<Body> {
        let request = request.map(|body| self.lingering.over(body));
        let outcome = self.open(request).await;
        self.told(outcome, Refusal::outside)
    }

    /// Answers a request that came over attested TLS: as if it had been decrypted, with the same limits. What the
    /// connection showed must still hold when the request is there.
    pub async fn handle_direct(self, request: Request<Body>, shown: &Shown) -> Response<Body> {
        let request = request.map(|body| self.lingering.over(body));
        let outcome = self.take(request, shown).await;
        self.told(outcome, Refusal::inside)
    }

    /// The answer; a refusal is counted, and told in a door's way.
    fn told(
        &self,
        outcome: Result<Response<Body>, Refusal>,
        tell: fn(Refusal) -> Response<Body>,
    ) -> Response<Body> {
        outcome.unwrap_or_else(|refusal| {
            self.metrics.refused();
            tell(refusal)
        })
    }

    async fn open(&self, request: Request<Body>) -> Result<Response<Body>, Refusal> {
        let media_type = request.headers().get(header::CONTENT_TYPE);
        if media_type.is_none_or(|value| value != REQUEST_MEDIA_TYPE) {
            return Err(Refusal::MediaType);
        }
        let hint = Hint::of(request.headers()).ok_or(Refusal::Hint)?;
        if let Some(keyset) = hint.keyset
            && !self.serving.holds(&keyset, (self.clock)())
        {
            if hint.relayed {
                return Err(Refusal::Misdirected);
            }
            let transport = request.into_body().into_data_stream();
            return self.peers.relay(&keyset, transport).await;
        }
        let serves = || self.serving.serves((self.clock)());
        if !serves() {
            return Err(Refusal::Ended);
        }
        let (arrived, room) = self
            .arrive(request.into_body(), async |transport| {
                let (keyring, now) = (&self.serving.keyring, (self.clock)());
                let admit = |headers: &HeaderMap| self.access.refuse_strangers(headers);
                let arrived = keyring.receive_if(transport, MAX_ENCAPSULATED, now, admit);
                Ok(arrived.await?)
            })
            .await?;
        if !serves() {
            return Err(Refusal::Ended);
        }
        self.metrics.accepted();
        let answer = match arrived {
            Arrived::Whole(received) => return Ok(self.answer(*received, room).await),
            Arrived::NoRequest(received) => self.answer(*received, room).await,
            Arrived::Refused(error, responder) => {
                drop(room);
                encrypt(responder, error.into_response())
            }
        };
        Ok(last_answer(answer))
    }

    /// Everything is answered inside the channel from here on, faults of the message included. Of what was read to its end
    /// nobody can see there which it was.
    async fn answer(&self, received: Received, room: Arc<Room>) -> Response<Body> {
        let inner = match received.request {
            Ok(mut request) => {
                if let Some(signer) = self.serving.signer(received.key_id) {
                    request.extensions_mut().insert(signer);
                }
                self.call(request, room).await
            }
            Err(fault) => bad_message(&fault),
        };
        encrypt(received.responder, inner)
    }

    async fn take(&self, request: Request<Body>, shown: &Shown) -> Result<Response<Body>, Refusal> {
        let holds = || shown.holds((self.clock)());
        if !holds() {
            return Err(Refusal::Ended);
        }
        let (parts, body) = request.into_parts();
        // What has no body takes nobody's place.
        let (body, room) = match body.is_end_stream() {
            true => (Bytes::new(), Arc::new(self.arriving.room())),
            false => {
                if let Err(error) = self.access.refuse_strangers(&parts.headers) {
                    self.metrics.accepted();
                    return Ok(last_answer(error.into_response()));
                }
                self.arrive(body, whole).await?
            }
        };
        if !holds() {
            return Err(Refusal::Ended);
        }
        self.metrics.accepted();
        let mut request = Request::from_parts(parts, body);
        request.extensions_mut().insert(shown.signer());
        let (mut answer, body) = self.call(request, room).await.into_parts();
        answer.headers = answer_headers(&answer.headers);
        Ok(Response::from_parts(answer, body))
    }

    /// Lets a body arrive in one of the places, as `read` reads it, and counts its bytes as they come. What is returned
    /// with it holds room for as many bytes.
    async fn arrive<T, F: Future<Output = Result<T, Refusal>>>(
        &self,
        body: Body,
        read: impl FnOnce(Transport) -> F,
    ) -> Result<(T, Arc<Room>), Refusal> {
        let arriving = self.arrivals.enter().await.ok_or(Refusal::NoPlace)?;
        let room = Arc::new(self.arriving.room());
        let transport = body.into_data_stream().map_err(TransportError::from);
        let transport = arriving.kept(&room, transport);
        tokio::select! {
            read = read(transport.boxed()) => Ok((read?, room)),
            () = arriving.overdue() => Err(Refusal::TooSlow),
        }
    }

    /// Calls the API with a request that arrived in `room`. Any number of them may wait for the threads on which it is
    /// parsed, so its body needs room there, too, until nobody has it any more.
    async fn call(&self, request: Request<Bytes>, arrived: Arc<Room>) -> Response<Body> {
        let room = self.waiting.room();
        // By the size it is padded to, so that neither a refusal nor the metrics tell more of its length.
        let bytes = match request.body().len() {
            0 => 0,
            length => padded_request_bytes(length),
        };
        if room.grow(bytes).is_err() {
            self.metrics.denied(Denied::Room);
            return ApiError::overloaded().into_response();
        }
        drop(arrived);
        let request = request.map(|body| Body::from(room.keep(body)));
        let (access, api) = (Arc::clone(&self.access), self.api.clone());
        let answered = self
            .workers
            .run(async move { access.handle(request, api).await });
        answered.await.unwrap_or_else(|| {
            ApiError::internal("the request could not be processed").into_response()
        })
    }
}

/// The answer to a request that is not read to its end, so that its connection takes no other.
fn last_answer(mut answer: Response<Body>) -> Response<Body> {
    let close = HeaderValue::from_static("close");
    answer.headers_mut().insert(header::CONNECTION, close);
    answer
}

/// A body as the API takes it.
async fn whole(mut transport: Transport) -> Result<Bytes, Refusal> {
    let mut body = Vec::new();
    while let Some(piece) = transport.next().await {
        let piece = piece.map_err(ReceiveError::Transport)?;
        if body.len() + piece.len() > MAX_REQUEST_BYTES {
            let limit = MAX_REQUEST_BYTES as u64;
            return Err(ReceiveError::TooLarge { limit }.into());
        }
        body.extend_from_slice(&piece);
    }
    body.shrink_to_fit();
    Ok(body.into())
}

/// Encrypts an answer piece by piece. Errors of the API are answers and errors of a stream are events; should a body fail
/// nevertheless, the answer is cut off, so that nobody takes the part for the whole.
fn encrypt(responder: Responder, inner: Response<Body>) -> Response<Body> {
    let (parts, body) = inner.into_parts();
    let headers = answer_headers(&parts.headers);
    match responder.respond(parts.status, &headers, body.into_data_stream()) {
        Ok(encrypted) => relay::encapsulated(Body::from_stream(encrypted)),
        Err(_) => {
            let text = "the answer cannot be encoded\n";
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
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

#[cfg(test)]
mod tests;
