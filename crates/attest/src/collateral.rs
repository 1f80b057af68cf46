//! Intel's statements about a platform (TCB info, QE identity, revocation lists) as they travel with a quote: their
//! JSON form, size limits, structure and validity in time. Their signatures are checked with the quote's.

use dcap_qvl::QuoteCollateralV3;
use der::{Decode as _, Encode as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x509_cert::Certificate;
use x509_cert::crl::CertificateList;

use crate::denial::Denial;
use crate::evidence::{EvidenceError, TeeKind, check_len};
use crate::text::hex_bytes;
use crate::unix_time::UnixTime;

const MAX_CHAIN: usize = 32 * 1024;
const MAX_CERTIFICATES: usize = 5;
const MAX_CRL: usize = 128 * 1024;
const MAX_TCB_INFO: usize = 256 * 1024;
const MAX_QE_IDENTITY: usize = 64 * 1024;

/// Intel's statements about a platform, in the form in which its provisioning service hands them out: version 3
/// collateral, with byte strings in hexadecimal in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collateral {
    /// PEM chain of the issuer of `pck_crl`.
    pub pck_crl_issuer_chain: String,
    /// Revocation list of the root, DER.
    #[serde(with = "hex_bytes")]
    pub root_ca_crl: Vec<u8>,
    /// Revocation list of the platform certificates' issuer, DER.
    #[serde(with = "hex_bytes")]
    pub pck_crl: Vec<u8>,
    /// PEM chain of the key that signed `tcb_info`.
    pub tcb_info_issuer_chain: String,
    /// TCB info: JSON, byte for byte as it was signed.
    pub tcb_info: String,
    /// ECDSA P-256 signature over `tcb_info`: r ‖ s.
    #[serde(with = "hex_bytes")]
    pub tcb_info_signature: Vec<u8>,
    /// PEM chain of the key that signed `qe_identity`.
    pub qe_identity_issuer_chain: String,
    /// Identity of the quoting enclave: JSON, byte for byte as it was signed.
    pub qe_identity: String,
    /// ECDSA P-256 signature over `qe_identity`: r ‖ s.
    #[serde(with = "hex_bytes")]
    pub qe_identity_signature: Vec<u8>,
    /// PEM chain of the platform's certificate, for quotes that carry only its encrypted identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pck_certificate_chain: Option<String>,
}

/// The head that TCB info and QE identity have in common. Intel adds fields over time, so others are not refused;
/// the signature covers them.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    id: String,
    issue_date: String,
    next_update: String,
}

/// What the collateral says, read but not verified.
pub(crate) struct Statements {
    windows: Vec<Window>,
    chains: Vec<Chain>,
}

/// A chain as Intel orders it: its own certificates from the leaf up, then the root, which may be left out.
struct Chain {
    what: &'static str,
    /// How many certificates stand before the root.
    own: usize,
    certificates: Vec<Certified>,
}

/// One certificate of a chain.
pub(crate) struct Certified {
    pub(crate) der: Vec<u8>,
    spki_sha256: [u8; 32],
}

struct Window {
    what: &'static str,
    from: UnixTime,
    until: UnixTime,
}

impl Collateral {
    pub(crate) fn check_limits(&self) -> Result<(), EvidenceError> {
        let pck_chain = self.pck_certificate_chain.as_ref().map_or(0, String::len);
        for (what, len, limit) in [
            (
                "the PCK CRL's chain",
                self.pck_crl_issuer_chain.len(),
                MAX_CHAIN,
            ),
            ("the root CA's CRL", self.root_ca_crl.len(), MAX_CRL),
            ("the PCK CRL", self.pck_crl.len(), MAX_CRL),
            (
                "the TCB info's chain",
                self.tcb_info_issuer_chain.len(),
                MAX_CHAIN,
            ),
            ("the TCB info", self.tcb_info.len(), MAX_TCB_INFO),
            (
                "the TCB info's signature",
                self.tcb_info_signature.len(),
                64,
            ),
            (
                "the QE identity's chain",
                self.qe_identity_issuer_chain.len(),
                MAX_CHAIN,
            ),
            ("the QE identity", self.qe_identity.len(), MAX_QE_IDENTITY),
            (
                "the QE identity's signature",
                self.qe_identity_signature.len(),
                64,
            ),
            ("the PCK chain", pck_chain, MAX_CHAIN),
        ] {
            check_len(what, len, limit)?;
        }
        Ok(())
    }

