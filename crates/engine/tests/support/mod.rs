//! What the engine's tests share: loading a source, running requests to their end, a second
//! implementation to compare with.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

pub mod golden_tokens;
pub mod reference;
pub mod tiny;

use std::ops::ControlFlow;
use std::sync::mpsc::channel;

use casemate_container::signing::SigningKey;
use casemate_container::{
    Adapter, AdapterSource, DataKey, Model, ModelSource, SealOptions, SealedFile, Silent, seal,
    seal_adapter,
};
use casemate_engine::{Compute, Engine, EngineOptions, Event, FinishReason, LoadError, Request};

/// Opens a source as the enclave would: sealed, unlocked and verified.
pub fn open(source: &dyn ModelSource) -> Model {
    open_with(source, vec![])
}

/// As [`open`], with the tensors that fit a pattern public.
pub fn open_with(source: &dyn ModelSource, public_tensors: Vec<String>) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.casemate");
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    let options = SealOptions {
        version: 1,
        public_tensors,
        ..SealOptions::default()
    };
    seal(source, &options, &data_key, &provider, &file, &Silent).unwrap();
    let unlocked = SealedFile::open(&file)
        .unwrap()
        .unlock(&data_key, &provider.verifying_key())
        .unwrap();
    unlocked.load(2, &Silent).unwrap()
}

/// As [`open`], of an adapter.
pub fn open_adapter(source: &dyn AdapterSource) -> Adapter {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.casemate");
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    let options = SealOptions {
        version: 1,
        ..SealOptions::default()
    };
    seal_adapter(source, &options, &data_key, &provider, &file, &Silent).unwrap();
    let unlocked = SealedFile::open(&file)
        .unwrap()
        .unlock(&data_key, &provider.verifying_key())
        .unwrap();
    unlocked.load_adapter(2, &Silent).unwrap()
}

pub fn options(compute: Compute) -> EngineOptions {
    EngineOptions {
        compute,
        threads: 2,
        max_context: 1 << 20,
        max_batch: 4,
        ..EngineOptions::default()
    }
}

pub fn try_load(source: &dyn ModelSource, options: &EngineOptions) -> Result<Engine, LoadError> {
    Engine::load(open(source), options, &Silent)
}

pub fn load(source: &dyn ModelSource, options: &EngineOptions) -> Engine {
    try_load(source, options).expect("the model is sound")
}

/// Everything a request's sink heard.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Answer {
    pub ids: Vec<u32>,
    pub pieces: Vec<String>,
    pub finished: Option<(FinishReason, usize, usize)>,
    /// Tokens of the prompt that had been computed before.
    pub cached: usize,
}

impl Answer {
    pub fn text(&self) -> String {
        self.pieces.concat()
    }

    pub fn reason(&self) -> FinishReason {
        self.finished.expect("the request has finished").0
    }
}

/// A request under way.
pub struct Pending(std::sync::mpsc::Receiver<Event<'static>>);

impl Pending {
    pub fn wait(self) -> Answer {
        let mut answer = Answer::default();
        for event in self.0 {
            match event {
                Event::Token { id, text, .. } => {
                    answer.ids.push(id);
                    answer.pieces.push(text.into_owned());
                }
                Event::Finished {
                    reason,
                    prompt_tokens,
                    cached_tokens,
                    completion_tokens,
                } => {
                    answer.cached = cached_tokens;
                    answer.finished = Some((reason, prompt_tokens, completion_tokens));
                }
            }
        }
        answer
    }
}

pub fn start(engine: &Engine, request: Request) -> Pending {
    let (sender, receiver) = channel();
    let sink = move |event: Event<'_>| match sender.send(event.into_owned()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    };
    engine
        .submit(request, Box::new(sink))
        .expect("the request is sound");
    Pending(receiver)
}

pub fn generate(engine: &Engine, request: Request) -> Answer {
    start(engine, request).wait()
}

/// A greedy request.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        ..Request::default()
    }
}

/// Logits after each position.
pub fn logits(engine: &Engine, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    engine
        .evaluate(tokens, |position, row| {
            assert_eq!(position, rows.len());
            rows.push(row.to_vec());
        })
        .expect("the text fits");
    rows
}

pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}
