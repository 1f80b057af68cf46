//! `casemate-fake-tee` as people start it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use casemate_attest::ReportData;
use casemate_tee::{QuoteProvider, QuotingService};

struct Running {
    child: Child,
    said: Vec<String>,
}

impl Running {
    fn start(state: &Path, socket: &Path) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_casemate-fake-tee"))
            .arg("--state")
            .arg(state)
            .arg("--socket")
            .arg(socket)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = Vec::new();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            said.push(line.unwrap());
            if said
                .last()
                .is_some_and(|line| line.starts_with("listening on "))
            {
                return Running { child, said };
            }
        }
        panic!("it ended: {said:?}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn says_that_it_is_no_tee_and_keeps_its_root_over_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (
        directory.path().join("state"),
        directory.path().join("socket"),
    );
    let first = Running::start(&state, &socket);
    assert!(first.said[0].contains("NOT a TEE"), "{:?}", first.said);
    let spki = fs::read_to_string(state.join("root_spki_sha256")).unwrap();
    let announced = format!("root SPKI SHA-256 {}", spki.trim_end());
    assert!(first.said.contains(&announced), "{:?}", first.said);
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
    let second = Running::start(&state, &socket);
    assert_eq!(fs::read(state.join("root.der")).unwrap(), root);
    assert!(second.said.contains(&announced));
    QuotingService::connect(&socket, Duration::from_secs(20)).unwrap();

    let other = Running::start(
        &directory.path().join("other"),
        &directory.path().join("s2"),
    );
    assert!(
        !other.said.contains(&announced),
        "another installation has another root"
    );
}

#[test]
fn refuses_keys_that_others_can_read_and_a_root_of_another_key() {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (
        directory.path().join("state"),
        directory.path().join("socket"),
    );
    drop(Running::start(&state, &socket));
    let run = || {
        let mut child = Command::new(env!("CARGO_BIN_EXE_casemate-fake-tee"))
            .arg("--state")
            .arg(&state)
            .arg("--socket")
            .arg(&socket)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                None => {
                    child.kill().unwrap();
                    panic!("it serves with a damaged installation");
                }
            }
        };
        assert!(!status.success());
        let mut words = String::new();
        child.stderr.unwrap().read_to_string(&mut words).unwrap();
        words
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
