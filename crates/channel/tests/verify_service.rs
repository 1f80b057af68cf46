//! A user's verification of a service under the fake TEE: what is accepted, and one sample per
//! fault with the denial it earns.

mod support;

use casemate_attest::measure::Measurement;
use casemate_attest::{Class, Denial, Policy, Status, Transcript, UnixTime};
use casemate_channel::keyset::{Keyset, Purpose};
use casemate_channel::verify::{
    AttestationResponse, Challenge, MAX_RESPONSE, VerifiedService, verify_service,
};
use casemate_container::ModelDigest;
use casemate_container::signing::SigningKey;
use support::{MAXIMUM_AGE, NOW, Service};

impl Service {
    #[track_caller]
    fn denied(&self, class: Class, claim: &str) {
        denied(self.verify_at(NOW), class, claim);
    }
}

/// The outcome is this denial, the transcript says so, and every check is in it once.
#[track_caller]
fn denied(
    (transcript, outcome): (Transcript, Result<VerifiedService, Denial>),
    class: Class,
    claim: &str,
) {
    let denial = outcome.expect_err("a denial");
    assert_eq!((denial.class, denial.claim), (class, claim), "{denial}");
    let failed: Vec<_> = transcript.failed().map(|check| check.name).collect();
    assert_eq!(failed.first(), Some(&claim));
    let names = |t: &Transcript| {
        let mut names: Vec<_> = t.checks().iter().map(|check| check.name).collect();
        names.sort_unstable();
        names
    };
    let mut unique = names(&transcript);
    unique.dedup();
    assert_eq!(names(&transcript), unique, "a check is shown twice");
    for name in [
        "report_data",
        "keyset.validity",
        "credential.issuer",
        "model.digest",
        "freshness",
    ] {
        assert!(unique.contains(&name), "{name} is not shown");
    }
}

#[test]
fn accepts_an_honest_service_and_says_that_it_is_no_tee() {
    let service = Service::new();
    let (transcript, outcome) = service.verify_at(NOW);
    let verified = outcome.unwrap();
    assert!(transcript.is_clean());
    assert!(
        transcript
            .checks()
            .iter()
            .filter(|c| c.status == Status::Passed)
            .count()
            > 25
    );
    assert!(verified.appraised().is_development());
    assert!(!verified.appraised().claims().root_of_trust.is_tee());
    assert_eq!(
        verified.appraised().claims().measurement_name,
        "casemate-enclave"
    );
    assert_eq!(verified.keyset(), &service.keyset);
    assert_eq!(verified.receipt_key().as_bytes(), &[4; 32]);
    assert_eq!(verified.credential().service, "demo");
    assert_eq!(u64::from(verified.recipient().key_id()), 0);
}

#[test]
fn is_valid_until_the_first_of_its_ends() {
    let until = |service: &Service| service.verify_at(NOW).1.unwrap().valid_until().as_secs();
    let mut service = Service::new();
    assert_eq!(until(&service), NOW + MAXIMUM_AGE);
    // The age counts from the nonce, not from the answer.
    service.challenge = Challenge::from_parts([9; 32], UnixTime::from_secs(NOW - 100));
    assert_eq!(until(&service), NOW + MAXIMUM_AGE - 100);
    service.credential.expires_at = NOW + 150;
    assert_eq!(until(&service), NOW + 150);
    service.keyset.expires_at = NOW + 90;
    assert_eq!(until(&service), NOW + 90);
}

#[test]
fn refuses_evidence_over_another_nonce() {
    let service = Service::new();
    let mut response = service.response();
    response.evidence = service.evidence(&response.keyset, &[10; 32]);
    let now = UnixTime::from_secs(NOW);
    let outcome = verify_service(&response, &service.challenge, &service.policy(), now);
    denied(outcome, Class::NotGenuine, "report_data");
}

#[test]
fn refuses_a_keyset_that_the_evidence_does_not_vouch_for() {
    let service = Service::new();
    let mut response = service.response();
    let other = Keyset {
        receipt_key: [99; 32],
        ..service.keyset.clone()
    };
    response.keyset = other.encode().unwrap();
    let now = UnixTime::from_secs(NOW);
    let outcome = verify_service(&response, &service.challenge, &service.policy(), now);
    denied(outcome, Class::NotGenuine, "report_data");
}

#[test]
fn refuses_evidence_that_was_made_for_the_broker() {
    let service = Service {
        purpose: Purpose::Credential([0; 32]),
        ..Service::new()
    };
    service.denied(Class::NotGenuine, "report_data");
}

