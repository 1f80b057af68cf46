//! A user's view: the whole path works, with the official client and with a real model.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_e2e::search::holds;
use casemate_e2e::{Stage, TINY};
use casemate_testkit::data;
use casemate_testkit::deployment::{EnclaveSettings, http_get};
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use serde_json::{Value, json};

/// Runs a script with the official client, which must find at least `least` things in order.
fn run_client(script: &str, url: &str, more: &[String], least: usize) {
    let Some(python) = std::env::var_os("CASEMATE_PYTHON") else {
        data::skip::<()>("CASEMATE_PYTHON names no Python with the openai package");
        return;
    };
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(script);
    let output = Command::new(python)
        .arg(script)
        .args([&format!("{url}/v1"), TINY])
        .args(more)
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}\n{errors}");
    let checks = shown.lines().count();
    assert!(checks >= least, "only {checks} checks ran:\n{shown}");
}

#[test]
fn the_openai_package_is_served_through_the_proxy() {
    let (_stage, url) = Stage::complete().unwrap();
    run_client("tests/openai_client.py", &url, &[], 30);
}

#[test]
fn the_openai_package_reads_logprobs_json_and_calls() {
    let mut stage = Stage::new().unwrap();
    // Functions take many tokens where a token is a byte.
    let tiny = Tiny {
        context: 4096,
        ..Tiny::default()
    };
    let mut model = tiny.build();
    let tokens = model.offer_calls().map(|id| id.to_string());
    let path = stage.path("tools.gguf");
    gguf::write(&model, &path).unwrap();
    let settings = EnclaveSettings {
        threads: 1,
        max_context: 4096,
        extraction: "logprobs = { top = 3, rounding = 0.1 }\nlogit_bias = true",
        ..EnclaveSettings::default()
    };
    let proxy = stage.deployment.start_all(&path, TINY, &settings).unwrap();
    run_client("tests/openai_features.py", &proxy.url, &tokens, 21);
}

#[test]
fn the_demo_model_knows_the_capital_of_france() {
    let Some(model) = data::cached("SmolLM2-135M-Instruct.Q4_1.gguf") else {
        return;
    };
    let mut stage = Stage::new().unwrap();
    let settings = EnclaveSettings::default();
    let proxy = stage
        .deployment
        .start_all(&model, "smollm2", &settings)
        .unwrap();
    let answer = chat(&proxy.url, "smollm2", "What is the capital of France?", 32);
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(text.contains("Paris"), "{text}");
    let sealed = stage.deployment.sealed().unwrap();
    let fingerprint = answer["system_fingerprint"].as_str().unwrap();
    assert_eq!(fingerprint, format!("fp_{}", &sealed.digest[..12]));
}

#[test]
fn a_client_that_hangs_up_stops_its_generation() {
    let (stage, url) = Stage::complete().unwrap();
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let body = json!({
            "model": TINY, "stream": true, "n": 8, "max_tokens": 100_000,
            "messages": [{"role": "user", "content": "go on"}],
        });
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client
            .post(format!("{url}/v1/chat/completions"))
            .json(&body);
        let mut response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.chunk().await.unwrap().unwrap();
        drop(response);
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    // The two figures are read one after the other, so both are waited for.
    let held =
        || gauge(&enclave, "casemate_requests_running") + gauge(&enclave, "casemate_kv_bytes_used");
    while held() > 0.0 {
        assert!(
            Instant::now() < deadline,
            "the abandoned answers still run, or hold memory"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nothing_a_user_said_is_in_logs_metrics_or_the_brokers_store() {
    let (stage, url) = Stage::complete().unwrap();
    let canary = "canary-5d1c0a";
    let answer = chat(&url, TINY, canary, 16);
    assert!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let metrics = http_get(&enclave, "/metrics").unwrap().body;
    assert!(!holds(metrics.as_bytes(), canary));
    let mut searched = 0;
    let mut directories = vec![stage.deployment.work_dir().to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.is_file() {
                let bytes = std::fs::read(&path).unwrap();
                let found = holds(&bytes, canary);
                assert!(!found, "{} holds the prompt", path.display());
                searched += 1;
            }
        }
    }
    assert!(searched > 8, "only {searched} files were searched");
}

#[test]
fn prompts_in_clear_are_refused_by_the_enclave() {
    let (stage, _) = Stage::complete().unwrap();
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let reply = http_get(&enclave, "/v1/models").unwrap();
    assert_eq!(reply.status, 403);
    assert!(reply.body.contains("casemate proxy"), "{}", reply.body);
}

fn chat(url: &str, model: &str, question: &str, max_tokens: u32) -> Value {
    let body = json!({
        "model": model, "temperature": 0, "max_tokens": max_tokens,
        "messages": [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": question},
        ],
    });
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client
            .post(format!("{url}/v1/chat/completions"))
            .json(&body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.json().await.unwrap()
    })
}

fn gauge(enclave: &str, name: &str) -> f64 {
    let metrics = http_get(enclave, "/metrics").unwrap().body;
    let value = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name} in {metrics}"))
        .parse()
        .unwrap()
}
