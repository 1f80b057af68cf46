//! Runs the engine for one API request: several choices at once, collected or streamed, cancelled when nobody reads.

use std::borrow::Cow;
use std::convert::Infallible;
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use casemate_channel::receipt::{Bias, Functions, Parameters, Steering};
use casemate_container::ModelDigest;
use casemate_engine::{
    Event, FinishReason, Request, RequestId, Sampling, Sink, TokenLogprobs, User,
};
use futures::stream;
use tokio::sync::mpsc;

use super::Api;
use super::answer::{Answer, Choice, Ending, Likelihood, Piece, Served, Usage};
use super::calls::{Call, CallReader};
use super::error::ApiError;
use super::extraction::Shown;
use super::format::{Constraint, Told};
use super::perturbation::Perturbation;
use super::tools::Reading;
use crate::access::Meter;
use crate::grammars::Share;

/// Most answers to one request: choices times prompts.
const MAX_ANSWERS: u64 = 16;

/// What one API request asks of the engine.
pub(super) struct Job {
    /// Token ids of each prompt; every prompt gets `choices` answers.
    pub(super) prompts: Vec<Vec<u32>>,
    pub(super) choices: u32,
    /// Most tokens per answer; `None` is bounded by the context alone.
    pub(super) max_tokens: Option<u32>,
    pub(super) sampling: Sampling,
    pub(super) stop: Vec<String>,
    /// Log-probabilities that the policy shows.
    pub(super) logprobs: Option<Shown>,
    /// What every answer must be.
    pub(super) constraint: Option<Constraint>,
    /// How calls of functions are found in answers.
    pub(super) reading: Option<Reading>,
    /// What is applied to the model.
    pub(super) adapter: Option<ModelDigest>,
    /// Who asks, if one asker can be told from another.
    pub(super) user: Option<User>,
    /// Counts what is used.
    pub(super) meter: Meter,
}

impl Job {
    /// What its grammar and the names of its functions take, which all its answers share.
    fn bytes_held(&self) -> usize {
        let grammar = self.constraint.as_ref().map_or(0, Constraint::bytes_held);
        let names = self.reading.as_ref().map_or(0, Reading::bytes_of_names);
        grammar + names
    }

    /// What a receipt says about how tokens are drawn, and what steers them.
    fn parameters(&self) -> Parameters {
        let sampling = &self.sampling;
        Parameters {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
            choices: self.choices,
            max_tokens: self.max_tokens,
            steering: self.steering(),
        }
    }

    fn steering(&self) -> Steering {
        let count = |length: usize| NonZeroU32::new(u32::try_from(length).unwrap_or(u32::MAX));
        let (format, forced) = match self.constraint.as_ref().map(|constraint| constraint.told) {
            None => (None, None),
            Some(Told::Format(format)) => (Some(format), None),
            Some(Told::Call(call)) => (None, Some(call)),
        };
        let functions = self.reading.as_ref().and_then(|reading| {
            Some(Functions {
                offered: count(reading.names.len())?,
                forced,
                first_call_only: reading.single,
            })
        });
        Steering {
            bias: Bias::of(self.sampling.bias.iter().map(|(_, bias)| *bias)),
            format,
            functions,
            stop_strings: count(self.stop.len()),
        }
    }
}

/// What makes pieces of an answer out of tokens.
struct Reader {
    calls: Option<CallReader>,
    calls_told: usize,
    logprobs: Option<Shown>,
    perturbation: Option<Perturbation>,
    /// Of tokens whose text is still held back.
    waiting: Vec<Likelihood>,
    characters: usize,
}