#[test]
fn refuses_a_development_root_that_the_policy_does_not_name() {
    let service = Service::new();
    let text = service.policy_text();
    let without: String = text
        .lines()
        .filter(|l| !l.contains("dangerous"))
        .map(|l| format!("{l}\n"))
        .collect();
    let policy = Policy::from_toml(&without).unwrap();
    let now = UnixTime::from_secs(NOW);
    let outcome = verify_service(&service.response(), &service.challenge, &policy, now);
    denied(outcome, Class::NotGenuine, "root_of_trust");
}

#[test]
fn refuses_other_code() {
    let service = Service::new();
    let policy = service.policy();
    let changed = Measurement {
        mr_td: [77; 48],
        ..service.measurement
    };
    let service = Service {
        measurement: changed,
        ..service
    };
    let now = UnixTime::from_secs(NOW);
    let (_, outcome) = verify_service(&service.response(), &service.challenge, &policy, now);
    let denial = outcome.unwrap_err();
    assert_eq!(denial.class, Class::Refused);
    assert!(denial.claim.starts_with("measurement"), "{denial}");
}

#[test]
fn refuses_a_keyset_before_its_start_and_from_its_end_on() {
    let mut service = Service::new();
    service.keyset.expires_at = NOW + 100;
    assert!(service.verify_at(NOW + 99).1.is_ok());
    denied(
        service.verify_at(NOW + 100),
        Class::Refused,
        "keyset.validity",
    );
    // A minute of difference between clocks is allowed.
    let mut service = Service::new();
    service.keyset.not_before = NOW + 60;
    assert!(service.verify_at(NOW).1.is_ok());
    service.keyset.not_before = NOW + 61;
    service.denied(Class::Refused, "keyset.validity");
}

#[test]
fn refuses_a_keyset_whose_key_is_of_another_suite() {
    let mut service = Service::new();
    // ChaCha20-Poly1305 instead of AES-128-GCM.
    *service.keyset.ohttp_config.last_mut().unwrap() = 3;
    service.denied(Class::Malformed, "keyset.ohttp_config");
}

#[test]
fn refuses_a_keyset_that_is_none() {
    let service = Service::new();
    let mut response = service.response();
    response.keyset.push(0);
    response.evidence = service.evidence(&response.keyset, service.challenge.nonce());
    let now = UnixTime::from_secs(NOW);
    let outcome = verify_service(&response, &service.challenge, &service.policy(), now);
    denied(outcome, Class::Malformed, "keyset.structure");
}

#[test]
fn refuses_the_credential_of_another_issuer() {
    let mut service = Service::new();
    service.issuer = SigningKey::from_seed(&[2; 32]);
    service.denied(Class::Refused, "credential.issuer");
}

#[test]
fn refuses_a_credential_that_was_altered() {
    let service = Service::new();
    let mut response = service.response();
    // The log size is the only field nothing else is compared with.
    let at = response.credential.len() - 70;
    response.credential[at] ^= 1;
    let now = UnixTime::from_secs(NOW);
    let outcome = verify_service(&response, &service.challenge, &service.policy(), now);
    denied(outcome, Class::NotGenuine, "credential.signature");
}

#[test]
fn refuses_a_credential_that_is_none() {
    let service = Service::new();
    let mut response = service.response();
    response.credential.truncate(50);
    let now = UnixTime::from_secs(NOW);
    let outcome = verify_service(&response, &service.challenge, &service.policy(), now);
    denied(outcome, Class::Malformed, "credential.structure");
}

#[test]
fn refuses_a_credential_before_its_start_and_from_its_end_on() {
    let mut service = Service::new();
    service.credential.expires_at = NOW + 100;
    assert!(service.verify_at(NOW + 99).1.is_ok());
    denied(
        service.verify_at(NOW + 100),
        Class::Refused,
        "credential.validity",
    );
    service.credential.expires_at = NOW + 1800;
    service.credential.issued_at = NOW + 61;
    service.denied(Class::Refused, "credential.validity");
}

#[test]
fn refuses_a_credential_for_another_keyset() {
    let mut service = Service::new();
    service.credential.keyset_digest = [1; 32];
    service.denied(Class::Refused, "credential.keyset");
}

#[test]
fn refuses_a_credential_for_another_model_than_is_served() {
    let mut other = Service::new();
    other.credential.model_digest = ModelDigest([50; 32]);
    other.denied(Class::Refused, "credential.model");
    let mut version = Service::new();
    version.credential.model_version = 8;
    version.denied(Class::Refused, "credential.model");
    let mut adapters = Service::new();
    adapters.credential.adapter_digests = vec![[1; 32]];
    adapters.denied(Class::Refused, "credential.model");
}

