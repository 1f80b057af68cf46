//! Which matrices go to a worker, which stay, and why: one decision, made the same way by the enclave
//! when it loads a model and by whoever wants to know beforehand.
//!
//! | preset | goes to the worker, where public |
//! |---|---|
//! | `none` | nothing |
//! | `secureinfer` | the attention output projection and the output head |
//! | `full-linear` | every matrix product |
//!
//! `secureinfer` follows the abstract of the paper of that name: "non-linear layers, projection of
//! attention heads, FFN transformations, and LoRA adapters" stay inside. Read literally, that leaves two
//! kinds of products. Whoever takes "FFN transformations" for the activation function alone would also
//! send gate, up and down; that is `full-linear` without Q, K and V, and no preset.

use std::fmt;
use std::str::FromStr;

use casemate_container::{Access, TensorEntry};
use casemate_field::Field;

/// What goes outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Nothing.
    #[default]
    None,
    /// What its abstract leaves outside.
    SecureInfer,
    /// All products of public matrices.
    FullLinear,
}

/// It is no preset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a preset is `none`, `secureinfer` or `full-linear`")]
pub struct NoPreset;

impl FromStr for Preset {
    type Err = NoPreset;

    fn from_str(name: &str) -> Result<Preset, NoPreset> {
        match name {
            "none" => Ok(Preset::None),
            "secureinfer" => Ok(Preset::SecureInfer),
            "full-linear" => Ok(Preset::FullLinear),
            _ => Err(NoPreset),
        }
    }
}

/// Matrices that share their input and are multiplied together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Q, K and V.
    Qkv,
    /// Of attention's heads to the residual stream.
    AttentionOutput,
    /// Gate and up.
    GateUp,
    /// Back from the feed-forward layer.
    Down,
    /// To logits.
    Head,
}

/// Where a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// In the enclave.
    Inside,
    /// By a worker, on masked rows.
    Worker,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// The preset sends it, and the manifest says that it is public.
    Sent,
    /// The manifest does not mark it public.
    NotPublic,
    /// It is public, but is multiplied together with one that is not.
    AmongPrivate,
    /// The preset keeps it.
    Kept,
    /// Its rows are too wide for exact products outside.
    TooWide,
    /// It is no matrix of a product: a norm, a bias, a table that is looked up.
    NoProduct,
}

impl Why {
    /// Where what is decided so is computed.
    #[must_use]
    pub fn place(self) -> Place {
        match self {
            Why::Sent => Place::Worker,
            _ => Place::Inside,
        }
    }
}

/// The decision about a stack of matrices: its kind, the access of all of it together, and the width of
/// its input.
#[must_use]
pub fn decide(preset: Preset, kind: Kind, access: Access, columns: u64) -> Why {
    let sent = match (preset, kind) {
        (Preset::None, _) => false,
        (Preset::SecureInfer, Kind::AttentionOutput | Kind::Head) => true,
        (Preset::SecureInfer, Kind::Qkv | Kind::GateUp | Kind::Down) => false,
        (Preset::FullLinear, _) => true,
    };
    let exact = usize::try_from(columns).ok().and_then(Field::for_width);
    match (sent, access, exact) {
        (false, ..) => Why::Kept,
        (true, Access::Private, _) => Why::NotPublic,
        (true, Access::Public, None) => Why::TooWide,
        (true, Access::Public, Some(_)) => Why::Sent,
    }
}

/// A tensor of a model, as its manifest has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Canonical name, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// Outermost first: rows (outputs), columns (inputs).
    pub shape: Vec<u64>,
    /// Who may see it.
    pub access: Access,
}

impl From<&TensorEntry> for Tensor {
    fn from(entry: &TensorEntry) -> Tensor {
        Tensor {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            access: entry.access,
        }
    }
}

/// Where a tensor's product is computed, and what that means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its name.
    pub tensor: String,
    /// Where.
    pub place: Place,
    /// Why.
    pub why: Why,
    /// Bytes that are sent to the worker once, in int8; inside, the bytes that it has there in that
    /// form.
    pub bytes: u64,
    /// Multiply-adds, counted twice, for each token.
    pub operations: u64,
    /// What whoever sees all that the worker sees has of it.
    pub seen_by_worker: Seen,
}

