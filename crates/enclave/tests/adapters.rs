//! Adapters behind the API: chosen by `model`, listed beside it, for whom their grants let in, and named by receipts.

mod support;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use casemate_channel::keyset::KeysetDigest;
use casemate_channel::receipt::{FetchedReceipt, RequestId, SignedReceipt};
use casemate_container::signing::SigningKey;
use casemate_container::{
    Adapter, DataKey, ModelDigest, SealOptions, SealedFile, Silent, seal_adapter,
};
use casemate_enclave::access::Caller;
use casemate_enclave::adapters::Offered;
use casemate_enclave::api::{Api, Extraction, Logprobs, PerturbationKey, router};
use casemate_enclave::receipts::{self, KeysetFacts, Limits, Receipts, Signer};
use casemate_engine::{Compute, Engine, EngineOptions};
use casemate_release::api_key::{self, Access, ApiKey, ApiKeys};
use casemate_testkit::adapters::{MemoryAdapter, TinyAdapter};
use serde_json::{Value, json};
use support::{NOW, chat, tiny_model};
use tower::ServiceExt;

fn opened(adapter: &TinyAdapter, base: ModelDigest) -> Adapter {
    sealed_and_opened(&adapter.build(tiny_model().config(), base))
}

fn sealed_and_opened(source: &MemoryAdapter) -> Adapter {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("adapter.casemate");
    let (data_key, signing_key) = (DataKey::generate(), SigningKey::generate());
    let options = SealOptions {
        version: 1,
        ..SealOptions::default()
    };
    seal_adapter(source, &options, &data_key, &signing_key, &path, &Silent).unwrap();
    let file = SealedFile::open(&path).unwrap();
    file.unlock(&data_key, &signing_key.verifying_key())
        .unwrap()
        .load_adapter(1, &Silent)
        .unwrap()
}

fn offered(name: &str, digest: ModelDigest, users: Access) -> Offered {
    let key = PerturbationKey::derive(&DataKey::from_bytes(&[5; 32]), &digest);
    Offered::new(name.into(), digest, 1, users, key)
}

struct Service {
    router: Router,
    signer: Arc<Signer>,
    adapters: Arc<[Arc<Offered>]>,
}

/// A model, the adapter `bills` for everybody and `letters` for alice.
fn service() -> Service {
    let model = tiny_model();
    let base = model.digest();
    let adapters = [3, 4].map(|seed| {
        let tiny = TinyAdapter {
            seed,
            ..TinyAdapter::default()
        };
        opened(&tiny, base)
    });
    let digests = adapters.each_ref().map(Adapter::digest);
    let options = EngineOptions {
        compute: Compute::F32,
        threads: 1,
        max_context: 256,
        max_batch: 4,
        ..EngineOptions::default()
    };
    let engine = Engine::load_with(model, adapters.into(), &options, None, &Silent).unwrap();
    let alice = ApiKey {
        name: "alice".into(),
        hash: [1; 32],
        limits: api_key::Limits::default(),
    };
    let for_alice = Access::Keyed(ApiKeys::new(vec![alice]).unwrap());
    let offered: Arc<[Arc<Offered>]> = Arc::new([
        Arc::new(offered("bills", digests[0], Access::Open)),
        Arc::new(offered("letters", digests[1], for_alice)),
    ]);
    let mut ascending: Vec<_> = digests.iter().map(|digest| digest.0).collect();
    ascending.sort_unstable();
    let facts = KeysetFacts {
        keyset_digest: KeysetDigest([1; 32]),
        evidence_digest: [2; 32],
        model_digest: base.0,
        model_version: 1,
        adapter_digests: ascending,
        compute: "f32".into(),
        expires_at: NOW + 1,
    };
    let api =
        Api::new(engine, "tiny".into(), "fp_0".into(), || NOW).with_adapters(Arc::clone(&offered));
    let receipts = Arc::new(Receipts::new(Limits::default(), || NOW));
    Service {
        router: receipts::wrap(router(api), receipts),
        signer: Arc::new(Signer::new(facts, SigningKey::generate())),
        adapters: offered,
    }
}

