//! GGUF files with one fault each, and the exact refusal.

mod support;

use casemate_import::{Fault, ImportError, Missing, Unsupported};

use support::gguf::*;
use support::{open, refusal, tensor};

#[test]
fn rejects_another_magic() {
    assert_eq!(
        fault(|gguf| gguf.magic = *b"GGML"),
        Fault::NotGguf { magic: *b"GGML" }
    );
}

#[test]
fn rejects_other_versions() {
    assert_eq!(
        unsupported(|gguf| gguf.version = 1),
        Unsupported::GgufVersion { version: 1 }
    );
    assert_eq!(
        unsupported(|gguf| gguf.version = 4),
        Unsupported::GgufVersion { version: 4 }
    );
    let big_endian = 3u32.swap_bytes();
    assert_eq!(
        unsupported(|gguf| gguf.version = big_endian),
        Unsupported::BigEndian
    );
}

#[test]
fn rejects_an_empty_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("empty.gguf");
    std::fs::write(&path, []).unwrap();
    assert_eq!(
        support::fault(&path),
        Fault::Truncated {
            what: "the magic number",
            offset: 0,
            wanted: 4,
            available: 0
        }
    );
}

#[test]
fn rejects_every_truncation_of_the_header() {
    let bytes = Gguf::tiny().bytes();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cut.gguf");
    let mut cuts: Vec<usize> = (0..400).collect();
    cuts.extend((400..bytes.len()).step_by(97));
    for cut in cuts {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        match support::fault(&path) {
            Fault::Truncated {
                offset,
                wanted,
                available,
                ..
            } => {
                assert!(
                    wanted > available && offset + available == cut as u64,
                    "cut at {cut}"
                );
            }
            // Behind the header it is the data that are short.
            Fault::OutOfBounds { available, .. } => assert!(available < cut as u64),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
}

#[test]
fn rejects_data_one_byte_short() {
    let gguf = Gguf::tiny();
    let offset = gguf.offset("blk.0.ffn_down.weight");
    assert_eq!(
        fault(|gguf| gguf.cut = 1),
        Fault::OutOfBounds {
            tensor: "blk.0.ffn_down.weight".into(),
            offset,
            size: 64 * 32 * 4,
            available: offset + 64 * 32 * 4 - 1
        }
    );
}

#[test]
fn rejects_huge_counts() {
    for count in [1 << 16 | 1, 1 << 40, u64::MAX] {
        assert_eq!(
            fault(|gguf| gguf.tensor_count = Some(count)),
            Fault::TooMany {
                what: "tensors",
                count,
                limit: 65_536
            }
        );
    }
    for count in [4097, u64::MAX] {
        assert_eq!(
            fault(|gguf| gguf.key_count = Some(count)),
            Fault::TooMany {
                what: "metadata keys",
                count,
                limit: 4096
            }
        );
    }
    for count in [(4 << 20) + 1, 1 << 61, u64::MAX] {
        let value = array(U8, count, &[]);
        assert_eq!(
            fault(|gguf| {
                gguf.set("x", ARRAY, value);
            }),
            Fault::TooMany {
                what: "array elements",
                count,
                limit: 4 << 20
            }
        );
    }
}

#[test]
fn rejects_arrays_longer_than_the_file() {
    let fault = fault(|gguf| {
        gguf.set("x", ARRAY, array(STRING, 1 << 20, &[]));
    });
    assert!(matches!(
        fault,
        Fault::Truncated { what: "a metadata array", wanted, .. } if wanted == 8 << 20
    ));
}

#[test]
fn many_arrays_share_one_limit() {
    // Each array is within the limit; the third one of 2 Mi elements is not.
    let value = array(U8, 2 << 20, &vec![0; 2 << 20]);
    let fault = fault(|gguf| {
        for key in ["x", "y", "z"] {
            gguf.set(key, ARRAY, value.clone());
        }
    });
    assert_eq!(
        fault,
        Fault::TooMany {
            what: "array elements",
            count: 2 << 20,
            limit: 4 << 20
        }
    );
}

#[test]
fn rejects_lying_string_lengths() {
    for length in [(1 << 20) + 1, 1 << 62, u64::MAX] {
        let value = length.to_le_bytes();
        assert_eq!(
            fault(|gguf| {
                gguf.set("x", STRING, value);
            }),
            Fault::TooLong {
                what: "a metadata string",
                length,
                limit: 1 << 20
            }
        );
    }
    let fault = fault(|gguf| {
        gguf.set("x", STRING, (1u64 << 20).to_le_bytes());
    });
    assert!(matches!(
        fault,
        Fault::Truncated {
            what: "a metadata string",
            wanted: 1_048_576,
            ..
        }
    ));
}

#[test]
fn rejects_long_tensor_names() {
    assert_eq!(
        fault(|gguf| gguf.tensors[0].name = vec![b'x'; 65]),
        Fault::TooLong {
            what: "a tensor name",
            length: 65,
            limit: 64
        }
    );
}

#[test]
fn rejects_names_that_are_not_utf8() {
    let fault_of = fault(|gguf| gguf.tensors[0].name = vec![0xC0, 0xAF]);
    assert!(matches!(
        fault_of,
        Fault::NotUtf8 {
            what: "a tensor name",
            ..
        }
    ));
    let fault_of = fault(|gguf| gguf.keys[0].0 = vec![0xFF]);
    assert_eq!(
        fault_of,
        Fault::NotUtf8 {
            what: "a metadata key",
            offset: 24
        }
    );
    let fault_of = fault(|gguf| {
        gguf.set("x", STRING, string([0xED, 0xA0, 0x80]));
    });
    assert!(matches!(
        fault_of,
        Fault::NotUtf8 {
            what: "a metadata string",
            ..
        }
    ));
}

#[test]
fn rejects_nested_arrays() {
    let fault = fault(|gguf| {
        gguf.set("x", ARRAY, array(ARRAY, 1, &array(U8, 0, &[])));
    });
    assert_eq!(fault, Fault::NestedArray { key: "x".into() });
}

#[test]
fn rejects_unknown_value_types() {
    for code in [13, u32::MAX] {
        assert_eq!(
            fault(|gguf| {
                gguf.set("x", code, [0; 8]);
            }),
            Fault::UnknownValueType {
                key: "x".into(),
                code
            }
        );
        assert_eq!(
            fault(|gguf| {
                gguf.set("x", ARRAY, array(code, 1, &[0; 8]));
            }),
            Fault::UnknownValueType {
                key: "x".into(),
                code
            }
        );
    }
}

#[test]
fn rejects_booleans_other_than_0_and_1() {
    assert_eq!(
        fault(|gguf| {
            gguf.set("x", BOOL, [2]);
        }),
        Fault::InvalidBool {
            key: "x".into(),
            value: 2
        }
    );
}

#[test]
fn rejects_duplicate_keys() {
    let fault = fault(|gguf| {
        gguf.keys
            .push((b"llama.block_count".to_vec(), U32, vec![1, 0, 0, 0]))
    });
    assert_eq!(
        fault,
        Fault::DuplicateKey {
            key: "llama.block_count".into()
        }
    );
}

#[test]
fn rejects_duplicate_tensors() {
    let fault = fault(|gguf| {
        gguf.add("output_norm.weight", &[32], TENSOR_F32);
    });
    assert_eq!(
        fault,
        Fault::DuplicateTensor {
            tensor: "output_norm.weight".into()
        }
    );
}

#[test]
fn rejects_impossible_alignments() {
    for alignment in [0u32, 3, 33, 1 << 21] {
        let fault = fault(|gguf| {
            gguf.set("general.alignment", U32, alignment.to_le_bytes());
        });
        assert_eq!(
            fault,
            Fault::Alignment {
                alignment: u64::from(alignment)
            }
        );
    }
}

#[test]
fn honours_the_stated_alignment() {
    let mut gguf = Gguf::tiny();
    gguf.alignment = 256;
    gguf.set("general.alignment", U32, 256u32.to_le_bytes());
    let (_guard, path) = gguf.write();
    assert_eq!(
        tensor(open(&path).as_ref(), "output_norm.weight"),
        gguf.tensors[1].data
    );
}

#[test]
fn rejects_tensors_off_the_alignment() {
    let offset = Gguf::tiny().offset("output_norm.weight") + 1;
    assert_eq!(
        fault(|gguf| gguf.tensor("output_norm.weight").offset = Some(offset)),
        Fault::Misaligned {
            tensor: "output_norm.weight".into(),
            offset,
            alignment: 32
        }
    );
}

#[test]
fn rejects_overlapping_tensors() {
    let gguf = Gguf::tiny();
    let offset = gguf.offset("blk.0.attn_norm.weight");
    assert_eq!(
        fault(|gguf| gguf.tensor("output_norm.weight").offset = Some(offset)),
        Fault::Overlap {
            first: "output_norm.weight".into(),
            second: "blk.0.attn_norm.weight".into()
        }
    );
    // One inside another.
    let inside = gguf.offset("blk.0.attn_q.weight") + 1024;
    assert_eq!(
        fault(|gguf| gguf.tensor("output_norm.weight").offset = Some(inside)),
        Fault::Overlap {
            first: "blk.0.attn_q.weight".into(),
            second: "output_norm.weight".into()
        }
    );
}

#[test]
fn rejects_offsets_past_the_end_and_past_64_bits() {
    for offset in [1 << 20, 1 << 63, u64::MAX - 31] {
        let fault = fault(|gguf| gguf.tensor("output_norm.weight").offset = Some(offset));
        assert!(matches!(
            fault,
            Fault::OutOfBounds { tensor, offset: found, size: 128, .. }
                if tensor == "output_norm.weight" && found == offset
        ));
    }
}

#[test]
fn rejects_impossible_dimensions() {
    for dimensions in [
        vec![0],
        vec![32, 0],
        vec![1 << 33, 1 << 33],
        vec![u64::MAX],
        vec![1 << 62, 2],
    ] {
        let expected = dimensions.clone();
        assert_eq!(
            fault(|gguf| gguf.tensor("output_norm.weight").dimensions = dimensions),
            Fault::Dimensions {
                tensor: "output_norm.weight".into(),
                dimensions: expected
            }
        );
    }
    for count in [0, 5] {
        assert_eq!(
            fault(|gguf| gguf.tensor("output_norm.weight").dimensions = vec![1; count]),
            Fault::DimensionCount {
                tensor: "output_norm.weight".into(),
                count: count as u64
            }
        );
    }
}

#[test]
fn rejects_rows_of_broken_blocks() {
    let fault = fault(|gguf| {
        let tensor = gguf.tensor("token_embd.weight");
        tensor.dimensions = vec![33, 265];
    });
    assert_eq!(
        fault,
        Fault::PartialBlock {
            tensor: "token_embd.weight".into(),
            columns: 33,
            block: 32
        }
    );
}

// Faults of the model.

#[test]
fn rejects_other_architectures_by_name() {
    let need = unsupported(|gguf| {
        gguf.set("general.architecture", STRING, string("gemma3"));
    });
    assert_eq!(
        need,
        Unsupported::Architecture {
            name: "gemma3".into()
        }
    );
}

#[test]
fn rejects_one_part_of_a_split_model() {
    let need = unsupported(|gguf| {
        gguf.set("split.count", U32, 3u32.to_le_bytes());
    });
    assert_eq!(need, Unsupported::SplitGguf { parts: 3 });
}

#[test]
fn rejects_missing_tensors() {
    for name in [
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_v.weight",
        "blk.0.ffn_norm.weight",
    ] {
        let part = missing(|gguf| gguf.tensors.retain(|tensor| tensor.name != name.as_bytes()));
        assert_eq!(
            part,
            Missing::Tensor {
                tensor: name.into()
            }
        );
    }
}

#[test]
fn rejects_unknown_tensors() {
    for name in [
        "blk.1.attn_q.weight",
        "blk.0.attn_q_norm.weight",
        "blk.00.attn_q.weight",
        "x",
    ] {
        let need = unsupported(|gguf| {
            gguf.add(name, &[32, 32], TENSOR_F32);
        });
        assert_eq!(
            need,
            Unsupported::UnknownTensor {
                tensor: name.into()
            }
        );
    }
}

#[test]
fn rejects_wrong_shapes() {
    for (name, dimensions, expected) in [
        ("blk.0.attn_k.weight", vec![16, 32], vec![16, 32]),
        ("blk.0.ffn_norm.weight", vec![32, 1], vec![32]),
        ("output_norm.weight", vec![16], vec![32]),
    ] {
        let mut found = dimensions.clone();
        found.reverse();
        assert_eq!(
            fault(|gguf| gguf.tensor(name).dimensions = dimensions),
            Fault::WrongShape {
                tensor: name.into(),
                found,
                expected
            }
        );
    }
}

#[test]
fn rejects_missing_keys() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.bos_token_id",
    ] {
        assert_eq!(
            missing(|gguf| {
                gguf.remove(key);
            }),
            Missing::Key { key: key.into() }
        );
    }
}

