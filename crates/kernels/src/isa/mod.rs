//! The vector operations that kernels are written in: sixteen f32 or i32 lanes, whatever the
//! machine's registers hold.
//!
//! Each operation gives the same bits in every implementation: lanes are IEEE single precision,
//! rounded to nearest even, multiply-add is fused, and sums over lanes use one fixed tree.
//! Algorithms do not live here.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod traced;

pub(crate) use scalar::Scalar;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// A proof that the processor has an instruction set, with its operations.
///
/// # Safety
/// Values exist only on processors that have the instruction set: implementations use intrinsics on
/// the strength of holding `self`.
pub(crate) unsafe trait Simd: Copy + Send + Sync {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// 64 bytes of offset-128 weights (see `q8`), prepared for [`Simd::dot4`].
    type W: Copy;
    /// Sixteen pairs of i8, prepared for [`Simd::dot2`].
    type P: Copy;
    /// 64 unsigned bytes of 0 to 15, four of each of sixteen rows, prepared for
    /// [`Simd::dot4_small`].
    type U: Copy;
    /// Sixteen pairs of bf16, prepared for [`Simd::dot_bf16`].
    type B: Copy;

    /// Whether there are registers for two vectors a row in a register-blocked product.
    const WIDE: bool;

    /// Asks for a cache line ahead of its use. Any address is allowed, also one past the end of
    /// everything.
    fn prefetch(self, line: *const u8);
    /// As [`Simd::prefetch`], no closer than the second-level cache.
    fn prefetch_l2(self, line: *const u8);
    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; LANES]);
    /// Sixteen half-precision numbers, widened exactly.
    fn load_f16(self, x: &[half::f16; LANES]) -> Self::F;
    /// Sixteen unsigned bytes, widened exactly.
    fn load_u8(self, x: &[u8; LANES]) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `y`, but 0 in lanes where `x < limit`.
    fn zero_below(self, x: Self::F, limit: f32, y: Self::F) -> Self::F;
    /// Sum of the lanes by halving: `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    fn sum(self, x: Self::F) -> f32;
    /// Largest lane by the same halving, with [`Simd::max`].
    fn largest(self, x: Self::F) -> f32;

    /// Lane `i` of the result is lane `i ^ 1`.
    fn swap1(self, x: Self::F) -> Self::F;
    /// Lane `i` of the result is lane `i ^ 2`.
    fn swap2(self, x: Self::F) -> Self::F;
    /// Lane `i` of the result is lane `i ^ 4`.
    fn swap4(self, x: Self::F) -> Self::F;
    /// Lane `i` of the result is lane `i ^ 8`.
    fn swap8(self, x: Self::F) -> Self::F;

    fn splat_i(self, x: i32) -> Self::I;
    fn load_i(self, x: &[i32; LANES]) -> Self::I;
    /// Sixteen words, little-endian.
    fn load_bytes(self, x: &[u8; 64]) -> Self::I;
    /// Lanes in -128..=127 as sixteen i8, four a word, the first in the lowest byte.
    fn narrow(self, x: Self::I) -> [i32; 4];
    fn store_i(self, x: Self::I, to: &mut [i32; LANES]);
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `x << 23`: an integer into the exponent of an f32.
    fn shift_to_exponent(self, x: Self::I) -> Self::I;
    /// To the nearest integer, ties to even; lanes out of range give `i32::MIN`.
    fn round(self, x: Self::F) -> Self::I;
    /// To f32, rounded to nearest even.
    fn widen(self, x: Self::I) -> Self::F;
    fn bits(self, x: Self::F) -> Self::I;
    fn float_from_bits(self, x: Self::I) -> Self::F;

    /// Takes 64 weights of sixteen rows, four consecutive ones a row, each stored as `w + 128`.
    fn weights(self, w: &[u8; 64]) -> Self::W;
    /// What a group's sum starts from, given `-128 * (sum of the group's activations)`.
    fn dot_start(self, offset: i32) -> Self::I;
    /// Adds to each lane the dot product of its row's four weights and the four i8 activations
    /// packed in `a` (first in the lowest byte, none of them -128). Once a whole group has been
    /// added to [`Simd::dot_start`], the lane holds the exact sum.
    fn dot4(self, sum: Self::I, w: Self::W, a: i32) -> Self::I;

    /// Takes 128 weights of 0 to 15 of sixteen rows: those in the lower halves of the bytes and those
    /// in the upper, four of each a row.
    fn nibbles(self, w: &[u8; 64]) -> [Self::U; 2];
    /// As [`Simd::dot4`], exact from any start, since the weights are not offset.
    fn dot4_small(self, sum: Self::I, w: Self::U, a: i32) -> Self::I;

    /// Takes two i8 for each lane.
    fn pairs(self, x: &[i8; 2 * LANES]) -> Self::P;
    /// Adds to each lane the dot product of its pair and the two i16 packed in `a` (first in the
    /// lower half), exactly while the sum fits.
    fn dot2(self, sum: Self::I, x: Self::P, a: i32) -> Self::I;

    /// Takes a pair of bf16 of each of sixteen rows, the first of a pair in the lower half of its
    /// word.
    fn bf16_pairs(self, w: &[u8; 64]) -> Self::B;
    /// Adds to each lane the products of its pair and the pair packed in `x`, the second numbers
    /// first, each by [`Simd::fma`]: what `vdpbf16ps` does, which besides takes subnormal numbers
    /// for zeros and returns none. So there must be none, neither given nor among sums: see
    /// [`crate::panels`].
    fn dot_bf16(self, sum: Self::F, w: Self::B, x: i32) -> Self::F;
}

/// Loads fewer than sixteen numbers; the other lanes are zero.
#[inline(always)]
pub(crate) fn load_part<V: Simd>(v: V, x: &[f32]) -> V::F {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    v.load(&lanes)
}

/// Stores the first `to.len()` lanes.
#[inline(always)]
pub(crate) fn store_part<V: Simd>(v: V, x: V::F, to: &mut [f32]) {
    let mut lanes = [0.0; LANES];
    v.store(x, &mut lanes);
    to.copy_from_slice(&lanes[..to.len()]);
}

/// e^x in each lane, within 2 units in the last place between -87.3 and 88; 0 below, e^88 above,
/// NaN for NaN.
#[inline(always)]
pub(crate) fn exp<V: Simd>(v: V, x: V::F) -> V::F {
    // x = n ln2 + r with |r| <= ln2 / 2; ln2 in two parts (Cody and Waite), so that n * LN2_HI is
    // exact; then the degree-6 polynomial of Cephes' expf; then n (-126..=127) goes into the
    // exponent.
    const LOW: f32 = -87.3;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const P: [f32; 6] = [
        1.987_569_1e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        5e-1,
    ];
    // The constant comes first: `max` and `min` return their second argument when it is NaN.
    let clamped = v.min(v.splat(88.0), v.max(v.splat(LOW), x));
    let n = v.round(v.mul(clamped, v.splat(std::f32::consts::LOG2_E)));
    let nf = v.widen(n);
    let r = v.fma(nf, v.splat(-LN2_HI), clamped);
    let r = v.fma(nf, v.splat(-LN2_LO), r);
    let mut p = v.splat(P[0]);
    for c in &P[1..] {
        p = v.fma(p, r, v.splat(*c));
    }
    let p = v.fma(p, v.mul(r, r), v.add(r, v.splat(1.0)));
    let scale = v.float_from_bits(v.shift_to_exponent(v.add_i(n, v.splat_i(127))));
    v.zero_below(x, LOW, v.mul(p, scale))
}
