//! A tiny Hugging Face directory, and ways to spoil it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use casemate_import::{Fault, ImportError, Missing, Unsupported};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::gguf::Gguf;

/// A directory to be written.
pub struct Model {
    pub config: Value,
    /// Name, type, shape.
    pub tensors: Vec<(String, Dtype, Vec<usize>)>,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Model {
    /// A valid model in one file: the tiny one of [`Gguf::tiny`], with its tokenizer.
    pub fn tiny() -> Self {
        let (_guard, path) = Gguf::tiny().write();
        let source = super::open(&path);
        let tokenizer = super::asset(source.as_ref(), "tokenizer.json")
            .unwrap()
            .to_vec();
        let mut tensors = Vec::new();
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((name.to_owned(), Dtype::BF16, shape.to_vec()));
        };
        add("model.embed_tokens.weight", &[265, 32]);
        add("model.norm.weight", &[32]);
        for (name, shape) in [
            ("input_layernorm", vec![32]),
            ("self_attn.q_proj", vec![32, 32]),
            ("self_attn.k_proj", vec![16, 32]),
            ("self_attn.v_proj", vec![16, 32]),
            ("self_attn.o_proj", vec![32, 32]),
            ("post_attention_layernorm", vec![32]),
            ("mlp.gate_proj", vec![64, 32]),
            ("mlp.up_proj", vec![64, 32]),
            ("mlp.down_proj", vec![32, 64]),
        ] {
            add(&format!("model.layers.0.{name}.weight"), &shape);
        }
        Self {
            config: json!({
                "architectures": ["LlamaForCausalLM"],
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_act": "silu",
                "hidden_size": 32,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
                "model_type": "llama",
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "num_key_value_heads": 1,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": true,
                "vocab_size": 265,
            }),
            tensors,
            files: BTreeMap::from([("tokenizer.json".to_owned(), tokenizer)]),
        }
    }

    pub fn file(&mut self, name: &str, contents: impl Into<Vec<u8>>) -> &mut Self {
        self.files.insert(name.to_owned(), contents.into());
        self
    }

    pub fn without(&mut self, tensor: &str) -> &mut Self {
        let before = self.tensors.len();
        self.tensors.retain(|(name, ..)| name != tensor);
        assert_eq!(self.tensors.len() + 1, before, "no tensor {tensor}");
        self
    }

    pub fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> &mut Self {
        self.tensors.push((name.to_owned(), dtype, shape.to_vec()));
        self
    }

    /// The weights in one file.
    pub fn weights(&self) -> Vec<u8> {
        self.shard(|_| true)
    }

    /// Those weights that `belongs` wants, as a file of the library.
    pub fn shard(&self, belongs: impl Fn(&str) -> bool) -> Vec<u8> {
        let tensors: Vec<_> = self
            .tensors
            .iter()
            .filter(|(name, ..)| belongs(name))
            .map(|(name, dtype, shape)| {
                let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                (name, *dtype, shape.clone(), content(name, bytes))
            })
            .collect();
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    /// Writes everything; the weights as one file, unless `files` has an index.
    pub fn write(&self) -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config.json"), self.config.to_string()).unwrap();
        for (name, contents) in &self.files {
            fs::write(path.join(name), contents).unwrap();
        }
        let single = path.join("model.safetensors");
        if !single.exists() && !self.files.contains_key("model.safetensors.index.json") {
            fs::write(single, self.weights()).unwrap();
        }
        (directory, path)
    }
}

/// The bytes that a tensor of this name has.
pub fn content(name: &str, bytes: usize) -> Vec<u8> {
    let seed = name
        .bytes()
        .fold(7u8, |seed, byte| seed.wrapping_mul(31) ^ byte);
    (0..bytes)
        .map(|at| (at as u8).wrapping_mul(13) ^ seed)
        .collect()
}

/// A safetensors file of this header and as many data bytes.
pub fn safetensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}

/// Splits the weights of `model` into two shards with an index, which `spoil` may change before it is written.
pub fn shard(model: &mut Model, spoil: impl FnOnce(&mut Value)) {
    model.file(SHARD_1, model.shard(|name| !is_attention(name)));
    model.file(SHARD_2, model.shard(is_attention));
    let map: serde_json::Map<String, Value> = model
        .tensors
        .iter()
        .map(|(name, ..)| {
            let shard = if is_attention(name) { SHARD_2 } else { SHARD_1 };
            (name.clone(), shard.into())
        })
        .collect();
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    spoil(&mut index);
    model.file("model.safetensors.index.json", index.to_string());
}

/// Whether a tensor belongs to the second shard.
pub fn is_attention(name: &str) -> bool {
    name.contains("self_attn")
}

/// The names of the two shards.
pub const SHARD_1: &str = "model-00001-of-00002.safetensors";
pub const SHARD_2: &str = "model-00002-of-00002.safetensors";

/// The tiny model after `change`, which must open.
pub fn opened(change: impl FnOnce(&mut Model)) -> Box<dyn casemate_container::ModelSource> {
    let mut model = Model::tiny();
    change(&mut model);
    let (_guard, path) = model.write();
    super::open(&path)
}

/// Writes a directory whose only weights are `file`.
pub fn with_weights(file: Vec<u8>) -> (TempDir, PathBuf) {
    let mut model = Model::tiny();
    model.file("model.safetensors", file);
    model.write()
}

/// The refusal of the tiny model after `spoil`.
pub fn refused(spoil: impl FnOnce(&mut Model)) -> ImportError {
    let mut model = Model::tiny();
    spoil(&mut model);
    let (_guard, path) = model.write();
    super::refusal(&path)
}

/// The fault for which the tiny model is malformed after `spoil`.
pub fn fault(spoil: impl FnOnce(&mut Model)) -> Fault {
    match refused(spoil) {
        ImportError::Malformed { fault, .. } => fault,
        other => panic!("not malformed but {other:?}"),
    }
}

/// What the tiny model needs after `spoil`.
pub fn unsupported(spoil: impl FnOnce(&mut Model)) -> Unsupported {
    match refused(spoil) {
        ImportError::Unsupported { need, .. } => need,
        other => panic!("not unsupported but {other:?}"),
    }
}

/// What the tiny model lacks after `spoil`.
pub fn missing(spoil: impl FnOnce(&mut Model)) -> Missing {
    match refused(spoil) {
        ImportError::Missing { part, .. } => part,
        other => panic!("not missing but {other:?}"),
    }
}
