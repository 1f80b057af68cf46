//! A broker that is killed under load at random instants, again and again, and forgets nothing that it acknowledged.
//!
//! SIGKILL takes the process and leaves the page cache, so this is no test of the disk: that commits are synced is a
//! matter of SQLite's settings (`store::schema` tests them). What it finds are the broker's own mistakes: an answer
//! that goes out before its transaction is committed, a change that is made in two transactions, a log that says
//! something else than the tables, a state that does not open after it was left in the middle of something.
//!
//! `CASEMATE_KILLS=1000 cargo test -p casemate-broker --test it killed -- --nocapture` runs it for longer.

mod ledger;
mod load;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use casemate_broker::state::{database, issuer_public_key};
use casemate_container::signing::SigningKey;
use casemate_release::random::{Random, SystemRandom};
use rusqlite::Connection;

use self::load::Load;
use crate::serving::{Serving, program, run, stderr, stdout};

const KILLS: u64 = 20;

fn random_below(limit: u64) -> u64 {
    let mut bytes = [0; 8];
    SystemRandom.fill(&mut bytes).unwrap();
    u64::from_le_bytes(bytes) % limit
}

fn init(state: &Path, provider: &SigningKey) {
    let provider = provider.verifying_key().to_string();
    let state = state.to_str().unwrap();
    let output = run(["init", "--state", state, "--provider", &provider]);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Starts a broker and kills it before it says that it is ready, mostly.
fn kill_while_starting(state: &Path) {
    let mut child = program()
        .args(["serve", "--listen", "127.0.0.1:0", "--state"])
        .arg(state)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(random_below(60)));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn whatever_was_acknowledged_survives_being_killed_under_load() {
    let kills = match std::env::var("CASEMATE_KILLS") {
        Ok(text) => text.parse().expect("CASEMATE_KILLS is a number"),
        Err(_) => KILLS,
    };
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let load = Load::new();
    init(&state, &load.provider);

    for kill in 1..=kills {
        let mut serving = Serving::start(&state);
        load.ledger
            .lock()
            .unwrap()
            .check(&state)
            .unwrap_or_else(|lost| panic!("after kill {}: {lost}", kill - 1));
        let millis = 20 + random_below(500);
        let (address, socket) = (serving.address.clone(), serving.socket.clone());
        runtime.block_on(load.run_until(&address, &socket, || {
            std::thread::sleep(Duration::from_millis(millis));
            serving.child.kill().unwrap();
            serving.child.wait().unwrap();
        }));
        if kill % 4 == 0 {
            kill_while_starting(&state);
        }
        if kill % 100 == 0 {
            println!("{}", load.ledger.lock().unwrap().summary(kill));
        }
    }
    let serving = Serving::start(&state);
    let mut ledger = load.ledger.lock().unwrap();
    ledger.check(&state).unwrap();
    println!("{}", ledger.summary(kills));
    ledger.assert_all_kinds_occurred();
    serving.signal("TERM");
    assert_eq!(serving.wait(), Some(0));

    // As an administrator would look at it: without a broker, against the last credential.
    let credential = directory.path().join("credential");
    std::fs::write(
        &credential,
        ledger.last_credential().expect("one was issued"),
    )
    .unwrap();
    let verify = |arguments: [&Path; 2]| {
        program()
            .args(["admin", "log", "verify", "--offline"])
            .arg(arguments[0])
            .arg("--credential")
            .arg(arguments[1])
            .output()
            .unwrap()
    };
    let output = verify([&state, &credential]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("the log is whole"));
}

/// The check above would be worth nothing if it let losses pass.
#[test]
fn the_check_finds_what_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let load = Load::new();
    init(&state, &load.provider);
    let serving = Serving::start(&state);
    let a_while = || std::thread::sleep(Duration::from_secs(2));
    runtime.block_on(load.run_until(&serving.address, &serving.socket, a_while));
    serving.signal("TERM");
    assert_eq!(serving.wait(), Some(0));
    let ledger = load.ledger.lock().unwrap().clone();
    ledger.assert_all_kinds_occurred();

    let after = |damage: &dyn Fn(&Connection)| -> Result<(), String> {
        let copy = directory.path().join("copy");
        let _ = std::fs::remove_dir_all(&copy);
        std::fs::create_dir(&copy).unwrap();
        for file in std::fs::read_dir(&state).unwrap() {
            let file = file.unwrap();
            if file.file_type().unwrap().is_file() {
                std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
            }
        }
        let connection = Connection::open(database(&copy)).unwrap();
        damage(&connection);
        drop(connection);
        ledger.clone().check(&copy)
    };
    assert_eq!(after(&|_| {}), Ok(()));
    let says = |outcome: Result<(), String>, text: &str| {
        let lost = outcome.expect_err(text);
        assert!(lost.contains(text), "{lost}");
    };
    // A change in the tables that the log does not know, or the other way round.
    says(
        after(&|c| {
            c.execute("DELETE FROM resource WHERE path LIKE 'load/%'", [])
                .unwrap();
        }),
        "resources",
    );
    says(
        after(&|c| {
            let last = "DELETE FROM policy WHERE sequence = (SELECT max(sequence) FROM policy)";
            c.execute(last, []).unwrap();
        }),
        "policy",
    );
    // The last entries lost, with a head that the issuer signed: as an acknowledgement before the commit would do it.
    let issuer = SigningKey::read_file(&state.join("issuer.pem")).unwrap();
    assert!(issuer_public_key(&state).is_file());
    let lost = after(&|c| ledger::cut(c, &issuer)).expect_err("a cut log");
    assert!(
        ["resources", "policy", "not in the log", "anchored"]
            .iter()
            .any(|text| lost.contains(text)),
        "{lost}"
    );
    says(
        after(&|c| {
            c.execute("UPDATE log SET hash = zeroblob(32) WHERE position = 1", [])
                .unwrap();
        }),
        "entry",
    );
}
