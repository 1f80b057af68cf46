//! The program as an operator starts it: files, sockets, signals, exit codes.

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use casemate_broker::state::database;
use casemate_container::signing::SigningKey;
use casemate_release::rollback::{Rollback, Target, sha256};
use casemate_testkit::fake_tee::FakeTee;
use serde_json::Value;
use tempfile::TempDir;

use crate::former::{VERSIONS, former_grant, plant};
use crate::serving::{
    IO, MALFORMED, NOT_AUTHENTIC, REFUSED, Serving, USAGE, failed, program, run, stderr, stdout,
};
use crate::support::{MODEL, NOW, grant, keyed_grant, measurement, policy};

struct Files {
    directory: TempDir,
    tee: FakeTee,
    provider: SigningKey,
}

impl Files {
    fn new() -> Self {
        let files = Self {
            directory: tempfile::tempdir().unwrap(),
            tee: FakeTee::ephemeral(NOW).unwrap(),
            provider: SigningKey::generate(),
        };
        let provider = files.provider.verifying_key().to_string();
        let state = files.state();
        let state = state.to_str().unwrap();
        let output = run(["init", "--state", state, "--provider", &provider]);
        assert!(output.status.success(), "{}", stderr(&output));
        files
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn policy(&self, version: u64) -> String {
        let text = policy(&self.tee, version, &measurement(1), &[MODEL]);
        self.write("policy.toml", text.as_bytes())
    }

    fn grant(&self) -> String {
        self.write("model.grant", &grant(&self.provider, 2))
    }
}

#[test]
fn init_prints_the_issuer_and_keeps_secrets_to_the_owner() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let output = run(["init", "--state", state.to_str().unwrap()]);
    assert!(output.status.success());
    let issuer = stdout(&output).trim().to_owned();
    assert_eq!(issuer.len(), 64);
    assert_eq!(
        std::fs::read_to_string(state.join("issuer.pub"))
            .unwrap()
            .trim(),
        issuer
    );
    assert_eq!(state.metadata().unwrap().mode() & 0o777, 0o700);
    for file in ["issuer.pem", "token.p8", "storage.key", "broker.sqlite3"] {
        let mode = state.join(file).metadata().unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600, "{file}");
    }

    let pem = std::fs::read(state.join("issuer.pem")).unwrap();
    failed(
        &run(["init", "--state", state.to_str().unwrap()]),
        IO,
        "never overwritten",
    );
    assert_eq!(std::fs::read(state.join("issuer.pem")).unwrap(), pem);
}

