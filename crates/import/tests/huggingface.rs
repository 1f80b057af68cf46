//! Hugging Face directories through the public door: configuration, assets and tokenizer. Weights: `weights.rs`.

mod support;

use std::fs;

use casemate_container::{DType, Family, RopeLayout, RopeScaling};
use casemate_import::{Fault, Missing, Unsupported};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use support::directory::*;
use support::{asset, tensor};

fn setting(key: &str, value: &str) -> Unsupported {
    Unsupported::Setting {
        key: key.into(),
        value: value.into(),
    }
}

#[test]
fn reads_a_valid_directory() {
    let model = opened(|_| {});
    assert_eq!(model.name(), "tiny");
    let config = model.config();
    assert_eq!(config.family, Family::Llama);
    assert_eq!(config.rope_layout, RopeLayout::Half);
    assert_eq!(
        (config.hidden, config.layers, config.ffn, config.vocab),
        (32, 1, 64, 265)
    );
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (2, 1, 16));
    assert_eq!(
        (config.context, config.norm_eps, config.rope_theta),
        (64, 1e-5, 10_000.0)
    );
    assert!(config.tied_embeddings && config.add_bos && !config.qkv_bias);
    assert_eq!(
        (config.bos, config.eos.as_slice()),
        (Some(1), [2].as_slice())
    );
    assert_eq!(model.tensors().len(), 11);
    for (ours, theirs, shape) in [
        (
            "token_embd.weight",
            "model.embed_tokens.weight",
            &[265u64, 32][..],
        ),
        ("output_norm.weight", "model.norm.weight", &[32]),
        (
            "blk.0.attn_norm.weight",
            "model.layers.0.input_layernorm.weight",
            &[32],
        ),
        (
            "blk.0.attn_q.weight",
            "model.layers.0.self_attn.q_proj.weight",
            &[32, 32],
        ),
        (
            "blk.0.attn_k.weight",
            "model.layers.0.self_attn.k_proj.weight",
            &[16, 32],
        ),
        (
            "blk.0.attn_v.weight",
            "model.layers.0.self_attn.v_proj.weight",
            &[16, 32],
        ),
        (
            "blk.0.attn_output.weight",
            "model.layers.0.self_attn.o_proj.weight",
            &[32, 32],
        ),
        (
            "blk.0.ffn_norm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            &[32],
        ),
        (
            "blk.0.ffn_gate.weight",
            "model.layers.0.mlp.gate_proj.weight",
            &[64, 32],
        ),
        (
            "blk.0.ffn_up.weight",
            "model.layers.0.mlp.up_proj.weight",
            &[64, 32],
        ),
        (
            "blk.0.ffn_down.weight",
            "model.layers.0.mlp.down_proj.weight",
            &[32, 64],
        ),
    ] {
        let found = model
            .tensors()
            .iter()
            .find(|tensor| tensor.name == ours)
            .unwrap();
        assert_eq!(
            (found.dtype, found.shape.as_slice()),
            (DType::BF16, shape),
            "{ours}"
        );
        let bytes = tensor(model.as_ref(), ours);
        assert_eq!(bytes, content(theirs, bytes.len()), "{ours}");
    }
}

#[test]
fn reads_shards() {
    let whole = opened(|_| {});
    let sharded = opened(|model| shard(model, |_| {}));
    assert_eq!(sharded.tensors().len(), 11);
    for entry in whole.tensors() {
        let name = &entry.name;
        assert_eq!(
            tensor(sharded.as_ref(), name),
            tensor(whole.as_ref(), name),
            "{name}"
        );
    }
}

#[test]
fn reads_all_three_types() {
    for (stored, dtype) in [(Dtype::F32, DType::F32), (Dtype::F16, DType::F16)] {
        let model = opened(|model| model.tensors[1].1 = stored);
        let norm = model
            .tensors()
            .iter()
            .find(|t| t.name == "output_norm.weight")
            .unwrap();
        assert_eq!(norm.dtype, dtype);
    }
}

