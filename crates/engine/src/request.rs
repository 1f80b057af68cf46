//! One request: what a caller asks for, what it is told, and the state between its tokens. Which
//! requests run together is the scheduler's business.

use std::borrow::Cow;
use std::ops::ControlFlow;

use crate::constrain::{Constraint, Grammar};
use crate::error::{RequestError, SubmitError};
use crate::kv::Slot;
use crate::logprobs::{MAXIMUM_TOP, TokenLogprobs};
use crate::sampler::{Sampler, Sampling, Scratch};
use crate::stop::StopMatcher;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// Most stop strings of one request.
pub const MAXIMUM_STOPS: usize = 16;
/// Longest stop string, in bytes.
pub const MAXIMUM_STOP_BYTES: usize = 1024;

/// Bytes that hold the text of nearly every token.
const USUAL_PIECE: usize = 256;

/// What to generate.
#[derive(Clone, Default)]
pub struct Request {
    /// Token ids, at least one. `Tokenizer::encode` makes them.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; the rest of the context is used where it is smaller.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The answer ends before the first of these strings.
    pub stop: Vec<String>,
    /// Token ids that end the answer besides the model's own end tokens.
    pub stop_tokens: Vec<u32>,
    /// Go on after end tokens. For measurements.
    pub ignore_end: bool,
    /// Tell how likely each token was, beside so many of the likeliest ones.
    pub logprobs: Option<usize>,
    /// The answer can only be this. If that is one value, the answer ends with the last byte of it,
    /// and end tokens and stop strings play no part.
    pub grammar: Option<Grammar>,
}

/// Names a request while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

/// What a request's sink receives: one `Token` for each generated token, then one `Finished`. It
/// borrows from the engine, which allocates nothing for a token; who keeps an event takes a copy by
/// [`Event::into_owned`].
#[derive(Clone, Debug, PartialEq)]
pub enum Event<'a> {
    /// The next token.
    Token {
        /// Its id; the last one may be an end token.
        id: u32,
        /// Text that is now certain. Empty while a character or a stop string may be incomplete;
        /// the last event carries what was held back.
        text: Cow<'a, str>,
        /// Where they were asked for, unless the token is an end token.
        logprobs: Option<Cow<'a, TokenLogprobs>>,
    },
    /// Nothing follows.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// Tokens generated: the number of `Token` events.
        completion_tokens: usize,
    },
}

impl Event<'_> {
    /// The same, for as long as it is needed.
    #[must_use]
    pub fn into_owned(self) -> Event<'static> {
        match self {
            Event::Token { id, text, logprobs } => Event::Token {
                id,
                text: Cow::Owned(text.into_owned()),
                logprobs: logprobs.map(|l| Cow::Owned(l.into_owned())),
            },
            Event::Finished {
                reason,
                prompt_tokens,
                completion_tokens,
            } => Event::Finished {
                reason,
                prompt_tokens,
                completion_tokens,
            },
        }
    }
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop string, or the end of what a grammar describes.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// [`crate::Engine::cancel`], or the engine was dropped.
    Cancelled,
    /// It failed.
    Error(RequestError),
}

/// Receives a request's events on the engine's thread, so it must not block. `Break` cancels the
/// request; the sink is then dropped without another call.
pub type Sink = Box<dyn FnMut(Event<'_>) -> ControlFlow<()> + Send>;

/// Limits a request is checked against.
pub(crate) struct Limits<'a> {
    pub(crate) context: usize,
    pub(crate) vocab: u32,
    pub(crate) end_tokens: &'a [u32],
}

/// A request under way.
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    prompt: usize,
    /// How many of `tokens` the KV cache holds.
    fed: usize,
    /// Largest length of `tokens`.
    limit: usize,
    end_tokens: Vec<u32>,
    sampler: Sampler,
    decoder: StreamDecoder,
    stops: StopMatcher,
    logprobs: Option<usize>,
    constraint: Option<Box<Constraint>>,
    tokenizer: Tokenizer,
    sink: Sink,
    /// What the event at hand lends to the sink; kept for their memory.
    told: Told,
    pub(crate) slot: Option<Slot>,
    /// It has ended; the scheduler removes it.
    pub(crate) over: bool,
}

/// The last token's text before and after stop strings were looked for, and its likelihood.
#[derive(Default)]
struct Told {
    piece: String,
    text: String,
    logprobs: TokenLogprobs,
}

/// What became of a request with its new logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advance {
    Continue,
    /// It is over and the sink knows, or broke off.
    Over,
    /// As `Over`, by an error.
    Failed,
}

