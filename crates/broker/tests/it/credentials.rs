//! Which keysets get a credential, and what it says.

use casemate_broker::broker::{Broker, Rejection};
use casemate_broker::log::{Action, Anchor, Verdict};
use casemate_broker::sessions::SessionFault;
use casemate_broker::store::NewResource;
use casemate_channel::keyset::{Keyset, KeysetDigest, Purpose};
use casemate_container::ModelDigest;
use casemate_release::credential::VerifiedCredential;
use casemate_release::issuance::{CredentialRequest, CredentialResponse};

use crate::support::{MODEL, Rig, path};

fn ask(
    broker: &Broker,
    session: &str,
    request: &CredentialRequest,
) -> Result<CredentialResponse, Rejection> {
    broker.credential(session, &request.to_json().unwrap())
}

fn claim(outcome: Result<CredentialResponse, Rejection>) -> &'static str {
    match outcome {
        Err(Rejection::NotAllowed(denial)) => denial.claim,
        Err(other) => panic!("rejected, but not denied: {other}"),
        Ok(_) => panic!("allowed"),
    }
}

fn nonce_refused(outcome: Result<CredentialResponse, Rejection>) -> bool {
    matches!(outcome, Err(Rejection::Session(SessionFault::Nonce)))
}

fn envelope(response: &CredentialResponse) -> Vec<u8> {
    CredentialResponse::parse(&serde_json::to_vec(response).unwrap()).unwrap()
}

#[test]
fn a_credential_states_what_was_appraised_and_anchors_the_log() {
    let rig = Rig::new();
    let guest = rig.release();
    let keyset = rig.keyset();
    let request = rig.credential_request(&guest.session, &keyset);
    let response = ask(&rig.broker, &guest.session, &request).unwrap();
    let now = rig.clock.seconds();
    let verified =
        VerifiedCredential::verify(&envelope(&response), &rig.broker.issuer(), now).unwrap();
    let claims = verified.claims();
    assert_eq!(claims.evidence_digest, request.evidence.digest());
    assert_eq!(claims.keyset_digest, KeysetDigest::of(&request.keyset).0);
    assert_eq!((claims.model_digest, claims.model_version), (MODEL, 3));
    assert_eq!(claims.service, "smollm2");
    assert_eq!(claims.policy_version, 1);
    assert_eq!((claims.issued_at, claims.expires_at), (now, now + 900));

    let anchor = Anchor {
        size: claims.log_size,
        hash: claims.log_head.into(),
    };
    assert_eq!(rig.broker.head().unwrap(), anchor);
    let entry = rig
        .broker
        .entries(anchor.size - 1, 1)
        .unwrap()
        .remove(0)
        .decision;
    assert_eq!(
        (entry.action, entry.verdict),
        (Action::Credential, Verdict::Development)
    );
    assert_eq!(entry.content.unwrap().bytes(), claims.keyset_digest);
    assert_eq!(entry.expires_at, Some(now + 900));
    rig.release();
    rig.broker.verify_log(&[anchor]).unwrap();
}

#[test]
fn a_credential_does_not_outlive_its_keyset() {
    let rig = Rig::new();
    let guest = rig.release();
    let keyset = Keyset {
        expires_at: rig.clock.seconds() + 60,
        ..rig.keyset()
    };
    let request = rig.credential_request(&guest.session, &keyset);
    let response = ask(&rig.broker, &guest.session, &request).unwrap();
    assert_eq!(response.expires_at, rig.clock.seconds() + 60);
}

#[test]
fn every_credential_needs_an_attestation_of_its_own() {
    let rig = Rig::new();
    let ended = |session: &str| {
        assert_eq!(rig.broker.session_counts(), (0, 0));
        matches!(
            rig.broker.challenge(session),
            Err(Rejection::Session(SessionFault::Unknown))
        )
    };
    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    ask(&rig.broker, &guest.session, &request).unwrap();
    assert!(ended(&guest.session), "after it was issued");

    let guest = rig.release();
    let mut request = rig.credential_request(&guest.session, &rig.keyset());
    request.service = "another".into();
    assert_eq!(claim(ask(&rig.broker, &guest.session, &request)), "service");
    assert!(ended(&guest.session), "after it was denied");

    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    ask(&rig.broker, &guest.session, &request).unwrap();
}

