//! Key grants: a model's data key, bound to the model's digest and a minimum version, signed by the
//! provider.
//!
//! ```text
//! body     = { 0: 1, 1: model digest bstr32, 2: model name tstr, 3: minimum version uint,
//!              4: data key bstr32, 5: access uint, ? 6: [+ api key] }
//! ```
//! A signed envelope (`signed`) of the domain [`DOMAIN`] carries it, and is secret: it travels inside a JWE and rests
//! in files of mode 0600. Anyone can encrypt to a TEE's public key, so an enclave accepts a grant only under the provider
//! key of its own measured configuration. Access says who may use the model ([`crate::api_key`]); it is never left out.
//! Once it was: such a grant is told from bytes that are none, and accepted nowhere ([`Malformed::FormerGrant`]).

mod former;

use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_container::{DataKey, ModelDigest};
use minicbor::{Decode, Encode};
use zeroize::{Zeroize, Zeroizing};

use crate::api_key::{self, Access, MAX_API_KEYS, MAX_ENTRY_BYTES};
use crate::encoding::check_model_name;
use crate::error::{Malformed, Refused, ReleaseError, Unverified};
use crate::rollback::sha256;
use crate::signed::{FORMAT, Kind};

/// Domain of the provider's signature.
pub const DOMAIN: &str = "casemate key grant v1";
/// Most bytes of an envelope.
pub const MAX_GRANT_BYTES: usize = 1024 + MAX_API_KEYS * MAX_ENTRY_BYTES;

const KIND: Kind = Kind {
    envelope: "grant",
    body: "grant.body",
    format: "grant.format",
    domain: DOMAIN,
    limit: MAX_GRANT_BYTES,
    unverified: Unverified::Grant,
};

/// What a provider grants.
pub struct KeyGrant {
    /// The model that the key opens.
    pub model_digest: ModelDigest,
    /// Its name in the manifest, for people.
    pub model_name: String,
    /// The lowest version that may be served under this grant.
    pub minimum_version: u64,
    /// The key of the sealed file.
    pub data_key: DataKey,
    /// Who may use the model.
    pub access: Access,
}

/// What a grant says apart from the key itself; for listings and policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantSummary {
    /// The provider whose signature verified.
    pub provider: VerifyingKey,
    /// The model that the key opens.
    pub model_digest: ModelDigest,
    /// Its name in the manifest.
    pub model_name: String,
    /// The lowest version that may be served.
    pub minimum_version: u64,
    /// Who may use the model.
    pub access: Access,
}

/// A grant whose signature by the expected provider verified.
pub struct VerifiedGrant {
    grant: KeyGrant,
    provider: VerifyingKey,
    envelope: [u8; 32],
}

impl KeyGrant {
    /// Signs the grant and returns the envelope.
    ///
    /// # Errors
    /// [`Malformed::Text`] when the model's name is not one that a manifest may have.
    pub fn sign(&self, provider: &SigningKey) -> Result<Zeroizing<Vec<u8>>, ReleaseError> {
        check_model_name("grant.model_name", &self.model_name)?;
        let (access, api_keys) = api_key::to_wire(&self.access);
        let body = Body {
            format: FORMAT,
            model_digest: *self.model_digest.as_bytes(),
            model_name: self.model_name.clone(),
            minimum_version: self.minimum_version,
            data_key: *self.data_key.expose(),
            access,
            api_keys,
        };
        Ok(KIND.sign(&body, provider))
    }
}

impl VerifiedGrant {
    /// Parses an envelope and verifies that `provider` signed it.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`] for anything but the one encoding of a grant, [`Malformed::FormerGrant`] for one that
    /// does not say who may use the model, [`Unverified::Grant`] for another signer or changed bytes.
    pub fn verify(envelope: &[u8], provider: &VerifyingKey) -> Result<Self, ReleaseError> {
        let body: Body = match KIND.verify(envelope, provider) {
            Err(_) if former::verify(envelope, provider).is_ok() => {
                return Err(Malformed::FormerGrant.into());
            }
            verified => verified?,
        };
        check_model_name("grant.model_name", &body.model_name)?;
        let grant = KeyGrant {
            model_digest: ModelDigest(body.model_digest),
            model_name: body.model_name.clone(),
            minimum_version: body.minimum_version,
            data_key: DataKey::from_bytes(&body.data_key),
            access: api_key::from_wire(body.access, body.api_keys.as_deref())?,
        };
        Ok(Self {
            grant,
            provider: *provider,
            envelope: sha256(envelope),
        })
    }

