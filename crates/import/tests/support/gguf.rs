//! A writer of GGUF files that says whatever it is told to, true or not.

use std::path::PathBuf;

use casemate_import::{Fault, ImportError, Missing, Unsupported};
use tempfile::TempDir;

/// Codes of value types.
pub const U8: u32 = 0;
pub const U32: u32 = 4;
pub const I32: u32 = 5;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// Codes of tensor types.
pub const TENSOR_F32: u32 = 0;
pub const TENSOR_Q8_0: u32 = 8;

/// A file to be written.
#[derive(Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    /// The announced counts, if not the true ones.
    pub tensor_count: Option<u64>,
    pub key_count: Option<u64>,
    pub keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
    /// To what the writer aligns, whatever `general.alignment` says.
    pub alignment: usize,
    /// Bytes cut off the end.
    pub cut: usize,
}

/// A tensor to be written.
#[derive(Clone)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// Innermost first, as the format has them.
    pub dimensions: Vec<u64>,
    pub kind: u32,
    /// The announced offset, if not the true one.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// A string as the format has it.
pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// An array of `count` elements of type `kind`, whose bytes follow.
pub fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
}

/// An array of strings.
pub fn strings<T: AsRef<[u8]>>(texts: &[T]) -> Vec<u8> {
    let elements: Vec<u8> = texts.iter().flat_map(string).collect();
    array(STRING, texts.len() as u64, &elements)
}

/// How many bytes `elements` of tensor type `kind` take.
fn size(kind: u32, elements: u64) -> u64 {
    let (block, bytes) = match kind {
        0 => (1, 4),
        1 | 30 => (1, 2),
        2 => (32, 18),
        3 => (32, 20),
        8 => (32, 34),
        12 => (256, 144),
        14 => (256, 210),
        _ => (1, 1),
    };
    elements / block * bytes
}

