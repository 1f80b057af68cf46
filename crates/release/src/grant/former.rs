//! Key grants as they were before they said who may use the model:
//!
//! ```text
//! body = { 0: 1, 1: model digest bstr32, 2: model name tstr, 3: minimum version uint, 4: data key bstr32, ? 5: [+ api key] }
//! ```
//! Whoever was not asked for a key was let in, so a list that was forgotten opened the model.

use casemate_container::ModelDigest;
use casemate_container::signing::VerifyingKey;
use minicbor::{Decode, Encode};
use zeroize::Zeroize;

use super::{GrantSummary, KIND};
use crate::api_key;
use crate::encoding::check_model_name;
use crate::error::ReleaseError;

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
    api_keys: Option<Vec<api_key::Entry>>,
}

impl Drop for Body {
    fn drop(&mut self) {
        self.data_key.zeroize();
    }
}

/// What a grant of this form says that `provider` signed.
pub(super) fn verify(
    envelope: &[u8],
    provider: &VerifyingKey,
) -> Result<GrantSummary, ReleaseError> {
    let body: Body = KIND.verify(envelope, provider)?;
    check_model_name("grant.model_name", &body.model_name)?;
    let keys = body.api_keys.as_deref();
    let access = api_key::from_wire(u32::from(keys.is_some()), keys)?;
    Ok(GrantSummary {
        provider: *provider,
        model_digest: ModelDigest(body.model_digest),
        model_name: body.model_name.clone(),
        minimum_version: body.minimum_version,
        access,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Malformed, Unverified};
    use crate::grant::{VerifiedGrant, inspect, inspect_former};
    use casemate_container::signing::SigningKey;

    /// Vectors of that time: the provider's seed is 32 × 11 (hex), as today.
    const OPEN: &str = include_str!("former/open.hex");
    const WITH_API_KEYS: &str = include_str!("former/with_api_keys.hex");

    fn envelopes() -> [Vec<u8>; 2] {
        [OPEN, WITH_API_KEYS].map(|text| hex::decode(text.trim()).unwrap())
    }

    fn provider() -> VerifyingKey {
        SigningKey::from_seed(&[0x11; 32]).verifying_key()
    }

    #[test]
    fn a_grant_of_the_former_form_is_accepted_nowhere_and_called_so() {
        for envelope in envelopes() {
            let refused = VerifiedGrant::verify(&envelope, &provider()).err().unwrap();
            assert_eq!(refused, Malformed::FormerGrant.into());
            assert_eq!(inspect(&envelope), Err(Malformed::FormerGrant.into()));
            for part in ["casemate grant --api-keys", "--open"] {
                assert!(refused.to_string().contains(part), "{refused}");
            }
            // Whose signature does not hold is not called anything else.
            let stranger = SigningKey::generate().verifying_key();
            let error = VerifiedGrant::verify(&envelope, &stranger).err();
            assert_eq!(error, Some(Unverified::Grant.into()));
            let mut changed = envelope;
            changed[20] ^= 1;
            assert_eq!(inspect(&changed), Err(Unverified::Grant.into()));
            assert_eq!(inspect_former(&changed), Err(Unverified::Grant.into()));
        }
    }

    #[test]
    fn what_a_grant_of_the_former_form_said_can_be_read() {
        let [open, keyed] = envelopes().map(|envelope| inspect_former(&envelope).unwrap());
        assert_eq!(open.provider, provider());
        assert_eq!(open.model_digest, ModelDigest([0x22; 32]));
        assert_eq!((&*open.model_name, open.minimum_version), ("smollm2", 3));
        assert!(open.access.is_open());
        let names = keyed.access.api_keys().unwrap().as_slice().iter();
        assert_eq!(
            names.map(|key| &*key.name).collect::<Vec<_>>(),
            ["alice", "bob"]
        );
    }

    #[test]
    fn a_grant_of_todays_form_is_none_of_the_former() {
        let vectors = include_str!("../../../../docs/vectors/key-release.json");
        let vectors: serde_json::Value = serde_json::from_str(vectors).unwrap();
        for name in ["envelope", "envelope_with_api_keys"] {
            let envelope = hex::decode(vectors["grant"][name].as_str().unwrap()).unwrap();
            assert!(inspect(&envelope).is_ok());
            let what = "grant.body";
            assert_eq!(
                inspect_former(&envelope),
                Err(Malformed::Cbor { what }.into())
            );
        }
    }
}
