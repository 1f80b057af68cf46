//! `POST /v1/chat/completions`.

use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::response::Response;
use casemate_engine::{ChatMessage, Engine};
use serde::Deserialize;
use time::OffsetDateTime;

use super::Api;
use super::answer::Shape;
use super::error::ApiError;
use super::generation::Job;
use super::parameters::Fields;
use crate::access::Meter;

const OWN_FIELDS: &[&str] = &["messages", "max_tokens", "max_completion_tokens"];
/// Most messages of one conversation.
const MAX_MESSAGES: usize = 1024;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    role: Role,
    content: Content,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    /// OpenAI's newer name of the system role.
    Developer,
    User,
    Assistant,
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

pub(super) async fn create(
    State(api): State<Api>,
    meter: Option<Extension<Meter>>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let mut fields = Fields::parse(&body, OWN_FIELDS)?;
    api.check_model(&fields.common.model)?;
    let messages: Vec<serde_json::Value> = fields
        .take("messages")?
        .ok_or_else(|| ApiError::missing("messages"))?;
    let messages = parse_messages(messages)?;
    api.check_length(messages.iter().map(|message| message.content.len()).sum())?;
    let max_tokens = match (
        fields.take::<u32>("max_tokens")?,
        fields.take::<u32>("max_completion_tokens")?,
    ) {
        (Some(_), Some(_)) => {
            return Err(ApiError::value(
                "max_tokens",
                "give either 'max_tokens' or 'max_completion_tokens'",
            ));
        }
        (Some(0), _) => return Err(ApiError::value("max_tokens", "must be at least 1")),
        (_, Some(0)) => {
            return Err(ApiError::value(
                "max_completion_tokens",
                "must be at least 1",
            ));
        }
        (old, new) => old.or(new),
    };
    let streaming = fields.common.streaming()?;
    let job = Job {
        prompts: vec![render(api.engine(), &messages, api.date())?],
        choices: fields.common.choices()?,
        max_tokens,
        sampling: fields.common.sampling()?,
        stop: fields.common.stops()?,
        meter: meter.map(|Extension(meter)| meter).unwrap_or_default(),
    };
    let answer = api.answer(Shape::Chat);
    let generation = api.generate(job)?;
    match streaming {
        Some(include_usage) => Ok(generation.stream(answer, include_usage)),
        None => generation.collect(answer).await,
    }
}

fn parse_messages(values: Vec<serde_json::Value>) -> Result<Vec<ChatMessage>, ApiError> {
    if values.is_empty() || values.len() > MAX_MESSAGES {
        return Err(ApiError::value(
            "messages",
            format!("1 to {MAX_MESSAGES} messages"),
        ));
    }
    let parse = |(index, value): (usize, serde_json::Value)| {
        let message: Message = serde_json::from_value(value).map_err(|_| {
            ApiError::value(
                &format!("messages[{index}]"),
                "needs a 'role' of system, developer, user or assistant and a text 'content'; \
                 names, tool calls, images and audio are not supported",
            )
        })?;
        let role = match message.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        let content = match message.content {
            Content::Text(text) => text,
            Content::Parts(parts) => parts.into_iter().map(|Part::Text { text }| text).collect(),
        };
        Ok(ChatMessage {
            role: role.to_owned(),
            content,
            ..ChatMessage::default()
        })
    };
    values.into_iter().enumerate().map(parse).collect()
}

fn render(
    engine: &Engine,
    messages: &[ChatMessage],
    now: OffsetDateTime,
) -> Result<Vec<u32>, ApiError> {
    let template = engine.chat().ok_or_else(|| {
        ApiError::unsupported(
            "messages",
            "needs a chat template, and the served model has none",
        )
    })?;
    let prompt = template
        .render(messages, true, now)
        .map_err(|error| ApiError::value("messages", error))?;
    // The template writes the control tokens itself, the beginning-of-sequence token included.
    engine
        .tokenizer()
        .encode_prompt(&prompt)
        .map_err(|error| ApiError::value("messages", error))
}
