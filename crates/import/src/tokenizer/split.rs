//! The splits into words that byte-level vocabularies name, as pre-tokenizers of the `tokenizers` library.
//!
//! The regular expressions are data of the models: each was published with the vocabulary it belongs to.

use serde_json::{Value, json};

/// The names that GGUF files use for the splits below, for messages.
pub(crate) const NAMES: &str = "default, gpt-2, smollm, llama-bpe, llama3, llama-v3, smaug-bpe, qwen2, deepseek-r1-qwen and tekken";

/// A split into words, before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Split {
    /// What llama.cpp does with a file that names no split: punctuation apart, digits in threes.
    Default,
    /// GPT-2.
    Gpt2,
    /// SmolLM: GPT-2, with each digit alone.
    SmolLm,
    /// Llama 3: up to three digits together.
    Llama3,
    /// Qwen 2: each digit alone; text is composed (NFC) first.
    Qwen2,
    /// Mistral's Tekken: words end where a capital follows a small letter.
    Tekken,
}

const CONTRACTIONS_OR_WORD: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
const PUNCTUATION_OR_SPACE: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

impl Split {
    /// The split that a GGUF file calls `name`.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" => Self::Default,
            "gpt-2" => Self::Gpt2,
            "smollm" => Self::SmolLm,
            "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => Self::Llama3,
            "qwen2" | "deepseek-r1-qwen" => Self::Qwen2,
            "tekken" => Self::Tekken,
            _ => return None,
        })
    }

    /// Whether vocabularies of this kind begin every text with a token unless they say otherwise.
    pub(crate) fn adds_bos(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// Whether a word that is a token as a whole is taken so, without merging.
    pub(crate) fn ignores_merges(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// The normalizer in front.
    pub(super) fn normalizer(self) -> Value {
        match self {
            Self::Qwen2 => json!({"type": "NFC"}),
            _ => Value::Null,
        }
    }

    /// The pre-tokenizer: the split, then bytes as characters.
    pub(super) fn pre_tokenizer(self) -> Value {
        let mut steps = match self {
            Self::Default => vec![
                isolate(r"[\p{P}\$\+<=>\^~\|]+"),
                isolate(GPT2),
                isolate(r"\p{N}+"),
                isolate("[0-9][0-9][0-9]"),
            ],
            Self::Gpt2 => vec![isolate(GPT2)],
            Self::SmolLm => vec![isolate(r"\p{N}"), isolate(GPT2)],
            Self::Llama3 => vec![isolate(&format!(
                r"{CONTRACTIONS_OR_WORD}\p{{N}}{{1,3}}{PUNCTUATION_OR_SPACE}"
            ))],
            Self::Qwen2 => vec![isolate(&format!(
                r"{CONTRACTIONS_OR_WORD}\p{{N}}{PUNCTUATION_OR_SPACE}"
            ))],
            Self::Tekken => vec![isolate(TEKKEN)],
        };
        steps.push(json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
        }));
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// Each match a word of its own, and each stretch between matches.
fn isolate(pattern: &str) -> Value {
    json!({
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false
    })
}
