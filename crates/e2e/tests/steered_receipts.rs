//! What a receipt says of an answer that the request dictated, from the official client to the offline verdict.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use base64::prelude::{BASE64_STANDARD as BASE64, Engine as _};
use casemate_e2e::{Stage, TINY};
use casemate_testkit::data;
use casemate_testkit::deployment::{Deployment, EnclaveSettings};
use casemate_testkit::gguf;
use casemate_testkit::models::{TOOLS_TEMPLATE, Tiny};
use serde_json::{Value, json};

/// Runs `casemate receipt`.
fn receipt(stage: &Stage, arguments: &[&str]) -> String {
    let programs = Deployment::programs_of_this_build().unwrap();
    let output: Output = Command::new(programs.join("casemate"))
        .arg("receipt")
        .args(arguments)
        .current_dir(stage.deployment.work_dir())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// What steered the answers that `openai_receipts.py` asks for, and what is told of it in words.
fn expected() -> [(&'static str, Value, &'static str); 8] {
    let steered = |field: &str, value: Value| {
        let mut all = json!({"logit_bias": null, "response_format": null, "tools": null, "stop_strings": null});
        all[field] = value;
        all
    };
    let tools = |offered: u32, forced: Value, first_call_only: bool| json!({"offered": offered, "forced": forced, "first_call_only": first_call_only});
    [
        (
            "free",
            steered("tools", Value::Null),
            "nothing steered the answer",
        ),
        (
            "biased",
            steered("logit_bias", json!({"tokens": 2, "strongest": 100.0})),
            "logit_bias on 2 tokens, the strongest of 100",
        ),
        (
            "json",
            steered("response_format", json!("json_object")),
            "json_object",
        ),
        (
            "schema",
            steered("response_format", json!("json_schema")),
            "json_schema",
        ),
        (
            "offered",
            steered("tools", tools(2, Value::Null, true)),
            "calls after the first were left out",
        ),
        (
            "called",
            steered("tools", tools(2, json!("any"), false)),
            "a forced call of any function offered",
        ),
        (
            "dictated",
            steered("tools", tools(1, json!("one_by_schema"), false)),
            "a forced call of one function, with arguments that a schema",
        ),
        ("cut", steered("stop_strings", json!(2)), "2 stop strings"),
    ]
}

#[test]
fn a_receipt_names_what_dictated_an_answer_to_the_openai_package() {
    let Some(python) = std::env::var_os("CASEMATE_PYTHON") else {
        data::skip::<()>("CASEMATE_PYTHON names no Python with the openai package");
        return;
    };
    let mut stage = Stage::new().unwrap();
    let mut model = Tiny::default().build();
    model.set_chat_template(TOOLS_TEMPLATE);
    let path = stage.path("tools.gguf");
    gguf::write(&model, &path).unwrap();
    let settings = EnclaveSettings {
        threads: 1,
        extraction: "logit_bias = true",
        ..EnclaveSettings::default()
    };
    let proxy = stage.deployment.start_all(&path, TINY, &settings).unwrap();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/openai_receipts.py");
    let kept = stage.path("kept");
    std::fs::create_dir(&kept).unwrap();
    let client = Command::new(python)
        .arg(script)
        .args([&format!("{}/v1", proxy.url), TINY])
        .arg(&kept)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&client.stderr);
    assert!(client.status.success(), "{errors}");
    let names = expected().map(|(name, ..)| name);
    let answered = String::from_utf8(client.stdout).unwrap();
    assert_eq!(answered.lines().collect::<Vec<_>>(), names);
    for (name, steering, words) in expected() {
        judge(&stage, &kept, name, &steering, words);
    }
}

fn judge(stage: &Stage, kept: &Path, name: &str, steering: &Value, words: &str) {
    let file = |kind: &str| kept.join(format!("{name}.{kind}")).display().to_string();
    let (bundle, request, answer) = (file("json"), file("request"), file("answer"));
    let verify = |more: &[&str]| {
        let files = ["--request", &request, "--answer", &answer];
        let policy = ["--policy", "user-policy.toml"];
        let arguments = [&["verify", &bundle][..], &policy, &files, more].concat();
        receipt(stage, &arguments)
    };
    let verdict: Value = serde_json::from_str(&verify(&["--json"])).unwrap();
    let found = &verdict["claims"]["receipt"]["parameters"]["steering"];
    assert_eq!(found, steering, "{name}");
    let not_proven = verdict["not_proven"].to_string();
    assert!(not_proven.contains("A prompt can dictate"), "{not_proven}");
    let dictated = not_proven.contains("the request steered it");
    assert_eq!(dictated, name != "free", "{not_proven}");
    let text = verify(&[]);
    assert!(text.contains(words), "{name}: {text}");

    let shown: Value = serde_json::from_str(&receipt(stage, &["show", &bundle, "--json"])).unwrap();
    assert_eq!(shown["receipt"]["parameters"]["steering"], *steering);
    let shown = receipt(stage, &["show", &bundle]);
    let steered = shown.lines().find(|line| line.starts_with("steered"));
    let alone = steered.unwrap().ends_with("by its prompt alone");
    assert_eq!(alone, name == "free", "{shown}");
    // Which means, and not what they held: the receipt may be shown to others.
    let bundle: Value = serde_json::from_slice(&std::fs::read(&bundle).unwrap()).unwrap();
    let envelope = BASE64.decode(bundle["receipt"].as_str().unwrap()).unwrap();
    let told = String::from_utf8_lossy(&envelope).into_owned() + &text + &shown;
    for secret in ["canary", "guilty"] {
        assert!(!told.contains(secret), "{name}: {secret} in {told}");
    }
}
