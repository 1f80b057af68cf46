use std::fs;

use casemate_container::{Family, ModelConfig, RopeLayout, RopeScaling};

use crate::test_data::shared;

fn llama3(factor: f32) -> RopeScaling {
    RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    }
}

/// A Llama of these sizes; what most published ones share is filled in.
fn llama(sizes: [u32; 8]) -> ModelConfig {
    let [
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        context,
    ] = sizes;
    ModelConfig {
        family: Family::Llama,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        context,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rope_layout: RopeLayout::Half,
        sliding_window: None,
        tied_embeddings: false,
        qkv_bias: false,
        bos: Some(1),
        eos: vec![2],
        add_bos: false,
    }
}

#[test]
fn reads_every_published_configuration() {
    let llama31 = |sizes, factor| ModelConfig {
        rope_theta: 500_000.0,
        rope_scaling: llama3(factor),
        bos: Some(128_000),
        eos: vec![128_001],
        ..llama(sizes)
    };
    let expected = [
        (
            "Llama-2-7b-hf",
            llama([4096, 32, 32, 32, 128, 11008, 32000, 4096]),
        ),
        (
            "Llama-3.1-8B",
            llama31([4096, 32, 32, 8, 128, 14336, 128_256, 131_072], 8.0),
        ),
        (
            "Llama-3.1-70B",
            llama31([8192, 80, 64, 8, 128, 28672, 128_256, 131_072], 8.0),
        ),
        (
            "Llama-3.2-1B-Instruct",
            ModelConfig {
                tied_embeddings: true,
                ..llama31([2048, 16, 32, 8, 64, 8192, 128_256, 131_072], 32.0)
            },
        ),
        (
            "Mistral-7B-v0.1.DERIVED",
            ModelConfig {
                family: Family::Mistral,
                sliding_window: Some(4096),
                ..llama([4096, 32, 32, 8, 128, 14336, 32000, 32768])
            },
        ),
        (
            "Qwen2-0.5B",
            ModelConfig {
                family: Family::Qwen2,
                norm_eps: 1e-6,
                rope_theta: 1_000_000.0,
                tied_embeddings: true,
                qkv_bias: true,
                bos: Some(151_643),
                eos: vec![151_643],
                ..llama([896, 24, 14, 2, 64, 4864, 151_936, 131_072])
            },
        ),
        (
            "SmolLM2-135M-Instruct",
            ModelConfig {
                rope_theta: 100_000.0,
                tied_embeddings: true,
                ..llama([576, 30, 9, 3, 64, 1536, 49152, 8192])
            },
        ),
        (
            "TinyLlama-1.1B-Chat-v1.0",
            llama([2048, 22, 32, 4, 64, 5632, 32000, 2048]),
        ),
        (
            "stories15M.DERIVED",
            ModelConfig {
                tied_embeddings: true,
                ..llama([288, 6, 6, 6, 48, 768, 32000, 256])
            },
        ),
        (
            "stories260K.DERIVED",
            ModelConfig {
                tied_embeddings: true,
                ..llama([64, 5, 8, 4, 8, 172, 512, 512])
            },
        ),
    ];
    let Some(directory) = shared("configs") else {
        return;
    };
    for (name, expected) in &expected {
        let json = fs::read(directory.join(format!("{name}.config.json"))).unwrap();
        assert_eq!(super::config::read(&json).unwrap(), *expected, "{name}");
        expected.check().unwrap();
    }
    let published = fs::read_dir(directory)
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_str().unwrap().ends_with(".config.json")
        })
        .count();
    assert_eq!(published, expected.len(), "no configuration is left out");
}
