//! Reads the checkpoints and vocabularies of llama2.c: the small, real models with golden continuations.
//!
//! ```text
//! seven i32: dim, hidden, layers, heads, kv_heads, vocab (negative: output projection of its own), context
//! f32: embedding | attention norms | q | k | v | attention output | ffn norms | gate | down | up | final norm
//!    | rotary tables (unused) | output projection, if its own          (each kind for all layers together)
//! ```
//!
//! The tests' own files, of known hash: structure is checked, and what is wrong is a panic.

use std::path::Path;

use casemate_container::{DType, Family, ModelConfig, RopeLayout, RopeScaling};

use crate::models::{Algorithm, MemoryModel, TokenKind, Vocabulary};

/// Reads checkpoint and vocabulary. The model has no tokenizer asset; written by [`crate::gguf::write`] and imported
/// again, it gets one.
///
/// # Panics
/// When a file cannot be read or is not what it should be.
pub fn read(checkpoint: &Path, vocabulary: &Path) -> MemoryModel {
    let bytes = read_file(checkpoint);
    let mut words = bytes
        .chunks_exact(4)
        .map(|word| [word[0], word[1], word[2], word[3]]);
    let header: Vec<i32> = words.by_ref().take(7).map(i32::from_le_bytes).collect();
    let floats: Vec<f32> = words.map(f32::from_le_bytes).collect();
    let &[dim, ffn, layers, heads, kv_heads, vocab, context] = &header[..] else {
        panic!("{} is too short", checkpoint.display())
    };
    let tied = vocab > 0;
    let positive = |value: i32| u32::try_from(value).expect("dimensions are positive");
    let [dim, ffn, layers, heads, kv_heads, vocab, context] =
        [dim, ffn, layers, heads, kv_heads, vocab.abs(), context].map(positive);
    let head_dim = dim / heads;
    let mut model = MemoryModel {
        name: checkpoint
            .file_stem()
            .expect("a file has a name")
            .to_string_lossy()
            .into(),
        config: ModelConfig {
            family: Family::Llama,
            hidden: dim,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocab,
            context,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Interleaved,
            sliding_window: None,
            tied_embeddings: tied,
            qkv_bias: false,
            bos: Some(1),
            eos: vec![2],
            add_bos: true,
        },
        tensors: Vec::new(),
        data: Vec::new(),
        assets: Vec::new(),
        vocabulary: read_vocabulary(vocabulary, vocab as usize),
    };
    let [dim, ffn, vocab, kv] = [dim, ffn, vocab, kv_heads * head_dim].map(u64::from);
    let mut rest = Floats(&floats);
    model.push(
        "token_embd.weight",
        DType::F32,
        vec![vocab, dim],
        rest.take(vocab * dim),
    );
    for (part, shape) in [
        ("attn_norm", vec![dim]),
        ("attn_q", vec![dim, dim]),
        ("attn_k", vec![kv, dim]),
        ("attn_v", vec![kv, dim]),
        ("attn_output", vec![dim, dim]),
        ("ffn_norm", vec![dim]),
        ("ffn_gate", vec![ffn, dim]),
        ("ffn_down", vec![dim, ffn]),
        ("ffn_up", vec![ffn, dim]),
    ] {
        for layer in 0..layers {
            let values = rest.take(shape.iter().product());
            model.push(
                &format!("blk.{layer}.{part}.weight"),
                DType::F32,
                shape.clone(),
                values,
            );
        }
    }
    model.push("output_norm.weight", DType::F32, vec![dim], rest.take(dim));
    rest.take(u64::from(context) * u64::from(head_dim));
    if !tied {
        model.push(
            "output.weight",
            DType::F32,
            vec![vocab, dim],
            rest.take(vocab * dim),
        );
    }
    assert!(
        rest.0.is_empty(),
        "{}: {} values left over",
        checkpoint.display(),
        rest.0.len()
    );
    model
}

/// Vocabulary: i32 longest token, then for each token f32 score, i32 length, bytes.
fn read_vocabulary(path: &Path, count: usize) -> Vocabulary {
    let bytes = read_file(path);
    let mut rest = bytes.get(4..).expect("a vocabulary has a header");
    let mut tokens = Vec::with_capacity(count);
    let mut scores = Vec::with_capacity(count);
    let word = |rest: &mut &[u8]| -> [u8; 4] {
        let (word, after) = rest.split_first_chunk().expect("the vocabulary ends early");
        *rest = after;
        *word
    };
    for _ in 0..count {
        scores.push(f32::from_le_bytes(word(&mut rest)));
        let length = i32::from_le_bytes(word(&mut rest));
        let (text, after) = rest.split_at(usize::try_from(length).expect("a length"));
        rest = after;
        tokens.push(String::from_utf8(text.to_vec()).expect("tokens are UTF-8"));
    }
    assert!(rest.is_empty(), "{}: tokens left over", path.display());
    let mut kinds = vec![TokenKind::Normal; count];
    // Its writer renamed these and turned SentencePiece's visible space into an ordinary one.
    for (id, (text, kind)) in [
        ("<unk>", TokenKind::Unknown),
        ("<s>", TokenKind::Control),
        ("</s>", TokenKind::Control),
    ]
    .into_iter()
    .enumerate()
    {
        tokens[id] = text.into();
        kinds[id] = kind;
    }
    for (token, kind) in tokens.iter_mut().zip(&mut kinds).skip(3) {
        if token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') {
            *kind = TokenKind::Byte;
        } else {
            *token = token.replace(' ', "\u{2581}");
        }
    }
    Vocabulary {
        tokens,
        kinds,
        algorithm: Algorithm::SentencePiece(scores),
    }
}

struct Floats<'a>(&'a [f32]);

impl<'a> Floats<'a> {
    fn take(&mut self, count: u64) -> &'a [f32] {
        let (taken, rest) = self
            .0
            .split_at(usize::try_from(count).expect("a small count"));
        self.0 = rest;
        taken
    }
}

fn read_file(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stories260k() {
        let Some(checkpoint) = crate::data::file("models/stories260K/stories260K.bin") else {
            return;
        };
        let model = read(&checkpoint, &checkpoint.with_file_name("tok512.bin"));
        let config = &model.config;
        assert_eq!(
            (config.hidden, config.layers, config.ffn, config.vocab),
            (64, 5, 172, 512)
        );
        assert_eq!(
            (config.heads, config.kv_heads, config.tied_embeddings),
            (8, 4, true)
        );
        config.check().unwrap();
        assert_eq!(model.tensors.len(), 1 + 9 * 5 + 1);
        assert_eq!(model.vocabulary.tokens[403], "\u{2581}Once");
    }
}
