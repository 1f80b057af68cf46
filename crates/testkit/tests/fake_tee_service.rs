//! The fake TEE as a service: what it measures, whom it turns away, and that bad clients harm nobody else.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use casemate_attest::measure::{FileDigest, Measurement, Process};
use casemate_attest::{Evidence, ReportData};
use casemate_tee::wire::{self, Response};
use casemate_tee::{QuoteProvider, QuotingService, TeeError};
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::fake_tee::peer::{PeerError, measure_peer};
use casemate_testkit::fake_tee::server::{CutOff, Event, Options, Server};

const NOW: u64 = 1_795_219_200; // 2026-11-21
const PEER: &str = env!("CARGO_BIN_EXE_casemate-test-peer");
const WAIT: Duration = Duration::from_secs(20);

/// A service in this process, with its events on record.
struct Service {
    directory: tempfile::TempDir,
    socket: PathBuf,
    events: Arc<Mutex<Vec<String>>>,
    _server: Server,
}

impl Service {
    fn start(change: impl FnOnce(&mut Options)) -> Service {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("tee");
        let events = Arc::new(Mutex::new(Vec::new()));
        let mut options = Options::new(socket.clone());
        change(&mut options);
        let observer = {
            let events = Arc::clone(&events);
            move |event: &Event| {
                let name = match event {
                    Event::Measured(_) => "measured",
                    Event::NotMeasured(_) => "not measured",
                    Event::TooMany { .. } => "too many",
                    Event::CutOff(CutOff::TooLarge) => "cut off: too large",
                    Event::CutOff(CutOff::Malformed) => "cut off: malformed",
                    Event::CutOff(CutOff::Io(_)) => "cut off: i/o",
                    Event::Failed(_) => "failed",
                    Event::Accept(_) => "accept",
                };
                events.lock().unwrap().push(name.to_owned());
            }
        };
        let tee = FakeTee::ephemeral(NOW).unwrap();
        let server = Server::start(tee, options, Box::new(|| NOW), Box::new(observer)).unwrap();
        Service {
            directory,
            socket,
            events,
            _server: server,
        }
    }

