//! Models that contradict themselves are refused by name; encodings load to what they stand for.

mod support;

use casemate_container::{DType, ModelConfig, RopeScaling};
use casemate_engine::{ChatError, Compute, EngineOptions, LoadError, TokenizerError};
use casemate_kernels::mem::{HUGE_PAGE, Purpose, Region};
use half::f16;
use support::tiny::{Random, Tiny, llama};
use support::{load, logits, options, reference, try_load};

fn refused(model: &Tiny) -> LoadError {
    match try_load(model, &options(Compute::Int8)) {
        Err(error) => error,
        Ok(_) => panic!("the model was loaded"),
    }
}

#[test]
fn refuses_missing_tensors() {
    for name in [
        "token_embd.weight",
        "output.weight",
        "blk.1.ffn_down.weight",
        "blk.0.attn_norm.weight",
        "output_norm.weight",
    ] {
        let mut model = Tiny::new(llama(), 1);
        model.remove(name);
        assert!(
            matches!(refused(&model), LoadError::MissingTensor { name: found } if found == name)
        );
    }
    let mut model = Tiny::new(
        ModelConfig {
            qkv_bias: true,
            ..llama()
        },
        1,
    );
    model.remove("blk.1.attn_k.bias");
    assert!(
        matches!(refused(&model), LoadError::MissingTensor { name } if name == "blk.1.attn_k.bias")
    );
}

#[test]
fn refuses_tensors_that_nothing_explains() {
    for (config, name) in [
        (llama(), "blk.2.attn_q.weight"),
        (llama(), "blk.0.attn_q.bias"),
        (llama(), "surprise"),
        (
            ModelConfig {
                tied_embeddings: true,
                ..llama()
            },
            "output.weight",
        ),
        (
            ModelConfig {
                rope_scaling: RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_context: 64,
                },
                ..llama()
            },
            "rope_freqs.weight",
        ),
    ] {
        let mut model = Tiny::new(config, 1);
        model.push(name, &[8], vec![1.0; 8]);
        assert!(
            matches!(refused(&model), LoadError::UnknownTensor { name: found } if found == name),
            "{name}"
        );
    }
}

