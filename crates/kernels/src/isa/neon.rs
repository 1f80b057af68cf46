//! NEON with the dot product of int8 (FEAT_DotProd): four registers are a vector. (Armv8.2 and later:
//! Neoverse, and every processor with the Realm Management Extension.)
//!
//! The dot product and prefetches are inline assembly, because their intrinsics are not stable in the Rust that this crate
//! asks for; so are conversions from f16, which then need no such type. All instructions but the dot product belong to
//! every aarch64 processor.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{LANES, Simd};
use crate::cpu::Kernel;

/// Proof of NEON with the dot product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn detect() -> Option<Neon> {
        let found = std::arch::is_aarch64_feature_detected!("neon")
            && std::arch::is_aarch64_feature_detected!("dotprod");
        found.then_some(Neon(()))
    }

    #[inline]
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        fn with_features<K: Kernel>(token: Neon, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: `self` exists, so `detect` found each of the features named above.
        unsafe { with_features(self, kernel) }
    }
}

/// Lanes 0..4, 4..8, 8..12 and 12..16.
#[derive(Clone, Copy)]
pub(crate) struct F(float32x4_t, float32x4_t, float32x4_t, float32x4_t);

/// Lanes 0..4, 4..8, 8..12 and 12..16.
#[derive(Clone, Copy)]
pub(crate) struct I(int32x4_t, int32x4_t, int32x4_t, int32x4_t);

/// Four bytes of each of sixteen rows, rows in the order of [`I`].
#[derive(Clone, Copy)]
pub(crate) struct Bytes(int8x16_t, int8x16_t, int8x16_t, int8x16_t);

/// The first of each pair, lanes 0..8 and 8..16, then the second of each.
#[derive(Clone, Copy)]
pub(crate) struct Pairs(int16x8_t, int16x8_t, int16x8_t, int16x8_t);

/// One operation on each of the four registers of its arguments.
macro_rules! each {
    ($to:ident: $operation:path, $($x:expr),*) => {
        $to(
            $operation($($x.0),*),
            $operation($($x.1),*),
            $operation($($x.2),*),
            $operation($($x.3),*),
        )
    };
}

