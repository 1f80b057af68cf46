//! Response objects of both endpoints, whole and in pieces, and what the API leaves with an answer for receipts.

use std::sync::{Arc, OnceLock};

use casemate_channel::receipt::{self, Parameters, RequestId};

use casemate_container::ModelDigest;
use casemate_engine::{TokenLogprobs, Tokenizer};
use serde_json::{Map, Value, json};

use super::calls::Call;
use super::extraction::NOT_SHOWN;

/// Tokens read and written for one request.
#[derive(Default)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u64,
    /// Tokens of prompts that had been computed for earlier requests.
    pub(super) cached_tokens: u64,
    pub(super) completion_tokens: u64,
}

impl Usage {
    fn to_json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// What an answer was made with; an extension of its response.
#[derive(Clone)]
pub struct Served {
    /// The answer's id.
    pub id: RequestId,
    /// The adapter that was applied, if one was.
    pub adapter: Option<ModelDigest>,
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

/// How likely a token was, as far as the policy shows it.
pub(super) struct Likelihood {
    token: Scored,
    top: Vec<Scored>,
    /// Characters of the answer before it.
    offset: usize,
}

/// A token with its rounded log-probability.
struct Scored {
    text: String,
    /// `None` for control tokens, which are no text.
    bytes: Option<Vec<u8>>,
    logprob: f64,
}

impl Likelihood {
    /// Of token `id` and the `most` likeliest; `shown` is what is shown of a token's value.
    pub(super) fn new(
        id: u32,
        logprobs: &TokenLogprobs,
        most: usize,
        shown: impl Fn(u32, f32) -> f64,
        tokenizer: &Tokenizer,
        offset: usize,
    ) -> Self {
        let token = |id, logprob| {
            let bytes = tokenizer.token_bytes(id);
            let (text, bytes) = if bytes.is_empty() {
                (tokenizer.token_name(id).unwrap_or_default(), None)
            } else {
                (
                    String::from_utf8_lossy(bytes).into_owned(),
                    Some(bytes.to_vec()),
                )
            };
            Scored {
                text,
                bytes,
                logprob,
            }
        };
        let chosen = match logprobs.top.iter().any(|&(likely, _)| likely == id) {
            true => shown(id, logprobs.chosen),
            false => NOT_SHOWN,
        };
        let likeliest = logprobs.top.iter().take(most);
        let mut top: Vec<(u32, f64)> = likeliest
            .map(|&(id, logprob)| (id, shown(id, logprob)))
            .collect();
        // The order must not tell what noise and rounding hide.
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        Self {
            token: token(id, chosen),
            top: top
                .into_iter()
                .map(|(id, logprob)| token(id, logprob))
                .collect(),
            offset,
        }
    }
}

impl Scored {
    fn to_json(&self) -> Value {
        json!({"token": self.text, "logprob": self.logprob, "bytes": self.bytes})
    }
}

/// A part of an answer, or all of it.
#[derive(Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) calls: Vec<Call>,
    pub(super) likelihoods: Vec<Likelihood>,
}

impl Piece {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.calls.is_empty() && self.likelihoods.is_empty()
    }

    pub(super) fn append(&mut self, other: Self) {
        self.text.push_str(&other.text);
        self.calls.extend(other.calls);
        self.likelihoods.extend(other.likelihoods);
    }
}

/// One finished answer.
#[derive(Default)]
pub(super) struct Choice {
    pub(super) piece: Piece,
    pub(super) finish: Option<&'static str>,
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
    /// Sent again, it repeats the answer.
    pub(super) seed: i64,
    /// Whether log-probabilities were asked for.
    pub(super) logprobs: bool,
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
            "seed": self.seed,
            "choices": choices,
        })
    }

    fn logprobs(&self, likelihoods: &[Likelihood]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        if self.shape == Shape::Chat {
            let content: Vec<Value> = likelihoods
                .iter()
                .map(|likelihood| {
                    let mut token = likelihood.token.to_json();
                    token["top_logprobs"] = likelihood.top.iter().map(Scored::to_json).collect();
                    token
                })
                .collect();
            return json!({"content": content, "refusal": null});
        }
        let column =
            |f: &dyn Fn(&Likelihood) -> Value| -> Value { likelihoods.iter().map(f).collect() };
        json!({
            "tokens": column(&|l| json!(l.token.text)),
            "token_logprobs": column(&|l| json!(l.token.logprob)),
            "top_logprobs": column(&|l| {
                let top = l.top.iter().map(|t| (t.text.clone(), json!(t.logprob)));
                Value::Object(top.collect::<Map<_, _>>())
            }),
            "text_offset": column(&|l| json!(l.offset)),
        })
    }

    /// The whole answer.
    pub(super) fn whole(&self, choices: &[Choice], usage: &Usage) -> Value {
        let choices =
            choices
                .iter()
                .enumerate()
                .map(|(index, Choice { piece, finish })| match self.shape {
                    Shape::Chat => {
                        let content = match (piece.text.is_empty(), piece.calls.is_empty()) {
                            (true, false) => Value::Null,
                            _ => json!(piece.text),
                        };
                        let mut message =
                            json!({"role": "assistant", "content": content, "refusal": null});
                        if !piece.calls.is_empty() {
                            message["tool_calls"] = piece.calls.iter().map(Call::to_json).collect();
                        }
                        json!({
                            "index": index,
                            "message": message,
                            "logprobs": self.logprobs(&piece.likelihoods),
                            "finish_reason": finish,
                        })
                    }
                    Shape::Text => json!({
                        "index": index,
                        "text": piece.text,
                        "logprobs": self.logprobs(&piece.likelihoods),
                        "finish_reason": finish,
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

    /// One piece of a streamed choice; `calls_before` were in earlier pieces.
    pub(super) fn delta(&self, index: u32, piece: &Piece, calls_before: usize) -> Value {
        let logprobs = match piece.likelihoods.is_empty() {
            true => Value::Null,
            false => self.logprobs(&piece.likelihoods),
        };
        self.streamed(index, piece, calls_before, logprobs, None)
    }

    /// The end of a streamed choice.
    pub(super) fn finished(&self, index: u32, reason: &'static str) -> Value {
        self.streamed(index, &Piece::default(), 0, Value::Null, Some(reason))
    }

    fn streamed(
        &self,
        index: u32,
        piece: &Piece,
        calls_before: usize,
        logprobs: Value,
        finish: Option<&'static str>,
    ) -> Value {
        let choice = match self.shape {
            Shape::Chat => {
                let mut delta = json!({});
                if !piece.text.is_empty() {
                    delta["content"] = json!(piece.text);
                }
                if !piece.calls.is_empty() {
                    let calls = piece.calls.iter().zip(calls_before..).map(|(call, n)| {
                        let mut call = call.to_json();
                        call["index"] = json!(n);
                        call
                    });
                    delta["tool_calls"] = calls.collect();
                }
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
            }
            Shape::Text => json!({
                "index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish,
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
