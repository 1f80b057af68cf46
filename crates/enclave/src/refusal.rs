//! Why a request is refused before the API sees it, and how its sender is told: in clear outside the channel, where
//! nothing could be opened yet, or in the API's shape where TLS ends in here.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use casemate_channel::ohttp::{PROBLEM_MEDIA_TYPE, ReceiveError};

use crate::api::{ApiError, MAX_REQUEST_BYTES};
use crate::bodies::Full;

/// Whoever gets one counts it and tells the sender: the [gateway](crate::gateway::Gateway).
#[derive(Debug)]
pub enum Refusal {
    /// Not an encapsulated request.
    MediaType,
    /// Fields beside the encapsulation that have not their one form.
    Hint,
    /// Relayed to a replica that does not hold the keyset either.
    Misdirected,
    /// The keyset that was shown is not served any more.
    Ended,
    /// All places for requests that arrive are taken by others that hurry.
    NoPlace,
    /// Bodies hold as many bytes as they may.
    Full,
    /// It arrives too slowly, or its place is needed.
    TooSlow,
    /// What arrived is no request that can be opened.
    Unreadable(ReceiveError),
    /// As many requests as may be relayed, or wait for it, are; or the peer says so of itself.
    TooManyRelayed,
    /// A peer that it was relayed to refused it with this problem document.
    ByPeer(StatusCode, Vec<u8>),
    /// It was relayed, and nothing sensible came back.
    BadGateway(&'static str),
}

impl Refusal {
    /// Under a key that is not held: its sender verifies the service again, and encrypts to the key that it shows then.
    pub(crate) fn key_unknown() -> Refusal {
        Refusal::Unreadable(ReceiveError::UnknownKey(0))
    }

    /// The answer in clear.
    pub fn outside(self) -> Response<Body> {
        match self {
            Refusal::MediaType => plain(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "expected message/ohttp-chunked-req\n",
            ),
            Refusal::Hint => plain(
                StatusCode::BAD_REQUEST,
                "casemate-keyset is one keyset digest, casemate-relayed is 1\n",
            ),
            Refusal::Misdirected => plain(
                StatusCode::MISDIRECTED_REQUEST,
                "this replica does not hold the keyset\n",
            ),
            Refusal::Ended => ended(),
            Refusal::NoPlace => retry(plain(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many requests are arriving\n",
            )),
            Refusal::Full => retry(plain(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many bytes of requests are arriving\n",
            )),
            Refusal::TooSlow => plain(
                StatusCode::REQUEST_TIMEOUT,
                "the request did not arrive in time\n",
            ),
            Refusal::Unreadable(error) => error.to_response().map(Body::from),
            Refusal::TooManyRelayed => retry(plain(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many are relayed\n",
            )),
            Refusal::ByPeer(status, document) => problem(status, document),
            Refusal::BadGateway(text) => plain(StatusCode::BAD_GATEWAY, text),
        }
    }

    /// The answer on a connection that ends in here.
    pub fn inside(self) -> Response<Body> {
        let error = match self {
            Refusal::NoPlace | Refusal::Full => ApiError::overloaded(),
            Refusal::TooSlow => ApiError::timed_out(),
            Refusal::Unreadable(ReceiveError::TooLarge { .. }) => {
                ApiError::too_large(MAX_REQUEST_BYTES)
            }
            Refusal::Unreadable(_) => ApiError::incomplete(),
            // Has one form for both doors: a proxy connects again, and its client need not know.
            Refusal::Ended => return ended(),
            // Nothing is relayed from there, and nothing encapsulated.
            other => return other.outside(),
        };
        error.into_response()
    }
}

impl From<ReceiveError> for Refusal {
    fn from(error: ReceiveError) -> Refusal {
        match error {
            ReceiveError::Transport(cause) if cause.is::<Full>() => Refusal::Full,
            error => Refusal::Unreadable(error),
        }
    }
}

/// The connection ends with this answer: what is shown on the next one may hold.
fn ended() -> Response<Body> {
    let body = r#"{"type":"about:blank","title":"the credential has expired","status":503}"#;
    let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, body);
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

fn problem(status: StatusCode, document: impl Into<Body>) -> Response<Body> {
    let mut response = plain(status, document);
    let media_type = HeaderValue::from_static(PROBLEM_MEDIA_TYPE);
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, media_type);
    response
}

fn retry(mut response: Response<Body>) -> Response<Body> {
    let soon = HeaderValue::from_static("1");
    response.headers_mut().insert(header::RETRY_AFTER, soon);
    response
}

fn plain(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
}
