//! Which tensors a configuration implies, and whether a container has them.

use casemate_container::{Model as Container, ModelConfig, RopeScaling};

use crate::error::LoadError;

pub(super) const EMBEDDING: &str = "token_embd.weight";
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The tensors that a configuration implies, with their shapes.
fn expected_tensors(c: &ModelConfig) -> Vec<(String, Vec<u64>)> {
    let [hidden, ffn, vocab, head_dim] = [c.hidden, c.ffn, c.vocab, c.head_dim].map(u64::from);
    let (q, kv) = (
        u64::from(c.heads) * head_dim,
        u64::from(c.kv_heads) * head_dim,
    );
    let mut expected = vec![
        (EMBEDDING.to_owned(), vec![vocab, hidden]),
        ("output_norm.weight".to_owned(), vec![hidden]),
    ];
    if !c.tied_embeddings {
        expected.push((OUTPUT.to_owned(), vec![vocab, hidden]));
    }
    for layer in 0..c.layers {
        let mut add = |name: &str, shape: &[u64]| {
            expected.push((format!("blk.{layer}.{name}"), shape.to_vec()))
        };
        add("attn_norm.weight", &[hidden]);
        add("attn_q.weight", &[q, hidden]);
        add("attn_k.weight", &[kv, hidden]);
        add("attn_v.weight", &[kv, hidden]);
        if c.qkv_bias {
            add("attn_q.bias", &[q]);
            add("attn_k.bias", &[kv]);
            add("attn_v.bias", &[kv]);
        }
        add("attn_output.weight", &[hidden, q]);
        add("ffn_norm.weight", &[hidden]);
        add("ffn_gate.weight", &[ffn, hidden]);
        add("ffn_up.weight", &[ffn, hidden]);
        add("ffn_down.weight", &[hidden, ffn]);
    }
    expected
}

/// Compares the container's tensor table with what the configuration implies. `rope_freqs.weight`
/// may be there or not.
pub(super) fn check_tensors(container: &Container, c: &ModelConfig) -> Result<(), LoadError> {
    let mut expected = expected_tensors(c);
    if container.tensor(ROPE_FACTORS).is_some() {
        // Both state the same thing; which of them the model was trained with is not for us to
        // guess.
        if matches!(c.rope_scaling, RopeScaling::Llama3 { .. }) {
            return Err(LoadError::UnknownTensor {
                name: ROPE_FACTORS.to_owned(),
            });
        }
        expected.push((ROPE_FACTORS.to_owned(), vec![u64::from(c.head_dim) / 2]));
    }
    for (name, shape) in &expected {
        let tensor = container
            .tensor(name)
            .ok_or_else(|| LoadError::MissingTensor { name: name.clone() })?;
        let entry = tensor.entry;
        if entry.shape != *shape {
            let (found, expected) = (entry.shape.clone(), shape.clone());
            return Err(LoadError::Shape {
                name: name.clone(),
                found,
                expected,
            });
        }
        let bytes = tensor.bytes.len() as u64;
        if entry.dtype.bytes_for(shape) != Some(bytes) {
            return Err(LoadError::Size {
                name: name.clone(),
                shape: shape.clone(),
                dtype: entry.dtype,
                bytes,
            });
        }
    }
    let names: std::collections::HashSet<&str> =
        expected.iter().map(|(name, _)| name.as_str()).collect();
    match container
        .manifest()
        .tensors()
        .iter()
        .find(|entry| !names.contains(entry.name.as_str()))
    {
        Some(entry) => Err(LoadError::UnknownTensor {
            name: entry.name.clone(),
        }),
        None => Ok(()),
    }
}
