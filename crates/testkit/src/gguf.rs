//! Writes models as GGUF version 3, the way the usual converters do, so that tests can go through the importer. There
//! is no reader here; that is the room `import`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use casemate_container::{DType, Family, ModelSource};

use crate::models::{Algorithm, MemoryModel, Vocabulary};

const ALIGNMENT: usize = 32;

/// Writes `model` into a new file.
pub fn write(model: &MemoryModel, path: &Path) -> std::io::Result<()> {
    write_source(model, &model.vocabulary, path)
}

/// Writes any model into a new file, a piece of a tensor at a time. The vocabulary is the one behind its tokenizer.
pub fn write_source(
    model: &dyn ModelSource,
    vocabulary: &Vocabulary,
    path: &Path,
) -> std::io::Result<()> {
    const PIECE: u64 = 1 << 20;
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(&header(model, vocabulary))?;
    let mut piece = vec![0; PIECE as usize];
    for (index, tensor) in model.tensors().iter().enumerate() {
        let mut offset = 0;
        while offset < tensor.size {
            let length = PIECE.min(tensor.size - offset);
            let piece = &mut piece[..length as usize];
            model
                .read_tensor(index, offset, piece)
                .map_err(std::io::Error::other)?;
            out.write_all(piece)?;
            offset += length;
        }
        out.write_all(&vec![0; padding(tensor.size as usize)])?;
    }
    out.into_inner()?.sync_all()
}

/// Everything in front of the tensors' bytes, padded.
fn header(model: &dyn ModelSource, vocabulary: &Vocabulary) -> Vec<u8> {
    let metadata = metadata(model, vocabulary);
    let mut out = b"GGUF".to_vec();
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&(model.tensors().len() as u64).to_le_bytes());
    out.extend_from_slice(&metadata.count.to_le_bytes());
    out.extend_from_slice(&metadata.bytes);
    let mut offset = 0u64;
    for tensor in model.tensors() {
        put_string(&mut out, &tensor.name);
        out.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        // Innermost first.
        for dimension in tensor.shape.iter().rev() {
            out.extend_from_slice(&dimension.to_le_bytes());
        }
        out.extend_from_slice(&ggml_type(tensor.dtype).to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        offset += tensor.size + padding(tensor.size as usize) as u64;
    }
    out.resize(out.len() + padding(out.len()), 0);
    out
}

fn metadata(model: &dyn ModelSource, tokens: &Vocabulary) -> Metadata {
    let config = model.config();
    let architecture = match config.family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
    };
    let mut metadata = Metadata::default();
    metadata.string("general.architecture", architecture);
    metadata.string("general.name", model.name());
    metadata.u32("general.alignment", ALIGNMENT as u32);
    let mut number = |key: &str, value| metadata.u32(&format!("{architecture}.{key}"), value);
    number("context_length", config.context);
    number("embedding_length", config.hidden);
    number("block_count", config.layers);
    number("feed_forward_length", config.ffn);
    number("attention.head_count", config.heads);
    number("attention.head_count_kv", config.kv_heads);
    number("rope.dimension_count", config.head_dim);
    number("vocab_size", config.vocab);
    if let Some(window) = config.sliding_window {
        number("attention.sliding_window", window);
    }
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    metadata.f32(&key("attention.layer_norm_rms_epsilon"), config.norm_eps);
    metadata.f32(&key("rope.freq_base"), config.rope_theta);
    vocabulary(&mut metadata, tokens);
    metadata.bool("tokenizer.ggml.add_bos_token", config.add_bos);
    if let Some(bos) = config.bos {
        metadata.u32("tokenizer.ggml.bos_token_id", bos);
    }
    if let Some(&eos) = config.eos.first() {
        metadata.u32("tokenizer.ggml.eos_token_id", eos);
    }
    let template = model
        .assets()
        .iter()
        .find(|(name, _)| name == "chat_template.jinja");
    if let Some((_, template)) = template {
        metadata.string(
            "tokenizer.chat_template",
            &String::from_utf8_lossy(template),
        );
    }
    metadata
}

fn vocabulary(metadata: &mut Metadata, vocabulary: &Vocabulary) {
    match &vocabulary.algorithm {
        Algorithm::ByteLevel(merges) => {
            metadata.string("tokenizer.ggml.model", "gpt2");
            metadata.string("tokenizer.ggml.pre", "gpt-2");
            let merges: Vec<String> = merges
                .iter()
                .map(|(left, right)| format!("{left} {right}"))
                .collect();
            metadata.strings("tokenizer.ggml.merges", &merges);
        }
        Algorithm::SentencePiece(scores) => {
            metadata.string("tokenizer.ggml.model", "llama");
            metadata.array("tokenizer.ggml.scores", 6, scores.len(), |out| {
                scores
                    .iter()
                    .for_each(|score| out.extend_from_slice(&score.to_le_bytes()));
            });
            metadata.u32("tokenizer.ggml.unknown_token_id", 0);
        }
    }
    metadata.strings("tokenizer.ggml.tokens", &vocabulary.tokens);
    metadata.array(
        "tokenizer.ggml.token_type",
        5,
        vocabulary.kinds.len(),
        |out| {
            vocabulary.kinds.iter().for_each(|kind| {
                out.extend_from_slice(&(*kind as i32).to_le_bytes());
            });
        },
    );
}

#[derive(Default)]
struct Metadata {
    bytes: Vec<u8>,
    count: u64,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        put_string(&mut self.bytes, key);
        self.bytes.extend_from_slice(&kind.to_le_bytes());
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(u8::from(value));
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_string(&mut self.bytes, value);
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        self.array(key, 8, values.len(), |out| {
            values.iter().for_each(|value| put_string(out, value));
        });
    }

    fn array(&mut self, key: &str, kind: u32, count: usize, put: impl FnOnce(&mut Vec<u8>)) {
        self.key(key, 9);
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        self.bytes.extend_from_slice(&(count as u64).to_le_bytes());
        put(&mut self.bytes);
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT) - length
}

fn ggml_type(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 8,
        DType::Q4_K => 12,
        DType::Q6_K => 14,
        DType::BF16 => 30,
    }
}
