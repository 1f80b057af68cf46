//! The data key: the one secret that opens a sealed model.

use std::path::Path;

use aws_lc_rs::rand;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::key_file::{self, KeyFileError};

const PEM_LABEL: &str = "CASEMATE DATA KEY";

/// 32 secret bytes from which each file's keys are derived. Erased when dropped; cannot be printed, cloned or
/// compared other than in constant time.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct DataKey([u8; 32]);

impl DataKey {
    /// A fresh random key.
    ///
    /// # Panics
    /// When the system has no randomness.
    pub fn generate() -> Self {
        let mut key = DataKey([0; 32]);
        rand::fill(&mut key.0).expect("the system provides randomness");
        key
    }

    /// Takes key bytes that came from elsewhere, for example out of a key grant. The caller erases its copy.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        DataKey(*bytes)
    }

    /// The secret itself, for the code that wraps it for somebody else.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// Constant-time comparison.
    pub fn matches(&self, other: &DataKey) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// Reads a key file as written by [`Self::write_file`].
    ///
    /// # Errors
    /// When the file cannot be read, is open to other users, or is no data key.
    pub fn read_file(path: &Path) -> Result<Self, KeyFileError> {
        let bytes = key_file::read_secret(path, PEM_LABEL)?;
        let array: Zeroizing<[u8; 32]> = Zeroizing::new(
            bytes
                .as_slice()
                .try_into()
                .map_err(|_| KeyFileError::not_a(PEM_LABEL, path))?,
        );
        Ok(DataKey(*array))
    }

    /// Writes a PEM file that only its owner can read. Replaces an existing file only when `overwrite` says so.
    ///
    /// # Errors
    /// When the file exists or cannot be written; an existing file is then as it was.
    pub fn write_file(&self, path: &Path, overwrite: bool) -> Result<(), KeyFileError> {
        key_file::write_secret(path, PEM_LABEL, &self.0, overwrite)
    }
}
