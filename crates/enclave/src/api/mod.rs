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
mod models;
mod parameters;
mod perturbation;
mod tools;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use casemate_container::ModelDigest;
use casemate_engine::{Engine, User};

use answer::{Answer, Shape};
use casemate_channel::receipt::RequestId;
use extraction::Shown;
use perturbation::Perturbation;

use models::Chosen;

use crate::adapters::Offered;
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
    adapters: Arc<[Arc<Offered>]>,
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
            adapters: Arc::new([]),
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

    /// The same API, in which requests may name these adapters of the engine's, too.
    #[must_use]
    pub fn with_adapters(mut self, adapters: Arc<[Arc<Offered>]>) -> Self {
        self.adapters = adapters;
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
        adapter: Option<ModelDigest>,
        shown: Option<Shown>,
        prompt: &[u32],
    ) -> Result<Option<Perturbation>, ApiError> {
        let Some(amplitude) = shown.and_then(|shown| shown.perturbation) else {
            return Ok(None);
        };
        // An adapter has noise of its own: with the model's, the difference of the two would be told exactly.
        let key = match adapter {
            None => self.perturbation.as_deref(),
            Some(digest) => {
                let mut adapters = self.adapters.iter();
                let adapter = adapters.find(|adapter| adapter.digest == digest);
                adapter.map(|adapter| &adapter.perturbation)
            }
        };
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

    fn answer(&self, shape: Shape, seed: u64, chosen: Chosen<'_>) -> Answer {
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
            model: chosen.name.to_owned(),
            fingerprint: chosen.fingerprint(&self.inner.fingerprint),
            seed: seed.cast_signed(),
            logprobs: false,
        }
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
        .route("/v1/models", get(models::list))
        .route("/v1/models/{model}", get(models::get))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .fallback(|| async { ApiError::unknown_url().into_response() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed().into_response() })
        .layer(DefaultBodyLimit::max(MAX_REQUEST_BYTES))
        .with_state(api)
}
