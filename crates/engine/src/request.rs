//! One request: what a caller asks for, and what it is told. What it is while it is computed: see
//! [`crate::sequence`].

use std::borrow::Cow;
use std::ops::ControlFlow;

use casemate_container::ModelDigest;

use crate::beam::BeamSearch;
use crate::constrain::Grammar;
use crate::error::RequestError;
use crate::logprobs::TokenLogprobs;
use crate::sampler::Sampling;

/// Most stop strings of one request.
pub const MAXIMUM_STOPS: usize = 16;
/// Longest stop string, in bytes.
pub const MAXIMUM_STOP_BYTES: usize = 1024;

/// Whose a request is. Requests of one user share what was computed for their common beginnings,
/// and take turns with other users' as one. What makes a user is the caller's business; two people
/// with one identity learn from the time of an answer, and from [`Event::Finished`], whether the
/// other's text began as their own.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct User([u8; 32]);

impl User {
    /// The user of this identity.
    #[must_use]
    pub const fn new(identity: [u8; 32]) -> Self {
        Self(identity)
    }
}

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
    /// Whose request it is. `None`: nobody's; it reuses nothing, nothing is kept of it, and it takes
    /// turns with all requests of nobody as if they were one user's.
    pub user: Option<User>,
    /// The adapter that is applied to every row of it. `None`: the model as it is.
    pub adapter: Option<ModelDigest>,
    /// Search for the likeliest answer instead of choosing token by token. Its tokens come all
    /// together when it is found. Only with the default of `sampling`, and without stop strings,
    /// log-probabilities and grammar.
    pub beams: Option<BeamSearch>,
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
        /// Those of them that had been computed for an earlier request of the same user.
        cached_tokens: usize,
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
                cached_tokens,
                completion_tokens,
            } => Event::Finished {
                reason,
                prompt_tokens,
                cached_tokens,
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
