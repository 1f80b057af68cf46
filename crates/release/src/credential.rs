//! Deployment credentials: an issuer's short-lived statement that a keyset, seen under fresh evidence,
//! serves a model for it under a service name.
//!
//! ```text
//! envelope = { 0: body bstr, 1: signature bstr64 }
//! body     = { 0: 1, 1: issuer bstr32, 2: evidence digest bstr32, 3: keyset digest bstr32,
//!              4: model digest bstr32, 5: model version uint, 6: [* adapter digest bstr32],
//!              7: service name tstr, 8: policy version uint, 9: log size uint, 10: log head bstr32,
//!              11: issued at uint, 12: expires at uint }
//! ```
//! Both are deterministic CBOR; the signature covers the domain [`DOMAIN`] and the body's bytes. Evidence
//! says what runs, a credential says whose it is: a user's policy pins the issuer.

use casemate_container::ModelDigest;
use casemate_container::signing::{SigningKey, VerifyingKey};
use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use crate::encoding::{check_name, decode, encode};
use crate::error::{Malformed, Refused, ReleaseError, Unverified};
use crate::signed::{FORMAT, Kind};

/// Domain of the issuer's signature.
pub const DOMAIN: &str = "casemate deployment credential v1";
/// Most bytes of an envelope.
pub const MAX_CREDENTIAL_BYTES: usize = 4096;
/// Longest life of a credential in seconds.
pub const MAX_LIFETIME_SECONDS: u64 = 3600;
/// How far the issuer's clock may be ahead of the verifier's.
pub const CLOCK_SKEW_SECONDS: u64 = 60;
/// Most adapters in one credential.
pub const MAX_ADAPTERS: usize = 64;

const KIND: Kind = Kind {
    envelope: "credential",
    body: "credential.body",
    format: "credential.format",
    domain: DOMAIN,
    limit: MAX_CREDENTIAL_BYTES,
    unverified: Unverified::Credential,
};

/// What an issuer states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// SHA-256 of the evidence that the issuer appraised.
    pub evidence_digest: [u8; 32],
    /// SHA-256 of the encoded keyset.
    pub keyset_digest: [u8; 32],
    /// The model that is served.
    pub model_digest: ModelDigest,
    /// Its version.
    pub model_version: u64,
    /// Adapters that are loaded, ascending.
    pub adapter_digests: Vec<[u8; 32]>,
    /// The service's name, as users' policies have it.
    pub service: String,
    /// Version of the issuer's policy under which the evidence was appraised.
    pub policy_version: u64,
    /// Number of entries in the issuer's decision log, the one about this credential included.
    pub log_size: u64,
    /// Hash of the last of these entries.
    pub log_head: [u8; 32],
    /// Start of validity, seconds since 1970.
    pub issued_at: u64,
    /// End of validity, seconds since 1970; at this second the credential is no longer valid.
    pub expires_at: u64,
}

/// A credential whose signature and time have been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCredential {
    credential: Credential,
    issuer: VerifyingKey,
}

impl Credential {
    /// Signs the statement and returns the envelope.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`] when a field breaks its rule.
    pub fn issue(&self, issuer: &SigningKey) -> Result<Vec<u8>, ReleaseError> {
        self.check()?;
        let body = Body {
            format: FORMAT,
            issuer: *issuer.verifying_key().as_bytes(),
            evidence_digest: self.evidence_digest,
            keyset_digest: self.keyset_digest,
            model_digest: *self.model_digest.as_bytes(),
            model_version: self.model_version,
            adapter_digests: self.adapter_digests.iter().map(|&d| d.into()).collect(),
            service: self.service.clone(),
            policy_version: self.policy_version,
            log_size: self.log_size,
            log_head: self.log_head,
            issued_at: self.issued_at,
            expires_at: self.expires_at,
        };
        let (body, signature) = KIND.sign_body(&body, issuer);
        let envelope = Envelope {
            body: body.to_vec(),
            signature,
        };
        Ok(encode(&envelope, MAX_CREDENTIAL_BYTES).to_vec())
    }

