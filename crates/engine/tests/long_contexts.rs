//! Contexts beyond 2048 tokens, in ragged batches, with every kind of KV cache: neither the number
//! of threads nor the company changes a token.

mod support;

use casemate_container::ModelConfig;
use casemate_engine::{Compute, Engine, EngineOptions, KvType, Request, Sampling};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::tiny::{Tiny, llama};
use support::{Answer, generate, load, options, start};

/// More query heads than may be worked on together with one another, in groups of three.
fn model(window: Option<u32>) -> Tiny {
    let config = ModelConfig {
        heads: 6,
        context: 4096,
        sliding_window: window,
        ..llama()
    };
    Tiny::new(config, 41)
}

fn engine(model: &Tiny, compute: Compute, kv_type: KvType, threads: usize) -> Engine {
    load(
        model,
        &EngineOptions {
            kv_type: Some(kv_type),
            threads,
            max_batch: 6,
            kv_bytes: Some(64 << 20),
            ..options(compute)
        },
    )
}

fn request(model: &Tiny, prompt: usize, tokens: usize, seed: u64) -> Request {
    Request {
        prompt: model.prompt(prompt, seed + 1),
        max_tokens: tokens,
        ignore_end: true,
        sampling: Sampling {
            temperature: if seed.is_multiple_of(2) { 0.0 } else { 1.0 },
            seed,
            ..Sampling::default()
        },
        ..Request::default()
    }
}

#[test]
fn long_ragged_batches_give_the_same_tokens_with_every_number_of_threads() {
    let kinds: Vec<_> = [None, Some(700)]
        .into_iter()
        .flat_map(|window| {
            let model = model(window);
            KvType::ALL.into_iter().map(move |kv_type| {
                let engines: Vec<Engine> = (1..=8)
                    .map(|threads| engine(&model, Compute::Int8, kv_type, threads))
                    .collect();
                (model.clone(), engines)
            })
        })
        .collect();
    let lengths = prop::collection::vec((1usize..2600, 1usize..24), 1..6);
    let cases = Config {
        cases: 5,
        failure_persistence: None,
        ..Config::default()
    };
    let run = |lengths: Vec<(usize, usize)>, kind: usize, seed: u64| {
        let (model, engines) = &kinds[kind];
        // One is always long, and decodes across the end of a segment.
        let requests: Vec<Request> = std::iter::once((2300, 10))
            .chain(lengths)
            .enumerate()
            .map(|(i, (prompt, tokens))| request(model, prompt, tokens, seed % 1000 + i as u64))
            .collect();
        let expected: Vec<Answer> = requests
            .iter()
            .map(|request| generate(&engines[0], request.clone()))
            .collect();
        for (engine, threads) in engines.iter().zip(1..) {
            let pending: Vec<_> = requests
                .iter()
                .map(|request| start(engine, request.clone()))
                .collect();
            let found: Vec<Answer> = pending.into_iter().map(support::Pending::wait).collect();
            prop_assert_eq!(
                &found,
                &expected,
                "{} with {} threads",
                engine.compute_name(),
                threads
            );
        }
        Ok(())
    };
    TestRunner::new(cases)
        .run(&(lengths, 0..kinds.len(), any::<u64>()), |(l, k, s)| {
            run(l, k, s)
        })
        .unwrap();
}

#[test]
fn kinds_of_kv_cache_differ_and_all_follow_the_exact_one() {
    let model = model(None);
    let logits = |kv_type| {
        support::logits(
            &engine(&model, Compute::F32, kv_type, 2),
            &model.prompt(600, 5),
        )
    };
    let exact = logits(KvType::F32);
    let size: f32 = exact[599].iter().map(|x| x * x).sum::<f32>().sqrt();
    let mut last = 0.0;
    for (kv_type, bound) in [
        (KvType::F16, 0.002),
        (KvType::Bf16, 0.02),
        (KvType::Int8, 0.05),
    ] {
        let found = logits(kv_type);
        let squares = found[599]
            .iter()
            .zip(&exact[599])
            .map(|(a, b)| (a - b).powi(2));
        let error = squares.sum::<f32>().sqrt() / size;
        eprintln!("{}: {error}", kv_type.name());
        assert!(error > 0.0 && error < bound, "{}: {error}", kv_type.name());
        assert_ne!(error, last);
        last = error;
    }
}
