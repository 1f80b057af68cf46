//! Sums of products, reduced as late as they allow: what checks of a product cost.
//!
//! A check of `y = W x` compares `s . y` with `(s W) . x` for secret factors s. The dot products are
//! [`Field::dot`] and [`Field::dots`]; `s W`, once for each matrix, is [`accumulate`] over its rows and
//! then [`Field::settle_row`].

use crate::prime::{Prime, with_prime};
use crate::{Field, same_length};

/// Rows that [`accumulate`] may add up: 2^24 * 2^31 * 128 < 2^63.
pub const MAX_ROWS: usize = 1 << 24;

/// Independent sums of a dot product, so that they fill vectors.
const LANES: usize = 8;

impl Field {
    /// The sum of `a[i] * b[i]`.
    ///
    /// # Panics
    /// If the rows differ in length.
    #[must_use]
    pub fn dot(self, a: &[u32], b: &[u32]) -> u32 {
        let [dot] = self.dots([a], b);
        dot
    }

    /// The sums of `a[i] * b[i]` for several `a`, with one pass over `b`.
    ///
    /// # Panics
    /// If the rows differ in length.
    #[must_use]
    pub fn dots<const N: usize>(self, a: [&[u32]; N], b: &[u32]) -> [u32; N] {
        for a in a {
            same_length(a.len(), b.len());
        }
        with_prime!(self, P => dots::<P, N>(a, b))
    }

    /// `out[k] = sums[k]` modulo p, for any integers.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn settle_row(self, sums: &[i64], out: &mut [u32]) {
        same_length(sums.len(), out.len());
        with_prime!(self, P => {
            for (sum, out) in sums.iter().zip(out) {
                *out = P::from_integer(*sum);
            }
        });
    }
}

/// `sums[k] += factor * row[k]` without reducing anything. Up to [`MAX_ROWS`] rows may be added to what
/// began as zeros, of either field.
///
/// # Panics
/// If the rows differ in length.
pub fn accumulate(sums: &mut [i64], factor: u32, row: &[i8]) {
    same_length(sums.len(), row.len());
    let factor = factor as i32;
    for (sum, w) in sums.iter_mut().zip(row) {
        *sum = sum.wrapping_add(i64::from(factor) * i64::from(i32::from(*w)));
    }
}

fn dots<P: Prime, const N: usize>(a: [&[u32]; N], b: &[u32]) -> [u32; N] {
    let mut totals = [0u64; N];
    for (total, a) in totals.iter_mut().zip(a) {
        *total = dot::<P>(a, b);
    }
    totals.map(P::reduce)
}

fn dot<P: Prime>(a: &[u32], b: &[u32]) -> u64 {
    // So many products of two elements are below 2^64.
    let at_once = 1 << (64 - 2 * P::BITS);
    let mut totals = [0u64; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_lanes.chunks(at_once).zip(b_lanes.chunks(at_once)) {
        let mut sums = [0u64; LANES];
        for (a, b) in a.iter().zip(b) {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum = sum.wrapping_add(u64::from(*a) * u64::from(*b));
            }
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            // A folded number is below 2^37, and so is the fold of the sum of two.
            *total = P::fold(*total + P::fold(sum));
        }
    }
    let mut total = 0;
    for sum in totals {
        total = P::fold(total + sum);
    }
    for (a, b) in a_rest.iter().zip(b_rest) {
        total = P::fold(total + P::fold(u64::from(*a) * u64::from(*b)));
    }
    total
}