    /// The key of the sealed file.
    pub fn data_key(&self) -> &DataKey {
        &self.grant.data_key
    }

    /// The model that the key opens.
    pub fn model_digest(&self) -> &ModelDigest {
        &self.grant.model_digest
    }

    /// Its name in the manifest.
    pub fn model_name(&self) -> &str {
        &self.grant.model_name
    }

    /// The lowest version that may be served.
    pub fn minimum_version(&self) -> u64 {
        self.grant.minimum_version
    }

    /// Who may use the model.
    pub fn access(&self) -> &Access {
        &self.grant.access
    }

    /// SHA-256 of the envelope that was verified. It tells nothing of the data key in it, which is random.
    pub fn envelope_sha256(&self) -> &[u8; 32] {
        &self.envelope
    }

    /// The provider that signed.
    pub fn provider(&self) -> &VerifyingKey {
        &self.provider
    }

    /// Checks that an unlocked model is the one granted, and new enough.
    ///
    /// # Errors
    /// [`Refused::OtherModel`] or [`Refused::OldVersion`].
    pub fn check_model(&self, digest: &ModelDigest, version: u64) -> Result<(), ReleaseError> {
        if digest != self.model_digest() {
            return Err(Refused::OtherModel {
                expected: self.model_digest().to_string(),
                found: digest.to_string(),
            }
            .into());
        }
        if version < self.minimum_version() {
            let minimum = self.minimum_version();
            return Err(Refused::OldVersion {
                found: version,
                minimum,
            }
            .into());
        }
        Ok(())
    }
}

/// Reads what a grant says, after verifying the signature under the key that it names itself.
///
/// This shows that the file is whole, not whom it comes from: compare `provider` before relying on it.
///
/// # Errors
/// As [`VerifiedGrant::verify`].
pub fn inspect(envelope: &[u8]) -> Result<GrantSummary, ReleaseError> {
    let provider = KIND.claimed_signer(envelope)?;
    let verified = VerifiedGrant::verify(envelope, &provider)?;
    Ok(GrantSummary {
        provider,
        model_digest: *verified.model_digest(),
        model_name: verified.model_name().to_owned(),
        minimum_version: verified.minimum_version(),
        access: verified.grant.access,
    })
}

