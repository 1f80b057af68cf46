//! How keys are named on the command line.

use std::path::Path;

use anyhow::anyhow;
use casemate_container::signing::VerifyingKey;

use crate::exit::{Class, Failure};

/// A public key: a PEM file, or the 64 hexadecimal digits themselves.
pub(crate) fn public_key(text: &str) -> Result<VerifyingKey, Failure> {
    if let Ok(key) = text.parse() {
        return Ok(key);
    }
    let path = Path::new(text);
    let digits = text.chars().filter(char::is_ascii_hexdigit).count();
    // What looks like a key is meant as one, unless there is such a file.
    if digits == text.chars().count() && digits >= 32 && !path.exists() {
        let error = anyhow!("{text} has {digits} hexadecimal digits, a public key has 64");
        return Err(Failure::new(Class::Usage, "not-a-key", error));
    }
    if digits < text.chars().count() && text.chars().count() == 64 && !path.exists() {
        let error = anyhow!(
            "{text} is no file, and as a public key it has other characters than hexadecimal digits"
        );
        return Err(Failure::new(Class::Usage, "not-a-key", error));
    }
    Ok(VerifyingKey::read_file(path)?)
}
