//! The guest's half of RCAR, without input or output: the caller carries the messages.
//!
//! ```text
//! Exchange::new ── request() ──► POST /kbs/v0/auth ──► challenge(reply, Set-Cookie)
//!   Challenged ── report_data() ► quote ► attestation(evidence) ──► POST /kbs/v0/attest ──► attested(reply)
//!     Attested ── GET /kbs/v0/resource/… ──► open(reply) or grant(reply, provider)
//! ```
//! Each step consumes the one before, so a key is used for one exchange and its private half is gone
//! with [`Attested`].

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use casemate_attest::{Evidence, ReportData, TeeKind};
use casemate_container::signing::VerifyingKey;
use zeroize::Zeroizing;

use crate::error::{Malformed, ReleaseError};
use crate::grant::VerifiedGrant;
use crate::jwe::{Jwe, RecipientKey};
use crate::random::Random;
use crate::rcar::{
    AttestResponse, Attestation, Challenge, HashAlgorithm, Request, RuntimeData, SESSION_COOKIE,
    session_of_set_cookie,
};

/// Before the first message: the TEE's kind and a fresh key.
pub struct Exchange {
    tee: TeeKind,
    key: RecipientKey,
}

/// After the challenge: a quote over [`Challenged::report_data`] is due.
pub struct Challenged {
    tee: TeeKind,
    key: RecipientKey,
    runtime_data: RuntimeData,
    algorithm: HashAlgorithm,
    session: String,
}

/// After the broker accepted the evidence: resources can be fetched and opened.
pub struct Attested {
    key: RecipientKey,
    session: String,
    token: String,
}

impl Exchange {
    /// Makes the ephemeral P-256 key to which the broker will encrypt.
    ///
    /// # Errors
    /// [`ReleaseError::Crypto`].
    pub fn new(tee: TeeKind, random: &dyn Random) -> Result<Self, ReleaseError> {
        Ok(Self {
            tee,
            key: RecipientKey::generate(random)?,
        })
    }

    /// Body of `POST /kbs/v0/auth`.
    pub fn request(&self) -> Vec<u8> {
        serde_json::to_vec(&Request::new(self.tee)).expect("a request always serialises")
    }

    /// Takes the challenge and the values of all `Set-Cookie` headers that came with it.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`], also when no session cookie was set.
    pub fn challenge<'a>(
        self,
        body: &[u8],
        set_cookies: impl IntoIterator<Item = &'a str>,
    ) -> Result<Challenged, ReleaseError> {
        let (challenge, algorithm) = Challenge::parse(body)?;
        let session = set_cookies
            .into_iter()
            .find_map(session_of_set_cookie)
            .ok_or(Malformed::Text {
                what: "set-cookie kbs-session-id",
            })?
            .to_owned();
        let runtime_data = RuntimeData {
            nonce: challenge.nonce,
            tee_pubkey: self.key.public().to_jwk(),
        };
        Ok(Challenged {
            tee: self.tee,
            key: self.key,
            runtime_data,
            algorithm,
            session,
        })
    }
}

impl Challenged {
    /// What the quote must be bound to.
    pub fn report_data(&self) -> ReportData {
        self.runtime_data.report_data(self.algorithm, "")
    }

    /// Value of the `Cookie` header for `POST /kbs/v0/attest`.
    pub fn cookie(&self) -> String {
        cookie(&self.session)
    }

    /// Body of `POST /kbs/v0/attest`.
    ///
    /// # Errors
    /// [`ReleaseError::Misuse`] for evidence of another kind than the request named.
    pub fn attestation(&self, evidence: &Evidence) -> Result<Vec<u8>, ReleaseError> {
        if evidence.tee != self.tee {
            return Err(ReleaseError::Misuse(
                "evidence is of another kind than the request",
            ));
        }
        let attestation = Attestation::new(self.runtime_data.clone(), evidence)?;
        Ok(serde_json::to_vec(&attestation).expect("an attestation always serialises"))
    }

    /// Takes the broker's reply to the attestation.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`].
    pub fn attested(self, body: &[u8]) -> Result<Attested, ReleaseError> {
        let token = AttestResponse::parse(body)?.token;
        Ok(Attested {
            key: self.key,
            session: self.session,
            token,
        })
    }
}

impl Attested {
    /// Value of the `Cookie` header for the requests that follow.
    pub fn cookie(&self) -> String {
        cookie(&self.session)
    }

    /// The attestation results token, for relying parties that want one.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The policy version that the token names, for the keyset; none behind a broker that is not Casemate's.
    ///
    /// Not verified: the broker compares it when it signs the credential.
    pub fn policy_version(&self) -> Option<u64> {
        let claims = URL_SAFE_NO_PAD.decode(self.token.split('.').nth(1)?).ok()?;
        let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
        claims.pointer("/casemate/policy-version")?.as_u64()
    }

    /// Decrypts the reply to a resource request.
    ///
    /// # Errors
    /// As [`Jwe::from_json`] and [`Jwe::decrypt`].
    pub fn open(&self, body: &[u8]) -> Result<Zeroizing<Vec<u8>>, ReleaseError> {
        Jwe::from_json(body)?.decrypt(&self.key)
    }

