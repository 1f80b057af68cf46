//! Low-rank adapters (LoRA): what an adapter's manifest says, how its tensors are called, and whether they fit a base.
//!
//! An adapter changes some products `y = W x` of its base to `y = W x + scale · B (A x)`, where A has few rows (the rank).
//! A and B are the tensors `blk.N.TARGET.weight.lora_a` (rank × inputs) and `….lora_b` (outputs × rank).

use std::fmt;

use minicbor::{Decode, Encode};

use crate::config::{ModelConfig, RopeLayout, f32_bits};
use crate::digest::ModelDigest;
use crate::dtype::DType;
use crate::manifest::ManifestError;

/// Largest rank. Published adapters have 4 to 256.
pub const MAX_RANK: u32 = 1024;

/// What an adapter is, besides its tensors.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct AdapterConfig {
    /// The one model that it may be applied to.
    #[n(0)]
    pub base: ModelDigest,
    /// Rows of every A, columns of every B.
    #[n(1)]
    pub rank: u32,
    /// Numerator of the scale, > 0.
    #[cbor(n(2), with = "f32_bits")]
    pub alpha: f32,
    /// The scale is alpha / √rank and not alpha / rank.
    #[n(3)]
    pub rank_stabilised: bool,
    /// In which order the rows of Q's and K's B are. Where the base has another, whoever loads the adapter reorders them.
    #[n(4)]
    pub rope_layout: RopeLayout,
}

impl AdapterConfig {
    /// What products of the adapter are multiplied by.
    #[must_use]
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        match self.rank_stabilised {
            true => self.alpha / rank.sqrt(),
            false => self.alpha / rank,
        }
    }

    /// Refuses values with which no adapter can be applied.
    ///
    /// # Errors
    /// [`ManifestError::Adapter`] naming the field.
    pub fn check(&self) -> Result<(), ManifestError> {
        let refuse = |field| Err(ManifestError::Adapter { field });
        if !(1..=MAX_RANK).contains(&self.rank) {
            return refuse("rank");
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return refuse("alpha");
        }
        Ok(())
    }
}

/// A product that an adapter can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// `attn_q`.
    Query,
    /// `attn_k`.
    Key,
    /// `attn_v`.
    Value,
    /// `attn_output`.
    AttentionOutput,
    /// `ffn_gate`.
    Gate,
    /// `ffn_up`.
    Up,
    /// `ffn_down`.
    Down,
}

impl Target {
    /// All of them, in the order in which they are stacked.
    pub const ALL: [Target; 7] = [
        Target::Query,
        Target::Key,
        Target::Value,
        Target::AttentionOutput,
        Target::Gate,
        Target::Up,
        Target::Down,
    ];

    /// The canonical name of its weight behind `blk.N.`, without `.weight`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Target::Query => "attn_q",
            Target::Key => "attn_k",
            Target::Value => "attn_v",
            Target::AttentionOutput => "attn_output",
            Target::Gate => "ffn_gate",
            Target::Up => "ffn_up",
            Target::Down => "ffn_down",
        }
    }

    /// Outputs and inputs of the product in a model.
    #[must_use]
    pub fn shape(self, base: &ModelConfig) -> (u64, u64) {
        let [hidden, ffn, head_dim] = [base.hidden, base.ffn, base.head_dim].map(u64::from);
        let q = u64::from(base.heads) * head_dim;
        let kv = u64::from(base.kv_heads) * head_dim;
        match self {
            Target::Query => (q, hidden),
            Target::Key | Target::Value => (kv, hidden),
            Target::AttentionOutput => (hidden, q),
            Target::Gate | Target::Up => (ffn, hidden),
            Target::Down => (hidden, ffn),
        }
    }
}

/// One of the two factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Factor {
    /// rank × inputs.
    A,
    /// outputs × rank.
    B,
}

/// Which factor of which product a tensor of an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterTensor {
    /// Number of the block.
    pub layer: u32,
    /// The product.
    pub target: Target,
    /// The factor.
    pub factor: Factor,
}

impl fmt::Display for AdapterTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let factor = match self.factor {
            Factor::A => 'a',
            Factor::B => 'b',
        };
        let target = self.target.name();
        write!(f, "blk.{}.{target}.weight.lora_{factor}", self.layer)
    }
}

impl AdapterTensor {
    /// The tensor of a canonical name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (target, factor) = rest.split_once(".weight.lora_")?;
        let tensor = AdapterTensor {
            layer: layer.parse().ok()?,
            target: Target::ALL.into_iter().find(|t| t.name() == target)?,
            factor: match factor {
                "a" => Factor::A,
                "b" => Factor::B,
                _ => return None,
            },
        };
        // The number's only spelling.
        (tensor.to_string() == name).then_some(tensor)
    }
}

