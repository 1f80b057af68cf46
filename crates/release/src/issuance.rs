//! Messages by which an enclave obtains a deployment credential in a session that received a key.
//!
//! `POST /casemate/v1/challenge` with the session cookie → [`IssuanceChallenge`]; then
//! `POST /casemate/v1/credential` with the same cookie and a [`CredentialRequest`], whose evidence is
//! bound by `casemate_channel::keyset::report_data` (purpose *credential* with [`received::digest`], role *service*, no
//! channel binding) → [`CredentialResponse`].

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::{Evidence, UniqueValue};
use serde::{Deserialize, Serialize};

use crate::error::{Malformed, ReleaseError, bounded};
use crate::received::{self, Received};

/// Path of the challenge.
pub const CHALLENGE_PATH: &str = "/casemate/v1/challenge";
/// Path of the credential.
pub const CREDENTIAL_PATH: &str = "/casemate/v1/credential";
/// Most bytes of a [`CredentialRequest`].
pub const MAX_REQUEST_BYTES: usize = 1024 * 1024;
/// Most bytes of the broker's replies.
pub const MAX_RESPONSE_BYTES: usize = 16 * 1024;

/// A fresh nonce for the evidence; single use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssuanceChallenge {
    /// 32 bytes, standard base64.
    nonce: String,
    /// The broker forgets the nonce at this time, seconds since 1970.
    pub expires_at: u64,
}

impl IssuanceChallenge {
    /// A challenge over `nonce`.
    pub fn new(nonce: &[u8; 32], expires_at: u64) -> Self {
        Self {
            nonce: STANDARD.encode(nonce),
            expires_at,
        }
    }

    /// Parses the message.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`].
    pub fn parse(json: &[u8]) -> Result<Self, ReleaseError> {
        bounded("issuance challenge", json, MAX_RESPONSE_BYTES)?;
        let challenge: Self = serde_json::from_slice(json).map_err(|_| Malformed::Json {
            what: "issuance challenge",
        })?;
        bytes32("issuance challenge.nonce", &challenge.nonce)?;
        Ok(challenge)
    }

    /// The nonce to bind the evidence to.
    pub fn nonce(&self) -> [u8; 32] {
        bytes32("nonce", &self.nonce).expect("checked when it was made")
    }
}

/// What an enclave asks to be signed.
#[derive(Debug, Clone)]
pub struct CredentialRequest {
    /// The nonce of the [`IssuanceChallenge`].
    pub nonce: [u8; 32],
    /// The service's name.
    pub service: String,
    /// What the enclave received in this session, the model's resource first.
    pub received: Vec<Received>,
    /// Encoded keyset.
    pub keyset: Vec<u8>,
    /// Evidence over the keyset, the nonce and what was received.
    pub evidence: Evidence,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireRequest {
    nonce: String,
    service: String,
    received: Vec<received::Wire>,
    keyset: String,
    evidence: UniqueValue,
}

impl CredentialRequest {
    /// The JSON text.
    ///
    /// # Errors
    /// [`ReleaseError::Misuse`] when the evidence does not serialise.
    pub fn to_json(&self) -> Result<Vec<u8>, ReleaseError> {
        let evidence = serde_json::to_value(&self.evidence)
            .map_err(|_| ReleaseError::Misuse("evidence does not serialise"))?;
        let wire = WireRequest {
            nonce: STANDARD.encode(self.nonce),
            service: self.service.clone(),
            received: self.received.iter().map(received::Wire::from).collect(),
            keyset: STANDARD.encode(&self.keyset),
            evidence: UniqueValue(evidence),
        };
        Ok(serde_json::to_vec(&wire).expect("a JSON value always serialises"))
    }

    /// Parses the message; the keyset's own encoding is judged by `casemate_channel`.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`].
    pub fn parse(json: &[u8]) -> Result<Self, ReleaseError> {
        bounded("credential request", json, MAX_REQUEST_BYTES)?;
        let wire: WireRequest = serde_json::from_slice(json).map_err(|_| Malformed::Json {
            what: "credential request",
        })?;
        crate::encoding::check_name("credential request.service", &wire.service)?;
        let evidence =
            Evidence::from_json(wire.evidence.0.to_string().as_bytes()).map_err(|_| {
                Malformed::Json {
                    what: "credential request.evidence",
                }
            })?;
        let keyset = STANDARD
            .decode(&wire.keyset)
            .map_err(|_| Malformed::Base64 {
                what: "credential request.keyset",
            })?;
        let nonce = bytes32("credential request.nonce", &wire.nonce)?;
        let received = received::parse(&wire.received)?;
        Ok(Self {
            nonce,
            service: wire.service,
            received,
            keyset,
            evidence,
        })
    }
}

/// The signed credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialResponse {
    /// The envelope of [`crate::credential`], standard base64.
    credential: String,
    /// End of validity, seconds since 1970.
    pub expires_at: u64,
}

impl CredentialResponse {
    /// A reply with the envelope.
    pub fn new(envelope: &[u8], expires_at: u64) -> Self {
        Self {
            credential: STANDARD.encode(envelope),
            expires_at,
        }
    }

