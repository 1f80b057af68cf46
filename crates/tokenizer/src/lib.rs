//! A foreign `tokenizer.json`, checked before the `tokenizers` library sees it. The library trusts such files: it
//! panics at a template that names a token which is not there, at a malformed character map, at two added tokens that
//! strip each other's spaces. So only the kinds of steps that Llama-family tokenizers are made of pass, with values that
//! the library can work with; everything else is refused by name. `docs/import.md` lists what passes.
//!
//! What the library is not needed for it does not get: tokens become bytes by [`Decoder`], and of the post-processor only
//! one fact counts, the token it puts in front of a text, which is read here.

#![forbid(unsafe_code)]

mod decoder;
mod steps;
mod tokens;

use serde_json::Value;

pub use decoder::Decoder;

/// A checked `tokenizer.json`.
pub struct TokenizerFile {
    file: Value,
    leading: Option<u32>,
    decoder: Decoder,
}

/// Why a `tokenizer.json` is not loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerFileError {
    /// It contradicts its format or itself.
    #[error("tokenizer.json is malformed: {0}")]
    Malformed(String),
    /// It asks for something that Llama-family tokenizers do not use.
    #[error("tokenizer.json has `{part}` = {value}, which is not supported")]
    Unsupported {
        /// The part of the file.
        part: &'static str,
        /// What stands there.
        value: String,
    },
}

fn malformed(reason: impl Into<String>) -> TokenizerFileError {
    TokenizerFileError::Malformed(reason.into())
}

/// The beginning of what stands there: a file may hold anything, and much of it.
fn unsupported(part: &'static str, value: &Value) -> TokenizerFileError {
    let mut value = match value {
        Value::Object(object) if object.contains_key("type") => object["type"].to_string(),
        other => other.to_string(),
    };
    if let Some((end, _)) = value.char_indices().nth(120) {
        value.truncate(end);
        value.push('…');
    }
    TokenizerFileError::Unsupported { part, value }
}

impl TokenizerFile {
    /// Parses and checks a file.
    ///
    /// # Errors
    /// [`TokenizerFileError`]: the file is malformed or uses something that is not supported.
    pub fn parse(json: &[u8]) -> Result<Self, TokenizerFileError> {
        let file: Value = serde_json::from_slice(json).map_err(|e| malformed(e.to_string()))?;
        if !file.is_object() {
            return Err(malformed("it is not a JSON object"));
        }
        steps::check_normalizer(&file["normalizer"])?;
        steps::check_pre_tokenizer(&file["pre_tokenizer"])?;
        let leading = steps::leading_token(&file["post_processor"])?;
        tokens::check_model(&file["model"])?;
        tokens::check_added(&file)?;
        let decoder = Decoder::parse(&file["decoder"])?;
        Ok(Self {
            file,
            leading,
            decoder,
        })
    }

    /// The token that the file puts in front of every text, if it says so.
    #[must_use]
    pub fn leading_token(&self) -> Option<u32> {
        self.leading
    }

    /// How its tokens become bytes.
    #[must_use]
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The file.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.file
    }

    /// Gives each token for which `other` has a name that name, so that nothing else stands for it. Ids stay; a renamed
    /// token is never looked for in normalized text, and merges that would spell one are left out.
    pub fn rename<'a>(&mut self, other: impl Fn(&str) -> Option<&'a str>) {
        tokens::rename(&mut self.file, other);
    }

    /// Loads the file into the library: without its post-processor, decoder and limits of a training run, by which a
    /// prompt would be cut or padded silently.
    ///
    /// # Errors
    /// [`TokenizerFileError::Malformed`]: the library does not understand it, or gives a token another id.
    pub fn load(mut self) -> Result<tokenizers::Tokenizer, TokenizerFileError> {
        for part in ["truncation", "padding", "post_processor", "decoder"] {
            self.file[part] = Value::Null;
        }
        let json = serde_json::to_vec(&self.file).map_err(|e| malformed(e.to_string()))?;
        let loaded =
            tokenizers::Tokenizer::from_bytes(&json).map_err(|e| malformed(e.to_string()))?;
        for token in tokens::added(&self.file) {
            if loaded.token_to_id(token.content) != Some(token.id) {
                return Err(malformed(format!(
                    "the added token {:?} cannot have the id {}",
                    token.content, token.id
                )));
            }
        }
        Ok(loaded)
    }
}

#[cfg(test)]
mod tests;
