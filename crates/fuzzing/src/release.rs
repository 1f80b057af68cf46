//! RCAR messages, encryption to a guest, key grants, credentials, issuance.

use std::num::NonZeroU32;
use std::sync::LazyLock;

use aws_lc_rs::digest;
use casemate_attest::TeeKind;
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, ModelDigest};
use casemate_release::api_key::{Access, ApiKey, ApiKeys, Limits};
use casemate_release::credential::{Credential, VerifiedCredential, claimed_issuer};
use casemate_release::grant::{self, KeyGrant, VerifiedGrant};
use casemate_release::issuance::{CredentialRequest, CredentialResponse, IssuanceChallenge};
use casemate_release::jwe::{Jwe, Jwk, PublicKey, RecipientKey};
use casemate_release::random::{Random, SystemRandom};
use casemate_release::rcar::{
    self, AttestResponse, Attestation, Challenge, ErrorInformation, Request, ResourcePath,
    RuntimeData,
};
use casemate_release::received::Received;
use casemate_release::rollback::{self, Rollback, Target, VerifiedRollback};
use casemate_release::{ReleaseError, credential};
use serde::Serialize;
use serde_json::json;

use crate::attest::{NOW, honest};
use crate::{Walk, damage};

/// The same bytes in every process, so that seeds fit the keys.
struct Fixed;

impl Random for Fixed {
    fn fill(&self, out: &mut [u8]) -> Result<(), ReleaseError> {
        let block = digest::digest(&digest::SHA256, &(out.len() as u64).to_le_bytes());
        for (byte, &value) in out.iter_mut().zip(block.as_ref().iter().cycle()) {
            *byte = value;
        }
        Ok(())
    }
}

fn recipient() -> &'static RecipientKey {
    static KEY: LazyLock<RecipientKey> =
        LazyLock::new(|| RecipientKey::generate(&Fixed).expect("a key from fixed bytes"));
    &KEY
}

fn split(data: &[u8]) -> (u8, &[u8]) {
    let (&first, rest) = data.split_first().unwrap_or((&0, &[]));
    (first, rest)
}

fn tagged(tag: u8, bytes: &[u8]) -> Vec<u8> {
    [&[tag], bytes].concat()
}

/// The messages of the protocol; the first byte chooses. What is accepted reads back as written.
pub(crate) fn rcar(data: &[u8]) {
    let (which, bytes) = split(data);
    match which % 6 {
        0 => {
            if let Ok((request, tee)) = Request::parse(bytes) {
                let again = Request::parse(&written(&request)).expect("what was written");
                assert_eq!(again, (request, tee));
            }
        }
        1 => {
            if let Ok((challenge, algorithm)) = Challenge::parse(bytes) {
                let again = Challenge::parse(&written(&challenge)).expect("what was written");
                assert_eq!(again, (challenge, algorithm));
            }
        }
        2 => {
            if let Ok((attestation, evidence)) = Attestation::parse(bytes, TeeKind::Tdx) {
                let text = written(&attestation);
                let again = Attestation::parse(&text, TeeKind::Tdx).expect("what was written");
                assert_eq!(again, (attestation.clone(), evidence));
                let _ = PublicKey::from_jwk(&attestation.runtime_data.tee_pubkey);
            }
        }
        3 => {
            if let Ok(response) = AttestResponse::parse(bytes) {
                let again = AttestResponse::parse(&written(&response)).expect("what was written");
                assert_eq!(again, response);
            }
            if let Ok(error) = serde_json::from_slice::<ErrorInformation>(bytes) {
                serde_json::from_slice::<ErrorInformation>(&written(&error))
                    .expect("what was written");
            }
        }
        4 => {
            // Canonical JSON: a parser of JSON reads the members back, whatever the nonce holds.
            let nonce = String::from_utf8_lossy(bytes).into_owned();
            let runtime = RuntimeData {
                nonce: nonce.clone(),
                tee_pubkey: recipient().public().to_jwk(),
            };
            let value: serde_json::Value =
                serde_json::from_slice(&runtime.canonical("")).expect("canonical JSON is JSON");
            assert_eq!(value["nonce"], json!(nonce));
        }
        _ => {
            let text = String::from_utf8_lossy(bytes);
            for session in [
                rcar::session_of_cookie(&text),
                rcar::session_of_set_cookie(&text),
            ]
            .into_iter()
            .flatten()
            {
                assert!(text.contains(session) && !session.contains(';'));
            }
            if let Ok(path) = text.parse::<ResourcePath>() {
                assert_eq!(path.as_str(), text);
                assert!(
                    !path.as_str().contains("..") || !path.as_str().split('/').any(|p| p == "..")
                );
            }
        }
    }
}

