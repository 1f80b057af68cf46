//! What can go wrong, sorted by who is at fault: the model (at load), the caller (at submission),
//! or this machine.

use std::io;

use casemate_container::{AdapterMismatch, DType, ModelDigest};

use crate::chat::ChatError;
use crate::sampler::InvalidSampling;
use crate::tokenizer::TokenizerError;

/// Why a model was not loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The configuration contradicts itself or exceeds what the engine supports.
    #[error("the model's configuration is not usable: {field} is {value}, but {rule}")]
    Config {
        /// The field at fault.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it would have to fulfil.
        rule: &'static str,
    },
    /// A tensor that the configuration implies is absent.
    #[error("the model has no tensor {name}")]
    MissingTensor {
        /// Its canonical name.
        name: String,
    },
    /// A tensor that the configuration does not imply: using the model without it could give wrong
    /// answers.
    #[error("the model has a tensor {name}, which its configuration does not explain")]
    UnknownTensor {
        /// Its name.
        name: String,
    },
    /// A tensor's shape is not what the configuration implies.
    #[error("tensor {name} has shape {found:?}, but the configuration implies {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// In the manifest.
        found: Vec<u64>,
        /// From the configuration.
        expected: Vec<u64>,
    },
    /// A tensor's length does not match its shape and encoding, or its rows are not whole blocks.
    #[error("tensor {name} of shape {shape:?} in {dtype:?} cannot have {bytes} bytes")]
    Size {
        /// Its name.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its encoding.
        dtype: DType,
        /// Found.
        bytes: u64,
    },
    /// A tensor holds a NaN or an infinity.
    #[error("tensor {name} holds a value that is not finite")]
    NonFinite {
        /// Its name.
        name: String,
    },
    /// Only products in int8 by rows are exact, whoever computes them.
    #[error("only compute \"int8-row\" can be offloaded, not {compute}")]
    Outsource {
        /// The arithmetic's name.
        compute: &'static str,
    },
    /// What is guessed is told by which rows are computed.
    #[error(
        "oblivious computing does not go with speculation \"prompt-lookup\": guesses are looked up by tokens"
    )]
    Guesses,
    /// An adapter to another model than the one that it should be applied to.
    #[error("adapter {adapter} is for the model {base}, but the model is {model}")]
    OtherBase {
        /// The adapter.
        adapter: ModelDigest,
        /// What its manifest names.
        base: ModelDigest,
        /// The model that was loaded.
        model: ModelDigest,
    },
    /// An adapter whose tensors do not fit its base.
    #[error("the adapter does not fit: {0}")]
    Adapter(AdapterMismatch),
    /// The same adapter under two names.
    #[error("adapter {adapter} is there twice")]
    AdapterTwice {
        /// The adapter.
        adapter: ModelDigest,
    },
    /// An asset that the engine needs is absent.
    #[error("the model has no asset {name}")]
    MissingAsset {
        /// Its name.
        name: &'static str,
    },
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be used.
    #[error(transparent)]
    ChatTemplate(#[from] ChatError),
    /// An engine option is out of range.
    #[error("engine option {option} is {value}, but {rule}")]
    Option {
        /// The option.
        option: &'static str,
        /// What was given.
        value: u64,
        /// What it would have to fulfil.
        rule: &'static str,
    },
    /// An arithmetic for 4-bit weights, and a model without any.
    #[error(
        "the arithmetic q4-g32 is for 4-bit weights (Q4_0, Q4_1 or Q4_K), of which the model has none: \
         use int8 or convert the model"
    )]
    NoFourBits,
    /// The memory set aside for keys and values is less than one full context needs.
    #[error(
        "one context of {context} tokens needs {needed} bytes of KV cache, but {given} are allowed"
    )]
    KvBudget {
        /// Tokens.
        context: usize,
        /// Bytes.
        needed: u64,
        /// Bytes.
        given: u64,
    },
    /// The machine refused memory or threads.
    #[error("the machine refused memory or threads: {0}")]
    System(#[from] io::Error),
}

/// Why a request was not accepted. Nothing was computed for it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {prompt} tokens, but the context holds {context}, one of them for the answer"
    )]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt: usize,
        /// Tokens in the context.
        context: usize,
    },
    /// The prompt names a token that the model does not have.
    #[error("the prompt has token id {id}, but the vocabulary has {vocab} entries")]
    UnknownToken {
        /// The id.
        id: u32,
        /// The vocabulary.
        vocab: u32,
    },
    /// The request names an adapter that was not loaded.
    #[error("there is no adapter {adapter}")]
    UnknownAdapter {
        /// What it names.
        adapter: ModelDigest,
    },
    /// No token may be generated.
    #[error("at least one token must be asked for")]
    NothingToGenerate,
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
    /// Too many stop strings, or one that is empty or too long.
    #[error("at most {count} stop strings of 1 to {bytes} bytes each are possible")]
    Stops {
        /// Strings.
        count: usize,
        /// Bytes in each.
        bytes: usize,
    },
    /// More alternatives than are computed.
    #[error(
        "log-probabilities of {asked} alternatives were asked for, but at most {most} are possible"
    )]
    Logprobs {
        /// Alternatives.
        asked: usize,
        /// Alternatives.
        most: usize,
    },
    /// A stop string could cut what the grammar promises to be whole.
    #[error("stop strings cannot be combined with a grammar")]
    StopWithGrammar,
    /// More beams than run together, or none.
    #[error("{asked} beams were asked for, but 1 to {most} are possible")]
    Beams {
        /// Beams.
        asked: usize,
        /// Beams.
        most: usize,
    },
    /// The exponent of a beam search is out of range.
    #[error("length_penalty is {0}, but must be from -10 to 10")]
    LengthPenalty(f32),
    /// The vocabulary does not have enough tokens to fill the beams.
    #[error("so many beams need a vocabulary of {least} tokens, but it has {vocab}")]
    BeamsOfVocabulary {
        /// Tokens.
        least: usize,
        /// Tokens.
        vocab: u32,
    },
    /// Beams are searched by the model's own probabilities alone.
    #[error(
        "beam search cannot be combined with sampling, penalties, biases, stop strings, log-probabilities or a grammar"
    )]
    BeamsWithOthers,
    /// The KV cache could not hold the request even if nothing else ran.
    #[error("{beams} beams of this length need {needed} bytes of KV cache, but there are {given}")]
    KvMemory {
        /// Beams.
        beams: usize,
        /// Bytes.
        needed: u64,
        /// Bytes.
        given: u64,
    },
    /// As many requests wait as may wait, of all users or of this one.
    #[error("{waiting} requests are already waiting")]
    Busy {
        /// Requests, of all users or, where others may still come, of this one.
        waiting: usize,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Stopped,
}

/// Why an accepted request ended without its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The model's arithmetic gave values that are not finite.
    #[error("the model computed values that are not finite")]
    NonFinite,
    /// The vocabulary has no token that its grammar allows.
    #[error("the model's vocabulary cannot write what the grammar demands")]
    Vocabulary,
    /// A fault in the engine; other requests go on.
    #[error("internal error")]
    Internal,
}
