//! What a user keeps: a receipt with its salts, and the attestation that was verified before its request was sent. JSON
//! in one form only, and the smaller document in which an enclave hands its receipts out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::UnixTime;
use casemate_release::Malformed;
use serde::{Deserialize, Serialize};

use super::{MAX_RECEIPT_BYTES, ReceiptError, RequestId, Salt, SignedReceipt};
use crate::keyset::ChannelBinding;
use crate::verify::{AttestationResponse, Challenge, MAX_RESPONSE, WireResponse};

/// The largest bundle that is looked at.
pub const MAX_BUNDLE: usize = MAX_RESPONSE + 64 * 1024;
/// The largest answer to a request for a receipt that is looked at.
pub const MAX_FETCHED: usize = 2 * MAX_RECEIPT_BYTES;

const FORMAT: &str = "casemate receipt bundle v1";

/// A receipt with its salts, as an enclave hands it out inside the channel.
pub struct FetchedReceipt {
    /// The envelope.
    pub receipt: Vec<u8>,
    /// Salt of the request's hash.
    pub request_salt: Salt,
    /// Salt of the answer's hash.
    pub answer_salt: Salt,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct FetchedWire {
    receipt: String,
    request_salt: String,
    answer_salt: String,
}

impl FetchedReceipt {
    /// Reads `{"receipt": "<base64>", "request_salt": "<base64>", "answer_salt": "<base64>"}`, and refuses the receipt
    /// of another request than `id`.
    ///
    /// # Errors
    /// [`ReceiptError::Malformed`], [`ReceiptError::OtherId`].
    pub fn from_json(json: &[u8], id: &RequestId) -> Result<FetchedReceipt, ReceiptError> {
        let what = "answer with a receipt";
        bounded(what, json, MAX_FETCHED)?;
        let wire: FetchedWire =
            serde_json::from_slice(json).map_err(|_| Malformed::Json { what })?;
        let fetched = FetchedReceipt::from_wire(&wire)?;
        if SignedReceipt::parse(&fetched.receipt)?.unverified().id != *id {
            return Err(ReceiptError::OtherId);
        }
        Ok(fetched)
    }

    /// The document that [`FetchedReceipt::from_json`] reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.to_wire()).expect("strings always have a JSON form")
    }

    fn from_wire(wire: &FetchedWire) -> Result<FetchedReceipt, Malformed> {
        let salt = |what, text: &str| {
            let bytes = base64(what, text, 32)?;
            let bytes: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| Malformed::Length {
                what,
                found: bytes.len(),
                expected: 32,
            })?;
            Ok(Salt::from_bytes(bytes))
        };
        Ok(FetchedReceipt {
            receipt: base64("receipt", &wire.receipt, MAX_RECEIPT_BYTES)?,
            request_salt: salt("request_salt", &wire.request_salt)?,
            answer_salt: salt("answer_salt", &wire.answer_salt)?,
        })
    }

    fn to_wire(&self) -> FetchedWire {
        FetchedWire {
            receipt: STANDARD.encode(&self.receipt),
            request_salt: STANDARD.encode(self.request_salt.as_bytes()),
            answer_salt: STANDARD.encode(self.answer_salt.as_bytes()),
        }
    }
}

/// A service's answer to a challenge, and when it was judged, so that it can be judged again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedAttestation {
    /// What the service answered.
    pub response: AttestationResponse,
    /// The nonce, and when it was made.
    pub challenge: Challenge,
    /// The connection that the evidence is bound to, if there was one.
    pub binding: ChannelBinding,
    /// When the answer was judged, by the clock of the machine that did.
    pub verified_at: UnixTime,
}