fn written(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a message has a JSON form")
}

pub(crate) fn rcar_seeds() -> Vec<Vec<u8>> {
    let key = recipient().public().to_jwk();
    let runtime = RuntimeData {
        nonce: "bm9uY2U=".into(),
        tee_pubkey: key,
    };
    let attestation = Attestation::new(runtime, &honest().evidence).expect("honest evidence");
    let error = json!({ "type": "t", "detail": "d", "denial": { "class": "refused", "claim": "c", "found": "f",
        "expected": "e", "remedy": "r" } });
    vec![
        tagged(0, &written(&Request::new(TeeKind::Tdx))),
        tagged(0, br#"{"version":"0.4.0","tee":"sgx","extra-params":""}"#),
        tagged(0, br#"{"version":"0.4.0","tee":"tdx","extra-params":{"tee-metadata":{"primary_tee":{"tee":"tdx"},"additional_tees":[]}}}"#),
        tagged(1, &written(&Challenge::new(&[7; 32]))),
        tagged(2, &written(&attestation)),
        tagged(3, br#"{"token":"a.b.c"}"#),
        tagged(3, error.to_string().as_bytes()),
        tagged(4, "nonce \"\\\u{7f}\u{2028}é".as_bytes()),
        tagged(5, b"kbs-session-id=0123456789abcdef0123456789abcdef; Path=/"),
        tagged(5, b"default/model/smollm2"),
    ]
}

pub(crate) fn walks() -> Vec<Walk> {
    let grant = honest_grant().sign(&provider()).expect("an honest grant");
    let credential = honest_credential()
        .issue(&issuer())
        .expect("an honest credential");
    let rollback = honest_rollback(model_target()).sign(&provider());
    let rollback = rollback.expect("an honest rollback");
    let walk = |target, what, prefix, len| Walk {
        target,
        what,
        prefix,
        len,
    };
    vec![
        walk("jwe", "a JWE", &[2], honest_jwe().len()),
        walk("grant", "a key grant", &[1], grant.len()),
        walk("credential", "a credential", &[1], credential.len()),
        walk("rollback", "a rollback", &[1], rollback.len()),
    ]
}

const PAYLOAD: &[u8] = b"what is released";

/// A JWE: the text itself, or damage to an honest one. Only the honest payload comes out.
pub(crate) fn jwe(data: &[u8]) {
    let (which, bytes) = split(data);
    if which % 4 == 3 {
        if let Ok(jwk) = serde_json::from_slice::<Jwk>(bytes)
            && let Ok(key) = PublicKey::from_jwk(&jwk)
        {
            assert_eq!(key.to_jwk(), jwk, "a second form of a key was accepted");
        }
        return;
    }
    let mut text = bytes.to_vec();
    if which % 4 == 2 {
        text = honest_jwe();
        damage::apply(bytes, &mut text);
    }
    let Ok(jwe) = Jwe::from_json(&text) else {
        return;
    };
    assert!(Jwe::from_json(&jwe.to_json()).is_ok());
    if let Ok(payload) = jwe.decrypt(recipient()) {
        assert_eq!(*payload, PAYLOAD, "another payload came out");
    }
}

fn honest_jwe() -> Vec<u8> {
    let key = recipient().public();
    Jwe::encrypt(PAYLOAD, key, &SystemRandom)
        .expect("encryption")
        .to_json()
}

pub(crate) fn jwe_seeds() -> Vec<Vec<u8>> {
    let jwk = serde_json::to_vec(&recipient().public().to_jwk()).expect("a key has a JSON form");
    let mut seeds = vec![tagged(0, &honest_jwe()), tagged(3, &jwk)];
    seeds.extend(damage::seeds().into_iter().map(|seed| tagged(2, &seed)));
    seeds
}

fn provider() -> SigningKey {
    SigningKey::from_seed(&[0x11; 32])
}

fn honest_grant() -> KeyGrant {
    let keys = ApiKeys::new(vec![
        ApiKey {
            name: "alice".into(),
            hash: [0x44; 32],
            limits: Limits {
                requests_per_minute: NonZeroU32::new(60),
                tokens_per_day: NonZeroU32::new(1 << 20),
                ..Limits::default()
            },
        },
        ApiKey {
            name: "bob".into(),
            hash: [0x55; 32],
            limits: Limits::default(),
        },
    ])
    .expect("two keys");
    KeyGrant {
        model_digest: ModelDigest([0x22; 32]),
        model_name: "smollm2".into(),
        minimum_version: 3,
        data_key: DataKey::from_bytes(&[0x33; 32]),
        access: Access::Keyed(keys),
    }
}

/// A grant: an envelope as it is, damage to an honest one, or a body that the provider signs whatever it says. What is
/// accepted has exactly one encoding.
pub(crate) fn grant(data: &[u8]) {
    let (which, bytes) = split(data);
    let envelope = match which % 3 {
        0 => bytes.to_vec(),
        1 => {
            let mut envelope = honest_grant()
                .sign(&provider())
                .expect("an honest grant")
                .to_vec();
            damage::apply(bytes, &mut envelope);
            envelope
        }
        _ => signed_by_provider(grant::DOMAIN, bytes),
    };
    let _ = grant::inspect(&envelope);
    if which % 3 == 1 {
        let honest = honest_grant().sign(&provider()).expect("an honest grant");
        let accepted = VerifiedGrant::verify(&envelope, &provider().verifying_key()).is_ok();
        assert_eq!(accepted, *honest == envelope);
    }
    if let Ok(verified) = VerifiedGrant::verify(&envelope, &provider().verifying_key()) {
        let grant = KeyGrant {
            model_digest: *verified.model_digest(),
            model_name: verified.model_name().to_owned(),
            minimum_version: verified.minimum_version(),
            data_key: DataKey::from_bytes(verified.data_key().expose()),
            access: verified.access().clone(),
        };
        let again = grant.sign(&provider()).expect("an accepted grant");
        assert_eq!(*again, envelope, "a second encoding was accepted");
        assert!(grant::inspect(&envelope).is_ok());
    }
}

/// `{0: body, 1: key, 2: signature}`, as grants and rollbacks have it.
fn signed_by_provider(domain: &str, body: &[u8]) -> Vec<u8> {
    let provider = provider();
    let mut cbor = minicbor::Encoder::new(Vec::new());
    cbor.map(3)
        .and_then(|e| e.u8(0)?.bytes(body))
        .and_then(|e| e.u8(1)?.bytes(provider.verifying_key().as_bytes()))
        .and_then(|e| e.u8(2)?.bytes(&provider.sign(domain, body).0))
        .expect("memory takes all bytes");
    cbor.into_writer()
}

/// The first byte string of an envelope, which is the body.
pub(crate) fn body_of(envelope: &[u8]) -> Vec<u8> {
    let mut decoder = minicbor::Decoder::new(envelope);
    let body = decoder
        .map()
        .and_then(|_| decoder.u8())
        .and_then(|_| decoder.bytes());
    body.expect("an envelope begins with its body").to_vec()
}

pub(crate) fn grant_seeds() -> Vec<Vec<u8>> {
    let envelope = honest_grant().sign(&provider()).expect("an honest grant");
    let mut seeds = vec![tagged(0, &envelope), tagged(2, &body_of(&envelope))];
    seeds.extend(damage::seeds().into_iter().map(|seed| tagged(1, &seed)));
    seeds
}

fn honest_rollback(target: Target) -> Rollback {
    Rollback {
        issuer: issuer().verifying_key(),
        target,
        from_version: 5,
        to_version: 3,
        permitted: [0x12; 32],
        expires_at: NOW + 3600,
    }
}

fn model_target() -> Target {
    Target::Model {
        path: "default/model/smollm2".parse().expect("a path"),
        name: "smollm2".into(),
    }
}

/// A rollback, in the same three ways as [`grant`].
pub(crate) fn rollback(data: &[u8]) {
    let (which, bytes) = split(data);
    let honest = honest_rollback(model_target()).sign(&provider());
    let honest = honest.expect("an honest rollback");
    let envelope = match which % 3 {
        0 => bytes.to_vec(),
        1 => {
            let mut envelope = honest.clone();
            damage::apply(bytes, &mut envelope);
            envelope
        }
        _ => signed_by_provider(rollback::DOMAIN, bytes),
    };
    let (provider, issuer) = (provider(), issuer().verifying_key());
    let verified = VerifiedRollback::verify(&envelope, &provider.verifying_key(), &issuer, NOW);
    if which % 3 == 1 {
        assert_eq!(verified.is_ok(), honest == envelope);
    }
    if let Ok(verified) = verified {
        let again = verified
            .claims()
            .sign(&provider)
            .expect("an accepted rollback");
        assert_eq!(again, envelope, "a second encoding was accepted");
        assert!(verified.claims().to_version < verified.claims().from_version);
    }
}

pub(crate) fn rollback_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<_> = damage::seeds()
        .into_iter()
        .map(|seed| tagged(1, &seed))
        .collect();
    for target in [Target::Policy, model_target()] {
        let envelope = honest_rollback(target)
            .sign(&provider())
            .expect("an honest rollback");
        seeds.push(tagged(0, &envelope));
        seeds.push(tagged(2, &body_of(&envelope)));
    }
    seeds
}

fn issuer() -> SigningKey {
    SigningKey::from_seed(&[0x44; 32])
}

fn honest_credential() -> Credential {
    Credential {
        evidence_digest: [1; 32],
        keyset_digest: [2; 32],
        model_digest: ModelDigest([3; 32]),
        model_version: 4,
        adapter_digests: vec![[5; 32], [6; 32]],
        service: "smollm2".into(),
        policy_version: 7,
        log_size: 8,
        log_head: [9; 32],
        issued_at: NOW,
        expires_at: NOW + 1800,
    }
}

/// A credential, in the same three ways as [`grant`].
pub(crate) fn credential(data: &[u8]) {
    let (which, bytes) = split(data);
    let envelope = match which % 3 {
        0 => bytes.to_vec(),
        1 => {
            let mut envelope = honest_credential()
                .issue(&issuer())
                .expect("an honest credential");
            damage::apply(bytes, &mut envelope);
            envelope
        }
        _ => signed_credential(bytes),
    };
    let claimed = claimed_issuer(&envelope);
    if which % 3 == 1 {
        let honest = honest_credential()
            .issue(&issuer())
            .expect("an honest credential");
        let key = issuer().verifying_key();
        assert_eq!(
            VerifiedCredential::verify(&envelope, &key, NOW).is_ok(),
            honest == envelope
        );
    }
    if let Ok(verified) = VerifiedCredential::verify(&envelope, &issuer().verifying_key(), NOW) {
        let again = verified
            .claims()
            .issue(&issuer())
            .expect("an accepted credential");
        assert_eq!(again, envelope, "a second encoding was accepted");
        assert_eq!(claimed.as_ref(), Ok(issuer().verifying_key().as_bytes()));
    }
}

/// `{0: body, 1: signature}`.
fn signed_credential(body: &[u8]) -> Vec<u8> {
    let mut cbor = minicbor::Encoder::new(Vec::new());
    cbor.map(2)
        .and_then(|e| e.u8(0)?.bytes(body))
        .and_then(|e| e.u8(1)?.bytes(&issuer().sign(credential::DOMAIN, body).0))
        .expect("memory takes all bytes");
    cbor.into_writer()
}

pub(crate) fn credential_seeds() -> Vec<Vec<u8>> {
    let envelope = honest_credential()
        .issue(&issuer())
        .expect("an honest credential");
    let mut seeds = vec![tagged(0, &envelope), tagged(2, &body_of(&envelope))];
    seeds.extend(damage::seeds().into_iter().map(|seed| tagged(1, &seed)));
    seeds
}

/// The messages of issuance; the first byte chooses.
pub(crate) fn issuance(data: &[u8]) {
    let (which, bytes) = split(data);
    match which % 3 {
        0 => {
            if let Ok(challenge) = IssuanceChallenge::parse(bytes) {
                let again = IssuanceChallenge::new(&challenge.nonce(), challenge.expires_at);
                assert_eq!(again, challenge);
            }
        }
        1 => {
            if let Ok(request) = CredentialRequest::parse(bytes) {
                let text = request.to_json().expect("an accepted request");
                let again = CredentialRequest::parse(&text).expect("what was written");
                assert_eq!(again.to_json().expect("an accepted request"), text);
            }
        }
        _ => {
            if let Ok(envelope) = CredentialResponse::parse(bytes) {
                let text = serde_json::to_vec(&CredentialResponse::new(&envelope, 1));
                let again = CredentialResponse::parse(&text.expect("a response has a JSON form"));
                assert_eq!(again, Ok(envelope));
            }
        }
    }
}

pub(crate) fn issuance_seeds() -> Vec<Vec<u8>> {
    let request = CredentialRequest {
        nonce: [9; 32],
        service: "smollm2".into(),
        received: vec![Received {
            path: "default/model/smollm2".parse().expect("a path"),
            sha256: [7; 32],
        }],
        keyset: vec![1, 2, 3],
        evidence: honest().evidence.clone(),
    };
    vec![
        tagged(0, &written(&IssuanceChallenge::new(&[8; 32], 99))),
        tagged(1, &request.to_json().expect("an honest request")),
        tagged(2, &written(&CredentialResponse::new(b"envelope", 99))),
    ]
}
