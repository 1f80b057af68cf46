//! The offline verification of receipts under the fake TEE: what is accepted, and one sample per fault with the denial
//! it earns.

mod support;

use casemate_attest::{Class, Denial, Status, Transcript, UnixTime};
use casemate_channel::keyset::{ChannelBinding, KeysetDigest};
use casemate_channel::receipt::{
    AnswerHasher, Bundle, Exchange, FetchedReceipt, Receipt, RequestBytes, RequestHash, Salt,
    SavedAttestation, SignedReceipt, VerifiedExchange, verify_bundle,
};
use casemate_channel::verify::verify_service;
use casemate_container::signing::SigningKey;
use casemate_testkit::statements;
use support::{MAXIMUM_AGE, NOW, Service};

const REQUEST: &[u8] = br#"{"model":"smollm2","messages":[]}"#;
const ANSWER: &[u8] = b"data: {}\n\ndata: [DONE]\n\n";

/// A service that made a receipt, and what its user has.
struct Kept {
    service: Service,
    key: SigningKey,
    receipt: Receipt,
    request_salt: [u8; 32],
    answer_salt: [u8; 32],
    request: Vec<u8>,
    answer: Vec<u8>,
    verified_at: u64,
}

impl Kept {
    fn new() -> Kept {
        let key = SigningKey::from_seed(&[0x66; 32]);
        let mut service = Service::new();
        service.keyset.receipt_key = *key.verifying_key().as_bytes();
        let (request_salt, answer_salt) = ([0x71; 32], [0x72; 32]);
        let mut hasher = AnswerHasher::new(&Salt::from_bytes(&answer_salt));
        hasher.update(ANSWER);
        let salt = Salt::from_bytes(&request_salt);
        let request_hash = RequestHash::of(&salt, "POST", "/v1/chat/completions", REQUEST);
        let receipt = Receipt {
            counter: 7,
            ..statements::receipt(&service.keyset, request_hash, hasher.finish(), NOW + 20)
        };
        Kept {
            service,
            key,
            receipt,
            request_salt,
            answer_salt,
            request: REQUEST.to_vec(),
            answer: ANSWER.to_vec(),
            verified_at: NOW + 1,
        }
    }

    /// As [`Kept::new`], of a user who connected by attested TLS.
    fn over_tls() -> Kept {
        let mut kept = Kept::new();
        kept.service.keyset.tls_key_digest = Some([0x74; 32]);
        kept.service.binding = ChannelBinding::TlsExporter([0x75; 32]);
        kept.receipt.keyset_digest = KeysetDigest::of(&kept.service.keyset.encode().unwrap());
        kept
    }

    fn bundle(&self) -> Bundle {
        Bundle {
            fetched: FetchedReceipt {
                receipt: self.receipt.sign(&self.key).unwrap(),
                request_salt: Salt::from_bytes(&self.request_salt),
                answer_salt: Salt::from_bytes(&self.answer_salt),
            },
            attestation: SavedAttestation {
                response: self.service.response(),
                challenge: self.service.challenge.clone(),
                binding: self.service.binding,
                verified_at: UnixTime::from_secs(self.verified_at),
            },
        }
    }

    fn exchange(&self) -> Exchange<'_> {
        Exchange {
            request: Some(RequestBytes {
                method: "POST",
                target: "/v1/chat/completions",
                body: &self.request,
            }),
            answer: Some(&self.answer),
        }
    }

    fn verify(&self, bundle: &Bundle) -> (Transcript, Result<VerifiedExchange, Denial>) {
        verify_bundle(bundle, &self.exchange(), &self.service.policy(), None)
    }

    #[track_caller]
    fn denied(&self, class: Class, claim: &str) {
        denied(self.verify(&self.bundle()), class, claim);
    }
}

#[track_caller]
fn denied(
    (transcript, outcome): (Transcript, Result<VerifiedExchange, Denial>),
    class: Class,
    claim: &str,
) {
    let denial = outcome.expect_err("a denial");
    assert_eq!((denial.class, denial.claim), (class, claim), "{denial}");
    assert_eq!(transcript.failed().next().map(|c| c.name), Some(claim));
    for name in ["report_data", "receipt.signature", "request", "answer"] {
        let shown = transcript.checks().iter().filter(|c| c.name == name);
        assert_eq!(shown.count(), 1, "{name}");
    }
}

fn status(transcript: &Transcript, name: &str) -> Status {
    let check = transcript.checks().iter().find(|c| c.name == name);
    check.unwrap().status
}