/// What whoever sees all that the worker sees has of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// Nothing.
    Nothing,
    /// Its weights, which are public, how many rows are multiplied by it and when; of the rows
    /// themselves nothing.
    PublicWeights,
}

/// Where each tensor of a model goes, in the order in which they were given.
#[must_use]
pub fn plan(preset: Preset, tensors: &[Tensor]) -> Vec<Placement> {
    // Tied embeddings are the head, too.
    let tied = !tensors.iter().any(|tensor| tensor.name == OUTPUT);
    let placement = |tensor: &Tensor| {
        let stack = stack_of(&tensor.name, tied);
        let why = match (stack, tensor.shape[..].as_array::<2>()) {
            (Some((layer, kind)), Some([_, columns])) => {
                let same = |other: &&Tensor| stack_of(&other.name, tied) == Some((layer, kind));
                let all = tensors.iter().filter(same).map(|other| other.access);
                decide_one(preset, kind, tensor.access, all, *columns)
            }
            _ => Why::NoProduct,
        };
        let elements = tensor
            .shape
            .iter()
            .fold(1u64, |all, n| all.saturating_mul(*n));
        Placement {
            tensor: tensor.name.clone(),
            place: why.place(),
            why,
            bytes: elements,
            operations: match why {
                Why::NoProduct => 0,
                _ => elements.saturating_mul(2),
            },
            seen_by_worker: match why.place() {
                Place::Inside => Seen::Nothing,
                Place::Worker => Seen::PublicWeights,
            },
        }
    };
    tensors.iter().map(placement).collect()
}

/// A stack is public only if all of it is.
fn decide_one(
    preset: Preset,
    kind: Kind,
    own: Access,
    mut all: impl Iterator<Item = Access>,
    columns: u64,
) -> Why {
    let together = match all.all(|access| access == Access::Public) {
        true => Access::Public,
        false => Access::Private,
    };
    match decide(preset, kind, together, columns) {
        Why::NotPublic if own == Access::Public => Why::AmongPrivate,
        why => why,
    }
}

const OUTPUT: &str = "output.weight";
const EMBEDDING: &str = "token_embd.weight";

