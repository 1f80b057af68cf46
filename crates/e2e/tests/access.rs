//! Who may ask, from the provider's list to the running enclave: taking a key away, and opening a service on purpose only.

use std::fs;
use std::time::{Duration, Instant};

use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::EnclaveSettings;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);
/// Short, so that enclaves soon see what the broker has now.
const CREDENTIAL_SECONDS: u64 = 10;

async fn ask(url: &str, key: Option<&str>) -> u16 {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json!({ "model": TINY, "prompt": "go", "max_tokens": 1 });
    let mut request = client.post(format!("{url}/v1/completions")).json(&body);
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    request.send().await.unwrap().status().as_u16()
}

/// Asks until the status is this one.
fn until(url: &str, key: Option<&str>, status: u16) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let start = Instant::now();
    while runtime.block_on(ask(url, key)) != status {
        assert!(start.elapsed() < PATIENCE, "never {status}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn said(stage: &Stage) -> Vec<String> {
    let log = fs::read_to_string(stage.path("logs/casemate-enclave.log")).unwrap();
    let said = log.lines().filter_map(|line| line.split_once(" access: "));
    said.map(|(_, said)| said.to_owned()).collect()
}

#[test]
fn the_enclave_says_who_may_ask_and_a_removed_key_ends_with_a_renewal() {
    let mut stage = Stage::until_enclave_with(EnclaveSettings::default(), |deployment| {
        deployment.credentials_for(CREDENTIAL_SECONDS);
    })
    .unwrap();
    let alice = stage.deployment.api_key("alice", &[]).unwrap();
    let bob = stage.deployment.api_key("bob", &[]).unwrap();
    stage.deployment.admit_model().unwrap();
    stage.deployment.start_enclave().unwrap();
    let url = stage.deployment.start_proxy().unwrap().url;
    until(&url, Some(&bob), 200);
    until(&url, None, 401);
    assert_eq!(said(&stage), ["2 API keys"]);

    let remove = stage
        .deployment
        .launch("casemate-apikey", "casemate")
        .arg("apikey")
        .arg("remove")
        .arg("bob")
        .option("--file", stage.path("api-keys.toml"));
    remove.run(&stage.path("logs"), false).unwrap();
    stage.deployment.admit_model().unwrap();
    until(&url, Some(&bob), 401);
    until(&url, Some(&alice), 200);
    assert_eq!(said(&stage), ["2 API keys", "1 API key, changed"]);

    // Renewed by somebody who forgot the list.
    fs::remove_file(stage.path("api-keys.toml")).unwrap();
    let error = stage.deployment.admit_model().unwrap_err().to_string();
    assert!(error.contains("asked for API keys"), "{error}");
    until(&url, None, 401);
    // And by somebody who means it.
    let resource = format!("default/model/{TINY}");
    let grant = stage.path("grant").display().to_string();
    let put = ["resource", "put", &resource, "--grant", &grant, "--open"];
    stage.deployment.administer(&put.map(str::as_ref)).unwrap();
    until(&url, None, 200);
    let said = said(&stage);
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said[2].starts_with("open to anybody"), "{said:?}");
}

/// It is refused while most of it is still to come, at either door.
#[test]
fn who_has_a_wrong_key_learns_so_however_large_its_request_is() {
    let mut stage = Stage::until_replicas(1).unwrap();
    let alice = stage.deployment.api_key("alice", &[]).unwrap();
    stage.deployment.admit_model().unwrap();
    let replica = stage.deployment.start_replica(0).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let prompt = "go ".repeat(1_300_000);
    let body = json!({ "model": TINY, "prompt": prompt, "max_tokens": 1 });
    for service in [replica.url, replica.attested_tls.unwrap()] {
        let url = stage.deployment.start_proxy_to(&service).unwrap().url;
        for _ in 0..4 {
            let request = client.post(format!("{url}/v1/completions"));
            let request = request.bearer_auth(format!("{alice}0")).json(&body);
            let (status, text) = runtime.block_on(async {
                let answer = request.send().await.unwrap();
                (answer.status(), answer.text().await.unwrap())
            });
            assert_eq!(status, 401, "{service}: {text}");
            assert!(text.contains("invalid_api_key"), "{service}: {text}");
        }
        assert_eq!(runtime.block_on(ask(&url, Some(&alice))), 200, "{service}");
    }
}