#[test]
fn only_a_session_that_received_a_key_gets_a_nonce() {
    let rig = Rig::new();
    let attested = rig.attest(1).unwrap();
    let fault = |session: &str| match rig.broker.challenge(session) {
        Err(Rejection::Session(fault)) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(fault(&attested.session), SessionFault::NothingReleased);
    assert_eq!(fault("unknown"), SessionFault::Unknown);
    let request = rig.credential_request_over(&[0; 32], &rig.keyset(), Purpose::Credential);
    assert!(matches!(
        ask(&rig.broker, &attested.session, &request),
        Err(Rejection::Session(SessionFault::NothingReleased))
    ));
}

#[test]
fn a_nonce_is_the_sessions_own_fresh_and_used_once() {
    let rig = Rig::new();
    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    ask(&rig.broker, &guest.session, &request).unwrap();
    assert!(
        matches!(
            ask(&rig.broker, &guest.session, &request),
            Err(Rejection::Session(SessionFault::Unknown))
        ),
        "replayed"
    );

    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    rig.clock.advance(120);
    assert!(
        nonce_refused(ask(&rig.broker, &guest.session, &request)),
        "expired"
    );

    let other = rig.release();
    let request = rig.credential_request(&other.session, &rig.keyset());
    rig.broker.challenge(&guest.session).unwrap();
    assert!(
        nonce_refused(ask(&rig.broker, &guest.session, &request)),
        "another session's"
    );

    let request = rig.credential_request(&guest.session, &rig.keyset());
    rig.broker.challenge(&guest.session).unwrap();
    assert!(
        nonce_refused(ask(&rig.broker, &guest.session, &request)),
        "superseded"
    );
}

#[test]
fn evidence_must_be_over_this_keyset_for_this_purpose() {
    let rig = Rig::new();
    let guest = rig.release();
    let mut request = rig.credential_request(&guest.session, &rig.keyset());
    let swapped = Keyset {
        receipt_key: [9; 32],
        ..rig.keyset()
    };
    request.keyset = swapped.encode().unwrap();
    assert_eq!(
        claim(ask(&rig.broker, &guest.session, &request)),
        "report_data"
    );

    let guest = rig.release();
    let nonce = rig.broker.challenge(&guest.session).unwrap().nonce();
    let request = rig.credential_request_over(&nonce, &rig.keyset(), |_| Purpose::Serving);
    assert_eq!(
        claim(ask(&rig.broker, &guest.session, &request)),
        "report_data"
    );
}

#[test]
fn keysets_that_do_not_fit_the_release_are_denied_by_claim() {
    let rig = Rig::new();
    let now = rig.clock.seconds();
    let good = rig.keyset();
    let cases = [
        (
            "keyset.model_digest",
            Keyset {
                model_digest: [1; 32],
                ..good.clone()
            },
        ),
        (
            "keyset.model_version",
            Keyset {
                model_version: 2,
                ..good.clone()
            },
        ),
        (
            "keyset.policy_version",
            Keyset {
                policy_version: 2,
                ..good.clone()
            },
        ),
        (
            "keyset.validity",
            Keyset {
                not_before: now - 100,
                expires_at: now,
                ..good.clone()
            },
        ),
        (
            "keyset.validity",
            Keyset {
                not_before: now + 61,
                expires_at: now + 3600,
                ..good.clone()
            },
        ),
    ];
    for (expected, keyset) in cases {
        let guest = rig.release();
        let request = rig.credential_request(&guest.session, &keyset);
        assert_eq!(claim(ask(&rig.broker, &guest.session, &request)), expected);
        let size = rig.broker.head().unwrap().size;
        let entry = rig.broker.entries(size - 1, 1).unwrap().remove(0).decision;
        assert_eq!(
            (entry.action, entry.verdict),
            (Action::Credential, Verdict::Denied)
        );
        assert_eq!(entry.denial.unwrap().claim, expected);
    }
    let guest = rig.release();
    let mut request = rig.credential_request(&guest.session, &good);
    request.service = "somebody-elses".into();
    assert_eq!(claim(ask(&rig.broker, &guest.session, &request)), "service");
}

#[test]
fn a_policy_that_changes_after_the_release_applies_to_the_credential() {
    let rig = Rig::new();
    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    rig.set_policy(2, 9, &[MODEL]).unwrap();
    assert!(matches!(
        ask(&rig.broker, &guest.session, &request),
        Err(Rejection::NotAllowed(_))
    ));
    rig.set_policy(3, 1, &[MODEL]).unwrap();
    let guest = rig.release();
    rig.set_policy(4, 1, &[ModelDigest([7; 32])]).unwrap();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    assert_eq!(
        claim(ask(&rig.broker, &guest.session, &request)),
        "model.digest"
    );
}

#[test]
fn keysets_that_are_not_deterministic_are_malformed() {
    let rig = Rig::new();
    let guest = rig.release();
    let mut request = rig.credential_request(&guest.session, &rig.keyset());
    request.keyset.push(0);
    assert!(matches!(
        ask(&rig.broker, &guest.session, &request),
        Err(Rejection::Keyset(_))
    ));
}

#[test]
fn the_service_name_is_the_resources() {
    let rig = Rig::new();
    let grant = crate::support::grant(&rig.provider, 3);
    rig.broker
        .put_resource(&path(), Some("bank-assistant"), NewResource::grant(&grant))
        .unwrap();
    let guest = rig.release();
    let request = rig.credential_request(&guest.session, &rig.keyset());
    assert_eq!(claim(ask(&rig.broker, &guest.session, &request)), "service");
    let guest = rig.release();
    let mut request = rig.credential_request(&guest.session, &rig.keyset());
    request.service = "bank-assistant".into();
    ask(&rig.broker, &guest.session, &request).unwrap();
}
