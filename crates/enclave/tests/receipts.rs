//! Receipts of a tiny real model's answers, without the channel around it.

mod support;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, Response, StatusCode};
use casemate_channel::keyset::KeysetDigest;
use casemate_channel::receipt::{
    AnswerHash, AnswerHasher, FetchedReceipt, RECEIPT_FIELD, Receipt, RequestHash, RequestId, Salt,
    SignedReceipt, Usage,
};
use casemate_container::Silent;
use casemate_container::signing::SigningKey;
use casemate_enclave::access::Caller;
use casemate_enclave::api::{Api, router};
use casemate_enclave::receipts::{self, KeysetFacts, Limits, Receipts, Signer};
use casemate_engine::{Compute, Engine, EngineOptions};
use futures::StreamExt;
use serde_json::{Value, json};
use support::tiny_model;
use tower::ServiceExt;

const NOW: u64 = 1_790_000_000;
const CHAT: &str = "/v1/chat/completions";

struct Service {
    router: Router,
    signer: Arc<Signer>,
}

fn service() -> Service {
    let options = EngineOptions {
        compute: Compute::F32,
        threads: 1,
        max_context: 256,
        max_batch: 4,
        max_waiting: 16,
        kv_bytes: None,
    };
    let engine = Engine::load(tiny_model(), &options, &Silent).unwrap();
    let api = Api::new(engine, "tiny".into(), "fp_0".into(), || NOW);
    let receipts = Arc::new(Receipts::new(Limits::default(), || NOW));
    let facts = KeysetFacts {
        keyset_digest: KeysetDigest([1; 32]),
        evidence_digest: [2; 32],
        model_digest: [3; 32],
        model_version: 4,
        adapter_digests: vec![],
        compute: "f32".into(),
        expires_at: NOW + 1,
    };
    Service {
        router: receipts::wrap(router(api), receipts),
        signer: Arc::new(Signer::new(facts, SigningKey::generate())),
    }
}

impl Service {
    /// Asks as the gateway does for a caller.
    async fn ask(&self, caller: &Caller, method: &str, path: &str, body: &str) -> Response<Body> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::from(body.to_owned()))
            .unwrap();
        request.extensions_mut().insert(caller.clone());
        request.extensions_mut().insert(Arc::clone(&self.signer));
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn fetch(&self, caller: &Caller, id: &str) -> (StatusCode, Bytes) {
        let path = format!("/v1/receipts/{id}");
        whole(self.ask(caller, "GET", &path, "").await).await
    }

    /// The receipt and its salts.
    async fn receipt(&self, caller: &Caller, id: &RequestId) -> (Receipt, FetchedReceipt) {
        let (status, json) = self.fetch(caller, id.as_str()).await;
        assert_eq!(status, StatusCode::OK);
        let fetched = FetchedReceipt::from_json(&json, id).ok().unwrap();
        let signed = SignedReceipt::parse(&fetched.receipt).unwrap();
        (signed.unverified().clone(), fetched)
    }
}

async fn whole(response: Response<Body>) -> (StatusCode, Bytes) {
    let status = response.status();
    (
        status,
        to_bytes(response.into_body(), 1 << 20).await.unwrap(),
    )
}

fn announced(response: &Response<Body>) -> RequestId {
    let field = response.headers().get(RECEIPT_FIELD).unwrap();
    field.to_str().unwrap().parse().unwrap()
}

fn chat(extra: &Value) -> String {
    let mut body = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0,
    });
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body.to_string()
}

fn answer_hash(salt: &Salt, body: &[u8]) -> AnswerHash {
    let mut hasher = AnswerHasher::new(salt);
    hasher.update(body);
    hasher.finish()
}

fn alice() -> Caller {
    Caller::holder("alice", [1; 32])
}

#[tokio::test]
async fn a_whole_answer_has_a_receipt_over_its_exact_bytes() {
    let service = service();
    let body = chat(&json!({"top_p": 0.5, "top_k": 7, "n": 2, "seed": 11}));
    let response = service.ask(&alice(), "POST", CHAT, &body).await;
    let id = announced(&response);
    let (status, answer) = whole(response).await;
    assert_eq!(status, StatusCode::OK);
    let parsed: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(parsed["id"], id.as_str());

    let (receipt, fetched) = service.receipt(&alice(), &id).await;
    assert_eq!(
        (receipt.counter, receipt.status, receipt.time),
        (1, 200, NOW)
    );
    assert_eq!(
        receipt.answer_hash,
        answer_hash(&fetched.answer_salt, &answer)
    );
    let salt = &fetched.request_salt;
    let request = RequestHash::of(salt, "POST", CHAT, body.as_bytes());
    assert_eq!(receipt.request_hash, request);
    let used = Usage {
        prompt_tokens: parsed["usage"]["prompt_tokens"].as_u64().unwrap(),
        completion_tokens: parsed["usage"]["completion_tokens"].as_u64().unwrap(),
    };
    assert_eq!(receipt.usage, Some(used));
    let parameters = &receipt.parameters;
    assert_eq!((parameters.temperature, parameters.top_p), (0.0, 0.5));
    assert_eq!((parameters.top_k, parameters.choices), (7, 2));
    assert_eq!((parameters.seed, parameters.max_tokens), (11, Some(8)));
    assert_eq!(receipt.model_digest, [3; 32]);
    assert_ne!(
        fetched.request_salt.as_bytes(),
        fetched.answer_salt.as_bytes()
    );
}

