//! Versions only go up, unless the provider signs one step back; and that works once.

use casemate_broker::broker::Rejection;
use casemate_broker::log::{Action, Verdict};
use casemate_broker::state::{database, provider_public_key};
use casemate_broker::store::{NewResource, StoreError};
use casemate_container::signing::SigningKey;
use casemate_release::ReleaseError;
use casemate_release::rollback::{Rollback, Target, sha256};

use crate::former::VERSIONS;
use crate::support::{MODEL, Rig, grant, path};

fn to_policy(rig: &Rig, from_version: u64, to_version: u64, text: &str) -> Rollback {
    Rollback {
        issuer: rig.broker.issuer(),
        target: Target::Policy,
        from_version,
        to_version,
        permitted: sha256(text.as_bytes()),
        expires_at: rig.clock.seconds() + 3600,
    }
}

fn to_model(rig: &Rig, from_version: u64, to_version: u64, envelope: &[u8]) -> Rollback {
    let target = Target::Model {
        path: path(),
        name: "smollm2".into(),
    };
    Rollback {
        target,
        permitted: sha256(envelope),
        ..to_policy(rig, from_version, to_version, "")
    }
}

/// Signs as the rig's provider and tries to set the policy.
fn set(rig: &Rig, text: &str, rollback: &Rollback) -> Result<(), Rejection> {
    let envelope = rollback.sign(&rig.provider).unwrap();
    rig.broker.set_policy(text, Some(&envelope)).map(|_| ())
}

fn put(rig: &Rig, envelope: &[u8], rollback: Option<&Rollback>) -> Result<(), Rejection> {
    let rollback = rollback.map(|rollback| rollback.sign(&rig.provider).unwrap());
    let resource = NewResource::Grant {
        envelope,
        rollback: rollback.as_deref(),
        open: false,
    };
    let put = rig.broker.put_resource(&path(), None, resource);
    put.map(|_| ())
}

fn in_force(rig: &Rig) -> u64 {
    rig.broker.policy().unwrap().version()
}

fn minimum(rig: &Rig) -> u64 {
    rig.broker.resources().unwrap()[0].minimum_version.unwrap()
}

#[test]
fn a_policy_goes_back_with_the_providers_rollback_once() {
    let rig = Rig::new();
    let old = rig.policy(2, 1, &[MODEL]);
    for version in 2..=5 {
        rig.set_policy(version, 1, &[MODEL]).unwrap();
    }
    let rollback = to_policy(&rig, 5, 2, &old);
    let size = rig.broker.head().unwrap().size;
    set(&rig, &old, &rollback).unwrap();
    assert_eq!(in_force(&rig), 2);
    let entries = rig.broker.entries(size, 10).unwrap();
    let logged: Vec<_> = entries
        .iter()
        .map(|entry| (entry.decision.action, entry.decision.verdict))
        .collect();
    let administered = Verdict::Administered;
    let expected = [
        (Action::Rollback, administered),
        (Action::SetPolicy, administered),
    ];
    assert_eq!(logged, expected);
    let envelope = rollback.sign(&rig.provider).unwrap();
    let content = entries[0].decision.content.unwrap().bytes();
    assert_eq!(content, sha256(&envelope));
    assert_eq!(entries[0].decision.policy_version, Some(2));

    // It is in force after a restart too, although there are rows of higher versions.
    let rig = rig.restart();
    assert_eq!(in_force(&rig), 2);
    rig.release();

    // Up again, and the same rollback once more: refused, by this broker and the next.
    rig.set_policy(5, 1, &[MODEL]).unwrap();
    let again = |rig: &Rig| {
        assert!(matches!(
            set(rig, &old, &rollback),
            Err(Rejection::Store(StoreError::RollbackUsed))
        ));
        assert_eq!(in_force(rig), 5);
    };
    again(&rig);
    let rig = rig.restart();
    again(&rig);
    rig.broker.verify_log(&[]).unwrap();
}

#[test]
fn a_rollback_of_the_policy_is_for_one_step_of_one_broker() {
    let rig = Rig::new();
    let old = rig.policy(2, 1, &[MODEL]);
    rig.set_policy(2, 1, &[MODEL]).unwrap();
    rig.set_policy(5, 1, &[MODEL]).unwrap();
    let size = rig.broker.head().unwrap().size;
    let good = to_policy(&rig, 5, 2, &old);
    let other_text = rig.policy(2, 7, &[MODEL]);
    let strange = rig.policy(1, 1, &[MODEL]);
    for (what, text, rollback) in [
        ("another version", &strange, good.clone()),
        (
            "from another version",
            &old,
            Rollback {
                from_version: 4,
                ..good.clone()
            },
        ),
        ("for a model", &old, to_model(&rig, 5, 2, old.as_bytes())),
        (
            "another text",
            &old,
            Rollback {
                permitted: sha256(other_text.as_bytes()),
                ..good.clone()
            },
        ),
        (
            "another broker",
            &old,
            Rollback {
                issuer: SigningKey::generate().verifying_key(),
                ..good.clone()
            },
        ),
        (
            "expired",
            &old,
            Rollback {
                expires_at: rig.clock.seconds(),
                ..good.clone()
            },
        ),
        (
            "valid for years",
            &old,
            Rollback {
                expires_at: rig.clock.seconds() + 365 * 86_400,
                ..good.clone()
            },
        ),
    ] {
        let outcome = set(&rig, text, &rollback);
        assert!(
            matches!(
                outcome,
                Err(Rejection::Rollback(ReleaseError::Refused(_))
                    | Rejection::Store(StoreError::Rollback(_)))
            ),
            "{what}: {outcome:?}"
        );
    }
    let forged = good.sign(&SigningKey::generate()).unwrap();
    let outcome = rig.broker.set_policy(&old, Some(&forged)).map(|_| ());
    assert!(matches!(
        outcome,
        Err(Rejection::Rollback(ReleaseError::Unverified(_)))
    ));
    // A version has one text for ever, whoever signs.
    let outcome = set(&rig, &other_text, &to_policy(&rig, 5, 2, &other_text));
    assert!(matches!(
        outcome,
        Err(Rejection::Store(StoreError::PolicyChanged(2)))
    ));
    // A rollback is no way up, and is not used up by trying.
    let outcome = set(&rig, &rig.policy(6, 1, &[MODEL]), &good);
    assert!(matches!(
        outcome,
        Err(Rejection::Store(StoreError::RollbackNotNeeded))
    ));
    assert_eq!((in_force(&rig), rig.broker.head().unwrap().size), (5, size));
    set(&rig, &old, &good).unwrap();
}

