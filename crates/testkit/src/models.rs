//! Models small enough for every test: a Llama-family network with random weights and a byte-level tokenizer, all from
//! one seed. What they say is noise, yet they run the whole path. Files of them are written by [`crate::gguf`].

use casemate_container::{
    DType, Family, ModelConfig, ModelSource, RopeLayout, RopeScaling, SourceError, SourceTensor,
};
use serde_json::{Value, json};

/// A model held in memory.
pub struct MemoryModel {
    /// Name to seal under.
    pub name: String,
    /// Architecture.
    pub config: ModelConfig,
    /// Tensors; `data` holds their bytes in the same order.
    pub tensors: Vec<SourceTensor>,
    /// Bytes of each tensor.
    pub data: Vec<Vec<u8>>,
    /// Assets by name.
    pub assets: Vec<(String, Vec<u8>)>,
    /// The tokens behind the tokenizer asset.
    pub vocabulary: Vocabulary,
}

/// Tokens as GGUF stores them.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// Text of each token in its model's alphabet.
    pub tokens: Vec<String>,
    /// What each token is for.
    pub kinds: Vec<TokenKind>,
    /// How text becomes tokens.
    pub algorithm: Algorithm,
}

/// How text becomes tokens.
#[derive(Clone, Debug)]
pub enum Algorithm {
    /// Byte-level BPE with its merges, first rule first.
    ByteLevel(Vec<(String, String)>),
    /// SentencePiece BPE with one score per token.
    SentencePiece(Vec<f32>),
}

/// What a token is for, with GGUF's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Made by merging.
    Normal = 1,
    /// Stands for what has no token.
    Unknown = 2,
    /// Found whole and not printed.
    Control = 3,
    /// One byte, as SentencePiece writes it.
    Byte = 6,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct Tiny {
    /// Where the weights come from.
    pub seed: u64,
    /// Architecture family.
    pub family: Family,
    /// Width; a multiple of 32 for [`DType::Q8_0`].
    pub hidden: u32,
    /// Blocks.
    pub layers: u32,
    /// Query heads; divides `hidden`.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Inner width of the feed-forward; a multiple of 32 for [`DType::Q8_0`].
    pub ffn: u32,
    /// Longest sequence.
    pub context: u32,
    /// Encoding of the matrices: [`DType::F32`] or [`DType::Q8_0`]. Vectors are F32.
    pub dtype: DType,
    /// Whether the output projection is the embedding.
    pub tied: bool,
}

impl Default for Tiny {
    fn default() -> Tiny {
        Tiny {
            seed: 1,
            family: Family::Llama,
            hidden: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            ffn: 128,
            context: 512,
            dtype: DType::F32,
            tied: true,
        }
    }
}

/// The chat template of [`Tiny`] models: ChatML.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// [`CHAT_TEMPLATE`] for models that call functions.
pub const TOOLS_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}\
    {% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}\
    {% for call in message.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ call.function.name }}\", \
    \"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// What [`MemoryModel::offer_calls`] makes a token of.
pub const CALL: &str = "<tool_call>";
/// Token that begins every text.
pub const BEGIN: &str = "<|begin|>";
/// Token that ends a generation.
pub const END: &str = "<|endoftext|>";
/// Control token that nothing uses.
const UNUSED: &str = "<|unused|>";

impl Tiny {
    /// Makes the model. The same description gives the same bytes everywhere.
    pub fn build(&self) -> MemoryModel {
        let vocabulary = byte_vocabulary();
        let config = ModelConfig {
            family: self.family,
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            ffn: self.ffn,
            vocab: vocabulary.tokens.len() as u32,
            context: self.context,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_layout: match self.family {
                Family::Qwen2 => RopeLayout::Half,
                Family::Llama | Family::Mistral => RopeLayout::Interleaved,
            },
            sliding_window: None,
            tied_embeddings: self.tied,
            qkv_bias: self.family == Family::Qwen2,
            bos: Some(special_token(BEGIN)),
            // In the order in which a GGUF importer finds them.
            eos: vec![special_token(END), special_token("<|im_end|>")],
            add_bos: true,
        };
        let mut model = MemoryModel {
            name: "tiny".into(),
            assets: assets(&vocabulary),
            config,
            tensors: Vec::new(),
            data: Vec::new(),
            vocabulary,
        };
        self.fill(&mut model);
        model
    }

