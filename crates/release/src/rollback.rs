//! Rollbacks: the provider's signed permission to go back to an older policy or model, once.
//!
//! ```text
//! body     = { 0: 1, 1: issuer bstr32, 2: kind uint, 3: from version uint, 4: to version uint,
//!              5: SHA-256 of the policy or key grant bstr32, 6: expires at uint,
//!              7: resource path tstr, 8: model name tstr }
//! ```
//! Kind 0 is a policy and has no keys 7 and 8, kind 1 is a model and has both. A signed envelope (`signed`) of the
//! domain [`DOMAIN`] carries it. A rollback names the one broker (by its issuer key),
//! the versions and the bytes that it permits, and lives for [`MAX_LIFETIME_SECONDS`] at most. That it is used once
//! is the broker's business, which remembers [`VerifiedRollback::digest`].

use aws_lc_rs::digest::{SHA256, digest};
use casemate_container::signing::{SigningKey, VerifyingKey};
use minicbor::{Decode, Encode};

use crate::encoding::check_model_name;
use crate::error::{Malformed, Refused, ReleaseError, Unverified};
use crate::rcar::ResourcePath;
use crate::signed::{FORMAT, Kind};

/// Domain of the provider's signature.
pub const DOMAIN: &str = "casemate rollback v1";
/// Most bytes of an envelope.
pub const MAX_ROLLBACK_BYTES: usize = 1024;
/// Longest life of a rollback in seconds: a week.
pub const MAX_LIFETIME_SECONDS: u64 = 7 * 86_400;

const KIND: Kind = Kind {
    envelope: "rollback",
    body: "rollback.body",
    format: "rollback.format",
    domain: DOMAIN,
    limit: MAX_ROLLBACK_BYTES,
    unverified: Unverified::Rollback,
};
const POLICY: u32 = 0;
const MODEL: u32 = 1;

/// What goes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The broker's policy.
    Policy,
    /// A model whose key is granted.
    Model {
        /// Where the grant is stored.
        path: ResourcePath,
        /// The model's name in the manifest.
        name: String,
    },
}

/// What a provider permits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollback {
    /// The broker that may do it, by the key with which it signs.
    pub issuer: VerifyingKey,
    /// What goes back.
    pub target: Target,
    /// The version that is in force before.
    pub from_version: u64,
    /// The lower version that will be in force.
    pub to_version: u64,
    /// SHA-256 of exactly the policy's text or the grant's envelope that may be put into force.
    pub permitted: [u8; 32],
    /// End of validity, seconds since 1970; at this second it is no longer valid.
    pub expires_at: u64,
}

/// A rollback whose signature, broker and time have been verified; what it permits is still to be compared.
#[derive(Debug)]
pub struct VerifiedRollback {
    rollback: Rollback,
    digest: [u8; 32],
}

impl Rollback {
    /// Signs the permission and returns the envelope.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`] when a field breaks its rule.
    pub fn sign(&self, provider: &SigningKey) -> Result<Vec<u8>, ReleaseError> {
        self.check()?;
        let (kind, path, name) = match &self.target {
            Target::Policy => (POLICY, None, None),
            Target::Model { path, name } => {
                (MODEL, Some(path.as_str().to_owned()), Some(name.clone()))
            }
        };
        let body = Body {
            format: FORMAT,
            issuer: *self.issuer.as_bytes(),
            kind,
            from_version: self.from_version,
            to_version: self.to_version,
            permitted: self.permitted,
            expires_at: self.expires_at,
            path,
            name,
        };
        Ok(KIND.sign(&body, provider).to_vec())
    }

    fn check(&self) -> Result<(), Malformed> {
        if let Target::Model { name, .. } = &self.target {
            check_model_name("rollback.model_name", name)?;
        }
        if self.to_version >= self.from_version {
            return Err(Malformed::Unsupported {
                what: "rollback.to_version",
                found: self.to_version.to_string(),
                expected: "a version below the one it goes back from",
            });
        }
        Ok(())
    }
}

