//! From prompt to streamed tokens on the CPU: tokenizer, chat template, model, KV cache, sampler,
//! constraints on answers, and scheduler.
//!
//! [`Engine::load`] takes a model that `casemate-container` has verified, [`Engine::submit`] a
//! [`Request`] and a sink for its [`Event`]s. Requests are computed together and never influence
//! each other's tokens: the kernels give the same bits whatever else is in the batch and however
//! many threads compute it.
//!
//! What is not here: files, sockets, OpenAI's API (the enclave's), how keys reach the machine, and
//! whether a product is computed here or by somebody else: linear layers go through
//! [`linear::LinearLayer`], and [`outsource`] is where somebody else comes in.

#![forbid(unsafe_code)]

mod adapters;
mod beam;
pub mod chat;
mod constrain;
mod control;
mod dequant;
mod engine;
mod error;
mod kv;
pub mod linear;
mod logprobs;
mod model;
pub mod outsource;
mod request;
mod rope;
pub mod sampler;
mod scheduler;
mod sequence;
mod speculation;
mod stop;
#[cfg(test)]
mod testing;
mod tokenizer;
mod weights;

pub use beam::{BeamSearch, MAXIMUM_BEAMS};
pub use casemate_kernels::attention::KvType;
pub use chat::{CallFormat, ChatError, ChatMessage, ChatTemplate, FunctionCall, ToolCall};
pub use constrain::{CallGrammar, Grammar, MaskMeter, OfferError, Offered, SchemaError};
pub use control::{ControlNameError, ControlNames, Prompt};
pub use dequant::dequantise;
pub use engine::{Engine, EngineOptions, Stats};
pub use error::{LoadError, RequestError, SubmitError};
pub use logprobs::{MAXIMUM_TOP, TokenLogprobs};
pub use request::{
    Event, FinishReason, MAXIMUM_STOP_BYTES, MAXIMUM_STOPS, Request, RequestId, Sink, User,
};
pub use sampler::{InvalidSampling, Sampling};
pub use speculation::Speculation;
pub use tokenizer::{StreamDecoder, Tokenizer, TokenizerError};
pub use weights::Compute;
