//! What the check of the log finds after somebody had the database in his hands.

use std::path::{Path, PathBuf};

use casemate_broker::log::{Anchor, Digest, Entry, Head, LogFault, hash};
use casemate_broker::state::database;
use casemate_broker::store::{StoreError, verify_offline};
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::credential::past_claims;
use casemate_release::issuance::CredentialResponse;
use rusqlite::{Connection, params};

use crate::serving::{MALFORMED, NOT_AUTHENTIC, failed, program, stderr};
use crate::support::{Rig, cut_log};

/// A database with a finished log, outside any broker.
struct Copy {
    rig: Rig,
    original: PathBuf,
    issuer: VerifyingKey,
    head: Head,
}

impl Copy {
    fn new() -> Self {
        let rig = Rig::new();
        rig.release();
        rig.release();
        let head = rig.broker.head().unwrap();
        let issuer = rig.broker.issuer();
        let original = rig.directory.path().join("copy.sqlite3");
        snapshot(&database(&rig.state()), &original);
        Self {
            rig,
            original,
            issuer,
            head,
        }
    }

    /// Verifies a fresh copy after changing it.
    fn after(&self, change: impl FnOnce(&Connection)) -> Result<Head, LogFault> {
        self.after_with(change, &[])
    }

    fn after_with(
        &self,
        change: impl FnOnce(&Connection),
        anchors: &[Anchor],
    ) -> Result<Head, LogFault> {
        let path = self.rig.directory.path().join("changed.sqlite3");
        let _ = std::fs::remove_file(&path);
        std::fs::copy(&self.original, &path).unwrap();
        let connection = Connection::open(&path).unwrap();
        change(&connection);
        drop(connection);
        match verify_offline(&path, &self.issuer, anchors) {
            Ok(head) => Ok(head),
            Err(StoreError::Log(fault)) => Err(fault),
            Err(other) => panic!("{other}"),
        }
    }
}

fn snapshot(from: &Path, to: &Path) {
    let connection = Connection::open(from).unwrap();
    connection
        .execute("VACUUM INTO ?1", [to.to_str().unwrap()])
        .unwrap();
}

fn entry(connection: &Connection, position: u64) -> Vec<u8> {
    connection
        .query_row(
            "SELECT entry FROM log WHERE position = ?1",
            [position as i64],
            |row| row.get(0),
        )
        .unwrap()
}

#[test]
fn an_untouched_log_is_whole() {
    let copy = Copy::new();
    assert_eq!(copy.after(|_| {}), Ok(copy.head));
    assert_eq!(copy.after_with(|_| {}, &[copy.head]), Ok(copy.head));
    assert!(copy.head.size >= 7);
}

#[test]
fn every_edited_entry_is_found() {
    let copy = Copy::new();
    for position in 0..copy.head.size {
        let fault = copy.after(|connection| {
            let mut bytes = entry(connection, position);
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            connection
                .execute(
                    "UPDATE log SET entry = ?1 WHERE position = ?2",
                    params![bytes, position as i64],
                )
                .unwrap();
        });
        assert!(
            matches!(fault, Err(LogFault::BrokenLink(p) | LogFault::Unreadable(p)) if p == position),
            "{position}: {fault:?}"
        );
    }
}

#[test]
fn an_edited_entry_with_its_hash_made_to_fit_is_found_at_the_next() {
    let copy = Copy::new();
    for position in 0..copy.head.size {
        let fault = copy.after(|connection| {
            let mut changed = Entry::decode(&entry(connection, position)).unwrap();
            changed.time += 1;
            let bytes = changed.encode();
            connection
                .execute(
                    "UPDATE log SET entry = ?1, hash = ?2 WHERE position = ?3",
                    params![bytes, hash(&bytes).bytes(), position as i64],
                )
                .unwrap();
        });
        let expected = if position + 1 == copy.head.size {
            LogFault::OtherHead {
                found: copy.head.size,
                signed: copy.head.size,
            }
        } else {
            LogFault::BrokenLink(position + 1)
        };
        assert_eq!(fault, Err(expected));
    }
}

#[test]
fn every_removed_entry_is_found() {
    let copy = Copy::new();
    for position in 0..copy.head.size {
        let fault = copy.after(|connection| {
            connection
                .execute("DELETE FROM log WHERE position = ?1", [position as i64])
                .unwrap();
        });
        let expected = if position + 1 == copy.head.size {
            LogFault::OtherHead {
                found: position,
                signed: copy.head.size,
            }
        } else {
            LogFault::OutOfOrder(position)
        };
        assert_eq!(fault, Err(expected));
    }
}

#[test]
fn a_removed_entry_with_the_rest_moved_up_is_found() {
    let copy = Copy::new();
    for position in 0..copy.head.size - 1 {
        let fault = copy.after(|connection| {
            connection
                .execute("DELETE FROM log WHERE position = ?1", [position as i64])
                .unwrap();
            for later in position + 1..copy.head.size {
                connection
                    .execute(
                        "UPDATE log SET position = ?1 WHERE position = ?2",
                        params![later as i64 - 1, later as i64],
                    )
                    .unwrap();
            }
        });
        assert_eq!(fault, Err(LogFault::OutOfOrder(position)));
    }
}

#[test]
fn every_pair_of_exchanged_entries_is_found() {
    let copy = Copy::new();
    for a in 0..copy.head.size {
        for b in a + 1..copy.head.size {
            let fault = copy.after(|connection| {
                let move_to = |from: i64, to: i64| {
                    connection
                        .execute(
                            "UPDATE log SET position = ?1 WHERE position = ?2",
                            [to, from],
                        )
                        .unwrap();
                };
                move_to(a as i64, 1_000);
                move_to(b as i64, a as i64);
                move_to(1_000, b as i64);
            });
            assert_eq!(fault, Err(LogFault::OutOfOrder(a)));
        }
    }
}

