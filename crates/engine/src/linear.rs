//! Linear layers behind one trait, so that what computes a product can be replaced without the
//! model knowing. Here: products by this machine's kernels, in f32, in bf16 and in int8 by groups
//! (with weights of 8 or 4 bits); those in int8 by rows, which somebody else can compute, are in
//! [`crate::outsource`].
//!
//! A layer is a *group* of weight matrices that share their input (Q, K and V; gate and up),
//! stacked by rows. One call quantises the input once; a replacement that hides inputs needs one
//! mask per row of a group for the same reason.

use std::sync::Arc;

use casemate_kernels::gemm::{F32Matrix, gemm_f32};
use casemate_kernels::panels::{Bf16Matrix, Bf16Rows, Int8Rows, matmul_bf16};
use casemate_kernels::q4::{Q4Matrix, matmul_q4_in};
use casemate_kernels::q8::{Q8Matrix, Q8Rows, matmul_q8_in};
use casemate_kernels::team::Team;

/// `y = x · Wᵀ` for some weights W. Biases are added by the model.
///
/// A row of `y` must depend on nothing but the same row of `x`: not on the other rows, their
/// number, or the size of the team. The engine's promise that a request's tokens do not depend on
/// its neighbours rests on it.
pub trait LinearLayer: Send + Sync {
    /// Elements of an input row.
    fn inputs(&self) -> usize;

    /// Elements of an output row.
    fn outputs(&self) -> usize;

    /// Computes `x.len() / inputs()` rows.
    ///
    /// # Panics
    /// If `x` or `y` is not that many rows.
    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]);

    /// Bytes of weights that one call reads.
    fn bytes(&self) -> u64;
}

/// Working memory that all layers of a model share: input rows in each form that some layer wants.
/// A form that none wants takes address space, but no memory.
pub struct LinearScratch {
    groups: Q8Rows,
    pub(crate) rows: Int8Rows,
    bf16: Bf16Rows,
}

impl LinearScratch {
    /// Room for `rows` input rows of at most `inputs` elements.
    #[must_use]
    pub fn new(rows: usize, inputs: usize) -> Self {
        Self {
            groups: Q8Rows::with_capacity(rows, inputs),
            rows: Int8Rows::with_capacity(rows, inputs),
            bf16: Bf16Rows::with_capacity(rows, inputs),
        }
    }
}

/// Weights and products in f32.
pub(crate) struct F32Linear(pub(crate) Arc<F32Matrix>);

impl LinearLayer for F32Linear {
    fn inputs(&self) -> usize {
        self.0.columns()
    }

    fn outputs(&self) -> usize {
        self.0.rows()
    }

    fn forward(&self, team: &Team, _: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        gemm_f32(team, x, &self.0, y);
    }

    fn bytes(&self) -> u64 {
        self.0.bytes() as u64
    }
}

/// Weights and activations in bf16, sums in f32.
pub(crate) struct Bf16Linear(pub(crate) Arc<Bf16Matrix>);

impl LinearLayer for Bf16Linear {
    fn inputs(&self) -> usize {
        self.0.columns()
    }

    fn outputs(&self) -> usize {
        self.0.rows()
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        scratch.bf16.round(team, x, self.0.columns());
        matmul_bf16(team, &scratch.bf16, &self.0, y);
    }

    fn bytes(&self) -> u64 {
        self.0.bytes() as u64
    }
}

/// Weights that meet activations in int8, one scale a group of 32.
pub(crate) enum GroupMatrix {
    /// In 8 bits.
    Q8(Arc<Q8Matrix>),
    /// In 4 bits.
    Q4(Arc<Q4Matrix>),
}

impl GroupMatrix {
    fn shape(&self) -> (usize, usize) {
        match self {
            GroupMatrix::Q8(matrix) => (matrix.rows(), matrix.columns()),
            GroupMatrix::Q4(matrix) => (matrix.rows(), matrix.columns()),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            GroupMatrix::Q8(matrix) => matrix.bytes(),
            GroupMatrix::Q4(matrix) => matrix.bytes(),
        }
    }
}

/// Activations in int8, one scale a group of 32, and a stack of weights, of which each part has its
/// own encoding.
pub(crate) struct GroupLinear {
    parts: Vec<GroupMatrix>,
    inputs: usize,
    outputs: usize,
}

impl GroupLinear {
    /// Parts of one width, at least one.
    pub(crate) fn new(parts: Vec<GroupMatrix>) -> Self {
        let inputs = parts[0].shape().1;
        let outputs = parts.iter().map(|part| part.shape().0).sum();
        Self {
            parts,
            inputs,
            outputs,
        }
    }
}

impl LinearLayer for GroupLinear {
    fn inputs(&self) -> usize {
        self.inputs
    }

    fn outputs(&self) -> usize {
        self.outputs
    }

    fn forward(&self, team: &Team, scratch: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
        let rows = &mut scratch.groups;
        rows.quantise(team, x, self.inputs);
        let (width, mut first) = (self.outputs, 0);
        for part in &self.parts {
            match part {
                GroupMatrix::Q8(matrix) => matmul_q8_in(team, rows, matrix, y, width, first),
                GroupMatrix::Q4(matrix) => matmul_q4_in(team, rows, matrix, y, width, first),
            }
            first += part.shape().0;
        }
    }

    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes() as u64).sum()
    }
}
