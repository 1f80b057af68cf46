//! The adapter that `tools/adapter` trained, through the real programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_e2e::Stage;
use casemate_e2e::watch::metric;
use casemate_testkit::data;
use casemate_testkit::deployment::{EnclaveSettings, Role};
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

fn adapter() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/adapter/medical-bills")
}

fn recorded() -> Vec<Value> {
    let recorded = fs::read_to_string(adapter().join("recorded.json")).unwrap();
    let recorded: Value = serde_json::from_str(&recorded).unwrap();
    let answers = recorded["answers"].as_array().unwrap().iter();
    // What PEFT itself answers as trained, and by a margin that int8 leaves.
    let least = |gaps: &Value| {
        let gaps = gaps.as_array().unwrap().iter();
        gaps.map(|gap| gap.as_f64().unwrap())
            .fold(f64::INFINITY, f64::min)
    };
    let sure = answers
        .filter(|a| a["with"]["text"] == a["trained"] && least(&a["with"]["gaps"]) >= 0.7)
        .cloned();
    let sure: Vec<_> = sure.take(2).collect();
    assert!(
        !sure.is_empty(),
        "nothing was recorded that int8 must answer"
    );
    sure
}

/// Everything up to the moment before the enclave starts.
fn until_enclave(stage: &mut Stage, model: &Path, settings: &EnclaveSettings) {
    let deployment = &mut stage.deployment;
    deployment.start_fake_tee().unwrap();
    deployment.start_broker().unwrap();
    deployment.keygen().unwrap();
    deployment.seal(model, "smollm2", 1).unwrap();
    deployment.seal_adapter(&adapter(), "bills", false).unwrap();
    let config = deployment.configure_enclave(settings).unwrap();
    // Masks for a whole prompt.
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("pool_bytes = 8388608", "pool_bytes = 167772160");
    fs::write(&config, text).unwrap();
    deployment.measure_enclave().unwrap();
    deployment.write_policies().unwrap();
    deployment.admit_model().unwrap();
}

/// The real adapter, over the real model, as trained; and the model without it, which does not know.
#[test]
fn the_trained_adapter_answers_as_trained_and_the_model_without_it_does_not() {
    let Some(model) = data::cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let mut stage = Stage::new().unwrap();
    until_enclave(&mut stage, &model, &EnclaveSettings::default());
    stage.deployment.start_enclave().unwrap();
    let url = stage.deployment.start_proxy().unwrap().url;
    for answer in recorded() {
        let question = answer["question"].as_str().unwrap();
        let with = chat(&url, "bills", question, 40);
        assert_eq!(text(&with), answer["trained"]);
        let without = chat(&url, "smollm2", question, 40);
        assert_ne!(text(&without), answer["trained"]);
    }
}

/// Prompt and answer, with a worker for every product and after it has gone: the adapter stays inside, and nobody can tell.
#[test]
fn the_trained_adapter_answers_the_same_with_a_worker_and_without() {
    let Some(model) = data::cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let mut stage = Stage::new().unwrap();
    stage.deployment.publish_tensors(&["*"]);
    stage.deployment.start_worker().unwrap();
    let settings = EnclaveSettings {
        compute: "int8-row",
        offload: Some("full-linear"),
        ..EnclaveSettings::default()
    };
    until_enclave(&mut stage, &model, &settings);
    let enclave = stage.deployment.start_enclave().unwrap().url;
    let url = stage.deployment.start_proxy().unwrap().url;
    let figure = |name: &str| metric(&enclave, &format!("casemate_offload_{name}")).unwrap();
    // Four stacks of each of 30 blocks, and the head. Figures are rounded up to powers of two, so this says more than 16,384,
    // which is more than 130 rows of each; shelves are filled evenly.
    let log = stage.path("logs/casemate-enclave.log");
    let admitted = || {
        let log = fs::read_to_string(&log).unwrap();
        log.contains("the worker holds all matrices")
    };
    let end = Instant::now() + Duration::from_secs(600);
    while figure("masks_made_total") < 32_768.0 || !admitted() {
        assert!(Instant::now() < end, "no masks or no worker in time");
        std::thread::sleep(Duration::from_millis(200));
    }
    let answer = &recorded()[0];
    let question = answer["question"].as_str().unwrap();
    let ask =
        || ["bills", "smollm2"].map(|model| chat(&url, model, question, 40)["choices"].clone());
    let outside = ask();
    assert_eq!(outside[0][0]["message"]["content"], answer["trained"]);
    assert_ne!(outside[1][0]["message"]["content"], answer["trained"]);
    // More than 8,192, and the tokens of both answers, 63 at most, have no more than 7,623: so the prompt's were among them.
    assert!(figure("rows_total") >= 16_384.0, "{}", figure("rows_total"));
    assert_eq!(figure("misconduct_total"), 0.0);
    assert_eq!(figure("failures_total"), 0.0);

    stage.deployment.stop(Role::Worker);
    let rows = figure("rows_total");
    assert_eq!(ask(), outside);
    assert_eq!(ask(), outside);
    assert_eq!(figure("rows_total"), rows, "nobody was there");
    assert!(figure("rows_without_worker_total") > 0.0);
}
