//! 4-bit weights in groups of 32, as model files hold them, and activations in int8 in groups of 32
//! ([`Q8Rows`]).
//!
//! ```text
//! y[i][j] = 0, then for groups g in order, by fused multiply-add
//!           y[i][j] + float(sum of 32 products q * x, exact in i32) * (scale[j][g] * xscale[i][g])
//!           y[i][j] + offset[j][g] * (xscale[i][g] * float(sum of the 32 x))      if the encoding has offsets
//! ```
//! No instruction set, thread count or number of rows changes a bit of the result. What q, scale and
//! offset are is the [`Encoding`]'s.
//!
//! [`Q4Matrix`] holds packed weights, [`matmul_q4`] multiplies them. Nothing is quantised here.

mod matrix;
mod packed;

pub use matrix::Q4Matrix;

use crate::q8::{Columns, Q8Rows, multiply};
use crate::team::Team;

/// Name of the compute scheme that uses these weights, for keysets and receipts.
pub const NAME: &str = "q4-g32";

/// How a file encodes weights of four bits n (0 to 15). Blocks, in bytes (`d`, `m`, `dmin` are f16):
///
/// ```text
/// Q4_0   32 weights: d | 16 x (low: weight i, high: weight i + 16)               w = d * (n - 8)
/// Q4_1   32 weights: d | m | 16 x as Q4_0                                        w = d * n + m
/// Q4_K  256 weights: d | dmin | 12 bytes: 8 scales and 8 minima of 6 bits | 128  w = (d * scale) * n - dmin * minimum
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// q = n - 8, scale = d, no offset.
    Q4_0,
    /// q = n, scale = d, offset = m.
    Q4_1,
    /// q = n, scale = d * scale, offset = -(dmin * minimum), both exact in f32.
    Q4K,
}

/// `y = x * w^T`: `y[i * w.rows() + j] = sum over k of x[i][k] * w[j][k]`, rounded as the
/// [module](self) says.
///
/// # Panics
/// If `x` and `w` differ in columns or `y` is not `x.rows() * w.rows()` long.
pub fn matmul_q4(team: &Team, x: &Q8Rows, w: &Q4Matrix, y: &mut [f32]) {
    matmul_q4_in(team, x, w, y, w.rows(), 0);
}

/// As [`matmul_q4`], into rows of `width` that several matrices fill: `y[i * width + first + j]`.
///
/// # Panics
/// If `x` and `w` differ in columns, `y` is not `x.rows() * width` long or the columns do not fit it.
pub fn matmul_q4_in(
    team: &Team,
    x: &Q8Rows,
    w: &Q4Matrix,
    y: &mut [f32],
    width: usize,
    first: usize,
) {
    let columns = Columns { width, first };
    match w.encoding() {
        Encoding::Q4_0 => multiply(team, x, w.tiles::<packed::Q4_0>(), y, columns),
        Encoding::Q4_1 => multiply(team, x, w.tiles::<packed::Q4_1>(), y, columns),
        Encoding::Q4K => multiply(team, x, w.tiles::<packed::Q4K>(), y, columns),
    }
}
