//! Receipts of a tiny real model's answers, without the channel around it.

mod support;

use std::num::NonZeroU32;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, Response, StatusCode};
use casemate_channel::keyset::KeysetDigest;
use casemate_channel::receipt::{
    AnswerFormat, AnswerHash, AnswerHasher, Bias, FetchedReceipt, ForcedCall, Functions,
    RECEIPT_FIELD, Receipt, RequestHash, RequestId, Salt, SignedReceipt, Steering, Usage,
};
use casemate_container::signing::SigningKey;
use casemate_enclave::access::Caller;
use casemate_enclave::api::{Extraction, Logprobs, router};
use casemate_enclave::receipts::{self, KeysetFacts, Limits, Receipts, Signer};
use casemate_testkit::models::TOOLS_TEMPLATE;
use futures::StreamExt;
use serde_json::{Value, json};
use support::{NOW, api_with, perturbation_key};
use tower::ServiceExt;

const CHAT: &str = "/v1/chat/completions";

struct Service {
    router: Router,
    signer: Arc<Signer>,
}

fn service() -> Service {
    let policy = Extraction {
        logprobs: Logprobs::None,
        logit_bias: true,
    };
    let api =
        api_with(Some(TOOLS_TEMPLATE), 512).with_extraction(policy, perturbation_key([1; 32]));
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

/// What the receipt of a chat says that steered it.
async fn steering(extra: &Value) -> Steering {
    steering_at(CHAT, &chat(extra)).await
}

async fn steering_at(path: &str, body: &str) -> Steering {
    let service = service();
    let response = service.ask(&alice(), "POST", path, body).await;
    assert_eq!(response.status(), StatusCode::OK, "{body}");
    let id = announced(&response);
    whole(response).await;
    let (receipt, _) = service.receipt(&alice(), &id).await;
    receipt.parameters.steering
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
    support::chat(extra).to_string()
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

#[tokio::test]
async fn a_receipt_says_how_many_tokens_were_biased_and_how_strongly() {
    let none = steering(&json!({"logit_bias": {}})).await;
    assert_eq!(none, Steering::default());
    let found = steering(&json!({"logit_bias": {"81": 3.5, "10": -100, "5": 0}})).await;
    let expected = Steering {
        bias: Some(Bias {
            tokens: NonZeroU32::new(3).unwrap(),
            strongest: 100.0,
        }),
        ..Steering::default()
    };
    assert_eq!(found, expected);
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 2, "logit_bias": {"81": 3.5}});
    let found = steering_at("/v1/completions", &body.to_string()).await;
    assert_eq!(found.bias.unwrap().strongest, 3.5);
}

#[tokio::test]
async fn a_receipt_says_which_form_its_answer_had_to_have() {
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["verdict"],
        "properties": {"verdict": {"const": "guilty"}},
    });
    let named = json!({"name": "s", "schema": schema});
    for (format, told) in [
        (json!({"type": "text"}), None),
        (
            json!({"type": "json_object"}),
            Some(AnswerFormat::JsonObject),
        ),
        (
            json!({"type": "json_schema", "json_schema": named}),
            Some(AnswerFormat::JsonSchema),
        ),
    ] {
        let expected = Steering {
            format: told,
            ..Steering::default()
        };
        let found = steering(&json!({"response_format": format})).await;
        assert_eq!(found, expected);
        let streamed = steering(&json!({"response_format": format, "stream": true})).await;
        assert_eq!(streamed, expected);
    }
}

#[tokio::test]
async fn a_receipt_says_which_functions_could_and_had_to_be_called() {
    let tool = |name: &str, strict: bool| {
        let parameters = json!({
            "type": "object", "additionalProperties": false, "required": ["sure"],
            "properties": {"sure": {"const": true}},
        });
        json!({"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}})
    };
    let two = json!([tool("rain", false), tool("sun", false)]);
    let sun = json!({"type": "function", "function": {"name": "sun"}});
    let functions = |offered, forced, first_call_only| {
        Some(Functions {
            offered: NonZeroU32::new(offered)?,
            forced,
            first_call_only,
        })
    };
    for (extra, told) in [
        (json!({"tools": two}), functions(2, None, false)),
        (
            json!({"tools": two, "parallel_tool_calls": false}),
            functions(2, None, true),
        ),
        (json!({"tools": two, "tool_choice": "none"}), None),
        (
            json!({"tools": two, "tool_choice": "required"}),
            functions(2, Some(ForcedCall::Any), false),
        ),
        (
            json!({"tools": two, "tool_choice": sun}),
            functions(2, Some(ForcedCall::One), false),
        ),
        (
            json!({"tools": [tool("sun", true)], "tool_choice": "required"}),
            functions(1, Some(ForcedCall::OneBySchema), false),
        ),
        (
            json!({"tools": [tool("sun", true), tool("rain", false)], "tool_choice": "required"}),
            functions(2, Some(ForcedCall::AnyBySchema), false),
        ),
        (
            json!({"tools": [tool("sun", true)]}),
            functions(1, Some(ForcedCall::IfAnyBySchema), false),
        ),
    ] {
        let expected = Steering {
            functions: told,
            ..Steering::default()
        };
        assert_eq!(steering(&extra).await, expected, "{extra}");
    }
}

#[tokio::test]
async fn a_receipt_says_how_many_stop_strings_could_cut_its_answer() {
    let stops = |count| Steering {
        stop_strings: NonZeroU32::new(count),
        ..Steering::default()
    };
    assert_eq!(steering(&json!({"stop": []})).await, stops(0));
    assert_eq!(steering(&json!({"stop": "x"})).await, stops(1));
    assert_eq!(steering(&json!({"stop": ["x", "y"]})).await, stops(2));
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 2, "stop": ["x", "y", "z"]});
    let found = steering_at("/v1/completions", &body.to_string()).await;
    assert_eq!(found, stops(3));
}
