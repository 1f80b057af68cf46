//! `casemate-fake-tee` as people start it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use casemate_attest::ReportData;
use casemate_tee::{QuoteProvider, QuotingService};
use casemate_testkit::deployment::{DeploymentError, Launch, Program};

const PATIENCE: Duration = Duration::from_secs(20);

fn launch(state: &Path, socket: &Path) -> Launch {
    Launch::new(
        "casemate-fake-tee",
        env!("CARGO_BIN_EXE_casemate-fake-tee").into(),
    )
    .option("--state", state)
    .option("--socket", socket)
}

/// Starts it, and returns what it said until it listened.
fn start(state: &Path, socket: &Path) -> (Program, Vec<String>) {
    let logs = tempfile::tempdir().unwrap();
    let program = launch(state, socket).serve(logs.path(), PATIENCE).unwrap();
    let log = fs::read_to_string(program.log()).unwrap();
    (program, log.lines().map(str::to_owned).collect())
}

#[test]
fn says_that_it_is_no_tee_and_keeps_its_root_over_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (
        directory.path().join("state"),
        directory.path().join("socket"),
    );
    let (first, said) = start(&state, &socket);
    assert!(said[0].contains("NOT a TEE"), "{:?}", said);
    let spki = fs::read_to_string(state.join("root_spki_sha256")).unwrap();
    let announced = format!("root SPKI SHA-256 {}", spki.trim_end());
    assert!(said.contains(&announced), "{:?}", said);
    assert_eq!(spki.trim_end().len(), 64);
    let root = fs::read(state.join("root.der")).unwrap();

    let service = QuotingService::connect(&socket, Duration::from_secs(20)).unwrap();
    let evidence = service.quote(&ReportData::new([1; 64])).unwrap();
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let collateral = serde_json::to_value(evidence.collateral.unwrap()).unwrap();
    let collateral = serde_json::from_value(collateral).unwrap();
    dcap_qvl::verify::QuoteVerifier::new(root.clone())
        .verify(&evidence.quote, &collateral, now)
        .unwrap();

    for entry in fs::read_dir(&state).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        let is_key = entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "pem");
        assert_eq!(
            mode,
            if is_key { 0o600 } else { 0o644 },
            "{:?}",
            entry.path()
        );
    }
    assert_eq!(
        fs::metadata(&state).unwrap().permissions().mode() & 0o777,
        0o700
    );

    drop(first);
    assert!(socket.exists(), "a killed service leaves its socket behind");
    let (_second, said) = start(&state, &socket);
    assert_eq!(fs::read(state.join("root.der")).unwrap(), root);
    assert!(said.contains(&announced));
    QuotingService::connect(&socket, Duration::from_secs(20)).unwrap();

    let other = directory.path().join("other");
    let (_other, said) = start(&other, &directory.path().join("s2"));
    assert!(
        !said.contains(&announced),
        "another installation has another root"
    );
}

#[test]
fn a_socket_that_is_taken_is_told_once() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let (_first, _) = start(&directory.path().join("state"), &socket);
    let output = Command::new(env!("CARGO_BIN_EXE_casemate-fake-tee"))
        .arg("--state")
        .arg(directory.path().join("other"))
        .arg("--socket")
        .arg(&socket)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(40));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.matches("in use").count(), 1, "{said}");
    let shown = socket.display().to_string();
    assert_eq!(said.matches(&shown).count(), 1, "{said}");
}

#[test]
fn refuses_keys_that_others_can_read_and_a_root_of_another_key() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (
        directory.path().join("state"),
        directory.path().join("socket"),
    );
    drop(start(&state, &socket));
    let run = || {
        let logs = tempfile::tempdir().unwrap();
        match launch(&state, &socket).serve(logs.path(), PATIENCE) {
            Err(DeploymentError::Ended { log, .. }) => log,
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("it serves with a damaged installation"),
        }
    };
    let key = state.join("root.key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(run().contains("mode 640"));
    fs::remove_file(&key).unwrap();
    fs::copy(state.join("pck.key.pem"), &key).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(run().contains("certifies another key"));
    fs::write(&key, "nonsense").unwrap();
    assert!(run().contains("not a P-256 key"));
}
