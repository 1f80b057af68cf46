//! The portable twin: sixteen lanes as an array. It is the definition the other instruction sets
//! are tested against.

use half::{bf16, f16};

use super::{LANES, Simd};

/// Always available.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scalar(());

impl Scalar {
    pub(crate) const fn new() -> Scalar {
        Scalar(())
    }
}

/// Weights as signed bytes, row by row as in memory.
#[derive(Clone, Copy)]
pub(crate) struct Weights([i8; 64]);

#[inline(always)]
fn zip<T: Copy>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn halve<T: Copy>(mut x: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            x[i] = f(x[i], x[i + half]);
        }
        half /= 2;
    }
    x[0]
}

// SAFETY: uses no instruction set.
unsafe impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type W = Weights;
    type P = [i8; 2 * LANES];
    type U = [u8; 64];
    /// First and second number of each row.
    type B = [[f32; LANES]; 2];

    const WIDE: bool = false;

    #[inline(always)]
    fn prefetch(self, _line: *const u8) {}
    #[inline(always)]
    fn prefetch_l2(self, _line: *const u8) {}
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F {
        x.map(f16::to_f32_const)
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn zero_below(self, x: Self::F, limit: f32, y: Self::F) -> Self::F {
        zip(x, y, |x, y| if x < limit { 0.0 } else { y })
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        halve(x, |a, b| a + b)
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        halve(x, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn swap1(self, x: Self::F) -> Self::F {
        std::array::from_fn(|i| x[i ^ 1])
    }
    #[inline(always)]
    fn swap2(self, x: Self::F) -> Self::F {
        std::array::from_fn(|i| x[i ^ 2])
    }
    #[inline(always)]
    fn swap4(self, x: Self::F) -> Self::F {
        std::array::from_fn(|i| x[i ^ 4])
    }
    #[inline(always)]
    fn swap8(self, x: Self::F) -> Self::F {
        std::array::from_fn(|i| x[i ^ 8])
    }
    #[inline(always)]
    fn load_i(self, x: &[i32; LANES]) -> Self::I {
        *x
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 64]) -> Self::I {
        std::array::from_fn(|i| i32::from_le_bytes(x.as_chunks::<4>().0[i]))
    }
    #[inline(always)]
    fn narrow(self, x: Self::I) -> [i32; 4] {
        std::array::from_fn(|word| {
            i32::from_le_bytes(std::array::from_fn(|i| x[4 * word + i] as i8 as u8))
        })
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn store_i(self, x: Self::I, to: &mut [i32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::max)
    }
    #[inline(always)]
    fn and_i(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shift_to_exponent(self, x: Self::I) -> Self::I {
        x.map(|x| x << 23)
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        x.map(|x| {
            let r = x.round_ties_even();
            // -2^31 fits, 2^31 does not; NaN fails both.
            if (-2_147_483_648.0..2_147_483_648.0).contains(&r) {
                r as i32
            } else {
                i32::MIN
            }
        })
    }
    #[inline(always)]
    fn widen(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn bits(self, x: Self::F) -> Self::I {
        x.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn float_from_bits(self, x: Self::I) -> Self::F {
        x.map(|x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    fn weights(self, w: &[u8; 64]) -> Weights {
        Weights(w.map(|w| (w ^ 0x80) as i8))
    }
    #[inline(always)]
    fn dot_start(self, _offset: i32) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn dot4(self, sum: Self::I, w: Weights, a: i32) -> Self::I {
        let a = a.to_le_bytes().map(|a| i32::from(a as i8));
        std::array::from_fn(|row| {
            let dot: i32 = (0..4).map(|i| i32::from(w.0[row * 4 + i]) * a[i]).sum();
            sum[row].wrapping_add(dot)
        })
    }
    #[inline(always)]
    fn load_u8(self, x: &[u8; LANES]) -> Self::F {
        x.map(f32::from)
    }
    #[inline(always)]
    fn nibbles(self, w: &[u8; 64]) -> [Self::U; 2] {
        [w.map(|w| w & 15), w.map(|w| w >> 4)]
    }
    #[inline(always)]
    fn dot4_small(self, sum: Self::I, w: Self::U, a: i32) -> Self::I {
        let a = a.to_le_bytes().map(|a| i32::from(a as i8));
        std::array::from_fn(|row| {
            let dot: i32 = (0..4).map(|i| i32::from(w[row * 4 + i]) * a[i]).sum();
            sum[row].wrapping_add(dot)
        })
    }
    #[inline(always)]
    fn pairs(self, x: &[i8; 2 * LANES]) -> Self::P {
        *x
    }
    #[inline(always)]
    fn dot2(self, sum: Self::I, x: Self::P, a: i32) -> Self::I {
        let (low, high) = (i32::from(a as i16), a >> 16);
        std::array::from_fn(|i| {
            let dot = i32::from(x[2 * i]) * low + i32::from(x[2 * i + 1]) * high;
            sum[i].wrapping_add(dot)
        })
    }
    #[inline(always)]
    fn bf16_pairs(self, w: &[u8; 64]) -> Self::B {
        let words = w.as_chunks::<4>().0;
        let number = |row: usize, at: usize| {
            bf16::from_le_bytes([words[row][2 * at], words[row][2 * at + 1]]).to_f32()
        };
        [0, 1].map(|at| std::array::from_fn(|row| number(row, at)))
    }
    #[inline(always)]
    fn dot_bf16(self, sum: Self::F, w: Self::B, x: i32) -> Self::F {
        let (first, second) = ((x << 16) as u32, x as u32 & 0xFFFF_0000);
        let sum = self.fma(w[1], self.splat(f32::from_bits(second)), sum);
        self.fma(w[0], self.splat(f32::from_bits(first)), sum)
    }
}
