//! Adapters beside the model: what they compute, for whose rows, and which are refused.

mod support;

use casemate_container::{
    Adapter, AdapterConfig, DType, ModelConfig, ModelDigest, RopeLayout, Silent, Target,
    reordered_row,
};
use casemate_engine::{Compute, Engine, EngineOptions, LoadError, Request, SubmitError, User};
use casemate_testkit::adapters::{MemoryAdapter, TinyAdapter};
use support::tiny::{Tiny, llama};
use support::{Answer, greedy, open, open_adapter, options, start};

/// An engine over a model and adapters that are made for it, and the digests of those.
fn engine(
    model: &Tiny,
    adapters: &[TinyAdapter],
    options: &EngineOptions,
) -> (Engine, Vec<ModelDigest>) {
    let container = open(model);
    let base = container.digest();
    let made = adapters
        .iter()
        .map(|a| open_adapter(&a.build(&model.config, base)));
    let engine = Engine::load_with(container, made.collect(), options, None, &Silent).unwrap();
    let digests = engine.adapters();
    (engine, digests)
}

/// The same model with an adapter added to its weights: another road to the same numbers.
fn merged(model: &Tiny, adapter: &TinyAdapter) -> Tiny {
    let factors = adapter.build(&model.config, ModelDigest([0; 32]));
    let (scale, rank) = (factors.config.scale(), factors.config.rank as usize);
    let mut merged = model.clone();
    for layer in 0..model.config.layers {
        for &target in &adapter.targets {
            let name = format!("blk.{layer}.{}.weight", target.name());
            let a = factors.values_of(&format!("{name}.lora_a"));
            let b = factors.values_of(&format!("{name}.lora_b"));
            let at = model.tensors.iter().position(|t| t.name == name).unwrap();
            let columns = a.len() / rank;
            let mut values = model.values[at].clone();
            for (row, values) in values.chunks_exact_mut(columns).enumerate() {
                // The factors' rows are in the order of transformers.
                let theirs = match target {
                    Target::Query | Target::Key => reordered_row(
                        RopeLayout::Half,
                        model.config.rope_layout,
                        model.config.head_dim as usize,
                        row,
                    ),
                    _ => row,
                };
                for (column, value) in values.iter_mut().enumerate() {
                    let product: f32 = (0..rank)
                        .map(|r| b[theirs * rank + r] * a[r * columns + column])
                        .sum();
                    *value += scale * product;
                }
            }
            let shape = model.tensors[at].shape.clone();
            merged.remove(&name);
            merged.push(&name, &shape, values);
        }
    }
    merged
}

const TEXT: [u32; 24] = [
    1, 70, 90, 110, 7, 8, 99, 200, 201, 255, 40, 41, 42, 100, 33, 34, 35, 36, 180, 181, 70, 90,
    110, 7,
];

fn logits(engine: &Engine, adapter: Option<ModelDigest>) -> Vec<f32> {
    let mut all = Vec::new();
    let row = |_: usize, row: &[f32]| all.extend_from_slice(row);
    engine.evaluate_with(adapter, &TEXT, row).unwrap();
    all
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, f32::max)
}

fn half() -> ModelConfig {
    ModelConfig {
        rope_layout: RopeLayout::Half,
        ..llama()
    }
}

/// Each product alone, in both orders of rows, and all together: as if they had been added to the weights.
#[test]
fn an_adapter_computes_what_merged_weights_would() {
    let f32 = options(Compute::F32);
    for config in [llama(), half()] {
        let model = Tiny::new(config, 5);
        let alone = Target::ALL.iter().map(|&target| vec![target]);
        for targets in alone.chain([Target::ALL.to_vec()]) {
            let adapter = TinyAdapter {
                rank: 3,
                alpha: 2.0,
                rank_stabilised: targets.len() == 1,
                targets,
                ..TinyAdapter::default()
            };
            let (with, digests) = engine(&model, std::slice::from_ref(&adapter), &f32);
            let found = logits(&with, Some(digests[0]));
            let (reference, _) = engine(&merged(&model, &adapter), &[], &f32);
            let expected = logits(&reference, None);
            let plain = logits(&with, None);
            let error = furthest(&found, &expected);
            let effect = furthest(&plain, &expected);
            assert!(
                effect > 0.05 && error < effect * 1e-3,
                "{:?} {:?}: {error} of {effect}",
                model.config.rope_layout,
                adapter.targets
            );
        }
    }
}