    /// Decrypts the reply and verifies the key grant inside under the provider's key, which must come
    /// from measured configuration.
    ///
    /// # Errors
    /// As [`Attested::open`] and [`VerifiedGrant::verify`].
    pub fn grant(
        &self,
        body: &[u8],
        provider: &VerifyingKey,
    ) -> Result<VerifiedGrant, ReleaseError> {
        VerifiedGrant::verify(&self.open(body)?, provider)
    }
}

fn cookie(session: &str) -> String {
    format!("{SESSION_COOKIE}={session}")
}

#[cfg(test)]
mod tests {
    use casemate_container::signing::SigningKey;
    use casemate_container::{DataKey, ModelDigest};
    use serde_json::json;

    use super::*;
    use crate::api_key::Access;
    use crate::error::Unverified;
    use crate::grant::KeyGrant;
    use crate::jwe::PublicKey;
    use crate::random::SystemRandom;

    fn evidence(tee: &str) -> Evidence {
        Evidence::from_json(
            json!({ "tee": tee, "quote": "AQID" })
                .to_string()
                .as_bytes(),
        )
        .unwrap()
    }

    fn challenged() -> Challenged {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom).unwrap();
        Request::parse(&exchange.request()).unwrap();
        let challenge = serde_json::to_vec(&Challenge::new(&[5; 32])).unwrap();
        exchange
            .challenge(&challenge, ["other=1", "kbs-session-id=s1; Path=/"])
            .unwrap()
    }

    /// The broker's half, reduced to its messages.
    #[test]
    fn a_grant_passes_from_broker_to_guest() {
        let challenged = challenged();
        assert_eq!(challenged.cookie(), "kbs-session-id=s1");
        let body = challenged.attestation(&evidence("tdx")).unwrap();
        let (message, _) = Attestation::parse(&body, TeeKind::Tdx).unwrap();
        let expected = message.runtime_data.report_data(HashAlgorithm::Sha384, "");
        assert_eq!(challenged.report_data().as_bytes(), expected.as_bytes());

        let attested = challenged.attested(br#"{"token":"a.b.c"}"#).unwrap();
        assert_eq!(
            (attested.token(), attested.cookie().as_str()),
            ("a.b.c", "kbs-session-id=s1")
        );
        let provider = SigningKey::generate();
        let envelope = KeyGrant {
            model_digest: ModelDigest([1; 32]),
            model_name: "m".into(),
            minimum_version: 1,
            data_key: DataKey::from_bytes(&[2; 32]),
            access: Access::Open,
        }
        .sign(&provider)
        .unwrap();
        let recipient = PublicKey::from_jwk(&message.runtime_data.tee_pubkey).unwrap();
        let jwe = Jwe::encrypt(&envelope, &recipient, &SystemRandom)
            .unwrap()
            .to_json();
        let grant = attested.grant(&jwe, &provider.verifying_key()).unwrap();
        assert_eq!(grant.data_key().expose(), &[2; 32]);

        // Anyone can encrypt to this guest; only the provider can grant.
        let other = SigningKey::generate().verifying_key();
        assert_eq!(
            attested.grant(&jwe, &other).err(),
            Some(Unverified::Grant.into())
        );
    }

    #[test]
    fn finds_the_policy_version_in_the_token() {
        let version = |claims: &str| {
            let token = format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims));
            let reply = json!({ "token": token }).to_string();
            challenged()
                .attested(reply.as_bytes())
                .unwrap()
                .policy_version()
        };
        assert_eq!(version(r#"{"casemate":{"policy-version":7}}"#), Some(7));
        assert_eq!(version(r#"{"iss":"another broker"}"#), None);
        assert_eq!(version("not JSON"), None);
        assert_eq!(
            challenged()
                .attested(br#"{"token":""}"#)
                .unwrap()
                .policy_version(),
            None
        );
    }

    #[test]
    fn each_exchange_has_a_key_of_its_own() {
        let a = challenged().report_data();
        let b = challenged().report_data();
        assert_ne!(a.as_bytes(), b.as_bytes());
    }

    #[test]
    fn honours_the_hash_that_the_broker_selects() {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom).unwrap();
        let challenge = br#"{"nonce":"n","extra-params":{"selected-hash-algorithm":"sha256"}}"#;
        let challenged = exchange.challenge(challenge, ["kbs-session-id=s"]).unwrap();
        let data = *challenged.report_data().as_bytes();
        assert_ne!(data[..32], [0; 32]);
        assert_eq!(data[32..], [0; 32]);
    }

    #[test]
    fn refuses_a_challenge_without_a_session_and_evidence_of_another_kind() {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom).unwrap();
        let challenge = serde_json::to_vec(&Challenge::new(&[5; 32])).unwrap();
        assert_eq!(
            exchange.challenge(&challenge, ["a=b"]).err(),
            Some(
                Malformed::Text {
                    what: "set-cookie kbs-session-id"
                }
                .into()
            )
        );
        assert!(matches!(
            challenged().attestation(&evidence("sgx")),
            Err(ReleaseError::Misuse(_))
        ));
    }
}
