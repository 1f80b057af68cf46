//! Adapters beside products that a worker computes: the worker sees nothing of them, and answers are those of an engine that
//! computes everything itself.

use std::path::Path;
use std::time::Duration;

use casemate_container::{ModelDigest, ModelSource, Silent, Target};
use casemate_engine::{Compute, Engine, Request, Sampling};
use casemate_offload::plan::Preset;
use casemate_offload::{Config, Workers};
use casemate_testkit::adapters::TinyAdapter;
use casemate_testkit::{data, gguf, llama2c};

use crate::engine::{Outsourced, filled, outsourced_with};
use crate::fake::{Fake, config};
use crate::support::golden_tokens::{STORIES_15M_PROMPT, STORIES_260K_ANSWER, STORIES_260K_PROMPT};
use crate::support::tiny::{Tiny, llama};
use crate::support::{Answer, generate, greedy, open, open_adapter, options};

/// Everything here, nothing asked of anybody.
fn alone(model: &dyn ModelSource, adapters: &[TinyAdapter]) -> Engine {
    let container = open(model);
    let base = container.digest();
    let adapters = adapters.iter();
    let adapters = adapters.map(|a| open_adapter(&a.build(model.config(), base)));
    let options = options(Compute::Int8Row);
    Engine::load_with(container, adapters.collect(), &options, None, &Silent).unwrap()
}

fn with_worker(
    model: &dyn ModelSource,
    adapters: &[TinyAdapter],
    preset: Preset,
    pool_bytes: u64,
) -> (Outsourced, Fake) {
    let fake = Fake::honest();
    let config = Config {
        pool_bytes,
        ..config()
    };
    let workers = Workers::One(fake.connect());
    let there = outsourced_with(model, adapters, &["*"], preset, workers, config);
    assert!(there.offload.wait(Duration::from_secs(60)));
    (there, fake)
}

/// One for every product, whose own are shared among threads, and one for some of them.
fn adapters() -> [TinyAdapter; 2] {
    [
        TinyAdapter {
            rank: 300,
            alpha: 150.0,
            ..TinyAdapter::default()
        },
        TinyAdapter {
            seed: 11,
            targets: vec![Target::Query, Target::AttentionOutput, Target::Down],
            ..TinyAdapter::default()
        },
    ]
}

/// The engine's adapters and none.
fn kinds(engine: &Engine) -> Vec<Option<ModelDigest>> {
    let adapters = engine.adapters().into_iter().map(Some);
    std::iter::once(None).chain(adapters).collect()
}

/// The bits of the logits after each position.
fn prefill(engine: &Engine, adapter: Option<ModelDigest>, text: &[u32]) -> Vec<u32> {
    let mut bits = Vec::new();
    let row = |_: usize, row: &[f32]| bits.extend(row.iter().map(|x| x.to_bits()));
    engine.evaluate_with(adapter, text, row).unwrap();
    bits
}

fn decode(engine: &Engine, adapter: Option<ModelDigest>, request: Request) -> Answer {
    let request = Request {
        adapter,
        ignore_end: true,
        ..request
    };
    generate(engine, request)
}

#[test]
fn answers_under_adapters_are_the_same_with_a_worker_and_without() {
    let model = Tiny::new(llama(), 3);
    let adapters = adapters();
    let here = alone(&model, &adapters);
    let text = model.prompt(70, 5);
    let sampled = Request {
        sampling: Sampling {
            temperature: 1.0,
            seed: 9,
            ..Sampling::default()
        },
        ..greedy(&text[..9], 30)
    };
    for (preset, stacks) in [
        (Preset::SecureInfer, 2 + 1),
        (Preset::FullLinear, 4 * 2 + 1),
    ] {
        let (there, fake) = with_worker(&model, &adapters, preset, 1 << 20);
        let mut seen = Vec::new();
        for (ours, theirs) in kinds(&here).into_iter().zip(kinds(&there.engine)) {
            // A request wakes the engine, which then has time for masks.
            let woken = decode(&there.engine, theirs, greedy(&text, 1));
            assert_eq!(decode(&here, ours, greedy(&text, 1)), woken);
            let before = filled(&there.offload);
            let logits = prefill(&here, ours, &text);
            assert!(logits == prefill(&there.engine, theirs, &text), "{preset}");
            filled(&there.offload);
            let expected = decode(&here, ours, sampled.clone());
            assert_eq!(decode(&there.engine, theirs, sampled.clone()), expected);
            let after = there.offload.metrics();
            // Every row of the prompts and of the answer's tokens but the last; of the second prompt, the last row alone
            // meets the head.
            let rows = (70 + 9 + 29) * stacks - 8;
            assert_eq!(
                after.rows_outside - before.rows_outside,
                rows,
                "{preset}: {after:?}"
            );
            assert_eq!((after.failures, after.misconduct), (0, 0));
            assert!(!seen.contains(&logits), "an adapter changes nothing");
            seen.push(logits);
        }
        assert_eq!(seen.len(), 3);
        assert!(fake.products() > 0);
    }
}

/// A story model continues its recorded prompt, in int8 by rows, with everything that can go outside there.
fn stories(checkpoint: &Path, vocabulary: &Path, prompt: &[u32], tokens: usize, pool_bytes: u64) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("stories.gguf");
    gguf::write(&llama2c::read(checkpoint, vocabulary), &file).unwrap();
    let model = casemate_import::open(&file).unwrap();
    let adapters = [TinyAdapter::default()];
    let here = alone(&*model, &adapters);
    let (there, _fake) = with_worker(&*model, &adapters, Preset::FullLinear, pool_bytes);
    let mut answers = Vec::new();
    for (ours, theirs) in kinds(&here).into_iter().zip(kinds(&there.engine)) {
        decode(&there.engine, theirs, greedy(prompt, 1));
        let before = filled(&there.offload).rows_outside;
        assert!(prefill(&here, ours, prompt) == prefill(&there.engine, theirs, prompt));
        filled(&there.offload);
        let expected = decode(&here, ours, greedy(prompt, tokens));
        assert_eq!(
            decode(&there.engine, theirs, greedy(prompt, tokens)),
            expected
        );
        let outside = there.offload.metrics().rows_outside - before;
        assert!(outside > (prompt.len() + tokens) as u64, "{outside}");
        assert_eq!(expected.ids.len(), tokens);
        answers.push(expected.ids);
    }
    assert_ne!(answers[0], answers[1], "the adapter changes nothing");
}

#[test]
fn the_golden_prompts_go_on_as_they_would_inside() {
    if let Some(checkpoint) = data::file("models/stories260K/stories260K.bin") {
        let vocabulary = checkpoint.with_file_name("tok512.bin");
        let tokens = STORIES_260K_ANSWER.len();
        stories(
            &checkpoint,
            &vocabulary,
            &STORIES_260K_PROMPT,
            tokens,
            8 << 20,
        );
    }
    let Some(checkpoint) = data::cached("stories15M.bin") else {
        return;
    };
    let Some(vocabulary) = data::file("tokenizers/llama2-tokenizer.bin") else {
        return;
    };
    // The worker of the tests multiplies as it is defined, so a few tokens.
    stories(&checkpoint, &vocabulary, &STORIES_15M_PROMPT, 4, 8 << 20);
}
