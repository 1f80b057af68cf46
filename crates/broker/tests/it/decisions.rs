//! What is released to whom, and what is not.

use std::sync::Arc;
use std::time::Duration;

use casemate_attest::{Class, Denial};
use casemate_broker::broker::{Rejection, Settings};
use casemate_broker::log::{Action, Decision, Verdict};
use casemate_broker::sessions::{SessionFault, SessionLimits};
use casemate_broker::state::{State, StateError, database};
use casemate_broker::store::{MAX_RESOURCES, NewResource, StoreError};
use casemate_container::ModelDigest;
use casemate_release::random::SystemRandom;
use casemate_testkit::fake_tee::{Forgery, Sample};
use serde_json::Value;

use crate::support::{DATA_KEY, MODEL, Rig, grant, measurement, path, settings};

fn last(rig: &Rig) -> Decision {
    let size = rig.broker.head().unwrap().size;
    rig.broker.entries(size - 1, 1).unwrap().remove(0).decision
}

fn denied<T>(outcome: Result<T, Rejection>) -> Denial {
    match outcome {
        Err(Rejection::Evidence(denial) | Rejection::NotAllowed(denial)) => denial,
        Err(other) => panic!("rejected, but not denied: {other}"),
        Ok(_) => panic!("allowed"),
    }
}

fn session_fault<T>(outcome: Result<T, Rejection>) -> SessionFault {
    match outcome {
        Err(Rejection::Session(fault)) => fault,
        Err(other) => panic!("rejected for another reason: {other}"),
        Ok(_) => panic!("allowed"),
    }
}

#[test]
fn a_key_is_released_to_an_attested_guest_and_logged_as_development() {
    let rig = Rig::new();
    let guest = rig.release();
    assert_eq!(guest.attested.policy_version(), Some(1));
    let decision = last(&rig);
    assert_eq!(
        (decision.action, decision.verdict),
        (Action::Release, Verdict::Development)
    );
    assert_eq!(decision.policy_version, Some(1));
    assert_eq!(decision.subject.as_deref(), Some("default/model/smollm2"));
    assert_eq!(decision.model.unwrap().bytes(), MODEL.0);
    assert_eq!(decision.measurement.as_deref(), Some("casemate-enclave"));
    assert_eq!(
        rig.broker
            .metrics()
            .decisions(Action::Release, Verdict::Development),
        1
    );
    assert_eq!(
        rig.broker
            .metrics()
            .decisions(Action::Release, Verdict::Genuine),
        0
    );
}

#[test]
fn nothing_begins_without_a_policy() {
    let rig = Rig::empty(settings());
    let request = br#"{"version":"0.4.0","tee":"tdx","extra-params":""}"#;
    assert!(matches!(rig.broker.auth(request), Err(Rejection::NoPolicy)));
}

#[test]
fn a_nonce_is_good_for_one_attempt() {
    let rig = Rig::new();
    let (session, challenged) = rig.challenged();
    let evidence = rig.quote(1, &challenged.report_data());
    let body = challenged.attestation(&evidence).unwrap();
    rig.broker.attest(&session, &body).unwrap();
    assert_eq!(
        session_fault(rig.broker.attest(&session, &body)),
        SessionFault::Unknown
    );
    // The same evidence in a session of its own does not answer that session's nonce.
    let (fresh, _) = rig.challenged();
    let denial = denied(rig.broker.attest(&fresh, &body));
    assert_eq!((denial.class, denial.claim), (Class::NotGenuine, "nonce"));
}

#[test]
fn a_failed_attempt_uses_the_nonce_up() {
    let rig = Rig::new();
    let (session, challenged) = rig.challenged();
    let evidence = rig.quote(1, &challenged.report_data());
    let body = challenged.attestation(&evidence).unwrap();
    assert!(matches!(
        rig.broker.attest(&session, b"{}"),
        Err(Rejection::Malformed(_))
    ));
    assert_eq!(
        session_fault(rig.broker.attest(&session, &body)),
        SessionFault::Unknown
    );
}

