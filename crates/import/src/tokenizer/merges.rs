//! Merge rules from scores or ranks.
//!
//! SentencePiece and tiktoken keep no rules: any two neighbours whose joined text is a token may merge, the best
//! token first and the leftmost of equals. The `tokenizers` library wants ordered pairs. The translation lists, for
//! each token from best to worst, every way to cut it into two tokens. Texts encode the same, except where one token
//! could arise from two overlapping pairs at once (`a·aa·a` for `aaa`): there the leftmost pair wins in the
//! originals, the first rule here. Tests compare both on real and on hostile text.

use std::collections::{HashMap, HashSet};

use super::{Kind, Pieces};
use crate::error::{Fault, Problem, Unsupported};

/// Rules for SentencePiece pieces, best score first.
pub(super) fn from_scores(
    pieces: &Pieces,
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(String, String)>, Problem> {
    let normal = |id: u32| pieces.tokens[id as usize].kind == Kind::Normal;
    let mut results: Vec<(f32, &str)> = Vec::new();
    for (token, score) in pieces.tokens.iter().zip(&pieces.scores) {
        if token.kind == Kind::Normal && token.text.chars().nth(1).is_some() {
            if score.is_nan() {
                return Err(Fault::OutOfRange {
                    key: format!("score of {:?}", token.text),
                    value: score.to_string(),
                }
                .into());
            }
            results.push((*score, &token.text));
        }
    }
    // Stable: of equal scores the smaller id comes first.
    results.sort_by(|a, b| b.0.total_cmp(&a.0));
    let scores = results
        .iter()
        .map(|(score, _)| score.to_bits())
        .collect::<HashSet<_>>()
        .len();
    if scores * 2 < results.len() {
        return Err(Unsupported::UnrankedPieces {
            results: results.len(),
            scores,
        }
        .into());
    }
    let mut rules = Vec::new();
    for (_, text) in results {
        let before = rules.len();
        cut(
            text,
            |part| ids.get(part).is_some_and(|id| normal(*id)),
            &mut rules,
        );
        if rules.len() == before && has_orphan_cut(text, ids) {
            return Err(Unsupported::OrphanPiece {
                piece: text.to_owned(),
            }
            .into());
        }
    }
    Ok(rules)
}

/// Rules for byte-level tokens in order of rank.
pub(super) fn from_ranks(tokens: &[String]) -> Vec<(String, String)> {
    let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    let mut rules = Vec::new();
    for text in tokens {
        cut(text, |part| known.contains(part), &mut rules);
    }
    rules
}

/// Appends every cut of `text` into two known parts.
fn cut(text: &str, known: impl Fn(&str) -> bool, rules: &mut Vec<(String, String)>) {
    for (at, _) in text.char_indices().skip(1) {
        let (left, right) = text.split_at(at);
        if known(left) && known(right) {
            rules.push((left.to_owned(), right.to_owned()));
        }
    }
}

/// Whether SentencePiece could make `text` from a character that is not a piece, which merge rules cannot say.
fn has_orphan_cut(text: &str, ids: &HashMap<&str, u32>) -> bool {
    let possible = |part: &str| ids.contains_key(part) || part.chars().nth(1).is_none();
    text.char_indices().skip(1).any(|(at, _)| {
        let (left, right) = text.split_at(at);
        possible(left) && possible(right) && !(ids.contains_key(left) && ids.contains_key(right))
    })
}
