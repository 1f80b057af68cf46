//! Vocabularies in GGUF files, each with one fault, and the exact refusal.

mod support;

use casemate_import::{Fault, Unsupported};

use support::gguf::*;

#[test]
fn rejects_other_tokenizers_by_name() {
    let need = unsupported(|gguf| {
        gguf.set("tokenizer.ggml.model", STRING, string("bert"));
    });
    assert_eq!(
        need,
        Unsupported::TokenizerModel {
            name: "bert".into()
        }
    );
    let need = unsupported(|gguf| {
        gguf.set("tokenizer.ggml.model", STRING, string("gpt2"));
        gguf.set("tokenizer.ggml.pre", STRING, string("jais"));
    });
    assert_eq!(
        need,
        Unsupported::PreTokenizer {
            name: "jais".into()
        }
    );
}

#[test]
fn rejects_vocabularies_that_contradict_themselves() {
    let contradiction = fault(|gguf| {
        gguf.set("tokenizer.ggml.scores", ARRAY, array(F32, 1, &[0; 4]));
    });
    assert_eq!(
        contradiction,
        Fault::Contradiction {
            first: "`tokenizer.ggml.scores` has 1 entries".into(),
            second: "`tokenizer.ggml.tokens` has 265".into()
        }
    );
    let kinds: Vec<u8> = (0..265i32).flat_map(|_| 7i32.to_le_bytes()).collect();
    assert_eq!(
        fault(|gguf| {
            gguf.set("tokenizer.ggml.token_type", ARRAY, array(I32, 265, &kinds));
        }),
        Fault::OutOfRange {
            key: "tokenizer.ggml.token_type".into(),
            value: "7".into()
        }
    );
    for (name, what) in [
        ("bos", "the beginning-of-text token"),
        ("unknown", "the unknown token"),
        ("eos", "an end-of-text token"),
    ] {
        let fault = fault(|gguf| {
            gguf.set(
                &format!("tokenizer.ggml.{name}_token_id"),
                U32,
                265u32.to_le_bytes(),
            );
        });
        assert_eq!(
            fault,
            Fault::TokenId {
                what,
                id: 265,
                vocabulary: 265
            }
        );
    }
}

/// A vocabulary of these normal tokens with these scores, in place of the tiny model's.
fn pieces(gguf: &mut Gguf, tokens: &[&str], scores: &[f32]) {
    let count = tokens.len() as u64;
    gguf.set("tokenizer.ggml.tokens", ARRAY, strings(tokens));
    let kinds: Vec<u8> = tokens.iter().flat_map(|_| 1i32.to_le_bytes()).collect();
    gguf.set(
        "tokenizer.ggml.token_type",
        ARRAY,
        array(I32, count, &kinds),
    );
    let scores: Vec<u8> = scores
        .iter()
        .flat_map(|score| score.to_le_bytes())
        .collect();
    gguf.set("tokenizer.ggml.scores", ARRAY, array(F32, count, &scores));
}

#[test]
fn rejects_vocabularies_that_cannot_be_translated() {
    assert_eq!(
        fault(|gguf| pieces(gguf, &["a", "b", "a"], &[0.0; 3])),
        Fault::DuplicateToken {
            token: "a".into(),
            ids: (0, 2)
        }
    );
    assert_eq!(
        unsupported(|gguf| pieces(gguf, &["a", "b", "ab", "ba", "aa", "bb"], &[-1000.0; 6])),
        Unsupported::UnrankedPieces {
            results: 4,
            scores: 1
        }
    );
    assert_eq!(
        unsupported(|gguf| pieces(gguf, &["a", "b", "ax"], &[0.0, -1.0, -2.0])),
        Unsupported::OrphanPiece { piece: "ax".into() }
    );
    let fault = fault(|gguf| pieces(gguf, &["a", "b", "ab"], &[0.0, 0.0, f32::NAN]));
    assert_eq!(
        fault,
        Fault::OutOfRange {
            key: "score of \"ab\"".into(),
            value: "NaN".into()
        }
    );
}

#[test]
fn rejects_merges_of_what_is_not_a_token() {
    for (rule, index) in [("a c", 1), ("ab", 1), ("b a", 1)] {
        let fault = fault(|gguf| {
            pieces(gguf, &["a", "b", "ab"], &[0.0; 3]);
            gguf.set("tokenizer.ggml.model", STRING, string("gpt2"));
            gguf.set("tokenizer.ggml.merges", ARRAY, strings(&["a b", rule]));
        });
        assert_eq!(
            fault,
            Fault::Merge {
                index,
                rule: rule.into()
            }
        );
    }
}