#[test]
fn a_nonce_expires() {
    let rig = Rig::new();
    for (wait, in_time) in [(119, true), (120, false)] {
        let (session, challenged) = rig.challenged();
        rig.clock.advance(wait);
        let evidence = rig.quote(1, &challenged.report_data());
        let body = challenged.attestation(&evidence).unwrap();
        let outcome = rig.broker.attest(&session, &body);
        if in_time {
            outcome.unwrap();
        } else {
            assert_eq!(session_fault(outcome), SessionFault::Unknown);
        }
    }
}

#[test]
fn a_session_expires() {
    let rig = Rig::new();
    let guest = rig.attest(1).unwrap();
    rig.clock.advance(3599);
    rig.broker.resource(&guest.session, &path()).unwrap();
    rig.clock.advance(1);
    let outcome = rig.broker.resource(&guest.session, &path());
    assert_eq!(session_fault(outcome), SessionFault::Unknown);
}

/// Somebody in the middle who puts a key of his own into the message.
#[test]
fn a_swapped_key_is_not_what_the_quote_is_bound_to() {
    let rig = Rig::new();
    let (session, challenged) = rig.challenged();
    let (_, attacker) = rig.challenged();
    let evidence = rig.quote(1, &challenged.report_data());
    let honest: Value =
        serde_json::from_slice(&challenged.attestation(&evidence).unwrap()).unwrap();
    let other: Value = serde_json::from_slice(&attacker.attestation(&evidence).unwrap()).unwrap();
    let mut swapped = honest.clone();
    swapped["runtime-data"]["tee-pubkey"] = other["runtime-data"]["tee-pubkey"].clone();
    assert_ne!(swapped, honest);
    let denial = denied(rig.broker.attest(&session, swapped.to_string().as_bytes()));
    assert_eq!(
        (denial.class, denial.claim),
        (Class::NotGenuine, "report_data")
    );
    assert_eq!(last(&rig).denial.unwrap().claim, "report_data");
}

#[test]
fn a_session_is_of_no_use_to_another() {
    let rig = Rig::new();
    let (waiting, _) = rig.challenged();
    assert_eq!(
        session_fault(rig.broker.resource(&waiting, &path())),
        SessionFault::NotAttested
    );
    assert_eq!(
        session_fault(rig.broker.resource("unknown", &path())),
        SessionFault::Unknown
    );

    // With another's cookie one gets an answer, but it is encrypted to the other's key.
    let victim = rig.attest(1).unwrap();
    let thief = rig.attest(1).unwrap();
    let jwe = rig.broker.resource(&victim.session, &path()).unwrap();
    assert!(thief.attested.open(&jwe.to_json()).is_err());
    assert!(victim.attested.open(&jwe.to_json()).is_ok());

    // Evidence made for one session is refused in another, whichever nonce it states.
    let (session, challenged) = rig.challenged();
    let (other, _) = rig.challenged();
    let evidence = rig.quote(1, &challenged.report_data());
    let body = challenged.attestation(&evidence).unwrap();
    assert_eq!(denied(rig.broker.attest(&other, &body)).claim, "nonce");
    rig.broker.attest(&session, &body).unwrap();
}

#[test]
fn other_code_and_forged_quotes_are_denied() {
    let rig = Rig::new();
    let denial = denied(rig.attest(2));
    assert_eq!(denial.class, Class::Refused);
    assert_eq!(last(&rig).verdict, Verdict::Denied);
    for forgery in [
        Forgery::Body,
        Forgery::QuoteSignature,
        Forgery::AttestationKey,
    ] {
        let (session, challenged) = rig.challenged();
        let mut sample = Sample::new(&measurement(1), &challenged.report_data());
        sample.forgery = Some(forgery);
        let evidence = rig.tee.quote_with(&sample, rig.clock.seconds()).unwrap();
        let body = challenged.attestation(&evidence).unwrap();
        let denial = denied(rig.broker.attest(&session, &body));
        assert_eq!(denial.class, Class::NotGenuine, "{forgery:?}");
        let outcome = rig.broker.resource(&session, &path());
        assert_eq!(session_fault(outcome), SessionFault::Unknown);
    }
}

