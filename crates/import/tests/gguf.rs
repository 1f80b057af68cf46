//! GGUF files through the public door: what is accepted and what becomes of it. Faults: `gguf_faults.rs`.

mod support;

use casemate_container::{DType, Family, RopeLayout, RopeScaling, SourceError};
use casemate_import::{Fault, Missing, Unsupported};

use support::gguf::*;
use support::{asset, open, tensor};

#[test]
fn reads_a_valid_file() {
    let mut gguf = Gguf::tiny();
    gguf.set("general.name", STRING, string("Tiny"));
    gguf.set("tokenizer.chat_template", STRING, string("{{ messages }}"));
    let (_guard, path) = gguf.write();
    let model = open(&path);
    assert_eq!(model.name(), "Tiny");
    let config = model.config();
    assert_eq!(config.family, Family::Llama);
    assert_eq!(config.rope_layout, RopeLayout::Interleaved);
    assert_eq!((config.hidden, config.layers, config.ffn), (32, 1, 64));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (2, 1, 16));
    assert_eq!((config.vocab, config.context), (265, 64));
    assert_eq!((config.norm_eps, config.rope_theta), (1e-5, 10_000.0));
    assert_eq!(config.rope_scaling, RopeScaling::None);
    assert_eq!(config.sliding_window, None);
    assert!(config.tied_embeddings && config.add_bos && !config.qkv_bias);
    assert_eq!(
        (config.bos, config.eos.as_slice()),
        (Some(1), [2].as_slice())
    );
    assert_eq!(
        asset(model.as_ref(), "chat_template.jinja"),
        Some(&b"{{ messages }}"[..])
    );

    assert_eq!(model.tensors().len(), 11);
    let gate = model
        .tensors()
        .iter()
        .find(|t| t.name == "blk.0.ffn_gate.weight")
        .unwrap();
    assert_eq!(
        (gate.dtype, gate.shape.as_slice()),
        (DType::F32, [64, 32].as_slice())
    );
    for written in &gguf.tensors {
        let name = std::str::from_utf8(&written.name).unwrap();
        assert_eq!(tensor(model.as_ref(), name), written.data, "{name}");
    }
}

#[test]
fn reads_ranges_of_tensors_and_refuses_those_beyond() {
    let gguf = Gguf::tiny();
    let (_guard, path) = gguf.write();
    let model = open(&path);
    let whole = tensor(model.as_ref(), "token_embd.weight");
    let mut range = [0; 100];
    model.read_tensor(0, 1000, &mut range).unwrap();
    assert_eq!(range, whole[1000..1100]);
    let size = model.tensors()[0].size;
    for offset in [size - 99, size, u64::MAX] {
        let refused = model.read_tensor(0, offset, &mut range);
        assert!(
            matches!(refused, Err(SourceError::Short { tensor }) if tensor == "token_embd.weight")
        );
    }
}

#[test]
fn reports_a_file_that_shrinks_while_it_is_read() {
    let gguf = Gguf::tiny();
    let (_guard, path) = gguf.write();
    let model = open(&path);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8000)
        .unwrap();
    let last = model.tensors().len() - 1;
    let mut bytes = vec![0; model.tensors()[last].size as usize];
    let refused = model.read_tensor(last, 0, &mut bytes);
    assert!(
        matches!(refused, Err(SourceError::Short { tensor }) if tensor == "blk.0.ffn_down.weight")
    );
}

#[test]
fn reads_version_2() {
    let mut gguf = Gguf::tiny();
    gguf.version = 2;
    let (_guard, path) = gguf.write();
    assert_eq!(open(&path).tensors().len(), 11);
}

#[test]
fn takes_its_name_from_the_file_if_it_states_none_or_a_bad_one() {
    let mut gguf = Gguf::tiny();
    let (_guard, path) = gguf.write();
    assert_eq!(open(&path).name(), "tiny");
    for bad in ["", "  ", "a\nb", &"x".repeat(200)] {
        gguf.set("general.name", STRING, string(bad));
        std::fs::write(&path, gguf.bytes()).unwrap();
        assert_eq!(open(&path).name(), "tiny");
    }
}

