//! Random models of a few thousand weights, of every architecture.

use casemate_container::{
    DType, Family, ModelConfig, ModelSource, RopeLayout, RopeScaling, SourceError, SourceTensor,
};
use half::{bf16, f16};

/// A model in memory whose tensors tests may change.
#[derive(Clone)]
pub struct Tiny {
    pub config: ModelConfig,
    pub tensors: Vec<SourceTensor>,
    pub values: Vec<Vec<f32>>,
    bytes: Vec<Vec<u8>>,
    pub assets: Vec<(String, Vec<u8>)>,
}

/// xorshift64*: enough to spread weights.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

/// Llama with 2 layers, 4 heads of 16 over 2 key/value heads, 300 tokens, context 512.
pub fn llama() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn: 80,
        vocab: 300,
        context: 512,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rope_layout: RopeLayout::Interleaved,
        sliding_window: None,
        tied_embeddings: false,
        qkv_bias: false,
        bos: Some(1),
        eos: vec![2],
        add_bos: true,
    }
}

/// Token 1 begins and 2 ends a text; 3 to 258 are bytes.
fn tokenizer_json() -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    for (id, name) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocab.insert(name.into(), id.into());
    }
    for byte in 0..256u32 {
        vocab.insert(format!("<0x{byte:02X}>"), (byte + 3).into());
    }
    let special = |id: u32, name: &str| {
        serde_json::json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    json.to_string().into_bytes()
}

impl Tiny {
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        let mut tiny = Self {
            config: config.clone(),
            tensors: vec![],
            values: vec![],
            bytes: vec![],
            assets: vec![("tokenizer.json".into(), tokenizer_json())],
        };
        let mut random = Random(seed);
        let [hidden, ffn, vocab, dim] =
            [config.hidden, config.ffn, config.vocab, config.head_dim].map(u64::from);
        let (q, kv) = (
            u64::from(config.heads) * dim,
            u64::from(config.kv_heads) * dim,
        );
        let mut matrix = |name: String, rows: u64, columns: u64| {
            // Large enough for the logits to differ, small enough for int8.
            let scale = 2.0 / (columns as f32).sqrt();
            let values = (0..rows * columns).map(|_| random.unit() * scale).collect();
            tiny.push(&name, &[rows, columns], values);
        };
        matrix("token_embd.weight".into(), vocab, hidden);
        if !config.tied_embeddings {
            matrix("output.weight".into(), vocab, hidden);
        }
        for layer in 0..config.layers {
            let mut matrix = |name: &str, rows, columns| {
                matrix(format!("blk.{layer}.{name}.weight"), rows, columns)
            };
            matrix("attn_q", q, hidden);
            matrix("attn_k", kv, hidden);
            matrix("attn_v", kv, hidden);
            matrix("attn_output", hidden, q);
            matrix("ffn_gate", ffn, hidden);
            matrix("ffn_up", ffn, hidden);
            matrix("ffn_down", hidden, ffn);
        }
        let mut vector = |name: String, length: u64, middle: f32| {
            let values = (0..length).map(|_| middle + 0.3 * random.unit()).collect();
            tiny.push(&name, &[length], values);
        };
        vector("output_norm.weight".into(), hidden, 1.0);
        for layer in 0..config.layers {
            vector(format!("blk.{layer}.attn_norm.weight"), hidden, 1.0);
            vector(format!("blk.{layer}.ffn_norm.weight"), hidden, 1.0);
            if config.qkv_bias {
                vector(format!("blk.{layer}.attn_q.bias"), q, 0.5);
                vector(format!("blk.{layer}.attn_k.bias"), kv, -0.5);
                vector(format!("blk.{layer}.attn_v.bias"), kv, 0.0);
            }
        }
        tiny
    }

    /// One that only ever generates printable ASCII (token id = byte + 3).
    pub fn printable(config: ModelConfig, seed: u64) -> Self {
        let (hidden, vocab) = (config.hidden, config.vocab);
        let mut model = Self::new(config, seed);
        let mut head = model.tensor("output.weight").to_vec();
        for (id, row) in head.chunks_mut(hidden as usize).enumerate() {
            if !(b' ' as usize + 3..=b'~' as usize + 3).contains(&id) {
                row.fill(0.0);
            }
        }
        model.remove("output.weight");
        let shape = [u64::from(vocab), u64::from(hidden)];
        model.push("output.weight", &shape, head);
        model
    }

    pub fn push(&mut self, name: &str, shape: &[u64], values: Vec<f32>) {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let size = bytes.len() as u64;
        self.tensors.push(SourceTensor {
            name: name.into(),
            dtype: DType::F32,
            shape: shape.to_vec(),
            size,
        });
        self.values.push(values);
        self.bytes.push(bytes);
    }

    pub fn remove(&mut self, name: &str) {
        let at = self.index(name);
        self.tensors.remove(at);
        self.values.remove(at);
        self.bytes.remove(at);
    }

    /// Replaces a tensor's encoding; `values` are what it stands for.
    pub fn encode(&mut self, name: &str, dtype: DType, bytes: Vec<u8>, values: Vec<f32>) {
        let at = self.index(name);
        self.tensors[at].dtype = dtype;
        self.tensors[at].size = bytes.len() as u64;
        self.bytes[at] = bytes;
        self.values[at] = values;
    }

    /// The same model with its matrices in other encodings, in turns; the values become those that
    /// the encodings hold.
    pub fn encoded(mut self, dtypes: &[DType]) -> Self {
        for (name, dtype) in self.matrices().into_iter().zip(dtypes.iter().cycle()) {
            let (bytes, held) = encode(*dtype, self.tensor(&name));
            self.encode(&name, *dtype, bytes, held);
        }
        self
    }

    /// Names of all matrices, in order.
    pub fn matrices(&self) -> Vec<String> {
        let matrices = self.tensors.iter().filter(|t| t.shape.len() == 2);
        matrices.map(|t| t.name.clone()).collect()
    }

    /// A tensor as it is encoded.
    pub fn bytes(&self, name: &str) -> &[u8] {
        &self.bytes[self.index(name)]
    }

    pub fn index(&self, name: &str) -> usize {
        self.tensors
            .iter()
            .position(|t| t.name == name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn tensor(&self, name: &str) -> &[f32] {
        &self.values[self.index(name)]
    }

    pub fn prompt(&self, length: usize, seed: u64) -> Vec<u32> {
        let mut random = Random(seed);
        (0..length).map(|_| 3 + random.below(250) as u32).collect()
    }
}

/// Values in an encoding, and what it holds of them.
fn encode(dtype: DType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut held) = (Vec::new(), Vec::new());
    for block in values.chunks(32) {
        let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
        let nibbles = |q: &[u8]| (0..16).map(|i| q[i] | q[i + 16] << 4).collect::<Vec<u8>>();
        match dtype {
            DType::F32 => block.iter().for_each(|&x| {
                bytes.extend(x.to_le_bytes());
                held.push(x);
            }),
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
            DType::Q4_1 => {
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
            _ => panic!("no encoder for {dtype}"),
        }
    }
    (bytes, held)
}

impl ModelSource for Tiny {
    fn name(&self) -> &str {
        "tiny"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        out.copy_from_slice(&self.bytes[index][offset as usize..][..out.len()]);
        Ok(())
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &self.assets
    }
}