#[test]
fn quotes_under_another_root_are_denied() {
    let rig = Rig::new();
    let other = Rig::new();
    let (session, challenged) = rig.challenged();
    let evidence = other.quote(1, &challenged.report_data());
    let body = challenged.attestation(&evidence).unwrap();
    assert_eq!(
        denied(rig.broker.attest(&session, &body)).class,
        Class::NotGenuine
    );
}

#[test]
fn a_policy_that_changes_after_attestation_applies_to_the_release() {
    let rig = Rig::new();
    let guest = rig.attest(1).unwrap();
    rig.set_policy(2, 9, &[MODEL]).unwrap();
    let denial = denied(rig.broker.resource(&guest.session, &path()));
    assert_eq!(denial.class, Class::Refused);
    let decision = last(&rig);
    assert_eq!(
        (decision.action, decision.verdict),
        (Action::Release, Verdict::Denied)
    );
    assert_eq!(decision.policy_version, Some(2));

    // The measurement is back, but the denial has ended the session.
    rig.set_policy(3, 1, &[MODEL]).unwrap();
    let outcome = rig.broker.resource(&guest.session, &path());
    assert_eq!(session_fault(outcome), SessionFault::Unknown);

    // The model is not allowed any more.
    let guest = rig.attest(1).unwrap();
    rig.set_policy(4, 1, &[ModelDigest([7; 32])]).unwrap();
    let denial = denied(rig.broker.resource(&guest.session, &path()));
    assert_eq!(denial.claim, "model.digest");
    assert_eq!(denial.found, MODEL.to_string());

    let guest = rig.attest(1).unwrap();
    rig.set_policy(5, 1, &[MODEL]).unwrap();
    rig.broker.resource(&guest.session, &path()).unwrap();
}

#[test]
fn evidence_whose_collateral_has_expired_releases_nothing() {
    let sessions = SessionLimits {
        session_life: Duration::from_secs(400 * 86_400),
        ..Default::default()
    };
    let rig = Rig::with(Settings {
        sessions,
        ..settings()
    });
    let guest = rig.attest(1).unwrap();
    rig.broker.resource(&guest.session, &path()).unwrap();
    rig.clock.advance(300 * 86_400);
    let denial = denied(rig.broker.resource(&guest.session, &path()));
    assert_eq!(denial.class, Class::NotGenuine);
}

#[test]
fn an_unknown_resource_is_said_to_be_unknown_to_attested_guests_only() {
    let rig = Rig::new();
    let unknown = "default/model/other".parse().unwrap();
    assert_eq!(
        session_fault(rig.broker.resource("nobody", &unknown)),
        SessionFault::Unknown
    );
    let guest = rig.attest(1).unwrap();
    assert!(matches!(
        rig.broker.resource(&guest.session, &unknown),
        Err(Rejection::NoResource(path)) if path == unknown
    ));
    assert_eq!(last(&rig).denial.unwrap().claim, "resource");
    rig.broker.delete_resource(&path()).unwrap();
    let guest = rig.attest(1).unwrap();
    assert!(matches!(
        rig.broker.resource(&guest.session, &path()),
        Err(Rejection::NoResource(_))
    ));
}

#[test]
fn an_opaque_resource_is_released_under_the_measurements_alone() {
    let rig = Rig::new();
    let other = "default/secret/token".parse().unwrap();
    rig.broker
        .put_resource(&other, None, NewResource::Opaque(b"any bytes"))
        .unwrap();
    let guest = rig.attest(1).unwrap();
    let jwe = rig.broker.resource(&guest.session, &other).unwrap();
    assert_eq!(
        guest.attested.open(&jwe.to_json()).unwrap().as_slice(),
        b"any bytes"
    );
    // It gives no right to a credential.
    let outcome = rig.broker.challenge(&guest.session);
    assert_eq!(session_fault(outcome), SessionFault::NothingReleased);
}

#[test]
fn a_damaged_grant_is_not_stored() {
    let rig = Rig::new();
    let mut damaged = grant(&rig.provider, 1);
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    let before = rig.broker.head().unwrap();
    assert!(matches!(
        rig.broker
            .put_resource(&path(), None, NewResource::grant(&damaged)),
        Err(Rejection::Store(StoreError::Grant(_)))
    ));
    assert_eq!(rig.broker.head().unwrap(), before);
}