#[tokio::test]
async fn a_streams_receipt_is_there_with_its_last_piece() {
    let service = service();
    let body = chat(&json!({"stream": true}));
    let response = service.ask(&alice(), "POST", CHAT, &body).await;
    let id = announced(&response);
    let mut pieces = response.into_body().into_data_stream();
    let mut answer = Vec::new();
    // The end of the body is not asked for: clients stop at this event.
    while !answer.ends_with(b"data: [DONE]\n\n") {
        let early = service.fetch(&alice(), id.as_str()).await.0;
        assert_eq!(early, StatusCode::NOT_FOUND, "before the end");
        answer.extend(pieces.next().await.unwrap().unwrap());
    }
    let (receipt, fetched) = service.receipt(&alice(), &id).await;
    assert_eq!(
        receipt.answer_hash,
        answer_hash(&fetched.answer_salt, &answer)
    );
    assert_eq!(receipt.usage.map(|usage| usage.completion_tokens), Some(8));
    assert!(
        pieces.next().await.is_none(),
        "nothing follows what was signed"
    );
    drop(pieces);
    let (again, _) = service.receipt(&alice(), &id).await;
    assert_eq!(again, receipt, "one answer has one receipt");
}

#[tokio::test]
async fn an_answer_whose_client_left_has_a_receipt_that_says_incomplete() {
    let service = service();
    let body = chat(&json!({"stream": true, "max_tokens": 100_000}));
    let response = service.ask(&alice(), "POST", CHAT, &body).await;
    let id = announced(&response);
    let mut pieces = response.into_body().into_data_stream();
    let mut answer = Vec::new();
    for _ in 0..3 {
        answer.extend(pieces.next().await.unwrap().unwrap());
    }
    drop(pieces);
    let (receipt, fetched) = service.receipt(&alice(), &id).await;
    assert_eq!(receipt.usage, None);
    assert_eq!(
        receipt.answer_hash,
        answer_hash(&fetched.answer_salt, &answer)
    );
    // A whole answer that was never read is incomplete, too.
    let response = service.ask(&alice(), "POST", CHAT, &chat(&json!({}))).await;
    let id = announced(&response);
    drop(response);
    let (receipt, _) = service.receipt(&alice(), &id).await;
    assert_eq!((receipt.counter, receipt.usage), (2, None));
}

#[tokio::test]
async fn another_key_gets_the_same_as_for_an_unknown_id() {
    let service = service();
    let response = service.ask(&alice(), "POST", CHAT, &chat(&json!({}))).await;
    let id = announced(&response);
    whole(response).await;
    let anonymous = Caller::anonymous();
    let unknown = format!("chatcmpl-{}", "0".repeat(32));
    let not_found = service.fetch(&alice(), &unknown).await;
    assert_eq!(not_found.0, StatusCode::NOT_FOUND);
    let error: Value = serde_json::from_slice(&not_found.1).unwrap();
    assert_eq!(error["error"]["code"], "receipt_not_found");
    assert_eq!(error["error"]["type"], "invalid_request_error");
    // A name that was given to another key is another caller.
    for caller in [
        &Caller::holder("bob", [2; 32]),
        &Caller::holder("alice", [2; 32]),
        &anonymous,
    ] {
        assert_eq!(service.fetch(caller, id.as_str()).await, not_found);
    }
    for strange in ["x", "..%2F..%2Fetc", "chatcmpl-"] {
        assert_eq!(service.fetch(&alice(), strange).await, not_found);
    }
    assert_eq!(service.fetch(&alice(), id.as_str()).await.0, StatusCode::OK);
    // Where nobody has a key, the id is what it takes.
    let response = service
        .ask(&anonymous, "POST", CHAT, &chat(&json!({})))
        .await;
    let id = announced(&response);
    whole(response).await;
    assert_eq!(
        service.fetch(&anonymous, id.as_str()).await.0,
        StatusCode::OK
    );
    assert_eq!(service.fetch(&alice(), id.as_str()).await, not_found);
}

#[tokio::test]
async fn errors_and_lists_have_no_receipt_and_take_no_number() {
    let service = service();
    for (method, path, body, expected) in [
        ("GET", "/v1/models", "", StatusCode::OK),
        ("POST", CHAT, "{", StatusCode::BAD_REQUEST),
        ("POST", "/v1/embeddings", "{}", StatusCode::NOT_FOUND),
        ("PUT", "/v1/receipts/x", "", StatusCode::METHOD_NOT_ALLOWED),
    ] {
        let response = service.ask(&alice(), method, path, body).await;
        assert_eq!(response.status(), expected, "{method} {path}");
        assert!(response.headers().get(RECEIPT_FIELD).is_none());
        whole(response).await;
    }
    let body = json!({"model": "tiny", "prompt": "hello", "max_tokens": 2}).to_string();
    let path = "/v1/completions?trace=1";
    let response = service.ask(&alice(), "POST", path, &body).await;
    let id = announced(&response);
    assert_eq!(id.prefix(), "cmpl");
    whole(response).await;
    let (receipt, fetched) = service.receipt(&alice(), &id).await;
    assert_eq!(receipt.counter, 1);
    let salt = &fetched.request_salt;
    let request = RequestHash::of(salt, "POST", path, body.as_bytes());
    assert_eq!(receipt.request_hash, request);
}
