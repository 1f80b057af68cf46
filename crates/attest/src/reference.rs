//! Reference values: what a TEE must have been started from, as the policy's `[[measurement]]` entries state it, and
//! their comparison with a report. One entry must match as a whole.

use crate::evidence::TeeKind;
use crate::quote::{Report, SgxReport, TdReport};
use crate::transcript::Status;

/// One `[[measurement]]` entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Measurement {
    /// Of a trust domain.
    Td(Box<TdMeasurement>),
    /// Of an SGX enclave.
    Sgx(Box<SgxMeasurement>),
}

/// A value that must be stated: either what it must equal, or in so many words that it may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// Exactly this.
    Exactly([u8; 48]),
    /// Anything; the policy says so by a `dangerous_` name.
    Any,
}

/// Reference values of a trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TdMeasurement {
    /// The entry's name, shown in verdicts.
    pub name: String,
    /// Initial contents.
    pub mr_td: [u8; 48],
    /// Configuration given at launch.
    pub mr_config_id: Reference,
    /// Run-time registers.
    pub rtmr: [Reference; 4],
    /// The TDX module's measurement; without it, any module that Intel's TCB info accepts.
    pub mr_seam: Option<[u8; 48]>,
    /// Owner given at launch; without it, anything.
    pub mr_owner: Option<[u8; 48]>,
    /// Owner's configuration given at launch; without it, anything.
    pub mr_owner_config: Option<[u8; 48]>,
    /// All attributes; without it, only the rules that hold for every TD.
    pub td_attributes: Option<[u8; 8]>,
    /// All extended features; without it, only the rules that hold for every TD.
    pub xfam: Option<[u8; 8]>,
}

/// Reference values of an SGX enclave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SgxMeasurement {
    /// The entry's name, shown in verdicts.
    pub name: String,
    /// Which enclave.
    pub identity: SgxIdentity,
    /// Configuration given at launch; zeros where the policy does not say otherwise.
    pub config_id: [u8; 64],
    /// All attributes; without it, only the rules that hold for every enclave.
    pub attributes: Option<[u8; 16]>,
}

/// Which SGX enclave an entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SgxIdentity {
    /// Exactly these contents.
    Enclave([u8; 32]),
    /// Whatever this signer calls that product, from a security version on.
    Signer {
        /// Hash of the signer's key.
        mr_signer: [u8; 32],
        /// The product.
        isv_prod_id: u16,
        /// The lowest security version accepted.
        minimum_isv_svn: u16,
    },
}

/// How one field of an entry compares.
pub(crate) struct Field {
    pub(crate) claim: &'static str,
    pub(crate) status: Status,
    pub(crate) found: String,
    /// The expectation or, for a skipped field, the reason.
    pub(crate) expected: String,
}

const RTMR: [&str; 4] = [
    "measurement.rtmr0",
    "measurement.rtmr1",
    "measurement.rtmr2",
    "measurement.rtmr3",
];

impl Measurement {
    /// The entry's name.
    pub fn name(&self) -> &str {
        match self {
            Measurement::Td(entry) => &entry.name,
            Measurement::Sgx(entry) => &entry.name,
        }
    }

    /// The kind of TEE the entry is about.
    pub fn tee(&self) -> TeeKind {
        match self {
            Measurement::Td(_) => TeeKind::Tdx,
            Measurement::Sgx(_) => TeeKind::Sgx,
        }
    }

    /// Compares every field, or nothing where the entry is about another kind of TEE.
    pub(crate) fn compare(&self, report: &Report) -> Option<Vec<Field>> {
        match (self, report) {
            (Measurement::Td(entry), Report::Td(report)) => Some(entry.compare(report)),
            (Measurement::Sgx(entry), Report::Sgx(report)) => Some(entry.compare(report)),
            _ => None,
        }
    }
}

