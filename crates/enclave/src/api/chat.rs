//! `POST /v1/chat/completions`.

use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::response::Response;
use casemate_channel::receipt::AnswerFormat;
use casemate_engine::{ChatMessage, Engine};
use serde_json::Value;
use time::OffsetDateTime;

use super::Api;
use super::answer::Shape;
use super::error::ApiError;
use super::format::{self, Told};
use super::generation::{Job, Prepared};
use super::messages;
use super::parameters::Fields;
use super::tools::Tools;
use crate::access::{Caller, Meter};

/// Fields that only this endpoint has.
pub(super) const OWN_FIELDS: &[&str] = &[
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "parallel_tool_calls",
    "response_format",
    "tool_choice",
    "tools",
    "top_logprobs",
];

pub(super) async fn create(
    State(api): State<Api>,
    caller: Option<Extension<Caller>>,
    meter: Option<Extension<Meter>>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let prepared = prepare(&api, caller, meter, &body)?;
    // What was said is not kept while it is answered.
    drop(body);
    prepared.respond().await
}

fn prepare(
    api: &Api,
    caller: Option<Extension<Caller>>,
    meter: Option<Extension<Meter>>,
    body: &[u8],
) -> Result<Prepared, ApiError> {
    let mut fields = Fields::parse(body, OWN_FIELDS)?;
    let caller = caller.map(|Extension(caller)| caller);
    let chosen = api.choose(&fields.common.model, caller.as_ref())?;
    let template = api.engine().chat();
    let values: Vec<Value> = fields
        .take("messages")?
        .ok_or_else(|| ApiError::missing("messages"))?;
    let calls = template.is_some_and(|template| template.call_format().is_some());
    let messages = messages::parse(values, calls)?;
    api.check_length(messages.iter().map(messages::length).sum())?;
    let tools = Tools::parse(
        fields.take("tools")?,
        fields.take("tool_choice")?,
        fields.take("parallel_tool_calls")?,
        template,
    )?;
    let max_tokens = max_tokens(&mut fields)?;
    let streaming = fields.common.streaming()?;
    let asked: bool = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<u64> = fields.take("top_logprobs")?;
    let logprobs = match (asked, top) {
        (true, None) => Some(api.extraction().logprobs("logprobs", 0)?),
        (true, Some(top)) => Some(api.extraction().logprobs("top_logprobs", top)?),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            let rule = "only allowed together with 'logprobs': true";
            return Err(ApiError::value("top_logprobs", rule));
        }
    };
    let format = fields.take("response_format")?.map(format::parse);
    let format = format.transpose()?.flatten();
    let stop = fields.common.stops()?;
    if format.is_some() && tools.reading.is_some() {
        return Err(ApiError::value(
            "response_format",
            "JSON cannot be combined with 'tools' that may be called",
        ));
    }
    let forced = tools.reading.as_ref().is_some_and(|r| r.forced);
    if logprobs.is_some() {
        // A client that wrote the schema can ask for tokens of its choice.
        let schema = Told::Format(AnswerFormat::JsonSchema);
        let by_schema = format.as_ref().is_some_and(|format| format.told == schema);
        api.extraction().unsteered("response_format", by_schema)?;
        let param = if forced { "tool_choice" } else { "tools" };
        let steered = tools.constraint.is_some();
        api.extraction().unsteered(param, steered)?;
    }
    if (forced || format.is_some()) && !stop.is_empty() {
        return Err(ApiError::value(
            "stop",
            "an answer that must be whole JSON cannot be cut by stop strings",
        ));
    }
    let sampling = fields.common.sampling(
        api.extraction(),
        logprobs.is_some(),
        api.engine().config().vocab,
    )?;
    let job = Job {
        prompts: vec![render(api.engine(), &messages, &tools, api.date())?],
        choices: fields.common.choices()?,
        max_tokens,
        sampling,
        stop,
        logprobs,
        constraint: tools.constraint.or(format),
        reading: tools.reading,
        adapter: chosen.adapter(),
        user: caller.and_then(|caller| caller.user()),
        meter: meter.map(|Extension(meter)| meter).unwrap_or_default(),
    };
    let mut answer = api.answer(Shape::Chat, job.sampling.seed, chosen);
    answer.logprobs = job.logprobs.is_some();
    Ok(Prepared {
        generation: api.generate(job)?,
        answer,
        streaming,
    })
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old = fields.take::<u32>("max_tokens")?;
    let new = fields.take::<u32>("max_completion_tokens")?;
    match (old, new) {
        (Some(_), Some(_)) => Err(ApiError::value(
            "max_tokens",
            "give either 'max_tokens' or 'max_completion_tokens'",
        )),
        (Some(0), _) => Err(ApiError::value("max_tokens", "must be at least 1")),
        (_, Some(0)) => Err(ApiError::value(
            "max_completion_tokens",
            "must be at least 1",
        )),
        (old, new) => Ok(old.or(new)),
    }
}

fn render(
    engine: &Engine,
    messages: &[ChatMessage],
    tools: &Tools,
    now: OffsetDateTime,
) -> Result<Vec<u32>, ApiError> {
    let template = engine.chat().ok_or_else(|| {
        ApiError::unsupported(
            "messages",
            "needs a chat template, and the served model has none",
        )
    })?;
    let mut prompt = template
        .render_with_tools(messages, &tools.shown, true, now)
        .map_err(|error| ApiError::value("messages", error))?;
    prompt.push_trusted(tools.begin);
    // The template writes the control tokens itself, the beginning-of-sequence token included.
    engine
        .tokenizer()
        .encode_prompt(&prompt)
        .map_err(|error| ApiError::value("messages", error))
}