    fn fill(&self, model: &mut MemoryModel) {
        let mut random = Random(self.seed);
        let [hidden, ffn] = [self.hidden, self.ffn].map(u64::from);
        let vocab = u64::from(model.config.vocab);
        let kv = hidden / u64::from(self.heads) * u64::from(self.kv_heads);
        let matrix = |model: &mut MemoryModel, random: &mut Random, name: &str, rows, columns| {
            // Keeps the variance of what flows through.
            let scale = 1.7 / (columns as f32).sqrt();
            let values = random.values(rows * columns, 0.0, scale);
            model.push(name, self.dtype, vec![rows, columns], &values);
        };
        let vector = |model: &mut MemoryModel, random: &mut Random, name: &str, length, middle| {
            let values = random.values(length, middle, 0.1);
            model.push(name, DType::F32, vec![length], &values);
        };
        matrix(model, &mut random, "token_embd.weight", vocab, hidden);
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            vector(model, &mut random, &name("attn_norm.weight"), hidden, 1.0);
            matrix(model, &mut random, &name("attn_q.weight"), hidden, hidden);
            matrix(model, &mut random, &name("attn_k.weight"), kv, hidden);
            matrix(model, &mut random, &name("attn_v.weight"), kv, hidden);
            if model.config.qkv_bias {
                vector(model, &mut random, &name("attn_q.bias"), hidden, 0.0);
                vector(model, &mut random, &name("attn_k.bias"), kv, 0.0);
                vector(model, &mut random, &name("attn_v.bias"), kv, 0.0);
            }
            matrix(
                model,
                &mut random,
                &name("attn_output.weight"),
                hidden,
                hidden,
            );
            vector(model, &mut random, &name("ffn_norm.weight"), hidden, 1.0);
            matrix(model, &mut random, &name("ffn_gate.weight"), ffn, hidden);
            matrix(model, &mut random, &name("ffn_up.weight"), ffn, hidden);
            matrix(model, &mut random, &name("ffn_down.weight"), hidden, ffn);
        }
        vector(model, &mut random, "output_norm.weight", hidden, 1.0);
        if !self.tied {
            matrix(model, &mut random, "output.weight", vocab, hidden);
        }
    }
}

impl MemoryModel {
    /// Replaces the chat template.
    ///
    /// # Panics
    /// When the model has none.
    pub fn set_chat_template(&mut self, template: &str) {
        let mut assets = self.assets.iter_mut();
        let asset = assets.find(|(name, _)| name == "chat_template.jinja");
        asset.expect("tiny models have a template").1 = template.as_bytes().to_vec();
    }

    /// Gives the model [`TOOLS_TEMPLATE`] and, in place of its unused token, [`CALL`] as ordinary text with a token of
    /// its own, as models have it that were trained to call functions. Returns its id and that of [`END`]: who biases
    /// them makes noise call.
    ///
    /// # Panics
    /// When the model is not a tiny one as it was built.
    pub fn offer_calls(&mut self) -> [usize; 2] {
        self.set_chat_template(TOOLS_TEMPLATE);
        let tokens = &mut self.vocabulary.tokens;
        let [call, end] = [UNUSED, END].map(|name| {
            let at = tokens.iter().position(|token| token == name);
            at.expect("tiny models have their special tokens")
        });
        tokens[call] = CALL.into();
        self.vocabulary.kinds[call] = TokenKind::Normal;
        let json = tokenizer_json(&self.vocabulary).to_string().into_bytes();
        let mut assets = self.assets.iter_mut();
        let asset = assets.find(|(name, _)| name == "tokenizer.json");
        asset.expect("tiny models have a tokenizer").1 = json;
        [call, end]
    }

    /// Adds a tensor, encoding its values.
    ///
    /// # Panics
    /// When the shape does not fit the values, or for encodings other than F32 and Q8_0.
    pub fn push(&mut self, name: &str, dtype: DType, shape: Vec<u64>, values: &[f32]) {
        assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "{name}");
        let data = match dtype {
            DType::F32 => values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
            DType::Q8_0 => encode_q8_0(values),
            other => panic!("no encoder for {other}"),
        };
        let size = dtype.bytes_for(&shape).expect("a tiny shape has a size");
        assert_eq!(size, data.len() as u64, "{name}");
        self.tensors.push(SourceTensor {
            name: name.into(),
            dtype,
            shape,
            size,
        });
        self.data.push(data);
    }
}

