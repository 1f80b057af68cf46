//! AVX-512 with VNNI: one register is a vector. (Ice Lake and Sapphire Rapids servers, Zen 4 and
//! later; all but Ice Lake have BF16, too.)

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Simd};
use crate::cpu::Kernel;

/// Proof of AVX-512 F, BW, DQ, VL and VNNI, of everything that [`super::avx2`] uses and, if `BF16`,
/// of AVX-512 BF16.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx512<const BF16: bool>(());

impl Avx512<false> {
    pub(crate) fn detect() -> Option<Avx512<false>> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx512(()))
    }

    #[inline]
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn with_features<K: Kernel>(token: Avx512<false>, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: `self` exists, so `detect` found each of the features named above.
        unsafe { with_features(self, kernel) }
    }
}

impl Avx512<true> {
    pub(crate) fn detect() -> Option<Avx512<true>> {
        let found = Avx512::<false>::detect().is_some() && is_x86_feature_detected!("avx512bf16");
        found.then_some(Avx512(()))
    }

    /// A kernel that multiplies no bf16 is the same with and without BF16, and compiled once.
    #[inline]
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
        )]
        fn with_features<K: Kernel>(token: Avx512<true>, kernel: K) -> K::Output {
            kernel.run(token)
        }
        if !K::BF16 {
            return Avx512::<false>(()).enter(kernel);
        }
        // SAFETY: `self` exists, so `detect` found each of the features named above.
        unsafe { with_features(self, kernel) }
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

// SAFETY: an Avx512 comes only from `detect`, so the features are there.
unsafe impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type I = __m512i;
    type W = __m512i;
    type P = __m512i;
    type U = __m512i;
    type B = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: AVX-512F by `self`; the reference covers the 64 bytes read, and the load needs no
        // alignment.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; LANES]) {
        // SAFETY: AVX-512F by `self`; the reference covers the 64 bytes written, without alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn store_i(self, x: __m512i, to: &mut [i32; LANES]) {
        // SAFETY: AVX-512F by `self`; the reference covers the 64 bytes written, without alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; LANES]) -> __m512i {
        // SAFETY: AVX-512F by `self`; the reference covers the 64 bytes read, without alignment.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> __m512i {
        self.weights(x)
    }
    #[inline(always)]
    fn narrow(self, x: __m512i) -> [i32; 4] {
        let mut words = [0; 4];
        // SAFETY: AVX-512F by `self`; the array covers the 16 bytes stored, without alignment.
        unsafe { _mm_storeu_si128(words.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x)) };
        words
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> __m512 {
        // SAFETY: AVX-512F and AVX by `self`; f16 is a transparent u16, so the reference covers the
        // 32 bytes read.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> __m512 {
        // SAFETY: AVX-512F by `self`; the reference covers the 16 bytes read.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn nibbles(self, w: &[u8; 64]) -> [__m512i; 2] {
        let w = self.weights(w);
        // SAFETY: AVX-512BW by `self`; registers only.
        unsafe {
            let lower = _mm512_set1_epi8(0x0F);
            let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(w), lower);
            [_mm512_and_si512(w, lower), upper]
        }
    }
    #[inline(always)]
    fn pairs(self, x: &[i8; 2 * LANES]) -> __m512i {
        // SAFETY: AVX-512BW and AVX by `self`; the reference covers the 32 bytes read.
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn weights(self, w: &[u8; 64]) -> __m512i {
        // SAFETY: AVX-512F by `self`; the reference covers the 64 bytes read.
        unsafe { _mm512_loadu_si512(w.as_ptr().cast()) }
    }

    #[inline(always)]
    fn bf16_pairs(self, w: &[u8; 64]) -> __m512i {
        self.weights(w)
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
        fn splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn zero_below(x: __m512, limit: f32, y: __m512) -> __m512 {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(limit)), y)
        }
        fn sum(x: __m512) -> f32 {{
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }}
        fn largest(x: __m512) -> f32 {{
            let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }}
        fn swap1(x: __m512) -> __m512 { _mm512_permute_ps::<0b10_11_00_01>(x) }
        fn swap2(x: __m512) -> __m512 { _mm512_permute_ps::<0b01_00_11_10>(x) }
        fn swap4(x: __m512) -> __m512 { _mm512_shuffle_f32x4::<0b10_11_00_01>(x, x) }
        fn swap8(x: __m512) -> __m512 { _mm512_shuffle_f32x4::<0b01_00_11_10>(x, x) }
        fn splat_i(x: i32) -> __m512i { _mm512_set1_epi32(x) }
        fn add_i(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn max_i(a: __m512i, b: __m512i) -> __m512i { _mm512_max_epi32(a, b) }
        fn and_i(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn shift_to_exponent(x: __m512i) -> __m512i { _mm512_slli_epi32::<23>(x) }
        fn round(x: __m512) -> __m512i { _mm512_cvtps_epi32(x) }
        fn widen(x: __m512i) -> __m512 { _mm512_cvtepi32_ps(x) }
        fn bits(x: __m512) -> __m512i { _mm512_castps_si512(x) }
        fn float_from_bits(x: __m512i) -> __m512 { _mm512_castsi512_ps(x) }
        // vpdpbusd multiplies unsigned by signed: the weights are the unsigned side, 128 too large
        // each, and the offset takes 128 times the activations back.
        fn dot_start(offset: i32) -> __m512i { _mm512_set1_epi32(offset) }
        fn dot4(sum: __m512i, w: __m512i, a: i32) -> __m512i { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(a)) }
        fn dot4_small(sum: __m512i, w: __m512i, a: i32) -> __m512i { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(a)) }
        fn dot2(sum: __m512i, x: __m512i, a: i32) -> __m512i { _mm512_dpwssd_epi32(sum, x, _mm512_set1_epi32(a)) }
        fn dot_bf16(sum: __m512, w: __m512i, x: i32) -> __m512 {{
            let x = _mm512_set1_epi32(x);
            if BF16 {
                // Registers of 32 bf16, whatever their type says.
                let w = std::mem::transmute::<__m512i, __m512bh>(w);
                _mm512_dpbf16_ps(sum, w, std::mem::transmute::<__m512i, __m512bh>(x))
            } else {
                let upper = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
                let second = _mm512_castsi512_ps(_mm512_and_si512(x, upper));
                let sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, upper)), second, sum);
                let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
                _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)), first, sum)
            }
        }}
    }
}
