//! Int8 in groups of 32: weights with one f16 scale a group and row, activations with one f32 scale
//! a group and row.
//!
//! ```text
//! y[i][j] = sum over groups g, in order, of  (sum of 32 products, exact in i32) * (wscale[j][g] * ascale[i][g])
//! ```
//! each step a fused multiply-add in f32. No instruction set, thread count or number of rows
//! changes a bit of the result.
//!
//! [`Q8Matrix`] holds packed weights, [`Q8Rows`] quantised activations, [`matmul_q8`] multiplies
//! them. Formats of model files other than Q8_0 blocks are not known here.

mod matmul;
mod matrix;
mod rows;

pub use crate::pack::PackError;
pub(crate) use matmul::{Columns, Packed, Tiles, add, ask, halves, multiply};
pub use matmul::{matmul_q8, matmul_q8_in};
pub use matrix::Q8Matrix;
pub use rows::Q8Rows;
pub(crate) use rows::RowGroup;

/// Elements that share a scale.
pub const GROUP: usize = 32;

/// Rows (outputs) of a packed tile.
pub(crate) const TILE: usize = 32;

/// Name of this compute scheme, for keysets and receipts.
pub const NAME: &str = "int8-g32";