/// All that an offline verification needs. Nothing of it is verified.
pub struct Bundle {
    /// The receipt and its salts.
    pub fetched: FetchedReceipt,
    /// The attestation of the receipt's keyset.
    pub attestation: SavedAttestation,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BundleIn {
    format: String,
    receipt: String,
    request_salt: String,
    answer_salt: String,
    attestation: WireResponse,
    nonce: String,
    #[serde(default, deserialize_with = "present")]
    tls_exporter: Option<String>,
    nonce_made_at: String,
    verified_at: String,
}

#[derive(Serialize)]
struct BundleOut<A> {
    format: &'static str,
    #[serde(flatten)]
    fetched: FetchedWire,
    attestation: A,
    nonce: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_exporter: Option<String>,
    nonce_made_at: UnixTime,
    verified_at: UnixTime,
}

impl Bundle {
    /// Reads the document that [`Bundle::to_json`] writes, and refuses other members and other encodings of the same
    /// values.
    ///
    /// # Errors
    /// [`ReceiptError::Malformed`].
    pub fn from_json(json: &[u8]) -> Result<Bundle, ReceiptError> {
        let what = "bundle";
        bounded(what, json, MAX_BUNDLE)?;
        let wire: BundleIn = serde_json::from_slice(json).map_err(|_| Malformed::Json { what })?;
        if wire.format != FORMAT {
            return Err(Malformed::Unsupported {
                what: "bundle.format",
                found: wire.format.chars().take(64).collect(),
                expected: FORMAT,
            }
            .into());
        }
        let fetched = FetchedReceipt::from_wire(&FetchedWire {
            receipt: wire.receipt,
            request_salt: wire.request_salt,
            answer_salt: wire.answer_salt,
        })?;
        let response =
            AttestationResponse::from_wire(wire.attestation).map_err(|_| Malformed::Json {
                what: "bundle.attestation",
            })?;
        let nonce = hex32("bundle.nonce", &wire.nonce)?;
        let binding = match &wire.tls_exporter {
            None => ChannelBinding::Key,
            Some(text) => ChannelBinding::TlsExporter(hex32("bundle.tls_exporter", text)?),
        };
        let issued_at = time("bundle.nonce_made_at", &wire.nonce_made_at)?;
        Ok(Bundle {
            fetched,
            attestation: SavedAttestation {
                response,
                challenge: Challenge::from_parts(nonce, issued_at),
                binding,
                verified_at: time("bundle.verified_at", &wire.verified_at)?,
            },
        })
    }

    /// The document that is kept.
    pub fn to_json(&self) -> String {
        let attestation = &self.attestation;
        let out = BundleOut {
            format: FORMAT,
            fetched: self.fetched.to_wire(),
            attestation: attestation.response.to_wire(),
            nonce: hex::encode(attestation.challenge.nonce()),
            tls_exporter: match attestation.binding {
                ChannelBinding::Key => None,
                ChannelBinding::TlsExporter(exporter) => Some(hex::encode(exporter)),
            },
            nonce_made_at: attestation.challenge.issued_at(),
            verified_at: attestation.verified_at,
        };
        serde_json::to_string(&out).expect("strings and maps of them always have a JSON form")
    }
}

fn bounded(what: &'static str, bytes: &[u8], limit: usize) -> Result<(), Malformed> {
    if bytes.len() > limit {
        return Err(Malformed::TooLarge {
            what,
            found: bytes.len(),
            limit,
        });
    }
    Ok(())
}

fn base64(what: &'static str, text: &str, limit: usize) -> Result<Vec<u8>, Malformed> {
    let bytes = STANDARD
        .decode(text)
        .map_err(|_| Malformed::Base64 { what })?;
    bounded(what, &bytes, limit)?;
    Ok(bytes)
}

/// 32 bytes in lower-case hexadecimal.
fn hex32(what: &'static str, text: &str) -> Result<[u8; 32], Malformed> {
    let mut bytes = [0; 32];
    let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) if lower => Ok(bytes),
        _ => Err(Malformed::Text { what }),
    }
}

/// A member that is there has a value: `null` is another encoding of its absence.
fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    String::deserialize(from).map(Some)
}

/// RFC 3339 in the one form in which times are written.
fn time(what: &'static str, text: &str) -> Result<UnixTime, Malformed> {
    text.parse()
        .ok()
        .filter(|time: &UnixTime| time.to_string() == text)
        .ok_or(Malformed::Text { what })
}