#[test]
fn keeps_the_assets() {
    let generation = r#"{"eos_token_id": [2, 264], "temperature": 0.6}"#;
    let model = opened(|model| {
        model.file("generation_config.json", generation);
        model.file("chat_template.jinja", "from jinja");
        model.file(
            "tokenizer_config.json",
            r#"{"chat_template": "from config"}"#,
        );
    });
    assert_eq!(model.config().eos, [2, 264]);
    let source = model.as_ref();
    assert_eq!(
        asset(source, "generation_config.json"),
        Some(generation.as_bytes())
    );
    assert!(
        asset(source, "config.json")
            .unwrap()
            .starts_with(b"{\"architectures\"")
    );
    assert_eq!(
        asset(source, "chat_template.jinja"),
        Some(&b"from jinja"[..])
    );
    let names: Vec<_> = model
        .assets()
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "tokenizer.json",
            "chat_template.jinja",
            "config.json",
            "generation_config.json"
        ]
    );
}

#[test]
fn finds_the_chat_template_wherever_it_is() {
    for (file, contents, expected) in [
        (
            "tokenizer_config.json",
            r#"{"chat_template": "one"}"#,
            Some(&b"one"[..]),
        ),
        (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#,
            Some(b"d"),
        ),
        ("tokenizer_config.json", r#"{"chat_template": null}"#, None),
        (
            "chat_template.json",
            r#"{"chat_template": "json"}"#,
            Some(b"json"),
        ),
        ("unrelated.json", r#"{"chat_template": "x"}"#, None),
    ] {
        let model = opened(|model| {
            model.file(file, contents);
        });
        assert_eq!(
            asset(model.as_ref(), "chat_template.jinja"),
            expected,
            "{file}"
        );
    }
}

#[test]
fn switches_truncation_and_padding_off_and_leaves_the_rest() {
    let mut spoilt = Vec::new();
    let model = opened(|model| {
        let plain = String::from_utf8(model.files["tokenizer.json"].clone()).unwrap();
        let cut = r#""truncation":{"direction":"Right","max_length":2,"strategy":"LongestFirst","stride":0}"#;
        let text = plain.replacen(r#""truncation":null"#, cut, 1);
        assert_ne!(text, plain);
        spoilt = plain.into_bytes();
        model.file("tokenizer.json", text);
    });
    assert_eq!(
        asset(model.as_ref(), "tokenizer.json"),
        Some(spoilt.as_slice())
    );
}

#[test]
fn mistral_slides_unless_it_says_null() {
    let window = |value: Option<Value>| {
        opened(|model| {
            model.config["architectures"] = json!(["MistralForCausalLM"]);
            if let Some(value) = value {
                model.config["sliding_window"] = value;
            }
        })
        .config()
        .sliding_window
    };
    assert_eq!(window(Some(json!(48))), Some(48));
    assert_eq!(window(Some(Value::Null)), None);
    assert_eq!(window(None), Some(4096));
    // transformers does not look at the key of a Llama.
    let llama = opened(|model| model.config["sliding_window"] = json!(48));
    assert_eq!(llama.config().sliding_window, None);
}

/// The tiny model as Qwen 2.
fn qwen2(model: &mut Model) {
    model.config["architectures"] = json!(["Qwen2ForCausalLM"]);
    for (name, length) in [("q", 32), ("k", 16), ("v", 16)] {
        model.add(
            &format!("model.layers.0.self_attn.{name}_proj.bias"),
            Dtype::F32,
            &[length],
        );
    }
}

#[test]
fn qwen2_has_biases_and_slides_only_if_told() {
    let model = opened(qwen2);
    assert!(model.config().qkv_bias);
    assert_eq!(model.config().family, Family::Qwen2);
    for name in [
        "blk.0.attn_q.bias",
        "blk.0.attn_k.bias",
        "blk.0.attn_v.bias",
    ] {
        assert!(
            model.tensors().iter().any(|tensor| tensor.name == name),
            "{name}"
        );
    }
    let window = |use_it: bool, first: u32| {
        opened(|model| {
            qwen2(model);
            model.config["sliding_window"] = json!(48);
            model.config["use_sliding_window"] = json!(use_it);
            model.config["max_window_layers"] = json!(first);
        })
        .config()
        .sliding_window
    };
    assert_eq!(window(false, 0), None);
    assert_eq!(window(true, 1), None);
    assert_eq!(window(true, 0), Some(48));
    let need = unsupported(|model| {
        qwen2(model);
        model.config["sliding_window"] = json!(48);
        model.config["use_sliding_window"] = json!(true);
        model.config["max_window_layers"] = json!(1);
        model.config["num_hidden_layers"] = json!(2);
    });
    assert_eq!(need, setting("max_window_layers", "1"));
}

#[test]
fn layers_of_different_attention_are_refused() {
    let types = |kinds: Value| move |model: &mut Model| model.config["layer_types"] = kinds;
    opened(types(json!(["full_attention"])));
    let need = unsupported(types(json!(["sliding_attention"])));
    assert_eq!(need, setting("layer_types", "\"sliding_attention\""));
}

#[test]
fn reads_rotary_settings_old_and_new() {
    let rope = |key: &'static str, value: Value| {
        let model = opened(|model| model.config[key] = value);
        (model.config().rope_theta, model.config().rope_scaling)
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let settings = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    assert_eq!(rope("rope_scaling", settings.clone()), (10_000.0, llama3));
    let mut newer = settings;
    newer["rope_theta"] = json!(500_000.0);
    assert_eq!(rope("rope_parameters", newer), (500_000.0, llama3));
    assert_eq!(
        rope("rope_scaling", json!({"type": "linear", "factor": 2})),
        (10_000.0, RopeScaling::Linear { factor: 2.0 })
    );
    let default = json!({"rope_type": "default", "rope_theta": 7});
    assert_eq!(rope("rope_parameters", default), (7.0, RopeScaling::None));
    assert_eq!(
        rope("rope_theta", json!(100_000)),
        (100_000.0, RopeScaling::None)
    );
}

#[test]
fn refuses_other_rotary_settings_by_name() {
    for kind in ["dynamic", "yarn", "longrope"] {
        let need = unsupported(|model| {
            model.config["rope_scaling"] = json!({"type": kind, "factor": 2.0});
        });
        assert_eq!(need, setting("rope_type", &format!("\"{kind}\"")));
    }
    let part =
        missing(|model| model.config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8}));
    assert_eq!(
        part,
        Missing::Key {
            key: "low_freq_factor".into()
        }
    );
}

#[test]
fn refuses_settings_that_would_change_the_arithmetic() {
    for (key, value, shown) in [
        ("hidden_act", json!("gelu"), "\"gelu\""),
        ("attention_bias", json!(true), "true"),
        ("mlp_bias", json!(true), "true"),
        ("rope_interleaved", json!(true), "true"),
        ("partial_rotary_factor", json!(0.5), "0.5"),
        (
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4}),
            "\"gptq\"",
        ),
        ("architectures", json!([]), "[]"),
        ("architectures", json!(["A", "B"]), "[\"A\",\"B\"]"),
    ] {
        assert_eq!(
            unsupported(|model| model.config[key] = value),
            setting(key, shown)
        );
    }
    let need = unsupported(|model| model.config["architectures"] = json!(["Gemma3ForCausalLM"]));
    assert_eq!(
        need,
        Unsupported::Architecture {
            name: "Gemma3ForCausalLM".into()
        }
    );
}

