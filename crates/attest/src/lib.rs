//! Evidence and its appraisal: parsing of quotes and collateral, the policy file, the decision whether a quote
//! comes from a genuine TEE that runs what the policy names, and the transcript of how it was decided.
//!
//! [`appraise`] is the one way to an [`Appraised`]; whoever releases a key or trusts a service takes that value, not
//! an absence of errors. Time, evidence and policy are arguments: this room has no clock, no I/O and no network.
//! Collecting evidence is the room `tee`; nonces, keysets and credentials are `channel` and `release`.

#![forbid(unsafe_code)]

mod appraisal;
mod collateral;
mod denial;
mod evidence;
mod genuine;
pub mod measure;
mod policy;
mod quote;
mod reference;
mod report_data;
mod tcb_status;
mod td_attributes;
mod text;
mod toml_fault;
mod transcript;
mod unique_json;
mod unix_time;

pub use appraisal::{
    Appraisal, Appraised, Claims, RootOfTrust, Verified, VerifiedDevelopment, appraise,
};
pub use collateral::Collateral;
pub use denial::{Class, Denial};
pub use evidence::{Evidence, EvidenceError, MAX_EVIDENCE_JSON, MAX_QUOTE, TeeKind};
pub use policy::{
    MAX_POLICY, ModelPolicy, Policy, PolicyError, PolicyFault, ServicePolicy, TcbAllowance,
};
pub use quote::{Quote, QuoteError, QuoteFault, Report, SgxReport, TdReport};
pub use reference::{Measurement, Reference, SgxIdentity, SgxMeasurement, TdMeasurement};
pub use report_data::{ReportData, ReportDataError};
pub use tcb_status::TcbStatus;
pub use toml_fault::TomlFault;
pub use transcript::{Check, Status, Transcript};
pub use unique_json::UniqueValue;
pub use unix_time::{InvalidTime, UnixTime};