impl TdMeasurement {
    fn compare(&self, report: &TdReport) -> Vec<Field> {
        let mut fields = vec![exactly("measurement.mr_td", &report.mr_td, &self.mr_td)];
        fields.push(stated(
            "measurement.mr_config_id",
            &report.mr_config_id,
            &self.mr_config_id,
            "the policy says dangerous_any_mr_config_id",
        ));
        for ((claim, found), reference) in RTMR.iter().zip(&report.rtmr).zip(&self.rtmr) {
            let why = "the policy lists it in dangerous_any_rtmr";
            fields.push(stated(claim, found, reference, why));
        }
        fields.push(optional(
            "measurement.mr_seam",
            &report.mr_seam,
            self.mr_seam.as_ref(),
        ));
        fields.push(optional(
            "measurement.mr_owner",
            &report.mr_owner,
            self.mr_owner.as_ref(),
        ));
        fields.push(optional(
            "measurement.mr_owner_config",
            &report.mr_owner_config,
            self.mr_owner_config.as_ref(),
        ));
        fields.push(optional(
            "measurement.td_attributes",
            &report.td_attributes,
            self.td_attributes.as_ref(),
        ));
        fields.push(optional(
            "measurement.xfam",
            &report.xfam,
            self.xfam.as_ref(),
        ));
        fields
    }
}

impl SgxMeasurement {
    fn compare(&self, report: &SgxReport) -> Vec<Field> {
        let mut fields = match &self.identity {
            SgxIdentity::Enclave(mr_enclave) => {
                vec![exactly(
                    "measurement.mr_enclave",
                    &report.mr_enclave,
                    mr_enclave,
                )]
            }
            SgxIdentity::Signer {
                mr_signer,
                isv_prod_id,
                minimum_isv_svn,
            } => vec![
                skipped(
                    "measurement.mr_enclave",
                    &report.mr_enclave,
                    "the policy names the signer instead",
                ),
                exactly("measurement.mr_signer", &report.mr_signer, mr_signer),
                number(
                    "measurement.isv_prod_id",
                    report.isv_prod_id,
                    report.isv_prod_id == *isv_prod_id,
                    isv_prod_id.to_string(),
                ),
                number(
                    "measurement.isv_svn",
                    report.isv_svn,
                    report.isv_svn >= *minimum_isv_svn,
                    format!("at least {minimum_isv_svn}"),
                ),
            ],
        };
        fields.push(exactly(
            "measurement.config_id",
            &report.config_id,
            &self.config_id,
        ));
        fields.push(optional(
            "measurement.attributes",
            &report.attributes,
            self.attributes.as_ref(),
        ));
        fields
    }
}

fn exactly<const N: usize>(claim: &'static str, found: &[u8; N], expected: &[u8; N]) -> Field {
    Field {
        claim,
        status: status(found == expected),
        found: hex::encode(found),
        expected: hex::encode(expected),
    }
}

fn number(claim: &'static str, found: u16, holds: bool, expected: String) -> Field {
    Field {
        claim,
        status: status(holds),
        found: found.to_string(),
        expected,
    }
}

fn stated(
    claim: &'static str,
    found: &[u8; 48],
    reference: &Reference,
    why_any: &'static str,
) -> Field {
    match reference {
        Reference::Exactly(expected) => exactly(claim, found, expected),
        Reference::Any => skipped(claim, found, why_any),
    }
}

fn optional<const N: usize>(
    claim: &'static str,
    found: &[u8; N],
    expected: Option<&[u8; N]>,
) -> Field {
    match expected {
        Some(expected) => exactly(claim, found, expected),
        None => skipped(claim, found, "the policy names no value"),
    }
}

fn skipped(claim: &'static str, found: &[u8], why: &str) -> Field {
    Field {
        claim,
        status: Status::Skipped,
        found: hex::encode(found),
        expected: why.to_owned(),
    }
}

fn status(holds: bool) -> Status {
    if holds {
        Status::Passed
    } else {
        Status::Failed
    }
}
