//! What answers may be: which tokens may come next, from a machine over the bytes of the answer. The
//! tokens of the vocabulary lie in a trie, so that one walk decides about all of them and a byte
//! that is not allowed rules out every token that begins so.
//!
//! An answer that is constrained as a whole and ends by itself is one complete value: generation
//! stops with its last byte. It may be cut by the limit of tokens, and then says so. Free text with
//! calls in it is constrained from where a call begins to where it ends.

mod automaton;
mod calls;
mod schema;
mod texts;
mod trie;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use calls::{CallGrammar, OfferError, Offered};
pub use schema::SchemaError;
pub(crate) use trie::Trie;

use automaton::Automaton;
use calls::Calls;
use schema::Rules;
use trie::Machine;

use crate::tokenizer::Tokenizer;

/// Masks kept per request: inside of a string the state comes back to the same few.
const KEPT_MASKS: usize = 8;

/// What an answer may be. Cheap to clone.
#[derive(Clone)]
pub struct Grammar(Kind);

#[derive(Clone)]
enum Kind {
    Value(Rules),
    Call(CallGrammar),
    TextWithCalls(CallGrammar),
}

impl Grammar {
    /// Most bytes that a grammar takes: one of calls with all its functions. One of a schema takes a quarter.
    pub const MAX_BYTES: usize = calls::MAX_BYTES;

    /// The memory that it takes, in bytes, with what allocations add: at most [`Self::MAX_BYTES`]. Clones share
    /// it. A request holds it from when it is submitted to when its answer has ended.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Kind::Value(rules) => rules.bytes(),
            Kind::Call(calls) | Kind::TextWithCalls(calls) => calls.bytes(),
        }
    }

    /// Any JSON object.
    #[must_use]
    pub fn json_object() -> Self {
        Self(Kind::Value(Rules::json_object()))
    }

    /// What a schema describes; at its root, an object.
    ///
    /// # Errors
    /// [`SchemaError`]: a keyword that cannot be enforced, a schema that contradicts itself, or one that is too large.
    pub fn from_schema(schema: &Value) -> Result<Self, SchemaError> {
        Ok(Self(Kind::Value(Rules::from_schema(schema)?)))
    }

    /// One call, without the marks that stand around it.
    #[must_use]
    pub fn call(calls: CallGrammar) -> Self {
        Self(Kind::Call(calls))
    }

    /// Any text. Where a call begins in it, it is one of these.
    #[must_use]
    pub fn text_with_calls(calls: CallGrammar) -> Self {
        Self(Kind::TextWithCalls(calls))
    }

    /// Whether the answer is one value, so that nothing may cut it.
    pub(crate) fn is_whole(&self) -> bool {
        !matches!(self.0, Kind::TextWithCalls(_))
    }
}

/// The constraint of one request under way.
pub(crate) struct Constraint {
    state: State,
    trie: Arc<Trie>,
    /// The masks computed last, the youngest at the end; `None` allows every token.
    masks: Vec<(Snapshot, Option<Vec<u64>>)>,
}

enum State {
    Value(Automaton),
    Calls(Calls),
}

#[derive(PartialEq, Eq)]
enum Snapshot {
    Value(automaton::Snapshot),
    Calls(calls::Snapshot),
}

/// The vocabulary has no token that could come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stuck;

impl Constraint {
    pub(crate) fn new(grammar: Grammar, trie: Arc<Trie>) -> Self {
        let state = match grammar.0 {
            Kind::Value(rules) => State::Value(Automaton::new(rules)),
            Kind::Call(calls) => State::Calls(Calls::new(calls, true)),
            Kind::TextWithCalls(calls) => State::Calls(Calls::new(calls, false)),
        };
        Self {
            state,
            trie,
            masks: Vec::new(),
        }
    }

    /// One bit per token id: which may come next. `None` allows all.
    pub(crate) fn mask(&mut self) -> Result<Option<&[u64]>, Stuck> {
        let now = match &self.state {
            State::Calls(calls) if calls.is_idle(&self.trie) => return Ok(None),
            State::Calls(calls) => Snapshot::Calls(calls.snapshot()),
            State::Value(automaton) => Snapshot::Value(automaton.snapshot()),
        };
        match self.masks.iter().position(|(state, _)| *state == now) {
            Some(at) => {
                let kept = self.masks.remove(at);
                self.masks.push(kept);
            }
            None => {
                let oldest = (self.masks.len() == KEPT_MASKS).then(|| self.masks.remove(0).1);
                let mask = self.compute(oldest.flatten().unwrap_or_default());
                self.masks.push((now, mask));
            }
        }
        let mask = self.masks.last().and_then(|(_, mask)| mask.as_deref());
        match mask {
            Some(mask) if mask.iter().all(|&word| word == 0) => Err(Stuck),
            mask => Ok(mask),
        }
    }

    fn compute(&mut self, mut mask: Vec<u64>) -> Option<Vec<u64>> {
        let trie = &self.trie;
        let binds = match &mut self.state {
            State::Calls(calls) if calls.is_free() => {
                // A token may go on where a call begins.
                trie.mask_of_refused(calls, |calls| calls.is_idle(trie), &mut mask)
            }
            State::Calls(calls) => {
                trie.mask(calls, &mut mask);
                true
            }
            State::Value(automaton) => {
                trie.mask(automaton, &mut mask);
                true
            }
        };
        binds.then_some(mask)
    }

    /// Whether the answer may end here, by an end token.
    pub(crate) fn may_end(&self) -> bool {
        match &self.state {
            State::Value(_) => false,
            State::Calls(calls) => calls.is_free(),
        }
    }

    /// Takes the bytes of the token that was chosen. `true`: the value is complete.
    pub(crate) fn accept(&mut self, bytes: &[u8]) -> Result<bool, Stuck> {
        match &mut self.state {
            State::Value(automaton) => {
                for &byte in bytes {
                    automaton.step(byte).ok_or(Stuck)?;
                }
                Ok(automaton.is_complete())
            }
            State::Calls(calls) => {
                for &byte in bytes {
                    calls.step(byte).ok_or(Stuck)?;
                }
                Ok(calls.is_complete())
            }
        }
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
mod call_tests;
#[cfg(test)]
mod size_tests;
#[cfg(test)]
mod tests;
