//! Messages of the RCAR protocol (Request, Challenge, Attestation, Response) of the Confidential
//! Containers key broker, version 0.4.0, and the hash that ties a quote to them.
//!
//! Only the shapes and their limits live here: [`crate::client`] runs the guest's half of the protocol,
//! `casemate-broker` the other. What is covered of the protocol is listed in `docs/key-release.md`.

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::{Class, Denial, Evidence, ReportData, TeeKind, UniqueValue};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Malformed, ReleaseError, bounded, shown};
use crate::jwe::Jwk;

/// Protocol version; both sides require exactly this one.
pub const VERSION: &str = "0.4.0";
/// Name of the session cookie.
pub const SESSION_COOKIE: &str = "kbs-session-id";
/// Path of the first message.
pub const AUTH_PATH: &str = "/kbs/v0/auth";
/// Path of the evidence.
pub const ATTEST_PATH: &str = "/kbs/v0/attest";
/// Prefix of resources; `<repository>/<type>/<tag>` follows.
pub const RESOURCE_PATH: &str = "/kbs/v0/resource";
/// Most bytes of a [`Request`].
pub const MAX_REQUEST_BYTES: usize = 8 * 1024;
/// Most bytes of a [`Challenge`] or an [`AttestResponse`].
pub const MAX_RESPONSE_BYTES: usize = 64 * 1024;
/// Most bytes of an [`Attestation`].
pub const MAX_ATTESTATION_BYTES: usize = 1024 * 1024;
/// Bytes of a nonce as made by a broker.
pub const NONCE_BYTES: usize = 32;

const MAX_NONCE_CHARS: usize = 256;
const SUPPORTED_HASHES: &str = "supported-hash-algorithms";
const SELECTED_HASH: &str = "selected-hash-algorithm";

/// Opens the exchange: `POST /kbs/v0/auth`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`VERSION`].
    pub version: String,
    /// `tdx` or `sgx`.
    pub tee: String,
    /// `""`, or an object with `supported-hash-algorithms` and `tee-metadata`.
    #[serde(rename = "extra-params")]
    pub extra_params: UniqueValue,
}

impl Request {
    /// The request of a guest that knows the three hash algorithms.
    pub fn new(tee: TeeKind) -> Self {
        let hashes = [
            HashAlgorithm::Sha256,
            HashAlgorithm::Sha384,
            HashAlgorithm::Sha512,
        ];
        Self {
            version: VERSION.into(),
            tee: tee_name(tee).into(),
            extra_params: UniqueValue(json!({ SUPPORTED_HASHES: hashes })),
        }
    }

    /// Parses the message and checks version, TEE and parameters.
    ///
    /// # Errors
    /// [`Malformed`] naming what is not accepted; an `attestation-policy-selector` is, because one
    /// policy is in force here and a client that asks for another must not get a token under it.
    pub fn parse(json: &[u8]) -> Result<(Self, TeeKind), ReleaseError> {
        bounded("request", json, MAX_REQUEST_BYTES)?;
        let request: Request = from_json("request", json)?;
        if request.version != VERSION {
            let found = shown(&request.version);
            return Err(Malformed::Unsupported {
                what: "request.version",
                found,
                expected: VERSION,
            }
            .into());
        }
        let tee = parse_tee(&request.tee)?;
        let params = match &request.extra_params.0 {
            Value::String(text) if text.is_empty() => return Ok((request, tee)),
            Value::Null => return Ok((request, tee)),
            Value::Object(params) => params,
            _ => {
                return Err(Malformed::Json {
                    what: "request.extra-params",
                }
                .into());
            }
        };
        for (name, value) in params {
            match name.as_str() {
                SUPPORTED_HASHES => check_hashes(value)?,
                "tee-metadata" => check_tee_metadata(value, &request.tee)?,
                _ => {
                    return Err(Malformed::Unsupported {
                        what: "request.extra-params",
                        found: shown(name),
                        expected: "supported-hash-algorithms or tee-metadata",
                    }
                    .into());
                }
            }
        }
        Ok((request, tee))
    }
}

/// The broker's reply to a [`Request`], together with the session cookie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Challenge {
    /// Freshness value, to be repeated in the runtime data: base64 of 32 bytes from this broker,
    /// any text of at most 256 characters from another.
    pub nonce: String,
    /// `""`, or an object with `selected-hash-algorithm`.
    #[serde(rename = "extra-params")]
    pub extra_params: UniqueValue,
}

