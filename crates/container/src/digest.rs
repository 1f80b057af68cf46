//! The model digest: what names a model, however often it is sealed.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};

/// SHA-256 of a model's canonical plaintext manifest. Two files with this digest hold the same configuration,
/// tensors (to the byte) and tokenizer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct ModelDigest(#[cbor(n(0), with = "minicbor::bytes")] pub [u8; 32]);

/// Text that is not 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a digest is written as 64 lower-case hexadecimal digits")]
pub struct DigestParseError;

impl ModelDigest {
    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelDigest({self})")
    }
}

impl FromStr for ModelDigest {
    type Err = DigestParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex32(text).map(ModelDigest)
    }
}

/// Exactly one text per value: upper case is refused, so that digests can be compared as text too.
pub(crate) fn parse_hex32(text: &str) -> Result<[u8; 32], DigestParseError> {
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(DigestParseError);
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| DigestParseError)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_one_form() {
        let digest = ModelDigest([0xab; 32]);
        let text = digest.to_string();
        assert_eq!(text, "ab".repeat(32));
        assert_eq!(text.parse(), Ok(digest));
        for wrong in [
            text.to_uppercase(),
            text[..62].to_owned(),
            format!("{text}00"),
            "zz".repeat(32),
        ] {
            assert_eq!(
                wrong.parse::<ModelDigest>(),
                Err(DigestParseError),
                "{wrong}"
            );
        }
    }
}
