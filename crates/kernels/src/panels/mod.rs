//! Products of rows in int8 and in bf16: weights in panels, activations in blocks.
//!
//! **int8**: weights with one scale a row (output), activations with one scale a row (token),
//! everything between them exact.
//!
//! ```text
//! sum[i][j] = sum over all columns k of x[i][k] * w[j][k], exact in i32, so in any order
//! y[i][j]   = (float(sum[i][j]) * wscale[j]) * xscale[i]      each step rounded to nearest even
//! ```
//! [`Int8Matrix`] holds packed weights, [`Int8Rows`] quantised activations, [`matmul_int8`]
//! multiplies them. What is quantised may have been [rotated](crate::rotate) before; nothing here
//! knows. Whoever has the sums (a worker that multiplied elsewhere) can finish them with
//! [`scale_sums`].
//!
//! **bf16**: weights and activations in bf16, sums in f32.
//!
//! ```text
//! y[i][j] = 0, then for columns k = 0, 2, 4, ... by fused multiply-add
//!           y[i][j] + x[i][k+1] * w[j][k+1], then y[i][j] + x[i][k] * w[j][k]
//! ```
//! [`Bf16Matrix`], [`Bf16Rows`], [`matmul_bf16`]. The order is that of `vdpbf16ps`. Numbers below
//! 2^-56 in magnitude are zero, so that neither a product nor a sum is ever subnormal, which that
//! instruction would take for zero.
//!
//! On tile registers (AMX) sums of bf16 have another order, that of `tdpbf16ps`:
//!
//! ```text
//! y[i][j] = 0, then for each 32 columns from k = 0 on, the last perhaps fewer
//!           even = 0, then over k, k+2, ... even + x[i][k] * w[j][k]         by fused multiply-add
//!           odd  = 0, then over k+1, k+3, ... the same
//!           y[i][j] + (even + odd)
//! ```
//!
//! But for that no instruction set changes a bit of a result, and no thread count or number of rows does.
//!
//! # Panels
//! A *panel* is sixteen rows of weights (outputs), as a sequence of 64-byte lines, each of which
//! feeds one instruction:
//!
//! ```text
//! int8, line k:  row 0: columns 4k .. 4k+4 | row 1: the same columns | ... | row 15      one byte each, w + 128
//! bf16, line k:  row 0: columns 2k .. 2k+2 | row 1: the same columns | ... | row 15      two bytes each
//! ```
//! Panels follow each other. Products with many rows of activations hold 8 rows by 3 panels in
//! registers and keep as many panels as fit half of an L2 cache close by; products with few stream
//! two to four panels at once, each line once. Sixteen lines of a panel are a tile.

mod bf16;
mod blocks;
mod int8;
mod packed;
mod product;
mod rows;
#[cfg(target_arch = "x86_64")]
mod tiles;

pub(crate) use bf16::round as round_bf16;
pub use bf16::{Bf16Matrix, Bf16Rows};
pub use int8::Int8Matrix;
pub use product::{matmul_bf16, matmul_int8, matmul_int8_sums, scale_sums};
pub use rows::Int8Rows;

use crate::cpu::Isa;

/// Rows of weights in a panel.
pub const PANEL: usize = 16;

/// Most columns whose sum of products of numbers in -127..=127 fits an i32 whatever they are.
pub const MAX_COLUMNS: usize = i32::MAX as usize / (127 * 127);

/// Name of the int8 compute scheme with [rotated](crate::rotate) inputs, for keysets and receipts.
pub const NAME: &str = "int8-row";

/// Name of the bf16 compute scheme, for keysets and receipts.
pub const BF16_NAME: &str = "bf16";

/// The same on tile registers, where sums of bf16 have another order.
pub const BF16_TILES_NAME: &str = "bf16-tiles";

/// Which of the two an instruction set has.
pub fn bf16_name(isa: Isa) -> &'static str {
    if isa.has_tiles() {
        BF16_TILES_NAME
    } else {
        BF16_NAME
    }
}