impl VerifiedRollback {
    /// Parses an envelope and verifies that `provider` signed it, for the broker of `issuer`, and that it is valid at
    /// `now`.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`] for anything but the one encoding of a rollback, [`Unverified::Rollback`] for
    /// another signer or changed bytes, [`Refused::Expired`], [`Refused::LivesTooLong`] or [`Refused::Rollback`].
    pub fn verify(
        envelope: &[u8],
        provider: &VerifyingKey,
        issuer: &VerifyingKey,
        now: u64,
    ) -> Result<Self, ReleaseError> {
        let body: Body = KIND.verify(envelope, provider)?;
        let rollback = body.read()?;
        rollback.check()?;
        if rollback.issuer != *issuer {
            return Err(refused(
                "broker",
                &rollback.issuer.to_string(),
                &issuer.to_string(),
            ));
        }
        let expires_at = rollback.expires_at;
        if now >= expires_at {
            return Err(Refused::Expired { expires_at, now }.into());
        }
        if expires_at - now > MAX_LIFETIME_SECONDS {
            return Err(Refused::LivesTooLong { expires_at, now }.into());
        }
        Ok(Self {
            rollback,
            digest: sha256(envelope),
        })
    }

    /// What the provider permitted.
    pub fn claims(&self) -> &Rollback {
        &self.rollback
    }

    /// SHA-256 of the envelope, by which a broker knows that it was used.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Checks that exactly this step is permitted: `content` is the policy's text or the grant's envelope.
    ///
    /// # Errors
    /// [`Refused::Rollback`] with the first part that differs.
    pub fn check_step(
        &self,
        target: &Target,
        from_version: u64,
        to_version: u64,
        content: &[u8],
    ) -> Result<(), ReleaseError> {
        let permitted = &self.rollback;
        if permitted.target != *target {
            return Err(refused(
                "target",
                &permitted.target.to_string(),
                &target.to_string(),
            ));
        }
        for (what, permitted, actual) in [
            ("from version", permitted.from_version, from_version),
            ("to version", permitted.to_version, to_version),
        ] {
            if permitted != actual {
                return Err(refused(what, &permitted.to_string(), &actual.to_string()));
            }
        }
        let actual = sha256(content);
        if permitted.permitted != actual {
            let (permitted, actual) = (hex::encode(permitted.permitted), hex::encode(actual));
            return Err(refused("SHA-256", &permitted, &actual));
        }
        Ok(())
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Policy => f.write_str("the policy"),
            Target::Model { path, name } => write!(f, "model {name:?} at {path}"),
        }
    }
}

/// The digest by which a rollback names a policy or grant.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