#[test]
fn rejects_impossible_numbers() {
    for (key, value, field) in [
        ("llama.block_count", 0u32, "layers"),
        ("llama.block_count", u32::MAX, "layers"),
        ("llama.embedding_length", 0, "hidden"),
        ("llama.attention.head_count", 0, "heads"),
        ("llama.attention.head_count_kv", 0, "kv_heads"),
        ("llama.attention.head_count", 3, "kv_heads"),
        ("llama.attention.key_length", 15, "head_dim"),
        ("llama.context_length", u32::MAX, "context"),
    ] {
        let mut gguf = Gguf::tiny();
        gguf.set(key, U32, value.to_le_bytes());
        if key == "llama.attention.head_count" && value == 3 {
            gguf.set("llama.attention.head_count_kv", U32, 2u32.to_le_bytes());
        }
        let (_guard, path) = gguf.write();
        assert_eq!(
            support::fault(&path),
            Fault::Configuration { field },
            "{key} = {value}"
        );
    }
    for epsilon in [0.0f32, -1.0, f32::NAN, f32::INFINITY] {
        let fault = fault(|gguf| {
            gguf.set(
                "llama.attention.layer_norm_rms_epsilon",
                F32,
                epsilon.to_le_bytes(),
            );
        });
        assert_eq!(fault, Fault::Configuration { field: "norm_eps" });
    }
}