#[test]
fn accepts_an_honest_receipt_and_says_that_it_is_no_tee() {
    let kept = Kept::new();
    let (transcript, outcome) = kept.verify(&kept.bundle());
    let verified = outcome.unwrap();
    assert!(transcript.is_clean());
    assert_eq!(verified.receipt(), &kept.receipt);
    assert!(verified.covers_request() && verified.covers_answer());
    assert!(verified.service().appraised().is_development());
    assert_eq!(verified.as_of(), UnixTime::from_secs(NOW + 1));
}

#[test]
fn a_receipt_over_tls_is_good_with_the_exporter_of_its_evidence_and_no_other() {
    let kept = Kept::over_tls();
    let mut bundle = kept.bundle();
    let (transcript, outcome) = kept.verify(&bundle);
    assert_eq!(outcome.unwrap().receipt(), &kept.receipt);
    assert_eq!(transcript.failed().count(), 0);
    // Nobody can see anymore at whose key that connection ended.
    assert_eq!(status(&transcript, "tls.key"), Status::Skipped);
    assert_eq!(status(&transcript, "report_data"), Status::Passed);
    for wrong in [
        ChannelBinding::Key,
        ChannelBinding::TlsExporter([0; 32]),
        ChannelBinding::TlsExporter([0x74; 32]),
    ] {
        bundle.attestation.binding = wrong;
        denied(kept.verify(&bundle), Class::NotGenuine, "report_data");
    }
    // Nor does evidence for encryption become evidence for a connection.
    let kept = Kept::new();
    let mut bundle = kept.bundle();
    bundle.attestation.binding = ChannelBinding::TlsExporter([0x75; 32]);
    denied(kept.verify(&bundle), Class::NotGenuine, "report_data");
}

#[test]
fn an_exporter_is_read_as_it_is_written_and_not_otherwise() {
    let json = Kept::over_tls().bundle().to_json();
    let read = |json: &str| Bundle::from_json(json.as_bytes());
    assert_eq!(read(&json).ok().unwrap().to_json(), json);
    let exporter = "75".repeat(32);
    let member = format!("\"tls_exporter\":\"{exporter}\"");
    assert!(json.contains(&member));
    for other in [
        "\"tls_exporter\":null".to_owned(),
        "\"tls_exporter\":\"\"".to_owned(),
        format!("\"tls_exporter\":\"{}\"", &exporter[1..]),
        format!("\"tls_exporter\":\"{exporter}75\""),
        format!("\"tls_exporter\":\"{}\"", "7A".repeat(32)),
        format!("{member},{member}"),
        format!("\"exporter\":\"{exporter}\""),
    ] {
        assert!(read(&json.replace(&member, &other)).is_err(), "{other}");
    }
    assert!(!Kept::new().bundle().to_json().contains("tls_exporter"));
}

#[test]
fn what_was_not_given_is_skipped_and_not_covered() {
    let kept = Kept::new();
    let policy = kept.service.policy();
    let verify = |exchange: &Exchange<'_>| verify_bundle(&kept.bundle(), exchange, &policy, None);
    let (transcript, outcome) = verify(&Exchange::default());
    let verified = outcome.unwrap();
    assert!(!verified.covers_request() && !verified.covers_answer());
    assert_eq!(status(&transcript, "request"), Status::Skipped);
    assert_eq!(status(&transcript, "answer"), Status::Skipped);
    let (transcript, outcome) = verify(&Exchange {
        answer: Some(ANSWER),
        ..Exchange::default()
    });
    assert!(!outcome.unwrap().covers_request());
    assert_eq!(status(&transcript, "answer"), Status::Passed);
}

#[test]
fn refuses_a_receipt_signed_by_another_key() {
    let mut kept = Kept::new();
    kept.key = SigningKey::from_seed(&[0x67; 32]);
    kept.denied(Class::NotGenuine, "receipt.signature");
}

#[test]
fn refuses_a_receipt_that_was_altered() {
    let kept = Kept::new();
    let mut bundle = kept.bundle();
    // The time is the last field of the body; what follows are 68 bytes of signature and its head.
    let at = bundle.fetched.receipt.len() - 64 - 3 - 1;
    bundle.fetched.receipt[at] ^= 1;
    denied(kept.verify(&bundle), Class::NotGenuine, "receipt.signature");
}

#[test]
fn refuses_a_receipt_whose_number_was_altered() {
    let kept = Kept::new();
    let mut other = kept.receipt.clone();
    other.counter = 6;
    // The signature of number 7 under a body that says 6.
    let mut bundle = kept.bundle();
    let (good, bad) = (&bundle.fetched.receipt, other.sign(&kept.key).unwrap());
    let end = good.len() - 64;
    bundle.fetched.receipt = [&bad[..end], &good[end..]].concat();
    denied(kept.verify(&bundle), Class::NotGenuine, "receipt.signature");
}

