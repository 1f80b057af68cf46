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
