//! The routes anybody may call: evidence, the encrypted gateway, health and metrics. Prompts are never accepted here in
//! clear.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use casemate_channel::keyset::ChannelBinding;
use casemate_channel::ohttp::{GATEWAY_PATH, KEYSETS_PATH};
use casemate_container::one_line;

use crate::api::Api;
use crate::gateway::Gateway;
use crate::metrics::Metrics;
use crate::receipts::Receipts;
use crate::relay::KeysetList;
use crate::serving::{Serving, ServingError, Shown};

/// The enclave as its routes see it; what is loaded later is empty until then.
pub struct Shared {
    /// Set once model, keyset and credential are there.
    pub ready: OnceLock<Ready>,
    /// Set when the program was asked to end: nobody should send it anything new.
    pub stopping: AtomicBool,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Seconds since the Unix epoch.
    pub clock: fn() -> u64,
}

/// What exists once the enclave can serve.
pub struct Ready {
    /// The identity shown to users.
    pub serving: Arc<Serving>,
    /// Opens requests.
    pub gateway: Gateway,
    /// The API, for its engine's figures.
    pub api: Api,
    /// Receipts of its answers.
    pub receipts: Arc<Receipts>,
}

/// The outer routes.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/attestation", get(attestation))
        .route(KEYSETS_PATH, get(keysets))
        .route(GATEWAY_PATH, post(gateway))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/healthz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(fallback)
        .with_state(shared)
}

async fn fallback(request: Request<Body>) -> Response<Body> {
    if request.uri().path().starts_with("/v1/") {
        let text = "prompts are accepted only through the encrypted channel: point your client at `casemate proxy`, \
                    which verifies this service first\n";
        return (StatusCode::FORBIDDEN, text).into_response();
    }
    (StatusCode::NOT_FOUND, "not found\n").into_response()
}

async fn ready(State(shared): State<Arc<Shared>>) -> (StatusCode, &'static str) {
    if shared.stopping.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
    }
    match shared.ready.get() {
        Some(ready) if ready.serving.is_valid((shared.clock)()) => (StatusCode::OK, "ready\n"),
        Some(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the credential has expired\n",
        ),
        None => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let stats = shared.ready.get().map(|ready| ready.api.engine().stats());
    let text = shared.metrics.render(stats.as_ref());
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        text,
    )
}

async fn attestation(
    State(shared): State<Arc<Shared>>,
    RawQuery(query): RawQuery,
) -> Response<Body> {
    attest(&shared, query.as_deref(), None).await
}