#[test]
fn a_full_store_takes_a_grant_that_replaces_one() {
    let rig = Rig::new();
    rusqlite::Connection::open(database(&rig.state()))
        .unwrap()
        .execute(
            "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
             INSERT INTO resource (path, sealed) SELECT 'a/b/' || i, x'00' FROM n",
            [i64::try_from(MAX_RESOURCES).unwrap()],
        )
        .unwrap();
    let other = "default/model/other".parse().unwrap();
    assert!(matches!(
        rig.broker
            .put_resource(&other, None, NewResource::Opaque(b"any bytes")),
        Err(Rejection::Store(StoreError::Limit("number of resources")))
    ));
    rig.put_grant(4);
}

#[test]
fn policy_versions_only_go_up() {
    let rig = Rig::new();
    rig.set_policy(5, 1, &[MODEL]).unwrap();
    assert!(matches!(
        rig.set_policy(4, 1, &[MODEL]),
        Err(Rejection::Store(StoreError::PolicyGoesBack {
            found: 4,
            in_force: 5
        }))
    ));
    assert!(matches!(
        rig.set_policy(5, 2, &[MODEL]),
        Err(Rejection::Store(StoreError::PolicyChanged(5)))
    ));
    let size = rig.broker.head().unwrap().size;
    rig.set_policy(5, 1, &[MODEL]).unwrap();
    assert_eq!(
        rig.broker.head().unwrap().size,
        size,
        "the same policy again changes nothing"
    );
    assert!(matches!(
        rig.broker.set_policy("version = 6", None),
        Err(Rejection::Policy(_))
    ));
    assert_eq!(rig.broker.policy().unwrap().version(), 5);
    let rig = rig.restart();
    assert!(matches!(
        rig.set_policy(4, 1, &[MODEL]),
        Err(Rejection::Store(StoreError::PolicyGoesBack { .. }))
    ));
}

#[test]
fn a_restart_keeps_everything_but_sessions() {
    let rig = Rig::new();
    let guest = rig.release();
    let issuer = rig.broker.issuer();
    let head = rig.broker.head().unwrap();
    let token_key = rig.broker.token_jwk();
    let (waiting, _) = rig.challenged();
    let rig = rig.restart();
    assert_eq!(rig.broker.issuer(), issuer);
    assert_eq!(rig.broker.token_jwk(), token_key);
    assert_eq!(rig.broker.head().unwrap(), head);
    assert_eq!(rig.broker.verify_log(&[head]).unwrap(), head);
    assert_eq!(rig.broker.policy().unwrap().version(), 1);
    for session in [&guest.session, &waiting] {
        let outcome = rig.broker.resource(session, &path());
        assert_eq!(session_fault(outcome), SessionFault::Unknown);
    }
    rig.release();
    assert!(rig.broker.head().unwrap().size > head.size);
}

#[test]
fn a_state_is_served_by_one_broker_at_a_time() {
    let rig = Rig::new();
    assert!(matches!(
        State::open(&rig.state(), Arc::new(SystemRandom)),
        Err(StateError::Locked(_))
    ));
}

/// The log cannot be written: as when the disk is full.
#[test]
fn nothing_is_released_that_cannot_be_logged() {
    let rig = Rig::new();
    let guest = rig.attest(1).unwrap();
    let connection = rusqlite::Connection::open(database(&rig.state())).unwrap();
    connection
        .execute_batch(
            "CREATE TRIGGER full BEFORE INSERT ON log BEGIN SELECT RAISE(ABORT, 'full'); END",
        )
        .unwrap();
    assert!(matches!(
        rig.broker.resource(&guest.session, &path()),
        Err(Rejection::Store(StoreError::Database(_)))
    ));
    assert!(matches!(rig.attest(1), Err(Rejection::Store(_))));
    assert!(matches!(
        rig.set_policy(2, 1, &[MODEL]),
        Err(Rejection::Store(_))
    ));
    assert_eq!(rig.broker.policy().unwrap().version(), 1);
    connection.execute_batch("DROP TRIGGER full").unwrap();
    assert_eq!(
        session_fault(rig.broker.challenge(&guest.session)),
        SessionFault::NothingReleased,
        "a release that failed does not count"
    );
    rig.broker.resource(&guest.session, &path()).unwrap();
}