#[test]
fn refuses_configurations_without_the_numbers() {
    for key in [
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    ] {
        let part = missing(|model| {
            model.config.as_object_mut().unwrap().remove(key);
        });
        assert_eq!(part, Missing::Key { key: key.into() });
    }
    for (key, value, expected) in [
        ("hidden_size", json!("32"), "an integer"),
        ("hidden_size", json!([32]), "an integer"),
        ("rms_norm_eps", json!("1e-5"), "a number"),
        ("tie_word_embeddings", json!(1), "a Boolean"),
        ("rope_scaling", json!("llama3"), "an object"),
        ("architectures", json!("LlamaForCausalLM"), "an array"),
    ] {
        let fault = fault(|model| model.config[key] = value);
        assert_eq!(
            fault,
            Fault::WrongType {
                key: key.into(),
                expected
            }
        );
    }
    for (value, shown) in [
        (json!(-1), "-1"),
        (json!(1u64 << 40), "1099511627776"),
        (json!(1.5), "1.5"),
    ] {
        let fault = fault(|model| model.config["hidden_size"] = value);
        assert_eq!(
            fault,
            Fault::OutOfRange {
                key: "hidden_size".into(),
                value: shown.into()
            }
        );
    }
    let fault = fault(|model| model.config["num_hidden_layers"] = json!(1u32 << 31));
    assert_eq!(fault, Fault::Configuration { field: "layers" });
}