    pub(crate) fn to_qvl(&self) -> QuoteCollateralV3 {
        QuoteCollateralV3 {
            pck_crl_issuer_chain: self.pck_crl_issuer_chain.clone(),
            root_ca_crl: self.root_ca_crl.clone(),
            pck_crl: self.pck_crl.clone(),
            tcb_info_issuer_chain: self.tcb_info_issuer_chain.clone(),
            tcb_info: self.tcb_info.clone(),
            tcb_info_signature: self.tcb_info_signature.clone(),
            qe_identity_issuer_chain: self.qe_identity_issuer_chain.clone(),
            qe_identity: self.qe_identity.clone(),
            qe_identity_signature: self.qe_identity_signature.clone(),
            pck_certificate_chain: self.pck_certificate_chain.clone(),
        }
    }

    /// The first revocation list that is missing. Without one, nobody can say that a key was not revoked.
    pub(crate) fn missing_crl(&self) -> Option<&'static str> {
        [
            ("the root CA's CRL", &self.root_ca_crl),
            ("the PCK CRL", &self.pck_crl),
        ]
        .into_iter()
        .find_map(|(what, crl)| crl.is_empty().then_some(what))
    }

    /// Reads dates and certificates of all parts, including the platform's chain where the quote carries it.
    pub(crate) fn read(
        &self,
        tee: TeeKind,
        quoted_pck_chain: Option<&[u8]>,
    ) -> Result<Statements, Denial> {
        let mut windows = Vec::new();
        let (tcb_id, qe_id) = match tee {
            TeeKind::Tdx => ("TDX", "TD_QE"),
            TeeKind::Sgx => ("SGX", "QE"),
        };
        windows.push(statement("the TCB info", &self.tcb_info, tcb_id)?);
        windows.push(statement("the QE identity", &self.qe_identity, qe_id)?);
        windows.push(crl_window("the root CA's CRL", &self.root_ca_crl)?);
        windows.push(crl_window("the PCK CRL", &self.pck_crl)?);

        let pck_chain = match &self.pck_certificate_chain {
            Some(chain) => Some(chain.as_bytes()),
            None => quoted_pck_chain,
        };
        let Some(pck_chain) = pck_chain else {
            return Err(Denial::not_genuine(
                "platform.certificate",
                "a quote that names its platform only in encrypted form",
                "the platform's certificate chain, in the quote or in the collateral",
                "have the collateral fetched with the platform's certificate chain",
            ));
        };
        let mut chains = Vec::new();
        for (what, pem, own) in [
            (
                "the TCB info's chain",
                self.tcb_info_issuer_chain.as_bytes(),
                1,
            ),
            (
                "the QE identity's chain",
                self.qe_identity_issuer_chain.as_bytes(),
                1,
            ),
            (
                "the PCK CRL's chain",
                self.pck_crl_issuer_chain.as_bytes(),
                1,
            ),
            ("the platform's chain", pck_chain, 2),
        ] {
            let certificates = certificates(what, pem, &mut windows)?;
            chains.push(Chain {
                what,
                own,
                certificates,
            });
        }
        Ok(Statements { windows, chains })
    }
}

impl Statements {
    /// Refuses anything that is not valid at `now`.
    pub(crate) fn check_validity(&self, now: UnixTime) -> Result<(), Denial> {
        for window in &self.windows {
            let remedy = if now < window.from {
                "check the clock, or use collateral that was valid at that time"
            } else if now >= window.until {
                "fetch fresh collateral from Intel's provisioning service"
            } else {
                continue;
            };
            return Err(Denial::not_genuine(
                "collateral.validity",
                format!(
                    "{} valid from {} until {}",
                    window.what, window.from, window.until
                ),
                format!("valid at {now}"),
                remedy,
            ));
        }
        Ok(())
    }

    /// When the first part ceases to be valid.
    pub(crate) fn valid_until(&self) -> UnixTime {
        let ends = self.windows.iter().map(|window| window.until);
        ends.min().unwrap_or(UnixTime::from_secs(0))
    }