/// Answers in the making. Dropping it cancels all of them, those that wait or still read their prompt too.
pub(super) struct Generation {
    api: Api,
    requests: Vec<RequestId>,
    events: mpsc::UnboundedReceiver<(u32, Event<'static>)>,
    running: u32,
    choices: u32,
    usage: Usage,
    /// For each prompt, the fewest tokens that one of its answers did not compute.
    cached: Vec<Option<u64>>,
    adapter: Option<ModelDigest>,
    parameters: Parameters,
    ending: Ending,
    readers: Vec<Reader>,
    /// For what readers hold. The engine has its share of it, which it may drop later.
    _room: Arc<Share>,
}

impl Api {
    /// Hands every answer of `job` to the engine.
    pub(super) fn generate(&self, job: Job) -> Result<Generation, ApiError> {
        let (sender, events) = mpsc::unbounded_channel();
        if job.prompts.len() as u64 * u64::from(job.choices) > MAX_ANSWERS {
            let most =
                format!("at most {MAX_ANSWERS} answers to one request, over all its prompts");
            return Err(ApiError::value("n", most));
        }
        let room = Arc::new(self.hold(job.user, job.bytes_held())?);
        // Every choice counts its prompt, though those that run together read it once.
        let prompts: usize = job.prompts.iter().map(Vec::len).sum();
        let taken = job
            .meter
            .take_prompt(prompts.saturating_mul(job.choices as usize))?;
        let mut generation = Generation {
            api: self.clone(),
            requests: Vec::new(),
            events,
            running: 0,
            choices: job.choices.max(1),
            usage: Usage::default(),
            cached: vec![None; job.prompts.len()],
            adapter: job.adapter,
            parameters: job.parameters(),
            ending: Ending::default(),
            readers: Vec::new(),
            _room: Arc::clone(&room),
        };
        let mut together = Vec::new();
        for prompt in job.prompts {
            generation.usage.prompt_tokens += prompt.len() as u64;
            let perturbation = self.perturbation(job.adapter, job.logprobs, &prompt)?;
            for choice in 0..job.choices {
                let sampling = Sampling {
                    // Each choice is its own draw, and the whole request repeats for one seed.
                    seed: job.sampling.seed.wrapping_add(u64::from(choice)),
                    ..job.sampling.clone()
                };
                let request = Request {
                    prompt: prompt.clone(),
                    // The engine bounds it by the context.
                    max_tokens: job.max_tokens.map_or(usize::MAX, |tokens| tokens as usize),
                    sampling,
                    stop: job.stop.clone(),
                    logprobs: job.logprobs.map(|shown| shown.known),
                    grammar: job.constraint.as_ref().map(|c| c.grammar.clone()),
                    user: job.user,
                    adapter: job.adapter,
                    ..Request::default()
                };
                let sender = sender.clone();
                let index = generation.running;
                let meter = job.meter.clone();
                let room = Arc::clone(&room);
                // Counted where tokens are made: who does not read them has caused them all the same.
                let sink = move |event: Event<'_>| {
                    let _for_the_grammar_beside_it = &room;
                    if let Event::Token { .. } = event {
                        meter.generated();
                    }
                    match sender.send((index, event.into_owned())) {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(_) => ControlFlow::Break(()),
                    }
                };
                together.push((request, Box::new(sink) as Sink));
                generation.readers.push(Reader {
                    calls: job
                        .reading
                        .clone()
                        .map(|r| CallReader::new(r, Call::new_id)),
                    calls_told: 0,
                    logprobs: job.logprobs,
                    perturbation: perturbation.clone(),
                    waiting: Vec::new(),
                    characters: 0,
                });
                generation.running += 1;
            }
        }
        // All of them or none, and they begin in one step where there is room.
        generation.requests = self.engine().submit_together(together)?;
        taken.keep();
        Ok(generation)
    }
}

