//! `POST /v1/completions`.

use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::response::Response;
use serde::Deserialize;

use super::Api;
use super::answer::Shape;
use super::error::ApiError;
use super::generation::{Job, Prepared};
use super::parameters::Fields;
use crate::access::{Caller, Meter};

/// Fields that only this endpoint has.
pub(super) const OWN_FIELDS: &[&str] = &["logprobs", "max_tokens", "prompt"];
/// OpenAI's default of `max_tokens` at this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 16;

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

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
    let prompt: Prompt = fields
        .take("prompt")?
        .ok_or_else(|| ApiError::missing("prompt"))?;
    // Before any of them is tokenized.
    let (count, bytes) = match &prompt {
        Prompt::Text(text) => (1, text.len()),
        Prompt::Texts(texts) => (texts.len(), texts.iter().map(String::len).sum()),
        Prompt::Tokens(_) => (1, 0),
        Prompt::TokenLists(lists) => (lists.len(), 0),
    };
    if count == 0 || count > MAX_PROMPTS {
        return Err(ApiError::value(
            "prompt",
            format!("1 to {MAX_PROMPTS} prompts"),
        ));
    }
    api.check_length(bytes)?;
    let encode = |text: &String| {
        let encoded = api.engine().tokenizer().encode(text, true);
        encoded.map_err(|error| ApiError::value("prompt", error))
    };
    let prompts = match &prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Tokens(tokens) => vec![tokens.clone()],
        Prompt::TokenLists(lists) => lists.clone(),
    };
    let max_tokens = match fields.take("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS) {
        0 => return Err(ApiError::value("max_tokens", "must be at least 1")),
        tokens => tokens,
    };
    let streaming = fields.common.streaming()?;
    let asked: Option<u64> = fields.take("logprobs")?;
    let logprobs = asked.map(|top| api.extraction().logprobs("logprobs", top));
    let logprobs = logprobs.transpose()?;
    let vocab = api.engine().config().vocab;
    let job = Job {
        prompts,
        choices: fields.common.choices()?,
        max_tokens: Some(max_tokens),
        sampling: fields
            .common
            .sampling(api.extraction(), logprobs.is_some(), vocab)?,
        stop: fields.common.stops()?,
        logprobs,
        constraint: None,
        reading: None,
        adapter: chosen.adapter(),
        user: caller.and_then(|caller| caller.user()),
        meter: meter.map(|Extension(meter)| meter).unwrap_or_default(),
    };
    let mut answer = api.answer(Shape::Text, job.sampling.seed, chosen);
    answer.logprobs = job.logprobs.is_some();
    Ok(Prepared {
        generation: api.generate(job)?,
        answer,
        streaming,
    })
}
