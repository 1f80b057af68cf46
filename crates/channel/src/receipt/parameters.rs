//! What a receipt says of how an answer's tokens came about: how they were drawn, and what of the request had a hand in
//! that.

use std::num::NonZeroU32;

use casemate_release::Malformed;
use minicbor::{Decode, Encode};

use super::rule;
use super::wire::shortest_float;

/// How tokens were drawn, defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Share of probability that is drawn from.
    pub top_p: f32,
    /// Number of tokens that is drawn from; 0 for all.
    pub top_k: u32,
    /// Least probability relative to the likeliest token.
    pub min_p: f32,
    /// OpenAI's `presence_penalty`.
    pub presence_penalty: f32,
    /// OpenAI's `frequency_penalty`.
    pub frequency_penalty: f32,
    /// Divides logits of tokens that occurred; 1 for none.
    pub repetition_penalty: f32,
    /// Seed of the first choice; the next ones count up.
    pub seed: u64,
    /// Choices per prompt.
    pub choices: u32,
    /// Most tokens per choice; nothing where only the context bounds it.
    pub max_tokens: Option<u32>,
    /// What else of the request decided about tokens.
    pub steering: Steering,
}

impl Default for Parameters {
    /// What is in use where a request asks for nothing, with seed 0.
    fn default() -> Parameters {
        Parameters {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            choices: 1,
            max_tokens: None,
            steering: Steering::default(),
        }
    }
}

/// By what a request decided about tokens beside its prompt. Says which means were in force and how strong, never what they
/// held: a receipt is shown to others, and the request hash covers the contents.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Steering {
    /// `logit_bias`, if a token has one.
    pub bias: Option<Bias>,
    /// The form that answers must have, if `response_format` asks for one.
    pub format: Option<AnswerFormat>,
    /// The functions that could be called, if any.
    pub functions: Option<Functions>,
    /// Number of stop strings, if there are any.
    pub stop_strings: Option<NonZeroU32>,
}

/// What was added to the model's logits.
#[derive(Clone, Copy, Debug, PartialEq, Encode, Decode)]
#[cbor(array)]
pub struct Bias {
    /// Number of biased tokens.
    #[n(0)]
    pub tokens: NonZeroU32,
    /// Greatest absolute value of a bias.
    #[cbor(n(1), with = "shortest_float")]
    pub strongest: f32,
}

impl Bias {
    /// Of these biases; nothing of none.
    pub fn of(biases: impl ExactSizeIterator<Item = f32>) -> Option<Bias> {
        let tokens = u32::try_from(biases.len()).unwrap_or(u32::MAX);
        Some(Bias {
            tokens: NonZeroU32::new(tokens)?,
            strongest: biases.map(f32::abs).fold(0.0, f32::max),
        })
    }
}

/// A form that every answer must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum AnswerFormat {
    /// Any JSON object.
    #[n(1)]
    JsonObject,
    /// What a JSON Schema in the request allows, which may be one single text.
    #[n(2)]
    JsonSchema,
}

/// Functions that were offered to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(array)]
pub struct Functions {
    /// How many.
    #[n(0)]
    pub offered: NonZeroU32,
    /// What calls had to be; nothing where the model was free.
    #[n(1)]
    pub forced: Option<ForcedCall>,
    /// Calls after an answer's first were left out.
    #[n(2)]
    pub first_call_only: bool,
}

/// A call that every answer must be or, in the last case, what a call must be that the model makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum ForcedCall {
    /// Of any of the functions, with any arguments.
    #[n(1)]
    Any,
    /// Of one function that the request leaves, with any arguments.
    #[n(2)]
    One,
    /// Of that one, with arguments that a JSON Schema in the request allows.
    #[n(3)]
    OneBySchema,
    /// Of any of the functions; of one or more of them, with arguments that a JSON Schema in the request allows.
    #[n(4)]
    AnyBySchema,
    /// None: the model was free to call. If it did, the call was as in [`ForcedCall::AnyBySchema`].
    #[n(5)]
    IfAnyBySchema,
}

impl Parameters {
    pub(super) fn check(&self) -> Result<(), Malformed> {
        rule(
            self.choices >= 1,
            "receipt.parameters.choices",
            &self.choices,
            "at least 1",
        )?;
        for value in [
            self.temperature,
            self.top_p,
            self.min_p,
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
        ] {
            rule(
                value.is_finite(),
                "receipt.parameters",
                &value,
                "finite numbers",
            )?;
        }
        if let Some(bias) = &self.steering.bias {
            rule(
                bias.strongest.is_finite() && bias.strongest.is_sign_positive(),
                "receipt.parameters.logit_bias",
                &bias.strongest,
                "a finite absolute value",
            )?;
        }
        Ok(())
    }
}