impl Sequence {
    /// Checks a request.
    pub(crate) fn new(
        id: RequestId,
        request: Request,
        limits: &Limits<'_>,
        tokenizer: &Tokenizer,
        sink: Sink,
    ) -> Result<Self, SubmitError> {
        let Request {
            prompt: mut tokens,
            max_tokens,
            sampling,
            stop,
            mut stop_tokens,
            ignore_end,
            logprobs,
            grammar,
        } = request;
        let prompt = tokens.len();
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if prompt >= limits.context {
            return Err(SubmitError::PromptTooLong {
                prompt,
                context: limits.context,
            });
        }
        if let Some(&id) = tokens.iter().find(|&&id| id >= limits.vocab) {
            return Err(SubmitError::UnknownToken {
                id,
                vocab: limits.vocab,
            });
        }
        if max_tokens == 0 {
            return Err(SubmitError::NothingToGenerate);
        }
        if stop.len() > MAXIMUM_STOPS
            || stop
                .iter()
                .any(|s| s.is_empty() || s.len() > MAXIMUM_STOP_BYTES)
        {
            return Err(SubmitError::Stops {
                count: MAXIMUM_STOPS,
                bytes: MAXIMUM_STOP_BYTES,
            });
        }
        if let Some(top) = logprobs.filter(|&top| top > MAXIMUM_TOP) {
            return Err(SubmitError::Logprobs {
                asked: top,
                most: MAXIMUM_TOP,
            });
        }
        if let Some(&(id, _)) = sampling.bias.iter().find(|&&(id, _)| id >= limits.vocab) {
            return Err(SubmitError::UnknownToken {
                id,
                vocab: limits.vocab,
            });
        }
        if grammar.as_ref().is_some_and(Grammar::is_whole) && !stop.is_empty() {
            return Err(SubmitError::StopWithGrammar);
        }
        let constraint =
            grammar.map(|grammar| Box::new(Constraint::new(grammar, tokenizer.trie(limits.vocab))));
        let generate = max_tokens.min(limits.context - prompt);
        let sampler = Sampler::new(sampling, &tokens, generate)?;
        tokens.reserve_exact(generate);
        if !ignore_end {
            stop_tokens.extend_from_slice(limits.end_tokens);
        }
        Ok(Self {
            id,
            limit: prompt + generate,
            tokens,
            prompt,
            fed: 0,
            end_tokens: stop_tokens,
            sampler,
            decoder: tokenizer.stream(),
            stops: StopMatcher::new(stop),
            logprobs,
            constraint,
            tokenizer: tokenizer.clone(),
            sink,
            told: Told {
                piece: String::with_capacity(USUAL_PIECE),
                text: String::with_capacity(USUAL_PIECE),
                logprobs: TokenLogprobs::default(),
            },
            slot: None,
            over: false,
        })
    }

    /// Positions that it may come to need in the KV cache. The last token is never fed.
    pub(crate) fn positions(&self) -> usize {
        self.limit - 1
    }

    /// Tokens known but not yet in the KV cache; never empty while it runs.
    pub(crate) fn unfed(&self) -> &[u32] {
        &self.tokens[self.fed..]
    }

    /// Position of the first unfed token.
    pub(crate) fn fed(&self) -> usize {
        self.fed
    }

    /// Records that the next `count` tokens are in the KV cache. Returns how many of them belong to
    /// the prompt.
    pub(crate) fn feed(&mut self, count: usize) -> usize {
        let of_prompt = count.min(self.prompt.saturating_sub(self.fed));
        self.fed += count;
        of_prompt
    }

    /// Tokens of the prompt, and generated ones.
    pub(crate) fn lengths(&self) -> (usize, usize) {
        (self.prompt, self.completion_tokens())
    }

    fn completion_tokens(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Chooses the next token and tells the sink.
    pub(crate) fn advance(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Advance {
        if self.logprobs.is_some() {
            scratch.row.keep(logits);
        }
        let Ok(allowed) = self
            .constraint
            .as_deref_mut()
            .map(Constraint::mask)
            .transpose()
        else {
            return self.fail(RequestError::Vocabulary);
        };
        let Ok(id) = self.sampler.sample(logits, allowed.flatten(), scratch) else {
            return self.fail(RequestError::NonFinite);
        };
        self.tokens.push(id);
        let may_end = self.constraint.as_ref().is_none_or(|c| c.may_end());
        let silent = may_end && self.end_tokens.contains(&id);
        let ended = match &mut self.constraint {
            Some(constraint) if !silent => {
                match constraint.accept(self.tokenizer.token_bytes(id)) {
                    Ok(complete) => complete,
                    Err(_) => return self.fail(RequestError::Internal),
                }
            }
            _ => silent,
        };
        let Told {
            piece,
            text,
            logprobs,
        } = &mut self.told;
        let logprobs = match self.logprobs {
            Some(top) if !silent => {
                scratch.row.logprobs(id, top, logprobs);
                Some(Cow::Borrowed(&*logprobs))
            }
            _ => None,
        };
        piece.clear();
        text.clear();
        if !silent {
            self.decoder.push_onto(id, piece);
        }
        let stopped = self.stops.push(piece, text) || ended;
        let full = self.tokens.len() == self.limit;
        if (ended || (full && !stopped)) && !self.stops.push(self.decoder.finish(), text) {
            self.stops.finish(text);
        }
        let text = Cow::Borrowed(text.as_str());
        if (self.sink)(Event::Token { id, text, logprobs }).is_break() {
            return Advance::Over;
        }
        match (stopped, full) {
            (true, _) => self.finish(FinishReason::Stop),
            (false, true) => self.finish(FinishReason::Length),
            (false, false) => return Advance::Continue,
        }
        Advance::Over
    }

    fn fail(&mut self, error: RequestError) -> Advance {
        self.finish(FinishReason::Error(error));
        Advance::Failed
    }

    /// Tells the sink that it is over.
    pub(crate) fn finish(&mut self, reason: FinishReason) {
        let finished = Event::Finished {
            reason,
            prompt_tokens: self.prompt,
            completion_tokens: self.completion_tokens(),
        };
        let _: ControlFlow<()> = (self.sink)(finished);
    }
}
