//! `casemate verify` and `casemate proxy` as programs: exit codes, output, and when they listen.

mod support;

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use support::{Enclave, Fault, Mortal};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// An enclave under the real clock, since the programs have no other.
struct Setup {
    _runtime: Runtime,
    enclave: Arc<Enclave>,
    url: String,
    folder: TempDir,
}

impl Setup {
    fn new() -> Setup {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let runtime = Runtime::new().unwrap();
        let enclave = Enclave::new(now);
        let address = runtime.block_on(enclave.serve());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("policy.toml"), enclave.policy(300)).unwrap();
        Setup {
            _runtime: runtime,
            enclave,
            url: format!("http://{address}"),
            folder,
        }
    }

    fn casemate(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_casemate"));
        command
            .args(arguments)
            .arg("--policy")
            .arg(self.folder.path().join("policy.toml"));
        command
    }

    fn verify(&self, more: &[&str]) -> Output {
        self.casemate(&[&["verify", "--service", &self.url], more].concat())
            .output()
            .unwrap()
    }

    fn proxy(&self, listen: &str) -> Child {
        self.casemate(&["proxy", "--enclave", &self.url, "--listen", listen])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

const VERDICTS: [(Fault, i32, &str); 5] = [
    (Fault::None, 0, "trusted"),
    (Fault::NotAttestation, 10, "malformed"),
    (Fault::StaleEvidence, 20, "not_genuine"),
    (Fault::OtherService, 30, "refused"),
    (Fault::NoAttestation, 40, "unreachable"),
];

#[test]
fn the_exit_code_of_verify_is_the_verdict() {
    let setup = Setup::new();
    for (fault, code, verdict) in VERDICTS {
        setup.enclave.set_fault(fault);
        let output = setup.verify(&["--json"]);
        assert_eq!(output.status.code(), Some(code), "{fault:?}: {output:?}");
        let more = "the same with --json";
        let advises = |output: &Output| String::from_utf8_lossy(&output.stderr).contains(more);
        assert!(!advises(&output), "it was given");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        if fault == Fault::NoAttestation {
            assert_eq!(json["error"]["code"], verdict);
        } else {
            assert_eq!(json["verdict"], verdict);
            assert_eq!(json["tee"], false, "a development root is no TEE");
            assert_eq!(json["claims"]["service"] == "demo", code == 0);
            assert_eq!(json["denial"].is_object(), code != 0);
            assert!(!json["transcript"]["checks"].as_array().unwrap().is_empty());
        }

        let output = setup.verify(&[]);
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(advises(&output), ![0, 40].contains(&code));
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.contains("TRUSTED: NOT A TEE"), code == 0, "{text}");
        assert_eq!(text.contains("service demo of issuer"), code == 0, "{text}");
        assert_eq!(output.stderr.is_empty(), code == 0);
    }
}

#[test]
fn verify_tells_an_unusable_policy_or_url_from_a_verdict() {
    let setup = Setup::new();
    let code = |command: &mut Command| command.output().unwrap().status.code();
    assert_eq!(
        code(&mut setup.casemate(&["verify", "--service", "not a url"])),
        Some(2)
    );
    let policy = setup.folder.path().join("policy.toml");
    let text = setup.enclave.policy(300);
    std::fs::write(&policy, &text[..text.find("[service]").unwrap()]).unwrap();
    assert_eq!(setup.verify(&[]).status.code(), Some(2));
    std::fs::write(&policy, "version = 3\nunknown = 1\n").unwrap();
    assert_eq!(setup.verify(&[]).status.code(), Some(2));
    std::fs::remove_file(&policy).unwrap();
    assert_eq!(setup.verify(&[]).status.code(), Some(40));
}

#[test]
fn verify_reports_a_service_that_is_not_there() {
    let setup = Setup::new();
    // The port of a listener that is gone.
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let output = setup
        .casemate(&["verify", "--service", &format!("http://{gone}")])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(40));
    let text = String::from_utf8(output.stderr).unwrap();
    let expected = format!("unreachable: http://{gone}/: ");
    assert!(text.contains(&expected), "{text}");
}

#[test]
fn verify_knows_a_plain_port_that_was_asked_for_tls() {
    let setup = Setup::new();
    let ca = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = setup.folder.path().join("ca.pem");
    std::fs::write(&file, ca.cert.pem()).unwrap();
    let url = setup.url.replace("http://", "https://");
    let ca = file.to_str().unwrap();
    let mut command = setup.casemate(&["verify", "--service", &url, "--ca", ca]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(40));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("does it speak http"), "{text}");
}

