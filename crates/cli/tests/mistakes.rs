//! What newcomers get wrong: each mistake is answered with what it was and what to do.

use std::ffi::OsStr;
use std::fs;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;

struct Place(tempfile::TempDir);

impl Place {
    /// A directory with a model, keys, and the model sealed.
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        gguf::write(&Tiny::default().build(), &place.0.path().join("model.gguf")).unwrap();
        assert!(place.run(&["keygen", "--out", "keys/"]).status.success());
        let sealed = place.seal("model.gguf", "m.casemate");
        assert!(sealed.status.success(), "{sealed:?}");
        place
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_casemate"));
        command.args(arguments).current_dir(self.0.path());
        command
    }

    fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn seal(&self, model: &str, out: &str) -> Output {
        self.run(&sealing(model, out))
    }

    fn check(&self, model: &str, provider: &str) -> Output {
        self.run(&[
            "check",
            model,
            "--data-key",
            "keys/data-key.pem",
            "--provider",
            provider,
        ])
    }
}

fn sealing<'a>(model: &'a str, out: &'a str) -> [&'a str; 10] {
    [
        "seal",
        model,
        "--version",
        "1",
        "--data-key",
        "keys/data-key.pem",
        "--signing-key",
        "keys/signing-key.pem",
        "--out",
        out,
    ]
}