    fn check(&self) -> Result<(), Malformed> {
        check_name("credential.service", &self.service)?;
        let adapters = &self.adapter_digests;
        if adapters.len() > MAX_ADAPTERS || !adapters.windows(2).all(|w| w[0] < w[1]) {
            return Err(Malformed::Unsupported {
                what: "credential.adapter_digests",
                found: format!("{} digests", adapters.len()),
                expected: "at most 64, ascending",
            });
        }
        let life = self.expires_at.checked_sub(self.issued_at);
        if !life.is_some_and(|life| (1..=MAX_LIFETIME_SECONDS).contains(&life)) {
            return Err(Malformed::Unsupported {
                what: "credential.expires_at",
                found: format!("{} to {}", self.issued_at, self.expires_at),
                expected: "a life of 1 to 3600 seconds",
            });
        }
        Ok(())
    }
}

impl VerifiedCredential {
    /// Parses an envelope, verifies that `issuer` signed it and that it is valid at `now`.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`] for anything but the one encoding of a credential,
    /// [`Unverified::Credential`] for another signer or changed bytes, [`Refused::Expired`] or
    /// [`Refused::NotYetValid`] for the wrong time.
    pub fn verify(envelope: &[u8], issuer: &VerifyingKey, now: u64) -> Result<Self, ReleaseError> {
        let credential = past_claims(envelope, issuer)?;
        let Credential {
            issued_at,
            expires_at,
            ..
        } = credential;
        if now >= expires_at {
            return Err(Refused::Expired { expires_at, now }.into());
        }
        if issued_at > now.saturating_add(CLOCK_SKEW_SECONDS) {
            return Err(Refused::NotYetValid { issued_at, now }.into());
        }
        Ok(Self {
            credential,
            issuer: *issuer,
        })
    }

    /// What the issuer stated.
    pub fn claims(&self) -> &Credential {
        &self.credential
    }

    /// The issuer that signed.
    pub fn issuer(&self) -> &VerifyingKey {
        &self.issuer
    }
}

/// What an issuer stated at some time, whether or not it still holds: for comparing with the issuer's log, not for trusting
/// a service.
///
/// # Errors
/// [`ReleaseError::Malformed`] for anything but the one encoding of a credential, [`Unverified::Credential`] for another
/// signer or changed bytes.
pub fn past_claims(envelope: &[u8], issuer: &VerifyingKey) -> Result<Credential, ReleaseError> {
    let envelope: Envelope = decode(KIND.envelope, envelope, KIND.limit)?;
    let body: Body = KIND.verify_body(&envelope.body, envelope.signature, issuer)?;
    if body.issuer != *issuer.as_bytes() {
        return Err(Unverified::Credential.into());
    }
    let credential = Credential {
        evidence_digest: body.evidence_digest,
        keyset_digest: body.keyset_digest,
        model_digest: ModelDigest(body.model_digest),
        model_version: body.model_version,
        adapter_digests: body.adapter_digests.into_iter().map(Into::into).collect(),
        service: body.service,
        policy_version: body.policy_version,
        log_size: body.log_size,
        log_head: body.log_head,
        issued_at: body.issued_at,
        expires_at: body.expires_at,
    };
    credential.check()?;
    Ok(credential)
}

