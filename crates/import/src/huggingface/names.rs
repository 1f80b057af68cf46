//! Tensor names of transformers as canonical names.

use casemate_container::{ModelConfig, SourceTensor};

use super::safetensors::StoredTensor;
use crate::error::{Problem, Unsupported};

/// What stands behind `model.layers.N.`, and what it is called behind `blk.N.`.
const LAYER: [(&str, &str); 12] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
];

/// The tensor under its canonical name; `None` if it carries nothing: rotary frequencies that follow from the
/// configuration, and the copy of tied embeddings, at which transformers does not look either.
pub(super) fn canonical(
    tensor: StoredTensor,
    config: &ModelConfig,
) -> Result<Option<SourceTensor>, Problem> {
    if is_rotary_buffer(&tensor.name) || (config.tied_embeddings && tensor.name == "lm_head.weight")
    {
        return Ok(None);
    }
    let Some(name) = canonical_name(&tensor.name) else {
        return Err(Unsupported::UnknownTensor {
            tensor: tensor.name,
        }
        .into());
    };
    let dtype = tensor.dtype()?;
    Ok(Some(SourceTensor {
        name,
        dtype,
        shape: tensor.shape,
        size: tensor.size,
    }))
}

/// The canonical name of a weight or bias.
pub(super) fn canonical_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => Some("token_embd.weight".to_owned()),
        "model.norm.weight" => Some("output_norm.weight".to_owned()),
        "lm_head.weight" => Some("output.weight".to_owned()),
        _ => {
            let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let (_, canonical) = LAYER.iter().find(|(theirs, _)| *theirs == rest)?;
            // The number's only spelling, so that two names cannot become one.
            let number: u32 = layer.parse().ok()?;
            (number.to_string() == layer).then(|| format!("blk.{number}.{canonical}"))
        }
    }
}

fn is_rotary_buffer(name: &str) -> bool {
    name == "model.rotary_emb.inv_freq"
        || name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.strip_suffix(".self_attn.rotary_emb.inv_freq"))
            .is_some_and(|layer| layer.bytes().all(|byte| byte.is_ascii_digit()))
}
