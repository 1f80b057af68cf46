//! Attestation results tokens: what `/kbs/v0/attest` returns.
//!
//! A token is a JWT (RFC 7519) signed with EdDSA (RFC 8037). It tells relying parties what was appraised.
//! This broker itself never accepts one: policy is checked again at release, over the session's evidence.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use casemate_release::jwe::Jwk;
use serde_json::{Value, json};

/// Signs tokens; a key of its own, so that no signature over JSON can pass for one over a credential.
pub struct TokenKey(Ed25519KeyPair);

/// What a token says.
pub struct TokenClaims<'a> {
    /// The issuer's public key in hex.
    pub issuer: &'a str,
    /// Seconds since 1970.
    pub issued_at: u64,
    /// Seconds since 1970.
    pub expires_at: u64,
    /// The guest's key.
    pub tee_pubkey: &'a Jwk,
    /// `tdx` or `sgx`.
    pub tee: &'a str,
    /// `genuine` or `development`.
    pub verdict: &'a str,
    /// Name of the measurement that matched.
    pub measurement: &'a str,
    /// SHA-256 of the evidence.
    pub evidence: [u8; 32],
    /// Version of the policy.
    pub policy_version: u64,
}

impl TokenKey {
    /// Parses the key.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Option<Self> {
        Ed25519KeyPair::from_pkcs8(pkcs8).ok().map(Self)
    }

    /// The public key as a JWK.
    pub fn public_jwk(&self) -> Value {
        let x = URL_SAFE_NO_PAD.encode(self.0.public_key().as_ref());
        json!({ "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "x": x })
    }

    /// Signs a token.
    pub fn sign(&self, claims: &TokenClaims<'_>) -> String {
        let header = json!({ "typ": "JWT", "alg": "EdDSA", "jwk": self.public_jwk() });
        let body = json!({
            "iss": format!("casemate-broker:{}", claims.issuer),
            "iat": claims.issued_at,
            "nbf": claims.issued_at,
            "exp": claims.expires_at,
            "tee-pubkey": claims.tee_pubkey,
            "casemate": {
                "tee": claims.tee,
                "verdict": claims.verdict,
                "measurement": claims.measurement,
                "evidence-sha256": hex::encode(claims.evidence),
                "policy-version": claims.policy_version,
            },
        });
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&body));
        let signature = URL_SAFE_NO_PAD.encode(self.0.sign(signed.as_bytes()).as_ref());
        format!("{signed}.{signature}")
    }
}
