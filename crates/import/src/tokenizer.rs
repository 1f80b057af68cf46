//! Vocabularies of every source, turned into one form: a `tokenizer.json` of the `tokenizers` library.
//!
//! * [`Pieces`] — SentencePiece BPE: pieces with scores, spaces written `▁`, bytes for what is not a piece.
//! * [`ByteLevel`] — GPT-2's byte-level BPE: a split into words by regular expression, then ordered merges.
//!
//! `sentencepiece.rs` and `tiktoken.rs` read files into these, `merges.rs` derives merge rules from scores or ranks,
//! `split.rs` holds the named splits, `document.rs` writes the JSON. [`check`] loads the result with the library and
//! is the last word on ids and on the leading token. Not here: encoding and decoding, which are the engine's.

mod document;
pub(crate) mod merges;
pub(crate) mod sentencepiece;
pub(crate) mod split;
pub(crate) mod tiktoken;

use std::collections::HashMap;

use casemate_container::ModelConfig;
use casemate_tokenizer::{TokenizerFile, TokenizerFileError};

use self::document::Document;
use self::split::Split;
use crate::error::{Fault, Problem, Unsupported};

/// The longest token text, in bytes: deriving merges takes time quadratic in it.
pub(crate) const MAX_TOKEN: usize = 1024;

/// What a token is for, as SentencePiece and GGUF number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Made by merging.
    Normal,
    /// Stands for text that cannot be encoded.
    Unknown,
    /// Found whole in text, never printed.
    Control,
    /// Found whole in text, and printed.
    UserDefined,
    /// Never made.
    Unused,
    /// One byte of a character that is not a piece: `<0x41>`.
    Byte,
}

/// One token; its id is its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub(crate) text: String,
    pub(crate) kind: Kind,
}

/// Where SentencePiece's dummy prefix, a space, goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpacePrefix {
    /// Nowhere.
    Never,
    /// In front of each stretch of text between special tokens.
    EachStretch,
    /// In front of the text, unless it begins with a special token.
    TextOnly,
}

/// Writes the spaces of user-defined pieces plainly: they are looked for in the text as it stands, before its spaces
/// become `▁`.
pub(crate) fn with_plain_spaces(mut tokens: Vec<Token>) -> Vec<Token> {
    for token in tokens
        .iter_mut()
        .filter(|token| token.kind == Kind::UserDefined)
    {
        token.text = token.text.replace('\u{2581}', " ");
    }
    tokens
}

/// A SentencePiece BPE vocabulary.
#[derive(Debug)]
pub(crate) struct Pieces {
    pub(crate) tokens: Vec<Token>,
    /// One per token; the higher, the earlier it is merged.
    pub(crate) scores: Vec<f32>,
    pub(crate) unknown: Option<u32>,
    /// The token in front of every text, if any.
    pub(crate) bos: Option<u32>,
    pub(crate) space_prefix: SpacePrefix,
}

/// A byte-level BPE vocabulary. Token texts are in GPT-2's alphabet of printable characters for bytes.
#[derive(Debug)]
pub(crate) struct ByteLevel {
    pub(crate) tokens: Vec<Token>,
    /// First rule first.
    pub(crate) merges: Vec<(String, String)>,
    pub(crate) split: Split,
    /// The token in front of every text, if any.
    pub(crate) bos: Option<u32>,
}

/// A vocabulary of either kind.
#[derive(Debug)]
pub(crate) enum Vocabulary {
    Pieces(Pieces),
    ByteLevel(ByteLevel),
}

