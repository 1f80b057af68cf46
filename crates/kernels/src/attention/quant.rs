//! A head of a query, key or value as 8-bit integers with one scale.

use super::MAX_HEAD_DIM;
use crate::isa::{LANES, Simd, load_part};

/// Below this, everything counts as zero.
pub(super) const NOTHING: f32 = 1e-30;

/// Quantises a head and returns its scale: largest magnitude / 127; quants are the nearest to
/// `x * (1 / scale)`, ties to even. Quants behind the last element, up to a multiple of 16, are 0. A head whose largest is
/// below [`NOTHING`] is zero, one with NaN or infinity has a NaN scale, so that it shows.
#[inline(always)]
pub(super) fn quantise<V: Simd>(v: V, x: &[f32], quants: &mut [i8; MAX_HEAD_DIM]) -> f32 {
    quants[..x.len().next_multiple_of(LANES)].fill(0);
    let (whole, rest) = x.as_chunks::<LANES>();
    // Compared as integers, NaN comes above infinity and infinity above every number.
    let magnitude = v.splat_i(0x7FFF_FFFF);
    let mut largest = v.and_i(v.bits(load_part(v, rest)), magnitude);
    for x in whole {
        largest = v.max_i(largest, v.and_i(v.bits(v.load(x)), magnitude));
    }
    let mut lanes = [0i32; LANES];
    v.store_i(largest, &mut lanes);
    let largest = f32::from_bits(lanes.iter().fold(0, |a, b| a.max(*b)) as u32);
    if !largest.is_finite() {
        return f32::NAN;
    }
    if largest < NOTHING {
        return 0.0;
    }
    let scale = largest / 127.0;
    let inverse = v.splat(1.0 / scale);
    let (to, end) = quants.split_at_mut(whole.len() * LANES);
    for (x, to) in whole.iter().zip(to.as_chunks_mut::<LANES>().0) {
        store(v, v.mul(v.load(x), inverse), to);
    }
    if !rest.is_empty() {
        store(v, v.mul(load_part(v, rest), inverse), &mut end[..LANES]);
    }
    scale
}

/// |x| <= 127 up to rounding, so every quant fits and none is -128.
#[inline(always)]
fn store<V: Simd>(v: V, x: V::F, to: &mut [i8]) {
    let mut lanes = [0i32; LANES];
    v.store_i(v.round(x), &mut lanes);
    for (to, q) in to.iter_mut().zip(lanes) {
        *to = q as i8;
    }
}