#[test]
fn accepts_every_supported_tensor_type() {
    for (code, dtype, size) in [
        (0, DType::F32, 64 * 256 * 4),
        (1, DType::F16, 64 * 256 * 2),
        (30, DType::BF16, 64 * 256 * 2),
        (8, DType::Q8_0, 64 * 8 * 34),
        (2, DType::Q4_0, 64 * 8 * 18),
        (3, DType::Q4_1, 64 * 8 * 20),
        (12, DType::Q4_K, 64 * 144),
        (14, DType::Q6_K, 64 * 210),
    ] {
        // One matrix of 256 columns, which all block sizes divide.
        let mut gguf = Gguf::tiny();
        gguf.set("llama.feed_forward_length", U32, 256u32.to_le_bytes());
        gguf.tensors.retain(|tensor| {
            !tensor.name.starts_with(b"blk.0.ffn_") || tensor.name == b"blk.0.ffn_norm.weight"
        });
        gguf.add("blk.0.ffn_gate.weight", &[32, 256], 0);
        gguf.add("blk.0.ffn_up.weight", &[32, 256], 0);
        gguf.add("blk.0.ffn_down.weight", &[256, 32], code);
        let (_guard, path) = gguf.write();
        let model = open(&path);
        let down = model.tensors().last().unwrap();
        assert_eq!((down.dtype, down.size), (dtype, size / 2), "{dtype}");
        assert_eq!(
            tensor(model.as_ref(), "blk.0.ffn_down.weight"),
            gguf.tensors.last().unwrap().data
        );
    }
}

#[test]
fn refuses_other_tensor_types_by_name() {
    for (code, name) in [
        (6, "Q5_0"),
        (13, "Q5_K"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (4, "number 4"),
        (999, "number 999"),
    ] {
        let need = unsupported(|gguf| gguf.tensor("blk.0.attn_q.weight").kind = code);
        assert_eq!(
            need,
            Unsupported::TensorType {
                tensor: "blk.0.attn_q.weight".into(),
                name: name.into()
            }
        );
        let text = need.to_string();
        assert!(
            text.contains(name) && text.contains("Q4_K"),
            "names both: {text}"
        );
    }
}

#[test]
fn qwen2_has_biases_and_halves() {
    let (_guard, path) = Gguf::tiny_of("qwen2", true).write();
    let model = open(&path);
    assert_eq!(model.config().family, Family::Qwen2);
    assert_eq!(model.config().rope_layout, RopeLayout::Half);
    assert!(model.config().qkv_bias);
    assert_eq!(model.tensors().len(), 14);
}

#[test]
fn refuses_biases_on_some_projections_only() {
    let mut gguf = Gguf::tiny_of("qwen2", true);
    gguf.tensors
        .retain(|tensor| tensor.name != b"blk.0.attn_v.bias");
    let (_guard, path) = gguf.write();
    assert_eq!(
        support::missing(&path),
        Missing::Tensor {
            tensor: "blk.0.attn_v.bias".into()
        }
    );
    // Without the query's there are none, and the others are strangers.
    let need = unsupported(|gguf| {
        gguf.add("blk.0.attn_k.bias", &[16], TENSOR_F32);
    });
    assert_eq!(
        need,
        Unsupported::UnknownTensor {
            tensor: "blk.0.attn_k.bias".into()
        }
    );
}

#[test]
fn an_output_matrix_means_untied_embeddings() {
    let mut gguf = Gguf::tiny();
    gguf.add("output.weight", &[32, 265], TENSOR_F32);
    let (_guard, path) = gguf.write();
    assert!(!open(&path).config().tied_embeddings);
}

#[test]
fn passes_rotary_factors_through() {
    let mut gguf = Gguf::tiny();
    gguf.add("rope_freqs.weight", &[8], TENSOR_F32);
    let (_guard, path) = gguf.write();
    let model = open(&path);
    assert_eq!(
        tensor(model.as_ref(), "rope_freqs.weight"),
        gguf.tensors.last().unwrap().data
    );
    assert_eq!(model.config().rope_scaling, RopeScaling::None);
    let wrong = fault(|gguf| {
        gguf.add("rope_freqs.weight", &[16], TENSOR_F32);
    });
    assert_eq!(
        wrong,
        Fault::WrongShape {
            tensor: "rope_freqs.weight".into(),
            found: vec![16],
            expected: vec![8]
        }
    );
}

#[test]
fn reads_optional_architecture_keys() {
    let mut gguf = Gguf::tiny();
    gguf.set("llama.rope.freq_base", F32, 500_000f32.to_le_bytes());
    gguf.set("llama.rope.dimension_count", U32, 16u32.to_le_bytes());
    gguf.set("llama.attention.key_length", U32, 16u32.to_le_bytes());
    gguf.set("llama.attention.sliding_window", U32, 48u32.to_le_bytes());
    gguf.set("llama.rope.scaling.type", STRING, string("linear"));
    gguf.set("llama.rope.scaling.factor", F32, 2f32.to_le_bytes());
    let (_guard, path) = gguf.write();
    let model = open(&path);
    let config = model.config();
    assert_eq!(config.rope_theta, 500_000.0);
    assert_eq!(config.sliding_window, Some(48));
    assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 2.0 });

    gguf.remove("llama.rope.scaling.type")
        .remove("llama.rope.scaling.factor");
    gguf.set("llama.rope.scale_linear", F32, 4f32.to_le_bytes());
    std::fs::write(&path, gguf.bytes()).unwrap();
    assert_eq!(
        open(&path).config().rope_scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
}

