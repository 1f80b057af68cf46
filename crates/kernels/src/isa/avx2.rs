//! AVX2 with FMA and F16C: two registers are a vector. (Zen 2 and 3, Haswell to Cascade Lake,
//! client processors.)

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Simd};
use crate::cpu::Kernel;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Avx2> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }

    #[inline]
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: `self` exists, so `detect` found each of the features named above.
        unsafe { with_features(self, kernel) }
    }
}

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct F(__m256, __m256);

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct I(__m256i, __m256i);

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

// SAFETY: an Avx2 comes only from `detect`, so the features are there.
unsafe impl Simd for Avx2 {
    type F = F;
    type I = I;
    /// Signed weights.
    type W = I;
    /// Lanes 0..8 and 8..16, two i16 each.
    type P = I;
    type U = I;
    /// Words of lanes 0..8 and 8..16.
    type B = I;

    const WIDE: bool = false;

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> F {
        // SAFETY: AVX by `self`; the reference covers both 32-byte halves, and the loads need no
        // alignment.
        unsafe {
            F(
                _mm256_loadu_ps(x.as_ptr()),
                _mm256_loadu_ps(x.as_ptr().add(8)),
            )
        }
    }
    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; LANES]) {
        // SAFETY: AVX by `self`; the reference covers both 32-byte halves, and the stores need no
        // alignment.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), x.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), x.1);
        }
    }
    #[inline(always)]
    fn store_i(self, x: I, to: &mut [i32; LANES]) {
        // SAFETY: as in `store`.
        unsafe {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), x.0);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), x.1);
        }
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; LANES]) -> I {
        // SAFETY: as in `load`.
        unsafe {
            let p: *const __m256i = x.as_ptr().cast();
            I(_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)))
        }
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> I {
        self.bf16_pairs(x)
    }
    #[inline(always)]
    fn swap8(self, x: F) -> F {
        F(x.1, x.0)
    }
    #[inline(always)]
    fn narrow(self, x: I) -> [i32; 4] {
        let mut words = [0; 4];
        // SAFETY: AVX2 by `self`; the array covers the 16 bytes stored, without alignment.
        unsafe {
            // Packing works on 128-bit halves, so lanes come as 0..4, 8..12, 4..8, 12..16.
            let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(x.0, x.1));
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(pairs),
                _mm256_extracti128_si256::<1>(pairs),
            );
            _mm_storeu_si128(words.as_mut_ptr().cast(), bytes);
        }
        words
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> F {
        // SAFETY: F16C by `self`; f16 is a transparent u16, so the reference covers both 16-byte
        // halves.
        unsafe {
            let p: *const __m128i = x.as_ptr().cast();
            F(
                _mm256_cvtph_ps(_mm_loadu_si128(p)),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))),
            )
        }
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> F {
        // SAFETY: AVX2 by `self`; the reference covers both 8-byte halves.
        unsafe {
            let p = x.as_ptr();
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()));
            F(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    fn nibbles(self, w: &[u8; 64]) -> [I; 2] {
        // SAFETY: AVX2 by `self`; the reference covers both 32-byte halves.
        unsafe {
            let p: *const __m256i = w.as_ptr().cast();
            let (a, b) = (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)));
            let lower = _mm256_set1_epi8(0x0F);
            let upper_a = _mm256_and_si256(_mm256_srli_epi16::<4>(a), lower);
            let upper_b = _mm256_and_si256(_mm256_srli_epi16::<4>(b), lower);
            [
                I(_mm256_and_si256(a, lower), _mm256_and_si256(b, lower)),
                I(upper_a, upper_b),
            ]
        }
    }
    #[inline(always)]
    fn pairs(self, x: &[i8; 2 * LANES]) -> I {
        // SAFETY: AVX2 by `self`; the reference covers both 16-byte halves.
        unsafe {
            let p: *const __m128i = x.as_ptr().cast();
            I(
                _mm256_cvtepi8_epi16(_mm_loadu_si128(p)),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(1))),
            )
        }
    }
    #[inline(always)]
    fn weights(self, w: &[u8; 64]) -> I {
        // SAFETY: AVX2 by `self`; the reference covers both 32-byte halves.
        unsafe {
            let p: *const __m256i = w.as_ptr().cast();
            let sign = _mm256_set1_epi8(-128);
            I(
                _mm256_xor_si256(_mm256_loadu_si256(p), sign),
                _mm256_xor_si256(_mm256_loadu_si256(p.add(1)), sign),
            )
        }
    }

    #[inline(always)]
    fn bf16_pairs(self, w: &[u8; 64]) -> I {
        // SAFETY: AVX2 by `self`; the reference covers both 32-byte halves.
        unsafe {
            let p: *const __m256i = w.as_ptr().cast();
            I(_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)))
        }
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: a prefetch is a hint: it never faults and changes no memory, whatever the
        // address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[inline(always)]
    fn prefetch_l2(self, line: *const u8) {
        // SAFETY: as in `prefetch`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }

    registers! {
        fn splat(x: f32) -> F {{ let x = _mm256_set1_ps(x); F(x, x) }}
        fn add(a: F, b: F) -> F { F(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        fn sub(a: F, b: F) -> F { F(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
        fn mul(a: F, b: F) -> F { F(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        fn div(a: F, b: F) -> F { F(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
        fn fma(a: F, b: F, c: F) -> F { F(_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        fn max(a: F, b: F) -> F { F(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
        fn min(a: F, b: F) -> F { F(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
        fn zero_below(x: F, limit: f32, y: F) -> F {{
            let limit = _mm256_set1_ps(limit);
            F(
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x.0, limit), y.0),
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x.1, limit), y.1),
            )
        }}
        fn sum(x: F) -> f32 {{
            let x = _mm256_add_ps(x.0, x.1);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }}
        fn largest(x: F) -> f32 {{
            let x = _mm256_max_ps(x.0, x.1);
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }}
        fn swap1(x: F) -> F { F(_mm256_permute_ps::<0b10_11_00_01>(x.0), _mm256_permute_ps::<0b10_11_00_01>(x.1)) }
        fn swap2(x: F) -> F { F(_mm256_permute_ps::<0b01_00_11_10>(x.0), _mm256_permute_ps::<0b01_00_11_10>(x.1)) }
        fn swap4(x: F) -> F { F(_mm256_permute2f128_ps::<1>(x.0, x.0), _mm256_permute2f128_ps::<1>(x.1, x.1)) }
        fn splat_i(x: i32) -> I {{ let x = _mm256_set1_epi32(x); I(x, x) }}
        fn add_i(a: I, b: I) -> I { I(_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
        fn max_i(a: I, b: I) -> I { I(_mm256_max_epi32(a.0, b.0), _mm256_max_epi32(a.1, b.1)) }
        fn and_i(a: I, b: I) -> I { I(_mm256_and_si256(a.0, b.0), _mm256_and_si256(a.1, b.1)) }
        fn shift_to_exponent(x: I) -> I { I(_mm256_slli_epi32::<23>(x.0), _mm256_slli_epi32::<23>(x.1)) }
        fn round(x: F) -> I { I(_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1)) }
        fn widen(x: I) -> F { F(_mm256_cvtepi32_ps(x.0), _mm256_cvtepi32_ps(x.1)) }
        fn bits(x: F) -> I { I(_mm256_castps_si256(x.0), _mm256_castps_si256(x.1)) }
        fn float_from_bits(x: I) -> F { F(_mm256_castsi256_ps(x.0), _mm256_castsi256_ps(x.1)) }
        fn dot_start(_offset: i32) -> I { I(_mm256_setzero_si256(), _mm256_setzero_si256()) }
        // vpmaddubsw saturates at 16 bits, so offset weights cannot be its unsigned side; |w| can:
        // with |w| <= 128 and |a| <= 127 a pair sums to at most 32512.
        fn dot4(sum: I, w: I, a: i32) -> I {{
            let a = _mm256_set1_epi32(a);
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_maddubs_epi16(_mm256_abs_epi8(w.0), _mm256_sign_epi8(a, w.0));
            let high = _mm256_maddubs_epi16(_mm256_abs_epi8(w.1), _mm256_sign_epi8(a, w.1));
            I(
                _mm256_add_epi32(sum.0, _mm256_madd_epi16(low, ones)),
                _mm256_add_epi32(sum.1, _mm256_madd_epi16(high, ones)),
            )
        }}
        // 15 * 127 twice is far from saturating.
        fn dot4_small(sum: I, w: I, a: i32) -> I {{
            let a = _mm256_set1_epi32(a);
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_maddubs_epi16(w.0, a);
            let high = _mm256_maddubs_epi16(w.1, a);
            I(
                _mm256_add_epi32(sum.0, _mm256_madd_epi16(low, ones)),
                _mm256_add_epi32(sum.1, _mm256_madd_epi16(high, ones)),
            )
        }}
        fn dot2(sum: I, x: I, a: i32) -> I {{
            let a = _mm256_set1_epi32(a);
            I(
                _mm256_add_epi32(sum.0, _mm256_madd_epi16(x.0, a)),
                _mm256_add_epi32(sum.1, _mm256_madd_epi16(x.1, a)),
            )
        }}
        fn dot_bf16(sum: F, w: I, x: i32) -> F {{
            let x = _mm256_set1_epi32(x);
            let upper = _mm256_set1_epi32(0xFFFF_0000u32 as i32);
            let second = _mm256_castsi256_ps(_mm256_and_si256(x, upper));
            let sum = F(
                _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w.0, upper)), second, sum.0),
                _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w.1, upper)), second, sum.1),
            );
            let first = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
            F(
                _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(w.0)), first, sum.0),
                _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(w.1)), first, sum.1),
            )
        }}
    }
}
