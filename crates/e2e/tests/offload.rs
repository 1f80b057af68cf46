//! An untrusted worker computes the products of public matrices, and nobody can tell from the answers.

use std::time::{Duration, Instant};

use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{Deployment, EnclaveSettings, Role, http_get};
use serde_json::{Value, json};

fn settings(offload: Option<&'static str>) -> EnclaveSettings {
    EnclaveSettings {
        compute: "int8-row",
        threads: 1,
        offload,
        ..EnclaveSettings::default()
    }
}

/// A whole deployment over a tiny model of which these tensors are public, and the proxy's address.
fn stage(public: &[&str], offload: Option<&'static str>) -> (Stage, String) {
    let mut stage = Stage::until_enclave_with(settings(offload), |deployment| {
        deployment.publish_tensors(public);
        if offload.is_some() {
            deployment.start_worker().unwrap();
        }
    })
    .unwrap();
    stage.deployment.start_enclave().unwrap();
    let proxy = stage.deployment.start_proxy().unwrap();
    (stage, proxy.url)
}

/// Prompts of several lengths, greedy and sampled, and what comes of them.
async fn answers(url: &str) -> Vec<Value> {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let long = "what a worker sees is uniform ".repeat(12);
    let mut answers = Vec::new();
    for (prompt, temperature) in [
        ("a", 0.0),
        ("patient 4711", 0.0),
        (long.as_str(), 0.0),
        ("b", 1.0),
        (long.as_str(), 1.0),
    ] {
        let body = json!({
            "model": TINY, "prompt": prompt, "max_tokens": 24, "temperature": temperature, "seed": 7,
        });
        let request = client.post(format!("{url}/v1/completions")).json(&body);
        let answer: Value = request.send().await.unwrap().json().await.unwrap();
        assert!(answer["choices"][0]["text"].is_string(), "{answer}");
        answers.push(answer["choices"].clone());
    }
    answers
}

fn metric(deployment: &Deployment, name: &str) -> f64 {
    let text = http_get(&deployment.enclave().unwrap().url, "/metrics").unwrap();
    let line = text
        .body
        .lines()
        .find_map(|line| line.strip_prefix(&format!("casemate_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {}", text.body))
        .parse()
        .unwrap()
}

/// Waits until the worker is admitted and there are masks.
fn wait_for_masks(deployment: &Deployment) {
    let end = Instant::now() + Duration::from_secs(300);
    while metric(deployment, "offload_masks_ready") < 1.0 {
        assert!(Instant::now() < end, "no masks in time");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test]
async fn answers_are_the_same_with_a_worker_without_and_when_it_dies() {
    let expected = {
        let (_stage, url) = stage(&["*"], None);
        answers(&url).await
    };
    let (mut stage, url) = stage(&["*"], Some("full-linear"));
    wait_for_masks(&stage.deployment);
    let rows = |stage: &Stage| metric(&stage.deployment, "offload_rows_total");
    assert_eq!(answers(&url).await, expected);
    assert!(rows(&stage) > 0.0, "nothing was computed outside");
    assert_eq!(metric(&stage.deployment, "offload_misconduct_total"), 0.0);

    stage.deployment.stop(Role::Worker);
    assert_eq!(answers(&url).await, expected);
    let alone = rows(&stage);
    assert_eq!(answers(&url).await, expected);
    assert_eq!(rows(&stage), alone, "nobody was there to compute them");

    // It comes back, and is believed as little as before.
    stage.deployment.start_worker().unwrap();
    let end = Instant::now() + Duration::from_secs(300);
    while rows(&stage) == alone {
        assert!(Instant::now() < end, "the worker is not asked again");
        assert_eq!(answers(&url).await, expected);
    }
}

#[test]
fn a_plan_that_the_provider_did_not_allow_ends_the_start() {
    let mut stage = Stage::until_enclave_with(settings(Some("full-linear")), |deployment| {
        deployment.start_worker().unwrap();
    })
    .unwrap();
    let refused = stage.deployment.start_enclave().unwrap_err().to_string();
    assert!(refused.contains("does not mark public"), "{refused}");
    assert!(refused.contains("--public"), "{refused}");
}

#[tokio::test]
async fn what_is_private_stays_inside_though_the_plan_would_send_it() {
    let (stage, url) = stage(&["*.ffn_*"], Some("full-linear"));
    wait_for_masks(&stage.deployment);
    assert_eq!(answers(&url).await.len(), 5);
    assert!(metric(&stage.deployment, "offload_rows_total") > 0.0);
}