fn alice() -> Caller {
    Caller::holder("alice", [1; 32])
}

fn bob() -> Caller {
    Caller::holder("bob", [2; 32])
}

impl Service {
    async fn ask(
        &self,
        caller: &Caller,
        method: &str,
        path: &str,
        body: &str,
    ) -> (StatusCode, Vec<u8>) {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .body(Body::from(body.to_owned()))
            .unwrap();
        request.extensions_mut().insert(caller.clone());
        request.extensions_mut().insert(Arc::clone(&self.signer));
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, bytes.to_vec())
    }

    async fn chat(&self, caller: &Caller, model: &str) -> (StatusCode, Value) {
        let body = chat(&json!({"model": model})).to_string();
        let (status, bytes) = self
            .ask(caller, "POST", "/v1/chat/completions", &body)
            .await;
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    async fn get(&self, caller: &Caller, path: &str) -> (StatusCode, Value) {
        let (status, bytes) = self.ask(caller, "GET", path, "").await;
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    /// The adapter that the receipt of an answer names.
    async fn receipt(&self, caller: &Caller, answer: &Value) -> Option<[u8; 32]> {
        let id: RequestId = answer["id"].as_str().unwrap().parse().unwrap();
        let path = format!("/v1/receipts/{id}");
        let (status, bytes) = self.ask(caller, "GET", &path, "").await;
        assert_eq!(status, StatusCode::OK);
        let fetched = FetchedReceipt::from_json(&bytes, &id).ok().unwrap();
        let signed = SignedReceipt::parse(&fetched.receipt).unwrap();
        assert_eq!(signed.unverified().adapter_digests.len(), 2);
        signed.unverified().adapter
    }
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn the_model_of_a_request_chooses_the_adapter_and_the_receipt_names_it() {
    let service = service();
    let mut said = Vec::new();
    for (model, adapter) in [("tiny", None), ("bills", Some(0)), ("letters", Some(1))] {
        let (status, answer) = service.chat(&alice(), model).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer["model"], model);
        let digest = adapter.map(|at: usize| service.adapters[at].digest);
        let fingerprint = answer["system_fingerprint"].as_str().unwrap();
        match digest {
            None => assert_eq!(fingerprint, "fp_0"),
            Some(d) => assert_eq!(fingerprint, format!("fp_0_{}", &d.to_string()[..12])),
        }
        let named = service.receipt(&alice(), &answer).await;
        assert_eq!(named, digest.map(|d| d.0), "{model}");
        said.push(text(&answer).to_owned());
    }
    assert!(
        said[0] != said[1] && said[1] != said[2] && said[0] != said[2],
        "{said:?}"
    );
    let body = json!({"model": "bills", "prompt": "a", "max_tokens": 8, "temperature": 0});
    let (status, answer) = service
        .ask(&bob(), "POST", "/v1/completions", &body.to_string())
        .await;
    assert_eq!(status, StatusCode::OK);
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    let named = service.receipt(&bob(), &answer).await;
    assert_eq!(named, Some(service.adapters[0].digest.0));
}

#[tokio::test]
async fn adapters_are_listed_with_their_base() {
    let service = service();
    let ids = |list: &Value| -> Vec<String> {
        let data = list["data"].as_array().unwrap();
        data.iter()
            .map(|m| m["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let (_, list) = service.get(&alice(), "/v1/models").await;
    assert_eq!(ids(&list), ["tiny", "bills", "letters"]);
    assert_eq!(list["data"][0]["parent"], Value::Null);
    assert_eq!(list["data"][1]["parent"], "tiny");
    assert_eq!(list["data"][1]["root"], "tiny");
    let (status, model) = service.get(&alice(), "/v1/models/letters").await;
    assert_eq!((status, &model["id"]), (StatusCode::OK, &"letters".into()));
}

/// Whom an adapter's grant does not list is told that there is none.
#[tokio::test]
async fn an_adapter_is_for_whom_its_grant_lets_in() {
    let service = service();
    let others = [bob(), Caller::anonymous()];
    for caller in &others {
        let (status, answer) = service.chat(caller, "letters").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        let (unknown_status, unknown) = service.chat(caller, "lettres").await;
        assert_eq!(unknown_status, status);
        let message = |a: &Value| {
            a["error"]["message"]
                .as_str()
                .unwrap()
                .replace("lettres", "letters")
        };
        assert_eq!(message(&answer), message(&unknown));
        let (_, list) = service.get(caller, "/v1/models").await;
        assert_eq!(list["data"].as_array().unwrap().len(), 2);
        let (status, _) = service.get(caller, "/v1/models/letters").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(service.chat(caller, "bills").await.0, StatusCode::OK);
    }
    // A newer grant decides, once it is confirmed.
    let letters = &service.adapters[1];
    letters.withdraw(&Access::Open);
    for caller in &others {
        assert_eq!(
            service.chat(caller, "letters").await.0,
            StatusCode::NOT_FOUND
        );
    }
    letters.replace_users(&Access::Open);
    for caller in &others {
        assert_eq!(service.chat(caller, "letters").await.0, StatusCode::OK);
    }
    // What it takes away is gone before.
    let of = |name: &str, hash| ApiKey {
        name: name.into(),
        hash,
        limits: api_key::Limits::default(),
    };
    let keyed = |keys| Access::Keyed(ApiKeys::new(keys).unwrap());
    let both = vec![of("alice", [1; 32]), of("bob", [2; 32])];
    letters.withdraw(&keyed(both));
    assert!(letters.lets_in(Some(&alice())) && letters.lets_in(Some(&bob())));
    assert!(!letters.lets_in(Some(&Caller::anonymous())) && !letters.lets_in(None));
    letters.withdraw(&keyed(vec![of("bob", [2; 32]), of("carol", [3; 32])]));
    assert!(!letters.lets_in(Some(&alice())) && letters.lets_in(Some(&bob())));
    assert!(!letters.lets_in(Some(&Caller::holder("carol", [3; 32]))));
    letters.withdraw(&keyed(vec![of("carol", [3; 32])]));
    assert!(!letters.lets_in(Some(&bob())) && !letters.lets_in(None));
    letters.withdraw(&Access::Open);
    assert!(!letters.lets_in(Some(&bob())) && !letters.lets_in(None));
}

/// An adapter that changes nothing: what differs is the noise.
#[tokio::test]
async fn an_adapter_has_noise_of_its_own() {
    for perturbation in [None, Some(0.5)] {
        let model = tiny_model();
        let mut adapter = TinyAdapter::default().build(model.config(), model.digest());
        for index in 0..adapter.tensors.len() {
            adapter.set(index, |values| values.fill(0.0));
        }
        let adapter = sealed_and_opened(&adapter);
        let (base, digest) = (model.digest(), adapter.digest());
        let options = EngineOptions {
            compute: Compute::F32,
            threads: 1,
            max_context: 256,
            ..EngineOptions::default()
        };
        let engine = Engine::load_with(model, vec![adapter], &options, None, &Silent).unwrap();
        let policy = Extraction {
            logprobs: Logprobs::Rounded {
                top: 3,
                rounding: 0.001,
                perturbation,
            },
            logit_bias: false,
        };
        let key = PerturbationKey::derive(&DataKey::from_bytes(&[5; 32]), &base);
        let api = Api::new(engine, "tiny".into(), "fp_0".into(), || NOW)
            .with_adapters(Arc::new([Arc::new(offered("none", digest, Access::Open))]))
            .with_extraction(policy, key);
        let router = router(api);
        let mut shown = Vec::new();
        for model in ["tiny", "none"] {
            let body = chat(&json!({"model": model, "logprobs": true, "top_logprobs": 3}));
            let (status, answer) = support::post(&router, "/v1/chat/completions", &body).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            shown.push(answer["choices"][0].clone());
        }
        assert_eq!(text_of(&shown[0]), text_of(&shown[1]));
        assert_eq!(
            shown[0]["logprobs"] == shown[1]["logprobs"],
            perturbation.is_none()
        );
    }
}

fn text_of(choice: &Value) -> &Value {
    &choice["message"]["content"]
}
