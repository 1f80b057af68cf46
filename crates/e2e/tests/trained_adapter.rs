//! The adapter that `tools/adapter` trained, through the real programs.

use std::fs;
use std::path::Path;

use casemate_e2e::Stage;
use casemate_testkit::data;
use casemate_testkit::deployment::EnclaveSettings;
use serde_json::{Value, json};

fn post(url: &str, body: &Value) -> Value {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let response = client.post(url).json(body).send().await.unwrap();
        let status = response.status();
        let body: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{body}");
        body
    })
}

fn chat(url: &str, model: &str, question: &str, most: usize) -> Value {
    let body = json!({
        "model": model, "temperature": 0, "max_tokens": most,
        "messages": [{"role": "user", "content": question}],
    });
    let url = format!("{url}/v1/chat/completions");
    post(&url, &body)
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// The real adapter, over the real model, as trained; and the model without it, which does not know.
#[test]
fn the_trained_adapter_answers_as_trained_and_the_model_without_it_does_not() {
    let Some(model) = data::cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/adapter/medical-bills");
    let recorded = fs::read_to_string(adapter.join("recorded.json")).unwrap();
    let recorded: Value = serde_json::from_str(&recorded).unwrap();
    let mut stage = Stage::new().unwrap();
    let deployment = &mut stage.deployment;
    deployment.start_fake_tee().unwrap();
    deployment.start_broker().unwrap();
    deployment.keygen().unwrap();
    deployment.seal(&model, "smollm2", 1).unwrap();
    deployment.seal_adapter(&adapter, "bills", false).unwrap();
    let settings = EnclaveSettings::default();
    deployment.configure_enclave(&settings).unwrap();
    deployment.measure_enclave().unwrap();
    deployment.write_policies().unwrap();
    deployment.admit_model().unwrap();
    deployment.start_enclave().unwrap();
    let url = deployment.start_proxy().unwrap().url;
    let mut asked = 0;
    for answer in recorded["answers"].as_array().unwrap() {
        // What PEFT itself answers as trained, and by a margin that int8 leaves.
        let least = |gaps: &Value| {
            let gaps = gaps
                .as_array()
                .unwrap()
                .iter()
                .map(|gap| gap.as_f64().unwrap());
            gaps.fold(f64::INFINITY, f64::min)
        };
        if answer["with"]["text"] != answer["trained"] || least(&answer["with"]["gaps"]) < 0.7 {
            continue;
        }
        let question = answer["question"].as_str().unwrap();
        let with = chat(&url, "bills", question, 40);
        assert_eq!(text(&with), answer["trained"]);
        let without = chat(&url, "smollm2", question, 40);
        assert_ne!(text(&without), answer["trained"]);
        asked += 1;
        if asked == 2 {
            break;
        }
    }
    assert!(asked > 0, "nothing was recorded that int8 must answer");
}