#[test]
fn a_wrong_file_is_named_with_what_it_is() {
    let setup = Setup::new();
    let put = |name: &str, bytes: &[u8]| {
        let path = setup.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let said = |command: &mut Command, code: i32| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let (out, err) = (output.stdout, output.stderr);
        String::from_utf8([out, err].concat()).unwrap()
    };
    let model = put("model.gguf", &[&b"GGUF"[..], &[0; 4 << 20]].concat());
    let answer = put("answer.json", br#"{"id":"chatcmpl-0","choices":[]}"#);
    for (file, name, kind) in [
        (&model, "model.gguf", "this is a GGUF model"),
        (&answer, "answer.json", "this is an answer of a model"),
    ] {
        let program = || Command::new(env!("CARGO_BIN_EXE_casemate"));
        let shown = said(program().args(["receipt", "show"]).arg(file), 10);
        let verified = said(setup.casemate(&["receipt", "verify"]).arg(file), 10);
        let by_it = program()
            .args(["verify", "--service", &setup.url, "--policy"])
            .arg(file)
            .output()
            .unwrap();
        assert_eq!(by_it.status.code(), Some(2));
        let judged = String::from_utf8(by_it.stderr).unwrap();
        for text in [shown, verified, judged] {
            assert!(text.contains(name) && text.contains(kind), "{text}");
            // Only so much of it was read.
            assert_eq!(text.contains("more than"), file == &model, "{text}");
        }
    }
}

#[test]
fn the_proxy_does_not_listen_unless_the_service_verifies() {
    let setup = Setup::new();
    for (fault, code, _) in &VERDICTS[1..] {
        setup.enclave.set_fault(*fault);
        let output = setup.proxy("127.0.0.1:0").wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(*code), "{fault:?}");
        assert!(
            !String::from_utf8(output.stdout)
                .unwrap()
                .contains("listening")
        );
        assert!(!output.stderr.is_empty());
    }
}

/// Where a proxy listens, and what it printed before it said so.
fn listening(proxy: &mut Child) -> (String, Vec<String>) {
    let mut lines = BufReader::new(proxy.stdout.take().unwrap()).lines();
    let mut shown = Vec::new();
    loop {
        let line = lines.next().expect("a line before the end").unwrap();
        if let Some(address) = line.strip_prefix("listening on ") {
            return (address.to_owned(), shown);
        }
        shown.push(line);
    }
}

/// Ends a proxy as an operator does; returns its log.
fn ended(mut proxy: Child) -> String {
    let pid = rustix::process::Pid::from_child(&proxy);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(proxy.wait().unwrap().success());
    let mut log = String::new();
    let mut stderr = proxy.stderr.take().unwrap();
    stderr.read_to_string(&mut log).unwrap();
    log
}

#[test]
fn the_proxy_tells_that_its_service_is_gone_and_that_it_is_back() {
    let mut setup = Setup::new();
    let mut service = Mortal::start(&setup.enclave, false);
    setup.url = format!("http://{}", service.address);
    let mut proxy = setup.proxy("127.0.0.1:0");
    let (address, _) = listening(&mut proxy);
    let get = |path: &str| {
        let url = format!("http://{address}");
        let reply = casemate_testkit::deployment::http_get(&url, path).unwrap();
        (reply.status, reply.body)
    };
    let becomes = |status: u16| {
        let start = Instant::now();
        loop {
            let (found, body) = get("/readyz");
            if found == status {
                return body;
            }
            assert!(
                start.elapsed() < Duration::from_secs(120),
                "{found}: {body}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    becomes(200);
    service.kill();
    for _ in 0..3 {
        let (status, body) = get("/v1/models");
        assert_eq!(status, 502, "{body}");
        assert!(
            body.contains(&setup.url) && body.contains("Connection refused"),
            "{body}"
        );
    }
    assert!(becomes(503).contains("service_unreachable"));
    service.revive();
    let body = becomes(200);
    assert!(body.contains(&setup.url), "{body}");

    let log = ended(proxy);
    let told = |what: &str| {
        log.lines()
            .filter(|line| line.contains(what))
            .collect::<Vec<_>>()
    };
    let failed = told("a request failed");
    assert!(
        !failed.is_empty() && failed[0].contains("Connection refused"),
        "{log}"
    );
    assert!(failed[0].contains(&setup.url), "{log}");
    assert_eq!(
        (told("not ready").len(), told("ready again").len()),
        (1, 1),
        "{log}"
    );
}

#[test]
fn the_proxy_serves_and_ends_when_told() {
    let setup = Setup::new();
    let mut proxy = setup.proxy("127.0.0.1:0");
    let (address, shown) = listening(&mut proxy);
    assert!(
        shown
            .iter()
            .any(|line| line.starts_with("TRUSTED: NOT A TEE")),
        "{shown:?}"
    );
    assert!(
        shown.iter().any(|line| line.contains("credential.issuer")),
        "{shown:?}"
    );

    let runtime = Runtime::new().unwrap();
    let answer = runtime.block_on(async {
        let client = reqwest::Client::builder()
            .tls_certs_only([])
            .no_proxy()
            .build()
            .unwrap();
        let post = client
            .post(format!("http://{address}/v1/echo"))
            .body("hello");
        post.send().await.unwrap().json::<Value>().await.unwrap()
    });
    assert_eq!(answer["body"], "hello");

    // A second proxy on the same port says so and leaves.
    let output = setup.proxy(&address).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(40));
    assert!(String::from_utf8(output.stderr).unwrap().contains(&address));

    let log = ended(proxy);
    assert!(!log.contains("hello"), "a prompt is in the log");
}
