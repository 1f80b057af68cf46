//! Computing without telling which tokens by what is touched: the same logits, the same tokens, the same texts.

mod support;

use casemate_container::{DType, ModelConfig};
use casemate_engine::{Compute, Engine, EngineOptions, LoadError, Sampling, Speculation};
use support::tiny::{Random, Tiny, llama};
use support::{generate, greedy, load, logits, options, try_load};

fn both(model: &Tiny, compute: Compute) -> [Engine; 2] {
    [false, true].map(|oblivious| {
        let options = EngineOptions {
            oblivious,
            ..options(compute)
        };
        load(model, &options)
    })
}

fn config(hidden: u32, ffn: u32, tied_embeddings: bool) -> ModelConfig {
    ModelConfig {
        hidden,
        ffn,
        tied_embeddings,
        ..llama()
    }
}

/// A model whose embeddings are random blocks of this encoding.
fn with_embeddings(dtype: DType, tied: bool) -> Tiny {
    let mut model = Tiny::new(config(256, 64, tied), 5);
    let name = "token_embd.weight";
    let values = model.tensor(name).to_vec();
    let bytes = dtype.bytes_for(&[values.len() as u64]).unwrap() as usize;
    let mut random = Random(9);
    let mut bytes: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
    // Scales are near 2^-8.
    let (block, scales) = match dtype {
        DType::Q4_K => (144, &[1, 3][..]),
        _ => (210, &[209][..]),
    };
    for block in bytes.chunks_mut(block) {
        scales.iter().for_each(|&at| block[at] = 0x1C);
    }
    model.encode(name, dtype, bytes, values);
    model
}

/// Every encoding of the table of embeddings, with every arithmetic; read as sealed, or from a tied output layer.
#[test]
fn embeddings_of_every_encoding_are_found() {
    let narrow = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
    ];
    let wide = [DType::Q4_K, DType::Q6_K];
    let mut combinations = 0;
    for tied in [false, true] {
        let of_32 = |dtype: &DType| {
            (
                *dtype,
                Tiny::new(config(64, 96, tied), 5).encoded(&[*dtype]),
            )
        };
        let of_256 = |dtype: &DType| (*dtype, with_embeddings(*dtype, tied));
        let models = narrow.iter().map(of_32).chain(wide.iter().map(of_256));
        for (dtype, model) in models {
            for compute in Compute::ALL.iter().copied() {
                if !compute.suits(model.tensors.iter().map(|t| t.dtype)) {
                    continue;
                }
                let [usual, hiding] = both(&model, compute);
                // More rows than are looked for at once.
                let text = model.prompt(70, 8);
                let same = logits(&usual, &text) == logits(&hiding, &text);
                assert!(same, "{dtype}, {}, tied: {tied}", compute.name());
                combinations += 1;
            }
        }
    }
    assert!(combinations > 60, "{combinations}");
}

#[test]
fn tokens_and_texts_are_the_same() {
    let model = Tiny::printable(config(64, 96, false), 5);
    let [usual, hiding] = both(&model, Compute::Int8);
    for (seed, sampling) in [
        Sampling::default(),
        Sampling {
            temperature: 0.9,
            ..Sampling::default()
        },
        Sampling {
            temperature: 1.5,
            top_k: 7,
            top_p: 0.8,
            ..Sampling::default()
        },
        Sampling {
            temperature: 1.1,
            min_p: 0.05,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            repetition_penalty: 1.2,
            bias: vec![(70, 3.0), (80, -3.0)],
            ..Sampling::default()
        },
    ]
    .into_iter()
    .enumerate()
    {
        let mut request = greedy(&model.prompt(20, seed as u64), 60);
        request.ignore_end = true;
        request.sampling = Sampling {
            seed: seed as u64,
            ..sampling
        };
        let expected = generate(&usual, request.clone());
        assert_eq!(expected.ids.len(), 60);
        assert_eq!(generate(&hiding, request), expected);
    }
    let (table, texts) = hiding.oblivious_bytes().unwrap();
    assert!(table >= 300 * 64 && texts >= 300, "{table} {texts}");
    assert_eq!(usual.oblivious_bytes(), None);
}

#[test]
fn guesses_do_not_go_with_it() {
    let options = EngineOptions {
        oblivious: true,
        speculation: Speculation::PromptLookup,
        ..options(Compute::Int8)
    };
    let refused = try_load(&Tiny::new(config(64, 96, true), 5), &options).err();
    assert!(matches!(refused, Some(LoadError::Guesses)));
}
