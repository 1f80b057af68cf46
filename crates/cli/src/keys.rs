//! How keys are named on the command line.

use std::path::Path;

use casemate_container::KeyFileError;
use casemate_container::signing::VerifyingKey;

/// A public key: a PEM file, or the 64 hexadecimal digits themselves.
pub(crate) fn public_key(text: &str) -> Result<VerifyingKey, KeyFileError> {
    match text.parse() {
        Ok(key) => Ok(key),
        Err(_) => VerifyingKey::read_file(Path::new(text)),
    }
}
