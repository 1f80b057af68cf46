//! TLS that ends inside the enclave, tried by its user and by somebody in between.

use std::net::SocketAddr;
use std::process::{Command, Output};

use casemate_channel::tls::{ServerKey, client_config, server_name};
use casemate_e2e::search::holds;
use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{Deployment, DeploymentError, Recorder, TlsEnds, http_get};
use serde_json::{Value, json};

fn verify(stage: &Stage, url: &str) -> (Output, Value) {
    let programs = Deployment::programs_of_this_build().unwrap();
    let output = Command::new(programs.join("casemate"))
        .current_dir(stage.deployment.work_dir())
        .args([
            "verify",
            "--json",
            "--policy",
            "user-policy.toml",
            "--service",
            url,
        ])
        .output()
        .unwrap();
    let verdict = serde_json::from_slice(&output.stdout);
    let verdict = verdict.unwrap_or_else(|_| panic!("{output:?}"));
    (output, verdict)
}

fn checks(verdict: &Value) -> Vec<String> {
    let checks = verdict["transcript"]["checks"].as_array().unwrap().iter();
    checks
        .map(|check| format!("{} {}", check["name"], check["status"]))
        .collect()
}

fn stage() -> (Stage, SocketAddr) {
    let mut stage = Stage::until_replicas(1).unwrap();
    stage.deployment.start_replica(0).unwrap();
    let address = stage.deployment.replicas()[0].attested_tls;
    (stage, address)
}

fn ask(url: &str, stream: bool) -> String {
    let body = json!({
        "model": TINY, "temperature": 0, "max_tokens": 8, "stream": stream,
        "messages": [{"role": "user", "content": "canary-90ff13"}],
    });
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client.post(format!("{url}/v1/chat/completions"));
        let response = request.json(&body).send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        assert_eq!(status, 200, "{text}");
        text
    })
}

#[test]
fn the_api_is_served_on_a_verified_connection() {
    let (mut stage, address) = stage();
    let (output, verdict) = verify(&stage, &format!("tls://{address}"));
    assert_eq!(output.status.code(), Some(0), "{verdict}");
    assert_eq!(checks(&verdict)[0], "\"tls.key\" \"passed\"");

    let recorder = Recorder::start(address, None).unwrap();
    let url = format!("tls://{}", recorder.address());
    let proxy = stage.deployment.start_proxy_to(&url).unwrap();
    assert!(ask(&proxy.url, true).ends_with("data: [DONE]\n\n"));
    let answer: Value = serde_json::from_str(&ask(&proxy.url, false)).unwrap();
    assert!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );

    // One connection carried evidence and both requests, and shows nothing of them.
    let recordings = recorder.recordings();
    assert_eq!(recordings.len(), 1);
    for bytes in [&recordings[0].to_server, &recordings[0].to_client] {
        assert!(bytes.len() > 1000);
        for word in [
            "canary-90ff13",
            "chat.completion",
            "max_tokens",
            "attestation",
        ] {
            assert!(!holds(bytes, word), "{word}");
        }
    }
    let replica = format!("http://{}", stage.deployment.replicas()[0].address);
    let metrics = http_get(&replica, "/metrics").unwrap().body;
    assert!(
        metrics.contains("\ncasemate_requests_total 2\n"),
        "{metrics}"
    );
}