/// The block and stack that a tensor belongs to.
fn stack_of(name: &str, tied: bool) -> Option<(Option<u32>, Kind)> {
    if name == OUTPUT || (tied && name == EMBEDDING) {
        return Some((None, Kind::Head));
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let kind = match rest {
        "attn_q.weight" | "attn_k.weight" | "attn_v.weight" => Kind::Qkv,
        "attn_output.weight" => Kind::AttentionOutput,
        "ffn_gate.weight" | "ffn_up.weight" => Kind::GateUp,
        "ffn_down.weight" => Kind::Down,
        _ => return None,
    };
    Some((Some(layer.parse().ok()?), kind))
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Preset::None => "none",
            Preset::SecureInfer => "secureinfer",
            Preset::FullLinear => "full-linear",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Inside => "enclave",
            Place::Worker => "worker",
        })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Why::Sent => "public, and the preset sends it",
            Why::NotPublic => "the manifest does not mark it public",
            Why::AmongPrivate => "multiplied together with a tensor that is not public",
            Why::Kept => "the preset keeps it",
            Why::TooWide => "too wide for exact products outside",
            Why::NoProduct => "no matrix product",
        })
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Seen::Nothing => "nothing",
            Seen::PublicWeights => {
                "its weights, how many rows and when; rows and products only as uniform numbers"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[u64], access: Access) -> Tensor {
        Tensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            access,
        }
    }

    /// A model of one block.
    fn model(access: Access) -> Vec<Tensor> {
        let shapes: [(&str, &[u64]); 12] = [
            ("token_embd.weight", &[100, 8]),
            ("blk.0.attn_norm.weight", &[8]),
            ("blk.0.attn_q.weight", &[8, 8]),
            ("blk.0.attn_k.weight", &[4, 8]),
            ("blk.0.attn_v.weight", &[4, 8]),
            ("blk.0.attn_q.bias", &[8]),
            ("blk.0.attn_output.weight", &[8, 8]),
            ("blk.0.ffn_gate.weight", &[20, 8]),
            ("blk.0.ffn_up.weight", &[20, 8]),
            ("blk.0.ffn_down.weight", &[8, 20]),
            ("output_norm.weight", &[8]),
            ("output.weight", &[100, 8]),
        ];
        shapes
            .map(|(name, shape)| tensor(name, shape, access))
            .into()
    }

    fn sent(preset: Preset, tensors: &[Tensor]) -> Vec<String> {
        let plan = plan(preset, tensors);
        assert_eq!(plan.len(), tensors.len());
        for placement in &plan {
            let seen = match placement.place {
                Place::Inside => Seen::Nothing,
                Place::Worker => Seen::PublicWeights,
            };
            assert_eq!(placement.seen_by_worker, seen);
        }
        let sent = plan.into_iter().filter(|one| one.place == Place::Worker);
        sent.map(|one| one.tensor).collect()
    }

    #[test]
    fn presets_send_what_they_say() {
        let model = model(Access::Public);
        assert!(sent(Preset::None, &model).is_empty());
        assert_eq!(
            sent(Preset::SecureInfer, &model),
            ["blk.0.attn_output.weight", "output.weight"]
        );
        let all = sent(Preset::FullLinear, &model);
        assert_eq!(all.len(), 8);
        assert!(
            !all.iter()
                .any(|name| name.contains("norm") || name.contains("bias"))
        );
        assert!(
            !all.contains(&EMBEDDING.to_owned()),
            "looked up, not multiplied"
        );
        for preset in [Preset::None, Preset::SecureInfer, Preset::FullLinear] {
            assert_eq!(preset.to_string().parse(), Ok(preset));
        }
        assert_eq!("full".parse::<Preset>(), Err(NoPreset));
    }

    #[test]
    fn no_plan_sends_a_tensor_that_is_not_public_or_is_among_such() {
        for preset in [Preset::None, Preset::SecureInfer, Preset::FullLinear] {
            assert!(sent(preset, &model(Access::Private)).is_empty());
        }
        for private in 0..model(Access::Public).len() {
            let mut model = model(Access::Public);
            model[private].access = Access::Private;
            let plan = plan(Preset::FullLinear, &model);
            for (tensor, placement) in model.iter().zip(&plan) {
                assert!(placement.place == Place::Inside || tensor.access == Access::Public);
            }
            let inside: Vec<_> = plan
                .iter()
                .filter(|one| one.why == Why::AmongPrivate)
                .map(|one| one.tensor.as_str())
                .collect();
            match model[private].name.as_str() {
                "blk.0.attn_k.weight" => {
                    assert_eq!(inside, ["blk.0.attn_q.weight", "blk.0.attn_v.weight"]);
                }
                "blk.0.ffn_up.weight" => assert_eq!(inside, ["blk.0.ffn_gate.weight"]),
                "output.weight" => assert!(inside.is_empty()),
                _ => {}
            }
        }
    }

    #[test]
    fn tied_embeddings_are_the_head() {
        let mut model = model(Access::Public);
        model.pop();
        assert!(sent(Preset::SecureInfer, &model).contains(&EMBEDDING.to_owned()));
    }

    #[test]
    fn what_no_field_can_hold_stays() {
        let why = |columns| decide(Preset::FullLinear, Kind::Down, Access::Public, columns);
        assert_eq!(why(66_572), Why::Sent);
        assert_eq!(why(66_573), Why::TooWide);
        assert_eq!(why(0), Why::TooWide);
        assert_eq!(why(u64::MAX), Why::TooWide);
    }

    #[test]
    fn bytes_and_operations_are_those_of_a_token() {
        let plan = plan(Preset::FullLinear, &model(Access::Public));
        let down = plan
            .iter()
            .find(|one| one.tensor == "blk.0.ffn_down.weight")
            .unwrap();
        assert_eq!((down.bytes, down.operations), (160, 320));
        let norm = plan
            .iter()
            .find(|one| one.tensor == "output_norm.weight")
            .unwrap();
        assert_eq!((norm.operations, norm.why), (0, Why::NoProduct));
    }
}