    /// The certificate in the TCB info's chain whose key has this hash.
    pub(crate) fn find_root(&self, spki_sha256: &[u8; 32]) -> Option<&Certified> {
        let chain = self.chains.first()?;
        chain
            .certificates
            .iter()
            .find(|certificate| &certificate.spki_sha256 == spki_sha256)
    }

    /// A chain that ends at another certificate than one of these, and that certificate's hash. Where a chain leaves
    /// its root out, the signatures decide.
    ///
    /// No signature says that the root in a quote's chain is the one that counts, so it must be it to the byte, and
    /// nothing may come after a chain's own certificates but it.
    pub(crate) fn foreign_root(&self, roots: &[[u8; 32]]) -> Option<(&'static str, [u8; 32])> {
        self.chains.iter().find_map(|chain| {
            let rest = chain.certificates.iter().skip(chain.own);
            let mut hashes = rest.map(Certified::sha256);
            let foreign = hashes.find(|hash| !roots.contains(hash))?;
            Some((chain.what, foreign))
        })
    }
}

impl Certified {
    pub(crate) fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }
}

fn statement(what: &'static str, json: &str, id: &'static str) -> Result<Window, Denial> {
    let head: Head = serde_json::from_str(json).map_err(|error| unreadable(what, error))?;
    if head.id != id {
        return Err(Denial::not_genuine(
            "collateral.structure",
            format!("{what} for {:?}", head.id),
            format!("{what} for {id:?}"),
            "fetch the collateral for this quote's kind of TEE",
        ));
    }
    let date = |text: &str| text.parse().map_err(|error| unreadable(what, error));
    Ok(Window {
        what,
        from: date(&head.issue_date)?,
        until: date(&head.next_update)?,
    })
}

fn crl_window(what: &'static str, der: &[u8]) -> Result<Window, Denial> {
    let list = CertificateList::from_der(der).map_err(|error| unreadable(what, error))?;
    let Some(next_update) = list.tbs_cert_list.next_update else {
        return Err(unreadable(what, "it has no end of validity"));
    };
    Ok(Window {
        what,
        from: seconds(list.tbs_cert_list.this_update),
        until: seconds(next_update),
    })
}

/// Reads a chain. Only white space between its lines and zero bytes at its end may vary: no signature covers the text
/// of a chain, and two quotes that differ should not both be good.
fn certificates(
    what: &'static str,
    text: &[u8],
    windows: &mut Vec<Window>,
) -> Result<Vec<Certified>, Denial> {
    let blocks = pem::parse_many(text).map_err(|error| unreadable(what, error))?;
    if blocks.is_empty() || blocks.len() > MAX_CERTIFICATES {
        let count = blocks.len();
        let error = format!("{count} certificates, not 1 to {MAX_CERTIFICATES}");
        return Err(unreadable(what, error));
    }
    let canonical: String = blocks.iter().map(pem::encode).collect();
    let zeros = text.iter().rev().take_while(|&&byte| byte == 0).count();
    let visible = |text: &[u8]| -> Vec<u8> {
        let visible = text.iter().filter(|byte| !byte.is_ascii_whitespace());
        visible.copied().collect()
    };
    if visible(&text[..text.len() - zeros]) != visible(canonical.as_bytes()) {
        return Err(unreadable(what, "bytes that are no part of a certificate"));
    }
    let mut chain = Vec::with_capacity(blocks.len());
    for block in blocks {
        let der = block.into_contents();
        let certificate = Certificate::from_der(&der).map_err(|error| unreadable(what, error))?;
        let tbs = &certificate.tbs_certificate;
        windows.push(Window {
            what,
            from: seconds(tbs.validity.not_before),
            until: seconds(tbs.validity.not_after),
        });
        let spki = tbs.subject_public_key_info.to_der();
        let spki_sha256 = Sha256::digest(spki.map_err(|error| unreadable(what, error))?).into();
        chain.push(Certified { der, spki_sha256 });
    }
    Ok(chain)
}

fn seconds(time: x509_cert::time::Time) -> UnixTime {
    UnixTime::from_secs(time.to_unix_duration().as_secs())
}

fn unreadable(what: &'static str, error: impl std::fmt::Display) -> Denial {
    Denial::malformed(
        "collateral.structure",
        format!("{what}: {error}"),
        "collateral of version 3 as Intel's provisioning service hands it out",
        "fetch the collateral again",
    )
}
