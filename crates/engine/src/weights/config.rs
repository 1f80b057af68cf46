//! Which configurations the engine can compute.

use casemate_container::{ModelConfig, RopeScaling};
use casemate_kernels::attention::MAX_HEAD_DIM;
use casemate_kernels::panels::MAX_COLUMNS;

use super::Compute;
use crate::error::LoadError;

/// Refuses configurations that contradict themselves or exceed what the kernels can do. Every later
/// product of two dimensions fits 64 bits.
pub(crate) fn check_config(c: &ModelConfig) -> Result<(), LoadError> {
    let require = |ok: bool, field, value: &dyn std::fmt::Display, rule| {
        if ok {
            Ok(())
        } else {
            Err(LoadError::Config {
                field,
                value: value.to_string(),
                rule,
            })
        }
    };
    let dimension = |field, value: u32, most: u32, rule| {
        require((1..=most).contains(&value), field, &value, rule)
    };
    dimension("hidden", c.hidden, 1 << 20, "it must be from 1 to 1048576")?;
    dimension("layers", c.layers, 4096, "it must be from 1 to 4096")?;
    dimension("heads", c.heads, 1 << 14, "it must be from 1 to 16384")?;
    dimension(
        "kv_heads",
        c.kv_heads,
        1 << 14,
        "it must be from 1 to 16384",
    )?;
    require(
        c.heads.is_multiple_of(c.kv_heads),
        "kv_heads",
        &c.kv_heads,
        "it must divide the number of heads",
    )?;
    dimension(
        "head_dim",
        c.head_dim,
        MAX_HEAD_DIM as u32,
        "it must be from 1 to 256",
    )?;
    require(
        c.head_dim.is_multiple_of(2),
        "head_dim",
        &c.head_dim,
        "RoPE turns pairs, so it must be even",
    )?;
    dimension("ffn", c.ffn, 1 << 22, "it must be from 1 to 4194304")?;
    dimension("vocab", c.vocab, 1 << 24, "it must be from 1 to 16777216")?;
    dimension(
        "context",
        c.context,
        1 << 24,
        "it must be from 1 to 16777216",
    )?;
    let positive = |x: f32| x.is_finite() && x > 0.0;
    require(
        positive(c.norm_eps),
        "norm_eps",
        &c.norm_eps,
        "it must be positive",
    )?;
    require(
        positive(c.rope_theta),
        "rope_theta",
        &c.rope_theta,
        "it must be positive",
    )?;
    require(
        c.sliding_window != Some(0),
        "sliding_window",
        &0,
        "a token sees at least itself",
    )?;
    match c.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            require(
                positive(factor),
                "rope_scaling.factor",
                &factor,
                "it must be positive",
            )?;
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_context,
        } => {
            require(
                positive(factor),
                "rope_scaling.factor",
                &factor,
                "it must be positive",
            )?;
            require(
                positive(low),
                "rope_scaling.low_freq_factor",
                &low,
                "it must be positive",
            )?;
            let rule = "it must be larger than low_freq_factor";
            require(
                high.is_finite() && high > low,
                "rope_scaling.high_freq_factor",
                &high,
                rule,
            )?;
            dimension(
                "rope_scaling.original_context",
                original_context,
                1 << 24,
                "it must be from 1 to 16777216",
            )?;
        }
    }
    for id in c.eos.iter().chain(&c.bos) {
        require(
            *id < c.vocab,
            "bos or eos",
            id,
            "it must be a token id of the vocabulary",
        )?;
    }
    require(
        !c.add_bos || c.bos.is_some(),
        "add_bos",
        &true,
        "there must be a bos token to add",
    )
}