#[test]
fn refuses_another_service_of_the_same_issuer() {
    let mut service = Service::new();
    service.credential.service = "other".into();
    service.denied(Class::Refused, "credential.service");
}

#[test]
fn refuses_a_credential_under_an_older_policy_and_accepts_a_newer() {
    let mut service = Service::new();
    service.credential.policy_version = 2;
    service.denied(Class::Refused, "credential.policy_version");
    service.credential.policy_version = 4;
    assert!(service.verify_at(NOW).1.is_ok());
}

#[test]
fn refuses_a_model_that_the_policy_does_not_list() {
    let mut service = Service::new();
    service.keyset.model_digest = [50; 32];
    service.credential.model_digest = ModelDigest([50; 32]);
    service.denied(Class::Refused, "model.digest");
}

#[test]
fn refuses_a_model_that_is_too_old() {
    let mut service = Service::new();
    service.keyset.model_version = 6;
    service.credential.model_version = 6;
    service.denied(Class::Refused, "model.version");
}

#[test]
fn refuses_adapters_that_the_policy_does_not_list() {
    let mut service = Service::new();
    service.keyset.adapter_digests = vec![[1; 32]];
    service.credential.adapter_digests = vec![[1; 32]];
    service.denied(Class::Refused, "model.adapters");
    service.adapters = vec![[1; 32], [2; 32]];
    assert!(service.verify_at(NOW).1.is_ok());
    service.keyset.adapter_digests = vec![[1; 32], [3; 32]];
    service.credential.adapter_digests = vec![[1; 32], [3; 32]];
    service.denied(Class::Refused, "model.adapters");
}

#[test]
fn refuses_an_answer_that_was_held_back() {
    let service = Service::new();
    assert!(service.verify_at(NOW + MAXIMUM_AGE - 1).1.is_ok());
    denied(
        service.verify_at(NOW + MAXIMUM_AGE),
        Class::Refused,
        "freshness",
    );
}

#[test]
fn refuses_under_a_policy_that_names_no_service_or_no_model() {
    let service = Service::new();
    let text = service.policy_text();
    for (section, claim) in [("[service]", "policy.service"), ("[model]", "policy.model")] {
        let start = text.find(section).unwrap();
        let end = text[start + 1..]
            .find("\n[")
            .map_or(text.len(), |n| start + 1 + n + 1);
        let policy = Policy::from_toml(&[&text[..start], &text[end..]].concat()).unwrap();
        let now = UnixTime::from_secs(NOW);
        let outcome = verify_service(&service.response(), &service.challenge, &policy, now);
        denied(outcome, Class::Refused, claim);
    }
}

#[test]
fn shows_every_refusal_of_one_answer() {
    let mut service = Service::new();
    service.credential.service = "other".into();
    service.keyset.model_version = 6;
    let (transcript, _) = service.verify_at(NOW);
    let failed: Vec<_> = transcript.failed().map(|check| check.name).collect();
    assert_eq!(
        failed,
        ["credential.model", "credential.service", "model.version"]
    );
}

#[test]
fn responses_are_read_as_they_are_written_and_nothing_else_is() {
    let response = Service::new().response();
    let json = response.to_json();
    assert_eq!(
        AttestationResponse::from_json(json.as_bytes()).unwrap(),
        response
    );

    let huge = vec![b' '; MAX_RESPONSE + 1];
    let samples = [
        json[..json.len() - 1].to_owned(),
        json.replacen('{', r#"{"extra":1,"#, 1),
        json.replacen(r#""keyset":""#, r#""keyset":"*"#, 1),
        r#"{"keyset":"","credential":""}"#.to_owned(),
        String::from_utf8(huge).unwrap(),
    ];
    for bad in &samples {
        let denial = AttestationResponse::from_json(bad.as_bytes()).unwrap_err();
        assert_eq!(
            (denial.class, denial.claim),
            (Class::Malformed, "response.structure")
        );
    }
}

#[test]
fn challenges_differ_and_are_asked_for_in_hexadecimal() {
    let now = UnixTime::from_secs(NOW);
    let (a, b) = (Challenge::new(now).unwrap(), Challenge::new(now).unwrap());
    assert_ne!(a.nonce(), b.nonce());
    let known = Challenge::from_parts([0xab; 32], now);
    assert_eq!(
        known.path_and_query(),
        format!("/v1/attestation?nonce={}", "ab".repeat(32))
    );
}
