//! Texts that are far too long for the context are refused before they cost anything.

use super::Api;
use super::error::ApiError;

/// Bytes of text per token above which a text cannot be meant to fit. The longest tokens of the vocabularies in use have
/// about half as many, and the average token has four.
const BYTES_PER_TOKEN: usize = 256;

impl Api {
    /// Refuses texts of so many bytes in all, if no tokenizer would make one such prompt fit into the context; whether it
    /// does fit is only known once it is tokenized. Several prompts of one request share the bound, which leaves each of
    /// sixteen that fill the context 16 bytes for a token.
    pub(super) fn check_length(&self, bytes: usize) -> Result<(), ApiError> {
        let context = self.engine().context();
        if bytes > context.saturating_mul(BYTES_PER_TOKEN) {
            return Err(ApiError::far_too_long(bytes, context));
        }
        Ok(())
    }
}