#[test]
fn an_administrator_sets_lists_and_deletes() {
    let files = Files::new();
    let serving = Serving::start(&files.state());
    assert_eq!(serving.socket.metadata().unwrap().mode() & 0o777, 0o600);
    assert_eq!(serving.json(&["status"])["policy"], Value::Null);
    failed(
        &serving.admin(&["policy", "show"]),
        REFUSED,
        "no policy is in force",
    );

    let reply = serving.json(&["policy", "set", &files.policy(3)]);
    assert_eq!(reply["version"], 3);
    assert_eq!(
        reply["development_root"],
        hex::encode(files.tee.root_spki_sha256())
    );
    let shown = stdout(&serving.admin(&["policy", "show"]));
    assert_eq!(
        shown,
        std::fs::read_to_string(files.directory.path().join("policy.toml")).unwrap()
    );
    failed(
        &serving.admin(&["policy", "set", &files.policy(2)]),
        REFUSED,
        "versions only go up",
    );
    let broken = files.write("broken.toml", b"version = 9\nunknown = 1\n");
    failed(
        &serving.admin(&["policy", "set", &broken]),
        MALFORMED,
        "policy",
    );
    failed(
        &serving.admin(&["policy", "set", "/nonexistent"]),
        IO,
        "/nonexistent",
    );

    let grant = files.grant();
    let reply = serving.json(&["resource", "put", "default/model/m", "--grant", &grant]);
    assert_eq!(reply["model_digest"], MODEL.to_string());
    assert_eq!(reply["minimum_version"], 2);
    assert_eq!(reply["service"], "m");
    let opaque = files.write("opaque", b"bytes");
    serving.json(&[
        "resource",
        "put",
        "a/b/c",
        "--opaque",
        &opaque,
        "--service",
        "s",
    ]);
    failed(
        &serving.admin(&["resource", "put", "a/b/d", "--grant", &opaque]),
        MALFORMED,
        "key grant",
    );
    let listed = serving.json(&["resource", "list"]);
    let paths: Vec<_> = listed["resources"].as_array().unwrap().iter().collect();
    assert_eq!(paths.len(), 2);
    assert_eq!(
        (&paths[0]["path"], &paths[0]["service"]),
        (&"a/b/c".into(), &"s".into())
    );
    assert!(
        serving
            .admin(&["resource", "delete", "a/b/c"])
            .status
            .success()
    );
    failed(
        &serving.admin(&["resource", "delete", "a/b/c"]),
        REFUSED,
        "no resource",
    );
    assert_eq!(
        serving
            .admin(&["resource", "put", "../etc/x"])
            .status
            .code(),
        Some(2)
    );

    let log = stdout(&serving.admin(&["log", "show", "--json"]));
    let actions: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["action"].take())
        .collect();
    assert_eq!(
        actions,
        [
            "begin",
            "set_policy",
            "put_resource",
            "put_resource",
            "delete_resource"
        ]
    );
    let log = stdout(&serving.admin(&["log", "show", "--from", "2", "--limit", "1"]));
    let line = log.lines().next().unwrap();
    assert!(line.contains("put_resource"), "{line}");
    assert!(line.contains(" default/model/m "), "{line}");
    let head = serving.json(&["log", "verify"]);
    assert_eq!(head["size"], 5);
    let anchor = format!("5:{}", head["hash"].as_str().unwrap());
    serving.json(&["log", "verify", "--anchor", &anchor]);
    let other = format!("5:{}", "00".repeat(32));
    failed(
        &serving.admin(&["log", "verify", "--anchor", &other]),
        NOT_AUTHENTIC,
        "anchored head",
    );
}

#[test]
fn everything_acknowledged_survives_being_killed() {
    let files = Files::new();
    let serving = Serving::start(&files.state());
    serving.json(&["policy", "set", &files.policy(7)]);
    let grant = files.grant();
    let put = serving.json(&["resource", "put", "default/model/m", "--grant", &grant]);
    let status = serving.json(&["status"]);
    serving.signal("KILL");
    assert_eq!(serving.wait(), None);

    let serving = Serving::start(&files.state());
    let after = serving.json(&["status"]);
    for part in ["issuer", "token_key", "policy", "resources", "log"] {
        assert_eq!(after[part], status[part], "{part}");
    }
    assert_eq!(serving.json(&["resource", "list"])["resources"][0], put);
    serving.json(&["log", "verify"]);
}

#[test]
fn a_stopped_broker_leaves_no_socket_and_its_log_can_be_checked_offline() {
    let files = Files::new();
    let serving = Serving::start(&files.state());
    serving.json(&["policy", "set", &files.policy(1)]);
    let socket = serving.socket.clone();
    serving.signal("TERM");
    assert_eq!(serving.wait(), Some(0));
    assert!(!socket.exists());

    let state = files.state();
    let check = |arguments: &[&str]| {
        program()
            .args(["admin", "log", "verify", "--offline"])
            .args(arguments)
            .output()
            .unwrap()
    };
    let output = check(&[state.to_str().unwrap()]);
    assert!(
        stdout(&output).starts_with("the log is whole: 2 entries"),
        "{}",
        stderr(&output)
    );
    let file = database(&state);
    let file = file.to_str().unwrap();
    failed(&check(&[file]), USAGE, "--issuer");
    let issuer = std::fs::read_to_string(state.join("issuer.pub")).unwrap();
    assert!(check(&[file, "--issuer", issuer.trim()]).status.success());
    failed(
        &check(&[file, "--issuer", &"11".repeat(32)]),
        NOT_AUTHENTIC,
        "not signed by the issuer",
    );
    let connection = rusqlite::Connection::open(file).unwrap();
    connection
        .execute("DELETE FROM log WHERE position = 0", [])
        .unwrap();
    drop(connection);
    failed(
        &check(&[state.to_str().unwrap()]),
        NOT_AUTHENTIC,
        "entry 0 is missing",
    );
}

