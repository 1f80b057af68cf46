//! Answers that can only be JSON: which tokens may come next, from an automaton over the bytes of
//! the answer. The tokens of the vocabulary lie in a trie, so that one walk decides about all of
//! them and a byte that is not allowed rules out every token that begins so.
//!
//! A constrained answer that ends by itself is one complete value: generation stops with its last
//! byte. It may be cut by the limit of tokens, and then says so.

mod automaton;
mod schema;
mod trie;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use schema::{Grammar, SchemaError};
pub(crate) use trie::Trie;

use automaton::{Automaton, Snapshot};

use crate::tokenizer::Tokenizer;

/// Masks kept per request: inside of a string the state comes back to the same few.
const KEPT_MASKS: usize = 8;

/// The constraint of one request under way.
pub(crate) struct Constraint {
    automaton: Automaton,
    trie: Arc<Trie>,
    /// The masks computed last, the youngest at the end.
    masks: Vec<(Snapshot, Vec<u64>)>,
}

/// The vocabulary has no token that could come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stuck;

impl Constraint {
    pub(crate) fn new(grammar: Grammar, trie: Arc<Trie>) -> Self {
        Self {
            automaton: Automaton::new(grammar),
            trie,
            masks: Vec::new(),
        }
    }

    /// One bit per token id: which may come next.
    pub(crate) fn mask(&mut self) -> Result<&[u64], Stuck> {
        let now = self.automaton.snapshot();
        match self.masks.iter().position(|(state, _)| *state == now) {
            Some(at) => {
                let kept = self.masks.remove(at);
                self.masks.push(kept);
            }
            None => {
                let mut mask = if self.masks.len() == KEPT_MASKS {
                    self.masks.remove(0).1
                } else {
                    Vec::new()
                };
                self.trie.mask(&mut self.automaton, &mut mask);
                self.masks.push((now, mask));
            }
        }
        let mask = self.masks.last().map_or(&[][..], |(_, mask)| mask);
        if mask.iter().all(|&word| word == 0) {
            return Err(Stuck);
        }
        Ok(mask)
    }

    /// Takes the bytes of the token that was chosen. `true`: the value is complete.
    pub(crate) fn accept(&mut self, bytes: &[u8]) -> Result<bool, Stuck> {
        for &byte in bytes {
            self.automaton.step(byte).ok_or(Stuck)?;
        }
        Ok(self.automaton.is_complete())
    }
}

/// Measures what masks cost, without a model.
pub struct MaskMeter {
    tokenizer: Tokenizer,
    trie: Arc<Trie>,
}

impl MaskMeter {
    /// Prepares the vocabulary.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, vocab: u32) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            trie: tokenizer.trie(vocab),
        }
    }

    /// The time that the mask before each token took, as far as the grammar takes the tokens.
    /// `keep` uses masks again as requests do.
    pub fn times(&mut self, grammar: &Grammar, tokens: &[u32], keep: bool) -> Vec<Duration> {
        let mut constraint = Constraint::new(grammar.clone(), Arc::clone(&self.trie));
        let mut times = Vec::with_capacity(tokens.len());
        for &id in tokens {
            if !keep {
                constraint.masks.clear();
            }
            let started = Instant::now();
            let mask = constraint.mask().is_ok();
            times.push(started.elapsed());
            if !mask || constraint.accept(self.tokenizer.token_bytes(id)).is_err() {
                break;
            }
        }
        times
    }
}

#[cfg(test)]
mod tests;
