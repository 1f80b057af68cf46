//! The OpenAI-compatible API, reachable only through the attested channel.
//!
//! Holds request parsing, the mapping to engine requests, and answers (whole or streamed). Knows nothing of
//! attestation, encryption or sockets: [`router`] is an ordinary HTTP service that the gateway calls with decrypted
//! requests. Fields that are not supported are refused by name, never ignored.

mod answer;
mod calls;
mod chat;
mod completions;
mod error;
mod extraction;
mod format;
mod generation;
mod length;
mod messages;
mod parameters;
mod perturbation;
mod tools;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use casemate_engine::{Engine, User};
use serde::Serialize;

use answer::{Answer, Shape};
use casemate_channel::receipt::RequestId;
use extraction::Shown;
use perturbation::Perturbation;

use crate::grammars::{Grammars, Share};
use crate::metrics::{Denied, Metrics};

pub use answer::{Ending, Served};
pub use error::ApiError;
pub use extraction::{Extraction, Logprobs};
pub use perturbation::PerturbationKey;

/// Largest request body that is parsed, in bytes.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;

/// What the handlers need: the engine and how the served model presents itself.
#[derive(Clone)]
pub struct Api {
    inner: Arc<Inner>,
    extraction: Extraction,
    /// There is one under every policy but the default's.
    perturbation: Option<Arc<PerturbationKey>>,
    grammars: Arc<Grammars>,
    metrics: Arc<Metrics>,
}

struct Inner {
    engine: Engine,
    model: String,
    fingerprint: String,
    loaded_at: u64,
    clock: fn() -> u64,
}

impl Api {
    /// An API serving `engine` under the name `model`; `fingerprint` is what answers carry as
    /// `system_fingerprint`, `clock` gives seconds since the Unix epoch. Its extraction policy shows nothing.
    pub fn new(engine: Engine, model: String, fingerprint: String, clock: fn() -> u64) -> Self {
        let loaded_at = clock();
        Self {
            inner: Arc::new(Inner {
                engine,
                model,
                fingerprint,
                loaded_at,
                clock,
            }),
            extraction: Extraction::default(),
            perturbation: None,
            grammars: Arc::default(),
            metrics: Arc::default(),
        }
    }

    /// The same API, which tells these metrics what it holds and refuses.
    #[must_use]
    pub fn with_metrics(mut self, metrics: Arc<Metrics>) -> Self {
        metrics.grammars(Arc::clone(&self.grammars));
        self.metrics = metrics;
        self
    }

    /// The same API under another extraction policy. The key makes the noise of one that perturbs what it shows.
    #[must_use]
    pub fn with_extraction(mut self, extraction: Extraction, key: PerturbationKey) -> Self {
        self.extraction = extraction;
        self.perturbation = Some(Arc::new(key));
        self
    }

    fn extraction(&self) -> Extraction {
        self.extraction
    }

    /// The noise on what is shown of an answer to `prompt`, if there is to be any.
    fn perturbation(
        &self,
        shown: Option<Shown>,
        prompt: &[u32],
    ) -> Result<Option<Perturbation>, ApiError> {
        let Some(amplitude) = shown.and_then(|shown| shown.perturbation) else {
            return Ok(None);
        };
        let key = self.perturbation.as_ref();
        let key = key.ok_or_else(|| ApiError::internal("there is no key for perturbations"))?;
        Ok(Some(Perturbation::new(key, amplitude, prompt)))
    }

    /// Room for what schemas and functions of requests became, which is kept until their answers are made and taken, or
    /// nobody wants them.
    pub fn grammars(&self) -> &Arc<Grammars> {
        &self.grammars
    }

    /// Takes room for that many bytes of them, for whoever asks.
    fn hold(&self, user: Option<User>, bytes: usize) -> Result<Share, ApiError> {
        self.grammars.take(user, bytes).map_err(|_| {
            self.metrics.denied(Denied::Grammars);
            ApiError::overloaded()
        })
    }

    /// The engine behind the API.
    pub fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    fn now(&self) -> u64 {
        (self.inner.clock)()
    }

    fn date(&self) -> time::OffsetDateTime {
        let seconds = i64::try_from(self.now()).unwrap_or_default();
        time::OffsetDateTime::from_unix_timestamp(seconds)
            .unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
    }

    fn answer(&self, shape: Shape, seed: u64) -> Answer {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Text => "cmpl",
        };
        let mut id = [0; 16];
        aws_lc_rs::rand::fill(&mut id).expect("the operating system gives randomness");
        Answer {
            shape,
            id: RequestId::new(prefix, id),
            created: self.now(),
            model: self.inner.model.clone(),
            fingerprint: self.inner.fingerprint.clone(),
            seed: seed.cast_signed(),
            logprobs: false,
        }
    }

    fn check_model(&self, requested: &str) -> Result<(), ApiError> {
        if requested == self.inner.model {
            return Ok(());
        }
        Err(ApiError::model_not_found(requested, &self.inner.model))
    }
}

/// Names of all request fields that the API knows, supported or not; some come twice.
pub fn known_fields() -> impl Iterator<Item = &'static str> {
    let own = chat::OWN_FIELDS.iter().chain(completions::OWN_FIELDS);
    parameters::known_fields().chain(own.copied())
}

/// The routes of the API.
pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/models", get(list_models))
        .route("/v1/models/{model}", get(get_model))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .fallback(|| async { ApiError::unknown_url().into_response() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed().into_response() })
        .layer(DefaultBodyLimit::max(MAX_REQUEST_BYTES))
        .with_state(api)
}

#[derive(Serialize)]
struct ModelObject {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: Vec<ModelObject>,
}

impl Api {
    fn model_object(&self) -> ModelObject {
        ModelObject {
            id: self.inner.model.clone(),
            object: "model",
            created: self.inner.loaded_at,
            owned_by: "casemate",
        }
    }
}

async fn list_models(State(api): State<Api>) -> Response {
    axum::Json(ModelList {
        object: "list",
        data: vec![api.model_object()],
    })
    .into_response()
}

async fn get_model(
    State(api): State<Api>,
    axum::extract::Path(model): axum::extract::Path<String>,
) -> Result<Response, ApiError> {
    api.check_model(&model)?;
    Ok(axum::Json(api.model_object()).into_response())
}