#[test]
fn a_start_that_cannot_succeed_says_why() {
    let files = Files::new();
    let state = files.state();
    let serve = |state: &Path, listen: &str| {
        program()
            .args(["serve", "--listen", listen, "--state"])
            .arg(state)
            .output()
            .unwrap()
    };
    let missing = files.directory.path().join("missing");
    failed(&serve(&missing, "127.0.0.1:0"), IO, "casemate-broker init");

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    failed(
        &serve(&state, &address),
        IO,
        &format!("cannot listen on {address}"),
    );

    let serving = Serving::start(&state);
    failed(
        &serve(&state, "127.0.0.1:0"),
        IO,
        "another casemate-broker is serving",
    );
    drop(serving);

    let mode = |file: &str, mode: u32| {
        std::fs::set_permissions(state.join(file), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for file in ["issuer.pem", "storage.key", "token.p8"] {
        mode(file, 0o644);
        failed(&serve(&state, "127.0.0.1:0"), IO, file);
        mode(file, 0o600);
    }
    mode(".", 0o755);
    failed(&serve(&state, "127.0.0.1:0"), IO, "nobody but its owner");
    mode(".", 0o700);
    for file in ["issuer.pem", "storage.key", "token.p8"] {
        let bytes = std::fs::read(state.join(file)).unwrap();
        std::fs::write(state.join(file), b"garbage").unwrap();
        failed(&serve(&state, "127.0.0.1:0"), MALFORMED, file);
        std::fs::remove_file(state.join(file)).unwrap();
        failed(&serve(&state, "127.0.0.1:0"), IO, file);
        std::fs::write(state.join(file), bytes).unwrap();
        mode(file, 0o600);
    }
    let bytes = std::fs::read(database(&state)).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", database(&state).display()));
    }
    std::fs::write(
        database(&state),
        b"not a database, but long enough to be looked at",
    )
    .unwrap();
    failed(&serve(&state, "127.0.0.1:0"), IO, "database");
    std::fs::write(database(&state), bytes).unwrap();

    let mut serving = Serving::start(&state);
    let mut reply = String::new();
    let mut stream = std::net::TcpStream::connect(&serving.address).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /livez HTTP/1.0\r\n\r\n").unwrap();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.0 200"), "{reply}");
    serving.child.kill().unwrap();
}

#[test]
fn a_client_without_a_broker_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let output = program()
        .args(["admin", "status", "--socket"])
        .arg(&socket)
        .output()
        .unwrap();
    failed(&output, IO, "is casemate-broker serving");
    assert_eq!(stderr(&output).matches("os error").count(), 1);
    failed(&run(["admin", "status"]), USAGE, "--socket PATH is needed");
}

#[test]
fn a_socket_left_behind_is_replaced_but_no_other_file() {
    let files = Files::new();
    let socket = files.state().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    drop(Serving::start(&files.state()));
    let _ = std::fs::remove_file(&socket);
    std::fs::write(&socket, b"precious").unwrap();
    let output = program()
        .args(["serve", "--listen", "127.0.0.1:0", "--state"])
        .arg(files.state())
        .output()
        .unwrap();
    failed(&output, IO, "admin.sock");
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
}

