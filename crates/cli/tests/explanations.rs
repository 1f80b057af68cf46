//! `casemate explain` has an explanation for whatever can be refused: every claim in the sources, every hostile sample
//! of evidence. And it says what a file is that records no refusal.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

use casemate_attest::measure::{FileDigest, Measurement, Process};
use casemate_attest::{Policy, ReportData, UnixTime, appraise};
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::hostile;
use casemate_testkit::policies::PolicyFile;
use serde_json::{Value, json};

fn explain(input: &str, more: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("input");
    fs::write(&file, input).unwrap();
    Command::new(env!("CARGO_BIN_EXE_casemate"))
        .arg("explain")
        .args(more)
        .arg(&file)
        .output()
        .unwrap()
}

fn explained(input: &str) -> Value {
    let output = explain(input, &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let explained: Value = serde_json::from_slice(&output.stdout).unwrap();
    explained["explanations"].clone()
}

/// Which of these claims have no explanation.
fn unknown(claims: &BTreeSet<String>) -> Vec<String> {
    let lines: Vec<String> = claims
        .iter()
        .map(|claim| json!({ "claim": claim, "found": "" }).to_string())
        .collect();
    let explained = explained(&lines.join("\n"));
    let explained = explained.as_array().unwrap();
    assert_eq!(explained.len(), claims.len());
    explained
        .iter()
        .filter(|explanation| explanation["known"] != true)
        .map(|explanation| explanation["claim"].as_str().unwrap().to_owned())
        .collect()
}

/// A source file of a crate without its tests.
fn source(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let tests = text.find("#[cfg(test)]\nmod tests {");
    text[..tests.unwrap_or(text.len())].to_owned()
}

fn sources(crates: &[&str]) -> Vec<(PathBuf, String)> {
    fn walk(directory: &Path, all: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                walk(&path, all);
            } else if name.ends_with(".rs") && name != "tests.rs" {
                all.push((path.clone(), source(&path)));
            }
        }
    }
    let mut all = Vec::new();
    for name in crates {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
        walk(&root.join("src"), &mut all);
    }
    assert!(all.len() > crates.len());
    all
}

/// The arguments of each call of `function`, up to the end of the second one.
fn calls<'a>(text: &'a str, function: &str) -> Vec<Vec<&'a str>> {
    let mut all = Vec::new();
    for (at, _) in text.match_indices(function) {
        let rest = &text[at + function.len()..];
        all.push(rest.splitn(3, ',').take(2).map(str::trim).collect());
    }
    all
}

fn literal(argument: &str) -> Option<&str> {
    argument.strip_prefix('"')?.strip_suffix('"')
}

