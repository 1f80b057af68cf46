//! `casemate grant` as a provider runs it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, ModelDigest, SealOptions, Silent, seal};
use casemate_release::api_key::{Access, Limits};
use casemate_release::grant::VerifiedGrant;
use casemate_testkit::models::Tiny;
use serde_json::Value;
use tempfile::TempDir;

struct Files {
    directory: TempDir,
    data_key: DataKey,
    signing_key: SigningKey,
    digest: ModelDigest,
}

impl Files {
    /// A model of version 4, sealed, with its keys.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (data_key, signing_key) = (DataKey::generate(), SigningKey::generate());
        data_key
            .write_file(&directory.path().join("data.pem"), false)
            .unwrap();
        signing_key
            .write_file(&directory.path().join("sign.pem"), false)
            .unwrap();
        let options = SealOptions {
            name: Some("Tiny 1M Instruct".into()),
            version: 4,
            ..Default::default()
        };
        let out = directory.path().join("tiny.casemate");
        let model = Tiny::default().build();
        let sealed = seal(&model, &options, &data_key, &signing_key, &out, &Silent).unwrap();
        Self {
            directory,
            data_key,
            signing_key,
            digest: sealed.digest,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn grant(&self, data_key: &Path, signing_key: &Path, more: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_casemate"))
            .arg("grant")
            .arg("--data-key")
            .arg(data_key)
            .arg("--signing-key")
            .arg(signing_key)
            .arg("--model")
            .arg(self.at("tiny.casemate"))
            .arg("--out")
            .arg(self.at("tiny.grant"))
            .args(more)
            .output()
            .unwrap()
    }

    fn honest(&self, more: &[&str]) -> Output {
        self.grant(&self.at("data.pem"), &self.at("sign.pem"), more)
    }

    fn open(&self, more: &[&str]) -> Output {
        self.honest(&[&["--open"], more].concat())
    }

    fn verified(&self) -> VerifiedGrant {
        let bytes = std::fs::read(self.at("tiny.grant")).unwrap();
        VerifiedGrant::verify(&bytes, &self.signing_key.verifying_key()).unwrap()
    }
}

#[test]
fn a_grant_opens_the_model_it_names_and_is_its_owners() {
    let files = Files::new();
    let output = files.open(&["--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&json["open"], &json["api_keys"]),
        (&true.into(), &Value::Null)
    );
    assert_eq!(files.verified().access(), &Access::Open);
    assert_eq!(json["model_digest"], files.digest.to_string());
    assert_eq!(json["minimum_version"], 4);
    let grant = files.verified();
    assert!(grant.data_key().matches(&files.data_key));
    assert_eq!(grant.model_digest(), &files.digest);
    assert_eq!(
        (grant.model_name(), grant.minimum_version()),
        ("Tiny 1M Instruct", 4)
    );
    assert_eq!(
        files.at("tiny.grant").metadata().unwrap().mode() & 0o777,
        0o600
    );
    assert!(
        files
            .open(&["--minimum-version", "2", "--force"])
            .status
            .success()
    );
    assert_eq!(files.verified().minimum_version(), 2);
    let names = std::fs::read_dir(files.directory.path()).unwrap().count();
    assert_eq!(names, 4, "nothing is left behind");
}

#[test]
fn an_existing_grant_is_replaced_only_by_force() {
    let files = Files::new();
    std::fs::write(files.at("tiny.grant"), b"precious").unwrap();
    assert_eq!(files.open(&[]).status.code(), Some(40));
    assert_eq!(std::fs::read(files.at("tiny.grant")).unwrap(), b"precious");
}

#[test]
fn keys_that_do_not_belong_to_the_model_grant_nothing() {
    let files = Files::new();
    DataKey::generate()
        .write_file(&files.at("other-data.pem"), false)
        .unwrap();
    SigningKey::generate()
        .write_file(&files.at("other-sign.pem"), false)
        .unwrap();
    let wrong = [
        (files.at("other-data.pem"), files.at("sign.pem"), 20),
        (files.at("data.pem"), files.at("other-sign.pem"), 20),
        (files.at("sign.pem"), files.at("sign.pem"), 10),
        (files.at("missing.pem"), files.at("sign.pem"), 40),
    ];
    for (data_key, signing_key, code) in wrong {
        let output = files.grant(&data_key, &signing_key, &["--open"]);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(!files.at("tiny.grant").exists());
    }
}

#[test]
fn a_minimum_above_the_models_own_version_is_wrong_usage() {
    let files = Files::new();
    assert_eq!(
        files.open(&["--minimum-version", "5"]).status.code(),
        Some(2)
    );
    assert!(!files.at("tiny.grant").exists());
}

#[test]
fn who_may_use_the_model_must_be_said() {
    let files = Files::new();
    let list = files.at("api-keys.toml");
    casemate(files.directory.path(), &["apikey", "new", "alice"]);
    let list = list.to_str().unwrap();
    let both = files.open(&["--api-keys", list]);
    assert_eq!(both.status.code(), Some(2));
    let neither = files.honest(&["--json"]);
    assert_eq!(neither.status.code(), Some(2));
    let json: Value = serde_json::from_slice(&neither.stdout).unwrap();
    assert_eq!(json["error"]["code"], "access");
    let message = json["error"]["message"].as_str().unwrap();
    for part in ["--api-keys FILE for those", "--open for anybody"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!files.at("tiny.grant").exists());

    let keyed = files.honest(&["--api-keys", list]);
    let shown = String::from_utf8(keyed.stdout).unwrap();
    assert!(shown.contains("access           1 API key\n"), "{shown}");
    let open = files.open(&["--force"]);
    let shown = String::from_utf8(open.stdout).unwrap();
    assert!(
        shown.contains("access           open to anybody\n"),
        "{shown}"
    );
}

fn casemate(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_casemate"))
        .current_dir(directory)
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn new_api_keys_are_printed_once_and_granted_by_their_hash() {
    let files = Files::new();
    let new = |name: &str, more: &[&str]| {
        let arguments = [&["apikey", "new", name], more].concat();
        let output = casemate(files.directory.path(), &arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text.trim_end().to_owned())
    };
    let (code, bob) = new("bob", &[]);
    assert_eq!(code, Some(0));
    let limits = [
        "--requests-per-minute",
        "60",
        "--tokens-per-minute",
        "9000",
        "--concurrency",
        "2",
    ];
    let (_, alice) = new("alice", &limits);
    assert_ne!(alice, bob);
    // Each name once, and the list stays as it was.
    let list = files.at("api-keys.toml");
    let before = std::fs::read_to_string(&list).unwrap();
    assert_eq!(new("bob", &[]), (Some(2), String::new()));
    assert_eq!(new("b b", &[]).0, Some(2));
    assert_eq!(new("carol", &["--concurrency", "0"]).0, Some(2));
    assert_eq!(std::fs::read_to_string(&list).unwrap(), before);
    assert!(!before.contains(&bob[3..]), "the key itself is not kept");

    assert!(
        files
            .honest(&["--api-keys", list.to_str().unwrap()])
            .status
            .success()
    );
    let grant = files.verified();
    let keys = grant.access().api_keys().unwrap().as_slice();
    let hash = |key: &str| casemate_release::api_key::hash(key.as_bytes());
    assert_eq!((&*keys[0].name, keys[0].hash), ("alice", hash(&alice)));
    assert_eq!((&*keys[1].name, keys[1].hash), ("bob", hash(&bob)));
    let limits = keys[0].limits;
    let numbers = [
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrency,
    ];
    assert_eq!(numbers.map(|n| n.unwrap().get()), [60, 9000, 2]);
    assert_eq!(keys[1].limits, Limits::default());
}

#[test]
fn a_list_that_is_empty_or_damaged_grants_nothing() {
    let files = Files::new();
    let list = files.at("list.toml");
    let hash = "00".repeat(32);
    let entry = format!("[[key]]\nname = \"a\"\nsha256 = \"{hash}\"\n");
    for (text, code) in [
        (String::new(), 2),
        (format!("{entry}requests = 3\n"), 10),
        (format!("{entry}concurrency = 0\n"), 10),
        (format!("{entry}{entry}"), 10),
        (entry.replace("00", "0g"), 10),
        (entry.replace("name", "nam"), 10),
    ] {
        std::fs::write(&list, &text).unwrap();
        let output = files.honest(&["--api-keys", list.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(!files.at("tiny.grant").exists());
    }
    let missing = files.honest(&["--api-keys", "/does/not/exist"]);
    assert_eq!(missing.status.code(), Some(40));
}