/// Fills `out` with a tensor's bytes from `offset` on.
pub(crate) fn read(
    tensor: &SourceTensor,
    data: &[u8],
    offset: u64,
    out: &mut [u8],
) -> Result<(), SourceError> {
    let bytes = usize::try_from(offset)
        .ok()
        .and_then(|start| data.get(start..)?.get(..out.len()))
        .ok_or_else(|| SourceError::Short {
            tensor: tensor.name.clone(),
        })?;
    out.copy_from_slice(bytes);
    Ok(())
}

impl ModelSource for MemoryModel {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        read(&self.tensors[index], &self.data[index], offset, out)
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &self.assets
    }
}

/// Blocks of 32: an f16 scale and 32 signed bytes.
fn encode_q8_0(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() / 32 * 34);
    for block in values.chunks_exact(32) {
        let largest = block
            .iter()
            .fold(0.0f32, |largest, value| largest.max(value.abs()));
        let scale = half::f16::from_f32(largest / 127.0);
        out.extend_from_slice(&scale.to_le_bytes());
        let divisor = if scale.to_f32() == 0.0 {
            1.0
        } else {
            scale.to_f32()
        };
        out.extend(block.iter().map(|value| {
            let rounded = (value / divisor).round().clamp(-127.0, 127.0);
            (rounded as i8).cast_unsigned()
        }));
    }
    out
}

/// The vocabulary of [`Tiny`] models, filled up to `count` tokens with words that no merge makes and every decoder can
/// print: for random models whose vocabulary has a size to keep.
///
/// # Panics
/// When `count` is less than the vocabulary has already, 288.
pub fn padded_vocabulary(count: usize) -> Vocabulary {
    let mut vocabulary = byte_vocabulary();
    let missing = count.checked_sub(vocabulary.tokens.len());
    for i in 0..missing.expect("room for the bytes and special tokens") {
        vocabulary.tokens.push(format!("{}w{i}", byte_letter(b' ')));
        vocabulary.kinds.push(TokenKind::Normal);
    }
    vocabulary
}

/// Id of a special token in every vocabulary of this room.
///
/// # Panics
/// When there is no such token.
pub fn special_token(text: &str) -> u32 {
    let vocabulary = byte_vocabulary();
    let at = vocabulary.tokens.iter().position(|token| token == text);
    at.expect("the vocabulary has its special tokens") as u32
}

/// What a model of this room carries besides tensors: `tokenizer.json` and a chat template.
pub fn assets(vocabulary: &Vocabulary) -> Vec<(String, Vec<u8>)> {
    vec![
        (
            "tokenizer.json".into(),
            tokenizer_json(vocabulary).to_string().into_bytes(),
        ),
        ("chat_template.jinja".into(), CHAT_TEMPLATE.into()),
    ]
}

/// 256 bytes, a few merges, and the special tokens of ChatML: 288 in all.
fn byte_vocabulary() -> Vocabulary {
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|byte| byte_letter(byte).to_string())
        .collect();
    let mut merges = Vec::new();
    // Each joins two tokens that are there already.
    for (left, right) in [
        ("t", "h"),
        ("th", "e"),
        (" ", "the"),
        ("i", "n"),
        ("a", "n"),
        ("an", "d"),
        (" ", "and"),
        ("e", "r"),
        ("r", "e"),
        ("o", "n"),
        ("o", "r"),
        ("e", "n"),
        (" ", "t"),
        (" ", "a"),
        (" ", "s"),
        ("o", "u"),
        ("i", "s"),
        (" ", "is"),
        ("i", "t"),
        ("a", "t"),
        ("l", "l"),
        ("in", "g"),
        ("o", "f"),
        (" ", "of"),
        ("e", "d"),
        ("h", "e"),
        (" ", "w"),
    ] {
        let [left, right] =
            [left, right].map(|text| text.bytes().map(byte_letter).collect::<String>());
        tokens.push(format!("{left}{right}"));
        merges.push((left, right));
    }
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    for special in [BEGIN, END, "<|im_start|>", "<|im_end|>", UNUSED] {
        tokens.push(special.into());
        kinds.push(TokenKind::Control);
    }
    Vocabulary {
        tokens,
        kinds,
        algorithm: Algorithm::ByteLevel(merges),
    }
}