#[test]
fn a_broker_that_knows_no_provider_never_goes_back() {
    let rig = Rig::new();
    let old = rig.policy(1, 1, &[MODEL]);
    rig.set_policy(2, 1, &[MODEL]).unwrap();
    let rollback = to_policy(&rig, 2, 1, &old);
    std::fs::remove_file(provider_public_key(&rig.state())).unwrap();
    let rig = rig.restart();
    let outcome = set(&rig, &old, &rollback);
    assert!(matches!(outcome, Err(Rejection::NoProvider)));
    assert_eq!(in_force(&rig), 2);
}

#[test]
fn model_versions_only_go_up() {
    let rig = Rig::new();
    assert_eq!(minimum(&rig), 3);
    let older = grant(&rig.provider, 2);
    let goes_back = |rig: &Rig| {
        assert!(matches!(
            put(rig, &older, None),
            Err(Rejection::Store(StoreError::ModelGoesBack {
                found: 2,
                floor: 3,
                ..
            }))
        ));
    };
    goes_back(&rig);
    put(&rig, &grant(&rig.provider, 3), None).unwrap();
    // Neither a restart, nor deleting, nor hiding it as other bytes is a way back.
    let rig = rig.restart();
    goes_back(&rig);
    rig.broker.delete_resource(&path()).unwrap();
    goes_back(&rig);
    let opaque = rig
        .broker
        .put_resource(&path(), None, NewResource::Opaque(&older))
        .map(|_| ());
    assert!(matches!(
        opaque,
        Err(Rejection::Store(StoreError::GrantAsOpaque))
    ));
    let strangers = grant(&SigningKey::generate(), 1);
    assert!(matches!(
        put(&rig, &strangers, None),
        Err(Rejection::OtherProvider { .. })
    ));
    goes_back(&rig);
    put(&rig, &grant(&rig.provider, 4), None).unwrap();
    assert_eq!(minimum(&rig), 4);
}

#[test]
fn a_model_goes_back_with_the_providers_rollback_once() {
    let rig = Rig::new();
    let older = grant(&rig.provider, 1);
    let rollback = to_model(&rig, 3, 1, &older);
    for other in [
        to_model(&rig, 4, 1, &older),
        to_model(&rig, 3, 2, &older),
        to_model(&rig, 3, 1, &grant(&rig.provider, 2)),
        Rollback {
            target: Target::Policy,
            ..rollback.clone()
        },
    ] {
        let outcome = put(&rig, &older, Some(&other));
        assert!(
            matches!(outcome, Err(Rejection::Store(StoreError::Rollback(_)))),
            "{outcome:?}"
        );
    }
    let forged = rollback.sign(&SigningKey::generate()).unwrap();
    let resource = NewResource::Grant {
        envelope: &older,
        rollback: Some(&forged[..]),
        open: false,
    };
    let outcome = rig.broker.put_resource(&path(), None, resource);
    assert!(matches!(
        outcome.map(|_| ()),
        Err(Rejection::Rollback(ReleaseError::Unverified(_)))
    ));
    let size = rig.broker.head().unwrap().size;
    put(&rig, &older, Some(&rollback)).unwrap();
    assert_eq!(minimum(&rig), 1);
    let entries = rig.broker.entries(size, 10).unwrap();
    let actions: Vec<_> = entries.iter().map(|entry| entry.decision.action).collect();
    assert_eq!(actions, [Action::Rollback, Action::PutResource]);
    assert_eq!(
        entries[0].decision.subject.as_deref(),
        Some(path().as_str())
    );

    put(&rig, &grant(&rig.provider, 3), None).unwrap();
    assert!(matches!(
        put(&rig, &older, Some(&rollback)),
        Err(Rejection::Store(StoreError::RollbackUsed))
    ));
    assert_eq!(minimum(&rig), 3);
}

/// What version 1 of the file kept is kept: the policy in force, and the versions below which models may not go.
#[test]
fn a_database_of_the_first_version_is_brought_up_to_date() {
    let rig = Rig::new();
    rig.set_policy(4, 1, &[MODEL]).unwrap();
    let file = database(&rig.state());
    let older = grant(&rig.provider, 2);
    let connection = rusqlite::Connection::open(&file).unwrap();
    connection.execute_batch(VERSIONS[0].1).unwrap();
    drop(connection);
    let head = rig.broker.verify_log(&[]).unwrap();
    let rig = rig.restart();
    assert_eq!(in_force(&rig), 4);
    assert_eq!(rig.broker.head().unwrap(), head);
    assert!(matches!(
        rig.set_policy(3, 1, &[MODEL]),
        Err(Rejection::Store(StoreError::PolicyGoesBack { .. }))
    ));
    assert!(matches!(
        put(&rig, &older, None),
        Err(Rejection::Store(StoreError::ModelGoesBack { floor: 3, .. }))
    ));
    rig.release();
    let rig = rig.restart();
    assert_eq!(in_force(&rig), 4);
}