impl Reader {
    /// What a token adds that is certain.
    fn token(
        &mut self,
        api: &Api,
        id: u32,
        text: &str,
        logprobs: Option<Cow<'_, TokenLogprobs>>,
    ) -> Piece {
        if let (Some(shown), Some(logprobs)) = (self.logprobs, logprobs) {
            let (tokenizer, top) = (api.engine().tokenizer(), shown.top);
            let noise = |token| match &self.perturbation {
                Some(perturbation) => perturbation.of(token),
                None => 0.0,
            };
            let shown = |token, logprob| shown.round(logprob, noise(token));
            let likelihood = Likelihood::new(id, &logprobs, top, shown, tokenizer, self.characters);
            self.waiting.push(likelihood);
            self.characters += String::from_utf8_lossy(tokenizer.token_bytes(id))
                .chars()
                .count();
        }
        if let Some(perturbation) = &mut self.perturbation {
            perturbation.push(id);
        }
        let mut piece = Piece::default();
        if !text.is_empty() {
            piece.likelihoods = std::mem::take(&mut self.waiting);
        }
        match &mut self.calls {
            None => piece.text = text.to_owned(),
            Some(reader) => {
                let read = reader.push(text);
                (piece.text, piece.calls) = (read.text, read.calls);
            }
        }
        piece
    }

    /// What the end adds, and why it ended. A stop string takes the likelihoods of its tokens along.
    fn finish(&mut self, reason: &FinishReason) -> Result<(Piece, &'static str), ApiError> {
        let mut ended = finish_reason(reason)?;
        let mut piece = Piece::default();
        if *reason == FinishReason::Length {
            piece.likelihoods = std::mem::take(&mut self.waiting);
        }
        if let Some(reader) = &mut self.calls {
            let read = reader.finish(*reason == FinishReason::Stop);
            (piece.text, piece.calls) = (read.text, read.calls);
            if reader.found() && *reason == FinishReason::Stop {
                ended = "tool_calls";
            }
        }
        Ok((piece, ended))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // Those that have ended are unknown to the engine by now, and cancelling them does nothing.
        for id in &self.requests {
            self.api.engine().cancel(*id);
        }
    }
}

/// A request of which only its answer is left to do: neither its body nor anything parsed from it is kept.
pub(super) struct Prepared {
    pub(super) generation: Generation,
    pub(super) answer: Answer,
    /// For a stream, whether usage is its last event.
    pub(super) streaming: Option<bool>,
}

impl Prepared {
    pub(super) async fn respond(self) -> Result<Response, ApiError> {
        match self.streaming {
            Some(include_usage) => Ok(self.generation.stream(self.answer, include_usage)),
            None => self.generation.collect(self.answer).await,
        }
    }
}

impl Generation {
    /// Waits for every answer and returns them whole.
    async fn collect(mut self, answer: Answer) -> Result<Response, ApiError> {
        let mut choices: Vec<Choice> = (0..self.running).map(|_| Choice::default()).collect();
        while self.running > 0 {
            let Some((index, event)) = self.events.recv().await else {
                return Err(ApiError::internal("the engine stopped"));
            };
            let choice = &mut choices[index as usize];
            let reader = &mut self.readers[index as usize];
            match event {
                Event::Token { id, text, logprobs } => {
                    let piece = reader.token(&self.api, id, &text, logprobs);
                    choice.piece.append(piece);
                }
                Event::Finished {
                    reason,
                    completion_tokens,
                    cached_tokens,
                    ..
                } => {
                    let (piece, ended) = reader.finish(&reason)?;
                    choice.piece.append(piece);
                    choice.finish = Some(ended);
                    self.ended(index, completion_tokens, cached_tokens);
                }
            }
        }
        self.ending.note(&self.usage);
        let mut response = axum::Json(answer.whole(&choices, &self.usage)).into_response();
        response.extensions_mut().insert(self.served(&answer));
        Ok(response)
    }