    fn wait_for(&self, event: &str, count: usize) {
        let deadline = Instant::now() + WAIT;
        loop {
            let events = self.events.lock().unwrap().clone();
            if events.iter().filter(|seen| *seen == event).count() >= count {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "no {count} × {event:?} in {events:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn file(&self, name: &str, contents: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, contents).unwrap();
        path
    }

    fn works(&self) {
        let service = QuotingService::connect(&self.socket, WAIT).unwrap();
        service.quote(&ReportData::new([1; 64])).unwrap();
    }
}

fn measured(output: &Output) -> Measurement {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    measurement_of(&Evidence::from_json(&output.stdout).unwrap())
}

fn measurement_of(evidence: &Evidence) -> Measurement {
    let quote = evidence.unverified_quote().unwrap();
    let report = quote.report().td().unwrap();
    Measurement {
        mr_td: report.mr_td,
        mr_config_id: report.mr_config_id,
        rtmr: report.rtmr,
    }
}

fn peer(socket: &Path) -> Command {
    let mut command = Command::new(PEER);
    command.env_clear().arg(socket);
    command
}

/// What `casemate measure` computes for a command, from files.
fn expected(
    exe: &Path,
    arguments: &[&str],
    environment: &[&str],
    config: Option<&[u8]>,
) -> Measurement {
    let strings = |list: &[&str]| -> Vec<CString> {
        list.iter()
            .map(|text| CString::new(*text).unwrap())
            .collect()
    };
    let (arguments, environment) = (strings(arguments), strings(environment));
    Measurement::of_process(&Process {
        executable: FileDigest::of(&fs::read(exe).unwrap()),
        arguments: &arguments
            .iter()
            .map(CString::as_c_str)
            .collect::<Vec<&CStr>>(),
        environment: &environment
            .iter()
            .map(CString::as_c_str)
            .collect::<Vec<&CStr>>(),
        config: config.map(FileDigest::of),
    })
}

#[test]
fn a_process_is_measured_as_computed_beforehand_from_files() {
    let service = Service::start(|_| ());
    let config = service.file("a.toml", b"[service]\n");
    let socket = service.socket.to_str().unwrap();
    let output = peer(&service.socket)
        .env("B", "2")
        .env("A", "1")
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    let arguments = [socket, "--config", config.to_str().unwrap()];
    let expected = expected(
        Path::new(PEER),
        &arguments,
        &["A=1", "B=2"],
        Some(b"[service]\n"),
    );
    assert_eq!(measured(&output), expected);
}

#[test]
fn arguments_environment_executable_and_configuration_each_show() {
    let service = Service::start(|_| ());
    let config = service.file("a.toml", b"a = 1\n");
    let run = |command: &mut Command| measured(&command.output().unwrap());
    let base = run(peer(&service.socket).arg("--config").arg(&config));

    let other_argument = run(peer(&service.socket)
        .arg("--config")
        .arg(&config)
        .arg("--debug"));
    assert_ne!(other_argument.rtmr[1], base.rtmr[1]);
    assert_eq!(
        Measurement {
            rtmr: base.rtmr,
            ..other_argument
        },
        base
    );

    let preloaded = run(peer(&service.socket)
        .arg("--config")
        .arg(&config)
        .env("LD_PRELOAD", ""));
    assert_ne!(preloaded.rtmr[2], base.rtmr[2]);
    assert_eq!(
        Measurement {
            rtmr: base.rtmr,
            ..preloaded
        },
        base
    );

    // The same program but for a byte that it never reads.
    let mut bytes = fs::read(PEER).unwrap();
    bytes.push(0);
    let patched = service.file("patched", &bytes);
    fs::set_permissions(&patched, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&patched);
    command
        .env_clear()
        .arg(&service.socket)
        .arg("--config")
        .arg(&config);
    let other_program = run(&mut command);
    assert_ne!(other_program.mr_td, base.mr_td);
    assert_eq!(
        Measurement {
            mr_td: base.mr_td,
            ..other_program
        },
        base
    );

    fs::write(&config, b"a = 2\n").unwrap();
    let other_config = run(peer(&service.socket).arg("--config").arg(&config));
    assert_ne!(other_config.mr_config_id, base.mr_config_id);
    assert_eq!(
        Measurement {
            mr_config_id: base.mr_config_id,
            ..other_config
        },
        base
    );
}

#[test]
fn a_relative_configuration_is_the_one_in_the_peers_directory() {
    let service = Service::start(|_| ());
    service.file("a.toml", b"theirs");
    let output = peer(&service.socket)
        .arg("--config=a.toml")
        .current_dir(service.directory.path())
        .output()
        .unwrap();
    assert_eq!(measured(&output).mr_config_id, FileDigest::of(b"theirs"));
    let without = measured(&peer(&service.socket).output().unwrap());
    assert_eq!(without.mr_config_id, [0; 48]);
}

#[test]
fn a_peer_whose_configuration_cannot_be_measured_gets_no_quote() {
    let service = Service::start(|_| ());
    let directory = service.directory.path().to_str().unwrap().to_owned();
    let huge = service.file("huge", &vec![b' '; 1024 * 1024 + 1]);
    let huge = huge.to_str().unwrap();
    for arguments in [
        vec!["--config", "/nonexistent"],
        vec!["--config", &directory],
        vec!["--config", huge],
        vec!["--config", "a", "--config", "b"],
    ] {
        let output = peer(&service.socket).args(&arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(
            words.contains("cannot measure the peer"),
            "{arguments:?}: {words}"
        );
    }
    service.wait_for("not measured", 4);
}

#[test]
fn a_peer_cannot_state_a_measurement() {
    let service = Service::start(|_| ());
    let honest = ask(
        &service.socket,
        &wire::encode_request(&ReportData::new([3; 64])),
    );
    assert!(matches!(honest, Response::Evidence(_)));
    let zeros = "A".repeat(86);
    for (name, value) in [
        ("mr_td", "\"00\""),
        ("mr_config_id", "\"00\""),
        ("rtmr1", "\"00\""),
        ("measurement", "{}"),
        ("pid", "1"),
        ("report_data", "\"\""),
    ] {
        let request = format!("{{\"report_data\":\"{zeros}==\",\"{name}\":{value}}}");
        let answer = ask(&service.socket, request.as_bytes());
        assert!(matches!(answer, Response::Error(_)), "{name} was accepted");
    }
    service.wait_for("cut off: malformed", 6);
}

#[test]
fn a_connection_keeps_the_measurement_made_when_it_was_accepted() {
    let service = Service::start(|_| ());
    let connection = QuotingService::connect(&service.socket, WAIT).unwrap();
    let first = connection.quote(&ReportData::new([1; 64])).unwrap();
    let second = connection.quote(&ReportData::new([2; 64])).unwrap();
    assert_eq!(measurement_of(&first), measurement_of(&second));
    service.wait_for("measured", 1);
    assert_eq!(service.events.lock().unwrap().len(), 1);
}

#[test]
fn report_data_is_the_askers() {
    let service = Service::start(|_| ());
    let connection = QuotingService::connect(&service.socket, WAIT).unwrap();
    let evidence = connection.quote(&ReportData::new([0xa5; 64])).unwrap();
    let quote = evidence.unverified_quote().unwrap();
    assert_eq!(*quote.report().report_data(), ReportData::new([0xa5; 64]));
}

#[test]
fn garbage_is_answered_with_an_error_and_harms_nobody_else() {
    let service = Service::start(|options| options.message_timeout = Duration::from_millis(300));
    let standing = QuotingService::connect(&service.socket, WAIT).unwrap();

    for garbage in [&b"\xff\xfe\0"[..], b"", b"[[[[[[", b"{\"report_data\":7}"] {
        assert!(
            matches!(ask(&service.socket, garbage), Response::Error(_)),
            "{garbage:?}"
        );
    }
    service.wait_for("cut off: malformed", 4);

    let mut oversized = UnixStream::connect(&service.socket).unwrap();
    oversized
        .write_all(&(wire::MAX_REQUEST as u32 + 1).to_be_bytes())
        .unwrap();
    assert!(matches!(answer(&mut oversized), Response::Error(_)));
    let end = oversized.read(&mut [0]).unwrap();
    assert_eq!(end, 0, "the connection is closed after the error");

    let mut stalled = UnixStream::connect(&service.socket).unwrap();
    stalled.write_all(b"\0\0\0\x10{").unwrap();
    service.wait_for("cut off: i/o", 1);

    let silent = UnixStream::connect(&service.socket).unwrap();
    // Takes no answers: whatever the socket buffers hold, the writer meets its deadline.
    let mut deaf = UnixStream::connect(&service.socket).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let request = wire::encode_request(&ReportData::new([1; 64]));
    while wire::write_frame(&mut deaf, &request).is_ok() {}
    service.wait_for("cut off: i/o", 2);

    standing.quote(&ReportData::new([1; 64])).unwrap();
    service.works();
    drop(silent);
}

#[test]
fn connections_are_limited_in_all_and_per_process_and_come_free_again() {
    for change in [
        (|options: &mut Options| options.max_connections = 2) as fn(&mut Options),
        |options: &mut Options| options.max_per_process = 2,
    ] {
        let service = Service::start(change);
        let first = QuotingService::connect(&service.socket, WAIT).unwrap();
        let second = QuotingService::connect(&service.socket, WAIT).unwrap();
        let third = QuotingService::connect(&service.socket, WAIT);
        assert!(matches!(third.err(), Some(TeeError::Unavailable { .. })));
        service.wait_for("too many", 1);
        first.quote(&ReportData::new([1; 64])).unwrap();
        drop(second);
        let deadline = Instant::now() + WAIT;
        while QuotingService::connect(&service.socket, WAIT).is_err() {
            assert!(Instant::now() < deadline, "the place did not come free");
        }
    }
}

#[test]
fn a_peer_that_is_gone_is_not_measured() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let status = peer(&path).arg("--hang-up").status().unwrap();
    assert!(status.success());
    let (stream, _) = listener.accept().unwrap();
    assert!(matches!(measure_peer(&stream), Err(PeerError::Gone)));
}

#[test]
fn a_living_process_with_the_number_is_not_taken_for_a_peer_that_hung_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    // This process lives on, as one that was given the number of an ended peer would.
    drop(UnixStream::connect(&path).unwrap());
    let (stream, _) = listener.accept().unwrap();
    assert!(matches!(measure_peer(&stream), Err(PeerError::Gone)));
}

#[test]
fn the_socket_is_its_owners_and_goes_with_the_service() {
    let service = Service::start(|_| ());
    let mode = fs::symlink_metadata(&service.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Server::start(
        FakeTee::ephemeral(NOW).unwrap(),
        Options::new(service.socket.clone()),
        Box::new(|| NOW),
        Box::new(|_| ()),
    );
    assert!(second.is_err(), "a served socket must not be taken over");
    service.works();
    let Service {
        directory,
        socket,
        _server,
        ..
    } = service;
    drop(_server);
    assert!(!socket.exists());

    let stale = directory.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let group = Options {
        mode: 0o660,
        ..Options::new(stale.clone())
    };
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let server = Server::start(tee, group, Box::new(|| NOW), Box::new(|_| ())).unwrap();
    assert_eq!(
        fs::symlink_metadata(&stale).unwrap().permissions().mode() & 0o777,
        0o660
    );
    drop(server);

    let precious = directory.path().join("precious");
    fs::write(&precious, b"not a socket").unwrap();
    let tee = FakeTee::ephemeral(NOW).unwrap();
    let refused = Server::start(
        tee,
        Options::new(precious.clone()),
        Box::new(|| NOW),
        Box::new(|_| ()),
    );
    assert!(refused.is_err());
    assert_eq!(fs::read(precious).unwrap(), b"not a socket");
}

fn ask(socket: &Path, request: &[u8]) -> Response {
    let mut stream = UnixStream::connect(socket).unwrap();
    wire::write_frame(&mut stream, request).unwrap();
    answer(&mut stream)
}

fn answer(stream: &mut UnixStream) -> Response {
    let bytes = wire::read_frame(stream, wire::MAX_RESPONSE).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}
