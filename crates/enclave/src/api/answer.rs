//! Response objects of both endpoints, whole and in pieces, and what the API leaves with an answer for receipts.

use std::sync::{Arc, OnceLock};

use casemate_channel::receipt::{self, Parameters, RequestId};

use serde_json::{Value, json};

/// Tokens read and written for one request.
#[derive(Default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
}

impl Usage {
    fn to_json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// What an answer was made with; an extension of its response.
#[derive(Clone)]
pub struct Served {
    /// The answer's id.
    pub id: RequestId,
    /// How tokens are drawn, defaults filled in.
    pub parameters: Parameters,
    /// Whether it has ended.
    pub ending: Ending,
}

/// Noted once the engine has finished an answer as it should; before the last piece of a stream leaves.
#[derive(Clone, Default)]
pub struct Ending(Arc<OnceLock<receipt::Usage>>);

impl Ending {
    pub(super) fn note(&self, usage: &Usage) {
        let _ = self.0.set(receipt::Usage {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
        });
    }

    /// Tokens read and written; nothing while the answer goes on, or if it ended early.
    pub fn usage(&self) -> Option<receipt::Usage> {
        self.0.get().copied()
    }
}

/// One finished answer.
#[derive(Default)]
pub(super) struct Choice {
    pub(super) text: String,
    pub(super) finish: Option<&'static str>,
}

/// A piece of a streamed answer.
pub(super) enum Delta<'a> {
    Text(&'a str),
    Finished(&'static str),
}

/// Which endpoint's objects are wanted.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Shape {
    Chat,
    Text,
}

/// What all objects of one answer share.
pub(super) struct Answer {
    pub(super) shape: Shape,
    pub(super) id: RequestId,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
}

impl Answer {
    fn object(&self, streamed: bool, choices: Value) -> Value {
        let object = match (self.shape, streamed) {
            (Shape::Chat, false) => "chat.completion",
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Text, _) => "text_completion",
        };
        json!({
            "id": self.id.as_str(),
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        })
    }

    /// The whole answer.
    pub(super) fn whole(&self, choices: &[Choice], usage: &Usage) -> Value {
        let choices = choices
            .iter()
            .enumerate()
            .map(|(index, choice)| match self.shape {
                Shape::Chat => json!({
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": null},
                    "logprobs": null,
                    "finish_reason": choice.finish,
                }),
                Shape::Text => json!({
                    "index": index,
                    "text": choice.text,
                    "logprobs": null,
                    "finish_reason": choice.finish,
                }),
            });
        let mut object = self.object(false, choices.collect());
        object["usage"] = usage.to_json();
        object
    }

    /// The first object of a streamed choice, which in chat names the role.
    pub(super) fn opening(&self, index: u32) -> Option<Value> {
        (self.shape == Shape::Chat).then(|| {
            let delta = json!({"role": "assistant", "content": "", "refusal": null});
            self.object(
                true,
                json!([{"index": index, "delta": delta, "logprobs": null, "finish_reason": null}]),
            )
        })
    }

    /// One piece of a streamed choice.
    pub(super) fn delta(&self, index: u32, delta: Delta<'_>) -> Value {
        let (text, finish) = match delta {
            Delta::Text(text) => (Some(text), None),
            Delta::Finished(reason) => (None, Some(reason)),
        };
        let choice = match self.shape {
            Shape::Chat => {
                let delta = text.map_or_else(|| json!({}), |text| json!({"content": text}));
                json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": finish})
            }
            Shape::Text => json!({
                "index": index, "text": text.unwrap_or(""), "logprobs": null, "finish_reason": finish,
            }),
        };
        self.object(true, json!([choice]))
    }

    /// The last object of a stream that asked for usage.
    pub(super) fn usage(&self, usage: &Usage) -> Value {
        let mut object = self.object(true, json!([]));
        object["usage"] = usage.to_json();
        object
    }
}
