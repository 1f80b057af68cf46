//! Tiny random models of every architecture against a plain f64 implementation of the same
//! mathematics.

mod support;

use casemate_container::{Family, ModelConfig, RopeLayout, RopeScaling};
use casemate_engine::Compute;
use support::tiny::{Tiny, llama};
use support::{load, logits, options, reference};

/// Differences of all logits over a text of 150 tokens, relative to their root mean square: the
/// largest, and the root mean square.
fn differences(model: &Tiny, compute: Compute) -> (f64, f64) {
    let engine = load(model, &options(compute));
    let tokens = model.prompt(150, 5);
    let expected = reference::logits(model, &tokens);
    let found = logits(&engine, &tokens);
    assert_eq!(found.len(), expected.len());
    let mean_square =
        |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
    let expected = expected.concat();
    let differences: Vec<f64> = found
        .concat()
        .iter()
        .zip(&expected)
        .map(|(&a, b)| f64::from(a) - b)
        .collect();
    let spread = mean_square(&expected).sqrt();
    (
        differences.iter().fold(0f64, |most, d| most.max(d.abs())) / spread,
        mean_square(&differences).sqrt() / spread,
    )
}

fn agrees(config: ModelConfig) {
    agrees_with(&Tiny::new(config, 11));
}

fn agrees_with(model: &Tiny) {
    let (largest, _) = differences(model, Compute::F32);
    assert!(largest < 5e-5, "f32 differs by {largest}");
    for (compute, bound) in [
        (Compute::Bf16, 0.02),
        (Compute::Int8, 0.04),
        (Compute::Int8Row, 0.05),
    ] {
        let (_, typical) = differences(model, compute);
        assert!(typical < bound, "{compute:?} differs by {typical}");
        assert!(typical > 1e-4, "{compute:?} is not f32");
    }
}

#[test]
fn llama_with_grouped_heads() {
    agrees(llama());
}

#[test]
fn llama_with_one_head_per_group_and_odd_sizes() {
    agrees(ModelConfig {
        kv_heads: 4,
        hidden: 36,
        ffn: 70,
        head_dim: 10,
        layers: 3,
        ..llama()
    });
}

#[test]
fn tied_embeddings() {
    agrees(ModelConfig {
        tied_embeddings: true,
        ..llama()
    });
}

#[test]
fn half_layout_of_hugging_face() {
    agrees(ModelConfig {
        rope_layout: RopeLayout::Half,
        rope_theta: 500_000.0,
        ..llama()
    });
}

#[test]
fn linear_rope_scaling() {
    agrees(ModelConfig {
        rope_scaling: RopeScaling::Linear { factor: 4.0 },
        ..llama()
    });
}

#[test]
fn llama3_rope_scaling_by_configuration() {
    // A short original context, so that 150 positions meet all three branches.
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64,
    };
    agrees(ModelConfig {
        rope_scaling: scaling,
        rope_layout: RopeLayout::Half,
        ..llama()
    });
}

#[test]
fn llama3_rope_scaling_by_tensor() {
    let mut model = Tiny::new(llama(), 12);
    model.push(
        "rope_freqs.weight",
        &[8],
        vec![1.0, 1.0, 1.5, 2.0, 5.0, 8.0, 8.0, 8.0],
    );
    agrees_with(&model);
}

#[test]
fn qwen2_with_biases() {
    let config = ModelConfig {
        family: Family::Qwen2,
        qkv_bias: true,
        rope_layout: RopeLayout::Half,
        norm_eps: 1e-6,
        rope_theta: 1e6,
        tied_embeddings: true,
        add_bos: false,
        bos: None,
        ..llama()
    };
    agrees(config);
}

#[test]
fn mistral_with_a_window_shorter_than_the_text() {
    for window in [1, 37, 64, 149] {
        agrees(ModelConfig {
            family: Family::Mistral,
            sliding_window: Some(window),
            ..llama()
        });
    }
}

#[test]
fn a_window_changes_the_logits() {
    // The f64 implementation would not notice a window that both ignore.
    let model = Tiny::new(llama(), 11);
    let mut windowed = model.clone();
    windowed.config.sliding_window = Some(37);
    let tokens = model.prompt(60, 5);
    let (whole, cut) = (
        reference::logits(&model, &tokens),
        reference::logits(&windowed, &tokens),
    );
    assert_eq!(whole[36], cut[36]);
    assert_ne!(whole[37], cut[37]);
}