impl Gguf {
    /// A file without keys and tensors.
    pub fn empty() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            key_count: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
            cut: 0,
        }
    }

    /// A valid model: one layer, tied embeddings, a SentencePiece vocabulary of 265 tokens.
    pub fn tiny() -> Self {
        Self::tiny_of("llama", false)
    }

    /// The same under another architecture's name, with or without biases.
    pub fn tiny_of(architecture: &str, biases: bool) -> Self {
        let mut gguf = Self::empty();
        gguf.set("general.architecture", STRING, string(architecture));
        for (key, value) in [
            ("block_count", 1u32),
            ("context_length", 64),
            ("embedding_length", 32),
            ("feed_forward_length", 64),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            gguf.set(&format!("{architecture}.{key}"), U32, value.to_le_bytes());
        }
        gguf.set(
            &format!("{architecture}.attention.layer_norm_rms_epsilon"),
            F32,
            1e-5f32.to_le_bytes(),
        );

        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(["\u{2581}a", "ab", "\u{2581}", "a", "b", "<user>"].map(str::to_owned));
        let mut kinds = vec![2i32, 3, 3];
        kinds.extend([6; 256]);
        kinds.extend([1, 1, 1, 1, 1, 4]);
        let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
        let count = tokens.len() as u64;
        gguf.set("tokenizer.ggml.model", STRING, string("llama"));
        gguf.set("tokenizer.ggml.tokens", ARRAY, strings(&tokens));
        let kinds: Vec<u8> = kinds.iter().flat_map(|kind| kind.to_le_bytes()).collect();
        gguf.set(
            "tokenizer.ggml.token_type",
            ARRAY,
            array(I32, count, &kinds),
        );
        let scores: Vec<u8> = scores
            .iter()
            .flat_map(|score| score.to_le_bytes())
            .collect();
        gguf.set("tokenizer.ggml.scores", ARRAY, array(F32, count, &scores));
        for (name, id) in [("unknown", 0u32), ("bos", 1), ("eos", 2)] {
            gguf.set(
                &format!("tokenizer.ggml.{name}_token_id"),
                U32,
                id.to_le_bytes(),
            );
        }

        gguf.add("token_embd.weight", &[32, count], TENSOR_Q8_0);
        gguf.add("output_norm.weight", &[32], TENSOR_F32);
        for (name, dimensions) in [
            ("attn_norm.weight", vec![32]),
            ("attn_q.weight", vec![32, 32]),
            ("attn_k.weight", vec![32, 16]),
            ("attn_v.weight", vec![32, 16]),
            ("attn_output.weight", vec![32, 32]),
            ("ffn_norm.weight", vec![32]),
            ("ffn_gate.weight", vec![32, 64]),
            ("ffn_up.weight", vec![32, 64]),
            ("ffn_down.weight", vec![64, 32]),
        ] {
            gguf.add(&format!("blk.0.{name}"), &dimensions, TENSOR_F32);
        }
        if biases {
            for (name, length) in [
                ("attn_q.bias", 32),
                ("attn_k.bias", 16),
                ("attn_v.bias", 16),
            ] {
                gguf.add(&format!("blk.0.{name}"), &[length], TENSOR_F32);
            }
        }
        gguf
    }

    /// The tiny model with a byte-level vocabulary: all bytes, `ab`, two control tokens and padding to 265.
    pub fn tiny_byte_level() -> Self {
        let mut gguf = Self::tiny();
        let mut tokens: Vec<String> = (0..=255u32)
            .filter(|point| matches!(point, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff))
            .chain(0x100..=0x143)
            .map(|point| char::from_u32(point).unwrap().to_string())
            .collect();
        assert_eq!(tokens.len(), 256);
        tokens.extend(["ab", "\u{120}ab", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
        let normal = tokens.len() - 2;
        tokens.extend((tokens.len()..265).map(|id| format!("[PAD{id}]")));
        let kinds = (0..tokens.len()).map(|id| match id {
            id if id < normal => 1i32,
            id if id < normal + 2 => 3,
            _ => 5,
        });
        let kinds: Vec<u8> = kinds.flat_map(|kind| kind.to_le_bytes()).collect();
        gguf.set("tokenizer.ggml.model", STRING, string("gpt2"));
        gguf.set("tokenizer.ggml.pre", STRING, string("qwen2"));
        gguf.set("tokenizer.ggml.tokens", ARRAY, strings(&tokens));
        gguf.set("tokenizer.ggml.token_type", ARRAY, array(I32, 265, &kinds));
        gguf.set(
            "tokenizer.ggml.merges",
            ARRAY,
            strings(&["a b", "\u{120} ab"]),
        );
        gguf.set("tokenizer.ggml.bos_token_id", U32, 258u32.to_le_bytes());
        gguf.set("tokenizer.ggml.eos_token_id", U32, 259u32.to_le_bytes());
        gguf.remove("tokenizer.ggml.scores");
        gguf.remove("tokenizer.ggml.unknown_token_id");
        gguf
    }

    /// Gives `key` a value, in place of the one it has.
    pub fn set(&mut self, key: &str, kind: u32, value: impl Into<Vec<u8>>) -> &mut Self {
        let value = value.into();
        match self
            .keys
            .iter_mut()
            .find(|(name, ..)| name == key.as_bytes())
        {
            Some(entry) => (entry.1, entry.2) = (kind, value),
            None => self.keys.push((key.into(), kind, value)),
        }
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        let before = self.keys.len();
        self.keys.retain(|(name, ..)| name != key.as_bytes());
        assert_eq!(self.keys.len() + 1, before, "no key {key}");
        self
    }

    /// Adds a tensor whose bytes are made from its name.
    pub fn add(&mut self, name: &str, dimensions: &[u64], kind: u32) -> &mut Self {
        let bytes = size(kind, dimensions.iter().product());
        let seed = name
            .bytes()
            .fold(7u8, |seed, byte| seed.wrapping_mul(31) ^ byte);
        self.tensors.push(Tensor {
            name: name.into(),
            dimensions: dimensions.to_vec(),
            kind,
            offset: None,
            data: (0..bytes)
                .map(|at| (at as u8).wrapping_mul(17) ^ seed)
                .collect(),
        });
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors
            .iter_mut()
            .find(|tensor| tensor.name == name.as_bytes())
            .unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The place of a tensor in the data section.
    pub fn offset(&self, name: &str) -> u64 {
        let mut offset = 0;
        for tensor in &self.tensors {
            if tensor.name == name.as_bytes() {
                return offset as u64;
            }
            offset = (offset + tensor.data.len()).next_multiple_of(self.alignment);
        }
        panic!("no tensor {name}")
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(
            self.tensor_count
                .unwrap_or(self.tensors.len() as u64)
                .to_le_bytes(),
        );
        out.extend(
            self.key_count
                .unwrap_or(self.keys.len() as u64)
                .to_le_bytes(),
        );
        for (key, kind, value) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            out.extend(
                tensor
                    .dimensions
                    .iter()
                    .flat_map(|length| length.to_le_bytes()),
            );
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out.truncate(out.len() - self.cut);
        out
    }

    /// Writes the file into a directory that is deleted with the returned guard.
    pub fn write(&self) -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tiny.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        (directory, path)
    }
}

/// The refusal of the tiny model after `spoil`.
pub fn refused(spoil: impl FnOnce(&mut Gguf)) -> ImportError {
    let mut model = Gguf::tiny();
    spoil(&mut model);
    let (_guard, path) = model.write();
    super::refusal(&path)
}

/// The fault for which the tiny model is malformed after `spoil`.
pub fn fault(spoil: impl FnOnce(&mut Gguf)) -> Fault {
    match refused(spoil) {
        ImportError::Malformed { fault, .. } => fault,
        other => panic!("not malformed but {other:?}"),
    }
}

/// What the tiny model needs after `spoil`.
pub fn unsupported(spoil: impl FnOnce(&mut Gguf)) -> Unsupported {
    match refused(spoil) {
        ImportError::Unsupported { need, .. } => need,
        other => panic!("not unsupported but {other:?}"),
    }
}

/// What the tiny model lacks after `spoil`.
pub fn missing(spoil: impl FnOnce(&mut Gguf)) -> Missing {
    match refused(spoil) {
        ImportError::Missing { part, .. } => part,
        other => panic!("not missing but {other:?}"),
    }
}
