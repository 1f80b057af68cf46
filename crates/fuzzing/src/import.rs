//! Model files of others: GGUF, and Hugging Face directories of which one file is the input and the rest is sound.

use std::fs;
use std::path::{Path, PathBuf};

use casemate_container::ModelSource;
use casemate_testkit::gguf::write;
use casemate_testkit::models::{MemoryModel, Tiny};
use serde_json::json;
use tempfile::TempDir;

use crate::scratch;

/// Tensors read per model, and bytes of each: what lies behind is more of the same.
const READ_TENSORS: usize = 16;
const READ_BYTES: u64 = 1 << 16;

fn tiny() -> MemoryModel {
    let tiny = Tiny {
        hidden: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ffn: 32,
        context: 64,
        ..Tiny::default()
    };
    tiny.build()
}

/// What was accepted can be read, and is what a sealed file may hold.
fn read(model: &dyn ModelSource) {
    model
        .config()
        .check()
        .expect("an importer gives a valid configuration");
    for (index, tensor) in model.tensors().iter().enumerate().take(READ_TENSORS) {
        let mut bytes = vec![0; tensor.size.min(READ_BYTES) as usize];
        model
            .read_tensor(index, 0, &mut bytes)
            .expect("a tensor lies within its file");
        let last = tensor.size - bytes.len() as u64;
        model
            .read_tensor(index, last, &mut bytes)
            .expect("a tensor lies within its file");
    }
}

fn open(path: &Path) {
    match casemate_import::open(path) {
        Ok(model) => read(model.as_ref()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Zeros behind the input stand for the tensors, so that an input is a header only.
const DATA: usize = 1 << 16;

/// A GGUF file's header.
pub(crate) fn gguf(data: &[u8]) {
    scratch::with_file(&[data, &vec![0; DATA]].concat(), open);
}

pub(crate) fn gguf_seeds() -> Vec<Vec<u8>> {
    let directory = scratch::directory();
    let path = directory.path().join("tiny.gguf");
    let header = |model: &MemoryModel| {
        write(model, &path).expect("a file in memory");
        let data: usize = model
            .data
            .iter()
            .map(|data| data.len().next_multiple_of(32))
            .sum();
        let mut file = fs::read(&path).expect("just written");
        file.truncate(file.len() - data);
        file
    };
    let mut small = tiny();
    small.tensors.truncate(2);
    small.data.truncate(2);
    vec![header(&tiny()), header(&small)]
}

/// A sound directory, except for what the input replaces.
struct Sound(TempDir);

impl Sound {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn new() -> Self {
        let sound = Sound(scratch::directory());
        let model = tiny();
        let (_, tokenizer) = model
            .assets
            .iter()
            .find(|(name, _)| name == "tokenizer.json")
            .expect("tiny models have a tokenizer");
        let mut weights = safetensors_header(&model);
        weights.resize(weights.len() + DATA, 0);
        for (name, bytes) in [
            ("config.json", config(&model)),
            ("tokenizer.json", tokenizer.clone()),
            ("model.safetensors", weights),
        ] {
            fs::write(sound.path(name), bytes).expect("a file in memory");
        }
        casemate_import::open(sound.0.path()).expect("the sound directory");
        sound
    }
}

thread_local! {
    static SOUND: Sound = Sound::new();
}

/// Opens the sound directory with `bytes` as `name`, and without the files in `hidden`.
fn with(name: &str, bytes: &[u8], hidden: Option<&str>) {
    SOUND.with(|sound| {
        let path = sound.path(name);
        let before = fs::read(&path).ok();
        let aside = sound.0.path().with_extension("aside");
        if let Some(hidden) = hidden {
            fs::rename(sound.path(hidden), &aside).expect("a file in memory");
        }
        fs::write(&path, bytes).expect("a file in memory");
        open(sound.0.path());
        match before {
            Some(before) => fs::write(&path, before),
            None => fs::remove_file(&path),
        }
        .expect("a file in memory");
        if let Some(hidden) = hidden {
            fs::rename(&aside, sound.path(hidden)).expect("a file in memory");
        }
    });
}

fn config(model: &MemoryModel) -> Vec<u8> {
    let config = &model.config;
    json!({
        "architectures": ["LlamaForCausalLM"], "bos_token_id": config.bos, "eos_token_id": config.eos[0],
        "hidden_act": "silu", "hidden_size": config.hidden, "intermediate_size": config.ffn,
        "max_position_embeddings": config.context, "model_type": "llama",
        "num_attention_heads": config.heads, "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "vocab_size": config.vocab,
    })
    .to_string()
    .into_bytes()
}

/// Length and JSON of a file with the tiny model's tensors in BF16.
fn safetensors_header(model: &MemoryModel) -> Vec<u8> {
    let (hidden, ffn) = (model.config.hidden, model.config.ffn);
    let kv = model.config.kv_heads * model.config.head_dim;
    let mut tensors = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![model.config.vocab, hidden],
        ),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for (name, shape) in [
        ("input_layernorm", vec![hidden]),
        ("self_attn.q_proj", vec![hidden, hidden]),
        ("self_attn.k_proj", vec![kv, hidden]),
        ("self_attn.v_proj", vec![kv, hidden]),
        ("self_attn.o_proj", vec![hidden, hidden]),
        ("post_attention_layernorm", vec![hidden]),
        ("mlp.gate_proj", vec![ffn, hidden]),
        ("mlp.up_proj", vec![ffn, hidden]),
        ("mlp.down_proj", vec![hidden, ffn]),
    ] {
        tensors.push((format!("model.layers.0.{name}.weight"), shape));
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u32>() as usize;
        header.insert(
            name,
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }),
        );
    }
    // What is left of the zeros belongs to a tensor that the model ignores.
    let rest = DATA - end;
    let spare = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    header.insert(
        spare,
        json!({ "dtype": "BF16", "shape": [rest / 2], "data_offsets": [end, DATA] }),
    );
    let json = serde_json::Value::from(header).to_string();
    [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
}

/// The header of a safetensors file.
pub(crate) fn safetensors(data: &[u8]) {
    with("model.safetensors", &[data, &vec![0; DATA]].concat(), None);
}

pub(crate) fn safetensors_seeds() -> Vec<Vec<u8>> {
    vec![safetensors_header(&tiny())]
}

/// The JSON files and texts around the weights.
const SETTINGS: [(&str, &str); 7] = [
    ("config.json", ""),
    (
        "generation_config.json",
        r#"{"eos_token_id": [1, 2], "bos_token_id": 1}"#,
    ),
    (
        "tokenizer_config.json",
        r#"{"chat_template": "{{ messages }}", "add_bos_token": true}"#,
    ),
    (
        "chat_template.json",
        r#"{"chat_template": [{"name": "default", "template": "{{ messages }}"}]}"#,
    ),
    ("chat_template.jinja", "{{ messages }}"),
    (
        "model.safetensors.index.json",
        r#"{"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}"#,
    ),
    (
        "tokenizer.json",
        r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "ByteLevel"}}"#,
    ),
];

