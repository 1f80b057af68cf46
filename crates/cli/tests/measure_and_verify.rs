//! `casemate measure` and `casemate verify` as a user runs them: output, JSON and exit codes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

use casemate_attest::measure::{FileDigest, Measurement, Process};
use casemate_attest::{Evidence, ReportData, UnixTime};
use casemate_testkit::data;
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::fake_tee::peer::measure_peer;
use casemate_testkit::policies::{PolicyFile, entry_for};
use serde_json::Value;
use tempfile::TempDir;

const REPORT_DATA: ReportData = ReportData::new([0x42; 64]);

fn casemate<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_casemate"))
        .args(arguments)
        .env_remove("NO_COLOR")
        .output()
        .expect("casemate runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("the output is text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("the output is text")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A fake TEE's evidence about some process, and a policy that accepts it.
struct Scene {
    folder: TempDir,
    tee: FakeTee,
    measurement: Measurement,
    now: u64,
}

impl Scene {
    fn new() -> Scene {
        let now = UnixTime::try_from(SystemTime::now()).unwrap().as_secs();
        let measurement = Measurement::of_process(&Process {
            executable: FileDigest::of(b"program"),
            arguments: &[c"--config", c"enclave.toml"],
            environment: &[],
            config: Some(FileDigest::of(b"[service]\n")),
        });
        let scene = Scene {
            folder: TempDir::new().unwrap(),
            tee: FakeTee::ephemeral(now).unwrap(),
            measurement,
            now,
        };
        let policy = PolicyFile::new(scene.tee.root_spki_sha256(), measurement);
        scene.write("policy.toml", policy.to_toml());
        let evidence = scene.tee.quote(&measurement, &REPORT_DATA, now).unwrap();
        scene.write("evidence.json", evidence.to_json());
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.path(name), contents).unwrap();
    }

    fn evidence(&self) -> Evidence {
        Evidence::from_json(&fs::read(self.path("evidence.json")).unwrap()).unwrap()
    }

    fn verify(&self, more: &[&str]) -> Output {
        verify(
            &self.path("policy.toml"),
            &self.path("evidence.json"),
            &REPORT_DATA,
            more,
        )
    }
}

fn verify(policy: &Path, evidence: &Path, report_data: &ReportData, more: &[&str]) -> Output {
    let report_data = report_data.to_string();
    let mut arguments: Vec<&OsStr> = vec!["verify".as_ref(), "--policy".as_ref()];
    arguments.push(policy.as_os_str());
    arguments.push("--evidence".as_ref());
    arguments.push(evidence.as_os_str());
    arguments.extend(["--report-data", &report_data].map(OsStr::new));
    arguments.extend(more.iter().map(OsStr::new));
    casemate(arguments)
}

