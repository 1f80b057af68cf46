//! An untrusted worker computes the products of public matrices, and nobody can tell from the answers.

use std::time::{Duration, Instant};

use casemate_e2e::namespaces::Namespace;
use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{Deployment, EnclaveSettings, Role, WorkerPlace, http_get};
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
    stage_with(public, offload, |deployment| {
        if offload.is_some() {
            deployment.start_worker().unwrap();
        }
    })
}

/// As [`stage`], with other workers.
fn stage_with(
    public: &[&str],
    offload: Option<&'static str>,
    workers: impl FnOnce(&mut Deployment),
) -> (Stage, String) {
    let mut stage = Stage::until_enclave_with(settings(offload), |deployment| {
        deployment.publish_tensors(public);
        workers(deployment);
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

/// Two hosts for workers: network namespaces with addresses of their own, or where this machine permits none, two
/// addresses of the loopback interface, which is less and is said.
fn two_hosts() -> (Vec<Namespace>, [WorkerPlace; 2]) {
    let namespaces: std::io::Result<Vec<Namespace>> =
        [0, 1].map(Namespace::new).into_iter().collect();
    match namespaces {
        Ok(hosts) => {
            let places = [hosts[0].place(), hosts[1].place()];
            eprintln!("each worker runs in a network namespace of its own: {places:?}");
            (hosts, places)
        }
        Err(error) => {
            eprintln!(
                "no network namespaces here ({error}): workers run on two loopback addresses INSTEAD"
            );
            let place = |address: [u8; 4]| WorkerPlace {
                address: address.into(),
                through: vec![],
            };
            (vec![], [place([127, 0, 0, 2]), place([127, 0, 0, 3])])
        }
    }
}

#[tokio::test]
async fn two_workers_on_two_hosts_have_a_share_each_and_answers_are_the_same() {
    let expected = {
        let (_stage, url) = stage(&["*"], None);
        answers(&url).await
    };
    let (hosts, places) = two_hosts();
    let start = |deployment: &mut Deployment| deployment.start_two_workers(&places).unwrap();
    let (mut stage, url) = stage_with(&["*"], Some("full-linear"), start);
    let rows = |stage: &Stage| metric(&stage.deployment, "offload_rows_total");
    let end = Instant::now() + Duration::from_secs(300);
    while rows(&stage) == 0.0 {
        assert!(Instant::now() < end, "no worker is asked");
        assert_eq!(answers(&url).await, expected);
    }
    assert_eq!(answers(&url).await, expected);
    for none in ["masks_made_total", "misconduct_total", "failures_total"] {
        assert_eq!(
            metric(&stage.deployment, &format!("offload_{none}")),
            0.0,
            "{none}"
        );
    }
    // One alone has a share that says nothing, and computes nothing.
    stage.deployment.stop(Role::Worker);
    assert_eq!(answers(&url).await, expected);
    let alone = rows(&stage);
    assert_eq!(answers(&url).await, expected);
    assert_eq!(rows(&stage), alone, "only one was there to compute them");
    drop(stage);
    drop(hosts);
}

/// What another key says is not listened to, and nothing is sent to who has it.
#[tokio::test]
async fn a_worker_with_another_key_gets_nothing() {
    let (_hosts, places) = two_hosts();
    let other_key = |deployment: &mut Deployment| {
        deployment.start_two_workers(&places).unwrap();
        deployment.expect_another_key();
    };
    let (stage, url) = stage_with(&["*"], Some("full-linear"), other_key);
    let end = Instant::now() + Duration::from_secs(300);
    while metric(&stage.deployment, "offload_failures_total") == 0.0 {
        assert!(Instant::now() < end, "the other key is not noticed");
        assert_eq!(answers(&url).await.len(), 5);
    }
    assert_eq!(answers(&url).await.len(), 5);
    assert_eq!(metric(&stage.deployment, "offload_rows_total"), 0.0);
    let log = std::fs::read_to_string(stage.path("logs/casemate-enclave.log")).unwrap();
    assert!(
        log.contains("has not the pinned key") || log.contains("is not the pinned worker"),
        "{log}"
    );
}

#[tokio::test]
async fn masks_may_lie_in_a_file_and_answers_are_the_same() {
    let expected = {
        let (_stage, url) = stage(&["*"], None);
        answers(&url).await
    };
    let (stage, url) = stage_with(&["*"], Some("full-linear"), |deployment| {
        deployment.start_worker().unwrap();
        // Memory for few masks, and a file for some hundred more.
        deployment.spill_masks(100_000, 4 << 20);
    });
    wait_for_masks(&stage.deployment);
    let end = Instant::now() + Duration::from_secs(300);
    while metric(&stage.deployment, "offload_rows_total") < 512.0 {
        assert!(Instant::now() < end, "masks do not come back");
        assert_eq!(answers(&url).await, expected);
    }
    assert_eq!(metric(&stage.deployment, "offload_misconduct_total"), 0.0);
    let left = std::fs::read_dir(stage.path(".")).unwrap();
    let named = left.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("casemate-masks")
    });
    assert_eq!(named.count(), 0, "the file has no name");
}
