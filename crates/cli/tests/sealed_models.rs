//! keygen, seal, inspect and check as a provider uses them: the program itself, its exit codes and what it leaves on
//! the disk.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use serde_json::Value;

struct Place(tempfile::TempDir);

impl Place {
    /// A directory with a model and, in `keys/`, a provider's keys.
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        gguf::write(&Tiny::default().build(), &place.path("model.gguf")).unwrap();
        let keys = place.run(&["keygen", "--out", "keys/"]);
        assert_eq!(code(&keys), 0, "{keys:?}");
        place
    }

    /// As [`Self::new`], with the model sealed as `m.casemate`.
    fn sealed() -> Self {
        let place = Place::new();
        let sealed = place.seal(&["--version", "3"]);
        assert_eq!(code(&sealed), 0, "{}", stderr(&sealed));
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_casemate"))
            .args(args)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    fn seal(&self, more: &[&str]) -> Output {
        let mut args = vec!["seal", "model.gguf", "--data-key", "keys/data-key.pem"];
        args.extend([
            "--signing-key",
            "keys/signing-key.pem",
            "--out",
            "m.casemate",
        ]);
        args.extend(more);
        self.run(&args)
    }

    fn check(&self, more: &[&str]) -> Output {
        let mut args = vec!["check", "m.casemate", "--data-key", "keys/data-key.pem"];
        args.extend(["--provider", "keys/signing-key.pub.pem"]);
        args.extend(more);
        self.run(&args)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

#[test]
fn keygen_writes_secret_files_for_their_owner_only_and_replaces_none() {
    let place = Place::new();
    let modes = |name: &str| fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(modes("keys"), 0o700);
    assert_eq!(modes("keys/signing-key.pem"), 0o600);
    assert_eq!(modes("keys/data-key.pem"), 0o600);

    let read = |name: &str| fs::read(place.path(name)).unwrap();
    let all = [
        "keys/signing-key.pem",
        "keys/signing-key.pub.pem",
        "keys/data-key.pem",
    ];
    let before = all.map(read);
    // One of three exists: none is written.
    fs::remove_file(place.path(all[0])).unwrap();
    let refused = place.run(&["keygen", "--out", "keys"]);
    assert_eq!(code(&refused), 40);
    assert!(
        stderr(&refused).contains("signing-key.pub.pem exists already"),
        "{refused:?}"
    );
    assert!(!place.path(all[0]).exists());
    assert_eq!(read(all[2]), before[2]);

    let forced = place.run(&["keygen", "--out", "keys", "--force", "--json"]);
    assert_eq!(code(&forced), 0, "{}", stderr(&forced));
    assert_ne!(read(all[2]), before[2]);
    let provider = json(&forced)["provider"].as_str().unwrap().to_owned();
    assert_eq!(provider.len(), 64);

    let prefix = place.run(&["keygen", "--out", "acme", "--only", "data-key"]);
    assert_eq!(code(&prefix), 0, "{}", stderr(&prefix));
    assert_eq!(place.names(), ["acme-data-key.pem", "keys", "model.gguf"]);
    // No secret is ever printed.
    for (output, file) in [
        (&forced, "keys/data-key.pem"),
        (&prefix, "acme-data-key.pem"),
    ] {
        let pem = fs::read_to_string(place.path(file)).unwrap();
        let secret = pem.lines().nth(1).unwrap();
        assert!(!stdout(output).contains(secret) && !stderr(output).contains(secret));
    }
}

#[test]
fn a_sealed_model_checks_and_every_command_names_the_same_digest() {
    let place = Place::new();
    let sealed = place.seal(&[
        "--version",
        "3",
        "--name",
        "acme chat",
        "--public",
        "*_norm.weight",
        "--json",
    ]);
    assert_eq!(code(&sealed), 0, "{}", stderr(&sealed));
    let sealed = json(&sealed);
    let digest = sealed["model_digest"].as_str().unwrap();
    assert_eq!(sealed["public_tensors"], 5);

    let checked = place.check(&["--json"]);
    assert_eq!(code(&checked), 0, "{}", stderr(&checked));
    let checked = json(&checked);
    assert_eq!(checked["verified"], true);
    assert_eq!(checked["model_digest"], digest);
    assert_eq!(
        (&checked["name"], &checked["version"]),
        (&"acme chat".into(), &3.into())
    );
    let text = stdout(&place.check(&[]));
    assert_eq!(
        text.lines().filter(|l| l.starts_with("passed")).count(),
        6,
        "{text}"
    );
    assert!(text.contains(digest));

    let by_hex = json(&checked_by(&place, checked["provider"].as_str().unwrap()));
    assert_eq!(by_hex["model_digest"], digest);

    let shut = json(&place.run(&["inspect", "m.casemate", "--json"]));
    assert_eq!(shut["manifest"], Value::Null);
    assert_eq!(shut["header"]["file_bytes"], sealed["bytes"]);
    assert!(!shut.to_string().contains(digest));
    let open = place.run(&[
        "inspect",
        "m.casemate",
        "--json",
        "--data-key",
        "keys/data-key.pem",
    ]);
    let open = json(&open);
    assert_eq!(open["manifest"]["model_digest"], digest);
    assert_eq!(open["manifest"]["signed_by"], sealed["provider"]);
    assert_eq!(
        open["manifest"]["tensors"].as_array().unwrap().len() as u64,
        sealed["tensors"]
    );
    let text = stdout(&place.run(&["inspect", "m.casemate", "--data-key", "keys/data-key.pem"]));
    assert!(
        text.contains("blk.1.attn_q.weight") && text.contains("tokenizer.json"),
        "{text}"
    );
}

fn checked_by(place: &Place, provider: &str) -> Output {
    let args = [
        "check",
        "m.casemate",
        "--data-key",
        "keys/data-key.pem",
        "--provider",
        provider,
        "--json",
    ];
    place.run(&args)
}

#[test]
fn check_says_by_its_exit_code_who_is_at_fault() {
    let place = Place::sealed();
    let good = fs::read(place.path("m.casemate")).unwrap();
    let verdict = |bytes: &[u8]| {
        fs::write(place.path("m.casemate"), bytes).unwrap();
        let output = place.check(&["--json"]);
        let error = &json(&output)["error"];
        assert!(stderr(&output).starts_with("casemate: "), "{output:?}");
        let text = |field: &str| error[field].as_str().unwrap().to_owned();
        (code(&output), text("class"), text("code"))
    };
    let malformed = |what: &str| (10, "malformed".to_owned(), what.to_owned());
    let forged = |what: &str| (20, "not-authentic".to_owned(), what.to_owned());
    assert_eq!(verdict(&good[..good.len() - 1]), malformed("truncated"));
    assert_eq!(
        verdict(&[&good[..], b"x"].concat()),
        malformed("trailing-data")
    );
    assert_eq!(verdict(b"GGUF"), malformed("not-a-container"));
    let mut bent = good.clone();
    *bent.last_mut().unwrap() ^= 1;
    assert_eq!(verdict(&bent), forged("chunk"));
    let mut bent = good.clone();
    bent[200] ^= 1;
    assert_eq!(verdict(&bent), forged("manifest-altered"));
    fs::write(place.path("m.casemate"), &good).unwrap();

    assert_eq!(code(&place.run(&["keygen", "--out", "other"])), 0);
    let stranger = checked_by(&place, "other-signing-key.pub.pem");
    assert_eq!(
        (code(&stranger), json(&stranger)["error"]["code"].as_str()),
        (20, Some("wrong-signer"))
    );
    let args = [
        "check",
        "m.casemate",
        "--provider",
        "keys/signing-key.pub.pem",
        "--data-key",
    ];
    let with = |key: &str| code(&place.run(&[&args[..], &[key]].concat()));
    assert_eq!(with("other-data-key.pem"), 20);
    assert_eq!(with("nowhere.pem"), 40);
    assert_eq!(with("keys/signing-key.pem"), 10);
    fs::remove_file(place.path("m.casemate")).unwrap();
    assert_eq!(code(&place.check(&[])), 40);
    assert_eq!(code(&place.run(&["check"])), 2);
}

#[test]
fn a_seal_that_cannot_be_done_changes_nothing() {
    let place = Place::sealed();
    let before = fs::read(place.path("m.casemate")).unwrap();
    let names = place.names();
    let refused = |output: Output, expected: i32, says: &str| {
        assert_eq!(code(&output), expected, "{}", stderr(&output));
        assert!(stderr(&output).contains(says), "{}", stderr(&output));
        assert_eq!(fs::read(place.path("m.casemate")).unwrap(), before);
        assert_eq!(place.names(), names);
    };
    refused(place.seal(&["--version", "4"]), 40, "--force");
    refused(
        place.seal(&["--version", "4", "--force", "--public", "nothing*"]),
        2,
        "nothing*",
    );
    refused(place.seal(&[]), 2, "--version");
    let with = |model: &str, key: &str| {
        place.run(&[
            "seal",
            model,
            "--version",
            "4",
            "--force",
            "--out",
            "m.casemate",
            "--data-key",
            key,
            "--signing-key",
            "keys/signing-key.pem",
        ])
    };
    refused(with("model.gguf", "nowhere.pem"), 40, "nowhere.pem");
    refused(
        with("model.gguf", "keys/signing-key.pub.pem"),
        10,
        "CASEMATE DATA KEY",
    );
    refused(
        with("nowhere.gguf", "keys/data-key.pem"),
        40,
        "nowhere.gguf",
    );
    refused(
        with("keys/data-key.pem", "keys/data-key.pem"),
        10,
        "data-key.pem",
    );

    let key = place.path("keys/data-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refused(place.seal(&["--version", "4", "--force"]), 40, "chmod 600");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let output = place.seal(&["--version", "4", "--force"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(json(&place.check(&["--json"]))["version"], 4);
}