/// Adds to each of four lanes the dot product of four i8 of `w` and four of `a`.
///
/// # Safety
/// The processor has the dot product.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's; works on registers only.
    unsafe {
        asm!("sdot {sum:v}.4s, {w:v}.16b, {a:v}.16b", sum = inout(vreg) sum, w = in(vreg) w, a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Eight half-precision numbers, widened exactly.
#[inline(always)]
fn widen_f16(x: uint16x8_t) -> (float32x4_t, float32x4_t) {
    let (low, high);
    // SAFETY: these conversions belong to every aarch64 processor; they work on registers only.
    unsafe {
        asm!("fcvtl {low:v}.4s, {x:v}.4h", low = out(vreg) low, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {high:v}.4s, {x:v}.8h", high = out(vreg) high, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    (low, high)
}

/// The lower halves of words as bits of f32.
#[inline(always)]
fn lower_halves(x: I) -> I {
    // SAFETY: NEON belongs to every aarch64 processor; works on registers only.
    unsafe { each!(I: vshlq_n_s32::<16>, x) }
}

/// Four lanes of [`Simd::max`]; NEON's own maximum treats NaN and zeros otherwise.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's; works on registers only.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

/// Four lanes of [`Simd::min`].
///
/// # Safety
/// As [`max`].
#[inline(always)]
unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's; works on registers only.
    unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
}

/// Four lanes of [`Simd::round`]. The instruction saturates, and gives 0 for NaN.
///
/// # Safety
/// As [`max`].
#[inline(always)]
unsafe fn round(x: float32x4_t) -> int32x4_t {
    // SAFETY: the caller's; works on registers only.
    unsafe {
        let in_range = vcltq_f32(x, vdupq_n_f32(2_147_483_648.0));
        vbslq_s32(in_range, vcvtnq_s32_f32(x), vdupq_n_s32(i32::MIN))
    }
}

/// `y`, but 0 in lanes where `x < limit`.
///
/// # Safety
/// As [`max`].
#[inline(always)]
unsafe fn zero_below(x: float32x4_t, limit: float32x4_t, y: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's; works on registers only.
    unsafe {
        let y = vreinterpretq_u32_f32(y);
        vreinterpretq_f32_u32(vbicq_u32(y, vcltq_f32(x, limit)))
    }
}

/// Methods that are one expression of intrinsics on registers.
macro_rules! registers {
    ($(fn $name:ident($($arg:ident: $t:ty),*) -> $r:ty { $e:expr })*) => { $(
        #[inline(always)]
        fn $name(self $(, $arg: $t)*) -> $r {
            // SAFETY: `self` proves that the processor has the features these intrinsics need (see
            // `detect`); they take and return registers and touch no memory.
            unsafe { $e }
        }
    )* };
}

// SAFETY: a Neon comes only from `detect`, so the features are there.
unsafe impl Simd for Neon {
    type F = F;
    type I = I;
    /// Signed weights.
    type W = Bytes;
    type P = Pairs;
    type U = Bytes;
    /// A pair a word.
    type B = I;

    // There are as many vectors as with AVX2: eight.
    const WIDE: bool = false;

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: a prefetch is a hint: it never faults and changes no memory, whatever the
        // address.
        unsafe {
            asm!("prfm pldl1keep, [{line}]", line = in(reg) line,
                options(nomem, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    fn prefetch_l2(self, line: *const u8) {
        // SAFETY: as in `prefetch`.
        unsafe {
            asm!("prfm pldl2keep, [{line}]", line = in(reg) line,
                options(nomem, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        let p = x.as_ptr();
        // SAFETY: NEON by `self`; the reference covers all four quarters, and the loads need no
        // more alignment than it has.
        unsafe {
            F(
                vld1q_f32(p),
                vld1q_f32(p.add(4)),
                vld1q_f32(p.add(8)),
                vld1q_f32(p.add(12)),
            )
        }
    }
    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; LANES]) {
        let p = to.as_mut_ptr();
        // SAFETY: NEON by `self`; the reference covers all four quarters.
        unsafe {
            vst1q_f32(p, x.0);
            vst1q_f32(p.add(4), x.1);
            vst1q_f32(p.add(8), x.2);
            vst1q_f32(p.add(12), x.3);
        }
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; LANES]) -> I {
        let p = x.as_ptr();
        // SAFETY: as in `load`.
        unsafe {
            I(
                vld1q_s32(p),
                vld1q_s32(p.add(4)),
                vld1q_s32(p.add(8)),
                vld1q_s32(p.add(12)),
            )
        }
    }
    #[inline(always)]
    fn store_i(self, x: I, to: &mut [i32; LANES]) {
        let p = to.as_mut_ptr();
        // SAFETY: as in `store`.
        unsafe {
            vst1q_s32(p, x.0);
            vst1q_s32(p.add(4), x.1);
            vst1q_s32(p.add(8), x.2);
            vst1q_s32(p.add(12), x.3);
        }
    }
    #[inline(always)]
    fn narrow(self, x: I) -> [i32; 4] {
        let mut words = [0; 4];
        // SAFETY: NEON by `self`; the array covers the 16 bytes stored, and bytes need no alignment.
        unsafe {
            // Little-endian: the lower halves are the elements with even numbers.
            let low = vuzp1q_s16(vreinterpretq_s16_s32(x.0), vreinterpretq_s16_s32(x.1));
            let high = vuzp1q_s16(vreinterpretq_s16_s32(x.2), vreinterpretq_s16_s32(x.3));
            let bytes = vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
            vst1q_s8(words.as_mut_ptr().cast(), bytes);
        }
        words
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> F {
        let p: *const u16 = x.as_ptr().cast();
        // SAFETY: NEON by `self`; f16 is a transparent u16, so the reference covers both halves.
        let (low, high) = unsafe { (vld1q_u16(p), vld1q_u16(p.add(8))) };
        let ((a, b), (c, d)) = (widen_f16(low), widen_f16(high));
        F(a, b, c, d)
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> F {
        // SAFETY: NEON by `self`; the reference covers the 16 bytes read.
        unsafe {
            let bytes = vld1q_u8(x.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            F(
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                vcvtq_f32_u32(vmovl_high_u16(high)),
            )
        }
    }
    #[inline(always)]
    fn weights(self, w: &[u8; 64]) -> Bytes {
        let p = w.as_ptr();
        // SAFETY: NEON by `self`; the reference covers all four quarters.
        unsafe {
            // From `w + 128` to w: the product is signed by signed.
            let offset = vdupq_n_u8(0x80);
            Bytes(
                vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), offset)),
                vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p.add(16)), offset)),
                vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p.add(32)), offset)),
                vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p.add(48)), offset)),
            )
        }
    }
    #[inline(always)]
    fn nibbles(self, w: &[u8; 64]) -> [Bytes; 2] {
        let p = w.as_ptr();
        // SAFETY: NEON by `self`; the reference covers all four quarters.
        unsafe {
            let (a, b) = (vld1q_u8(p), vld1q_u8(p.add(16)));
            let (c, d) = (vld1q_u8(p.add(32)), vld1q_u8(p.add(48)));
            let lower = vdupq_n_u8(0x0F);
            [
                Bytes(
                    vreinterpretq_s8_u8(vandq_u8(a, lower)),
                    vreinterpretq_s8_u8(vandq_u8(b, lower)),
                    vreinterpretq_s8_u8(vandq_u8(c, lower)),
                    vreinterpretq_s8_u8(vandq_u8(d, lower)),
                ),
                Bytes(
                    vreinterpretq_s8_u8(vshrq_n_u8::<4>(a)),
                    vreinterpretq_s8_u8(vshrq_n_u8::<4>(b)),
                    vreinterpretq_s8_u8(vshrq_n_u8::<4>(c)),
                    vreinterpretq_s8_u8(vshrq_n_u8::<4>(d)),
                ),
            ]
        }
    }
    #[inline(always)]
    fn pairs(self, x: &[i8; 2 * LANES]) -> Pairs {
        // SAFETY: NEON by `self`; the reference covers the 32 bytes read.
        unsafe {
            let int8x16x2_t(first, second) = vld2q_s8(x.as_ptr());
            Pairs(
                vmovl_s8(vget_low_s8(first)),
                vmovl_high_s8(first),
                vmovl_s8(vget_low_s8(second)),
                vmovl_high_s8(second),
            )
        }
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> I {
        self.bf16_pairs(x)
    }
    #[inline(always)]
    fn bf16_pairs(self, w: &[u8; 64]) -> I {
        let p = w.as_ptr();
        // SAFETY: NEON by `self`; the reference covers all four quarters, and bytes need no alignment.
        unsafe {
            I(
                vreinterpretq_s32_u8(vld1q_u8(p)),
                vreinterpretq_s32_u8(vld1q_u8(p.add(16))),
                vreinterpretq_s32_u8(vld1q_u8(p.add(32))),
                vreinterpretq_s32_u8(vld1q_u8(p.add(48))),
            )
        }
    }
    #[inline(always)]
    fn swap4(self, x: F) -> F {
        F(x.1, x.0, x.3, x.2)
    }
    #[inline(always)]
    fn swap8(self, x: F) -> F {
        F(x.2, x.3, x.0, x.1)
    }

    // Weights are signed by now, so nothing has to be taken back.
    #[inline(always)]
    fn dot_start(self, _offset: i32) -> I {
        self.splat_i(0)
    }
    // 0 to 15 is the same in signed bytes.
    #[inline(always)]
    fn dot4_small(self, sum: I, w: Bytes, a: i32) -> I {
        self.dot4(sum, w, a)
    }
    // Not BFDOT, which rounds otherwise.
    #[inline(always)]
    fn dot_bf16(self, sum: F, w: I, x: i32) -> F {
        let upper = self.splat_i(0xFFFF_0000_u32 as i32);
        let second = self.float_from_bits(self.and_i(w, upper));
        let sum = self.fma(
            second,
            self.splat(f32::from_bits(x as u32 & 0xFFFF_0000)),
            sum,
        );
        let first = self.float_from_bits(lower_halves(w));
        self.fma(first, self.splat(f32::from_bits((x as u32) << 16)), sum)
    }

    registers! {
        fn splat(x: f32) -> F {{ let x = vdupq_n_f32(x); F(x, x, x, x) }}
        fn add(a: F, b: F) -> F { each!(F: vaddq_f32, a, b) }
        fn sub(a: F, b: F) -> F { each!(F: vsubq_f32, a, b) }
        fn mul(a: F, b: F) -> F { each!(F: vmulq_f32, a, b) }
        fn div(a: F, b: F) -> F { each!(F: vdivq_f32, a, b) }
        // The instruction takes the summand first.
        fn fma(a: F, b: F, c: F) -> F { each!(F: vfmaq_f32, c, a, b) }
        fn max(a: F, b: F) -> F { each!(F: max, a, b) }
        fn min(a: F, b: F) -> F { each!(F: min, a, b) }
        fn zero_below(x: F, limit: f32, y: F) -> F {{
            let limit = vdupq_n_f32(limit);
            let limit = F(limit, limit, limit, limit);
            each!(F: zero_below, x, limit, y)
        }}
        fn sum(x: F) -> f32 {{
            let x = vaddq_f32(vaddq_f32(x.0, x.2), vaddq_f32(x.1, x.3));
            let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
            vget_lane_f32::<0>(x) + vget_lane_f32::<1>(x)
        }}
        fn largest(x: F) -> f32 {{
            let x = max(max(x.0, x.2), max(x.1, x.3));
            let x = max(x, vextq_f32::<2>(x, x));
            let x = max(x, vrev64q_f32(x));
            vgetq_lane_f32::<0>(x)
        }}
        fn swap1(x: F) -> F { each!(F: vrev64q_f32, x) }
        fn swap2(x: F) -> F { each!(F: vextq_f32::<2>, x, x) }
        fn splat_i(x: i32) -> I {{ let x = vdupq_n_s32(x); I(x, x, x, x) }}
        fn add_i(a: I, b: I) -> I { each!(I: vaddq_s32, a, b) }
        fn max_i(a: I, b: I) -> I { each!(I: vmaxq_s32, a, b) }
        fn and_i(a: I, b: I) -> I { each!(I: vandq_s32, a, b) }
        fn shift_to_exponent(x: I) -> I { each!(I: vshlq_n_s32::<23>, x) }
        fn round(x: F) -> I { each!(I: round, x) }
        fn widen(x: I) -> F { each!(F: vcvtq_f32_s32, x) }
        fn bits(x: F) -> I { each!(I: vreinterpretq_s32_f32, x) }
        fn float_from_bits(x: I) -> F { each!(F: vreinterpretq_f32_s32, x) }
        fn dot4(sum: I, w: Bytes, a: i32) -> I {{
            let a = vreinterpretq_s8_s32(vdupq_n_s32(a));
            I(sdot(sum.0, w.0, a), sdot(sum.1, w.1, a), sdot(sum.2, w.2, a), sdot(sum.3, w.3, a))
        }}
        fn dot2(sum: I, x: Pairs, a: i32) -> I {{
            let a = vreinterpret_s16_s32(vdup_n_s32(a));
            let sum = I(
                vmlal_lane_s16::<0>(sum.0, vget_low_s16(x.0), a),
                vmlal_high_lane_s16::<0>(sum.1, x.0, a),
                vmlal_lane_s16::<0>(sum.2, vget_low_s16(x.1), a),
                vmlal_high_lane_s16::<0>(sum.3, x.1, a),
            );
            I(
                vmlal_lane_s16::<1>(sum.0, vget_low_s16(x.2), a),
                vmlal_high_lane_s16::<1>(sum.1, x.2, a),
                vmlal_lane_s16::<1>(sum.2, vget_low_s16(x.3), a),
                vmlal_high_lane_s16::<1>(sum.3, x.3, a),
            )
        }}
    }
}