impl Vocabulary {
    /// Writes the vocabulary as `tokenizer.json`.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>, Problem> {
        let document = match self {
            Self::Pieces(pieces) => {
                let ids = index(&pieces.tokens)?;
                check_ids(
                    &pieces.tokens,
                    &[
                        ("the unknown token", pieces.unknown),
                        ("the beginning-of-text token", pieces.bos),
                    ],
                )?;
                Document::from_pieces(pieces, merges::from_scores(pieces, &ids)?)
            }
            Self::ByteLevel(level) => {
                let ids = index(&level.tokens)?;
                check_ids(&level.tokens, &[("the beginning-of-text token", level.bos)])?;
                for (rule, (left, right)) in level.merges.iter().enumerate() {
                    let whole = format!("{left}{right}");
                    let known = |text: &str| ids.contains_key(text);
                    if !(known(left) && known(right) && known(&whole)) {
                        return Err(Fault::Merge {
                            index: rule,
                            rule: format!("{left} {right}"),
                        }
                        .into());
                    }
                }
                Document::from_byte_level(level)
            }
        };
        serde_json::to_vec(&document).map_err(|e| {
            Fault::Tokenizer {
                reason: e.to_string(),
            }
            .into()
        })
    }
}

/// The ids by text. Two tokens with one text would make one of them unreachable.
fn index(tokens: &[Token]) -> Result<HashMap<&str, u32>, Problem> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if token.text.len() > MAX_TOKEN {
            return Err(Fault::TooLong {
                what: "a token",
                length: token.text.len() as u64,
                limit: MAX_TOKEN as u64,
            }
            .into());
        }
        if let Some(first) = ids.insert(token.text.as_str(), id as u32) {
            return Err(Fault::DuplicateToken {
                token: token.text.clone(),
                ids: (u64::from(first), id as u64),
            }
            .into());
        }
    }
    Ok(ids)
}

fn check_ids(tokens: &[Token], ids: &[(&'static str, Option<u32>)]) -> Result<(), Problem> {
    for (what, id) in ids {
        if let Some(id) = id.filter(|id| *id as usize >= tokens.len()) {
            return Err(Fault::TokenId {
                what,
                id: u64::from(id),
                vocabulary: tokens.len() as u64,
            }
            .into());
        }
    }
    Ok(())
}

/// Loads `tokenizer_json` with the library, holds it against `config`, and returns `config` with `add_bos` as the
/// tokenizer really behaves.
pub(crate) fn check(
    tokenizer_json: &[u8],
    mut config: ModelConfig,
) -> Result<ModelConfig, Problem> {
    let file = TokenizerFile::parse(tokenizer_json)?;
    let leading = file.leading_token();
    let tokenizer = file.load()?;
    let vocabulary = u64::from(config.vocab);
    let outside = |what, id: u32| {
        Problem::from(Fault::TokenId {
            what,
            id: u64::from(id),
            vocabulary,
        })
    };
    if let Some(id) = tokenizer
        .get_vocab(true)
        .into_values()
        .filter(|id| *id >= config.vocab)
        .max()
    {
        return Err(outside("the tokenizer's last", id));
    }
    let first = [config.bos, leading].into_iter().flatten();
    for (what, id) in first
        .map(|id| ("the beginning-of-text token", id))
        .chain(config.eos.iter().map(|id| ("an end-of-text token", *id)))
    {
        if id >= config.vocab || tokenizer.id_to_token(id).is_none() {
            return Err(outside(what, id));
        }
    }
    config.add_bos = leading.is_some();
    config.bos = leading.or(config.bos);
    Ok(config)
}

impl From<TokenizerFileError> for Problem {
    fn from(error: TokenizerFileError) -> Self {
        match error {
            TokenizerFileError::Malformed(reason) => Fault::Tokenizer { reason }.into(),
            TokenizerFileError::Unsupported { part, value } => Unsupported::Setting {
                key: part.to_owned(),
                value,
            }
            .into(),
        }
    }
}

/// The character that stands for `byte` in GPT-2's alphabet: itself where it prints, else one from U+0100 on.
pub(crate) fn byte_character(byte: u8) -> char {
    fn prints(byte: u8) -> bool {
        matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
    }
    if prints(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|b| !prints(*b)).count() as u32;
    char::from_u32(0x100 + place).expect("U+0100 to U+0143 are characters")
}

#[cfg(test)]
mod tests;