impl Challenge {
    /// A challenge over `nonce` that selects SHA-384.
    pub fn new(nonce: &[u8; NONCE_BYTES]) -> Self {
        Self {
            nonce: STANDARD.encode(nonce),
            extra_params: UniqueValue(json!({ SELECTED_HASH: HashAlgorithm::Sha384 })),
        }
    }

    /// Parses the message and finds the hash algorithm (SHA-384 when none is selected).
    ///
    /// # Errors
    /// [`Malformed`] naming what is not accepted.
    pub fn parse(json: &[u8]) -> Result<(Self, HashAlgorithm), ReleaseError> {
        bounded("challenge", json, MAX_RESPONSE_BYTES)?;
        let challenge: Challenge = from_json("challenge", json)?;
        check_nonce(&challenge.nonce)?;
        let algorithm = match challenge.extra_params.0.get(SELECTED_HASH) {
            None => HashAlgorithm::Sha384,
            Some(Value::String(name)) => HashAlgorithm::parse(name)?,
            Some(_) => {
                return Err(Malformed::Json {
                    what: "challenge.extra-params",
                }
                .into());
            }
        };
        Ok((challenge, algorithm))
    }
}

/// Hash algorithms of the report data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HashAlgorithm {
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-384, 48 bytes; the protocol's default and the only one this broker selects.
    Sha384,
    /// SHA-512, 64 bytes.
    Sha512,
}

impl HashAlgorithm {
    fn parse(name: &str) -> Result<Self, Malformed> {
        match name.to_ascii_lowercase().as_str() {
            "sha256" => Ok(Self::Sha256),
            "sha384" => Ok(Self::Sha384),
            "sha512" => Ok(Self::Sha512),
            _ => Err(Malformed::Unsupported {
                what: "selected-hash-algorithm",
                found: shown(name),
                expected: "sha256, sha384 or sha512",
            }),
        }
    }

    fn digest(self, message: &[u8]) -> digest::Digest {
        let algorithm = match self {
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        };
        digest::digest(algorithm, message)
    }
}

/// What the quote is bound to: the broker's nonce and the guest's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeData {
    /// The nonce of the [`Challenge`].
    pub nonce: String,
    /// The key to which resources are encrypted.
    #[serde(rename = "tee-pubkey")]
    pub tee_pubkey: Jwk,
}

impl RuntimeData {
    /// The canonical JSON (RFC 8785) that is hashed into the report data:
    /// `{"additional-evidence":…,"nonce":…,"tee-pubkey":{"alg":…,"crv":…,"kty":…,"x":…,"y":…}}`.
    pub fn canonical(&self, additional_evidence: &str) -> Vec<u8> {
        // Members in lexical order and nothing but strings: then serde_json writes RFC 8785.
        #[derive(Serialize)]
        struct Canonical<'a> {
            #[serde(rename = "additional-evidence")]
            additional_evidence: &'a str,
            nonce: &'a str,
            #[serde(rename = "tee-pubkey")]
            tee_pubkey: &'a Jwk,
        }
        let canonical = Canonical {
            additional_evidence,
            nonce: &self.nonce,
            tee_pubkey: &self.tee_pubkey,
        };
        serde_json::to_vec(&canonical).expect("a structure of strings always serialises")
    }

    /// Report data of the key-release quote: the hash of [`RuntimeData::canonical`], zeros behind it.
    ///
    /// Both sides call this one function.
    pub fn report_data(&self, algorithm: HashAlgorithm, additional_evidence: &str) -> ReportData {
        let digest = algorithm.digest(&self.canonical(additional_evidence));
        let mut data = [0u8; 64];
        data[..digest.as_ref().len()].copy_from_slice(digest.as_ref());
        ReportData::new(data)
    }
}

/// The evidence: `POST /kbs/v0/attest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attestation {
    /// Configuration measured into the guest by other means; not used here.
    #[serde(rename = "init-data", default, skip_serializing_if = "Option::is_none")]
    pub init_data: Option<Value>,
    /// What the quote is bound to.
    #[serde(rename = "runtime-data")]
    pub runtime_data: RuntimeData,
    /// The quote.
    #[serde(rename = "tee-evidence")]
    pub tee_evidence: TeeEvidence,
}

