//! The engine with a worker: the same tokens and logits, whatever the worker does.

use std::sync::Arc;
use std::time::Duration;

use casemate_container::{ModelSource, Silent};
use casemate_engine::outsource::Outsource;
use casemate_engine::{Compute, Engine, Sampling};
use casemate_offload::layers::Layers;
use casemate_offload::plan::Preset;
use casemate_offload::{BootKey, Config, Fault, Metrics, Offload, Workers};
use casemate_testkit::adapters::TinyAdapter;

use crate::fake::{Act, Fake, config};
use crate::support::tiny::{Tiny, llama};
use crate::support::{generate, greedy, load, logits, open_adapter, open_with, options};

/// An engine with workers, and what they do for it.
pub(crate) struct Outsourced {
    pub(crate) engine: Engine,
    pub(crate) offload: Arc<Offload>,
}

fn outsourced(
    model: &Tiny,
    public: &[&str],
    preset: Preset,
    workers: Workers,
    config: Config,
) -> Outsourced {
    outsourced_with(model, &[], public, preset, workers, config)
}

/// As an enclave does it, with adapters beside the model.
pub(crate) fn outsourced_with(
    model: &dyn ModelSource,
    adapters: &[TinyAdapter],
    public: &[&str],
    preset: Preset,
    workers: Workers,
    config: Config,
) -> Outsourced {
    let boot = BootKey::new([5; 32].into());
    let offload = Arc::new(Offload::new(config, boot, workers, Box::new(|_| {})));
    let layers = Arc::new(Layers::new(Arc::clone(&offload), preset));
    let public = public.iter().map(|&pattern| pattern.to_owned()).collect();
    let container = open_with(model, public);
    let base = container.digest();
    let adapters = adapters.iter();
    let adapters = adapters.map(|a| open_adapter(&a.build(model.config(), base)));
    let options = options(Compute::Int8Row);
    let outsource = Arc::clone(&layers) as Arc<dyn Outsource>;
    let engine = Engine::load_with(
        container,
        adapters.collect(),
        &options,
        Some(outsource),
        &Silent,
    );
    let engine = engine.unwrap();
    layers.start().unwrap();
    Outsourced { engine, offload }
}

/// Waits until idle times have filled the pool.
pub(crate) fn filled(offload: &Offload) -> Metrics {
    for _ in 0..6000 {
        let metrics = offload.metrics();
        if metrics.masks_level == metrics.masks_depth && metrics.masks_depth > 0 {
            return metrics;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the pool is not filled: {:?}", offload.metrics());
}

/// A pool of some hundred masks.
fn small() -> Config {
    Config {
        pool_bytes: 1 << 20,
        ..config()
    }
}

#[test]
fn tokens_and_logits_are_those_of_the_enclave() {
    let model = Tiny::new(llama(), 3);
    let here = load(&model, &options(Compute::Int8Row));
    for preset in [Preset::SecureInfer, Preset::FullLinear] {
        for shares in [false, true] {
            let workers = match shares {
                false => Workers::One(Fake::honest().connect()),
                true => Workers::Two([Fake::honest().encrypted(), Fake::honest().encrypted()]),
            };
            let there = outsourced(&model, &["*"], preset, workers, small());
            assert!(there.offload.wait(Duration::from_secs(60)));
            // A first request wakes the engine, which then has time.
            let text = model.prompt(70, 5);
            assert_eq!(
                generate(&here, greedy(&text, 1)),
                generate(&there.engine, greedy(&text, 1))
            );
            if !shares {
                filled(&there.offload);
            }
            let before = there.offload.metrics();
            assert_eq!(logits(&here, &text), logits(&there.engine, &text));
            let mut request = greedy(&text, 30);
            request.sampling = Sampling {
                temperature: 1.0,
                seed: 9,
                ..Sampling::default()
            };
            assert_eq!(
                generate(&here, request.clone()),
                generate(&there.engine, request)
            );
            let after = there.offload.metrics();
            assert!(
                after.rows_outside >= before.rows_outside + 70,
                "{preset}: {after:?}"
            );
            assert_eq!((after.failures, after.misconduct), (0, 0));
        }
    }
}

#[test]
fn tokens_are_the_same_while_a_worker_cheats_and_is_given_up() {
    let model = Tiny::new(llama(), 3);
    let here = load(&model, &options(Compute::Int8Row));
    let fake = Fake::new(Box::new(|n, _, mut product| {
        if n % 5 == 4 {
            product[0] ^= 1;
        }
        Act::Answer(product)
    }));
    let config = Config {
        readmissions: 3,
        ..small()
    };
    let workers = Workers::One(fake.connect());
    let there = outsourced(&model, &["*"], Preset::FullLinear, workers, config);
    let mut misconduct = 0;
    for round in 0..40 {
        let request = greedy(&model.prompt(3 + round, round as u64), 12);
        assert_eq!(
            generate(&here, request.clone()),
            generate(&there.engine, request)
        );
        let metrics = there.offload.metrics();
        misconduct = metrics.misconduct;
        if misconduct > 3 {
            break;
        }
        let _ = there.offload.wait(Duration::from_secs(60));
        filled(&there.offload);
    }
    assert_eq!(misconduct, 4);
    assert!(
        !there.offload.wait(Duration::ZERO),
        "{}",
        Fault::WrongProduct
    );
}

#[test]
fn nothing_private_reaches_a_worker() {
    let model = Tiny::new(llama(), 3);
    let here = load(&model, &options(Compute::Int8Row));
    let fake = Fake::honest();
    // One tensor of Q, K and V, and one of gate and up: neither stack may go.
    let public = [
        "blk.*.attn_q.weight",
        "blk.*.ffn_up.weight",
        "blk.1.ffn_down.weight",
    ];
    let workers = Workers::One(fake.connect());
    let there = outsourced(&model, &public, Preset::FullLinear, workers, small());
    assert!(there.offload.wait(Duration::from_secs(60)));
    assert_eq!(fake.loaded(), 1, "the second block's down projection");
    let text = model.prompt(20, 1);
    assert_eq!(
        generate(&here, greedy(&text, 5)),
        generate(&there.engine, greedy(&text, 5))
    );
    let none = outsourced(
        &model,
        &[],
        Preset::FullLinear,
        Workers::One(fake.connect()),
        small(),
    );
    assert_eq!(
        generate(&here, greedy(&text, 5)),
        generate(&none.engine, greedy(&text, 5))
    );
    assert_eq!(
        (fake.connections(), fake.loaded()),
        (1, 1),
        "nobody is asked for nothing"
    );
}