#[test]
fn refuses_a_receipt_of_another_keyset() {
    let mut kept = Kept::new();
    kept.receipt.keyset_digest = KeysetDigest([1; 32]);
    kept.denied(Class::NotGenuine, "receipt.keyset");
    // And evidence of another keyset than the receipt's.
    let kept = Kept::new();
    let mut other = Kept::new();
    other.service.keyset.expires_at -= 1;
    let bundle = Bundle {
        fetched: kept.bundle().fetched,
        attestation: SavedAttestation {
            response: other.service.response(),
            challenge: other.service.challenge.clone(),
            binding: other.service.binding,
            verified_at: UnixTime::from_secs(NOW),
        },
    };
    let policy = other.service.policy();
    let outcome = verify_bundle(&bundle, &kept.exchange(), &policy, None);
    denied(outcome, Class::NotGenuine, "receipt.keyset");
}

#[test]
fn refuses_a_receipt_that_names_other_evidence_or_another_model_than_its_keyset() {
    let mut kept = Kept::new();
    kept.receipt.evidence_digest = [1; 32];
    kept.denied(Class::NotGenuine, "receipt.evidence");
    type Break = fn(&mut Receipt);
    let breaks: [Break; 4] = [
        |r| r.model_digest = [1; 32],
        |r| r.model_version += 1,
        |r| r.adapter_digests = vec![[1; 32]],
        |r| r.compute = "f32".into(),
    ];
    for break_it in breaks {
        let mut kept = Kept::new();
        break_it(&mut kept.receipt);
        kept.denied(Class::NotGenuine, "receipt.model");
    }
}

#[test]
fn refuses_a_model_that_the_policy_does_not_list() {
    // An operator that serves a cheaper model, and says so.
    let mut kept = Kept::new();
    kept.service.keyset.model_digest = [50; 32];
    kept.service.credential.model_digest = casemate_container::ModelDigest([50; 32]);
    kept.receipt.model_digest = [50; 32];
    kept.receipt.keyset_digest = KeysetDigest::of(&kept.service.keyset.encode().unwrap());
    kept.denied(Class::Refused, "model.digest");
}

#[test]
fn refuses_a_time_outside_of_the_keysets_validity() {
    for (time, accepted) in [
        (NOW - 61, false),
        (NOW - 60, true),
        (NOW + 3600 + 59, true),
        (NOW + 3600 + 60, false),
    ] {
        let mut kept = Kept::new();
        kept.receipt.time = time;
        if accepted {
            assert!(kept.verify(&kept.bundle()).1.is_ok(), "{time}");
        } else {
            kept.denied(Class::Refused, "receipt.time");
        }
    }
}

#[test]
fn refuses_an_incomplete_answer_and_still_shows_the_rest() {
    let mut kept = Kept::new();
    kept.receipt.usage = None;
    kept.denied(Class::Refused, "receipt.complete");
    let (transcript, _) = kept.verify(&kept.bundle());
    assert_eq!(status(&transcript, "answer"), Status::Passed);
    assert_eq!(transcript.failed().count(), 1);
}

#[test]
fn refuses_another_request_at_every_byte() {
    let mut kept = Kept::new();
    for at in 0..REQUEST.len() {
        kept.request = REQUEST.to_vec();
        kept.request[at] ^= 1;
        kept.denied(Class::NotGenuine, "request");
    }
    let kept = Kept::new();
    let policy = kept.service.policy();
    for (method, target) in [("GET", "/v1/chat/completions"), ("POST", "/v1/completions")] {
        let exchange = Exchange {
            request: Some(RequestBytes {
                method,
                target,
                body: REQUEST,
            }),
            answer: None,
        };
        let outcome = verify_bundle(&kept.bundle(), &exchange, &policy, None);
        denied(outcome, Class::NotGenuine, "request");
    }
}

#[test]
fn refuses_another_answer_at_every_byte_and_at_every_cut() {
    let mut kept = Kept::new();
    for at in 0..ANSWER.len() {
        kept.answer = ANSWER.to_vec();
        kept.answer[at] ^= 1;
        kept.denied(Class::NotGenuine, "answer");
        kept.answer = ANSWER[..at].to_vec();
        kept.denied(Class::NotGenuine, "answer");
    }
}

#[test]
fn refuses_another_salt() {
    let mut kept = Kept::new();
    kept.request_salt[31] ^= 1;
    kept.denied(Class::NotGenuine, "request");
    let mut kept = Kept::new();
    kept.answer_salt[0] ^= 1;
    kept.denied(Class::NotGenuine, "answer");
}

#[test]
fn refuses_a_credential_of_another_issuer() {
    let mut kept = Kept::new();
    kept.service.issuer = SigningKey::from_seed(&[2; 32]);
    kept.denied(Class::Refused, "credential.issuer");
}

