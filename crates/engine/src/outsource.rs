//! Where products may be computed by somebody else. The engine knows only this: a layer in int8 by
//! rows can be replaced by whatever gives the same bits, and there may be work to do while nobody
//! asks for tokens. Who computes, and how it stays secret, is the caller's.
//!
//! What makes it possible is that integers add up exactly: whoever multiplies the same integers gets the
//! same sums, and everything that is rounded (quantising, scaling) stays here.

use std::fmt;
use std::sync::Arc;

use casemate_container::{Access, Target};
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8, matmul_int8_sums, scale_sums};
use casemate_kernels::rotate::Rotation;
use casemate_kernels::team::Team;

use crate::linear::{LinearLayer, LinearScratch};

/// A group of matrices that share their input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stack {
    /// Q, K and V.
    Qkv,
    /// Of attention's heads to the residual stream.
    AttentionOutput,
    /// Gate and up.
    GateUp,
    /// Back from the feed-forward layer.
    Down,
    /// From the last norm to logits.
    Head,
}

impl Stack {
    /// Those of a block, in the order in which they are computed.
    pub(crate) const OF_A_BLOCK: [Stack; 4] = [
        Stack::Qkv,
        Stack::AttentionOutput,
        Stack::GateUp,
        Stack::Down,
    ];

    /// The products of a block that it stacks, in their order.
    pub(crate) const fn targets(self) -> &'static [Target] {
        match self {
            Stack::Qkv => &[Target::Query, Target::Key, Target::Value],
            Stack::AttentionOutput => &[Target::AttentionOutput],
            Stack::GateUp => &[Target::Gate, Target::Up],
            Stack::Down => &[Target::Down],
            Stack::Head => &[],
        }
    }
}

/// Which group of which block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The block; none for the head.
    pub layer: Option<u32>,
    /// The group.
    pub stack: Stack,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.stack {
            Stack::Qkv => "attn_qkv",
            Stack::AttentionOutput => "attn_output",
            Stack::GateUp => "ffn_gate_up",
            Stack::Down => "ffn_down",
            Stack::Head => "output",
        };
        match self.layer {
            Some(layer) => write!(f, "blk.{layer}.{name}"),
            None => f.write_str(name),
        }
    }
}

/// Weights and activations in int8, one scale a row, both rotated:
/// `y[i][j] = float(sum over k of q[i][k] * w[j][k]) * wscale[j] * xscale[i]`, of which the sum is
/// exact.
///
/// As a [`LinearLayer`] it computes everything here. A replacement goes through the parts:
/// [`ExactLayer::quantise`], sums from wherever (here: [`ExactLayer::sums`]), [`ExactLayer::finish`].
pub struct ExactLayer {
    weights: Int8Matrix,
    /// What the rows of `weights` were rotated by.
    rotation: Arc<Rotation>,
}

impl ExactLayer {
    pub(crate) fn new(weights: Int8Matrix, rotation: Arc<Rotation>) -> Self {
        Self { weights, rotation }
    }

    /// The rotated weights, `outputs` rows of `inputs`.
    #[must_use]
    pub fn weights(&self) -> &Int8Matrix {
        &self.weights
    }

    /// Rotates and quantises rows of activations into the scratch and returns them.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub fn quantise<'s>(
        &self,
        team: &Team,
        scratch: &'s mut LinearScratch,
        x: &[f32],
    ) -> &'s Int8Rows {
        let rows = &mut scratch.rows;
        rows.quantise(team, x, self.weights.columns(), Some(&self.rotation));
        rows
    }

    /// The exact sums of quantised rows, row by row.
    ///
    /// # Panics
    /// If `sums` is not `outputs` for each row, or the rows are of another width.
    pub fn sums(&self, team: &Team, rows: &Int8Rows, sums: &mut [i32]) {
        matmul_int8_sums(team, rows, &self.weights, sums);
    }

    /// What the layer makes of exact sums, wherever they come from.
    ///
    /// # Panics
    /// As [`ExactLayer::sums`], also if `y` is of another length.
    pub fn finish(&self, team: &Team, rows: &Int8Rows, sums: &[i32], y: &mut [f32]) {
        scale_sums(team, rows, &self.weights, sums, y);
    }
}

impl LinearLayer for ExactLayer {
    fn inputs(&self) -> usize {
        self.weights.columns()
    }

    fn outputs(&self) -> usize {
        self.weights.rows()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        let rows = self.quantise(team, scratch, x);
        matmul_int8(team, rows, &self.weights, y);
    }

    fn bytes(&self) -> u64 {
        self.weights.bytes() as u64
    }
}

/// Whoever may take over layers when a model is loaded in int8 by rows.
///
/// **What is promised.** The layer that is returned gives the bits of the one that came in, whatever
/// happens to whoever helps; what it returns was checked before. So nothing that the engine computes, decides
/// or says ever rests on an unchecked number.
pub trait Outsource: Send + Sync {
    /// Takes a layer over, or returns it as it is. `access` is public only if every tensor of the group
    /// is marked so in the signed manifest.
    fn layer(&self, place: Place, access: Access, layer: ExactLayer) -> Box<dyn LinearLayer>;

    /// Works for at most about 20 ms; called again and again while nobody asks for tokens, until
    /// there is nothing to do (`false`), and then every now and then.
    fn idle(&self, team: &Team) -> bool;
}
