//! What must not start, or must not be trusted, does not, and says why.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Output};
use std::time::Duration;

use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{Deployment, DeploymentError, EnclaveSettings, Role};
use serde_json::Value;

/// Starts the prepared enclave, which must be refused, and returns its log and the broker's latest decision.
fn refused(stage: &mut Stage) -> (String, Value) {
    ended(stage, 30)
}

/// Starts the prepared enclave, which must end by itself with this exit code.
fn ended(stage: &mut Stage, code: i32) -> (String, Value) {
    let log = match stage.deployment.start_enclave() {
        Err(DeploymentError::Ended { status, log, .. }) => {
            assert_eq!(status.code(), Some(code), "{log}");
            log
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the enclave was given the key"),
    };
    let shown = ["log", "show", "--json"].map(std::ffi::OsStr::new);
    let decisions = stage.deployment.administer(&shown).unwrap();
    let entries: Vec<Value> = decisions
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        !entries
            .iter()
            .any(|e| e["action"] == "release" && e["verdict"] != "denied"),
        "the key was released"
    );
    (log, entries.last().unwrap().clone())
}

fn edit(path: &std::path::Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from:?} is not in {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn a_configuration_changed_after_measuring_gets_no_key() {
    let mut stage = Stage::until_enclave().unwrap();
    edit(
        &stage.path("enclave.toml"),
        "max_batch = 8",
        "max_batch = 9",
    );
    let (log, decision) = refused(&mut stage);
    assert!(log.contains("mr_config_id"), "{log}");
    assert_eq!(decision["verdict"], "denied", "{decision}");
}

/// Starts `executable` as the prepared enclave, altered by `change`; it must end, naming the register that differs.
fn refused_for(
    register: &str,
    stage: &Stage,
    executable: &std::path::Path,
    change: impl FnOnce(&mut Command) -> &mut Command,
) {
    let mut command = Command::new(executable);
    command
        .env_clear()
        .arg("--config")
        .arg(stage.path("enclave.toml"));
    let output = change(&mut command).output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(30), "{log}");
    assert!(log.contains(register), "{log}");
}

fn enclave() -> std::path::PathBuf {
    let programs = Deployment::programs_of_this_build().unwrap();
    programs.join("casemate-enclave")
}

#[test]
fn another_executable_gets_no_key() {
    let stage = Stage::until_enclave().unwrap();
    // The same program with one byte more at its end.
    let other = stage.path("casemate-enclave");
    fs::copy(enclave(), &other).unwrap();
    OpenOptions::new()
        .append(true)
        .open(&other)
        .unwrap()
        .write_all(&[0])
        .unwrap();
    refused_for("mr_td", &stage, &other, |command| command);
}

#[test]
fn another_environment_gets_no_key() {
    let stage = Stage::until_enclave().unwrap();
    refused_for("rtmr2", &stage, &enclave(), |command| {
        command.env("LD_LIBRARY_PATH", "/nowhere")
    });
}

#[test]
fn another_argument_gets_no_key() {
    let stage = Stage::until_enclave().unwrap();
    refused_for("rtmr1", &stage, &enclave(), |command| {
        command.args(["--log", "trace"])
    });
}