/// The issuer that a credential names, verified or not; to tell a person what was found.
///
/// # Errors
/// [`ReleaseError::Malformed`].
pub fn claimed_issuer(envelope: &[u8]) -> Result<[u8; 32], ReleaseError> {
    let envelope: Envelope = decode(KIND.envelope, envelope, KIND.limit)?;
    let body: Body = KIND.parse_body(&envelope.body)?;
    Ok(body.issuer)
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Envelope {
    #[cbor(n(0), with = "minicbor::bytes")]
    body: Vec<u8>,
    #[cbor(n(1), with = "minicbor::bytes")]
    signature: [u8; 64],
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Body {
    #[n(0)]
    format: u32,
    #[cbor(n(1), with = "minicbor::bytes")]
    issuer: [u8; 32],
    #[cbor(n(2), with = "minicbor::bytes")]
    evidence_digest: [u8; 32],
    #[cbor(n(3), with = "minicbor::bytes")]
    keyset_digest: [u8; 32],
    #[cbor(n(4), with = "minicbor::bytes")]
    model_digest: [u8; 32],
    #[n(5)]
    model_version: u64,
    #[n(6)]
    adapter_digests: Vec<ByteArray<32>>,
    #[n(7)]
    service: String,
    #[n(8)]
    policy_version: u64,
    #[n(9)]
    log_size: u64,
    #[cbor(n(10), with = "minicbor::bytes")]
    log_head: [u8; 32],
    #[n(11)]
    issued_at: u64,
    #[n(12)]
    expires_at: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    const VECTORS: &str = include_str!("../../../docs/vectors/key-release.json");
    const ISSUED: u64 = 1_780_000_000;

    fn issuer() -> SigningKey {
        SigningKey::from_seed(&[0x44; 32])
    }

    fn credential() -> Credential {
        Credential {
            evidence_digest: [0x51; 32],
            keyset_digest: [0x52; 32],
            model_digest: ModelDigest([0x22; 32]),
            model_version: 4,
            adapter_digests: vec![[0x53; 32], [0x54; 32]],
            service: "smollm2".into(),
            policy_version: 7,
            log_size: 12,
            log_head: [0x55; 32],
            issued_at: ISSUED,
            expires_at: ISSUED + 900,
        }
    }

    fn verify(envelope: &[u8], now: u64) -> Result<VerifiedCredential, ReleaseError> {
        VerifiedCredential::verify(envelope, &issuer().verifying_key(), now)
    }

    #[test]
    fn issues_the_vector_byte_for_byte() {
        let vectors: Value = serde_json::from_str(VECTORS).unwrap();
        let envelope = credential().issue(&issuer()).unwrap();
        assert_eq!(hex::encode(envelope), vectors["credential"]["envelope"]);
        assert_eq!(
            issuer().verifying_key().to_string(),
            vectors["credential"]["issuer"]
        );
    }

    #[test]
    fn verifies_under_the_issuers_key_only() {
        let envelope = credential().issue(&issuer()).unwrap();
        let verified = verify(&envelope, ISSUED).unwrap();
        assert_eq!(verified.claims(), &credential());
        assert_eq!(verified.issuer(), &issuer().verifying_key());
        assert_eq!(
            claimed_issuer(&envelope),
            Ok(*issuer().verifying_key().as_bytes())
        );

        let other = SigningKey::generate().verifying_key();
        assert_eq!(
            VerifiedCredential::verify(&envelope, &other, ISSUED),
            Err(Unverified::Credential.into())
        );
        // Signed by the issuer, but naming another.
        let mut envelope: Envelope = minicbor::decode(&envelope).unwrap();
        let mut body: Body = minicbor::decode(&envelope.body).unwrap();
        body.issuer = *other.as_bytes();
        envelope.body = encode(&body, MAX_CREDENTIAL_BYTES).to_vec();
        envelope.signature = issuer().sign(DOMAIN, &envelope.body).0;
        let envelope = encode(&envelope, MAX_CREDENTIAL_BYTES);
        assert_eq!(
            verify(&envelope, ISSUED),
            Err(Unverified::Credential.into())
        );
    }

    #[test]
    fn is_valid_from_issue_until_just_before_expiry() {
        let envelope = credential().issue(&issuer()).unwrap();
        assert!(verify(&envelope, ISSUED + 899).is_ok());
        let expires_at = ISSUED + 900;
        assert_eq!(
            verify(&envelope, expires_at),
            Err(Refused::Expired {
                expires_at,
                now: expires_at
            }
            .into())
        );
        assert!(verify(&envelope, ISSUED - CLOCK_SKEW_SECONDS).is_ok());
        let now = ISSUED - CLOCK_SKEW_SECONDS - 1;
        assert_eq!(
            verify(&envelope, now),
            Err(Refused::NotYetValid {
                issued_at: ISSUED,
                now
            }
            .into())
        );
    }

    #[test]
    fn every_changed_bit_is_refused() {
        let envelope = credential().issue(&issuer()).unwrap();
        for index in 0..envelope.len() {
            let mut changed = envelope.clone();
            changed[index] ^= 1;
            assert!(verify(&changed, ISSUED).is_err(), "byte {index}");
        }
    }

    #[test]
    fn refuses_other_encodings_of_the_same_credential() {
        let envelope = credential().issue(&issuer()).unwrap();
        let refused = Err(Malformed::NotDeterministic { what: "credential" }.into());
        let mut trailing = envelope.clone();
        trailing.push(0);
        assert_eq!(verify(&trailing, ISSUED), refused);
        let mut long = vec![0xb8, 0x02];
        long.extend(&envelope[1..]);
        assert_eq!(verify(&long, ISSUED), refused);
        for length in 0..envelope.len() {
            assert_eq!(
                verify(&envelope[..length], ISSUED),
                Err(Malformed::Cbor { what: "credential" }.into())
            );
        }
    }

    #[test]
    fn statements_that_break_a_rule_are_not_signed() {
        let broken = [
            (
                "credential.service",
                Credential {
                    service: String::new(),
                    ..credential()
                },
            ),
            (
                "credential.expires_at",
                Credential {
                    expires_at: ISSUED,
                    ..credential()
                },
            ),
            (
                "credential.expires_at",
                Credential {
                    expires_at: ISSUED + 3601,
                    ..credential()
                },
            ),
            (
                "credential.adapter_digests",
                Credential {
                    adapter_digests: vec![[2; 32], [1; 32]],
                    ..credential()
                },
            ),
            (
                "credential.adapter_digests",
                Credential {
                    adapter_digests: vec![[2; 32], [2; 32]],
                    ..credential()
                },
            ),
        ];
        for (field, statement) in broken {
            match statement.issue(&issuer()) {
                Err(ReleaseError::Malformed(
                    Malformed::Text { what } | Malformed::Unsupported { what, .. },
                )) => assert_eq!(what, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_largest_credential_fits() {
        let adapters = (0..64u8).map(|i| [i; 32]).collect();
        let largest = Credential {
            adapter_digests: adapters,
            service: "x".repeat(128),
            model_version: u64::MAX,
            policy_version: u64::MAX,
            log_size: u64::MAX,
            ..credential()
        };
        let envelope = largest.issue(&issuer()).unwrap();
        assert_eq!(verify(&envelope, ISSUED).unwrap().claims(), &largest);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_credential_round_trips(
            digests: [[u8; 32]; 3], versions: [u64; 3], life in 1..=MAX_LIFETIME_SECONDS,
            service in "[!-~]{1,128}", adapters in proptest::collection::btree_set(any::<[u8; 32]>(), 0..4),
        ) {
            let statement = Credential {
                evidence_digest: digests[0],
                keyset_digest: digests[1],
                log_head: digests[2],
                model_version: versions[0],
                policy_version: versions[1],
                log_size: versions[2],
                adapter_digests: adapters.into_iter().collect(),
                service,
                expires_at: ISSUED + life,
                ..credential()
            };
            let envelope = statement.issue(&issuer()).unwrap();
            let verified = verify(&envelope, ISSUED).unwrap();
            prop_assert_eq!(verified.claims(), &statement);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(verify(&bytes, ISSUED).is_err());
            prop_assert!(claimed_issuer(&bytes).is_err());
        }
    }
}