#[test]
fn the_attestation_is_judged_as_of_the_proxys_verification_by_the_same_code() {
    let kept = Kept::new();
    let (bundle, policy) = (kept.bundle(), kept.service.policy());
    let at = |at: u64| {
        let at = Some(UnixTime::from_secs(at));
        verify_bundle(&bundle, &kept.exchange(), &policy, at)
    };
    assert!(at(NOW + MAXIMUM_AGE - 1).1.is_ok());
    // Years later it would have expired; as of then it had not.
    denied(
        at(NOW + 100_000_000),
        Class::NotGenuine,
        "collateral.validity",
    );
    denied(at(NOW + MAXIMUM_AGE), Class::Refused, "freshness");
    denied(at(NOW + 1800), Class::Refused, "credential.validity");
    assert!(kept.verify(&bundle).1.is_ok());

    let saved = &bundle.attestation;
    let (fresh, _) = verify_service(
        &saved.response,
        &saved.challenge,
        &policy,
        saved.verified_at,
    );
    let (stored, _) = kept.verify(&bundle);
    assert_eq!(stored.checks()[..fresh.checks().len()], *fresh.checks());
}

#[test]
fn bundles_are_read_as_they_are_written_and_nothing_else_is() {
    let json = Kept::new().bundle().to_json();
    let read = |json: &str| Bundle::from_json(json.as_bytes());
    assert_eq!(read(&json).ok().unwrap().to_json(), json);
    let nonce = "09".repeat(32);
    for (from, to) in [
        ("{\"format\"", "{\"extra\":1,\"format\""),
        ("bundle v1", "bundle v2"),
        (&nonce[..], &nonce[1..]),
        ("2026-11-18T11:06:40Z", "2026-11-18T11:06:40+00:00"),
        ("2026-11-18T11:06:41Z", "2026-11-18t11:06:41Z"),
        ("\"keyset\":\"", "\"keyset\":\"*"),
    ] {
        let changed = json.replacen(from, to, 1);
        assert_ne!(changed, json, "{from}");
        assert!(read(&changed).is_err(), "{to}");
    }
    assert!(read(&json[..json.len() - 1]).is_err());
    assert!(read(&json.replace(&nonce, &"0A".repeat(32))).is_err());
}

#[test]
fn every_changed_byte_of_a_receipt_is_refused() {
    let kept = Kept::new();
    let saved = kept.bundle().attestation;
    let (_, service) = verify_service(
        &saved.response,
        &saved.challenge,
        &kept.service.policy(),
        saved.verified_at,
    );
    let service = service.unwrap();
    let envelope = kept.receipt.sign(&kept.key).unwrap();
    let verify =
        |envelope: &[u8]| SignedReceipt::parse(envelope).and_then(|signed| signed.verify(&service));
    assert!(verify(&envelope).is_ok());
    for at in 0..envelope.len() {
        for bit in 0..8 {
            let mut changed = envelope.clone();
            changed[at] ^= 1 << bit;
            assert!(verify(&changed).is_err(), "byte {at}, bit {bit}");
        }
    }
}

/// Every byte of what the receipt brought, and of nonce, keyset and credential; every 97th of the evidence, whose own walk
/// is elsewhere. What may pass changed: the proxy's two times, which nobody signed, and collateral, of which white space
/// means nothing. What is proven is the same then.
#[test]
fn every_changed_byte_of_a_bundle_is_refused_or_proves_the_same() {
    for kept in [Kept::new(), Kept::over_tls()] {
        walk_bundle(&kept);
    }
}

fn walk_bundle(kept: &Kept) {
    let (policy, exchange) = (kept.service.policy(), kept.exchange());
    let json = kept.bundle().to_json().into_bytes();
    let text = String::from_utf8(json.clone()).unwrap();
    let evidence = text.find("\"evidence\"").unwrap()..text.find("\"keyset\"").unwrap();
    let collateral = text.find("\"collateral\"").unwrap()..evidence.end;
    let times = text.find("\"nonce_made_at\"").unwrap()..text.len();
    let mut walked = 0;
    for at in 0..json.len() {
        if evidence.contains(&at) && at % 97 != 0 {
            continue;
        }
        walked += 1;
        let mut changed = json.clone();
        changed[at] ^= 1;
        let Ok(bundle) = Bundle::from_json(&changed) else {
            continue;
        };
        let (_, outcome) = verify_bundle(&bundle, &exchange, &policy, None);
        if let Ok(verified) = outcome {
            assert!(
                times.contains(&at) || collateral.contains(&at),
                "byte {at}: {}",
                String::from_utf8_lossy(&changed[at.saturating_sub(20)..at + 1])
            );
            assert_eq!(verified.receipt(), &kept.receipt, "byte {at}");
        }
    }
    assert!(walked > 3000, "{walked}");
}