#[test]
fn an_answer_over_attested_tls_can_be_proven_offline() {
    let (mut stage, address) = stage();
    let url = format!("tls://{address}");
    let proxy = stage.deployment.start_proxy_to(&url).unwrap();
    let body = json!({
        "model": TINY, "max_tokens": 8,
        "messages": [{"role": "user", "content": "canary-77c1"}],
    })
    .to_string();
    let (request, answer, bundle) = tokio::runtime::Runtime::new().unwrap().block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let post = client.post(format!("{}/v1/chat/completions", proxy.url));
        let response = post.body(body.clone()).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let id = response.headers()["casemate-receipt"].to_str().unwrap();
        let receipt = format!("{}/v1/receipts/{id}", proxy.url);
        let answer = response.bytes().await.unwrap().to_vec();
        let bundle = client.get(receipt).send().await.unwrap();
        assert_eq!(bundle.status(), 200);
        (body, answer, bundle.text().await.unwrap())
    });
    let paths = ["tls.request", "tls.answer", "tls.json", "unbound.json"];
    let [request_file, answer_file, bundle_file, unbound_file] = paths.map(|name| stage.path(name));
    std::fs::write(&request_file, request).unwrap();
    std::fs::write(&answer_file, answer).unwrap();
    std::fs::write(&bundle_file, &bundle).unwrap();
    let mut unbound: Value = serde_json::from_str(&bundle).unwrap();
    let exporter = unbound.as_object_mut().unwrap().remove("tls_exporter");
    assert_eq!(exporter.unwrap().as_str().unwrap().len(), 64);
    std::fs::write(&unbound_file, unbound.to_string()).unwrap();

    let programs = Deployment::programs_of_this_build().unwrap();
    let verify = |bundle: &std::path::Path| -> (Option<i32>, Value) {
        let output = Command::new(programs.join("casemate"))
            .args(["receipt", "verify", "--json"])
            .arg(bundle)
            .arg("--policy")
            .arg(stage.path("user-policy.toml"))
            .arg("--request")
            .arg(&request_file)
            .arg("--answer")
            .arg(&answer_file)
            .output()
            .unwrap();
        let verdict = serde_json::from_slice(&output.stdout);
        (
            output.status.code(),
            verdict.unwrap_or_else(|_| panic!("{output:?}")),
        )
    };
    let (code, verdict) = verify(&bundle_file);
    assert_eq!(code, Some(0), "{verdict}");
    assert_eq!(checks(&verdict)[0], "\"tls.key\" \"skipped\"");
    let passed = "\"report_data\" \"passed\"".to_owned();
    assert!(checks(&verdict).contains(&passed), "{verdict}");
    let not_proven = verdict["not_proven"].to_string();
    assert!(not_proven.contains("TLS connection"), "{verdict}");

    let (code, verdict) = verify(&unbound_file);
    assert_eq!(code, Some(20), "{verdict}");
    assert_eq!(verdict["denial"]["claim"], "report_data", "{verdict}");
}

/// It ends TLS with a key of its own, and relays evidence that the enclave makes for it.
#[test]
fn a_man_in_the_middle_of_attested_tls_is_refused() {
    let (mut stage, address) = stage();
    let own = ServerKey::generate().unwrap();
    let ends = TlsEnds::of(own.config(), client_config().unwrap(), server_name());
    let middle = Recorder::start(address, Some(ends)).unwrap();
    let url = format!("tls://{}", middle.address());
    let (output, verdict) = verify(&stage, &url);
    assert_eq!(output.status.code(), Some(20), "{verdict}");
    assert_eq!(verdict["denial"]["claim"], "tls.key", "{verdict}");
    assert_eq!(verdict["verdict"], "not_genuine");
    // The evidence it relayed is genuine, but about its own connection.
    let failed = "\"report_data\" \"failed\"".to_owned();
    assert!(checks(&verdict).contains(&failed), "{verdict}");
    let proxy = stage.deployment.start_proxy_to(&url);
    assert!(
        matches!(&proxy, Err(DeploymentError::Ended { status, .. }) if status.code() == Some(20))
    );
    let recordings = middle.recordings();
    assert_eq!(recordings.len(), 2);
    for recording in &recordings {
        assert!(holds(&recording.to_client, "\"evidence\""));
        let asked = recording
            .to_server
            .windows(4)
            .filter(|w| w == b"GET ")
            .count();
        assert_eq!(asked, 1, "more was sent than the question for evidence");
    }
}
