//! A service as an honest enclave and broker would set it up under the fake TEE, every part open to meddling.

#![allow(dead_code, reason = "two test programs use it, each a part")]

use casemate_attest::measure::Measurement;
use casemate_attest::{Denial, Evidence, Policy, Transcript, UnixTime};
use casemate_channel::keyset::{ChannelBinding, Keyset, KeysetDigest, Purpose, Role, report_data};
use casemate_channel::ohttp::Keyring;
use casemate_channel::verify::{AttestationResponse, Challenge, VerifiedService, verify_service};
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::credential::Credential;
use casemate_testkit::fake_tee::FakeTee;
use casemate_testkit::policies::PolicyFile;
use casemate_testkit::statements;

pub(crate) const NOW: u64 = 1_795_000_000;
pub(crate) const MAXIMUM_AGE: u64 = 300;

/// The service.
pub(crate) struct Service {
    pub(crate) tee: FakeTee,
    pub(crate) measurement: Measurement,
    pub(crate) issuer: SigningKey,
    pub(crate) keyset: Keyset,
    pub(crate) credential: Credential,
    /// The adapters that the user's policy lists.
    pub(crate) adapters: Vec<[u8; 32]>,
    /// The issuer that the user's policy pins.
    pub(crate) pinned: VerifyingKey,
    /// Purpose that the quote is made for.
    pub(crate) purpose: Purpose,
    pub(crate) challenge: Challenge,
    /// What evidence is bound to.
    pub(crate) binding: ChannelBinding,
}

impl Service {
    pub(crate) fn new() -> Service {
        let issuer = SigningKey::from_seed(&[1; 32]);
        let keyring = Keyring::default();
        let config = keyring.generate(NOW + 3600).unwrap();
        Service {
            tee: FakeTee::ephemeral(NOW).unwrap(),
            measurement: Measurement {
                mr_td: [1; 48],
                mr_config_id: [2; 48],
                rtmr: [[3; 48]; 4],
            },
            adapters: Vec::new(),
            pinned: issuer.verifying_key(),
            issuer,
            keyset: statements::keyset(config.encoded, NOW),
            credential: Credential {
                expires_at: NOW + 1800,
                ..statements::credential(&KeysetDigest([0; 32]), NOW)
            },
            purpose: Purpose::Serving,
            challenge: Challenge::from_parts([9; 32], UnixTime::from_secs(NOW)),
            binding: ChannelBinding::Key,
        }
    }

    pub(crate) fn policy_text(&self) -> String {
        let file = PolicyFile {
            adapters: self.adapters.iter().map(hex::encode).collect(),
            version: 3,
            maximum_evidence_age: MAXIMUM_AGE,
            ..PolicyFile::new(self.tee.root_spki_sha256(), self.measurement)
        };
        let issuer = self.pinned.to_string();
        file.for_users((&hex::encode(statements::MODEL), 7), &issuer, "demo")
            .to_toml()
    }

    pub(crate) fn policy(&self) -> Policy {
        Policy::from_toml(&self.policy_text()).unwrap()
    }

    pub(crate) fn evidence(&self, keyset: &[u8], nonce: &[u8; 32]) -> Evidence {
        let digest = KeysetDigest::of(keyset);
        let data = report_data(self.purpose, Role::Service, &digest, nonce, &self.binding);
        self.tee.quote(&self.measurement, &data, NOW).unwrap()
    }

    /// What the service answers; a keyset digest of zeros in the credential stands for the real one.
    pub(crate) fn response(&self) -> AttestationResponse {
        let keyset = self.keyset.encode().unwrap();
        let mut credential = self.credential.clone();
        if credential.keyset_digest == [0; 32] {
            credential.keyset_digest = KeysetDigest::of(&keyset).0;
        }
        AttestationResponse {
            evidence: self.evidence(&keyset, self.challenge.nonce()),
            credential: credential.issue(&self.issuer).unwrap(),
            keyset,
        }
    }

    pub(crate) fn verify_at(&self, now: u64) -> (Transcript, Result<VerifiedService, Denial>) {
        verify_service(
            &self.response(),
            &self.challenge,
            &self.policy(),
            UnixTime::from_secs(now),
        )
    }
}