/// A base whose rows a conversion reordered, and its original: one PEFT adapter means the same to both.
#[test]
fn one_adapter_fits_a_base_in_either_order_of_rows() {
    let original = Tiny::new(half(), 5);
    let mut converted = Tiny::new(llama(), 5);
    for (at, tensor) in original.tensors.iter().enumerate() {
        let mut values = original.values[at].clone();
        if tensor.name.ends_with("attn_q.weight") || tensor.name.ends_with("attn_k.weight") {
            let columns = tensor.shape[1] as usize;
            for (row, out) in values.chunks_exact_mut(columns).enumerate() {
                let there = reordered_row(RopeLayout::Half, RopeLayout::Interleaved, 16, row);
                out.copy_from_slice(&original.values[at][there * columns..][..columns]);
            }
        }
        converted.remove(&tensor.name);
        converted.push(&tensor.name, &tensor.shape, values);
    }
    let adapter = [TinyAdapter::default()];
    let f32 = options(Compute::F32);
    let (a, of_a) = engine(&original, &adapter, &f32);
    let (b, of_b) = engine(&converted, &adapter, &f32);
    let [plain_a, plain_b] = [logits(&a, None), logits(&b, None)];
    assert!(furthest(&plain_a, &plain_b) < 1e-4, "the bases differ");
    let (with_a, with_b) = (logits(&a, Some(of_a[0])), logits(&b, Some(of_b[0])));
    assert!(furthest(&plain_a, &with_a) > 0.05);
    let error = furthest(&with_a, &with_b);
    assert!(error < 1e-4, "{error}");
}

/// In every arithmetic: adapters get the row before it is rounded, and leave all other rows alone.
#[test]
fn rows_without_an_adapter_keep_every_bit() {
    let model = Tiny::new(
        ModelConfig {
            hidden: 64,
            head_dim: 16,
            ffn: 96,
            ..llama()
        },
        5,
    );
    for &compute in Compute::ALL {
        if compute == Compute::Q4G32 {
            // Wants tensors of 4 bits, which these models do not have.
            continue;
        }
        let options = options(compute);
        let (plain, _) = engine(&model, &[], &options);
        let (with, digests) = engine(&model, &[TinyAdapter::default()], &options);
        let expected = logits(&plain, None);
        let same = logits(&with, None);
        assert!(
            expected
                .iter()
                .zip(&same)
                .all(|(a, b)| a.to_bits() == b.to_bits()),
            "{compute:?}"
        );
        assert!(furthest(&expected, &logits(&with, Some(digests[0]))) > 0.05);
    }
}

fn under(adapter: Option<ModelDigest>, prompt: &[u32]) -> Request {
    Request {
        adapter,
        ..greedy(prompt, 24)
    }
}

/// Rows of two adapters and of none in the same passes, prompts and answers, on one thread and on several.
#[test]
fn requests_of_different_adapters_run_together_as_they_would_alone() {
    let model = Tiny::new(llama(), 5);
    let second = TinyAdapter {
        seed: 11,
        rank: 9,
        targets: vec![Target::Query, Target::Value, Target::Up],
        dtype: DType::BF16,
        ..TinyAdapter::default()
    };
    let adapters = [TinyAdapter::default(), second];
    for threads in [1, 3] {
        let options = EngineOptions {
            threads,
            ..options(Compute::Int8)
        };
        let (engine, digests) = engine(&model, &adapters, &options);
        let kinds = [None, Some(digests[0]), Some(digests[1]), None];
        let request = |i: usize| under(kinds[i], &TEXT[..12 + 3 * i]);
        let alone: Vec<Answer> = (0..4).map(|i| start(&engine, request(i)).wait()).collect();
        let pending: Vec<_> = (0..4).map(|i| start(&engine, request(i))).collect();
        let together: Vec<Answer> = pending.into_iter().map(support::Pending::wait).collect();
        assert_eq!(alone, together);
        let of = |adapter| start(&engine, under(adapter, &TEXT)).wait().ids;
        let [plain, first, second] = [None, Some(digests[0]), Some(digests[1])].map(of);
        assert!(plain != first && plain != second && first != second);
    }
}

