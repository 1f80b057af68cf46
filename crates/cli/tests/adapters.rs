//! Sealing an adapter as a provider does: bound to its base, with a key of its own, and what is refused.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Output};

use casemate_container::ModelDigest;
use casemate_testkit::adapters::TinyAdapter;
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use serde_json::Value;

struct Place(tempfile::TempDir);

impl Place {
    /// A directory with a provider's keys, the sealed model `m.casemate`, the adapter `adapter/`, and a key for it.
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        gguf::write(&Tiny::default().build(), &place.path("model.gguf")).unwrap();
        place.write_adapter("adapter", &Tiny::default());
        place.done(&["keygen", "--out", "keys/"]);
        place.done(&["keygen", "--out", "adapter-keys/"]);
        place.done(&place.seal(&["model.gguf", "--out", "m.casemate"], "keys/data-key.pem"));
        place
    }

    fn write_adapter(&self, name: &str, base: &Tiny) {
        let adapter = TinyAdapter::default().build(&base.build().config, ModelDigest([0; 32]));
        adapter.write_peft(&self.path(name)).unwrap();
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

    /// The JSON of a command that must succeed.
    fn done<S: AsRef<OsStr>>(&self, args: &[S]) -> Value {
        let mut args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        args.push("--json".as_ref());
        let output = self.run(&args);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Exit code, and the code and message of the error.
    fn refused<S: AsRef<OsStr>>(&self, args: &[S]) -> (i32, String, String) {
        let mut args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        args.push("--json".as_ref());
        let output = self.run(&args);
        let error: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |field: &str| error["error"][field].as_str().unwrap().to_owned();
        (output.status.code().unwrap(), text("code"), text("message"))
    }

    fn seal<'a>(&self, what: &[&'a str], data_key: &'a str) -> Vec<&'a str> {
        let mut args = vec!["seal", "--version", "2", "--data-key", data_key];
        args.extend(["--signing-key", "keys/signing-key.pem"]);
        args.extend(what);
        args
    }

    fn seal_adapter<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        let mut what = vec!["--adapter", "adapter", "--out", "a.casemate"];
        what.extend(more);
        self.seal(&what, "adapter-keys/data-key.pem")
    }
}

const BASE: [&str; 4] = ["--base", "m.casemate", "--base-key", "keys/data-key.pem"];

#[test]
fn an_adapter_is_sealed_for_one_base_under_a_key_of_its_own() {
    let place = Place::new();
    let base = place.done(&["inspect", "m.casemate", "--data-key", "keys/data-key.pem"]);
    let base = base["manifest"]["model_digest"].as_str().unwrap();
    let sealed = place.done(&place.seal_adapter(&BASE));
    assert_eq!(
        (&sealed["base"], &sealed["name"]),
        (&base.into(), &"adapter".into())
    );
    let digest = sealed["model_digest"].as_str().unwrap();

    // The digest of the base binds as well as the base itself; only the shapes are then not compared.
    let mut by_digest = place.seal_adapter(&["--base", base, "--force"]);
    let again = place.done(&by_digest);
    assert_eq!(again["model_digest"], digest);
    by_digest.extend(["--base-key", "keys/data-key.pem"]);
    assert_eq!(place.refused(&by_digest).1, "base-key");

    let key = ["--data-key", "adapter-keys/data-key.pem"];
    let inspected = place.done(&[&["inspect", "a.casemate"][..], &key].concat());
    let manifest = &inspected["manifest"];
    assert_eq!(manifest["config"], Value::Null);
    let adapter = &manifest["adapter"];
    assert_eq!(
        (&adapter["base"], &adapter["rank"]),
        (&base.into(), &4.into())
    );
    assert_eq!(adapter["alpha"], 8.0);
    assert!(
        manifest["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t["public"] == false)
    );
    let shown = place.run(&[&["inspect", "a.casemate"][..], &key].concat());
    let shown = String::from_utf8(shown.stdout).unwrap();
    for line in [
        "adapter digest",
        &format!("base          {base}"),
        "rank 4, alpha 8",
    ] {
        assert!(shown.contains(line), "{shown}");
    }

    let provider = ["--provider", "keys/signing-key.pub.pem"];
    let checked = [&["check", "a.casemate"][..], &key, &provider].concat();
    assert_eq!(place.done(&checked)["base"], base);
    let with_the_bases_key = ["check", "a.casemate", "--data-key", "keys/data-key.pem"];
    let (status, code, _) = place.refused(&[&with_the_bases_key[..], &provider].concat());
    assert_eq!((status, code.as_str()), (20, "wrong-key"));

    let mut grant = vec!["grant", "--signing-key", "keys/signing-key.pem", "--open"];
    grant.extend(["--model", "a.casemate", "--out", "a.grant"]);
    grant.extend(key);
    assert_eq!(place.done(&grant)["model_digest"], digest);
}

#[test]
fn an_adapter_that_does_not_fit_its_base_is_not_sealed() {
    let place = Place::new();
    let wide = Tiny {
        hidden: 128,
        ..Tiny::default()
    };
    place.write_adapter("wide", &wide);
    let what = ["--adapter", "wide", "--out", "a.casemate"];
    let args = place.seal(&[&what[..], &BASE].concat(), "adapter-keys/data-key.pem");
    let (status, _, message) = place.refused(&args);
    assert_eq!(status, 10);
    assert!(message.contains("but the base needs"), "{message}");
    assert!(!place.path("a.casemate").exists());

    let (status, code, _) = place.refused(&place.seal_adapter(&["--base", "m.casemate"]));
    assert_eq!((status, code.as_str()), (2, "base-key"));
    place.done(&place.seal_adapter(&BASE));
    let of_an_adapter = [
        "--base",
        "a.casemate",
        "--base-key",
        "adapter-keys/data-key.pem",
        "--force",
    ];
    let (status, code, _) = place.refused(&place.seal_adapter(&of_an_adapter));
    assert_eq!((status, code.as_str()), (2, "base-kind"));
    // Of another provider.
    place.done(&["keygen", "--out", "others/"]);
    let mut other = place.seal_adapter(&BASE);
    other.extend(["--signing-key", "others/signing-key.pem", "--force"]);
    other.retain(|argument| *argument != "keys/signing-key.pem");
    let at = other.iter().position(|a| *a == "--signing-key").unwrap();
    other.remove(at);
    let (status, code, _) = place.refused(&other);
    assert_eq!((status, code.as_str()), (20, "wrong-signer"));
    let (status, _, message) =
        place.refused(&place.seal(&["adapter", "--out", "x"], "keys/data-key.pem"));
    assert_eq!(status, 10);
    assert!(message.contains("--adapter DIR --base MODEL"), "{message}");
}