/// As [`inspect`], of a grant of the former form: what it says, and who may use the model as its time understood it, which
/// is anybody where it lists no API keys. For who keeps such grants and has to tell its owner. Nothing is released, and
/// nobody served, under one.
///
/// # Errors
/// As [`VerifiedGrant::verify`], for anything else, today's form too.
pub fn inspect_former(envelope: &[u8]) -> Result<GrantSummary, ReleaseError> {
    let provider = KIND.claimed_signer(envelope)?;
    former::verify(envelope, &provider)
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Body {
    #[n(0)]
    format: u32,
    #[cbor(n(1), with = "minicbor::bytes")]
    model_digest: [u8; 32],
    #[n(2)]
    model_name: String,
    #[n(3)]
    minimum_version: u64,
    #[cbor(n(4), with = "minicbor::bytes")]
    data_key: [u8; 32],
    #[n(5)]
    access: u32,
    #[n(6)]
    api_keys: Option<Vec<api_key::Entry>>,
}

impl Drop for Body {
    fn drop(&mut self) {
        self.data_key.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::api_key::{ApiKey, ApiKeys, Limits, MAX_NAME_BYTES};
    use crate::encoding::encode;
    use crate::signed::Envelope;

    const VECTORS: &str = include_str!("../../../docs/vectors/key-release.json");

    fn provider() -> SigningKey {
        SigningKey::from_seed(&[0x11; 32])
    }

    fn grant() -> KeyGrant {
        KeyGrant {
            model_digest: ModelDigest([0x22; 32]),
            model_name: "smollm2".into(),
            minimum_version: 3,
            data_key: DataKey::from_bytes(&[0x33; 32]),
            access: Access::Open,
        }
    }

    fn with_keys() -> KeyGrant {
        let limits = Limits {
            requests_per_minute: NonZeroU32::new(60),
            tokens_per_minute: NonZeroU32::new(100_000),
            concurrency: NonZeroU32::new(4),
            ..Limits::default()
        };
        let key = |name: &str, key: &[u8], limits| ApiKey {
            name: name.into(),
            hash: api_key::hash(key),
            limits,
        };
        let text = |byte: u8| format!("cm-{}", hex::encode([byte; 32]));
        let keys = vec![
            key("bob", text(0x66).as_bytes(), Limits::default()),
            key("alice", text(0x65).as_bytes(), limits),
        ];
        KeyGrant {
            access: Access::Keyed(ApiKeys::new(keys).unwrap()),
            ..grant()
        }
    }

    fn refusal(envelope: &[u8]) -> ReleaseError {
        match VerifiedGrant::verify(envelope, &provider().verifying_key()) {
            Ok(_) => panic!("the grant was accepted"),
            Err(error) => error,
        }
    }

    #[test]
    fn signs_the_vector_byte_for_byte() {
        let vectors: Value = serde_json::from_str(VECTORS).unwrap();
        let envelope = grant().sign(&provider()).unwrap();
        assert_eq!(hex::encode(&*envelope), vectors["grant"]["envelope"]);
        assert_eq!(
            provider().verifying_key().to_string(),
            vectors["grant"]["provider"]
        );
        let envelope = with_keys().sign(&provider()).unwrap();
        assert_eq!(
            hex::encode(&*envelope),
            vectors["grant"]["envelope_with_api_keys"]
        );
    }

    #[test]
    fn api_keys_are_signed_with_the_grant() {
        let envelope = with_keys().sign(&provider()).unwrap();
        let verified = VerifiedGrant::verify(&envelope, &provider().verifying_key()).unwrap();
        assert_eq!(verified.access(), &with_keys().access);
        assert_eq!(inspect(&envelope).unwrap().access, with_keys().access);

        // Whoever carries it can neither drop nor add one, nor open it to anybody.
        let mut other: Envelope = minicbor::decode(&envelope).unwrap();
        let mut body: Body = minicbor::decode(&other.body).unwrap();
        let one = body.api_keys.take().map(|mut keys| {
            keys.truncate(1);
            keys
        });
        for (access, keys) in [(1, one), (1, None), (0, None)] {
            body.access = access;
            body.api_keys = keys;
            other.body = encode(&body, MAX_GRANT_BYTES).to_vec();
            assert_eq!(
                refusal(&encode(&other, MAX_GRANT_BYTES)),
                Unverified::Grant.into()
            );
        }
    }

    #[test]
    fn the_largest_grant_fits() {
        let limits = Limits {
            requests_per_minute: Some(NonZeroU32::MAX),
            tokens_per_minute: Some(NonZeroU32::MAX),
            concurrency: Some(NonZeroU32::MAX),
            requests_per_day: Some(NonZeroU32::MAX),
            tokens_per_day: NonZeroU32::new(u32::MAX - 1),
        };
        let key = |index: usize| ApiKey {
            name: format!("{index:0>MAX_NAME_BYTES$}"),
            hash: api_key::hash(&index.to_be_bytes()),
            limits,
        };
        let grant = KeyGrant {
            model_name: "x".repeat(128),
            minimum_version: u64::MAX,
            access: Access::Keyed(ApiKeys::new((0..MAX_API_KEYS).map(key).collect()).unwrap()),
            ..grant()
        };
        let envelope = grant.sign(&provider()).unwrap();
        assert!(envelope.len() <= MAX_GRANT_BYTES);
        let verified = VerifiedGrant::verify(&envelope, &provider().verifying_key()).unwrap();
        assert_eq!(verified.access(), &grant.access);
    }

    #[test]
    fn verifies_under_the_providers_key_only() {
        let envelope = grant().sign(&provider()).unwrap();
        let verified = VerifiedGrant::verify(&envelope, &provider().verifying_key()).unwrap();
        assert_eq!(verified.data_key().expose(), &[0x33; 32]);
        assert_eq!(verified.envelope_sha256(), &sha256(&envelope));
        assert_eq!(verified.model_digest(), &ModelDigest([0x22; 32]));
        assert_eq!(
            (verified.model_name(), verified.minimum_version()),
            ("smollm2", 3)
        );

        let other = SigningKey::generate();
        let error = VerifiedGrant::verify(&envelope, &other.verifying_key()).err();
        assert_eq!(error, Some(Unverified::Grant.into()));
        // Signed by somebody else who claims to be the provider.
        let mut forged: Envelope = minicbor::decode(&grant().sign(&other).unwrap()).unwrap();
        forged.signer = *provider().verifying_key().as_bytes();
        assert_eq!(
            refusal(&encode(&forged, MAX_GRANT_BYTES)),
            Unverified::Grant.into()
        );
    }

    #[test]
    fn a_signature_for_another_purpose_is_no_grant() {
        let envelope = grant().sign(&provider()).unwrap();
        let mut other: Envelope = minicbor::decode(&envelope).unwrap();
        other.signature = provider().sign("casemate model manifest v1", &other.body).0;
        assert_eq!(
            refusal(&encode(&other, MAX_GRANT_BYTES)),
            Unverified::Grant.into()
        );
    }

    #[test]
    fn every_changed_bit_is_refused() {
        let envelope = grant().sign(&provider()).unwrap();
        for index in 0..envelope.len() {
            for bit in 0..8 {
                let mut changed = envelope.to_vec();
                changed[index] ^= 1 << bit;
                refusal(&changed);
            }
        }
    }

    #[test]
    fn refuses_other_encodings_of_the_same_grant() {
        let envelope = grant().sign(&provider()).unwrap();
        let not_deterministic = ReleaseError::from(Malformed::NotDeterministic { what: "grant" });
        let mut trailing = envelope.to_vec();
        trailing.push(0);
        assert_eq!(refusal(&trailing), not_deterministic);

        let mut unknown = envelope.to_vec();
        unknown[0] += 1;
        unknown.extend([0x03, 0x00]);
        assert_eq!(refusal(&unknown), not_deterministic);

        let mut long = vec![0xb8, 0x03];
        long.extend(&envelope[1..]);
        assert_eq!(refusal(&long), not_deterministic);

        let mut indefinite = vec![0xbf];
        indefinite.extend(&envelope[1..]);
        indefinite.push(0xff);
        assert_eq!(refusal(&indefinite), not_deterministic);

        for length in 0..envelope.len() {
            let truncated = refusal(&envelope[..length]);
            assert_eq!(
                truncated,
                Malformed::Cbor { what: "grant" }.into(),
                "{length} bytes"
            );
        }
        let oversize = vec![0; MAX_GRANT_BYTES + 1];
        assert!(matches!(
            refusal(&oversize),
            ReleaseError::Malformed(Malformed::TooLarge { what: "grant", .. })
        ));
    }

    /// A provider's own signature does not make a body of another shape acceptable.
    #[test]
    fn refuses_signed_bodies_of_another_format() {
        let sign = |body: Vec<u8>| {
            let envelope = Envelope {
                signature: provider().sign(DOMAIN, &body).0,
                signer: *provider().verifying_key().as_bytes(),
                body,
            };
            encode(&envelope, MAX_GRANT_BYTES)
        };
        let body = |format| Body {
            format,
            model_digest: [1; 32],
            model_name: "m".into(),
            minimum_version: 0,
            data_key: [2; 32],
            access: 0,
            api_keys: None,
        };
        let future = encode(&body(2), MAX_GRANT_BYTES).to_vec();
        assert!(matches!(
            refusal(&sign(future)),
            ReleaseError::Malformed(Malformed::Unsupported {
                what: "grant.format",
                ..
            })
        ));
        let mut trailing = encode(&body(1), MAX_GRANT_BYTES).to_vec();
        trailing.push(0);
        assert_eq!(
            refusal(&sign(trailing)),
            Malformed::NotDeterministic { what: "grant.body" }.into()
        );
        // Who may ask is said, never concluded from what is absent.
        let unsupported = |what, found: &str, expected| {
            let found = found.to_owned();
            ReleaseError::from(Malformed::Unsupported {
                what,
                found,
                expected,
            })
        };
        let disagree = "0 without a list of API keys, or 1 with one";
        for (access, api_keys, refused) in [
            (1, None, unsupported("grant.access", "1", disagree)),
            (
                0,
                Some(Vec::new()),
                unsupported("grant.access", "0", disagree),
            ),
            (2, None, unsupported("grant.access", "2", disagree)),
            (
                1,
                Some(Vec::new()),
                unsupported("number of API keys", "0", "1 to 256"),
            ),
        ] {
            let mut body = body(1);
            body.access = access;
            body.api_keys = api_keys;
            assert_eq!(
                refusal(&sign(encode(&body, MAX_GRANT_BYTES).to_vec())),
                refused
            );
        }
        // The format before this field existed.
        let mut silent = vec![0xa5];
        silent.extend(&encode(&body(1), MAX_GRANT_BYTES)[1..]);
        silent.truncate(silent.len() - 2);
        assert_eq!(refusal(&sign(silent)), Malformed::FormerGrant.into());
    }

    #[test]
    fn names_that_cannot_be_shown_are_not_signed() {
        for name in ["", "line\nbreak", "\u{9b}2J", &"x".repeat(129)] {
            let grant = KeyGrant {
                model_name: name.into(),
                ..grant()
            };
            assert_eq!(
                grant.sign(&provider()).err(),
                Some(
                    Malformed::Text {
                        what: "grant.model_name"
                    }
                    .into()
                )
            );
        }
    }

    #[test]
    fn checks_the_model_at_hand() {
        let envelope = grant().sign(&provider()).unwrap();
        let verified = VerifiedGrant::verify(&envelope, &provider().verifying_key()).unwrap();
        assert_eq!(verified.check_model(&ModelDigest([0x22; 32]), 3), Ok(()));
        assert_eq!(
            verified.check_model(&ModelDigest([0x22; 32]), 2),
            Err(Refused::OldVersion {
                found: 2,
                minimum: 3
            }
            .into())
        );
        assert!(matches!(
            verified.check_model(&ModelDigest([0x23; 32]), 3),
            Err(ReleaseError::Refused(Refused::OtherModel { .. }))
        ));
    }

    #[test]
    fn inspection_shows_everything_but_the_key() {
        let envelope = grant().sign(&provider()).unwrap();
        let summary = inspect(&envelope).unwrap();
        assert_eq!(summary.provider, provider().verifying_key());
        assert_eq!(summary.model_digest, ModelDigest([0x22; 32]));
        let mut damaged = envelope.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(inspect(&damaged), Err(Unverified::Grant.into()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_grant_round_trips(
            digest: [u8; 32], key: [u8; 32], version: u64, name in "\\PC{1,32}",
        ) {
            let grant = KeyGrant {
                model_digest: ModelDigest(digest),
                model_name: name.clone(),
                minimum_version: version,
                data_key: DataKey::from_bytes(&key),
                access: Access::Open,
            };
            let envelope = grant.sign(&provider()).unwrap();
            let verified = VerifiedGrant::verify(&envelope, &provider().verifying_key()).unwrap();
            prop_assert_eq!(verified.model_digest(), &ModelDigest(digest));
            prop_assert_eq!(verified.data_key().expose(), &key);
            prop_assert_eq!((verified.model_name(), verified.minimum_version()), (&*name, version));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(VerifiedGrant::verify(&bytes, &provider().verifying_key()).is_err());
            prop_assert!(inspect(&bytes).is_err());
        }
    }
}