fn refused(what: &'static str, permitted: &str, actual: &str) -> ReleaseError {
    Refused::Rollback {
        what,
        permitted: permitted.into(),
        actual: actual.into(),
    }
    .into()
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Body {
    #[n(0)]
    format: u32,
    #[cbor(n(1), with = "minicbor::bytes")]
    issuer: [u8; 32],
    #[n(2)]
    kind: u32,
    #[n(3)]
    from_version: u64,
    #[n(4)]
    to_version: u64,
    #[cbor(n(5), with = "minicbor::bytes")]
    permitted: [u8; 32],
    #[n(6)]
    expires_at: u64,
    #[n(7)]
    path: Option<String>,
    #[n(8)]
    name: Option<String>,
}

impl Body {
    fn read(self) -> Result<Rollback, ReleaseError> {
        let target = match (self.kind, self.path, self.name) {
            (POLICY, None, None) => Target::Policy,
            (MODEL, Some(path), Some(name)) => Target::Model {
                path: path.parse()?,
                name,
            },
            (kind, ..) => {
                return Err(Malformed::Unsupported {
                    what: "rollback.kind",
                    found: kind.to_string(),
                    expected: "0 without path and name, or 1 with both",
                }
                .into());
            }
        };
        Ok(Rollback {
            issuer: VerifyingKey::from_bytes(self.issuer),
            target,
            from_version: self.from_version,
            to_version: self.to_version,
            permitted: self.permitted,
            expires_at: self.expires_at,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::encoding::encode;
    use crate::signed::Envelope;

    const VECTORS: &str = include_str!("../../../docs/vectors/key-release.json");
    const NOW: u64 = 1_780_000_000;
    const GRANT: &[u8] = b"the older grant";

    fn provider() -> SigningKey {
        SigningKey::from_seed(&[0x11; 32])
    }

    fn issuer() -> VerifyingKey {
        SigningKey::from_seed(&[0x44; 32]).verifying_key()
    }

    fn model() -> Target {
        Target::Model {
            path: "default/model/smollm2".parse().unwrap(),
            name: "smollm2".into(),
        }
    }

    fn rollback() -> Rollback {
        Rollback {
            issuer: issuer(),
            target: model(),
            from_version: 5,
            to_version: 3,
            permitted: sha256(GRANT),
            expires_at: NOW + 3600,
        }
    }

    fn verify(envelope: &[u8]) -> Result<VerifiedRollback, ReleaseError> {
        VerifiedRollback::verify(envelope, &provider().verifying_key(), &issuer(), NOW)
    }

    #[test]
    fn signs_the_vectors_byte_for_byte() {
        let vectors: Value = serde_json::from_str(VECTORS).unwrap();
        let envelope = rollback().sign(&provider()).unwrap();
        assert_eq!(hex::encode(envelope), vectors["rollback"]["model"]);
        let policy = Rollback {
            target: Target::Policy,
            ..rollback()
        };
        let envelope = policy.sign(&provider()).unwrap();
        assert_eq!(hex::encode(envelope), vectors["rollback"]["policy"]);
    }

    #[test]
    fn permits_exactly_one_step() {
        let envelope = rollback().sign(&provider()).unwrap();
        let verified = verify(&envelope).unwrap();
        assert_eq!(verified.claims(), &rollback());
        assert_eq!(verified.digest(), &sha256(&envelope));
        verified.check_step(&model(), 5, 3, GRANT).unwrap();

        let other_path = Target::Model {
            path: "default/model/other".parse().unwrap(),
            name: "smollm2".into(),
        };
        let other_name = Target::Model {
            path: "default/model/smollm2".parse().unwrap(),
            name: "smollm3".into(),
        };
        for (target, from, to, content, differs) in [
            (Target::Policy, 5, 3, GRANT, "target"),
            (other_path, 5, 3, GRANT, "target"),
            (other_name, 5, 3, GRANT, "target"),
            (model(), 6, 3, GRANT, "from version"),
            (model(), 4, 3, GRANT, "from version"),
            (model(), 5, 2, GRANT, "to version"),
            (model(), 5, 3, &b"another grant"[..], "SHA-256"),
        ] {
            match verified.check_step(&target, from, to, content) {
                Err(ReleaseError::Refused(Refused::Rollback { what, .. })) => {
                    assert_eq!(what, differs);
                }
                other => panic!("{target} {from} {to}: {other:?}"),
            }
        }
    }

    #[test]
    fn verifies_under_the_providers_key_and_for_one_broker_only() {
        let envelope = rollback().sign(&provider()).unwrap();
        let other = SigningKey::generate();
        let error = VerifiedRollback::verify(&envelope, &other.verifying_key(), &issuer(), NOW)
            .unwrap_err();
        assert_eq!(error, Unverified::Rollback.into());
        // Signed by somebody else who claims to be the provider.
        let mut forged: Envelope = minicbor::decode(&rollback().sign(&other).unwrap()).unwrap();
        forged.signer = *provider().verifying_key().as_bytes();
        let forged = encode(&forged, MAX_ROLLBACK_BYTES);
        assert_eq!(verify(&forged).unwrap_err(), Unverified::Rollback.into());
        // A signature of the provider's over the same bytes for another purpose.
        let mut other_domain: Envelope = minicbor::decode(&envelope).unwrap();
        other_domain.signature = provider().sign(crate::grant::DOMAIN, &other_domain.body).0;
        let other_domain = encode(&other_domain, MAX_ROLLBACK_BYTES);
        let error = verify(&other_domain).unwrap_err();
        assert_eq!(error, Unverified::Rollback.into());

        let provider = provider().verifying_key();
        let error = VerifiedRollback::verify(&envelope, &provider, &other.verifying_key(), NOW);
        assert!(matches!(
            error,
            Err(ReleaseError::Refused(Refused::Rollback {
                what: "broker",
                ..
            }))
        ));
    }

    #[test]
    fn lives_for_a_bounded_time() {
        let at = |expires_at| {
            let rollback = Rollback {
                expires_at,
                ..rollback()
            };
            verify(&rollback.sign(&provider()).unwrap()).map(|_| ())
        };
        at(NOW + 1).unwrap();
        at(NOW + MAX_LIFETIME_SECONDS).unwrap();
        let expires_at = NOW;
        assert_eq!(
            at(NOW),
            Err(Refused::Expired {
                expires_at,
                now: NOW
            }
            .into())
        );
        let expires_at = NOW + MAX_LIFETIME_SECONDS + 1;
        assert_eq!(
            at(expires_at),
            Err(Refused::LivesTooLong {
                expires_at,
                now: NOW
            }
            .into())
        );
    }

    #[test]
    fn a_step_that_is_not_back_is_not_signed() {
        for to_version in [5, 6] {
            let upward = Rollback {
                to_version,
                ..rollback()
            };
            assert!(upward.sign(&provider()).is_err());
        }
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_refused() {
        let envelope = rollback().sign(&provider()).unwrap();
        for index in 0..envelope.len() {
            for bit in 0..8 {
                let mut changed = envelope.clone();
                changed[index] ^= 1 << bit;
                verify(&changed).unwrap_err();
            }
            verify(&envelope[..index]).unwrap_err();
        }
        let trailing = [&envelope[..], &[0]].concat();
        assert_eq!(
            verify(&trailing).unwrap_err(),
            Malformed::NotDeterministic { what: "rollback" }.into()
        );
    }

    /// A provider's own signature does not make a body of another shape acceptable.
    #[test]
    fn refuses_signed_bodies_of_another_shape() {
        let body = || Body {
            format: FORMAT,
            issuer: *issuer().as_bytes(),
            kind: POLICY,
            from_version: 2,
            to_version: 1,
            permitted: [0; 32],
            expires_at: NOW + 1,
            path: None,
            name: None,
        };
        let refusal = |body: &Body| {
            let body = encode(body, MAX_ROLLBACK_BYTES).to_vec();
            let envelope = Envelope {
                signature: provider().sign(DOMAIN, &body).0,
                signer: *provider().verifying_key().as_bytes(),
                body,
            };
            verify(&encode(&envelope, MAX_ROLLBACK_BYTES)).map(|_| ())
        };
        refusal(&body()).unwrap();
        let path = || Some("default/model/smollm2".to_owned());
        for broken in [
            Body {
                format: 2,
                ..body()
            },
            Body { kind: 2, ..body() },
            Body {
                path: path(),
                ..body()
            },
            Body {
                kind: MODEL,
                path: path(),
                ..body()
            },
            Body {
                kind: MODEL,
                path: Some("../up".into()),
                name: Some("m".into()),
                ..body()
            },
            Body {
                to_version: 2,
                ..body()
            },
        ] {
            let error = refusal(&broken).unwrap_err();
            assert!(matches!(error, ReleaseError::Malformed(_)), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(verify(&bytes).is_err());
        }
    }
}
