//! The real adapter of `tools/adapter/medical-bills` over the real model, against what PEFT recorded with both.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use casemate_container::{Adapter, ModelConfig, ModelDigest, Silent};
use casemate_engine::{Compute, Engine, EngineOptions, Request};
use casemate_testkit::data::cached;
use serde_json::Value;
use support::{generate, greedy, open, open_adapter, options, sha256_hex};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/adapter/medical-bills")
}

fn recorded() -> Value {
    let text = fs::read_to_string(directory().join("recorded.json")).unwrap();
    let recorded: Value = serde_json::from_str(&text).unwrap();
    let weights = fs::read(directory().join("adapter_model.safetensors")).unwrap();
    assert_eq!(sha256_hex(&weights), recorded["adapter_sha256"]);
    assert!(weights.len() <= 2 << 20, "{}", weights.len());
    recorded
}

fn adapter(base: ModelDigest, config: &ModelConfig) -> Adapter {
    let source = casemate_import::open_adapter(&directory(), base, Some(config)).unwrap();
    open_adapter(&*source)
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Greedy tokens, and the largest logits of the answer's first token, with the adapter and without.
#[test]
fn answers_are_peft_s_own_with_the_adapter_and_without() {
    let Some(file) = cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let recorded = recorded();
    assert_eq!(
        sha256_hex(&fs::read(&file).unwrap()),
        recorded["model_sha256"]
    );
    let model = open(&*casemate_import::open(&file).unwrap());
    let adapter = adapter(model.digest(), model.config());
    let digest = adapter.digest();
    let options = EngineOptions {
        max_context: 512,
        ..options(Compute::F32)
    };
    let engine = Engine::load_with(model, vec![adapter], &options, None, &Silent).unwrap();
    let answers = recorded["answers"].as_array().unwrap();
    assert!(answers.len() >= 3);
    let mut as_trained = 0;
    for answer in answers {
        let prompt = ids(&answer["prompt_tokens"]);
        for (adapter, theirs) in [(Some(digest), &answer["with"]), (None, &answer["without"])] {
            let mut last = Vec::new();
            let row = |_: usize, row: &[f32]| last = row.to_vec();
            engine.evaluate_with(adapter, &prompt, row).unwrap();
            for logit in theirs["first_logits"].as_array().unwrap() {
                let (id, expected) = (logit[0].as_u64().unwrap(), logit[1].as_f64().unwrap());
                let found = f64::from(last[id as usize]);
                assert!((found - expected).abs() < 0.01, "{id}: {found} {expected}");
            }
            // Up to the first token at which the reference was not sure.
            let gaps = theirs["gaps"].as_array().unwrap();
            let sure = gaps
                .iter()
                .take_while(|gap| gap.as_f64().unwrap() > 0.02)
                .count();
            let expected = ids(&theirs["tokens"]);
            let request = Request {
                adapter,
                ..greedy(&prompt, expected.len())
            };
            let found = generate(&engine, request).ids;
            assert_eq!(found[..sure], expected[..sure], "{adapter:?}");
            assert!(sure >= 4);
        }
        assert_ne!(answer["without"]["text"], answer["trained"]);
        as_trained += usize::from(answer["with"]["text"] == answer["trained"]);
    }
    assert!(2 * as_trained > answers.len(), "{as_trained} as trained");
}
