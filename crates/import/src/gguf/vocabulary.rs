//! GGUF's `tokenizer.ggml.*` keys as a vocabulary.
//!
//! `llama` is SentencePiece BPE (pieces with scores), `gpt2` byte-level BPE (merges and a named split).
//! Defaults are llama.cpp's, because files leave out what it assumes.

use super::metadata::Metadata;
use crate::error::{Fault, Problem, Unsupported};
use crate::tokenizer::split::Split;
use crate::tokenizer::{
    ByteLevel, Kind, Pieces, SpacePrefix, Token, Vocabulary, with_plain_spaces,
};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// Reads the vocabulary.
pub(super) fn read(metadata: &Metadata) -> Result<Vocabulary, Problem> {
    if metadata.bool("tokenizer.ggml.add_eos_token")? == Some(true) {
        return Err(setting("tokenizer.ggml.add_eos_token", "true"));
    }
    const MODEL: &str = "tokenizer.ggml.model";
    match Metadata::require(MODEL, metadata.str(MODEL)?)? {
        "llama" => read_pieces(metadata).map(Vocabulary::Pieces),
        "gpt2" => read_byte_level(metadata).map(Vocabulary::ByteLevel),
        other => Err(Unsupported::TokenizerModel {
            name: other.to_owned(),
        }
        .into()),
    }
}

/// The id under `tokenizer.ggml.<name>_token_id`.
pub(super) fn special_id(metadata: &Metadata, name: &str) -> Result<Option<u32>, Problem> {
    let id = metadata.u32(&format!("tokenizer.ggml.{name}_token_id"))?;
    // Some writers store "none" as all ones.
    Ok(id.filter(|id| *id != u32::MAX))
}

/// Every token that ends a generation: the named end tokens, and control tokens whose text is a known end marker,
/// because many files name only one of the two that a chat model uses.
pub(super) fn end_ids(metadata: &Metadata) -> Result<Vec<u32>, Problem> {
    const END_MARKERS: [&str; 6] = [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
    ];
    let mut ids = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ids.extend(special_id(metadata, name)?);
    }
    let tokens = metadata.strings(TOKENS)?.unwrap_or_default();
    let kinds = metadata.integers(TYPES)?.unwrap_or_default();
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        if kind == 3 && END_MARKERS.contains(&token.as_str()) {
            // The token count was limited, so the id fits.
            ids.push(id as u32);
        }
    }
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    Ok(ids)
}

fn setting(key: &str, value: &str) -> Problem {
    Unsupported::Setting {
        key: key.to_owned(),
        value: value.to_owned(),
    }
    .into()
}

fn read_tokens(metadata: &Metadata) -> Result<Vec<Token>, Problem> {
    let texts = Metadata::require(TOKENS, metadata.strings(TOKENS)?)?;
    let kinds = Metadata::require(TYPES, metadata.integers(TYPES)?)?;
    same_length(TYPES, kinds.len(), texts.len())?;
    texts
        .iter()
        .zip(kinds)
        .map(|(text, kind)| {
            let kind = match kind {
                1 => Kind::Normal,
                2 => Kind::Unknown,
                3 => Kind::Control,
                4 => Kind::UserDefined,
                5 => Kind::Unused,
                6 => Kind::Byte,
                _ => {
                    return Err(Fault::OutOfRange {
                        key: TYPES.to_owned(),
                        value: kind.to_string(),
                    }
                    .into());
                }
            };
            Ok(Token {
                text: text.clone(),
                kind,
            })
        })
        .collect()
}

fn same_length(key: &str, found: usize, tokens: usize) -> Result<(), Problem> {
    if found == tokens {
        return Ok(());
    }
    Err(Fault::Contradiction {
        first: format!("`{key}` has {found} entries"),
        second: format!("`{TOKENS}` has {tokens}"),
    }
    .into())
}

fn read_pieces(metadata: &Metadata) -> Result<Pieces, Problem> {
    let tokens = with_plain_spaces(read_tokens(metadata)?);
    let scores = Metadata::require(SCORES, metadata.floats(SCORES)?)?;
    same_length(SCORES, scores.len(), tokens.len())?;
    if metadata.bool("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
        return Err(setting("tokenizer.ggml.remove_extra_whitespaces", "true"));
    }
    let add_bos = metadata
        .bool("tokenizer.ggml.add_bos_token")?
        .unwrap_or(true);
    let prefix = metadata
        .bool("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    Ok(Pieces {
        tokens,
        scores: scores.iter().map(|score| *score as f32).collect(),
        unknown: special_id(metadata, "unknown")?,
        bos: leading_bos(metadata, add_bos)?,
        space_prefix: if prefix {
            SpacePrefix::EachStretch
        } else {
            SpacePrefix::Never
        },
    })
}

fn read_byte_level(metadata: &Metadata) -> Result<ByteLevel, Problem> {
    let tokens = read_tokens(metadata)?;
    let name = metadata.str("tokenizer.ggml.pre")?.unwrap_or("default");
    let split = Split::from_name(name).ok_or_else(|| Unsupported::PreTokenizer {
        name: name.to_owned(),
    })?;
    let rules = Metadata::require(MERGES, metadata.strings(MERGES)?)?;
    let merges = rules
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            rule.split_once(' ')
                .map(|(left, right)| (left.to_owned(), right.to_owned()))
                .ok_or_else(|| {
                    Problem::from(Fault::Merge {
                        index,
                        rule: rule.clone(),
                    })
                })
        })
        .collect::<Result<_, _>>()?;
    let add_bos = metadata
        .bool("tokenizer.ggml.add_bos_token")?
        .unwrap_or(split.adds_bos());
    Ok(ByteLevel {
        tokens,
        merges,
        split,
        bos: leading_bos(metadata, add_bos)?,
    })
}

/// The token that begins every text, if there is one.
fn leading_bos(metadata: &Metadata, add_bos: bool) -> Result<Option<u32>, Problem> {
    if !add_bos {
        return Ok(None);
    }
    const KEY: &str = "tokenizer.ggml.bos_token_id";
    Metadata::require(KEY, special_id(metadata, "bos")?).map(Some)
}