/// Refuses inputs of matrices that are too wide for the arithmetic.
pub(super) fn check_widths(c: &ModelConfig, compute: Compute) -> Result<(), LoadError> {
    if compute != Compute::Int8Row {
        return Ok(());
    }
    let attended = u64::from(c.heads) * u64::from(c.head_dim);
    let widths = [
        ("hidden", u64::from(c.hidden)),
        ("heads * head_dim", attended),
        ("ffn", u64::from(c.ffn)),
    ];
    match widths.iter().find(|(_, width)| *width > MAX_COLUMNS as u64) {
        Some((field, width)) => Err(LoadError::Config {
            field,
            value: width.to_string(),
            rule: "int8-row sums at most 133144 products; use another arithmetic",
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_container::{Family, RopeLayout};

    fn config() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            vocab: 300,
            context: 512,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Half,
            sliding_window: None,
            tied_embeddings: false,
            qkv_bias: false,
            bos: Some(1),
            eos: vec![2],
            add_bos: true,
        }
    }

    #[test]
    fn refuses_contradictory_configurations() {
        let llama3 =
            |factor, low_freq_factor, high_freq_factor, original_context| RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            };
        check_config(&config()).unwrap();
        check_config(&ModelConfig {
            rope_scaling: llama3(8.0, 1.0, 4.0, 8192),
            ..config()
        })
        .unwrap();
        type Change = fn(&mut ModelConfig);
        let changes: [(&str, Change); 17] = [
            ("hidden", |c| c.hidden = 0),
            ("layers", |c| c.layers = 4097),
            ("heads", |c| c.heads = 0),
            ("kv_heads", |c| c.kv_heads = 0),
            ("kv_heads", |c| c.kv_heads = 3),
            ("head_dim", |c| c.head_dim = 15),
            ("head_dim", |c| c.head_dim = 258),
            ("ffn", |c| c.ffn = 0),
            ("vocab", |c| c.vocab = 0),
            ("context", |c| c.context = 0),
            ("norm_eps", |c| c.norm_eps = f32::NAN),
            ("rope_theta", |c| c.rope_theta = 0.0),
            ("sliding_window", |c| c.sliding_window = Some(0)),
            ("rope_scaling.factor", |c| {
                c.rope_scaling = RopeScaling::Linear { factor: 0.0 }
            }),
            ("bos or eos", |c| c.eos = vec![2, 300]),
            ("bos or eos", |c| c.bos = Some(300)),
            ("add_bos", |c| c.bos = None),
        ];
        for (expected, change) in changes {
            let mut config = config();
            change(&mut config);
            match check_config(&config) {
                Err(LoadError::Config { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        for (scaling, expected) in [
            (llama3(f32::INFINITY, 1.0, 4.0, 8192), "rope_scaling.factor"),
            (llama3(8.0, 0.0, 4.0, 8192), "rope_scaling.low_freq_factor"),
            (llama3(8.0, 1.0, 1.0, 8192), "rope_scaling.high_freq_factor"),
            (llama3(8.0, 1.0, 4.0, 0), "rope_scaling.original_context"),
        ] {
            let checked = check_config(&ModelConfig {
                rope_scaling: scaling,
                ..config()
            });
            assert!(matches!(checked, Err(LoadError::Config { field, .. }) if field == expected));
        }
    }

    #[test]
    fn refuses_rows_whose_sums_could_overflow() {
        const { assert!(MAX_COLUMNS == 133_144, "the rule names the limit") };
        type Change = fn(&mut ModelConfig);
        let changes: [(&str, Change); 3] = [
            ("hidden", |c| c.hidden = 133_145),
            ("ffn", |c| c.ffn = 133_145),
            ("heads * head_dim", |c| {
                (c.heads, c.kv_heads, c.head_dim) = (1 << 14, 1 << 14, 256);
            }),
        ];
        for (expected, change) in changes {
            let mut config = config();
            change(&mut config);
            check_widths(&config, Compute::Int8).unwrap();
            match check_widths(&config, Compute::Int8Row) {
                Err(LoadError::Config { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        let config = ModelConfig {
            hidden: 133_144,
            ffn: 133_144,
            ..config()
        };
        check_widths(&config, Compute::Int8Row).unwrap();
    }
}
