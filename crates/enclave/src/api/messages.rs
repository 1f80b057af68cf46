//! The conversation of a chat request: roles, texts, calls of functions and their results.

use casemate_engine::{ChatMessage, FunctionCall, ToolCall};
use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use super::tools::{FunctionWord, is_name};

/// Most messages of one conversation, and most calls of one message.
const MAX_MESSAGES: usize = 1024;
const MAX_CALLS: usize = 128;
/// Longest name of a call, in bytes.
const MAX_ID: usize = 128;

#[derive(Deserialize)]
#[serde(tag = "role", rename_all = "lowercase", deny_unknown_fields)]
enum Message {
    /// `developer` is OpenAI's newer name of the system role.
    #[serde(alias = "developer")]
    System {
        content: Content,
    },
    User {
        content: Content,
    },
    Assistant {
        #[serde(default)]
        content: Option<Content>,
        #[serde(default)]
        tool_calls: Option<Vec<Call>>,
        /// What this service itself puts into its answers.
        #[serde(default, rename = "refusal")]
        _refusal: Option<()>,
    },
    Tool {
        content: Content,
        tool_call_id: String,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Part {
    Text { text: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    id: String,
    #[serde(rename = "type")]
    _kind: FunctionWord,
    function: Function,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    /// A JSON object, as text.
    arguments: String,
}

impl Content {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Parts(parts) => parts.into_iter().map(|Part::Text { text }| text).collect(),
        }
    }
}

/// The messages as templates expect them. `calls` says whether the model knows calls of functions.
pub(super) fn parse(values: Vec<Value>, calls: bool) -> Result<Vec<ChatMessage>, ApiError> {
    if values.is_empty() || values.len() > MAX_MESSAGES {
        let rule = format!("1 to {MAX_MESSAGES} messages");
        return Err(ApiError::value("messages", rule));
    }
    let mut messages: Vec<ChatMessage> = Vec::with_capacity(values.len());
    for (index, value) in values.into_iter().enumerate() {
        let place = format!("messages[{index}]");
        let wrong = |rule: &str| ApiError::value(&place, rule);
        let message: Message = serde_json::from_value(value).map_err(|_| {
            wrong(
                "needs a 'role' of system, developer, user, assistant or tool and a text 'content'; \
                 an assistant may have 'tool_calls' instead, a tool needs 'tool_call_id'; names, \
                 images and audio are not supported",
            )
        })?;
        let told = |role: &str, content: Content| ChatMessage {
            role: role.to_owned(),
            content: content.text(),
            ..ChatMessage::default()
        };
        let message = match message {
            Message::System { content } => told("system", content),
            Message::User { content } => told("user", content),
            Message::Assistant {
                content,
                tool_calls,
                ..
            } => {
                let list = tool_calls.unwrap_or_default();
                if content.is_none() && list.is_empty() {
                    return Err(wrong("an assistant needs 'content' or 'tool_calls'"));
                }
                ChatMessage {
                    tool_calls: parse_calls(list, &wrong)?,
                    ..told("assistant", content.unwrap_or(Content::Text(String::new())))
                }
            }
            Message::Tool {
                content,
                tool_call_id,
            } => {
                let mut earlier = messages.iter().flat_map(|message| &message.tool_calls);
                if !earlier.any(|call| call.id == tool_call_id) {
                    return Err(wrong("'tool_call_id' names no earlier call"));
                }
                ChatMessage {
                    tool_call_id: Some(tool_call_id),
                    ..told("tool", content)
                }
            }
        };
        if !calls && (message.role == "tool" || !message.tool_calls.is_empty()) {
            return Err(wrong(
                "the served model's chat template knows no calls of functions and no role 'tool'",
            ));
        }
        messages.push(message);
    }
    Ok(messages)
}

/// Bytes of text in a message.
pub(super) fn length(message: &ChatMessage) -> usize {
    let calls = message.tool_calls.iter();
    let arguments = calls.map(|call| call.function.arguments.to_string().len());
    message.content.len() + arguments.sum::<usize>()
}

fn parse_calls(
    calls: Vec<Call>,
    wrong: &dyn Fn(&str) -> ApiError,
) -> Result<Vec<ToolCall>, ApiError> {
    if calls.len() > MAX_CALLS {
        return Err(wrong("has too many 'tool_calls'"));
    }
    let parse = |call: Call| {
        if call.id.is_empty() || call.id.len() > MAX_ID || !is_name(&call.function.name) {
            return Err(wrong(
                "has a call whose 'id' or function 'name' is empty or too long",
            ));
        }
        let arguments: Value = serde_json::from_str(&call.function.arguments)
            .ok()
            .filter(Value::is_object)
            .ok_or_else(|| wrong("'arguments' of a call are a JSON object, as text"))?;
        Ok(ToolCall {
            id: call.id,
            kind: "function",
            function: FunctionCall {
                name: call.function.name,
                arguments,
            },
        })
    };
    calls.into_iter().map(parse).collect()
}