#[test]
fn rejects_values_of_the_wrong_type() {
    assert_eq!(
        fault(|gguf| {
            gguf.set("llama.block_count", STRING, string("1"));
        }),
        Fault::WrongType {
            key: "llama.block_count".into(),
            expected: "an integer"
        }
    );
    assert_eq!(
        fault(|gguf| {
            gguf.set(
                "llama.attention.head_count_kv",
                ARRAY,
                array(U32, 1, &[1, 0, 0, 0]),
            );
        }),
        Fault::WrongType {
            key: "llama.attention.head_count_kv".into(),
            expected: "an integer"
        }
    );
    assert_eq!(
        fault(|gguf| {
            gguf.set("llama.block_count", I32, (-1i32).to_le_bytes());
        }),
        Fault::OutOfRange {
            key: "llama.block_count".into(),
            value: "-1".into()
        }
    );
}

#[test]
fn rejects_settings_that_would_change_the_arithmetic() {
    for (key, kind, value, shown) in [
        (
            "llama.rope.scaling.type",
            STRING,
            string("yarn"),
            "\"yarn\"",
        ),
        (
            "llama.rope.dimension_count",
            U32,
            8u32.to_le_bytes().to_vec(),
            "8",
        ),
        (
            "llama.attention.value_length",
            U32,
            8u32.to_le_bytes().to_vec(),
            "8",
        ),
        ("llama.expert_count", U32, 8u32.to_le_bytes().to_vec(), "8"),
        ("llama.logit_scale", F32, 2f32.to_le_bytes().to_vec(), "2"),
        ("tokenizer.ggml.add_eos_token", BOOL, vec![1], "true"),
        (
            "tokenizer.ggml.remove_extra_whitespaces",
            BOOL,
            vec![1],
            "true",
        ),
    ] {
        let need = unsupported(|gguf| {
            gguf.set(key, kind, value);
        });
        assert_eq!(
            need,
            Unsupported::Setting {
                key: key.into(),
                value: shown.into()
            }
        );
    }
}

#[test]
fn errors_name_the_file() {
    let mut gguf = Gguf::tiny();
    gguf.magic = *b"RIFF";
    let (_guard, path) = gguf.write();
    let text = refusal(&path).to_string();
    assert!(
        text.contains("tiny.gguf") && text.contains("not a GGUF file"),
        "{text}"
    );
    let absent = path.with_file_name("absent.gguf");
    assert!(matches!(refusal(&absent), ImportError::Io { path, .. } if path == absent));
}