#[test]
fn head_dimension_need_not_be_hidden_over_heads() {
    let mut gguf = Gguf::tiny();
    gguf.set("llama.attention.key_length", U32, 8u32.to_le_bytes());
    for (name, dimensions) in [
        ("blk.0.attn_q.weight", [32, 16]),
        ("blk.0.attn_k.weight", [32, 8]),
        ("blk.0.attn_v.weight", [32, 8]),
        ("blk.0.attn_output.weight", [16, 32]),
    ] {
        gguf.tensors.retain(|tensor| tensor.name != name.as_bytes());
        gguf.add(name, &dimensions, TENSOR_F32);
    }
    let (_guard, path) = gguf.write();
    assert_eq!(open(&path).config().head_dim, 8);
}

#[test]
fn every_end_marker_ends_a_generation() {
    let mut gguf = Gguf::tiny();
    gguf.set("tokenizer.ggml.eos_token_id", U32, 264u32.to_le_bytes());
    gguf.set("tokenizer.ggml.eot_token_id", U32, 264u32.to_le_bytes());
    let (_guard, path) = gguf.write();
    // 264 once, then </s>, a control token that is an end marker by its text.
    assert_eq!(open(&path).config().eos, [264, 2]);
}

#[test]
fn a_space_in_front_and_a_first_token_are_as_the_file_says() {
    let encode = |gguf: &Gguf, text: &str| {
        let (_guard, path) = gguf.write();
        let model = open(&path);
        let json = asset(model.as_ref(), "tokenizer.json").unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let ids = tokenizer
            .encode_fast(text, true)
            .unwrap()
            .get_ids()
            .to_vec();
        (ids, model.config().add_bos)
    };
    let mut gguf = Gguf::tiny();
    // _a 259, ab 260, _ 261, a 262, b 263; _a comes first, so _ab is _a b.
    assert_eq!(encode(&gguf, "ab ab"), (vec![1, 259, 263, 259, 263], true));
    assert_eq!(
        encode(&gguf, "<user>ab</s>ab"),
        (vec![1, 264, 259, 263, 2, 259, 263], true)
    );
    assert_eq!(encode(&gguf, "é"), (vec![1, 261, 3 + 0xC3, 3 + 0xA9], true));
    gguf.set("tokenizer.ggml.add_space_prefix", BOOL, [0]);
    assert_eq!(encode(&gguf, "ab ab"), (vec![1, 260, 259, 263], true));
    gguf.set("tokenizer.ggml.add_bos_token", BOOL, [0]);
    assert_eq!(encode(&gguf, "ab ab"), (vec![260, 259, 263], false));
}

#[test]
fn reads_byte_level_vocabularies() {
    let mut gguf = Gguf::tiny_byte_level();
    let (_guard, path) = gguf.write();
    let model = open(&path);
    let json = asset(model.as_ref(), "tokenizer.json").unwrap();
    let tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
    let ids = |text: &str| {
        tokenizer
            .encode_fast(text, true)
            .unwrap()
            .get_ids()
            .to_vec()
    };
    assert!(!model.config().add_bos);
    assert_eq!(
        (model.config().bos, model.config().eos.as_slice()),
        (Some(258), [259].as_slice())
    );
    assert_eq!(ids("ab ab"), [256, 257]);
    assert_eq!(ids("<|im_start|>ab<|im_end|>"), [258, 256, 259]);
    // Qwen composes characters first: e and an accent are one.
    assert_eq!(ids("e\u{301}"), ids("\u{e9}"));
    assert_eq!(
        tokenizer.decode(&ids("a\u{e9}\n b"), false).unwrap(),
        "a\u{e9}\n b"
    );
    // Padding is never made and never found.
    assert!(!ids("[PAD260]").contains(&260));

    // Llama 3's kind begins every text with a token unless the file says otherwise.
    gguf.set("tokenizer.ggml.pre", STRING, string("llama-bpe"));
    std::fs::write(&path, gguf.bytes()).unwrap();
    assert!(open(&path).config().add_bos);
}