/// Products large enough to be shared out: by rows where there are many, by elements and columns where there are few. Who
/// computes what changes no bit.
#[test]
fn adapters_compute_the_same_bits_on_any_number_of_threads() {
    let config = ModelConfig {
        // So that columns of one row are divided, also within gate and up.
        ffn: 400,
        ..llama()
    };
    let model = Tiny::new(config, 5);
    let large = TinyAdapter {
        rank: 300,
        alpha: 150.0,
        ..TinyAdapter::default()
    };
    let partial = TinyAdapter {
        seed: 11,
        rank: 170,
        alpha: 85.0,
        targets: vec![Target::Key, Target::AttentionOutput, Target::Up],
        ..TinyAdapter::default()
    };
    for compute in [Compute::F32, Compute::Int8Row] {
        let on = |threads| {
            let options = EngineOptions {
                threads,
                ..options(compute)
            };
            engine(&model, &[large.clone(), partial.clone()], &options)
        };
        let last = |engine: &Engine, adapter, rows: usize| {
            let mut last = Vec::new();
            let row = |_: usize, row: &[f32]| last = row.to_vec();
            engine.evaluate_with(adapter, &TEXT[..rows], row).unwrap();
            last.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let rows = [1, 2, 3, 5, 24];
        // Without an adapter, with the first, with the second; and all of them in the same steps.
        let computed = |(engine, digests): (Engine, Vec<ModelDigest>)| {
            let kinds = [None, Some(digests[0]), Some(digests[1])];
            let logits = kinds.map(|kind| rows.map(|rows| last(&engine, kind, rows)));
            let request = |i: usize| under(kinds[i % 3], &TEXT[..5 + 2 * i]);
            let pending: Vec<_> = (0..4).map(|i| start(&engine, request(i))).collect();
            let answers = pending.into_iter().map(|pending| pending.wait().ids);
            (logits, answers.collect::<Vec<_>>())
        };
        let (logits, answers) = computed(on(1));
        assert!(logits[0] != logits[1] && logits[0] != logits[2]);
        for threads in [2, 3, 7] {
            let found = computed(on(threads));
            assert!(found.0 == logits, "{compute:?} on {threads} threads");
            assert_eq!(found.1, answers, "{compute:?} on {threads} threads");
        }
    }
}

/// What was computed under an adapter is not found without it, or under another.
#[test]
fn pages_are_found_under_their_own_adapter_only() {
    let model = Tiny::new(llama(), 5);
    let second = TinyAdapter {
        seed: 11,
        ..TinyAdapter::default()
    };
    let adapters = [TinyAdapter::default(), second];
    let (engine, digests) = engine(&model, &adapters, &options(Compute::F32));
    let prompt: Vec<u32> = (0..200).map(|i| 3 + (i * 7) % 250).collect();
    let ask = |adapter| {
        let request = Request {
            user: Some(User::new([1; 32])),
            ..under(adapter, &prompt)
        };
        start(&engine, request).wait()
    };
    let kinds = [None, Some(digests[0]), Some(digests[1])];
    let first = kinds.map(ask);
    assert_eq!(first.each_ref().map(|a| a.cached), [0, 0, 0]);
    let again = kinds.map(ask);
    assert_eq!(again.each_ref().map(|a| a.cached), [192, 192, 192]);
    assert_eq!(first.map(|a| a.ids), again.map(|a| a.ids));
}

fn refused(model: &Tiny, adapters: Vec<Adapter>) -> LoadError {
    match Engine::load_with(open(model), adapters, &options(Compute::F32), None, &Silent) {
        Ok(_) => panic!("loaded"),
        Err(error) => error,
    }
}

#[test]
fn adapters_for_another_base_rank_or_shape_are_refused() {
    let model = Tiny::new(llama(), 5);
    let base = open(&model).digest();
    let made = |config: &ModelConfig, base| TinyAdapter::default().build(config, base);

    let other = ModelDigest([3; 32]);
    match refused(&model, vec![open_adapter(&made(&llama(), other))]) {
        LoadError::OtherBase {
            base: named, model, ..
        } => {
            assert_eq!((named, model), (other, base));
        }
        error => panic!("{error}"),
    }
    let refusal =
        |adapter: &MemoryAdapter| refused(&model, vec![open_adapter(adapter)]).to_string();
    let wide = ModelConfig {
        hidden: 96,
        ..llama()
    };
    let said = refusal(&made(&wide, base));
    assert!(
        said.contains("lora_a") && said.contains("[4, 48]"),
        "{said}"
    );
    let deep = ModelConfig {
        layers: 3,
        ..llama()
    };
    let said = refusal(&made(&deep, base));
    assert!(
        said.contains("blk.2.") && said.contains("it has 2"),
        "{said}"
    );
    let mut rank = made(&llama(), base);
    rank.config = AdapterConfig {
        rank: 5,
        ..rank.config
    };
    let said = refusal(&rank);
    assert!(said.contains("rank 5"), "{said}");
    let mut named = made(&llama(), base);
    named.push(
        "blk.0.attn_norm.weight.lora_a",
        DType::F32,
        &[4, 48],
        &[0.0; 192],
    );
    let said = refusal(&named);
    assert!(said.contains("attn_norm.weight.lora_a"), "{said}");
    let mut encoded = made(&llama(), base);
    encoded.set(0, |values| values[0] = f32::NAN);
    let said = refusal(&encoded);
    assert!(said.contains("not finite"), "{said}");

    let twice = || open_adapter(&made(&llama(), base));
    let error = refused(&model, vec![twice(), twice()]);
    assert!(matches!(error, LoadError::AdapterTwice { .. }), "{error}");
}

#[test]
fn an_adapter_that_is_not_loaded_is_refused() {
    let model = Tiny::new(llama(), 5);
    let (engine, _) = engine(&model, &[TinyAdapter::default()], &options(Compute::F32));
    let adapter = ModelDigest([3; 32]);
    let refused = SubmitError::UnknownAdapter { adapter };
    let request = under(Some(adapter), &TEXT);
    let sink = Box::new(|_: casemate_engine::Event<'_>| std::ops::ControlFlow::Continue(()));
    assert_eq!(engine.submit(request, sink).err(), Some(refused.clone()));
    let evaluated = engine.evaluate_with(Some(adapter), &TEXT, |_, _| ());
    assert_eq!(evaluated.err(), Some(refused));
}
