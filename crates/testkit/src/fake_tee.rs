//! A TEE that is none: it signs quotes in Intel's TDX format under a root of trust generated per installation, so that
//! development runs through the same verifier as production. It holds the signing side ([`FakeTee`]), the measurement
//! of a process ([`peer`]) and the service on a Unix socket ([`server`]). Whoever can read its state directory can
//! claim anything; a policy that accepts it must say so by naming the root.

pub mod peer;
mod pki;
mod quote;
pub mod server;

pub use pki::{Endorsements, Platform, Revoked};
pub use quote::{Body, Forgery, Sample};

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use casemate_attest::measure::Measurement;
use casemate_attest::{Evidence, ReportData};

/// Endorsements older than this are issued anew.
const REFRESH_SECONDS: u64 = 3600;

/// The fake TEE: its keys, and the endorsements it last issued.
pub struct FakeTee {
    keys: pki::Keys,
    endorsed: Mutex<Option<(u64, pki::Endorsed)>>,
}

/// Why a fake TEE could not start or sign.
#[derive(Debug, thiserror::Error)]
pub enum FakeTeeError {
    /// The state directory could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A private key is readable by others.
    #[error("{}: mode {mode:o} lets others read the key; expected 600", path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file of the state directory does not hold what it should.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// The file concerned.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Another process uses the same state directory.
    #[error(
        "{}: in use by another fake TEE; use that one, stop it, or give this one another --state and --socket",
        path.display()
    )]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// The given time cannot be written into a certificate.
    #[error("time {0} is outside what certificates can express")]
    Time(u64),
    /// A certificate or revocation list could not be issued.
    #[error("cannot issue: {0}")]
    Issue(#[from] rcgen::Error),
    /// A signature could not be made.
    #[error("cannot sign")]
    Sign,
}

impl FakeTee {
    /// Opens the installation in `state`, creating it at first use. `now` is in seconds since the epoch.
    pub fn open(state: &Path, now: u64) -> Result<FakeTee, FakeTeeError> {
        Ok(FakeTee {
            keys: pki::Keys::open(state, now)?,
            endorsed: Mutex::new(None),
        })
    }

    /// An installation that lives in memory only.
    pub fn ephemeral(now: u64) -> Result<FakeTee, FakeTeeError> {
        Ok(FakeTee {
            keys: pki::Keys::generate(now)?,
            endorsed: Mutex::new(None),
        })
    }

    /// The root certificate, DER.
    pub fn root_der(&self) -> &[u8] {
        self.keys.root_der()
    }

    /// SHA-256 of the root's SubjectPublicKeyInfo: what a policy names to accept this installation.
    pub fn root_spki_sha256(&self) -> [u8; 32] {
        self.keys.root_spki_sha256()
    }

    /// Quotes a measured process.
    pub fn quote(
        &self,
        measurement: &Measurement,
        report_data: &ReportData,
        now: u64,
    ) -> Result<Evidence, FakeTeeError> {
        let endorsed = self.endorsed(now)?;
        quote::sign(
            &self.keys,
            &endorsed,
            &Sample::new(measurement, report_data),
        )
    }

    /// Quotes whatever the sample says, endorsed however it says: for hostile samples in tests.
    pub fn quote_with(&self, sample: &Sample, now: u64) -> Result<Evidence, FakeTeeError> {
        let endorsed = self
            .keys
            .endorse(&sample.platform, &sample.endorsements, now)?;
        quote::sign(&self.keys, &endorsed, sample)
    }

    fn endorsed(&self, now: u64) -> Result<pki::Endorsed, FakeTeeError> {
        let mut cached = self.endorsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((issued, endorsed)) = &*cached
            && (*issued..issued.saturating_add(REFRESH_SECONDS)).contains(&now)
        {
            return Ok(endorsed.clone());
        }
        let fresh = self
            .keys
            .endorse(&Platform::default(), &Endorsements::default(), now)?;
        *cached = Some((now, fresh.clone()));
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests;
