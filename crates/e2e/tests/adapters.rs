//! Adapters over the real programs: sealed, granted, chosen by name, named by receipts; and what of them is refused.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use casemate_container::ModelDigest;
use casemate_e2e::{Stage, TINY};
use casemate_testkit::adapters::TinyAdapter;
use casemate_testkit::deployment::{Deployment, EnclaveSettings, Recorder, Role};
use casemate_testkit::models::Tiny;
use serde_json::{Value, json};

/// Short, so that enclaves soon ask the broker again; after half of it there is time left for a request.
const CREDENTIAL_SECONDS: u64 = 30;
const PATIENCE: Duration = Duration::from_secs(120);

fn write_adapter(path: &Path, seed: u64) {
    let adapter = TinyAdapter {
        seed,
        ..TinyAdapter::default()
    };
    let base = Tiny::default().build().config;
    adapter
        .build(&base, ModelDigest([0; 32]))
        .write_peft(path)
        .unwrap();
}

fn settings() -> EnclaveSettings {
    EnclaveSettings {
        threads: 1,
        ..EnclaveSettings::default()
    }
}

/// Everything up to the moment before the enclave starts, with the adapters `bills` and `letters`.
fn until_enclave() -> Stage {
    let mut stage = until_sealed();
    admit(&mut stage.deployment);
    stage
}

fn until_sealed() -> Stage {
    let mut stage = Stage::new().unwrap();
    seal_all(&mut stage);
    stage
}

/// The model and the adapters `bills` and `letters`.
fn seal_all(stage: &mut Stage) {
    let model = stage.tiny_model();
    let [bills, letters] = ["bills", "letters"].map(|name| stage.path(format!("peft-{name}")));
    write_adapter(&bills, 3);
    write_adapter(&letters, 4);
    let deployment = &mut stage.deployment;
    deployment.start_fake_tee().unwrap();
    deployment.start_broker().unwrap();
    deployment.keygen().unwrap();
    deployment.seal(&model, TINY, 1).unwrap();
    deployment.seal_adapter(&bills, "bills", false).unwrap();
    deployment.seal_adapter(&letters, "letters", false).unwrap();
}

fn admit(deployment: &mut Deployment) {
    deployment.configure_enclave(&settings()).unwrap();
    admit_as_configured(deployment);
}

fn admit_as_configured(deployment: &mut Deployment) {
    deployment.measure_enclave().unwrap();
    deployment.write_policies().unwrap();
    deployment.admit_model().unwrap();
}

fn request(method: reqwest::Method, url: &str, body: Option<&Value>) -> Value {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut request = client.request(method, url);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.unwrap();
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
    request(reqwest::Method::POST, &url, Some(&body))
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[test]
fn adapters_are_chosen_by_name_and_proven_by_receipt() {
    let mut stage = until_enclave();
    stage.deployment.start_enclave().unwrap();
    let url = stage.deployment.start_proxy().unwrap().url;
    let verified = stage.deployment.verify().unwrap();
    let mut digests: Vec<_> = stage
        .deployment
        .adapters()
        .iter()
        .map(|a| a.digest.clone())
        .collect();
    let by_name = digests.clone();
    digests.sort_unstable();
    assert_eq!(
        verified["claims"]["model"]["adapters"],
        json!(digests),
        "{verified}"
    );

    let list = request(reqwest::Method::GET, &format!("{url}/v1/models"), None);
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["id"])
        .collect();
    assert_eq!(ids, [TINY, "bills", "letters"]);

    let mut said = Vec::new();
    for (model, digest) in [
        (TINY, None),
        ("bills", Some(&by_name[0])),
        ("letters", Some(&by_name[1])),
    ] {
        let answer = chat(&url, model, "hello", 24);
        said.push(text(&answer).to_owned());
        assert_eq!(
            text(&chat(&url, model, "hello", 24)),
            text(&answer),
            "{model}"
        );
        let id = answer["id"].as_str().unwrap();
        let bundle = request(
            reqwest::Method::GET,
            &format!("{url}/v1/receipts/{id}"),
            None,
        );
        let file = stage.path(format!("{id}.json"));
        fs::write(&file, bundle.to_string()).unwrap();
        let verdict = receipt(&stage, &file, &["--json"]);
        assert!(verdict.status.success(), "{verdict:?}");
        let verdict: Value = serde_json::from_slice(&verdict.stdout).unwrap();
        let named = find(&verdict, "adapter");
        assert_eq!(named, Some(&json!(digest)), "{verdict}");
        let shown = receipt(&stage, &file, &[]);
        let shown = String::from_utf8(shown.stdout).unwrap();
        match digest {
            Some(digest) => assert!(
                shown.contains(&format!("The adapter {digest} was applied")),
                "{shown}"
            ),
            None => assert!(shown.contains("No adapter was applied"), "{shown}"),
        }
    }
    assert!(
        said[0] != said[1] && said[0] != said[2] && said[1] != said[2],
        "{said:?}"
    );
}