/// Evidence of the CPU and, in the general protocol, of further devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeeEvidence {
    /// Evidence of the CPU.
    pub primary_evidence: PrimaryEvidence,
    /// JSON text of evidence of further devices; must say that there are none.
    #[serde(default)]
    pub additional_evidence: String,
}

/// A TDX or SGX quote as the Confidential Containers attesters send it, plus its collateral.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrimaryEvidence {
    /// Event log in base64; measurements are compared register by register, so it is not read here.
    #[serde(default)]
    pub cc_eventlog: Option<String>,
    /// Event log of the attestation agent; not read here either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aa_eventlog: Option<String>,
    /// The quote, standard base64.
    pub quote: String,
    /// Intel's collateral for the quote in the form of [`Evidence`]'s JSON. An extension: other
    /// brokers fetch collateral themselves and ignore this member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collateral: Option<UniqueValue>,
}

impl Attestation {
    /// The message of a guest with one CPU quote.
    ///
    /// # Errors
    /// [`ReleaseError::Misuse`] when the evidence does not serialise as an object.
    pub fn new(runtime_data: RuntimeData, evidence: &Evidence) -> Result<Self, ReleaseError> {
        let value = serde_json::to_value(evidence)
            .map_err(|_| ReleaseError::Misuse("evidence does not serialise"))?;
        let collateral = match value.get("collateral") {
            None | Some(Value::Null) => None,
            Some(collateral) => Some(UniqueValue(collateral.clone())),
        };
        Ok(Self {
            init_data: None,
            runtime_data,
            tee_evidence: TeeEvidence {
                primary_evidence: PrimaryEvidence {
                    cc_eventlog: None,
                    aa_eventlog: None,
                    quote: STANDARD.encode(&evidence.quote),
                    collateral,
                },
                additional_evidence: String::new(),
            },
        })
    }

    /// Parses the message and the evidence inside, of the TEE kind named in the [`Request`].
    ///
    /// # Errors
    /// [`Malformed`] naming what is not accepted: init data and evidence of further devices are,
    /// since nothing here would check them.
    pub fn parse(json: &[u8], tee: TeeKind) -> Result<(Self, Evidence), ReleaseError> {
        bounded("attestation", json, MAX_ATTESTATION_BYTES)?;
        let attestation: Attestation = from_json("attestation", json)?;
        if attestation.init_data.is_some() {
            return Err(Malformed::Unsupported {
                what: "attestation.init-data",
                found: "present".into(),
                expected: "absent (the policy compares mr_config_id itself)",
            }
            .into());
        }
        check_nonce(&attestation.runtime_data.nonce)?;
        let additional = &attestation.tee_evidence.additional_evidence;
        if !matches!(additional.as_str(), "" | "{}") {
            return Err(Malformed::Unsupported {
                what: "tee-evidence.additional_evidence",
                found: shown(additional),
                expected: "no further devices",
            }
            .into());
        }
        let primary = &attestation.tee_evidence.primary_evidence;
        let mut evidence = json!({ "tee": tee_name(tee), "quote": primary.quote });
        if let Some(collateral) = &primary.collateral {
            evidence["collateral"] = collateral.0.clone();
        }
        let evidence =
            Evidence::from_json(evidence.to_string().as_bytes()).map_err(|_| Malformed::Json {
                what: "tee-evidence.primary_evidence",
            })?;
        Ok((attestation, evidence))
    }
}

/// The broker's reply to an accepted [`Attestation`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttestResponse {
    /// Attestation results token (JWT).
    pub token: String,
}

impl AttestResponse {
    /// Parses the message.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(json: &[u8]) -> Result<Self, ReleaseError> {
        bounded("attest response", json, MAX_RESPONSE_BYTES)?;
        Ok(from_json("attest response", json)?)
    }
}

/// The body of every error response. `type` and `detail` are the protocol's; `denial` is an extension
/// that says what to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorInformation {
    /// A stable name of the kind of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// One sentence.
    pub detail: String,
    /// Present when evidence or a policy was the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denial: Option<Box<DenialInformation>>,
}

/// A [`Denial`] as a client of the broker reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenialInformation {
    /// `malformed`, `not_genuine` or `refused`.
    pub class: String,
    /// The claim that failed.
    pub claim: String,
    /// What was found.
    pub found: String,
    /// What would have been accepted.
    pub expected: String,
    /// What to do.
    pub remedy: String,
}

