//! Elements as four digits of eight bits, for arithmetic that multiplies int8.
//!
//! The centred residue v of an element is `d0 + 255 d1 + 255^2 d2 + 255^3 d3` with digits in
//! -127..=127, in exactly one way. The base is 255 and not 256 because then no digit is -128, which int8
//! products by rows never meet: AVX2 multiplies by magnitudes, and -128 has none. 255^4 > 2^31 leaves
//! room for every element.
//!
//! For weights in -127..=127 the sums of products of digits are at most n * 127^2, within an i32 for
//! every width that a field takes, and [`Field::recombine_row`] makes of the four sums what the product of
//! the elements would have been.

use crate::prime::{Prime, with_prime};
use crate::{Field, same_length};

/// Digits of an element.
pub const DIGITS: usize = 4;

/// What a digit counts.
pub const BASE: i64 = 255;

/// 127 * (1 + 255 + 255^2 + 255^3): added to a centred residue it makes the digits 0..=254.
const SHIFT: u32 = 127 * (1 + 255 + 255 * 255 + 255 * 255 * 255);

impl Field {
    /// The digits of each element of `row`: digit `l` of element `k` is `digits[l * row.len() + k]`,
    /// the lowest first. So `digits` is four int8 rows.
    ///
    /// # Panics
    /// If `digits` is not four times as long as `row`.
    pub fn split_row(self, row: &[u32], digits: &mut [i8]) {
        same_length(row.len() * DIGITS, digits.len());
        let (low, high) = digits.split_at_mut(2 * row.len());
        let (d0, d1) = low.split_at_mut(row.len());
        let (d2, d3) = high.split_at_mut(row.len());
        with_prime!(self, P => {
            let digits = d0.iter_mut().zip(d1).zip(d2.iter_mut().zip(d3));
            for (x, ((d0, d1), (d2, d3))) in row.iter().zip(digits) {
                [*d0, *d1, *d2, *d3] = split::<P>(*x);
            }
        });
    }

    /// Elements from sums of products of digits: `sums` is four rows of `out.len()`, that of the
    /// lowest digits first; `out[j]` is `sums[0][j] + 255 sums[1][j] + ...` modulo p, for any integers.
    ///
    /// # Panics
    /// If `sums` is not four times as long as `out`.
    pub fn recombine_row(self, sums: &[i32], out: &mut [u32]) {
        same_length(out.len() * DIGITS, sums.len());
        let (low, high) = sums.split_at(2 * out.len());
        let (z0, z1) = low.split_at(out.len());
        let (z2, z3) = high.split_at(out.len());
        with_prime!(self, P => {
            let sums = z0.iter().zip(z1).zip(z2.iter().zip(z3));
            for (out, ((z0, z1), (z2, z3))) in out.iter_mut().zip(sums) {
                *out = recombine::<P>([*z0, *z1, *z2, *z3]);
            }
        });
    }
}

#[inline(always)]
fn split<P: Prime>(x: u32) -> [i8; DIGITS] {
    let mut rest = (P::centre(x) as u32).wrapping_add(SHIFT);
    let mut digits = [0; DIGITS];
    for digit in &mut digits {
        let quotient = by_255(rest);
        *digit = (rest.wrapping_sub(quotient.wrapping_mul(255)) as i32 - 127) as i8;
        rest = quotient;
    }
    digits
}

/// x / 255 without dividing, for every x.
#[inline(always)]
fn by_255(x: u32) -> u32 {
    ((u64::from(x) * 0x8080_8081) >> 39) as u32
}

#[inline(always)]
fn recombine<P: Prime>(sums: [i32; DIGITS]) -> u32 {
    let [z0, z1, z2, z3] = sums.map(i64::from);
    // Below 2^56 in magnitude, which a multiple of p is added to.
    let sum = z0 + BASE * z1 + BASE * BASE * z2 + BASE * BASE * BASE * z3;
    P::reduce((sum + (i64::from(P::P) << 28)) as u64)
}
