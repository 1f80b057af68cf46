//! The weights of Hugging Face directories: names, safetensors headers and shards, each fault with its exact refusal.

mod support;

use casemate_import::{Fault, Missing, Unsupported};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use support::directory::*;

#[test]
fn refuses_missing_unknown_and_misshapen_tensors() {
    let part = missing(|model| {
        model.without("model.layers.0.mlp.up_proj.weight");
    });
    assert_eq!(
        part,
        Missing::Tensor {
            tensor: "blk.0.ffn_up.weight".into()
        }
    );
    for name in [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.01.self_attn.q_proj.weight",
        "model.layers.+0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "token_embd.weight",
        "lm_head.bias",
    ] {
        let need = unsupported(|model| {
            model.add(name, Dtype::F32, &[1]);
        });
        assert_eq!(
            need,
            Unsupported::UnknownTensor {
                tensor: name.into()
            }
        );
    }
    let need = unsupported(|model| {
        model.add("model.layers.1.mlp.up_proj.weight", Dtype::F32, &[64, 32]);
    });
    assert_eq!(
        need,
        Unsupported::UnknownTensor {
            tensor: "blk.1.ffn_up.weight".into()
        }
    );
    let fault = fault(|model| model.tensors[0].2 = vec![32, 265]);
    assert_eq!(
        fault,
        Fault::WrongShape {
            tensor: "token_embd.weight".into(),
            found: vec![32, 265],
            expected: vec![265, 32]
        }
    );
}

#[test]
fn ignores_what_carries_nothing() {
    let model = opened(|model| {
        model.add(
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            Dtype::F64,
            &[8],
        );
        model.add("model.rotary_emb.inv_freq", Dtype::F32, &[8]);
        model.add("lm_head.weight", Dtype::BF16, &[265, 32]);
    });
    assert_eq!(model.tensors().len(), 11);
}

#[test]
fn an_untied_model_needs_its_output_matrix() {
    let part = missing(|model| model.config["tie_word_embeddings"] = json!(false));
    assert_eq!(
        part,
        Missing::Tensor {
            tensor: "output.weight".into()
        }
    );
    let model = opened(|model| {
        model.config["tie_word_embeddings"] = json!(false);
        model.add("lm_head.weight", Dtype::BF16, &[265, 32]);
    });
    assert!(
        model
            .tensors()
            .iter()
            .any(|tensor| tensor.name == "output.weight")
    );
}

#[test]
fn refuses_other_tensor_types_by_name() {
    for (dtype, name) in [
        (Dtype::F64, "F64"),
        (Dtype::I8, "I8"),
        (Dtype::F8_E4M3, "F8_E4M3"),
    ] {
        let need = unsupported(|model| model.tensors[1].1 = dtype);
        assert_eq!(
            need,
            Unsupported::TensorType {
                tensor: "model.norm.weight".into(),
                name: name.into()
            }
        );
    }
}

/// The fault of a weights file with this header and so many bytes of data.
fn weights_fault(header: &str, data: usize) -> Fault {
    let (_guard, path) = with_weights(safetensors_file(header, data));
    support::fault(&path)
}

#[test]
fn rejects_lying_header_lengths() {
    for length in [1 << 63, u64::MAX, (16 << 20) + 1] {
        let (_guard, path) = with_weights([&u64::to_le_bytes(length)[..], b"{}"].concat());
        let expected = Fault::TooLong {
            what: "the safetensors header",
            length,
            limit: 16 << 20,
        };
        assert_eq!(support::fault(&path), expected);
    }
    let (_guard, path) = with_weights([&u64::to_le_bytes(3)[..], b"{}"].concat());
    assert_eq!(
        support::fault(&path),
        Fault::Truncated {
            what: "the safetensors header",
            offset: 8,
            wanted: 3,
            available: 2
        }
    );
    for short in [0, 7] {
        let (_guard, path) = with_weights(vec![0; short]);
        assert_eq!(
            support::fault(&path),
            Fault::Truncated {
                what: "the safetensors header",
                offset: 0,
                wanted: 8,
                available: short as u64
            }
        );
    }
}

#[test]
fn rejects_headers_that_are_not_the_json_of_the_format() {
    for header in [
        "",
        "nonsense",
        "[]",
        "{\"a\":1}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}",
        "{} {}",
    ] {
        let fault = weights_fault(header, 4);
        assert!(
            matches!(
                fault,
                Fault::Json {
                    what: "the safetensors header",
                    ..
                }
            ),
            "{header}: {fault:?}"
        );
    }
    // Not UTF-8.
    let (_guard, path) = with_weights([&u64::to_le_bytes(6)[..], b"{\"\xff\":1"].concat());
    assert!(matches!(support::fault(&path), Fault::Json { .. }));
}

#[test]
fn rejects_duplicate_tensors() {
    let entry = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    assert_eq!(
        weights_fault(&format!("{{{entry},{entry}}}"), 4),
        Fault::DuplicateTensor { tensor: "a".into() }
    );
}