#[test]
fn development_evidence_is_trusted_and_called_not_a_tee() {
    let scene = Scene::new();
    let output = scene.verify(&[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert!(text.contains("TRUSTED: NOT A TEE"), "{text}");
    assert!(
        text.contains("not a tee") || text.contains("not a TEE"),
        "{text}"
    );
    assert!(text.contains("passed   measurement.rtmr1"), "{text}");
    assert!(text.contains("skipped  measurement.mr_owner"), "{text}");
    assert!(
        !text.contains("FAILED") && !text.contains('\u{1b}'),
        "{text}"
    );
    assert!(!text.contains("GIVEN BY HAND"), "{text}");

    let output = scene.verify(&["--json"]);
    let verdict = json(&output);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(verdict["verdict"], "trusted");
    assert_eq!(verdict["exit_code"], 0);
    assert_eq!(verdict["tee"], false);
    assert_eq!(verdict["denial"], Value::Null);
    assert_eq!(verdict["time_given_by_hand"], false);
    assert_eq!(verdict["claims"]["measurement_name"], "casemate-enclave");
    let report = &verdict["claims"]["report"]["td"];
    assert_eq!(report["mr_td"], hex::encode(scene.measurement.mr_td));
    assert_eq!(report["report_data"], REPORT_DATA.to_string());
    let checks = verdict["transcript"]["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["status"] != "failed"));
    assert!(checks.iter().any(|check| check["status"] == "skipped"));
}

#[test]
fn each_kind_of_denial_has_its_exit_code() {
    let scene = Scene::new();
    let good = scene.evidence();
    let check = |code: i32, verdict: &str, claim: &str| {
        let output = scene.verify(&[]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(code), "{claim}: {text}");
        assert!(text.contains("FAILED") && text.contains(claim), "{text}");
        let banner = format!("{} by {claim}", verdict.to_uppercase().replace('_', " "));
        assert!(text.contains(&banner), "{banner}: {text}");
        assert!(stderr(&output).contains(claim), "{}", stderr(&output));
        let output = scene.verify(&["--json"]);
        assert_eq!(output.status.code(), Some(code));
        let value = json(&output);
        assert_eq!(value["verdict"], verdict);
        assert_eq!(value["exit_code"], code);
        assert_eq!(value["denial"]["claim"], claim);
        assert_eq!(value["claims"], Value::Null);
        assert_eq!(value["tee"], false);
        for key in ["found", "expected", "remedy"] {
            assert_ne!(value["denial"][key], "", "{key}");
        }
    };

    scene.write("evidence.json", "{}");
    check(10, "malformed", "evidence.document");
    let mut evidence = good.clone();
    evidence.quote[0] = 7;
    scene.write("evidence.json", evidence.to_json());
    check(10, "malformed", "quote.structure");

    let mut evidence = good.clone();
    evidence.quote[200] ^= 1;
    scene.write("evidence.json", evidence.to_json());
    check(20, "not_genuine", "quote.signature");
    let stranger = FakeTee::ephemeral(scene.now).unwrap();
    let evidence = stranger
        .quote(&scene.measurement, &REPORT_DATA, scene.now)
        .unwrap();
    scene.write("evidence.json", evidence.to_json());
    check(20, "not_genuine", "root_of_trust");
    let other = ReportData::new([0x43; 64]);
    let evidence = scene
        .tee
        .quote(&scene.measurement, &other, scene.now)
        .unwrap();
    scene.write("evidence.json", evidence.to_json());
    check(20, "not_genuine", "report_data");

    let mut tampered = scene.measurement;
    tampered.rtmr[2][0] ^= 1;
    let evidence = scene.tee.quote(&tampered, &REPORT_DATA, scene.now).unwrap();
    scene.write("evidence.json", evidence.to_json());
    check(30, "refused", "measurement.rtmr2");
    let output = scene.verify(&[]);
    assert!(stdout(&output).contains("NOT A TEE"), "{}", stdout(&output));
}

#[test]
fn what_cannot_be_read_or_used_is_not_blamed_on_the_evidence() {
    let scene = Scene::new();
    let policy = scene.path("policy.toml");
    let evidence = scene.path("evidence.json");
    let missing = scene.path("missing");
    for (policy, evidence) in [(&missing, &evidence), (&policy, &missing)] {
        let output = verify(policy, evidence, &REPORT_DATA, &[]);
        assert_eq!(output.status.code(), Some(40), "{output:?}");
        assert!(stderr(&output).contains("missing"), "{output:?}");
        assert!(output.stdout.is_empty());
        let output = verify(policy, evidence, &REPORT_DATA, &["--json"]);
        assert_eq!(json(&output)["error"]["class"], "io");
    }
    let text = fs::read_to_string(&policy).unwrap();
    scene.write("bad.toml", text.replace("rtmr0", "rtmr9"));
    let output = verify(&scene.path("bad.toml"), &evidence, &REPORT_DATA, &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let line = 1 + text
        .lines()
        .position(|line| line.starts_with("rtmr0"))
        .unwrap();
    let message = stderr(&output);
    assert!(
        message.contains("bad.toml") && message.contains(&format!("line {line}")),
        "{message}"
    );

    for arguments in [
        vec!["verify", "--policy", "p", "--evidence", "e"],
        vec![
            "verify",
            "--policy",
            "p",
            "--evidence",
            "e",
            "--report-data",
            "42",
        ],
        vec!["verify", "--evidence", "e", "--report-data", "42"],
        vec!["measure", "--exe", "e"],
    ] {
        let output = casemate(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}

#[test]
fn a_capture_is_judged_as_of_a_time_given_by_hand_and_says_so() {
    let Some(folder) = data::dir() else { return };
    let folder = folder.join("evidence/intel/phala");
    let scene = Scene::new();
    let evidence = Evidence {
        tee: casemate_attest::TeeKind::Tdx,
        quote: fs::read(folder.join("tdx_v4_quote.bin")).unwrap(),
        collateral: serde_json::from_slice(
            &fs::read(folder.join("tdx_v4_quote_collateral.json")).unwrap(),
        )
        .unwrap(),
    };
    let quote = evidence.unverified_quote().unwrap();
    let report = quote.report().td().unwrap();
    scene.write("evidence.json", evidence.to_json());
    let text = format!(
        "version = 1\ntee = [\"tdx\"]\n[tcb]\nminimum_evaluation_data_number = 17\n{}",
        entry_for(quote.report())
    );
    scene.write("policy.toml", text);
    let judge = |more: &[&str]| {
        verify(
            &scene.path("policy.toml"),
            &scene.path("evidence.json"),
            &report.report_data,
            more,
        )
    };
    let output = judge(&["--now", "2025-06-19T12:00:00Z"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert!(
        text.contains("2025-06-19T12:00:00Z, GIVEN BY HAND"),
        "{text}"
    );
    assert!(text.contains("TRUSTED: a genuine Intel TDX"), "{text}");
    let output = judge(&["--now", "2025-06-19T12:00:00Z", "--json"]);
    assert_eq!(json(&output)["time_given_by_hand"], true);
    assert_eq!(json(&output)["tee"], true);
    // Today its collateral has expired.
    let output = judge(&[]);
    assert_eq!(output.status.code(), Some(20), "{output:?}");
    assert!(
        stdout(&output).contains("collateral.validity"),
        "{output:?}"
    );
}

#[test]
fn measure_gives_the_entry_that_a_policy_takes() {
    let folder = TempDir::new().unwrap();
    let exe = folder.path().join("program");
    let config = folder.path().join("enclave.toml");
    fs::write(&exe, b"program").unwrap();
    fs::write(&config, b"[service]\n").unwrap();
    let config_text = config.to_str().unwrap();
    let measure = |more: &[&str]| {
        let mut arguments = vec![
            "measure",
            "--exe",
            exe.to_str().unwrap(),
            "--config",
            config_text,
        ];
        arguments.extend(more);
        casemate(arguments)
    };
    let config_argument = std::ffi::CString::new(config_text).unwrap();
    let expected = |arguments: &[&std::ffi::CStr], environment: &[&std::ffi::CStr]| {
        Measurement::of_process(&Process {
            executable: FileDigest::of(b"program"),
            arguments,
            environment,
            config: Some(FileDigest::of(b"[service]\n")),
        })
    };
    let plain = expected(&[c"--config", &config_argument], &[]);
    let output = measure(&["--name", "my enclave"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(stdout(&output).contains(&plain.to_policy_entry("my enclave").unwrap()[..]));
    assert!(stdout(&output).starts_with("# Development measurement"));

    // Order of arguments counts, order of the environment does not.
    let output = measure(&[
        "--arg",
        "--verbose",
        "--arg",
        "--config",
        "--arg",
        config_text,
        "--env",
        "B=2",
        "--env",
        "A=1",
        "--json",
    ]);
    let full = expected(
        &[c"--verbose", c"--config", &config_argument],
        &[c"A=1", c"B=2"],
    );
    let value = json(&output);
    assert_eq!(value["development"], true);
    assert_eq!(value["name"], "casemate-enclave");
    for (key, register) in [
        ("mr_td", full.mr_td),
        ("mr_config_id", full.mr_config_id),
        ("rtmr0", full.rtmr[0]),
        ("rtmr1", full.rtmr[1]),
        ("rtmr2", full.rtmr[2]),
        ("rtmr3", full.rtmr[3]),
    ] {
        assert_eq!(value[key], hex::encode(register), "{key}");
    }
    assert_ne!(full.rtmr[1], plain.rtmr[1]);

    for (code, more) in [
        (2, vec!["--platform", "tdx"]),
        (2, vec!["--arg", "--verbose"]),
        (2, vec!["--arg", "--config=elsewhere"]),
        (2, vec!["--env", "NOVALUE"]),
        (2, vec!["--env", "=x"]),
        (2, vec!["--name", "a\"b"]),
    ] {
        let output = measure(&more);
        assert_eq!(output.status.code(), Some(code), "{more:?}: {output:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{more:?}"
        );
    }
    let output = casemate([
        "measure",
        "--exe",
        "/nonexistent/enclave",
        "--config",
        config_text,
    ]);
    assert_eq!(output.status.code(), Some(40), "{output:?}");
}

/// What the fake TEE measures of a living process (this one), `casemate measure` computes from its files.
#[test]
fn measure_agrees_with_the_fake_tee_about_a_living_process() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let living = measure_peer(&ours).unwrap().measurement;
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("config");
    fs::write(&config, b"").unwrap();
    let mut arguments: Vec<std::ffi::OsString> = vec!["measure".into(), "--json".into()];
    arguments.extend(["--exe".into(), std::env::current_exe().unwrap().into()]);
    arguments.extend(["--config".into(), config.into()]);
    for (name, value) in std::env::vars_os() {
        let mut variable = name;
        variable.push("=");
        variable.push(value);
        arguments.extend(["--env".into(), variable]);
    }
    let value = json(&casemate(arguments));
    assert_eq!(value["mr_td"], hex::encode(living.mr_td));
    assert_eq!(value["rtmr2"], hex::encode(living.rtmr[2]));
}
