//! What a configuration implies: which tensors there must be, of which shape, and which numbers are possible.

use std::collections::HashMap;

use casemate_container::{ManifestError, ModelConfig, SourceTensor};

use crate::error::{Fault, Missing, Problem, Unsupported};

/// A configuration with the tensors it was read with, under their canonical names.
pub(crate) struct Named {
    pub(crate) config: ModelConfig,
    pub(crate) tensors: Vec<SourceTensor>,
}

/// Holds the tensors against the configuration: none missing, none unknown, each of the right shape.
pub(crate) fn check(config: &ModelConfig, tensors: &[SourceTensor]) -> Result<(), Problem> {
    check_numbers(config)?;
    let mut expected: HashMap<String, Expected> = expected(config).into_iter().collect();
    for tensor in tensors {
        let Some(found) = expected.remove(&tensor.name) else {
            return Err(Unsupported::UnknownTensor {
                tensor: tensor.name.clone(),
            }
            .into());
        };
        if tensor.shape != found.shape {
            return Err(Fault::WrongShape {
                tensor: tensor.name.clone(),
                found: tensor.shape.clone(),
                expected: found.shape,
            }
            .into());
        }
    }
    let missing = expected
        .into_iter()
        .filter(|(_, expected)| expected.required)
        .min_by_key(|(_, expected)| expected.order);
    match missing {
        None => Ok(()),
        Some((tensor, _)) => Err(Missing::Tensor { tensor }.into()),
    }
}

struct Expected {
    shape: Vec<u64>,
    required: bool,
    order: usize,
}

/// The tensors of the architecture by canonical name.
fn expected(config: &ModelConfig) -> Vec<(String, Expected)> {
    let hidden = u64::from(config.hidden);
    let vocab = u64::from(config.vocab);
    let ffn = u64::from(config.ffn);
    let queries = u64::from(config.heads) * u64::from(config.head_dim);
    let keys = u64::from(config.kv_heads) * u64::from(config.head_dim);

    let mut list = Vec::new();
    let mut add = |name: String, shape: &[u64], required: bool| {
        let order = list.len();
        list.push((
            name,
            Expected {
                shape: shape.to_vec(),
                required,
                order,
            },
        ));
    };
    add("token_embd.weight".to_owned(), &[vocab, hidden], true);
    for layer in 0..config.layers {
        let mut layer_tensor =
            |name: &str, shape: &[u64]| add(format!("blk.{layer}.{name}"), shape, true);
        layer_tensor("attn_norm.weight", &[hidden]);
        layer_tensor("attn_q.weight", &[queries, hidden]);
        layer_tensor("attn_k.weight", &[keys, hidden]);
        layer_tensor("attn_v.weight", &[keys, hidden]);
        if config.qkv_bias {
            layer_tensor("attn_q.bias", &[queries]);
            layer_tensor("attn_k.bias", &[keys]);
            layer_tensor("attn_v.bias", &[keys]);
        }
        layer_tensor("attn_output.weight", &[hidden, queries]);
        layer_tensor("ffn_norm.weight", &[hidden]);
        layer_tensor("ffn_gate.weight", &[ffn, hidden]);
        layer_tensor("ffn_up.weight", &[ffn, hidden]);
        layer_tensor("ffn_down.weight", &[hidden, ffn]);
    }
    add("output_norm.weight".to_owned(), &[hidden], true);
    if !config.tied_embeddings {
        add("output.weight".to_owned(), &[vocab, hidden], true);
    }
    // Llama 3's factors per rotary frequency, where the converter stored them.
    let frequencies = u64::from(config.head_dim / 2);
    add("rope_freqs.weight".to_owned(), &[frequencies], false);
    list
}

/// Refuses numbers that no model has, before anything is sized by them.
fn check_numbers(config: &ModelConfig) -> Result<(), Problem> {
    config.check().map_err(|e| {
        let field = match e {
            ManifestError::Config { field } => field,
            _ => "configuration",
        };
        Fault::Configuration { field }.into()
    })
}