/// Claims are named where they are denied, checked or constant. A name that stands in none of these forms would escape
/// the walk, so each way of denying that takes a variable is counted.
#[test]
fn every_claim_in_the_sources_has_an_explanation() {
    let crates = [
        "attest",
        "channel",
        "release",
        "broker",
        "enclave",
        "cli",
        "container",
    ];
    let mut claims = BTreeSet::new();
    let mut variables = BTreeSet::new();
    for (path, text) in sources(&crates) {
        for function in [
            "Denial::refused(",
            "Denial::not_genuine(",
            "Denial::malformed(",
        ] {
            for call in calls(&text, function) {
                match literal(call[0]) {
                    Some(claim) => claims.insert(claim.to_owned()),
                    None => variables.insert(call[0].to_owned()),
                };
            }
        }
        for function in [".check(", ".claim(", ".pass(", ".skip("] {
            let found = calls(&text, function);
            let found = found.iter().filter_map(|call| literal(call[0]));
            claims.extend(found.filter(|claim| is_claim(claim)).map(str::to_owned));
        }
        for function in ["Failure::new(", "Refusal::new("] {
            for call in calls(&text, function) {
                let code = call.get(1).and_then(|code| literal(code));
                claims.extend(code.map(str::to_owned));
            }
        }
        // Constants, and fields of reports, are the texts with dots in them.
        let in_verification = [
            "attest/src",
            "channel/src/verify",
            "channel/src/receipt/verify",
            "enclave/src/denial",
        ];
        let shown = path.to_string_lossy().into_owned();
        // These two name fields of quotes and of policy files in the same way.
        let fields = ["attest/src/quote.rs", "attest/src/policy/file.rs"];
        let fields = fields.iter().any(|end| shown.ends_with(end));
        if in_verification.iter().any(|part| shown.contains(part)) && !fields {
            let texts = text.split('"').skip(1).step_by(2);
            claims.extend(
                texts
                    .filter(|text| text.contains('.') && is_claim(text))
                    .map(str::to_owned),
            );
        }
        if shown.ends_with("enclave/src/api/error.rs") {
            let codes = text.split("Self::invalid(").skip(1);
            let codes = codes.filter_map(|rest| literal(rest.split(',').nth(1)?.trim()));
            claims.extend(codes.map(str::to_owned));
        }
        if shown.ends_with("cli/src/proxy/refusal.rs") {
            let codes = text.split(": &str = \"").skip(1);
            claims.extend(codes.map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
        if shown.ends_with("broker/src/api.rs") {
            let kinds = text.split("StatusCode::").skip(1);
            let kinds = kinds.filter_map(|rest| literal(rest.split([',', ')']).nth(1)?.trim()));
            claims.extend(kinds.map(str::to_owned));
        }
        if shown.ends_with("container/src/error.rs") {
            let codes = text.split("=> \"").skip(1);
            claims.extend(codes.map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
    }
    for known in [
        "debug",
        "chunk",
        "measurement.rtmr2",
        "credential.issuer",
        "key_refused",
        "service_not_verified",
        "nonce",
        "no_policy",
        "invalid_value",
        "receipt.time",
    ] {
        assert!(claims.contains(known), "the walk does not find {known}");
    }
    assert!(claims.len() > 100, "{claims:?}");
    // Variables whose values are found by the other rules.
    for variable in &variables {
        let known = ["claim", "structure"].contains(&variable.as_str());
        assert!(known, "a claim in the variable {variable}");
    }
    assert_eq!(unknown(&claims), [""; 0]);
}

fn is_claim(text: &str) -> bool {
    let word = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_lowercase())
            && part
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let file = [".rs", ".json", ".pem", ".toml", ".jinja", ".casemate"];
    text.split('.').all(word) && !file.iter().any(|end| text.ends_with(end))
}

#[test]
fn every_hostile_sample_is_explained() {
    let now = UnixTime::try_from(SystemTime::now()).unwrap();
    let tee = FakeTee::ephemeral(now.as_secs()).unwrap();
    let measurement = Measurement::of_process(&Process {
        executable: FileDigest::of(b"program"),
        arguments: &[c"--config", c"enclave.toml"],
        environment: &[],
        config: Some(FileDigest::of(b"[service]\n")),
    });
    let report_data = ReportData::new([0x42; 64]);
    let policy = PolicyFile::new(tee.root_spki_sha256(), measurement).to_toml();
    let policy = Policy::from_toml(&policy).unwrap();
    let mut explained_samples = 0;
    for sample in hostile::samples(&tee, &measurement, &report_data, now.as_secs()).unwrap() {
        let appraisal = appraise(&sample.evidence, &report_data, &policy, now);
        let denial = appraisal.outcome.unwrap_err();
        let verdict = json!({ "denial": denial, "transcript": appraisal.transcript });
        let all = explained(&verdict.to_string());
        assert_eq!(all[0]["claim"], sample.claim, "{}", sample.name);
        for explanation in all.as_array().unwrap() {
            assert_eq!(explanation["known"], true, "{}: {explanation}", sample.name);
            assert_ne!(explanation["found"], "", "{}: {explanation}", sample.name);
        }
        explained_samples += 1;
    }
    assert!(explained_samples > 40);
}

#[test]
fn people_get_claim_found_expected_cause_and_remedy() {
    let denial = r#"{"by":"broker","class":"refused","claim":"measurement.mr_td","found":"aa","expected":"bb","remedy":"look"}"#;
    let log = format!("INFO starting\nerror: refused\ndenial: {denial}\n");
    let output = explain(&log, &[]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "measurement.mr_td  (refused by the broker, refused)",
        "claim     The program in the TEE is",
        "found     aa",
        "expected  bb",
        "likely    Another build",
        "to do     Ask the provider",
    ] {
        assert!(text.contains(part), "{part:?}: {text}");
    }
}

#[test]
fn other_files_are_named_with_the_command_that_reads_them() {
    for (input, said) in [
        ("GGUF\u{3}", "casemate seal"),
        ("version = 1\ntee = [\"tdx\"]\n", "--policy"),
        ("hello", "without a refusal"),
        ("", "empty"),
    ] {
        let output = explain(input, &[]);
        assert_eq!(output.status.code(), Some(10), "{input}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(said), "{text}");
    }
    let missing = Command::new(env!("CARGO_BIN_EXE_casemate"))
        .args(["explain", "/no/such/file"])
        .output()
        .unwrap();
    assert_eq!(missing.status.code(), Some(40));
}