#[test]
fn refuses_other_shapes() {
    for (name, shape) in [
        ("blk.0.attn_q.weight", [32, 48]),
        ("blk.1.attn_k.weight", [48, 32]),
        ("token_embd.weight", [299, 48]),
        ("output.weight", [48, 300]),
    ] {
        let mut model = Tiny::new(llama(), 1);
        model.remove(name);
        model.push(name, &shape, vec![0.1; (shape[0] * shape[1]) as usize]);
        match refused(&model) {
            LoadError::Shape {
                name: found,
                found: shape_found,
                ..
            } => {
                assert_eq!((found.as_str(), &shape_found[..]), (name, &shape[..]));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn refuses_values_that_are_not_finite() {
    for name in [
        "blk.1.ffn_up.weight",
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    ] {
        // Matrices of 4 bits have a test of their own.
        for compute in Compute::ALL
            .iter()
            .copied()
            .filter(|c| *c != Compute::Q4G32)
        {
            let mut model = Tiny::new(llama(), 1);
            let at = model.index(name);
            let (shape, mut values) = (model.tensors[at].shape.clone(), model.values[at].clone());
            *values.last_mut().unwrap() = f32::NAN;
            model.remove(name);
            model.push(name, &shape, values);
            match try_load(&model, &options(compute)) {
                Err(LoadError::NonFinite { name: found }) => {
                    assert!(found.contains(name), "{found}")
                }
                other => panic!("{:?}", other.map(|_| ())),
            }
        }
    }
    let mut model = Tiny::new(llama(), 1);
    model.push("rope_freqs.weight", &[8], vec![0.0; 8]);
    assert!(matches!(
        refused(&model),
        LoadError::Config {
            field: "rope_freqs.weight",
            ..
        }
    ));
}

#[test]
fn refuses_tokenizers_and_templates_of_other_models() {
    let model = Tiny::new(
        ModelConfig {
            vocab: 258,
            ..llama()
        },
        1,
    );
    assert!(matches!(
        refused(&model),
        LoadError::Tokenizer(TokenizerError::IdOutsideVocabulary {
            id: 258,
            vocab: 258
        })
    ));
    let mut model = Tiny::new(llama(), 1);
    model.assets[0].1.truncate(50);
    assert!(matches!(
        refused(&model),
        LoadError::Tokenizer(TokenizerError::File(_))
    ));
    model.assets.clear();
    assert!(matches!(
        refused(&model),
        LoadError::MissingAsset {
            name: "tokenizer.json"
        }
    ));
    let mut model = Tiny::new(llama(), 1);
    model
        .assets
        .push(("chat_template.jinja".into(), b"{% for %}".to_vec()));
    assert!(matches!(
        refused(&model),
        LoadError::ChatTemplate(ChatError::Faulty { line: 1, .. })
    ));
    model.assets[1].1 = b"{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".to_vec();
    let engine = load(&model, &options(Compute::Int8));
    let messages = [casemate_engine::ChatMessage {
        role: "user".into(),
        content: "hi".into(),
        ..Default::default()
    }];
    let prompt = engine
        .chat()
        .unwrap()
        .render(&messages, true, time::OffsetDateTime::UNIX_EPOCH)
        .unwrap();
    assert_eq!(prompt.text(), "<s>hi</s>");
    assert_eq!(
        engine.tokenizer().encode_prompt(&prompt).unwrap(),
        [1, 107, 108, 2]
    );
    assert!(
        load(&Tiny::new(llama(), 1), &options(Compute::Int8))
            .chat()
            .is_none()
    );
}

#[test]
fn refuses_options_that_cannot_work() {
    let model = Tiny::new(llama(), 1);
    let refused = |options: EngineOptions| try_load(&model, &options).err().expect("refused");
    let base = || options(Compute::Int8);
    for (options, name) in [
        (
            EngineOptions {
                threads: 0,
                ..base()
            },
            "threads",
        ),
        (
            EngineOptions {
                max_batch: 0,
                ..base()
            },
            "max_batch",
        ),
        (
            EngineOptions {
                max_waiting: 0,
                ..base()
            },
            "max_waiting",
        ),
        (
            EngineOptions {
                max_context: 1,
                ..base()
            },
            "max_context",
        ),
    ] {
        assert!(
            matches!(refused(options), LoadError::Option { option, .. } if option == name),
            "{name}"
        );
    }
    // 8 pages of 2 layers, 2 heads, 64 positions, 16 + 16 elements in f16.
    let needed = 8 * 2 * 2 * 64 * 32 * 2;
    let error = refused(EngineOptions {
        kv_bytes: Some(needed - 1),
        ..base()
    });
    assert!(
        matches!(error, LoadError::KvBudget { context: 512, needed: n, given } if n == needed && given == needed - 1)
    );
}

/// Matrices in all encodings of 32 weights, in turns.
fn encoded(tied: bool) -> Tiny {
    Tiny::new(wide(tied), 4).encoded(&[
        DType::Q8_0,
        DType::F16,
        DType::Q4_0,
        DType::BF16,
        DType::Q4_1,
    ])
}

/// Widths that blocks of 32 divide.
fn wide(tied_embeddings: bool) -> ModelConfig {
    ModelConfig {
        hidden: 64,
        ffn: 96,
        tied_embeddings,
        ..llama()
    }
}

#[test]
fn every_encoding_loads_to_what_it_stands_for() {
    for tied in [false, true] {
        let model = encoded(tied);
        let tokens = model.prompt(20, 6);
        let expected = reference::logits(&model, &tokens).concat();
        let found = logits(&load(&model, &options(Compute::F32)), &tokens).concat();
        let spread = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
        for (a, b) in found.iter().zip(&expected) {
            assert!((f64::from(*a) - b).abs() < 2e-5 * spread, "{a} {b}");
        }
    }
}

#[test]
fn weights_of_4_bits_stay_what_and_as_small_as_they_are() {
    // Q4_0 is Q8_0 with small numbers: the same logits, bit for bit.
    for tied in [false, true] {
        let narrow = Tiny::new(wide(tied), 4).encoded(&[DType::Q4_0]);
        let mut widened = narrow.clone();
        for name in narrow.matrices() {
            let mut bytes = Vec::new();
            for block in narrow.bytes(&name).chunks(18) {
                bytes.extend(&block[..2]);
                let low = block[2..].iter().map(|b| b & 15);
                let high = block[2..].iter().map(|b| b >> 4);
                bytes.extend(low.chain(high).map(|n| n.wrapping_sub(8)));
            }
            let values = narrow.tensor(&name).to_vec();
            widened.encode(&name, DType::Q8_0, bytes, values);
        }
        let tokens = narrow.prompt(30, 6);
        let (four, eight) = (
            load(&narrow, &options(Compute::Q4G32)),
            load(&widened, &options(Compute::Int8)),
        );
        assert_eq!(logits(&four, &tokens), logits(&eight, &tokens));
        // Every matrix is padded to 32 rows; the table of embeddings is read as it is sealed, or
        // from the output layer.
        let blocks = |name: String| {
            let shape = &narrow.tensors[narrow.index(&name)].shape;
            let rows = match &name[..] {
                "token_embd.weight" if !tied => shape[0],
                _ => shape[0].next_multiple_of(32),
            };
            rows * shape[1] / 32
        };
        let blocks: u64 = narrow.matrices().into_iter().map(blocks).sum();
        assert_eq!(four.weight_bytes(), blocks * 18);
        assert_eq!(four.compute_name(), "q4-g32");
    }
}

#[test]
fn mixed_files_keep_4_bits_where_they_have_them() {
    let turns = [
        DType::Q4_1,
        DType::Q8_0,
        DType::Q4_0,
        DType::F16,
        DType::Q4_0,
    ];
    for tied in [false, true] {
        let model = Tiny::new(wide(tied), 4).encoded(&turns);
        let tokens = model.prompt(50, 6);
        let expected = reference::logits(&model, &tokens).concat();
        let found = logits(&load(&model, &options(Compute::Q4G32)), &tokens).concat();
        let square = |x: f64| x * x;
        let spread: f64 = expected.iter().map(|x| square(*x)).sum();
        let differences = found.iter().zip(&expected);
        let differences: f64 = differences.map(|(a, b)| square(f64::from(*a) - b)).sum();
        let typical = (differences / spread).sqrt();
        assert!((1e-4..0.04).contains(&typical), "differs by {typical}");
    }
}

#[test]
fn arithmetic_for_4_bits_wants_some() {
    for dtypes in [vec![DType::F32], vec![DType::Q8_0, DType::BF16]] {
        let model = Tiny::new(wide(false), 4).encoded(&dtypes);
        let refused = try_load(&model, &options(Compute::Q4G32));
        assert!(matches!(refused, Err(LoadError::NoFourBits)));
    }
    for dtype in [DType::Q4_0, DType::Q4_1] {
        let mut model = Tiny::new(wide(false), 4).encoded(&[dtype]);
        let name = "blk.1.attn_v.weight";
        let (mut bytes, values) = (model.bytes(name).to_vec(), model.tensor(name).to_vec());
        let last = bytes.len() - if dtype == DType::Q4_0 { 18 } else { 20 };
        bytes[last..last + 2].copy_from_slice(&f16::NAN.to_le_bytes());
        model.encode(name, dtype, bytes, values);
        match try_load(&model, &options(Compute::Q4G32)) {
            Err(LoadError::NonFinite { name: found }) => assert_eq!(found, name),
            other => panic!("{:?}", other.map(|_| ())),
        }
    }
}

#[test]
fn q8_0_reaches_int8_without_loss() {
    // Values on the grid of Q8_0, whose blocks use the whole range: as Q8_0 and as F32 they are the
    // same int8 matrix.
    let mut plain = Tiny::new(wide(false), 4);
    let mut quantised = plain.clone();
    let mut random = Random(99);
    for name in plain.matrices() {
        let (mut bytes, mut held) = (Vec::new(), Vec::new());
        for _ in 0..plain.tensor(&name).len() / 32 {
            let d = f16::from_f32(0.002 + 0.001 * random.unit());
            bytes.extend(d.to_le_bytes());
            for i in 0..32 {
                let q = if i == 5 {
                    127
                } else {
                    random.below(255) as i32 - 127
                };
                bytes.push(q as i8 as u8);
                held.push(q as f32 * d.to_f32());
            }
        }
        quantised.encode(&name, DType::Q8_0, bytes, held.clone());
        let shape = plain.tensors[plain.index(&name)].shape.clone();
        plain.remove(&name);
        plain.push(&name, &shape, held);
    }
    let tokens = plain.prompt(30, 6);
    let from = |model| logits(&load(model, &options(Compute::Int8)), &tokens);
    assert_eq!(from(&quantised), from(&plain));
}

#[test]
fn all_matrices_share_one_region() {
    // No matrix is as large as a huge page; all together are several.
    let config = ModelConfig {
        hidden: 256,
        ffn: 1024,
        layers: 8,
        ..llama()
    };
    for tied_embeddings in [false, true] {
        let model = Tiny::new(
            ModelConfig {
                tied_embeddings,
                ..config.clone()
            },
            1,
        );
        let mixed = model
            .clone()
            .encoded(&[DType::Q4_1, DType::F16, DType::Q4_0]);
        for compute in Compute::ALL.iter().copied() {
            let model = if compute == Compute::Q4G32 {
                &mixed
            } else {
                &model
            };
            let engine = load(model, &options(compute));
            let Some(memory) = engine.weight_memory() else {
                eprintln!("skipped: this system has no /proc/self/smaps to ask");
                return;
            };
            assert!(memory.bytes > 2 * HUGE_PAGE as u64);
            assert_eq!(
                memory.resident, memory.bytes,
                "{compute:?}: a matrix lies elsewhere, or room was reserved that none fills"
            );
            let mut plain = Region::zeroed(memory.bytes as usize, Purpose::Weights).unwrap();
            plain.fill(1);
            let plain = plain.extent().granted().unwrap();
            assert_eq!(
                (memory.huge > 0, memory.locked, memory.dump_excluded),
                (plain.huge > 0, plain.locked, plain.dump_excluded),
                "{compute:?}"
            );
        }
    }
}