#[test]
fn keys_do_not_rest_in_clear() {
    let rig = Rig::new();
    rig.release();
    let mut searched = 0;
    for file in std::fs::read_dir(rig.state()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        searched += bytes.len();
        assert!(
            !bytes
                .windows(DATA_KEY.len())
                .any(|window| window == DATA_KEY)
        );
    }
    assert!(
        searched > 10_000,
        "the database and its journal were searched"
    );
}

#[test]
fn a_resource_moved_to_another_path_does_not_decrypt() {
    let rig = Rig::new();
    let other = "default/model/other".parse().unwrap();
    rig.broker
        .put_resource(&other, None, NewResource::Opaque(b"low value"))
        .unwrap();
    let connection = rusqlite::Connection::open(database(&rig.state())).unwrap();
    connection
        .execute(
            "UPDATE resource SET sealed = (SELECT sealed FROM resource WHERE path = ?1)
             WHERE path = ?2",
            [path().as_str(), "default/model/other"],
        )
        .unwrap();
    let guest = rig.attest(1).unwrap();
    assert!(matches!(
        rig.broker.resource(&guest.session, &other),
        Err(Rejection::Store(StoreError::Sealed(_)))
    ));
}

#[test]
fn sessions_are_bounded() {
    let sessions = SessionLimits {
        max_pending: 3,
        max_attested: 2,
        ..Default::default()
    };
    let rig = Rig::with(Settings {
        sessions,
        ..settings()
    });
    // Of those that wait, the oldest gives way to a new one; its nonce is then unknown.
    let (oldest, challenged) = rig.challenged();
    for _ in 0..3 {
        rig.challenged();
    }
    assert_eq!(rig.broker.session_counts().0, 3);
    let evidence = rig.quote(1, &challenged.report_data());
    let outcome = rig
        .broker
        .attest(&oldest, &challenged.attestation(&evidence).unwrap());
    assert_eq!(session_fault(outcome), SessionFault::Unknown);

    // Of those that attested, one that received nothing gives way before one that received its key.
    let served = rig.attest(1).unwrap();
    rig.broker.resource(&served.session, &path()).unwrap();
    let idle = rig.attest(1).unwrap();
    let newest = rig.attest(1).unwrap();
    assert_eq!(rig.broker.session_counts().1, 2);
    let outcome = rig.broker.resource(&idle.session, &path());
    assert_eq!(session_fault(outcome), SessionFault::Unknown);
    rig.broker.resource(&served.session, &path()).unwrap();
    rig.broker.resource(&newest.session, &path()).unwrap();
}

/// Whoever reads a cookie off the wire cannot make the log grow without end: the guest itself could not either.
#[test]
fn a_session_asks_for_a_bounded_number_of_resources() {
    let sessions = SessionLimits {
        max_releases: 3,
        ..Default::default()
    };
    let rig = Rig::with(Settings {
        sessions,
        ..settings()
    });
    let guest = rig.attest(1).unwrap();
    for _ in 0..3 {
        rig.broker.resource(&guest.session, &path()).unwrap();
    }
    let size = rig.broker.head().unwrap().size;
    let outcome = rig.broker.resource(&guest.session, &path());
    assert_eq!(session_fault(outcome), SessionFault::Unknown);
    assert_eq!(rig.broker.head().unwrap().size, size);
    assert_eq!(rig.broker.session_counts(), (0, 0));
}

#[test]
fn sessions_run_side_by_side() {
    let rig = Rig::new();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..3 {
                    rig.release();
                }
            });
        }
    });
    // Begin, policy, resource; then 18 × (attest, release).
    let head = rig.broker.verify_log(&[]).unwrap();
    assert_eq!(head.size, 3 + 36);
    assert_eq!(
        rig.broker
            .metrics()
            .decisions(Action::Release, Verdict::Development),
        18
    );
}
