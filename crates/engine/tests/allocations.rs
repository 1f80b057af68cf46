//! Decoding allocates nothing. A program of its own with a single test, because the heap is counted
//! for the whole process.

mod support;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use casemate_container::{DType, ModelConfig, ModelDigest, Silent};
use casemate_engine::{
    Compute, Engine, EngineOptions, Event, KvType, Request, Sampling, Speculation, User,
};
use casemate_kernels::heap::CountingHeap;
use casemate_testkit::adapters::TinyAdapter;
use support::tiny::{Tiny, llama};
use support::{open, open_adapter, options};

#[global_allocator]
static HEAP: CountingHeap = CountingHeap::new();

/// Tokens of each request before counting begins, and while it lasts.
const FIRST: usize = 20;
const COUNTED: usize = 300;

/// What one request saw of the heap: its calls before and after the tokens counted.
#[derive(Default)]
struct Seen {
    tokens: AtomicUsize,
    bytes: AtomicUsize,
    before: AtomicU64,
    after: AtomicU64,
}

/// Starts a request whose sink allocates nothing, and wakes this thread when it is over. Its first token holds the
/// engine until all requests have been `submitted`, which allocates.
fn watch(engine: &Engine, request: Request, submitted: &Arc<AtomicBool>) -> Arc<Seen> {
    let seen = Arc::new(Seen::default());
    let (told, waiting) = (Arc::clone(&seen), thread::current());
    let submitted = Arc::clone(submitted);
    let sink = move |event: Event<'_>| {
        match event {
            Event::Token { text, logprobs, .. } => {
                while !submitted.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                let kept = logprobs.map_or(0, |l| l.top.len());
                told.bytes.fetch_add(text.len() + kept, Ordering::Relaxed);
                let tokens = told.tokens.fetch_add(1, Ordering::Relaxed) + 1;
                match tokens {
                    FIRST => told.before.store(HEAP.calls(), Ordering::Relaxed),
                    n if n == FIRST + COUNTED => {
                        told.after.store(HEAP.calls(), Ordering::Relaxed);
                    }
                    _ => {}
                }
            }
            Event::Finished { .. } => waiting.unpark(),
        }
        ControlFlow::Continue(())
    };
    engine.submit(request, Box::new(sink)).unwrap();
    seen
}

/// One of every way to choose tokens and to show them, long enough for contexts to be shared out.
fn requests(model: &Tiny, adapter: ModelDigest) -> Vec<Request> {
    let request = |seed: u64, sampling: Sampling| Request {
        prompt: model.prompt(150, seed),
        max_tokens: FIRST + COUNTED + 10,
        ignore_end: true,
        sampling: Sampling { seed, ..sampling },
        // Full pages of some are made known for later requests.
        user: (seed % 2 == 1).then_some(User::new([7; 32])),
        adapter: (seed > 2).then_some(adapter),
        ..Request::default()
    };
    let warm = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let filtered = Sampling {
        top_k: 40,
        top_p: 0.9,
        min_p: 0.01,
        presence_penalty: 0.5,
        frequency_penalty: 0.1,
        repetition_penalty: 1.1,
        bias: vec![(5, 1.0)],
        ..warm.clone()
    };
    vec![
        request(1, Sampling::default()),
        request(2, warm.clone()),
        request(3, filtered),
        Request {
            logprobs: Some(5),
            stop: vec!["\u{1}never\u{1}".into(), "aaaaaaaaaaaaaaaaaaaa".into()],
            ..request(4, warm)
        },
    ]
}

#[test]
fn decoding_allocates_nothing() {
    let plain = Tiny::new(llama(), 31);
    let config = ModelConfig {
        hidden: 64,
        ffn: 96,
        ..llama()
    };
    let mixed = Tiny::new(config, 31).encoded(&[DType::Q4_0, DType::Q8_0, DType::Q4_1]);
    let kinds = [
        (Compute::F32, None),
        (Compute::Bf16, None),
        (Compute::Int8, None),
        (Compute::Int8, Some(KvType::Int8)),
        (Compute::Int8Row, Some(KvType::Bf16)),
        (Compute::Q4G32, None),
    ];
    for (compute, kv_type) in kinds {
        let model = if compute == Compute::Q4G32 {
            &mixed
        } else {
            &plain
        };
        for (threads, speculation) in [
            (1, Speculation::None),
            (3, Speculation::None),
            (3, Speculation::PromptLookup),
        ] {
            let options = EngineOptions {
                threads,
                kv_type,
                // Parking allocates in no way that we know of, but it is not what this is about.
                patience: u32::MAX,
                speculation,
                ..options(compute)
            };
            let container = open(model);
            // Large enough for products that the team shares.
            let adapter = TinyAdapter {
                rank: 130,
                ..TinyAdapter::default()
            };
            let adapter = adapter.build(&model.config, container.digest());
            let adapters = vec![open_adapter(&adapter)];
            let engine = Engine::load_with(container, adapters, &options, None, &Silent).unwrap();
            let submitted = Arc::new(AtomicBool::new(false));
            let all: Vec<_> = requests(model, engine.adapters()[0])
                .into_iter()
                .map(|request| watch(&engine, request, &submitted))
                .collect();
            submitted.store(true, Ordering::Release);
            let over = |seen: &Seen| seen.tokens.load(Ordering::Relaxed) == FIRST + COUNTED + 10;
            while !all.iter().all(|seen| over(seen)) {
                thread::park();
            }
            for (i, seen) in all.iter().enumerate() {
                assert!(seen.bytes.load(Ordering::Relaxed) > 0);
                let (before, after) = (
                    seen.before.load(Ordering::Relaxed),
                    seen.after.load(Ordering::Relaxed),
                );
                assert!(before > 0 && after > 0);
                assert_eq!(
                    after - before,
                    0,
                    "calls of the heap while request {i} got {COUNTED} tokens in {} with {threads} threads, speculation: {}",
                    engine.compute_name(),
                    speculation.name()
                );
            }
            let accepted = engine.stats().accepted_tokens;
            assert_eq!(accepted > 0, speculation == Speculation::PromptLookup);
        }
    }
}
