//! How the proxy itself says no: errors in the shape that OpenAI clients read.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::json;

/// A refusal by the proxy, not by the service.
#[derive(Debug)]
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
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let kind = if self.status.is_client_error() {
            "invalid_request_error"
        } else {
            "proxy_error"
        };
        let message = match self.status.is_server_error() {
            true => format!(
                "{}; `casemate explain` reads this answer and tells more",
                self.message
            ),
            false => self.message,
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
