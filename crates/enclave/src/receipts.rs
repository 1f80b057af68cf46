//! Receipts of answers: made while an answer passes, kept for a while in memory, handed out to who asked
//! (docs/receipts.md).
//!
//! [`wrap`] puts a middleware around the API, inside the encrypted channel. It hashes request and answer as they pass,
//! keeping no copy of either, and signs with the [`Signer`] of the keyset under which the request was opened: the door
//! through which a request comes puts that into its extensions. What an answer was made with, the API leaves in the
//! response's extensions ([`Served`]). Signed receipts rest in the [`Store`].

mod passing;
mod signer;
mod store;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use casemate_channel::receipt::{RECEIPT_FIELD, RequestHash, RequestId, Salt};

use crate::access::Caller;
use crate::api::{ApiError, MAX_REQUEST_BYTES, Served};
use passing::{Open, Passing};

#[cfg(test)]
pub(crate) use signer::tests::signer_until;
pub use signer::{KeysetFacts, Signed, Signer, Statement};
pub use store::{Limits, Store};

/// What the middleware and the handler share.
pub struct Receipts {
    store: Store,
    clock: fn() -> u64,
}

impl Receipts {
    /// No receipts yet; `clock` gives seconds since the Unix epoch.
    pub fn new(limits: Limits, clock: fn() -> u64) -> Receipts {
        Receipts {
            store: Store::new(limits),
            clock,
        }
    }

    /// Forgets what has been kept for its time; returns how many receipts are left.
    pub fn forget_old(&self) -> usize {
        self.store.forget((self.clock)())
    }
}

/// The API with receipts for its answers.
pub fn wrap(api: Router, receipts: Arc<Receipts>) -> Router {
    Router::new()
        .route("/v1/receipts/{id}", get(fetch))
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed().into_response() })
        .with_state(Arc::clone(&receipts))
        .merge(api.layer(from_fn_with_state(receipts, account)))
}

async fn fetch(
    State(receipts): State<Arc<Receipts>>,
    Path(id): Path<String>,
    caller: Option<Extension<Caller>>,
) -> Result<Response, ApiError> {
    // Unknown, forgotten, and somebody else's: nobody can tell which.
    let id: RequestId = id.parse().map_err(|_| ApiError::receipt_not_found())?;
    let Extension(caller) = caller.ok_or_else(ApiError::receipt_not_found)?;
    let json = receipts
        .store
        .find(&id, &caller, (receipts.clock)())
        .ok_or_else(ApiError::receipt_not_found)?;
    let fields = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((fields, json).into_response())
}

async fn account(
    State(receipts): State<Arc<Receipts>>,
    mut request: Request,
    next: Next,
) -> Response {
    let signer = request.extensions_mut().remove::<Arc<Signer>>();
    let owner = request.extensions().get::<Caller>().cloned();
    let (Some(signer), Some(owner), &Method::POST) = (signer, owner, request.method()) else {
        // Only what is posted has an answer with an id.
        return next.run(request).await;
    };
    let (parts, body) = request.into_parts();
    let Ok(body) = to_bytes(body, MAX_REQUEST_BYTES).await else {
        return ApiError::too_large(MAX_REQUEST_BYTES).into_response();
    };
    let target = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    let request_salt = Salt::random();
    let request_hash = RequestHash::of(&request_salt, parts.method.as_str(), target, &body);
    let request = Request::from_parts(parts, Body::from(body));

    let mut response = next.run(request).await;
    let Some(served) = response.extensions_mut().remove::<Served>() else {
        return response;
    };
    let field = HeaderValue::from_str(served.id.as_str()).expect("an id is visible ASCII");
    response.headers_mut().insert(RECEIPT_FIELD, field);
    let status: StatusCode = response.status();
    let open = Open::new(
        receipts,
        signer,
        owner,
        served,
        status,
        request_salt,
        request_hash,
    );
    response.map(|body| Body::from_stream(Passing::new(body, open)))
}