/// GPT-2's printable letter for a byte: printable bytes stand for themselves, the rest follow from U+0100 on.
fn byte_letter(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if is_printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !is_printable(other)).count() as u32;
    char::from_u32(0x100 + before).expect("these code points are letters")
}

fn tokenizer_json(vocabulary: &Vocabulary) -> Value {
    let Algorithm::ByteLevel(merges) = &vocabulary.algorithm else {
        unreachable!("tiny models have a byte-level vocabulary")
    };
    let begin = vocabulary.tokens.iter().position(|token| token == BEGIN);
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    let ids: serde_json::Map<String, Value> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect();
    let added: Vec<Value> = vocabulary
        .tokens
        .iter()
        .zip(&vocabulary.kinds)
        .enumerate()
        .filter(|(_, (_, kind))| **kind == TokenKind::Control)
        .map(|(id, (token, _))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true
            })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                { "SpecialToken": { "id": BEGIN, "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } }
            ],
            "pair": [
                { "SpecialToken": { "id": BEGIN, "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } }
            ],
            "special_tokens": { BEGIN: { "id": BEGIN, "ids": [begin], "tokens": [BEGIN] } }
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": ids,
            "merges": merges
        }
    })
}

/// SplitMix64: small, and the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly spread over `middle` ± `spread`.
    pub(crate) fn values(&mut self, count: u64, middle: f32, spread: f32) -> Vec<f32> {
        (0..count)
            .map(|_| {
                // 24 bits are exact in f32.
                let unit = (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
                middle + spread * unit
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use sha2::{Digest, Sha256};

    use super::*;

    fn fingerprint(model: &MemoryModel) -> String {
        let mut hash = Sha256::new();
        for (tensor, data) in model.tensors.iter().zip(&model.data) {
            hash.update(&tensor.name);
            hash.update(data);
        }
        hex::encode(&hash.finalize()[..8])
    }

    #[test]
    fn one_seed_gives_one_model() {
        let first = fingerprint(&Tiny::default().build());
        assert_eq!(first, fingerprint(&Tiny::default().build()));
        assert_ne!(
            first,
            fingerprint(
                &Tiny {
                    seed: 2,
                    ..Tiny::default()
                }
                .build()
            )
        );
    }

    #[test]
    fn every_description_is_a_valid_configuration_with_all_its_tensors() {
        for family in [Family::Llama, Family::Mistral, Family::Qwen2] {
            for (dtype, tied) in [(DType::F32, true), (DType::Q8_0, false)] {
                let model = Tiny {
                    family,
                    dtype,
                    tied,
                    ..Tiny::default()
                }
                .build();
                model.config.check().unwrap();
                let names: HashSet<_> = model.tensors.iter().map(|t| t.name.as_str()).collect();
                assert_eq!(names.len(), model.tensors.len());
                assert_eq!(names.contains("output.weight"), !tied);
                assert_eq!(names.contains("blk.1.attn_k.bias"), family == Family::Qwen2);
                let mut whole = vec![0; model.tensors[1].size as usize];
                model.read_tensor(1, 0, &mut whole).unwrap();
                assert_eq!(whole, model.data[1]);
                let past_end = model.read_tensor(1, 1, &mut whole);
                assert!(matches!(past_end, Err(SourceError::Short { .. })));
            }
        }
    }

    #[test]
    fn the_alphabet_gives_every_byte_its_own_letter() {
        let letters: HashSet<char> = (0..=255).map(byte_letter).collect();
        assert_eq!(letters.len(), 256);
        assert_eq!(
            (byte_letter(b' '), byte_letter(b'\n'), byte_letter(b'A')),
            ('Ġ', 'Ċ', 'A')
        );
        assert_eq!((byte_letter(0x7f), byte_letter(0xad)), ('ġ', 'Ń'));
    }

    #[test]
    fn q8_0_keeps_values_within_half_a_step() {
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 20.0) * 0.01).collect();
        let encoded = encode_q8_0(&values);
        assert_eq!(encoded.len(), 68);
        for (block, values) in encoded.chunks(34).zip(values.chunks(32)) {
            let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
            for (&byte, value) in block[2..].iter().zip(values) {
                assert!((f32::from(byte.cast_signed()) * scale - value).abs() <= scale * 0.51);
            }
        }
        assert_eq!(encode_q8_0(&[0.0; 32]), [0; 34]);
    }
}