#[test]
fn rejects_bad_places() {
    let header = |first: [u64; 2], second: [u64; 2]| {
        json!({
            "a": {"dtype": "F32", "shape": [2], "data_offsets": first},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": second},
        })
        .to_string()
    };
    assert_eq!(
        weights_fault(&header([0, 8], [4, 12]), 12),
        Fault::Overlap {
            first: "a".into(),
            second: "b".into()
        }
    );
    assert_eq!(
        weights_fault(&header([0, 8], [0, 8]), 8),
        Fault::Overlap {
            first: "a".into(),
            second: "b".into()
        }
    );
    assert_eq!(
        weights_fault(&header([0, 8], [12, 20]), 20),
        Fault::Hole { offset: 8, size: 4 }
    );
    assert_eq!(
        weights_fault(&header([4, 12], [12, 20]), 20),
        Fault::Hole { offset: 0, size: 4 }
    );
    assert_eq!(
        weights_fault(&header([0, 8], [8, 16]), 17),
        Fault::Hole {
            offset: 16,
            size: 1
        }
    );
    for (begin, end, size) in [(8, 17, 9), (u64::MAX - 1, u64::MAX, 1), (16, 8, 0)] {
        assert_eq!(
            weights_fault(&header([0, 8], [begin, end]), 16),
            Fault::OutOfBounds {
                tensor: "b".into(),
                offset: begin,
                size,
                available: 16
            }
        );
    }
}

#[test]
fn rejects_sizes_that_do_not_follow_from_shapes() {
    let header = |shape: Value| {
        json!({"model.norm.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}})
            .to_string()
    };
    let name = || "model.norm.weight".to_owned();
    assert_eq!(
        weights_fault(&header(json!([3])), 8),
        Fault::WrongSize {
            tensor: name(),
            found: 8,
            expected: 12
        }
    );
    for dimensions in [vec![1u64 << 62, 1 << 62], vec![0, 2]] {
        assert_eq!(
            weights_fault(&header(json!(dimensions)), 8),
            Fault::Dimensions {
                tensor: name(),
                dimensions
            }
        );
    }
    for count in [0, 5] {
        assert_eq!(
            weights_fault(&header(json!(vec![1; count])), 8),
            Fault::DimensionCount {
                tensor: name(),
                count: count as u64
            }
        );
    }
}

#[test]
fn rejects_huge_counts() {
    let entries: Vec<String> = (0..65_537)
        .map(|n| format!(r#""{n}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#))
        .collect();
    assert_eq!(
        weights_fault(&format!("{{{}}}", entries.join(",")), 4),
        Fault::TooMany {
            what: "tensors",
            count: 65_537,
            limit: 65_536
        }
    );
}

#[test]
fn rejects_shard_names_that_lead_elsewhere() {
    for name in [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        ".safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "a\u{0}.safetensors",
    ] {
        let fault = fault(|model| {
            shard(model, |index| {
                index["weight_map"]["model.norm.weight"] = name.into()
            });
        });
        assert_eq!(fault, Fault::ShardName { name: name.into() });
    }
}

#[test]
fn rejects_indexes_that_disagree_with_the_shards() {
    let (one, two) = (SHARD_1, SHARD_2);
    let part = missing(|model| {
        shard(model, |_| {});
        model.files.remove(two);
    });
    assert_eq!(part, Missing::Shard { name: two.into() });

    let norm = "model.norm.weight";
    let fault_of = fault(|model| shard(model, |index| index["weight_map"][norm] = two.into()));
    assert_eq!(
        fault_of,
        Fault::WrongShard {
            tensor: norm.into(),
            found: one.into(),
            expected: Some(two.into())
        }
    );
    let fault_of = fault(|model| {
        shard(model, |index| {
            index["weight_map"].as_object_mut().unwrap().remove(norm);
        });
    });
    assert_eq!(
        fault_of,
        Fault::WrongShard {
            tensor: norm.into(),
            found: one.into(),
            expected: None
        }
    );
    let part = missing(|model| {
        shard(model, |index| index["weight_map"]["phantom"] = one.into());
    });
    assert_eq!(
        part,
        Missing::IndexedTensor {
            tensor: "phantom".into(),
            shard: one.into()
        }
    );
    let fault_of = fault(|model| {
        shard(model, |_| {});
        let map = format!(r#"{{"weight_map": {{"{norm}": "{one}", "{norm}": "{two}"}}}}"#);
        model.file("model.safetensors.index.json", map);
    });
    assert_eq!(
        fault_of,
        Fault::DuplicateTensor {
            tensor: norm.into()
        }
    );
    let fault_of = fault(|model| shard(model, |index| *index = json!({"weight_map": []})));
    assert!(matches!(
        fault_of,
        Fault::Json {
            what: "the index of shards",
            ..
        }
    ));
}

#[test]
fn the_same_tensor_in_two_shards_is_refused() {
    let (one, two) = (SHARD_1, SHARD_2);
    let norm = "model.norm.weight";
    let fault = fault(|model| {
        shard(model, |_| {});
        let doubled = model.shard(|name| is_attention(name) || name == norm);
        model.file(two, doubled);
    });
    assert_eq!(
        fault,
        Fault::WrongShard {
            tensor: norm.into(),
            found: two.into(),
            expected: Some(one.into())
        }
    );
}