#[test]
fn refuses_directories_without_a_part() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(
        support::missing(directory.path()),
        Missing::File {
            name: "config.json".into()
        }
    );
    let part = missing(|model| {
        model.files.clear();
    });
    assert_eq!(
        part,
        Missing::File {
            name: "tokenizer.json or tokenizer.model".into()
        }
    );

    let (_guard, path) = Model::tiny().write();
    fs::remove_file(path.join("model.safetensors")).unwrap();
    assert_eq!(
        support::missing(&path),
        Missing::File {
            name: "model.safetensors".into()
        }
    );
    fs::write(path.join("pytorch_model.bin"), "PK").unwrap();
    let need = support::unsupported(&path);
    assert_eq!(
        need,
        Unsupported::WeightFormat {
            file: "pytorch_model.bin".into()
        }
    );
}

#[test]
fn refuses_json_that_is_none() {
    for name in [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        let fault = fault(|model| {
            model.file(name, "{\"a\": ");
        });
        assert!(
            matches!(fault, Fault::Json { what, line: 1, .. } if what == name),
            "{fault:?}"
        );
    }
    let fault = fault(|model| {
        model.file("tokenizer.json", r#"{"version": "1.0", "version": "1.0"}"#);
    });
    assert_eq!(
        fault,
        Fault::DuplicateKey {
            key: "version".into()
        }
    );
}

#[test]
fn refuses_tokenizers_that_do_not_load_or_fit() {
    let broken = fault(|model| {
        model.file(
            "tokenizer.json",
            r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
                "decoder": {"type": "ByteLevel"}}"#,
        );
    });
    assert!(matches!(broken, Fault::Tokenizer { .. }), "{broken:?}");
    let foreign = unsupported(|model| {
        model.file(
            "tokenizer.json",
            r#"{"version": "1.0", "model": {"type": "Oracle"}}"#,
        );
    });
    let oracle = Unsupported::Setting {
        key: "model.type".into(),
        value: "\"Oracle\"".into(),
    };
    assert_eq!(foreign, oracle);
    let small = fault(|model| {
        model.config["vocab_size"] = json!(264);
    });
    assert_eq!(
        small,
        Fault::TokenId {
            what: "the tokenizer's last",
            id: 264,
            vocabulary: 264
        }
    );
    let unknown = fault(|model| model.config["eos_token_id"] = json!([2, 300]));
    assert_eq!(
        unknown,
        Fault::TokenId {
            what: "an end-of-text token",
            id: 300,
            vocabulary: 265
        }
    );
}

#[test]
fn the_tokenizer_decides_about_the_first_token() {
    // A configuration that names another one is overruled by what the tokenizer does.
    let model = opened(|model| model.config["bos_token_id"] = json!(2));
    assert_eq!(
        (model.config().bos, model.config().add_bos),
        (Some(1), true)
    );
    let without = |model: &mut Model| {
        let mut json: Value = serde_json::from_slice(&model.files["tokenizer.json"]).unwrap();
        json["post_processor"] = Value::Null;
        model.file("tokenizer.json", json.to_string());
    };
    let model = opened(without);
    assert_eq!(
        (model.config().bos, model.config().add_bos),
        (Some(1), false)
    );
    let need = unsupported(|model| {
        let mut json: Value = serde_json::from_slice(&model.files["tokenizer.json"]).unwrap();
        let single = json["post_processor"]["single"].as_array_mut().unwrap();
        let first = single[0].clone();
        single.push(first);
        model.file("tokenizer.json", json.to_string());
    });
    assert!(matches!(need, Unsupported::Setting { key, .. } if key == "post_processor.single"));
}
