//! GGUF's architecture keys as a [`ModelConfig`].
//!
//! `llama` covers Llama 1 to 3, SmolLM2 and Mistral, whose query and key rows the converter has permuted so that
//! rotary pairs are neighbours; `qwen2` keeps the halves of Hugging Face.

use casemate_container::{Family, ModelConfig, RopeLayout, RopeScaling, SourceTensor};

use super::metadata::Metadata;
use crate::error::{Fault, Problem, Unsupported};

/// Reads the configuration. Ids of special tokens are the vocabulary's and are filled in here too.
pub(super) fn read(metadata: &Metadata, tensors: &[SourceTensor]) -> Result<ModelConfig, Problem> {
    const ARCHITECTURE: &str = "general.architecture";
    let name = Metadata::require(ARCHITECTURE, metadata.str(ARCHITECTURE)?)?;
    let (family, rope_layout) = match name {
        "llama" => (Family::Llama, RopeLayout::Interleaved),
        "qwen2" => (Family::Qwen2, RopeLayout::Half),
        _ => {
            return Err(Unsupported::Architecture {
                name: name.to_owned(),
            }
            .into());
        }
    };
    let keys = Keys { metadata, name };
    keys.refuse_other_shapes()?;

    let hidden = keys.require_u32("embedding_length")?;
    let heads = keys.require_u32("attention.head_count")?;
    let kv_heads = keys.u32("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = match keys.u32("attention.key_length")? {
        Some(length) => length,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    let rotated = keys.u32("rope.dimension_count")?;
    if let Some(rotated) = rotated.filter(|rotated| *rotated != head_dim) {
        return Err(keys.unsupported("rope.dimension_count", rotated));
    }
    if let Some(length) = keys
        .u32("attention.value_length")?
        .filter(|length| *length != head_dim)
    {
        return Err(keys.unsupported("attention.value_length", length));
    }

    let tokens = Metadata::require(
        "tokenizer.ggml.tokens",
        metadata.strings("tokenizer.ggml.tokens")?,
    )?;
    let vocab = u32::try_from(tokens.len()).map_err(|_| Fault::TooMany {
        what: "tokens",
        count: tokens.len() as u64,
        limit: u64::from(u32::MAX),
    })?;
    let has = |name: &str| tensors.iter().any(|tensor| tensor.name == name);
    Ok(ModelConfig {
        family,
        hidden,
        layers: keys.require_u32("block_count")?,
        heads,
        kv_heads,
        head_dim,
        ffn: keys.require_u32("feed_forward_length")?,
        vocab,
        context: keys.require_u32("context_length")?,
        norm_eps: keys.require_f32("attention.layer_norm_rms_epsilon")?,
        rope_theta: keys.f32("rope.freq_base")?.unwrap_or(10_000.0),
        rope_scaling: keys.rope_scaling()?,
        rope_layout,
        sliding_window: keys.u32("attention.sliding_window")?.filter(|n| *n != 0),
        tied_embeddings: !has("output.weight"),
        qkv_bias: has("blk.0.attn_q.bias"),
        bos: super::vocabulary::special_id(metadata, "bos")?,
        eos: super::vocabulary::end_ids(metadata)?,
        // The tokenizer is the authority: see `tokenizer::check`.
        add_bos: false,
    })
}

/// The keys under the architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    name: &'a str,
}

impl Keys<'_> {
    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    fn u32(&self, suffix: &str) -> Result<Option<u32>, Problem> {
        self.metadata.u32(&self.key(suffix))
    }

    fn f32(&self, suffix: &str) -> Result<Option<f32>, Problem> {
        self.metadata.f32(&self.key(suffix))
    }

    fn require_u32(&self, suffix: &str) -> Result<u32, Problem> {
        Metadata::require(&self.key(suffix), self.u32(suffix)?)
    }

    fn require_f32(&self, suffix: &str) -> Result<f32, Problem> {
        Metadata::require(&self.key(suffix), self.f32(suffix)?)
    }

    fn unsupported(&self, suffix: &str, value: impl ToString) -> Problem {
        Unsupported::Setting {
            key: self.key(suffix),
            value: value.to_string(),
        }
        .into()
    }

    /// Mixtures of experts and scaled residuals share the names of plain Llama.
    fn refuse_other_shapes(&self) -> Result<(), Problem> {
        if let Some(experts) = self.u32("expert_count")?.filter(|n| *n != 0) {
            return Err(self.unsupported("expert_count", experts));
        }
        for suffix in [
            "residual_scale",
            "embedding_scale",
            "logit_scale",
            "attention.scale",
            "attention.clamp_kqv",
        ] {
            let neutral = if suffix == "attention.clamp_kqv" || suffix == "attention.scale" {
                0.0
            } else {
                1.0
            };
            if let Some(scale) = self.f32(suffix)?.filter(|scale| *scale != neutral) {
                return Err(self.unsupported(suffix, scale));
            }
        }
        Ok(())
    }

    fn rope_scaling(&self) -> Result<RopeScaling, Problem> {
        let kind = self.metadata.str(&self.key("rope.scaling.type"))?;
        // Before there was a type there was only a linear factor.
        let factor = match self.f32("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.f32("rope.scale_linear")?,
        };
        match kind {
            Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: Metadata::require(&self.key("rope.scaling.factor"), factor)?,
            }),
            None => Ok(match factor {
                None | Some(0.0 | 1.0) => RopeScaling::None,
                Some(factor) => RopeScaling::Linear { factor },
            }),
            Some(other) => Err(self.unsupported("rope.scaling.type", format!("{other:?}"))),
        }
    }
}