/// One of the files in [`SETTINGS`]; the first byte chooses.
pub(crate) fn settings(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    let (name, _) = SETTINGS[usize::from(*which) % SETTINGS.len()];
    with(name, bytes, None);
}

pub(crate) fn settings_seeds() -> Vec<Vec<u8>> {
    let seed =
        |(which, (_, text)): (usize, &(&str, &str))| [&[which as u8], text.as_bytes()].concat();
    let mut seeds: Vec<_> = SETTINGS.iter().enumerate().skip(1).map(seed).collect();
    seeds.push([&[0], &config(&tiny())[..]].concat());
    seeds
}

/// `tokenizer.model`, with settings and added tokens where the input is cut by a NUL.
pub(crate) fn tokenizer_model(data: &[u8]) {
    with("tokenizer.model", data, Some("tokenizer.json"));
}

/// A SentencePiece model (protocol buffers) and a file of ranks.
pub(crate) fn tokenizer_model_seeds() -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut piece = |text: &str, score: f32, kind: u8| {
        let mut message = vec![0x0a, text.len() as u8];
        message.extend_from_slice(text.as_bytes());
        message.push(0x15);
        message.extend_from_slice(&score.to_le_bytes());
        message.extend_from_slice(&[0x18, kind]);
        pieces.extend_from_slice(&[0x0a, message.len() as u8]);
        pieces.extend_from_slice(&message);
    };
    piece("<unk>", 0.0, 2);
    piece("<s>", 0.0, 3);
    piece("</s>", 0.0, 3);
    piece("<0x0A>", 0.0, 6);
    piece("▁", -1.0, 1);
    piece("a", -2.0, 1);
    piece("▁a", -3.0, 1);
    // Trainer: BPE with byte fallback; normalizer: identity, prefix space.
    pieces.extend_from_slice(&[0x12, 5, 0x18, 2, 0x98, 0x02, 1]);
    pieces.extend_from_slice(&[0x1a, 12, 0x0a, 8]);
    pieces.extend_from_slice(b"identity");
    pieces.extend_from_slice(&[0x18, 1]);
    vec![pieces, b"YQ== 0\nYg== 1\nYWI= 2\n".to_vec()]
}