#[test]
fn an_administrator_goes_back_with_the_providers_file_only() {
    let files = Files::new();
    let serving = Serving::start(&files.state());
    let old = files.policy(4);
    let old = files.write("old.toml", &std::fs::read(old).unwrap());
    serving.json(&["policy", "set", &old]);
    serving.json(&["policy", "set", &files.policy(5)]);
    let issuer = std::fs::read_to_string(files.state().join("issuer.pub")).unwrap();
    let rollback = |provider: &SigningKey, target, permitted: &[u8], from_version, to_version| {
        let rollback = Rollback {
            issuer: issuer.trim().parse().unwrap(),
            target,
            from_version,
            to_version,
            permitted: sha256(permitted),
            expires_at: std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() + 600,
        };
        files.write("rollback", &rollback.sign(provider).unwrap())
    };
    let text = std::fs::read(&old).unwrap();
    failed(
        &serving.admin(&["policy", "set", &old]),
        REFUSED,
        "casemate rollback policy",
    );
    let forged = rollback(&SigningKey::generate(), Target::Policy, &text, 5, 4);
    let set = ["policy", "set", &old, "--rollback", &forged];
    failed(&serving.admin(&set), NOT_AUTHENTIC, "not signed by");
    rollback(&files.provider, Target::Policy, b"another policy", 5, 4);
    failed(&serving.admin(&set), REFUSED, "SHA-256");
    rollback(&files.provider, Target::Policy, &text, 5, 4);
    assert_eq!(serving.json(&set)["version"], 4);

    let put = |grant: &str, more: &[&str]| {
        let put = ["resource", "put", "default/model/m", "--grant", grant];
        serving.admin(&[&put, more].concat())
    };
    let new = files.write("new.grant", &grant(&files.provider, 3));
    assert!(put(&new, &[]).status.success());
    let old = files.grant();
    failed(&put(&old, &[]), REFUSED, "casemate rollback model");
    let target = Target::Model {
        path: "default/model/m".parse().unwrap(),
        name: "smollm2".into(),
    };
    let envelope = std::fs::read(&old).unwrap();
    let file = rollback(&files.provider, target, &envelope, 3, 2);
    let output = put(&old, &["--rollback", &file]);
    assert!(output.status.success(), "{}", stderr(&output));
    failed(
        &put(&new, &["--rollback", &file]),
        REFUSED,
        "does not go back",
    );
    serving.json(&["log", "verify"]);
}

#[test]
fn a_closed_service_is_opened_by_a_word_and_the_log_tells() {
    let files = Files::new();
    let serving = Serving::start(&files.state());
    let put = |grant: &str, more: &[&str]| {
        let put = ["resource", "put", "default/model/m", "--grant", grant];
        serving.admin(&[&put, more].concat())
    };
    let keyed = files.write("keyed.grant", &keyed_grant(&files.provider, 2));
    let open = files.grant();
    failed(&put(&keyed, &["--open"]), REFUSED, "leave --open out");
    let stored: Value = serde_json::from_str(&stdout(&put(&keyed, &["--json"]))).unwrap();
    assert_eq!(
        (&stored["access"], &stored["api_keys"]),
        (&"api_keys".into(), &1.into())
    );
    failed(
        &put(&open, &[]),
        REFUSED,
        "the last one at default/model/m asked for API keys",
    );
    let listed = stdout(&serving.admin(&["resource", "list"]));
    assert!(listed.ends_with("\tapi_keys\n"), "{listed}");
    assert!(stdout(&put(&open, &["--open"])).contains("access: open"));
    let log = stdout(&serving.admin(&["log", "show"]));
    let ends = [
        "access=api_keys",
        "access=open grant.access is open to anybody, expected API keys, as the last grant at this path lists them",
        "access=open",
    ];
    let lines: Vec<_> = log.lines().skip(1).collect();
    assert_eq!(lines.len(), ends.len(), "{log}");
    for (line, end) in lines.iter().zip(ends) {
        assert!(
            line.contains("put_resource") && line.ends_with(end),
            "{line}"
        );
    }
    let opaque = ["resource", "put", "a/b/c", "--opaque", &open, "--open"];
    failed(&serving.admin(&opaque), USAGE, "cannot be used with");
}

