//! What a TEE hands out: a quote and, optionally, the collateral to judge it with. Reading it from JSON under size
//! limits; nothing here is verified.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::collateral::Collateral;
use crate::denial::Denial;
use crate::quote::{Quote, QuoteError};
use crate::text::base64_bytes;

/// Largest quote that is looked at. Real ones are about 5 KB; guests hand them out in zero-padded buffers of 8 or
/// 16 KiB.
pub const MAX_QUOTE: usize = 32 * 1024;

/// Largest evidence file or message that is looked at.
pub const MAX_EVIDENCE_JSON: usize = 1024 * 1024;

const DIGEST_DOMAIN: &[u8] = b"casemate evidence v1\0";

/// The kinds of TEE this room can appraise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TeeKind {
    /// Intel TDX: a whole virtual machine.
    Tdx,
    /// Intel SGX: an enclave in a process.
    Sgx,
}

/// Evidence as a TEE hands it out. Nothing about it is verified until [`crate::appraise`] says so.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// The kind of TEE the quote says it is from.
    pub tee: TeeKind,
    /// The quote's bytes.
    #[serde(with = "base64_bytes")]
    pub quote: Vec<u8>,
    /// Intel's statements about the platform. Evidence without them is never accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collateral: Option<Collateral>,
}

/// Evidence that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// It is larger than the limit; it was not looked at.
    #[error("{what} is {len} bytes; the limit is {limit}")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The largest length accepted.
        limit: usize,
    },
    /// It is not the JSON that the format asks for.
    #[error("not an evidence document: {0}")]
    Json(#[source] serde_json::Error),
}

impl Evidence {
    /// Reads evidence from JSON:
    /// `{"tee": "tdx", "quote": "<base64>", "collateral": {…}}`, unknown fields refused.
    ///
    /// # Errors
    /// [`EvidenceError`] when it is too large or not such a document.
    pub fn from_json(json: &[u8]) -> Result<Evidence, EvidenceError> {
        check_len("the evidence document", json.len(), MAX_EVIDENCE_JSON)?;
        let evidence: Evidence = serde_json::from_slice(json).map_err(EvidenceError::Json)?;
        evidence.check_limits()?;
        Ok(evidence)
    }

    /// The same document as [`Evidence::from_json`] reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("strings and byte strings always have a JSON form")
    }

    /// Refuses parts beyond the size limits. [`crate::appraise`] calls it first.
    ///
    /// # Errors
    /// [`EvidenceError::TooLarge`] with the part and its limit.
    pub fn check_limits(&self) -> Result<(), EvidenceError> {
        check_len("the quote", self.quote.len(), MAX_QUOTE)?;
        match &self.collateral {
            Some(collateral) => collateral.check_limits(),
            None => Ok(()),
        }
    }

    /// The quote's structure, **unverified**: for a TEE looking at its own quote.
    ///
    /// # Errors
    /// [`QuoteError`] where the bytes are not a quote.
    pub fn unverified_quote(&self) -> Result<Quote, QuoteError> {
        Quote::parse(&self.quote)
    }

    /// What identifies this evidence in credentials, logs and receipts: SHA-256 over a domain, the kind of TEE and
    /// the quote without its padding. Collateral is not part of it: two verifiers may judge one quote with
    /// different collateral. Bytes that are no quote are taken whole.
    pub fn digest(&self) -> [u8; 32] {
        let end = Quote::parse(&self.quote).map_or(self.quote.len(), |quote| quote.len());
        let mut hash = Sha256::new();
        hash.update(DIGEST_DOMAIN);
        hash.update(self.tee.name());
        hash.update([0]);
        hash.update(&self.quote[..end]);
        hash.finalize().into()
    }
}

impl fmt::Debug for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evidence")
            .field("tee", &self.tee)
            .field("quote", &format_args!("{} bytes", self.quote.len()))
            .field("collateral", &self.collateral.is_some())
            .finish()
    }
}

pub(crate) fn check_len(what: &'static str, len: usize, limit: usize) -> Result<(), EvidenceError> {
    if len > limit {
        return Err(EvidenceError::TooLarge { what, len, limit });
    }
    Ok(())
}

impl From<EvidenceError> for Denial {
    fn from(error: EvidenceError) -> Denial {
        match error {
            EvidenceError::TooLarge { what, len, limit } => Denial::malformed(
                "evidence.size",
                format!("{what} of {len} bytes"),
                format!("at most {limit} bytes"),
                "ask whoever produced this evidence for a well-formed quote and collateral",
            ),
            EvidenceError::Json(error) => Denial::malformed(
                "evidence.document",
                error.to_string(),
                "a JSON object with tee, quote and collateral",
                "check that the file holds evidence and arrived whole",
            ),
        }
    }
}

impl TeeKind {
    /// The kind's name as policies and evidence write it.
    pub const fn name(self) -> &'static str {
        match self {
            TeeKind::Tdx => "tdx",
            TeeKind::Sgx => "sgx",
        }
    }
}

impl fmt::Display for TeeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TeeKind::Tdx => "Intel TDX",
            TeeKind::Sgx => "Intel SGX",
        })
    }
}

impl FromStr for TeeKind {
    type Err = ();

    fn from_str(text: &str) -> Result<TeeKind, ()> {
        match text {
            "tdx" => Ok(TeeKind::Tdx),
            "sgx" => Ok(TeeKind::Sgx),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let evidence = Evidence {
            tee: TeeKind::Tdx,
            quote: vec![1, 2, 3],
            collateral: None,
        };
        assert_eq!(evidence.to_json(), r#"{"tee":"tdx","quote":"AQID"}"#);
        assert_eq!(
            Evidence::from_json(evidence.to_json().as_bytes()).unwrap(),
            evidence
        );
    }

    #[test]
    fn refuses_unknown_fields_kinds_and_encodings() {
        for bad in [
            r#"{"tee":"tdx","quote":"AQID","extra":1}"#,
            r#"{"tee":"snp","quote":"AQID"}"#,
            r#"{"tee":"tdx","quote":"AQI"}"#,
            r#"{"tee":"tdx","tee":"sgx","quote":"AQID"}"#,
            r#"{"tee":"tdx","quote":"AQID","collateral":{}}"#,
            r#"{"tee":"tdx","quote":"AQID"} "trailing""#,
            "[",
        ] {
            assert!(
                matches!(
                    Evidence::from_json(bad.as_bytes()),
                    Err(EvidenceError::Json(_))
                ),
                "{bad}"
            );
        }
    }

    #[test]
    fn refuses_too_much_before_reading_it() {
        let huge = vec![b' '; MAX_EVIDENCE_JSON + 1];
        assert!(matches!(
            Evidence::from_json(&huge),
            Err(EvidenceError::TooLarge {
                limit: MAX_EVIDENCE_JSON,
                ..
            })
        ));
        let evidence = Evidence {
            tee: TeeKind::Tdx,
            quote: vec![0; MAX_QUOTE + 1],
            collateral: None,
        };
        assert!(matches!(
            Evidence::from_json(evidence.to_json().as_bytes()),
            Err(EvidenceError::TooLarge {
                limit: MAX_QUOTE,
                ..
            })
        ));
    }

    #[test]
    fn the_digest_separates_kinds_and_quotes() {
        let digest = |tee, quote: &[u8]| {
            Evidence {
                tee,
                quote: quote.to_vec(),
                collateral: None,
            }
            .digest()
        };
        let base = digest(TeeKind::Tdx, b"quote");
        assert_ne!(base, digest(TeeKind::Sgx, b"quote"));
        assert_ne!(base, digest(TeeKind::Tdx, b"quotf"));
    }
}