#[test]
fn a_cut_log_with_its_head_made_to_fit_lacks_the_signature() {
    let copy = Copy::new();
    let fault = copy.after(|connection| {
        let last = copy.head.size - 1;
        connection
            .execute("DELETE FROM log WHERE position = ?1", [last as i64])
            .unwrap();
        let bytes = entry(connection, last - 1);
        connection
            .execute(
                "UPDATE log_head SET size = ?1, hash = ?2",
                params![last as i64, hash(&bytes).bytes()],
            )
            .unwrap();
    });
    assert_eq!(fault, Err(LogFault::HeadSignature));
}

/// A whole new chain, consistent in itself, signed by somebody else.
#[test]
fn a_rewritten_chain_is_not_the_issuers() {
    let copy = Copy::new();
    let forger = SigningKey::generate();
    let rewrite = |connection: &Connection| {
        let mut head = Head::empty();
        for position in 0..copy.head.size {
            let mut decision = Entry::decode(&entry(connection, position))
                .unwrap()
                .decision;
            decision.subject = Some("nothing happened here".into());
            let bytes = Entry::after(&head, 1, decision).encode();
            head = Head {
                size: position + 1,
                hash: hash(&bytes),
            };
            connection
                .execute(
                    "UPDATE log SET entry = ?1, hash = ?2 WHERE position = ?3",
                    params![bytes, head.hash.bytes(), position as i64],
                )
                .unwrap();
        }
        connection
            .execute(
                "UPDATE log_head SET hash = ?1, signature = ?2",
                params![head.hash.bytes(), head.sign(&forger)],
            )
            .unwrap();
    };
    assert_eq!(copy.after(rewrite), Err(LogFault::HeadSignature));
}

/// An older copy of the whole database is whole in itself; a credential issued since gives it away.
#[test]
fn an_older_copy_does_not_contain_a_later_anchor() {
    let copy = Copy::new();
    let guest = copy.rig.release();
    let later = copy.rig.broker.head().unwrap();
    drop(guest);
    assert_eq!(copy.after(|_| {}), Ok(copy.head));
    assert_eq!(
        copy.after_with(|_| {}, &[later]),
        Err(LogFault::NotAnchored(later.size))
    );
    let other = Anchor {
        size: copy.head.size,
        hash: Digest::from([1; 32]),
    };
    assert_eq!(
        copy.after_with(|_| {}, &[copy.head, other]),
        Err(LogFault::NotAnchored(other.size))
    );
    copy.rig.broker.verify_log(&[copy.head]).unwrap();
}

#[test]
fn a_changed_end_is_found_at_start() {
    let rig = Rig::new();
    let state = rig.state();
    let Rig {
        directory, broker, ..
    } = rig;
    drop(broker);
    let connection = Connection::open(database(&state)).unwrap();
    connection
        .execute("DELETE FROM log WHERE position = 2", [])
        .unwrap();
    drop(connection);
    let random = std::sync::Arc::new(casemate_release::random::SystemRandom);
    match casemate_broker::state::State::open(&state, random) {
        Err(casemate_broker::state::StateError::Store(StoreError::Log(fault))) => {
            assert_eq!(
                fault,
                LogFault::OtherHead {
                    found: 2,
                    signed: 3
                }
            );
        }
        other => panic!("opened: {}", other.is_ok()),
    }
    drop(directory);
}

/// The end is cut off and signed again, as only the issuer itself could: the log is whole in itself, and a credential that
/// somebody kept gives it away, however the file holds it.
#[test]
fn a_tail_cut_after_a_credential_was_issued_shows() {
    let rig = Rig::new();
    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    let body = request.to_json().unwrap();
    let response = rig.broker.credential(&guest.session, &body).unwrap();
    rig.release();
    let state = rig.state();
    let json = serde_json::to_vec(&response).unwrap();
    let envelope = CredentialResponse::parse(&json).unwrap();
    let claims = past_claims(&envelope, &rig.broker.issuer()).unwrap();
    let Rig {
        directory, broker, ..
    } = rig;
    drop(broker);

    let file = directory.path().join("credential");
    let verify = |with: bool| {
        let mut command = program();
        command.args(["admin", "log", "verify", "--offline"]);
        command.arg(&state);
        if with {
            command.arg("--credential").arg(&file);
        }
        command.output().unwrap()
    };
    let base64 = json_member(&json);
    let forms = [json, envelope.clone(), base64.into_bytes()];
    for form in &forms {
        std::fs::write(&file, form).unwrap();
        let output = verify(true);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let issuer = SigningKey::read_file(&state.join("issuer.pem")).unwrap();
    let connection = Connection::open(database(&state)).unwrap();
    // All after the credential's own entry: nobody kept anything that names it.
    cut_log(&connection, claims.log_size, &issuer);
    assert!(verify(true).status.success());
    cut_log(&connection, claims.log_size - 1, &issuer);
    drop(connection);
    assert!(verify(false).status.success(), "whole in itself");
    for form in &forms {
        std::fs::write(&file, form).unwrap();
        failed(&verify(true), NOT_AUTHENTIC, "anchored head");
    }

    // Only the issuer's own credentials are anchors.
    let claims = casemate_release::credential::Credential {
        log_size: 1,
        ..claims
    };
    std::fs::write(&file, claims.issue(&SigningKey::generate()).unwrap()).unwrap();
    failed(
        &verify(true),
        NOT_AUTHENTIC,
        "not signed by the expected issuer",
    );
    std::fs::write(&file, b"{}").unwrap();
    failed(&verify(true), MALFORMED, "no deployment credential");
}

fn json_member(json: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(json).unwrap();
    value["credential"].as_str().unwrap().to_owned()
}
