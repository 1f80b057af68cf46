//! What changes between one step of a guest and the next: the policy, the resource, the time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use casemate_attest::{Class, UnixTime};
use casemate_broker::broker::{Broker, Rejection};
use casemate_broker::clock::Clock;
use casemate_broker::log::{Action, Verdict};
use casemate_broker::sessions::SessionLimits;
use casemate_broker::state::State;
use casemate_broker::store::NewResource;
use casemate_release::ReleaseError;
use casemate_release::random::{Random, SystemRandom};

use crate::support::{MODEL, Rig, TestClock, grant, path, settings};

/// Runs something the next time it is asked for the time or for randomness, on the asking thread.
#[derive(Default)]
struct Hook(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Hook {
    fn arm(&self, action: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(action));
    }

    fn fire(&self) {
        let action = self.0.lock().unwrap().take();
        if let Some(action) = action {
            action();
        }
    }
}

struct HookedClock(Arc<TestClock>, Arc<Hook>);

impl Clock for HookedClock {
    fn now(&self) -> UnixTime {
        self.1.fire();
        self.0.now()
    }
}

struct HookedRandom(Arc<Hook>);

impl Random for HookedRandom {
    fn fill(&self, out: &mut [u8]) -> Result<(), ReleaseError> {
        self.0.fire();
        SystemRandom.fill(out)
    }
}

/// The rig's state behind hooks.
fn hooked(rig: Rig) -> (Rig, Arc<Hook>, Arc<Hook>) {
    let (at_clock, at_random) = (Arc::new(Hook::default()), Arc::new(Hook::default()));
    let clock = Arc::new(HookedClock(rig.clock.clone(), at_clock.clone()));
    let random = Arc::new(HookedRandom(at_random.clone()));
    let rig = rig.restart_with(|state| {
        let state = State::open(state, random.clone()).unwrap();
        Broker::new(state, clock, random, settings()).unwrap()
    });
    (rig, at_clock, at_random)
}

/// The last moment at which somebody else can act is before the lock is taken; what was changed there applies.
#[test]
fn a_policy_that_changes_while_a_release_begins_applies_to_it() {
    let (rig, at_clock, _) = hooked(Rig::new());
    let guest = rig.attest(1).unwrap();
    let (broker, revoking) = (rig.broker.clone(), rig.policy(2, 9, &[MODEL]));
    at_clock.arm(move || {
        broker.set_policy(&revoking, None).unwrap();
    });
    let outcome = rig.broker.resource(&guest.session, &path());
    assert!(matches!(outcome, Err(Rejection::NotAllowed(_))));

    rig.set_policy(3, 1, &[MODEL]).unwrap();
    let guest = rig.release();
    let keyset = casemate_channel::keyset::Keyset {
        policy_version: 3,
        ..rig.keyset()
    };
    let request = rig.credential_request(&guest.session, &keyset);
    let (broker, revoking) = (rig.broker.clone(), rig.policy(4, 9, &[MODEL]));
    at_clock.arm(move || {
        broker.set_policy(&revoking, None).unwrap();
    });
    let body = request.to_json().unwrap();
    let outcome = rig.broker.credential(&guest.session, &body);
    assert!(matches!(outcome, Err(Rejection::NotAllowed(_))));
}

/// Between appraisal and log entry the key is encrypted. A policy that is set meanwhile waits, and follows in the log.
#[test]
fn no_policy_comes_between_appraisal_and_release() {
    let (rig, _, at_random) = hooked(Rig::new());
    let guest = rig.attest(1).unwrap();
    let (broker, revoking) = (rig.broker.clone(), rig.policy(2, 9, &[MODEL]));
    let (sender, receiver) = std::sync::mpsc::channel();
    at_random.arm(move || {
        let setting = std::thread::spawn(move || broker.set_policy(&revoking, None).map(|_| ()));
        // Long enough for a policy that does not wait to come into force first.
        std::thread::sleep(Duration::from_millis(300));
        sender.send(setting).unwrap();
    });
    rig.broker.resource(&guest.session, &path()).unwrap();
    receiver.recv().unwrap().join().unwrap().unwrap();
    let actions: Vec<_> = rig
        .broker
        .entries(3, 10)
        .unwrap()
        .iter()
        .map(|entry| entry.decision.action)
        .collect();
    assert_eq!(
        actions,
        [Action::Attest, Action::Release, Action::SetPolicy]
    );
}

