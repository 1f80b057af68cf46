//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use casemate_engine::SubmitError;
use serde::Serialize;

/// An error that a client sees. Never carries prompt or answer text.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    body: Body,
    retry_after: Option<u32>,
}

#[derive(Debug, Clone, Serialize)]
struct Body {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: &'a Body,
}

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        param: Option<&str>,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        let body = Body {
            message: message.into(),
            kind,
            param: param.map(str::to_owned),
            code,
        };
        Self {
            status,
            body,
            retry_after: None,
        }
    }

    fn invalid(param: Option<&str>, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            param,
            Some(code),
            message,
        )
    }

    /// A field of OpenAI's API that this service does not implement.
    pub(crate) fn unsupported(param: &str, why: &str) -> Self {
        Self::invalid(
            Some(param),
            "unsupported_parameter",
            format!("'{param}' {why}"),
        )
    }

    /// What the extraction policy of this service does not allow; `why` says what the policy does.
    pub(crate) fn policy(param: &str, why: &str) -> Self {
        Self::invalid(
            Some(param),
            "extraction_policy",
            format!("'{param}' is refused by this service's extraction policy: {why}"),
        )
    }

    /// A field that no version of the API knows.
    pub(crate) fn unknown(param: &str) -> Self {
        Self::invalid(
            Some(param),
            "unknown_parameter",
            format!("Unrecognized request argument supplied: {param}"),
        )
    }

    /// A value outside its range.
    pub(crate) fn value(param: &str, message: impl std::fmt::Display) -> Self {
        Self::invalid(
            Some(param),
            "invalid_value",
            format!("Invalid value for '{param}': {message}"),
        )
    }

    /// A required field that is absent.
    pub(crate) fn missing(param: &str) -> Self {
        Self::invalid(
            Some(param),
            "missing_required_parameter",
            format!("Missing required parameter: '{param}'"),
        )
    }

    /// A body that is not the expected JSON. The parser's message names line, column and field, not contents.
    pub(crate) fn malformed(message: impl std::fmt::Display) -> Self {
        Self::invalid(
            None,
            "invalid_json",
            format!("We could not parse the JSON body of your request: {message}"),
        )
    }

    pub(crate) fn model_not_found(requested: &str, served: &str) -> Self {
        // A model name is short; whatever is longer is cut rather than reflected.
        let requested: String = requested.chars().take(64).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("model"),
            Some("model_not_found"),
            format!("The model '{requested}' does not exist; this enclave serves '{served}'"),
        )
    }

    pub(crate) fn unknown_url() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            None,
            Some("unknown_url"),
            "Unknown request URL; see /v1/models, /v1/chat/completions and /v1/completions",
        )
    }

    pub(crate) fn receipt_not_found() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            None,
            Some("receipt_not_found"),
            "No receipt under this id for this API key; receipts are kept for an hour at most",
        )
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            None,
            Some("request_too_large"),
            format!("The request is larger than {limit} bytes"),
        )
    }

    /// A body that ended before its end.
    pub(crate) fn incomplete() -> Self {
        Self::invalid(
            None,
            "incomplete_request",
            "The request's body was cut off, or is not framed as HTTP asks",
        )
    }

    /// A body that came too slowly.
    pub(crate) fn timed_out() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            None,
            Some("request_timeout"),
            "The request did not arrive in time",
        )
    }

    /// More work, or more to remember, than there is room for.
    pub(crate) fn overloaded() -> Self {
        let mut busy = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            None,
            Some("overloaded"),
            "The service is busy or stopping; please retry",
        );
        busy.retry_after = Some(1);
        busy
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            None,
            Some("method_not_allowed"),
            "This URL does not accept that method",
        )
    }

    /// A text that is not even tokenized.
    pub(crate) fn far_too_long(bytes: usize, context: usize) -> Self {
        Self::invalid(
            Some("messages"),
            "context_length_exceeded",
            format!(
                "This model's maximum context length is {context} tokens. However, your prompt has {bytes} bytes. \
                 Please reduce its length."
            ),
        )
    }

    /// No API key of the grant.
    pub(crate) fn invalid_api_key(message: &str) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            None,
            Some("invalid_api_key"),
            message,
        )
    }

    /// A limit of the caller's key on `kind`, `requests` or `tokens`; without `retry_after` it will never be possible.
    pub(crate) fn rate_limited(
        kind: &'static str,
        message: String,
        retry_after: Option<u32>,
    ) -> Self {
        let mut limited = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            kind,
            None,
            Some("rate_limit_exceeded"),
            message,
        );
        limited.retry_after = retry_after;
        limited
    }

    /// A day's budget of the caller's key; without `retry_after` it will never be enough.
    pub(crate) fn quota_exceeded(message: String, retry_after: Option<u32>) -> Self {
        let mut exceeded = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "insufficient_quota",
            None,
            Some("insufficient_quota"),
            message,
        );
        exceeded.retry_after = retry_after;
        exceeded
    }

    pub(crate) fn internal(message: &str) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            None,
            None,
            message,
        )
    }

    /// The error object alone, for an event inside a stream that has begun.
    pub(crate) fn to_event_json(&self) -> String {
        serde_json::to_string(&Envelope { error: &self.body })
            .expect("an error body has only strings")
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::PromptTooLong { prompt, context } => Self::invalid(
                Some("messages"),
                "context_length_exceeded",
                format!(
                    "This model's maximum context length is {context} tokens. However, your prompt has \
                     {prompt} tokens. Please reduce its length."
                ),
            ),
            SubmitError::EmptyPrompt => {
                Self::invalid(Some("prompt"), "empty_prompt", "The prompt has no tokens")
            }
            SubmitError::Busy { .. } | SubmitError::Stopped => Self::overloaded(),
            other => Self::invalid(None, "invalid_request", other.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response =
            (self.status, axum::Json(Envelope { error: &self.body })).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