/// The first member of that name, wherever it is.
fn find<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    match value {
        Value::Object(map) => map
            .get(name)
            .or_else(|| map.values().find_map(|value| find(value, name))),
        Value::Array(list) => list.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

fn receipt(stage: &Stage, bundle: &Path, more: &[&str]) -> Output {
    let programs = Deployment::programs_of_this_build().unwrap();
    std::process::Command::new(programs.join("casemate"))
        .args(["receipt", "verify"])
        .arg(bundle)
        .arg("--policy")
        .arg(stage.path("user-policy.toml"))
        .args(more)
        .output()
        .unwrap()
}

/// As [`until_enclave`], with the host's own server between enclave and broker.
fn until_enclave_through_the_host() -> (Stage, Recorder) {
    let mut stage = Stage::new().unwrap();
    stage.deployment.credentials_for(CREDENTIAL_SECONDS);
    seal_all(&mut stage);
    let deployment = &mut stage.deployment;
    let config = deployment.configure_enclave(&settings()).unwrap();
    let broker = deployment.broker().unwrap().url.clone();
    let address = broker.trim_start_matches("http://").parse().unwrap();
    let host = Recorder::start(address, None).unwrap();
    let text = fs::read_to_string(&config).unwrap();
    assert_eq!(text.matches(&broker).count(), 1);
    let through = format!("http://{}", host.address());
    fs::write(&config, text.replace(&broker, &through)).unwrap();
    admit_as_configured(deployment);
    (stage, host)
}

/// Starts the enclave, which must end with a denial; its claim.
fn denied_start(stage: &mut Stage) -> String {
    denial(stage)["claim"].as_str().unwrap().to_owned()
}

fn denial(stage: &mut Stage) -> Value {
    let error = stage
        .deployment
        .start_enclave()
        .expect_err("it does not start");
    let error = error.to_string();
    let line = error.lines().find_map(|line| line.strip_prefix("denial: "));
    let line = line.unwrap_or_else(|| panic!("{error}"));
    serde_json::from_str(line).unwrap()
}

#[test]
fn exchanged_adapters_are_refused() {
    let mut stage = until_enclave();
    let paths: Vec<_> = stage
        .deployment
        .adapters()
        .iter()
        .map(|a| a.path.clone())
        .collect();
    let aside = stage.path("aside");
    fs::rename(&paths[0], &aside).unwrap();
    fs::rename(&paths[1], &paths[0]).unwrap();
    fs::rename(&aside, &paths[1]).unwrap();
    // Each is under a key of its own.
    assert_eq!(denied_start(&mut stage), "wrong-key");
    // A model in an adapter's place, under the model's key.
    let model = stage.deployment.sealed().unwrap().path.clone();
    fs::copy(&model, &paths[0]).unwrap();
    assert_eq!(denied_start(&mut stage), "wrong-key");
}

/// Both grants are the provider's, for adapters to the same model, and whoever passes requests on says which is which.
#[test]
fn exchanged_grants_of_two_adapters_end_the_start() {
    let (mut stage, host) = until_enclave_through_the_host();
    let digests: Vec<_> = stage
        .deployment
        .adapters()
        .iter()
        .map(|a| a.digest.clone())
        .collect();
    host.exchange("/model/bills HTTP", "/model/letters HTTP");
    let denial = denial(&mut stage);
    let found = format!(
        "the key broker's grant for the adapter \"bills\" is for {}, and the configuration has {} under that name",
        digests[1], digests[0]
    );
    assert_eq!(
        (&denial["by"], &denial["class"], &denial["claim"]),
        (
            &json!("enclave"),
            &json!("refused"),
            &json!("grant.adapter")
        )
    );
    assert_eq!(denial["found"], json!(found));
    // Nor do the files help that belong to the grants.
    let paths: Vec<_> = stage
        .deployment
        .adapters()
        .iter()
        .map(|a| a.path.clone())
        .collect();
    let aside = stage.path("aside");
    fs::rename(&paths[0], &aside).unwrap();
    fs::rename(&paths[1], &paths[0]).unwrap();
    fs::rename(&aside, &paths[1]).unwrap();
    assert_eq!(denied_start(&mut stage), "grant.adapter");
}

#[test]
fn exchanged_grants_are_not_taken_at_a_renewal_either() {
    let (mut stage, host) = until_enclave_through_the_host();
    stage.deployment.start_enclave().unwrap();
    let url = stage.deployment.start_proxy().unwrap().url;
    let before = chat(&url, "bills", "hello", 24);
    host.exchange("/model/bills HTTP", "/model/letters HTTP");
    let said = "could not be renewed error=the key broker's grant for the adapter \"bills\" is for";
    let start = Instant::now();
    let log = stage.path("logs/casemate-enclave.log");
    while !fs::read_to_string(&log).unwrap().contains(said) {
        assert!(start.elapsed() < PATIENCE, "it is not refused");
        std::thread::sleep(Duration::from_millis(100));
    }
    // As long as the credential holds, and a minute longer, all is as it was.
    assert_eq!(text(&chat(&url, "bills", "hello", 24)), text(&before));
}

/// One adapter, granted to everybody at one path and to API keys at another. The enclave cannot tell which grant came, the
/// broker can.
#[test]
fn the_grant_of_another_path_for_the_same_adapter_ends_the_start() {
    let (mut stage, host) = until_enclave_through_the_host();
    let deployment = &mut stage.deployment;
    deployment.api_key("alice", &[]).unwrap();
    let work = deployment.work_dir().to_path_buf();
    let (adapter, grant) = (deployment.adapters()[0].clone(), work.join("keyed.grant"));
    let made = deployment
        .launch("casemate-grant-keyed", "casemate")
        .arg("grant")
        .option("--data-key", &adapter.data_key)
        .option("--signing-key", &deployment.keys().unwrap().signing_key)
        .option("--model", &adapter.path)
        .option("--api-keys", work.join("api-keys.toml"))
        .option("--out", &grant);
    made.run(&work.join("logs"), false).unwrap();
    let grant = grant.display().to_string();
    let put = ["resource", "put", "default/model/keyed", "--grant", &grant];
    deployment.administer(&put.map(str::as_ref)).unwrap();
    host.exchange("/model/bills HTTP", "/model/keyed HTTP");
    let denial = denial(&mut stage);
    assert_eq!(
        (&denial["by"], &denial["class"], &denial["claim"]),
        (&json!("broker"), &json!("refused"), &json!("received"))
    );
    let found = "default/model/bills was not released in this session";
    assert_eq!(denial["found"], json!(found));
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let mut stage = until_sealed();
    // The same weights under another name: another model.
    let gguf = stage.tiny_model();
    let deployment = &mut stage.deployment;
    let sealed = deployment.sealed().unwrap().clone();
    deployment.seal(&gguf, "other", 1).unwrap();
    let other = deployment.sealed().unwrap().clone();
    assert_ne!(sealed.digest, other.digest);
    admit(deployment);
    assert_eq!(denied_start(&mut stage), "adapter.base");
}

#[test]
fn a_user_whose_policy_lists_no_adapters_accepts_none() {
    let mut stage = until_enclave();
    stage.deployment.start_enclave().unwrap();
    let policy = stage.path("user-policy.toml");
    let text = fs::read_to_string(&policy).unwrap();
    let without: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with("adapters"))
        .collect();
    assert_eq!(without.len() + 1, text.lines().count());
    fs::write(&policy, without.join("\n")).unwrap();
    let error = stage.deployment.verify().err().unwrap().to_string();
    assert!(error.contains("model.adapters"), "{error}");
    // Nor does a broker give keys of adapters that its policy does not list.
    stage.deployment.stop(Role::Enclave);
    let policy = stage.path("broker-policy.toml");
    let text = fs::read_to_string(&policy)
        .unwrap()
        .replace("version = 1\ntee", "version = 2\ntee");
    let without: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with("adapters"))
        .collect();
    fs::write(&policy, without.join("\n")).unwrap();
    let set = ["policy".as_ref(), "set".as_ref(), policy.as_os_str()];
    stage.deployment.administer(&set).unwrap();
    assert_eq!(denied_start(&mut stage), "model.digest");
}