#[test]
fn files_that_are_something_else_are_named_as_such() {
    let files = Files::new();
    let serving = Serving::start(&files.state());
    let large = files.write("model.casemate", &vec![0xa3; 2 << 20]);
    let put = |option: &str| serving.admin(&["resource", "put", "a/b/c", option, &large]);
    failed(
        &put("--grant"),
        MALFORMED,
        "as `casemate grant --out` writes it",
    );
    failed(&put("--opaque"), MALFORMED, "model.casemate is too large");
    failed(
        &serving.admin(&["policy", "set", &large]),
        MALFORMED,
        "a policy has at most",
    );
    let state = files.state().display().to_string();
    let output = serving.admin(&["policy", "set", &state]);
    failed(&output, IO, &format!("{state}: give one file"));
    let small = files.write("small", b"text");
    let put = ["resource", "put", "a/b/c", "--grant", &small];
    let output = serving.admin(&put);
    failed(&output, MALFORMED, "key grant");
    failed(&output, MALFORMED, &small);
    let policy = files.write("wrong.toml", b"version = 1\nCANARY");
    let output = serving.admin(&["policy", "set", &policy]);
    failed(&output, MALFORMED, &format!("{policy}: policy, line 2: "));
    assert!(!stderr(&output).contains("CANARY"));
    let output = serving.admin(&["resource", "put", "a/b/c"]);
    failed(&output, USAGE, "<--grant <FILE>|--opaque <FILE>>");
    let stranger = files.write("stranger", &grant(&SigningKey::generate(), 1));
    let put = ["resource", "put", "a/b/c", "--grant", &stranger];
    failed(&serving.admin(&put), REFUSED, "this broker's provider is");
    let output = serving.admin(&["resource", "delete", "a/../c"]);
    failed(&output, USAGE, "repository/type/tag, each 1 to 64");
    let help = stdout(&run(["admin", "resource", "put", "--help"]));
    assert!(help.contains("<--grant <FILE>|--opaque <FILE>>"), "{help}");
    let help = stdout(&run(["admin", "--help"]));
    assert!(
        help.contains("admin --socket <PATH> [--json] <COMMAND>"),
        "{help}"
    );
}

#[test]
fn who_serves_grants_of_the_former_form_is_told_which_and_what_to_do() {
    let files = Files::new();
    let state = files.state();
    let path = "default/model/m".parse().unwrap();
    plant(&state, &path, &former_grant(&files.provider, 2, true));
    let connection = rusqlite::Connection::open(database(&state)).unwrap();
    connection.execute_batch(VERSIONS[1].1).unwrap();
    drop(connection);

    let serving = Serving::start(&state);
    let told =
        "default/model/m is not released any more: make it anew with `casemate grant --api-keys";
    let listed = serving.admin(&["resource", "list"]);
    assert!(stdout(&listed).starts_with("default/model/m\tm\t"));
    assert!(stderr(&listed).starts_with(told), "{}", stderr(&listed));
    let former = files.write("former.grant", &former_grant(&files.provider, 2, true));
    let put =
        |grant: &str| serving.admin(&["resource", "put", "default/model/m", "--grant", grant]);
    failed(
        &put(&former),
        MALFORMED,
        "make it anew with `casemate grant",
    );
    failed(&put(&files.grant()), REFUSED, "asked for API keys");
    let keyed = files.write("keyed.grant", &keyed_grant(&files.provider, 2));
    assert!(put(&keyed).status.success());
    assert_eq!(stderr(&serving.admin(&["resource", "list"])), "");
    let log = serving.log();
    assert!(
        log.contains("is kept and not released: make it anew"),
        "{log}"
    );
    assert!(log.contains("default/model/m"), "{log}");
}
