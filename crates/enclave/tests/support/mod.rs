//! A tiny real model, and the API over it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, Model, ModelDigest, SealOptions, SealedFile, Silent, seal};
use casemate_enclave::api::{Api, PerturbationKey};
use casemate_engine::{Compute, Engine, EngineOptions};
use casemate_testkit::models::{MemoryModel, Tiny};
use serde_json::{Value, json};
use tower::ServiceExt;

/// Sealed, opened and checked.
pub fn tiny_model() -> Model {
    tiny_model_with(None)
}

/// As [`tiny_model`], under another chat template where one is given.
pub fn tiny_model_with(template: Option<&str>) -> Model {
    let mut model = Tiny::default().build();
    if let Some(template) = template {
        model.set_chat_template(template);
    }
    sealed_and_opened(&model)
}

fn sealed_and_opened(model: &MemoryModel) -> Model {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.casemate");
    let (data_key, signing_key) = (DataKey::generate(), SigningKey::generate());
    let options = SealOptions {
        version: 1,
        ..SealOptions::default()
    };
    seal(model, &options, &data_key, &signing_key, &path, &Silent).unwrap();
    let file = SealedFile::open(&path).unwrap();
    file.unlock(&data_key, &signing_key.verifying_key())
        .unwrap()
        .load(1, &Silent)
        .unwrap()
}

/// That of a model granted with this data key.
pub fn perturbation_key(data_key: [u8; 32]) -> PerturbationKey {
    PerturbationKey::derive(&DataKey::from_bytes(&data_key), &ModelDigest([2; 32]))
}

pub const NOW: u64 = 1_790_000_000;

pub fn api() -> Api {
    api_with(None, 256)
}

/// Whether a template is given, and how long its context is.
pub fn api_with(template: Option<&str>, max_context: usize) -> Api {
    api_over(tiny_model_with(template), max_context)
}

/// Over a model that can be made to call functions, by biases on the two tokens whose ids come with it: one begins a
/// call, the other ends the answer.
pub fn api_that_calls(max_context: usize) -> (Api, [usize; 2]) {
    let tiny = Tiny {
        context: max_context as u32,
        ..Tiny::default()
    };
    let mut model = tiny.build();
    let tokens = model.offer_calls();
    (api_over(sealed_and_opened(&model), max_context), tokens)
}

fn api_over(model: Model, max_context: usize) -> Api {
    let options = EngineOptions {
        compute: Compute::F32,
        threads: 1,
        max_context,
        max_batch: 4,
        max_waiting: 16,
        ..EngineOptions::default()
    };
    let engine = Engine::load(model, &options, &Silent).unwrap();
    Api::new(engine, "tiny".into(), "fp_0".into(), || NOW)
}

pub async fn send(
    router: &Router,
    method: &str,
    path: &str,
    body: impl Into<Body>,
) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .body(body.into())
        .unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (
        status,
        serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    )
}

pub async fn post(router: &Router, path: &str, body: &Value) -> (StatusCode, Value) {
    send(router, "POST", path, body.to_string()).await
}

pub fn chat(extra: &Value) -> Value {
    let mut body = json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
    });
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// What a stream holds, its end left out.
pub async fn events(router: &Router, path: &str, body: &Value) -> Vec<Value> {
    let request = Request::post(path)
        .body(Body::from(body.to_string()))
        .unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let bytes = to_bytes(response.into_body(), 1 << 22).await.unwrap();
    let stream = String::from_utf8(bytes.to_vec()).unwrap();
    let mut events: Vec<&str> = stream
        .split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").unwrap())
        .collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    events
        .into_iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}