#[test]
fn a_corrupted_model_is_not_served() {
    let mut stage = Stage::until_enclave().unwrap();
    let path = stage.deployment.sealed().unwrap().path.clone();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    match stage.deployment.start_enclave() {
        Err(DeploymentError::Ended { status, log, .. }) => {
            assert!(log.contains("cannot open the model"), "{log}");
            assert_eq!(status.code(), Some(20), "{log}");
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn the_right_key_for_another_model_does_not_help() {
    let mut stage = Stage::until_enclave().unwrap();
    let served = stage.deployment.sealed().unwrap().path.clone();
    // Another model under the same keys, put in the place of the first.
    let model = stage.tiny_model();
    let other = stage.deployment.seal(&model, TINY, 2).unwrap();
    fs::copy(other.path, served).unwrap();
    match stage.deployment.start_enclave() {
        Err(DeploymentError::Ended { status, log, .. }) => {
            assert_eq!(status.code(), Some(30), "{log}");
            assert!(log.contains("\"claim\":\"grant.model\""), "{log}");
            assert!(!log.contains("ready"), "{log}");
        }
        other => panic!("{:?}", other.err()),
    }
}

fn run(stage: &Stage, arguments: &[&str]) -> Output {
    let programs = Deployment::programs_of_this_build().unwrap();
    let mut command = Command::new(programs.join("casemate"));
    command
        .current_dir(stage.deployment.work_dir())
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn users_refuse_another_issuer_another_model_and_a_missing_development_root() {
    let (stage, _) = Stage::complete().unwrap();
    let url = stage.deployment.enclave().unwrap().url.clone();
    let policy = fs::read_to_string(stage.path("user-policy.toml")).unwrap();
    let facts = (
        stage.deployment.broker().unwrap().issuer.clone(),
        stage.deployment.sealed().unwrap().digest.clone(),
        stage.deployment.fake_tee().unwrap().root_spki.clone(),
    );
    let other_key = stage.deployment.keys().unwrap().provider.clone();
    let root_line = format!("dangerous_development_root = \"{}\"\n", facts.2);
    let cases = [
        ("genuine", policy.clone(), 0, ""),
        ("issuer", policy.replace(&facts.0, &other_key), 30, "issuer"),
        (
            "model",
            policy.replace(&facts.1, &"ab".repeat(32)),
            30,
            "model",
        ),
        ("root", policy.replace(&root_line, ""), 20, "root"),
        (
            "name",
            policy.replace("name = \"tiny\"", "name = \"huge\""),
            30,
            "service",
        ),
        ("malformed", policy.replace("tee = [", "tea = ["), 2, "tea"),
    ];
    for (name, text, code, mentioned) in cases {
        if name != "genuine" {
            assert_ne!(text, policy, "{name} changes the policy");
        }
        let file = format!("policy-{name}.toml");
        fs::write(stage.path(&file), text).unwrap();
        let output = run(&stage, &["verify", "--policy", &file, "--service", &url]);
        let shown = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        if name == "genuine" {
            assert_eq!(output.status.code(), Some(0), "{name}: {shown}");
            assert!(shown.contains("not a TEE"), "{shown}");
        } else {
            assert_ne!(output.status.code(), Some(0), "{name}: {shown}");
            assert_eq!(output.status.code(), Some(code), "{name}: {shown}");
            assert!(shown.contains(mentioned), "{name}: {shown}");
            // The proxy decides by the same rules and does not begin to listen.
            let proxied = [
                "proxy",
                "--policy",
                &file,
                "--enclave",
                &url,
                "--listen",
                "127.0.0.1:0",
            ];
            let output = run(&stage, &proxied);
            assert_eq!(output.status.code(), Some(code), "{name}");
            assert!(
                !String::from_utf8_lossy(&output.stdout).contains("listening on"),
                "{name}"
            );
        }
    }
}

#[test]
fn an_unreachable_service_is_told_apart() {
    let mut stage = Stage::until_enclave().unwrap();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("http://{port}");
    let policy = stage.path("user-policy.toml").display().to_string();
    let output = run(&stage, &["verify", "--policy", &policy, "--service", &url]);
    assert_eq!(
        output.status.code(),
        Some(40),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    stage.deployment.stop(Role::Broker);
    match stage.deployment.start_enclave() {
        Err(DeploymentError::Ended { log, .. }) => assert!(log.contains("cannot reach"), "{log}"),
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn a_port_in_use_ends_the_start_before_a_key_is_released() {
    let mut stage = Stage::until_enclave().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    edit(
        &stage.path("enclave.toml"),
        "listen = \"127.0.0.1:0\"",
        &format!("listen = \"{address}\""),
    );
    let (log, _) = ended(&mut stage, 40);
    assert!(
        log.contains(&format!("cannot listen on {address}")),
        "{log}"
    );
}

#[test]
fn keys_that_are_missing_or_damaged_leave_nothing_behind() {
    let stage = Stage::until_enclave().unwrap();
    let model = stage.tiny_model().display().to_string();
    let keys = stage.deployment.keys().unwrap();
    let (signing, data) = (
        keys.signing_key.display().to_string(),
        keys.data_key.display().to_string(),
    );
    fs::write(stage.path("damaged.key"), "not a key").unwrap();
    for (data, mentioned) in [
        ("missing.key", "missing.key"),
        ("damaged.key", "damaged.key"),
    ] {
        let arguments = [
            "seal",
            &model,
            "--name",
            "x",
            "--version",
            "1",
            "--data-key",
            data,
            "--signing-key",
            &signing,
            "--out",
            "x.casemate",
        ];
        let output = run(&stage, &arguments);
        let shown = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(shown.contains(mentioned), "{shown}");
        assert!(!stage.path("x.casemate").exists());
    }
    // An existing file is not overwritten unless asked for, and stays whole.
    let sealed = stage.deployment.sealed().unwrap().path.clone();
    let before = fs::read(&sealed).unwrap();
    let out = sealed.display().to_string();
    let arguments = [
        "seal",
        &model,
        "--name",
        "x",
        "--version",
        "1",
        "--data-key",
        &data,
        "--signing-key",
        &signing,
        "--out",
        &out,
    ];
    assert!(!run(&stage, &arguments).status.success());
    assert_eq!(fs::read(&sealed).unwrap(), before);
}

#[test]
fn the_proxy_fails_closed_when_the_enclave_dies() {
    let (mut stage, url) = Stage::complete().unwrap();
    stage.deployment.program(Role::Enclave).unwrap().kill();
    std::thread::sleep(Duration::from_millis(200));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (status, body) = runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let response = client.get(format!("{url}/v1/models")).send().await.unwrap();
        (
            response.status().as_u16(),
            response.json::<Value>().await.unwrap(),
        )
    });
    assert_eq!(status, 502, "{body}");
    assert_eq!(body["error"]["code"], "service_unreachable", "{body}");
}

#[test]
fn a_model_can_be_served_in_single_precision() {
    let mut stage = Stage::new().unwrap();
    let model = stage.tiny_model();
    let settings = EnclaveSettings {
        compute: "f32",
        threads: 2,
        ..EnclaveSettings::default()
    };
    stage.deployment.start_all(&model, TINY, &settings).unwrap();
    let transcript = stage.deployment.verify().unwrap();
    assert_eq!(
        transcript["claims"]["model"]["compute"], "f32",
        "{transcript}"
    );
}