#[track_caller]
fn said(output: &Output, code: i32, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_mistyped_key_is_counted() {
    let place = Place::new();
    let short = place.check("m.casemate", &"ab".repeat(31));
    said(&short, 2, &["62 hexadecimal digits", "a public key has 64"]);
    let other = place.check("m.casemate", &"xy".repeat(32));
    said(&other, 2, &["other characters than hexadecimal digits"]);
    let file = place.check("m.casemate", "keys/missing.pem");
    said(&file, 40, &["keys/missing.pem"]);
}

#[test]
fn a_model_that_is_not_sealed_is_recognised() {
    let place = Place::new();
    let key = "keys/signing-key.pub.pem";
    said(
        &place.check("model.gguf", key),
        10,
        &["model.gguf is not a sealed model", "GGUF", "casemate seal"],
    );
    said(
        &place.run(&["inspect", "model.gguf"]),
        10,
        &["model.gguf", "GGUF"],
    );
    said(
        &place.run(&["inspect", key]),
        10,
        &[key, "public key", "--provider"],
    );
}

#[test]
fn a_file_of_another_kind_is_named_with_the_command_that_takes_it() {
    let place = Place::new();
    let at = |name: &str| place.0.path().join(name);
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("model")).unwrap();
    fs::write(at("model/config.json"), "{}").unwrap();
    fs::write(at("none"), "").unwrap();
    fs::write(at("receipt.json"), r#"{"receipt":"","evidence":{}}"#).unwrap();
    fs::write(at("evidence.json"), r#"{"tee":"tdx","quote":""}"#).unwrap();
    fs::write(at("policy.toml"), "version = 1\ntee = [\"tdx\"]\n").unwrap();
    let made = place.run(&["apikey", "new", "me"]);
    assert!(made.status.success(), "{made:?}");
    let mut grant = place.command(&[
        "grant",
        "--model",
        "m.casemate",
        "--open",
        "--out",
        "my.grant",
    ]);
    grant.args(["--data-key", "keys/data-key.pem"]);
    grant.args(["--signing-key", "keys/signing-key.pem"]);
    let granted = grant.output().unwrap();
    assert!(granted.status.success(), "{granted:?}");

    let by_policy = |file: &str, option: &str| {
        let data = "00".repeat(64);
        let policy = match option {
            "--policy" => file,
            _ => "good.toml",
        };
        let evidence = match option {
            "--evidence" => file,
            _ => "evidence.json",
        };
        let line = [
            "verify",
            "--policy",
            policy,
            "--evidence",
            evidence,
            "--report-data",
            &data,
        ];
        place.run(&line)
    };
    let back = |what: &str, option: &str, file: &str| {
        let mut command = place.command(&["rollback", what, option, file, "--from", "9"]);
        command.args(["--issuer", &"ab".repeat(32), "--out", "back"]);
        if what == "model" {
            command.args(["--resource", "default/model/m"]);
        }
        command.args(["--signing-key", "keys/signing-key.pem"]);
        command.output().unwrap()
    };
    let measurement = casemate_attest::measure::Measurement {
        mr_td: [1; 48],
        mr_config_id: [2; 48],
        rtmr: [[0; 48]; 4],
    };
    let policy = casemate_testkit::policies::PolicyFile::new([3; 32], measurement);
    fs::write(at("good.toml"), policy.to_toml()).unwrap();

    let policy = "this is a policy; `casemate verify --policy`";
    let evidence = "this is evidence; `casemate verify --evidence`";
    for (file, is) in [
        ("none", "the file is empty"),
        (
            "receipt.json",
            "this is a receipt; `casemate receipt verify`",
        ),
        ("evidence.json", evidence),
        ("good.toml", policy),
        (
            "keys/signing-key.pem",
            "this is a private key, which is secret; `casemate seal`",
        ),
        (
            "keys/signing-key.pub.pem",
            "this is a public key; `casemate check` takes it as --provider",
        ),
        ("m.casemate", "this is a sealed model; `casemate check`"),
        (
            "model.gguf",
            "this is a GGUF model that is not sealed; `casemate seal`",
        ),
        (
            "api-keys.toml",
            "this is a list of API keys; `casemate grant --api-keys`",
        ),
        (
            "my.grant",
            "this is a key grant, which is secret; `casemate-broker admin resource put",
        ),
    ] {
        if is != evidence {
            said(&by_policy(file, "--evidence"), 10, &[is]);
        }
        if is != policy {
            said(&by_policy(file, "--policy"), 2, &[file, is]);
            said(&back("policy", "--policy", file), 10, &[file, is]);
        }
        if file != "my.grant" {
            said(&back("model", "--grant", file), 10, &[file, is]);
        }
    }
    for (directory, is) in [
        ("empty", "this is a directory; give one file"),
        ("model", "this is a directory with a model; `casemate seal`"),
        ("keys", "this is a directory of keys, as `casemate keygen`"),
    ] {
        for output in [
            by_policy(directory, "--evidence"),
            by_policy(directory, "--policy"),
            back("policy", "--policy", directory),
            back("model", "--grant", directory),
            place.run(&["explain", directory]),
            place.run(&["receipt", "show", directory]),
        ] {
            said(&output, 40, &[directory, is]);
        }
    }
}

#[test]
fn a_sealed_model_is_not_sealed_again() {
    let place = Place::new();
    let again = place.seal("m.casemate", "n.casemate");
    said(&again, 10, &["m.casemate is a sealed model already"]);
    assert!(!place.0.path().join("n.casemate").exists());
}

#[test]
fn what_stands_in_the_way_is_named_before_the_remedy() {
    let place = Place::new();
    let again = place.seal("model.gguf", "m.casemate");
    let expected = "m.casemate exists already and was left as it is; --force replaces it";
    said(&again, 40, &[expected]);
}

#[test]
fn a_damaged_model_is_named_and_points_to_explain() {
    let place = Place::new();
    let path = place.0.path().join("m.casemate");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    let refused = place.check("m.casemate", "keys/signing-key.pub.pem");
    said(
        &refused,
        20,
        &["m.casemate: not authentic: chunk 0", "casemate explain"],
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let place = Place::new();
    let mut command = place.command(&[
        "inspect",
        "m.casemate",
        "--data-key",
        "keys/data-key.pem",
        "--json",
    ]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// Killed at any moment, sealing leaves either the whole file or nothing.
#[test]
fn sealing_that_is_killed_leaves_nothing_behind() {
    let place = Place::new();
    let large = Tiny {
        hidden: 512,
        ffn: 2048,
        layers: 6,
        ..Tiny::default()
    };
    gguf::write(&large.build(), &place.0.path().join("large.gguf")).unwrap();
    let before = names(&place);
    let mut child = place
        .command(&sealing("large.gguf", "large.casemate"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Until it has its output open, under whatever name.
    let open = || {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
        let mut targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        targets.any(|target| {
            let beside = target.starts_with(fs::canonicalize(place.0.path()).unwrap());
            beside && !target.ends_with("large.gguf")
        })
    };
    let patience = Instant::now() + Duration::from_secs(60);
    while !open() {
        assert!(Instant::now() < patience, "sealing opened no output");
    }
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(!status.success(), "it was too fast to be killed");
    assert_eq!(names(&place), before);
}

fn names(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.0.path()).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn json_says_what_standard_error_says() {
    let place = Place::new();
    let output = place.run(&["inspect", "nofile", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let message = shown["error"]["message"].as_str().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(line, format!("casemate: {message}\n"));
    assert_eq!(message.matches("os error 2").count(), 1, "{message}");
}