    /// Sends each piece of text as a server-sent event as soon as the engine has it.
    fn stream(self, answer: Answer, include_usage: bool) -> Response {
        let opening = (0..self.running)
            .filter_map(|index| answer.opening(index))
            .map(|value| event_bytes(&value.to_string()))
            .collect::<Vec<_>>()
            .concat();
        let served = self.served(&answer);
        let state = Streaming {
            generation: self,
            answer,
            include_usage,
            ended: false,
        };
        let body = stream::unfold((state, Some(opening)), |(mut state, opening)| async move {
            let bytes = match opening {
                Some(opening) if !opening.is_empty() => opening,
                _ => state.next().await?,
            };
            Some((Ok::<_, Infallible>(Bytes::from(bytes)), (state, None)))
        });
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
        ];
        let mut response = (headers, Body::from_stream(body)).into_response();
        response.extensions_mut().insert(served);
        response
    }

    /// Counts an answer that has ended.
    fn ended(&mut self, index: u32, completion_tokens: usize, cached_tokens: usize) {
        self.running -= 1;
        self.usage.completion_tokens += completion_tokens as u64;
        if let Some(of_prompt) = self.cached.get_mut((index / self.choices) as usize) {
            // Answers to one prompt may share it among themselves, but one of them computed it.
            let fewest = of_prompt.map_or(u64::MAX, |fewest| fewest);
            *of_prompt = Some(fewest.min(cached_tokens as u64));
        }
        self.usage.cached_tokens = self.cached.iter().flatten().sum();
    }

    fn served(&self, answer: &Answer) -> Served {
        Served {
            id: answer.id.clone(),
            adapter: self.adapter,
            parameters: self.parameters.clone(),
            ending: self.ending.clone(),
        }
    }
}

struct Streaming {
    generation: Generation,
    answer: Answer,
    include_usage: bool,
    ended: bool,
}

impl Streaming {
    /// The next bytes of the event stream, or `None` after the last.
    async fn next(&mut self) -> Option<Vec<u8>> {
        if self.ended {
            return None;
        }
        while self.generation.running > 0 {
            let Some((index, event)) = self.generation.events.recv().await else {
                return Some(self.fail(&ApiError::internal("the engine stopped")));
            };
            let generation = &mut self.generation;
            let reader = &mut generation.readers[index as usize];
            match event {
                Event::Token { id, text, logprobs } => {
                    let piece = reader.token(&generation.api, id, &text, logprobs);
                    if !piece.is_empty() {
                        return Some(self.piece(index, &piece));
                    }
                }
                Event::Finished {
                    reason,
                    completion_tokens,
                    cached_tokens,
                    ..
                } => {
                    let end = reader.finish(&reason);
                    generation.ended(index, completion_tokens, cached_tokens);
                    let (piece, ended) = match end {
                        Ok(end) => end,
                        Err(error) => return Some(self.fail(&error)),
                    };
                    let mut bytes = Vec::new();
                    if !piece.is_empty() {
                        bytes = self.piece(index, &piece);
                    }
                    let end = self.answer.finished(index, ended).to_string();
                    bytes.extend(event_bytes(&end));
                    return Some(bytes);
                }
            }
        }
        self.ended = true;
        self.generation.ending.note(&self.generation.usage);
        let mut bytes = Vec::new();
        if self.include_usage {
            bytes = event_bytes(&self.answer.usage(&self.generation.usage).to_string());
        }
        bytes.extend(event_bytes("[DONE]"));
        Some(bytes)
    }

    fn piece(&mut self, index: u32, piece: &Piece) -> Vec<u8> {
        let told = &mut self.generation.readers[index as usize].calls_told;
        let delta = self.answer.delta(index, piece, *told);
        *told += piece.calls.len();
        event_bytes(&delta.to_string())
    }

    fn fail(&mut self, error: &ApiError) -> Vec<u8> {
        self.ended = true;
        event_bytes(&error.to_event_json())
    }
}

fn event_bytes(data: &str) -> Vec<u8> {
    format!("data: {data}\n\n").into_bytes()
}

fn finish_reason(reason: &FinishReason) -> Result<&'static str, ApiError> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::Cancelled => Err(ApiError::internal("the request was cancelled")),
        FinishReason::Error(_) => Err(ApiError::internal("the engine could not finish the answer")),
    }
}
