//! How the proxy itself says no: errors in the shape that OpenAI clients read, and a line in the log where nothing that
//! its client did is the reason.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::json;
use tracing::warn;

use crate::explain::TELLS_MORE;

/// The code of a service whose evidence was refused.
pub(super) const NOT_VERIFIED: &str = "service_not_verified";
/// The code of a service whose host does not pass on what is encrypted to the key that it attests.
pub(super) const KEY_REFUSED: &str = "key_refused";

/// A refusal by the proxy, not by the service.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
    /// Seconds after which asking again makes sense.
    pub(super) retry_after: Option<u32>,
}

impl Refusal {
    pub(super) fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
    ) -> Refusal {
        Refusal {
            status,
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    /// Because the service cannot be reached; `reason` begins with its URL and ends with the last cause.
    pub(super) fn unreachable(reason: &str) -> Refusal {
        Refusal::new(
            StatusCode::BAD_GATEWAY,
            "service_unreachable",
            format!("the service is unreachable: {reason}"),
        )
    }

    /// Because the service showed other evidence than is accepted.
    pub(super) fn not_verified(reason: &str) -> Refusal {
        Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            NOT_VERIFIED,
            format!("the service could not be verified again: {reason}"),
        )
    }

    /// The answer that says so, for which there will be no line in the log.
    pub(super) fn to_response(&self) -> Response {
        let kind = if self.status.is_client_error() {
            "invalid_request_error"
        } else {
            "proxy_error"
        };
        let message = match self.status.is_server_error() {
            true => &format!("{}{TELLS_MORE}", self.message),
            false => &self.message,
        };
        let body = json!({
            "error": { "message": message, "type": kind, "param": null, "code": self.code }
        });
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.to_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// For how long refusals with the same code are counted after one of them was told.
const QUIET: Duration = Duration::from_secs(10);

/// Tells refusals in the log: each code at once, and then no more often than every [`QUIET`], with the number of those that
/// were left out. There are as many codes as the program knows.
#[derive(Clone)]
pub(super) struct Log {
    told: Arc<Mutex<BTreeMap<&'static str, Told>>>,
    quiet: Duration,
}

impl Default for Log {
    fn default() -> Log {
        Log {
            told: Arc::default(),
            quiet: QUIET,
        }
    }
}

struct Told {
    at: Instant,
    untold: u64,
}

impl Log {
    /// A refusal, or the end of an answer, for `reason`. Returns whether there is a line about it, and how many others it
    /// stands for.
    pub(super) fn tell(&self, code: &'static str, reason: &str) -> Option<u64> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let untold = match told.get_mut(code) {
            Some(last) if last.at.elapsed() < self.quiet => {
                last.untold += 1;
                return None;
            }
            Some(last) => last.untold,
            None => 0,
        };
        let at = Instant::now();
        told.insert(code, Told { at, untold: 0 });
        match untold {
            0 => warn!(code, %reason, "a request failed"),
            more => warn!(code, %reason, more, "a request failed, and others before it"),
        }
        Some(untold)
    }
}

/// Tells those refusals that are not the client's own fault.
pub(super) async fn log(State(log): State<Log>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if let Some(refusal) = response.extensions_mut().remove::<Refusal>()
        && refusal.status.is_server_error()
    {
        let _ = log.tell(refusal.code, &refusal.message);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_told_at_once_and_then_counted() {
        let mut log = Log {
            quiet: Duration::from_secs(3600),
            ..Log::default()
        };
        assert_eq!(log.tell("service_unreachable", "refused"), Some(0));
        for _ in 0..3 {
            assert_eq!(log.tell("service_unreachable", "refused"), None);
        }
        assert_eq!(log.tell("answer_refused", "cut"), Some(0));
        log.quiet = Duration::ZERO;
        assert_eq!(log.tell("service_unreachable", "refused"), Some(3));
        assert_eq!(log.tell("service_unreachable", "refused"), Some(0));
    }
}