impl From<&Denial> for DenialInformation {
    fn from(denial: &Denial) -> Self {
        let class = match denial.class {
            Class::Malformed => "malformed",
            Class::NotGenuine => "not_genuine",
            Class::Refused => "refused",
        };
        Self {
            class: class.into(),
            claim: denial.claim.into(),
            found: denial.found.clone(),
            expected: denial.expected.clone(),
            remedy: denial.remedy.clone(),
        }
    }
}

/// The name of a resource: `<repository>/<type>/<tag>`, each 1 to 64 letters, digits, `.`, `_` or `-`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourcePath(String);

impl ResourcePath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last part.
    pub fn tag(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }
}

impl std::fmt::Display for ResourcePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for ResourcePath {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let part_is_valid = |part: &str| {
            (1..=64).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                && part != "."
                && part != ".."
        };
        if text.split('/').count() != 3 || !text.split('/').all(part_is_valid) {
            return Err(Malformed::Unsupported {
                what: "resource path",
                found: shown(text),
                expected: "repository/type/tag, each 1 to 64 letters, digits, '.', '_' or '-', and not . or ..",
            });
        }
        Ok(Self(text.into()))
    }
}

/// Finds the session in a `Set-Cookie` header's value.
pub fn session_of_set_cookie(header: &str) -> Option<&str> {
    let (name, value) = header.split(';').next()?.trim().split_once('=')?;
    (name == SESSION_COOKIE && is_session(value)).then_some(value)
}

/// Finds the session in a `Cookie` header's value; none when it is given twice with different values.
pub fn session_of_cookie(header: &str) -> Option<&str> {
    let mut sessions = header
        .split(';')
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(name, _)| *name == SESSION_COOKIE)
        .map(|(_, value)| value);
    let first = sessions.next()?;
    (sessions.all(|other| other == first) && is_session(first)).then_some(first)
}

/// The protocol's name of a TEE kind.
pub fn tee_name(tee: TeeKind) -> &'static str {
    match tee {
        TeeKind::Tdx => "tdx",
        TeeKind::Sgx => "sgx",
    }
}

fn parse_tee(name: &str) -> Result<TeeKind, Malformed> {
    match name {
        "tdx" => Ok(TeeKind::Tdx),
        "sgx" => Ok(TeeKind::Sgx),
        _ => Err(Malformed::Unsupported {
            what: "request.tee",
            found: shown(name),
            expected: "tdx or sgx",
        }),
    }
}

fn check_hashes(value: &Value) -> Result<(), Malformed> {
    let names = value.as_array().ok_or(Malformed::Json {
        what: SUPPORTED_HASHES,
    })?;
    let sha384 = |name: &Value| {
        name.as_str()
            .is_some_and(|n| n.eq_ignore_ascii_case("sha384"))
    };
    if !names.iter().any(sha384) {
        return Err(Malformed::Unsupported {
            what: SUPPORTED_HASHES,
            found: shown(&value.to_string()),
            expected: "a list with sha384",
        });
    }
    Ok(())
}

fn check_tee_metadata(value: &Value, tee: &str) -> Result<(), Malformed> {
    let primary = value
        .get("primary_tee")
        .and_then(|primary| primary.get("tee"));
    let none = Vec::new();
    let additional = value
        .get("additional_tees")
        .map_or(Some(&none), Value::as_array);
    if primary.and_then(Value::as_str) != Some(tee) || additional != Some(&none) {
        return Err(Malformed::Unsupported {
            what: "request.extra-params.tee-metadata",
            found: shown(&value.to_string()),
            expected: "the request's tee and no additional tees",
        });
    }
    Ok(())
}

fn check_nonce(nonce: &str) -> Result<(), Malformed> {
    let printable = nonce.bytes().all(|b| b.is_ascii_graphic());
    if nonce.is_empty() || nonce.len() > MAX_NONCE_CHARS || !printable {
        return Err(Malformed::Text { what: "nonce" });
    }
    Ok(())
}

fn is_session(value: &str) -> bool {
    (1..=128).contains(&value.len())
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

fn from_json<T: DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, Malformed> {
    serde_json::from_slice(json).map_err(|_| Malformed::Json { what })
}

#[cfg(test)]
mod tests;