/// Guests and an administrator at once; afterwards the log is read as a judge would: whatever was allowed was allowed
/// by the policy that was in force at its place.
#[test]
fn whatever_is_allowed_is_allowed_by_the_policy_in_force_at_its_place_in_the_log() {
    let rig = Rig::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Odd versions accept the guests' measurement, even ones do not.
            for version in 2..=41 {
                let measured = if version % 2 == 1 { 1 } else { 9 };
                rig.set_policy(version, measured, &[MODEL]).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..12 {
                    let Ok(guest) = rig.attest(1) else { continue };
                    if rig.broker.resource(&guest.session, &path()).is_err() {
                        continue;
                    }
                    let Ok(challenge) = rig.broker.challenge(&guest.session) else {
                        continue;
                    };
                    let policy_version = rig.broker.policy().unwrap().version();
                    let keyset = casemate_channel::keyset::Keyset {
                        policy_version,
                        ..rig.keyset()
                    };
                    let request = rig.credential_request_over(
                        &challenge.nonce(),
                        &keyset,
                        casemate_channel::keyset::Purpose::Credential,
                    );
                    let body = request.to_json().unwrap();
                    let _ = rig.broker.credential(&guest.session, &body);
                }
            });
        }
    });
    let mut in_force = 0;
    let mut judged = 0;
    for entry in rig.broker.entries(0, 10_000).unwrap() {
        let decision = entry.decision;
        match (decision.action, decision.verdict) {
            (Action::SetPolicy, _) => in_force = decision.policy_version.unwrap(),
            (Action::Release | Action::Credential, Verdict::Development) => {
                assert_eq!(decision.policy_version, Some(in_force));
                assert_eq!(in_force % 2, 1, "entry {}", entry.position);
                judged += 1;
            }
            (Action::Release | Action::Credential, verdict) => {
                assert_eq!(verdict, Verdict::Denied);
                assert_eq!(decision.policy_version, Some(in_force));
            }
            _ => {}
        }
    }
    assert!(judged > 0, "nothing was allowed, so nothing was judged");
}

#[test]
fn a_grant_replaced_after_attestation_is_judged_as_it_is_now() {
    let rig = Rig::new();
    let guest = rig.attest(1).unwrap();
    let grant = casemate_release::grant::KeyGrant {
        model_digest: casemate_container::ModelDigest([7; 32]),
        model_name: "smollm2".into(),
        minimum_version: 4,
        data_key: casemate_container::DataKey::from_bytes(&[1; 32]),
        access: casemate_release::api_key::Access::Open,
    };
    let envelope = grant.sign(&rig.provider).unwrap();
    rig.broker
        .put_resource(&path(), None, NewResource::grant(&envelope))
        .unwrap();
    match rig.broker.resource(&guest.session, &path()) {
        Err(Rejection::NotAllowed(denial)) => assert_eq!(denial.claim, "model.digest"),
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn a_grant_replaced_or_deleted_after_its_release_earns_no_credential() {
    let refused = |change: &dyn Fn(&Rig)| {
        let rig = Rig::new();
        let guest = rig.release();
        let request = rig.credential_request(&guest.session, &rig.keyset());
        change(&rig);
        match rig
            .broker
            .credential(&guest.session, &request.to_json().unwrap())
        {
            Err(Rejection::NotAllowed(denial)) => denial.claim == "resource",
            Err(other) => panic!("{other}"),
            Ok(_) => false,
        }
    };
    assert!(!refused(&|_| {}), "unchanged");
    assert!(refused(&|rig| rig.put_grant(4)), "a higher minimum");
    assert!(
        refused(&|rig| rig.broker.delete_resource(&path()).unwrap()),
        "deleted"
    );
    assert!(
        refused(&|rig| {
            let same = grant(&rig.provider, 3);
            rig.broker
                .put_resource(&path(), Some("other"), NewResource::grant(&same))
                .unwrap();
        }),
        "another service"
    );
}

#[test]
fn evidence_whose_collateral_expires_before_the_credential_earns_none() {
    let sessions = SessionLimits {
        nonce_life: Duration::from_secs(400 * 86_400),
        session_life: Duration::from_secs(400 * 86_400),
        ..Default::default()
    };
    let rig = Rig::with(casemate_broker::broker::Settings {
        sessions,
        ..settings()
    });
    let outcome_after = |days: u64| {
        let guest = rig.release();
        // Fit for the time at which it will be judged; the evidence is of today.
        let then = rig.clock.seconds() + days * 86_400;
        let keyset = casemate_channel::keyset::Keyset {
            not_before: then,
            expires_at: then + 3600,
            ..rig.keyset()
        };
        let request = rig.credential_request(&guest.session, &keyset);
        rig.clock.advance(days * 86_400);
        let body = request.to_json().unwrap();
        rig.broker.credential(&guest.session, &body)
    };
    // The fake TEE's collateral is good for 30 days.
    outcome_after(29).unwrap();
    match outcome_after(31) {
        Err(Rejection::NotAllowed(denial)) => assert_eq!(denial.class, Class::NotGenuine),
        other => panic!("{other:?}"),
    }
}
