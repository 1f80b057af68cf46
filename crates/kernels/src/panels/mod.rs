//! Products of rows: weights with one scale a row (output), activations with one scale a row
//! (token), everything between them exact.
//!
//! ```text
//! sum[i][j] = sum over all columns k of x[i][k] * w[j][k], exact in i32, so in any order
//! y[i][j]   = (float(sum[i][j]) * wscale[j]) * xscale[i]      each step rounded to nearest even
//! ```
//! No instruction set, thread count or number of rows changes a bit of the result, and whoever has
//! the sums (a worker that multiplied elsewhere) can finish them with [`scale_sums`].
//!
//! [`Int8Matrix`] holds packed weights, [`Int8Rows`] quantised activations, [`matmul_int8`]
//! multiplies them. What is quantised may have been [rotated](crate::rotate) before; nothing here
//! knows.
//!
//! # Panels
//! A *panel* is sixteen rows of weights (outputs), as a sequence of 64-byte lines, each of which
//! feeds one instruction:
//!
//! ```text
//! int8, line k:  row 0: columns 4k .. 4k+4 | row 1: the same columns | ... | row 15      one byte each, w + 128
//! ```
//! Panels follow each other. Products with many rows of activations hold 8 rows by 3 panels in
//! registers and keep as many panels as fit half of an L2 cache close by; products with few stream
//! two to four panels at once, each line once.

mod int8;
mod product;
mod rows;

pub use int8::Int8Matrix;
pub use product::{matmul_int8, matmul_int8_sums, scale_sums};
pub use rows::Int8Rows;

/// Rows of weights in a panel.
pub const PANEL: usize = 16;

/// Most columns whose sum of products of numbers in -127..=127 fits an i32 whatever they are.
pub const MAX_COLUMNS: usize = i32::MAX as usize / (127 * 127);

/// Name of this compute scheme with [rotated](crate::rotate) inputs, for keysets and receipts.
pub const NAME: &str = "int8-row";
