//! `casemate rollback` as a provider runs it.

use std::path::PathBuf;
use std::process::{Command, Output};

use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_container::{DataKey, ModelDigest};
use casemate_release::api_key::Access;
use casemate_release::grant::KeyGrant;
use casemate_release::rollback::{Target, VerifiedRollback, sha256};
use casemate_testkit::policies::PolicyFile;
use serde_json::Value;
use tempfile::TempDir;

struct Files {
    directory: TempDir,
    provider: SigningKey,
    issuer: VerifyingKey,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let provider = SigningKey::generate();
        provider
            .write_file(&directory.path().join("sign.pem"), false)
            .unwrap();
        Self {
            directory,
            provider,
            issuer: SigningKey::generate().verifying_key(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn rollback(&self, kind: &str, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_casemate"))
            .args(["rollback", kind, "--issuer", &self.issuer.to_string()])
            .arg("--signing-key")
            .arg(self.at("sign.pem"))
            .arg("--out")
            .arg(self.at("rollback"))
            .args(arguments)
            .output()
            .unwrap()
    }

    fn written(&self, now: u64) -> VerifiedRollback {
        let envelope = std::fs::read(self.at("rollback")).unwrap();
        let provider = self.provider.verifying_key();
        VerifiedRollback::verify(&envelope, &provider, &self.issuer, now).unwrap()
    }
}

fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_policy_is_named_by_its_bytes_and_versions() {
    let files = Files::new();
    let measurement = casemate_attest::measure::Measurement {
        mr_td: [1; 48],
        mr_config_id: [2; 48],
        rtmr: [[0; 48]; 4],
    };
    let text = PolicyFile::new([3; 32], measurement).to_toml();
    let version = casemate_attest::Policy::from_toml(&text).unwrap().version();
    let policy = files.at("policy.toml");
    std::fs::write(&policy, &text).unwrap();
    let policy = policy.to_str().unwrap();

    let output = files.rollback("policy", &["--policy", policy, "--from", "9", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["to_version"], version);
    let verified = files.written(now());
    verified
        .check_step(&Target::Policy, 9, version, text.as_bytes())
        .unwrap();
    let life = verified.claims().expires_at - now();
    assert!((3000..=3600).contains(&life), "an hour, if nothing is said");

    // Never over another file by mistake, and never up.
    let output = files.rollback("policy", &["--policy", policy, "--from", "9"]);
    assert_eq!(output.status.code(), Some(40), "{}", stderr(&output));
    let from = version.to_string();
    let up = ["--policy", policy, "--from", &from, "--force"];
    let output = files.rollback("policy", &up);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let long = ["--policy", policy, "--from", "9", "--lifetime", "604801"];
    assert_eq!(files.rollback("policy", &long).status.code(), Some(2));
}

#[test]
fn a_model_is_named_by_its_grant_and_path() {
    let files = Files::new();
    let grant = |signer: &SigningKey| {
        KeyGrant {
            model_digest: ModelDigest([7; 32]),
            model_name: "tiny".into(),
            minimum_version: 2,
            data_key: DataKey::from_bytes(&[1; 32]),
            access: Access::Open,
        }
        .sign(signer)
        .unwrap()
    };
    let envelope = grant(&files.provider);
    std::fs::write(files.at("old.grant"), &*envelope).unwrap();
    let path = files.at("old.grant");
    let path = path.to_str().unwrap();
    let resource = "default/model/tiny";
    let arguments = ["--grant", path, "--resource", resource, "--from", "5"];
    let output = files.rollback("model", &arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let target = Target::Model {
        path: resource.parse().unwrap(),
        name: "tiny".into(),
    };
    let verified = files.written(now());
    verified.check_step(&target, 5, 2, &envelope).unwrap();
    assert_eq!(verified.claims().permitted, sha256(&envelope));

    // Somebody else's grant.
    std::fs::write(files.at("old.grant"), &*grant(&SigningKey::generate())).unwrap();
    let output = files.rollback("model", &[&arguments[..], &["--force"]].concat());
    assert_eq!(output.status.code(), Some(20), "{}", stderr(&output));
    std::fs::write(files.at("old.grant"), b"nothing of the kind").unwrap();
    let output = files.rollback("model", &[&arguments[..], &["--force"]].concat());
    assert_eq!(output.status.code(), Some(10), "{}", stderr(&output));
}