/// No answer yet.
pub(crate) fn starting() -> Response<Body> {
    (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response()
}

/// Evidence over the nonce in the query: over the keyset in force, or over that of a connection, bound to it.
pub(crate) async fn attest(
    shared: &Shared,
    query: Option<&str>,
    connection: Option<(&Arc<Shown>, &ChannelBinding)>,
) -> Response<Body> {
    let Some(nonce) = query.and_then(parse_nonce) else {
        let text = "give exactly one parameter: nonce, 64 hexadecimal digits\n";
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    let Some(ready) = shared.ready.get() else {
        return starting();
    };
    let evidence = match connection {
        None => ready.serving.attest(nonce).await,
        Some((shown, binding)) => ready.serving.attest_connection(nonce, shown, binding).await,
    };
    match evidence {
        Ok(response) => {
            shared.metrics.attested();
            let headers = [
                (header::CONTENT_TYPE, "application/json"),
                (header::CACHE_CONTROL, "no-store"),
            ];
            (headers, response.to_json()).into_response()
        }
        Err(error) => no_evidence(&error),
    }
}

fn no_evidence(error: &ServingError) -> Response<Body> {
    if matches!(error, ServingError::TooManyWait(_)) {
        let soon = [(header::RETRY_AFTER, "1")];
        let text = "too many wait for evidence\n";
        return (StatusCode::SERVICE_UNAVAILABLE, soon, text).into_response();
    }
    let error = one_line(error);
    tracing::error!(%error, "no evidence for a user");
    let text = "no evidence can be made at the moment\n";
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

/// The keysets that this replica can open requests under, for its peers. Whoever asks for evidence learns them, too.
async fn keysets(State(shared): State<Arc<Shared>>) -> Response<Body> {
    let now = (shared.clock)();
    let held = match shared.ready.get() {
        Some(ready) => ready.serving.keysets(now),
        None => Vec::new(),
    };
    let keysets = held.iter().map(ToString::to_string).collect();
    let headers = [(header::CACHE_CONTROL, "no-store")];
    (headers, axum::Json(KeysetList { keysets })).into_response()
}

fn parse_nonce(query: &str) -> Option<[u8; 32]> {
    let mut nonce = [0; 32];
    hex::decode_to_slice(query.strip_prefix("nonce=")?, &mut nonce).ok()?;
    Some(nonce)
}

async fn gateway(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response<Body> {
    match shared.ready.get() {
        Some(ready) => ready.gateway.clone().handle(request).await,
        None => (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provision::ProvisionError;
    use crate::quotes::TooManyWait;
    use axum::body::to_bytes;
    use casemate_tee::TeeError;
    use tower::ServiceExt;

    fn starting() -> Arc<Shared> {
        Arc::new(Shared {
            ready: OnceLock::new(),
            stopping: AtomicBool::new(false),
            metrics: Arc::default(),
            clock: || 0,
        })
    }

    async fn get(path: &str) -> (StatusCode, String) {
        get_from(starting(), path).await
    }

    async fn get_from(shared: Arc<Shared>, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router(shared).oneshot(request).await.unwrap();
        let status = response.status();
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn is_not_ready_once_it_is_stopping() {
        let shared = starting();
        shared.stopping.store(true, Ordering::Relaxed);
        let stopping = (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned());
        assert_eq!(get_from(shared, "/readyz").await, stopping);
    }

    #[tokio::test]
    async fn prompts_in_clear_are_turned_away_with_directions() {
        let (status, text) = get("/v1/chat/completions").await;
        assert_eq!(status, StatusCode::FORBIDDEN);
        assert!(text.contains("casemate proxy"), "{text}");
    }

    #[tokio::test]
    async fn is_alive_but_not_ready_before_the_model_is_loaded() {
        assert_eq!(get("/livez").await.0, StatusCode::OK);
        assert_eq!(get("/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
        let nonce = "00".repeat(32);
        let (status, _) = get(&format!("/v1/attestation?nonce={nonce}")).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn who_is_one_too_many_for_evidence_is_told_to_come_back() {
        let answer = no_evidence(&ServingError::TooManyWait(TooManyWait));
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.headers()[header::RETRY_AFTER], "1");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the quoting service is away")]
    struct Away(#[source] std::io::Error);

    #[test]
    fn the_log_says_why_there_is_no_evidence_and_the_user_is_not_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(Arc::new(file.reopen().unwrap()))
            .finish();
        let away = Away(std::io::Error::other("no such socket"));
        let error = ServingError::Provision(ProvisionError::Tee(TeeError::Unavailable {
            path: "/run/tee.sock".into(),
            source: std::io::Error::other(away),
        }));
        let answer = tracing::subscriber::with_default(subscriber, || no_evidence(&error));
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        let log = std::fs::read_to_string(file.path()).unwrap();
        let told = "no evidence: /run/tee.sock: the quoting service is away: no such socket\n";
        assert!(log.ends_with(told), "{log}");
        let body = futures::executor::block_on(to_bytes(answer.into_body(), 1 << 10)).unwrap();
        assert_eq!(body, "no evidence can be made at the moment\n");
    }

    #[tokio::test]
    async fn a_nonce_has_one_form() {
        let nonce = "00".repeat(32);
        for query in [
            "",
            "?",
            "?nonce=",
            "?nonce=00",
            &format!("?nonce={nonce}&x=1"),
            &format!("?nonce={nonce}00"),
        ] {
            let (status, _) = get(&format!("/v1/attestation{query}")).await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{query}");
        }
    }
}
