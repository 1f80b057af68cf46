//! What the API calls models: the model itself under the service's name, and its adapters under theirs. Who may not use
//! an adapter is told that there is none.

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use casemate_container::ModelDigest;
use serde::Serialize;

use super::Api;
use super::error::ApiError;
use crate::access::Caller;
use crate::adapters::Offered;

/// What a request named as its model.
#[derive(Clone, Copy)]
pub(super) struct Chosen<'a> {
    /// As the request named it.
    pub(super) name: &'a str,
    adapter: Option<&'a Offered>,
}

impl Chosen<'_> {
    /// What is applied to the model.
    pub(super) fn adapter(&self) -> Option<ModelDigest> {
        self.adapter.map(|adapter| adapter.digest)
    }

    /// What answers carry as `system_fingerprint`: that of the model, and behind it the adapter's.
    pub(super) fn fingerprint(&self, of_model: &str) -> String {
        match self.adapter {
            None => of_model.to_owned(),
            Some(adapter) => format!("{of_model}_{}", &adapter.digest.to_string()[..12]),
        }
    }
}

impl Api {
    /// The model or adapter that a request names.
    pub(super) fn choose(
        &self,
        requested: &str,
        caller: Option<&Caller>,
    ) -> Result<Chosen<'_>, ApiError> {
        let name = &self.inner.model;
        if requested == name {
            return Ok(Chosen {
                name,
                adapter: None,
            });
        }
        let mut adapters = self.adapters_for(caller);
        match adapters.find(|adapter| adapter.name == requested) {
            Some(adapter) => Ok(Chosen {
                name: &adapter.name,
                adapter: Some(adapter),
            }),
            None => Err(ApiError::model_not_found(requested, name)),
        }
    }

    fn adapters_for(&self, caller: Option<&Caller>) -> impl Iterator<Item = &Offered> {
        let adapters = self.adapters.iter().map(AsRef::as_ref);
        adapters.filter(move |adapter| adapter.lets_in(caller))
    }

    fn object(&self, id: &str) -> ModelObject {
        let base = &self.inner.model;
        ModelObject {
            id: id.to_owned(),
            object: "model",
            created: self.inner.loaded_at,
            owned_by: "casemate",
            root: base.clone(),
            parent: (id != base).then(|| base.clone()),
        }
    }
}

/// As servers of several adapters show them: `root` and `parent` name the model that an adapter is applied to.
#[derive(Serialize)]
struct ModelObject {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
}

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: Vec<ModelObject>,
}

pub(super) async fn list(State(api): State<Api>, caller: Option<Extension<Caller>>) -> Response {
    let caller = caller.map(|Extension(caller)| caller);
    let mut data = vec![api.object(&api.inner.model)];
    data.extend(
        api.adapters_for(caller.as_ref())
            .map(|adapter| api.object(&adapter.name)),
    );
    let object = "list";
    axum::Json(ModelList { object, data }).into_response()
}

pub(super) async fn get(
    State(api): State<Api>,
    caller: Option<Extension<Caller>>,
    axum::extract::Path(model): axum::extract::Path<String>,
) -> Result<Response, ApiError> {
    let caller = caller.map(|Extension(caller)| caller);
    let chosen = api.choose(&model, caller.as_ref())?;
    Ok(axum::Json(api.object(chosen.name)).into_response())
}
