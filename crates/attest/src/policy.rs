//! The policy file: which TEEs, in which state, started from what, serving which model for whom. Reading it from
//! TOML, strictly (in `file`); `docs/policy.md` describes every key. It is applied elsewhere.

mod file;

use std::collections::BTreeSet;

use sha2::{Digest as _, Sha256};

use crate::denial::Denial;
use crate::evidence::TeeKind;
use crate::reference::Measurement;
use crate::tcb_status::TcbStatus;
use crate::unix_time::UnixTime;

/// Largest policy file that is looked at.
pub const MAX_POLICY: usize = 256 * 1024;

/// A policy as its file states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    version: u64,
    digest: [u8; 32],
    tee: Vec<TeeKind>,
    dangerous_development_root: Option<[u8; 32]>,
    minimum_tcb_evaluation_data_number: u32,
    tcb_allowances: Vec<TcbAllowance>,
    service_tds: Vec<[u8; 48]>,
    measurements: Vec<Measurement>,
    model: Option<ModelPolicy>,
    service: Option<ServicePolicy>,
}

/// A TCB status other than `UpToDate` that is accepted for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcbAllowance {
    /// The status.
    pub status: TcbStatus,
    /// When the allowance ends.
    pub until: UnixTime,
    /// Where given, the advisories that may apply; any other is refused.
    pub advisories: Option<BTreeSet<String>>,
}

/// The models that may be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPolicy {
    /// Model digests, at least one.
    pub digests: BTreeSet<[u8; 32]>,
    /// The lowest model version accepted.
    pub minimum_version: u64,
    /// Digests of the adapters that may be loaded beside a model.
    pub adapters: BTreeSet<[u8; 32]>,
}

/// Whose service a user accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePolicy {
    /// The Ed25519 public key of the issuer of deployment credentials.
    pub issuer: [u8; 32],
    /// The service's name in the credential.
    pub name: String,
    /// How old evidence may become, counted from the user's nonce.
    pub maximum_evidence_age_seconds: u64,
}

/// A policy file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct PolicyError {
    /// The line it is about, counted from 1.
    pub line: Option<usize>,
    /// What is wrong.
    pub fault: PolicyFault,
}

/// What is wrong with a policy file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyFault {
    /// Larger than the limit; it was not looked at.
    #[error("{len} bytes; the limit is {MAX_POLICY}")]
    TooLarge {
        /// Its length.
        len: usize,
    },
    /// Not TOML, or an unknown key, a missing key or a wrong type, in the TOML reader's words.
    #[error("{0}")]
    Toml(String),
    /// A value that the key cannot have.
    #[error("{key} is {found:?}; expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        found: String,
        /// The values it can have.
        expected: &'static str,
    },
    /// A key that must be there.
    #[error("{key} is missing; {remedy}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What to write.
        remedy: &'static str,
    },
    /// Two keys that contradict each other.
    #[error("{key} and {other} contradict each other")]
    Conflict {
        /// One.
        key: &'static str,
        /// The other.
        other: &'static str,
    },
    /// The same value twice.
    #[error("{key} {value:?} occurs twice")]
    Repeated {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// More or fewer entries than make sense.
    #[error("{key} has {count} entries; expected {expected}")]
    Count {
        /// The key.
        key: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        expected: &'static str,
    },
}

impl std::fmt::Display for PolicyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "policy, line {line}: {}", self.fault),
            None => write!(f, "policy: {}", self.fault),
        }
    }
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// [`PolicyError`] with the line and what is wrong there. Unknown keys are errors.
    pub fn from_toml(text: &str) -> Result<Policy, PolicyError> {
        if text.len() > MAX_POLICY {
            let fault = PolicyFault::TooLarge { len: text.len() };
            return Err(PolicyError { line: None, fault });
        }
        file::read(text).map(|mut policy| {
            policy.digest = Sha256::digest(text.as_bytes()).into();
            policy
        })
    }

    /// The policy's version, which only goes up.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// SHA-256 of the file's bytes.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// The kinds of TEE accepted.
    pub fn tee(&self) -> &[TeeKind] {
        &self.tee
    }

    /// The hash of the development root that this policy accepts beside Intel's: evidence under it is **not from a
    /// TEE**. Every program that starts with such a policy says so.
    pub fn dangerous_development_root(&self) -> Option<&[u8; 32]> {
        self.dangerous_development_root.as_ref()
    }

    /// The oldest of Intel's TCB evaluations that is accepted.
    pub fn minimum_tcb_evaluation_data_number(&self) -> u32 {
        self.minimum_tcb_evaluation_data_number
    }

    /// TCB statuses other than `UpToDate` that are accepted for a while.
    pub fn tcb_allowances(&self) -> &[TcbAllowance] {
        &self.tcb_allowances
    }

    /// Service TDs that may be bound to a TD.
    pub fn service_tds(&self) -> &[[u8; 48]] {
        &self.service_tds
    }

    /// The reference values, one of which must match.
    pub fn measurements(&self) -> &[Measurement] {
        &self.measurements
    }

    /// The models that may be served.
    ///
    /// # Errors
    /// A [`Denial`] where the policy has no `[model]`: no model is allowed then.
    pub fn model(&self) -> Result<&ModelPolicy, Denial> {
        self.model
            .as_ref()
            .ok_or_else(|| missing_section("policy.model", "[model]"))
    }

    /// Whose service is accepted.
    ///
    /// # Errors
    /// A [`Denial`] where the policy has no `[service]`: no service is accepted then.
    pub fn service(&self) -> Result<&ServicePolicy, Denial> {
        self.service
            .as_ref()
            .ok_or_else(|| missing_section("policy.service", "[service]"))
    }
}

impl ModelPolicy {
    /// Whether this model in this version may be served.
    pub fn allows(&self, digest: &[u8; 32], version: u64) -> bool {
        self.digests.contains(digest) && version >= self.minimum_version
    }
}

fn missing_section(claim: &'static str, section: &str) -> Denial {
    Denial::refused(
        claim,
        format!("a policy without {section}"),
        format!("a policy with {section}"),
        format!("add {section} to the policy; see docs/policy.md"),
    )
}