/// Why tensors are not those of an adapter, or not of one for this base.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterMismatch {
    /// It has none.
    #[error("the adapter has no tensors")]
    Empty,
    /// A tensor of another name.
    #[error(
        "`{name}` is no factor of a product that can be adapted: blk.N.TARGET.weight.lora_a or .lora_b with TARGET one of \
         attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down"
    )]
    Name {
        /// Its name.
        name: String,
    },
    /// One factor without the other.
    #[error("`{present}` is there without `{missing}`")]
    Unpaired {
        /// The factor that is there.
        present: String,
        /// The one that is not.
        missing: String,
    },
    /// A factor in an encoding that is not taken.
    #[error("`{name}` is in {dtype}; factors are in F32, F16 or BF16")]
    Encoding {
        /// Its name.
        name: String,
        /// Its encoding.
        dtype: DType,
    },
    /// Not rank × inputs, or not outputs × rank.
    #[error("`{name}` has the shape {found:?}, which is not of rank {rank}")]
    Rank {
        /// Its name.
        name: String,
        /// Its shape.
        found: Vec<u64>,
        /// What the adapter states.
        rank: u32,
    },
    /// A block that the base does not have.
    #[error("`{name}` is for a block that the base does not have: it has {layers}")]
    Layer {
        /// Its name.
        name: String,
        /// Blocks of the base.
        layers: u32,
    },
    /// Not the shape that the base's product needs.
    #[error("`{name}` has the shape {found:?}, but the base needs {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Its shape.
        found: Vec<u64>,
        /// What the base needs.
        expected: [u64; 2],
    },
}

impl AdapterConfig {
    /// Checks the tensors of an adapter, given as name, encoding and shape: names, pairs, encodings, rank; and, where the
    /// base is known, that it has these products in these shapes.
    ///
    /// # Errors
    /// [`AdapterMismatch`]: the first tensor at fault, by its name.
    pub fn check_tensors<'t>(
        &self,
        tensors: impl Iterator<Item = (&'t str, DType, &'t [u64])>,
        base: Option<&ModelConfig>,
    ) -> Result<(), AdapterMismatch> {
        let mut known = std::collections::BTreeMap::new();
        for (name, dtype, shape) in tensors {
            let owned = || name.to_owned();
            let Some(tensor) = AdapterTensor::parse(name) else {
                return Err(AdapterMismatch::Name { name: owned() });
            };
            known.insert(tensor, ());
            if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
                return Err(AdapterMismatch::Encoding {
                    name: owned(),
                    dtype,
                });
            }
            let rank = u64::from(self.rank);
            let of_rank = match (tensor.factor, shape) {
                (Factor::A, [rows, _]) => *rows == rank,
                (Factor::B, [_, columns]) => *columns == rank,
                _ => false,
            };
            if !of_rank {
                return Err(AdapterMismatch::Rank {
                    name: owned(),
                    found: shape.to_vec(),
                    rank: self.rank,
                });
            }
            let Some(base) = base else { continue };
            if tensor.layer >= base.layers {
                return Err(AdapterMismatch::Layer {
                    name: owned(),
                    layers: base.layers,
                });
            }
            let (outputs, inputs) = tensor.target.shape(base);
            let expected = match tensor.factor {
                Factor::A => [rank, inputs],
                Factor::B => [outputs, rank],
            };
            if *shape != expected {
                return Err(AdapterMismatch::Shape {
                    name: owned(),
                    found: shape.to_vec(),
                    expected,
                });
            }
        }
        if known.is_empty() {
            return Err(AdapterMismatch::Empty);
        }
        for tensor in known.keys() {
            let other = AdapterTensor {
                factor: match tensor.factor {
                    Factor::A => Factor::B,
                    Factor::B => Factor::A,
                },
                ..*tensor
            };
            if !known.contains_key(&other) {
                return Err(AdapterMismatch::Unpaired {
                    present: tensor.to_string(),
                    missing: other.to_string(),
                });
            }
        }
        Ok(())
    }
}

