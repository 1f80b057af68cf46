//! What tests of several rooms begin with.

use casemate_container::{Family, ModelConfig, RopeLayout, RopeScaling};

/// A configuration of two layers, 8 wide, that no test changes where it does not matter.
pub(crate) fn small_config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden: 8,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        ffn: 8,
        vocab: 8,
        context: 1000,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        rope_layout: RopeLayout::Half,
        sliding_window: None,
        tied_embeddings: true,
        qkv_bias: false,
        bos: None,
        eos: vec![],
        add_bos: false,
    }
}