    /// Parses the message and returns the envelope, which is still to be verified.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`].
    pub fn parse(json: &[u8]) -> Result<Vec<u8>, ReleaseError> {
        bounded("credential response", json, MAX_RESPONSE_BYTES)?;
        let response: Self = serde_json::from_slice(json).map_err(|_| Malformed::Json {
            what: "credential response",
        })?;
        let envelope = STANDARD
            .decode(&response.credential)
            .map_err(|_| Malformed::Base64 {
                what: "credential response.credential",
            })?;
        Ok(envelope)
    }
}

pub(crate) fn bytes32(what: &'static str, text: &str) -> Result<[u8; 32], Malformed> {
    let bytes = STANDARD
        .decode(text)
        .map_err(|_| Malformed::Base64 { what })?;
    let found = bytes.len();
    bytes.try_into().map_err(|_| Malformed::Length {
        what,
        found,
        expected: 32,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn request() -> CredentialRequest {
        let evidence = json!({ "tee": "tdx", "quote": "AQID" }).to_string();
        CredentialRequest {
            nonce: [9; 32],
            service: "smollm2".into(),
            received: vec![Received {
                path: "default/model/smollm2".parse().unwrap(),
                sha256: [7; 32],
            }],
            keyset: vec![1, 2, 3],
            evidence: Evidence::from_json(evidence.as_bytes()).unwrap(),
        }
    }

    #[test]
    fn requests_round_trip() {
        let parsed = CredentialRequest::parse(&request().to_json().unwrap()).unwrap();
        assert_eq!(parsed.nonce, [9; 32]);
        assert_eq!(parsed.service, "smollm2");
        assert_eq!(parsed.keyset, [1, 2, 3]);
        assert_eq!(parsed.received, request().received);
        assert_eq!(parsed.evidence.digest(), request().evidence.digest());
    }

    #[test]
    fn refuses_requests_by_the_name_of_what_is_wrong() {
        let good: Value = serde_json::from_slice(&request().to_json().unwrap()).unwrap();
        let refusal = |name: &str, value: Value| {
            let mut message = good.clone();
            message[name] = value;
            CredentialRequest::parse(message.to_string().as_bytes()).unwrap_err()
        };
        assert_eq!(
            refusal("nonce", json!("AAAA")),
            Malformed::Length {
                what: "credential request.nonce",
                found: 3,
                expected: 32
            }
            .into()
        );
        assert_eq!(
            refusal("keyset", json!("?")),
            Malformed::Base64 {
                what: "credential request.keyset"
            }
            .into()
        );
        assert_eq!(
            refusal("service", json!("two words")),
            Malformed::Text {
                what: "credential request.service"
            }
            .into()
        );
        assert_eq!(
            refusal("evidence", json!({ "tee": "tdx" })),
            Malformed::Json {
                what: "credential request.evidence"
            }
            .into()
        );
        let received = refusal("received", json!([]));
        assert!(received.to_string().contains("1 to 65"), "{received}");
        assert_eq!(
            refusal(
                "received",
                json!([{ "path": "a/b/c", "sha256": "AAAA", "more": 1 }])
            ),
            Malformed::Json {
                what: "credential request"
            }
            .into()
        );
        assert_eq!(
            refusal("more", json!(1)),
            Malformed::Json {
                what: "credential request"
            }
            .into()
        );
        let long = vec![b' '; MAX_REQUEST_BYTES + 1];
        assert!(matches!(
            CredentialRequest::parse(&long),
            Err(ReleaseError::Malformed(Malformed::TooLarge { .. }))
        ));
    }

    #[test]
    fn refuses_repeated_members_at_every_depth() {
        let text = String::from_utf8(request().to_json().unwrap()).unwrap();
        for (member, repeated) in [
            (r#""service":"#, r#""service":"smollm2","service":"#),
            (r#""tee":"#, r#""tee":"sgx","tee":"#),
            (r#""evidence":"#, r#""evidence":{},"evidence":"#),
        ] {
            let changed = text.replacen(member, repeated, 1);
            assert_ne!(changed, text);
            let what = "credential request";
            let refused = CredentialRequest::parse(changed.as_bytes()).unwrap_err();
            assert_eq!(refused, Malformed::Json { what }.into(), "{repeated}");
        }
    }

    #[test]
    fn every_single_byte_corruption_is_refused_or_another_request() {
        let message = request().to_json().unwrap();
        for at in 0..message.len() {
            for mask in [0x01, 0x20, 0x80] {
                let mut changed = message.clone();
                changed[at] ^= mask;
                if let Ok(parsed) = CredentialRequest::parse(&changed) {
                    assert_ne!(parsed.to_json().unwrap(), message, "byte {at} ^ {mask:#x}");
                }
            }
        }
    }

    #[test]
    fn replies_round_trip() {
        let json = serde_json::to_vec(&IssuanceChallenge::new(&[8; 32], 99)).unwrap();
        let challenge = IssuanceChallenge::parse(&json).unwrap();
        assert_eq!((challenge.nonce(), challenge.expires_at), ([8; 32], 99));
        let json = serde_json::to_vec(&CredentialResponse::new(b"envelope", 99)).unwrap();
        assert_eq!(CredentialResponse::parse(&json).unwrap(), b"envelope");
        assert!(IssuanceChallenge::parse(br#"{"nonce":"AAAA","expires_at":1}"#).is_err());
    }
}