/// Where a row of Q or K in one layout lies in the other: for each row of a head as `to` has it, the row as `from` has it.
#[must_use]
pub fn reordered_row(from: RopeLayout, to: RopeLayout, head_dim: usize, row: usize) -> usize {
    let (head, row) = (row / head_dim * head_dim, row % head_dim);
    let half = head_dim / 2;
    head + match (from, to) {
        (RopeLayout::Half, RopeLayout::Interleaved) => row % 2 * half + row / 2,
        (RopeLayout::Interleaved, RopeLayout::Half) => row % half * 2 + row / half,
        _ => row,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Family, RopeScaling};

    fn base() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: 8,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            ffn: 12,
            vocab: 16,
            context: 16,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
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

    fn adapter() -> AdapterConfig {
        AdapterConfig {
            base: ModelDigest([1; 32]),
            rank: 2,
            alpha: 4.0,
            rank_stabilised: false,
            rope_layout: RopeLayout::Half,
        }
    }

    fn whole() -> Vec<Fields> {
        let mut all = Vec::new();
        for layer in 0..2 {
            for target in Target::ALL {
                let (outputs, inputs) = target.shape(&base());
                for (factor, shape) in [(Factor::A, [2, inputs]), (Factor::B, [outputs, 2])] {
                    let tensor = AdapterTensor {
                        layer,
                        target,
                        factor,
                    };
                    all.push((tensor.to_string(), DType::F16, shape.to_vec()));
                }
            }
        }
        all
    }

    /// Name, encoding and shape.
    type Fields = (String, DType, Vec<u64>);
    type Change = fn(&mut Vec<Fields>);

    fn check(change: impl FnOnce(&mut Vec<Fields>)) -> Result<(), AdapterMismatch> {
        let mut tensors = whole();
        change(&mut tensors);
        let tensors = tensors.iter().map(|(n, d, s)| (n.as_str(), *d, &s[..]));
        adapter().check_tensors(tensors, Some(&base()))
    }

    #[test]
    fn an_adapter_of_every_product_fits_its_base() {
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(check(|t| t.truncate(2)), Ok(()));
    }

    #[test]
    fn tensors_of_another_base_or_rank_are_refused_by_name() {
        let text = |change: Change| check(change).unwrap_err().to_string();
        for (change, words) in [
            ((|t| t.clear()) as Change, vec!["no tensors"]),
            (
                |t| t[0].0 = "blk.0.attn_norm.weight.lora_a".into(),
                vec!["attn_norm", "no factor"],
            ),
            (
                |t| t[0].0 = "blk.00.attn_q.weight.lora_a".into(),
                vec!["blk.00."],
            ),
            (
                |t| drop(t.remove(1)),
                vec!["attn_q.weight.lora_a` is there without", "lora_b"],
            ),
            (
                |t| t[3].1 = DType::Q8_0,
                vec!["attn_k.weight.lora_b", "Q8_0"],
            ),
            (|t| t[0].2 = vec![3, 8], vec!["attn_q", "[3, 8]", "rank 2"]),
            (|t| t[1].2 = vec![8, 3], vec!["attn_q", "[8, 3]", "rank 2"]),
            (|t| t[1].2 = vec![8, 2, 1], vec!["[8, 2, 1]"]),
            (
                |t| t[2].0 = "blk.2.attn_k.weight.lora_a".into(),
                vec!["blk.2.", "it has 2"],
            ),
            (
                |t| t[3].2 = vec![8, 2],
                vec!["attn_k.weight.lora_b", "[8, 2]", "[4, 2]"],
            ),
            (
                |t| t[12].2 = vec![2, 8],
                vec!["ffn_down.weight.lora_a", "[2, 8]", "[2, 12]"],
            ),
        ] {
            let said = text(change);
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
        }
    }

    #[test]
    fn names_have_one_form() {
        for (name, _, _) in whole() {
            assert_eq!(AdapterTensor::parse(&name).unwrap().to_string(), name);
        }
        for name in [
            "blk.0.attn_q.weight",
            "blk.0.attn_q.weight.lora_c",
            "blk.+1.attn_q.weight.lora_a",
            "token_embd.weight.lora_a",
        ] {
            assert_eq!(AdapterTensor::parse(name), None, "{name}");
        }
    }

    #[test]
    fn the_scale_is_by_the_rank_or_by_its_root() {
        assert_eq!(adapter().scale(), 2.0);
        let rank_stabilised = AdapterConfig {
            rank: 16,
            rank_stabilised: true,
            ..adapter()
        };
        assert_eq!(rank_stabilised.scale(), 1.0);
    }

    /// By the definition of the conversion that interleaved weights come from: reshape a head to 2 × half, swap the axes.
    #[test]
    fn rows_are_reordered_as_conversion_does() {
        let (half, interleaved) = (RopeLayout::Half, RopeLayout::Interleaved);
        let order = |from, to| (0..8).map(move |row| reordered_row(from, to, 4, row));
        assert!(order(half, interleaved).eq([0, 2, 1, 3, 4, 6, 5, 7]));
        let six = (0..6).map(|row| reordered_row(half, interleaved, 6, row));
        assert!(six.eq([0, 3, 1, 4, 2, 5]));
        for row in 0..12 {
            let there = reordered_row(half, interleaved, 6, row);
            let places: Vec<usize> = (0..12)
                .map(|r| reordered_row(interleaved, half, 6, r))
                .collect();
            assert_eq!(places[there], row);
            assert_eq!(reordered_row(half, half, 6, row), row);
        }
    }
}
