//! Models that contradict themselves are refused by name; encodings load to what they stand for.

mod support;

use casemate_container::{DType, ModelConfig, RopeScaling};
use casemate_engine::{ChatError, Compute, EngineOptions, LoadError, TokenizerError};
use casemate_kernels::mem::{HUGE_PAGE, Purpose, Region};
use half::{bf16, f16};
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
        for compute in Compute::ALL.iter().copied() {
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

/// Encodes each tensor of a model in another encoding; the values become those that the encoding
/// holds.
fn encoded(tied: bool) -> Tiny {
    let config = ModelConfig {
        hidden: 64,
        ffn: 96,
        tied_embeddings: tied,
        ..llama()
    };
    let mut model = Tiny::new(config, 4);
    let names: Vec<String> = model
        .tensors
        .iter()
        .filter(|t| t.shape.len() == 2)
        .map(|t| t.name.clone())
        .collect();
    for (i, name) in names.iter().enumerate() {
        let values = model.tensor(name).to_vec();
        let mut bytes = Vec::new();
        let mut held = Vec::new();
        let dtype = [
            DType::Q8_0,
            DType::F16,
            DType::Q4_0,
            DType::BF16,
            DType::Q4_1,
        ][i % 5];
        for block in values.chunks(32) {
            let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
            let nibbles = |q: &[u8]| (0..16).map(|i| q[i] | q[i + 16] << 4).collect::<Vec<u8>>();
            match dtype {
                DType::F16 => block.iter().for_each(|&x| {
                    bytes.extend(f16::from_f32(x).to_le_bytes());
                    held.push(f16::from_f32(x).to_f32());
                }),
                DType::BF16 => block.iter().for_each(|&x| {
                    bytes.extend(bf16::from_f32(x).to_le_bytes());
                    held.push(bf16::from_f32(x).to_f32());
                }),
                DType::Q8_0 => {
                    let d = f16::from_f32(largest / 127.0);
                    bytes.extend(d.to_le_bytes());
                    for x in block {
                        let q = (x / d.to_f32()).round().clamp(-127.0, 127.0);
                        bytes.push(q as i8 as u8);
                        held.push(q * d.to_f32());
                    }
                }
                DType::Q4_0 => {
                    let d = f16::from_f32(largest / 7.0);
                    let q: Vec<u8> = block.iter().map(|x| (x / d.to_f32() + 8.5) as u8).collect();
                    bytes.extend(d.to_le_bytes());
                    bytes.extend(nibbles(&q));
                    held.extend(q.iter().map(|&q| (f32::from(q) - 8.0) * d.to_f32()));
                }
                _ => {
                    let (d, m) = (f16::from_f32(largest / 7.5), f16::from_f32(-largest));
                    let q: Vec<u8> = block
                        .iter()
                        .map(|x| ((x - m.to_f32()) / d.to_f32() + 0.5).min(15.0) as u8)
                        .collect();
                    bytes.extend(d.to_le_bytes());
                    bytes.extend(m.to_le_bytes());
                    bytes.extend(nibbles(&q));
                    held.extend(q.iter().map(|&q| f32::from(q) * d.to_f32() + m.to_f32()));
                }
            }
        }
        model.encode(name, dtype, bytes, held);
    }
    model
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
fn q8_0_reaches_int8_without_loss() {
    // Values on the grid of Q8_0, whose blocks use the whole range: as Q8_0 and as F32 they are the
    // same int8 matrix.
    let config = ModelConfig {
        hidden: 64,
        ffn: 96,
        ..llama()
    };
    let mut plain = Tiny::new(config, 4);
    let mut quantised = plain.clone();
    let mut random = Random(99);
    let names: Vec<String> = plain
        .tensors
        .iter()
        .filter(|t| t.shape.len() == 2)
        .map(|t| t.name.clone())
        .collect();
    for name in names {
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
        for compute in Compute::ALL.iter().copied() {
            let engine = load(&model, &options(compute));
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
