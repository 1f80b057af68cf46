//! The typed architecture of a model: everything needed to run it apart from tensors and tokenizer.
//!
//! Parsers of other formats (`config.json`, GGUF metadata) produce it; the engine consumes it. Plausibility that
//! needs the tensors (do the shapes fit?) is checked by the engine, which knows what it multiplies with what.

use minicbor::{Decode, Encode};

use crate::manifest::ManifestError;

/// Architecture families. All are pre-norm decoders with RMSNorm, RoPE and a gated SiLU feed-forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Family {
    /// Llama 2, Llama 3, SmolLM2, TinyLlama.
    #[n(0)]
    Llama,
    /// Mistral 7B: Llama with a sliding window.
    #[n(1)]
    Mistral,
    /// Qwen2: Llama with biases on Q, K and V.
    #[n(2)]
    Qwen2,
}

/// Which pairs of a head's elements RoPE rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum RopeLayout {
    /// Pairs (2i, 2i+1): GGUF's `llama` tensors, whose rows were permuted on conversion.
    #[n(0)]
    Interleaved,
    /// Pairs (i, i + head_dim/2): Hugging Face's tensors, GGUF's `qwen2`.
    #[n(1)]
    Half,
}

/// How RoPE's frequencies are stretched beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
pub enum RopeScaling {
    /// As trained.
    #[n(0)]
    None,
    /// All frequencies divided by `factor`.
    #[n(1)]
    Linear {
        /// Divisor, > 0.
        #[cbor(n(0), with = "f32_bits")]
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth ramp between.
    #[n(2)]
    Llama3 {
        /// Divisor of the low frequencies.
        #[cbor(n(0), with = "f32_bits")]
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        #[cbor(n(1), with = "f32_bits")]
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        #[cbor(n(2), with = "f32_bits")]
        high_freq_factor: f32,
        /// Context length of the original training.
        #[n(3)]
        original_context: u32,
    },
}

/// Architecture of a model.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct ModelConfig {
    /// Architecture family.
    #[n(0)]
    pub family: Family,
    /// Width of the residual stream.
    #[n(1)]
    pub hidden: u32,
    /// Decoder blocks.
    #[n(2)]
    pub layers: u32,
    /// Query heads.
    #[n(3)]
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    #[n(4)]
    pub kv_heads: u32,
    /// Elements per head; even.
    #[n(5)]
    pub head_dim: u32,
    /// Width of the feed-forward's inner layer.
    #[n(6)]
    pub ffn: u32,
    /// Rows of the embedding, which is how many token ids there are.
    #[n(7)]
    pub vocab: u32,
    /// Longest sequence the model was made for, in tokens.
    #[n(8)]
    pub context: u32,
    /// ε of RMSNorm.
    #[cbor(n(9), with = "f32_bits")]
    pub norm_eps: f32,
    /// Base of RoPE's frequencies.
    #[cbor(n(10), with = "f32_bits")]
    pub rope_theta: f32,
    /// Stretching of RoPE's frequencies.
    #[n(11)]
    pub rope_scaling: RopeScaling,
    /// Pairing of RoPE.
    #[n(12)]
    pub rope_layout: RopeLayout,
    /// Attention reaches back this many tokens; absent = all.
    #[n(13)]
    pub sliding_window: Option<u32>,
    /// The output projection is the embedding itself.
    #[n(14)]
    pub tied_embeddings: bool,
    /// Q, K and V have biases.
    #[n(15)]
    pub qkv_bias: bool,
    /// Beginning-of-sequence token.
    #[n(16)]
    pub bos: Option<u32>,
    /// Tokens that end a generation.
    #[n(17)]
    pub eos: Vec<u32>,
    /// The tokenizer puts `bos` in front of a text.
    #[n(18)]
    pub add_bos: bool,
}

/// Bounds far above any published model; they keep every product of two of these in 64 bits.
const LARGEST_DIMENSION: u32 = 1 << 24;
const MOST_LAYERS: u32 = 4096;
const MOST_EOS: usize = 64;

impl ModelConfig {
    /// Refuses values with which no model can be run.
    ///
    /// # Errors
    /// [`ManifestError::Config`] naming the field.
    pub fn check(&self) -> Result<(), ManifestError> {
        let refuse = |field: &'static str| Err(ManifestError::Config { field });
        let dimension = |v: u32| (1..=LARGEST_DIMENSION).contains(&v);
        let positive = |v: f32| v.is_finite() && v > 0.0;
        for (value, field) in [
            (self.hidden, "hidden"),
            (self.heads, "heads"),
            (self.kv_heads, "kv_heads"),
            (self.head_dim, "head_dim"),
            (self.ffn, "ffn"),
            (self.vocab, "vocab"),
            (self.context, "context"),
        ] {
            if !dimension(value) {
                return refuse(field);
            }
        }
        if !(1..=MOST_LAYERS).contains(&self.layers) {
            return refuse("layers");
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return refuse("kv_heads");
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse("head_dim");
        }
        if u64::from(self.heads) * u64::from(self.head_dim) > u64::from(LARGEST_DIMENSION) {
            return refuse("heads");
        }
        if !positive(self.norm_eps) {
            return refuse("norm_eps");
        }
        if !positive(self.rope_theta) {
            return refuse("rope_theta");
        }
        match self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } if positive(factor) => {}
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } if positive(factor)
                && positive(low_freq_factor)
                && positive(high_freq_factor)
                && high_freq_factor > low_freq_factor
                && dimension(original_context) => {}
            _ => return refuse("rope_scaling"),
        }
        if self.sliding_window == Some(0) {
            return refuse("sliding_window");
        }
        if self.bos.is_some_and(|id| id >= self.vocab) || (self.add_bos && self.bos.is_none()) {
            return refuse("bos");
        }
        if self.eos.len() > MOST_EOS || self.eos.iter().any(|&id| id >= self.vocab) {
            return refuse("eos");
        }
        Ok(())
    }
}

/// Floats travel as the integer of their bits: CBOR has several encodings of one float, integers only one.
pub(crate) mod f32_bits {
    use minicbor::decode::{Decoder, Error as DecodeError};
    use minicbor::encode::{Encoder, Error as EncodeError, Write};

    pub(crate) fn encode<Ctx, W: Write>(
        value: &f32,
        e: &mut Encoder<W>,
        _: &mut Ctx,
    ) -> Result<(), EncodeError<W::Error>> {
        e.u32(value.to_bits())?.ok()
    }

    pub(crate) fn decode<Ctx>(d: &mut Decoder<'_>, _: &mut Ctx) -> Result<f32, DecodeError> {
        Ok(f32::from_bits(d.u32()?))
    }
}
