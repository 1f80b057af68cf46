//! Every operation of every instruction set beside its scalar twin, on numbers that are chosen to be unkind.

use half::f16;

use super::{LANES, Simd, exp};
use crate::cpu::{Isa, Kernel};

/// What one round of operations works on.
struct Input {
    a: [f32; LANES],
    b: [f32; LANES],
    c: [f32; LANES],
    limit: f32,
    i: [i32; LANES],
    j: [i32; LANES],
    narrow: [i32; LANES],
    f16: [f16; LANES],
    bytes: [u8; 64],
    /// Four i8 each, never -128.
    int8: [i32; 8],
    pairs: [i8; 2 * LANES],
    /// Two i16.
    int16: i32,
    /// Numbers that bf16 products are defined for: neither they nor sums of their products are subnormal.
    bf16_sum: [f32; LANES],
    bf16_weights: [u8; 64],
    bf16_pair: i32,
}

/// Name and lanes of each result.
type Results = Vec<(&'static str, [i32; LANES])>;

struct All<'a>(&'a Input);

impl Kernel for All<'_> {
    type Output = Results;

    const BF16: bool = true;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> Results {
        let x = self.0;
        let mut results = Results::new();
        // Macros, because closures would be compiled without the instruction set.
        macro_rules! integers {
            ($name:literal, $result:expr) => {
                let mut lanes = [0; LANES];
                v.store_i($result, &mut lanes);
                results.push(($name, lanes));
            };
        }
        macro_rules! floats {
            ($name:literal, $result:expr) => {
                let mut lanes = [0.0; LANES];
                v.store($result, &mut lanes);
                results.push(($name, lanes.map(bits)));
            };
        }
        let (a, b, c) = (v.load(&x.a), v.load(&x.b), v.load(&x.c));
        floats!("splat", v.splat(x.limit));
        floats!("load_f16", v.load_f16(&x.f16));
        floats!("load_u8", v.load_u8(x.bytes.first_chunk().unwrap()));
        floats!("add", v.add(a, b));
        floats!("sub", v.sub(a, b));
        floats!("mul", v.mul(a, b));
        floats!("div", v.div(a, b));
        floats!("fma", v.fma(a, b, c));
        floats!("max", v.max(a, b));
        floats!("min", v.min(a, b));
        floats!("zero_below", v.zero_below(a, x.limit, b));
        floats!("sum", v.splat(v.sum(a)));
        floats!("largest", v.splat(v.largest(a)));
        floats!("swap1", v.swap1(a));
        floats!("swap2", v.swap2(a));
        floats!("swap4", v.swap4(a));
        floats!("swap8", v.swap8(a));
        floats!("exp", exp(v, a));
        let (i, j) = (v.load_i(&x.i), v.load_i(&x.j));
        integers!("splat_i", v.splat_i(x.int16));
        integers!("load_bytes", v.load_bytes(&x.bytes));
        integers!("add_i", v.add_i(i, j));
        integers!("max_i", v.max_i(i, j));
        integers!("and_i", v.and_i(i, j));
        integers!("shift_to_exponent", v.shift_to_exponent(i));
        integers!("round", v.round(a));
        integers!("bits", v.bits(a));
        floats!("widen", v.widen(i));
        floats!("float_from_bits", v.float_from_bits(i));
        let [p, q, r, s] = v.narrow(v.load_i(&x.narrow));
        let mut lanes = [0; LANES];
        lanes[..4].copy_from_slice(&[p, q, r, s]);
        results.push(("narrow", lanes));

        // A whole group, which is what is promised of int8.
        let total: i32 = (x.int8.iter().flat_map(|word| word.to_le_bytes()))
            .map(|byte| i32::from(byte as i8))
            .sum();
        let mut dot = v.dot_start(-128 * total);
        for word in x.int8 {
            dot = v.dot4(dot, v.weights(&x.bytes), word);
        }
        integers!("dot4", dot);
        let [lower, upper] = v.nibbles(&x.bytes);
        integers!("dot4_small, lower", v.dot4_small(i, lower, x.int8[0]));
        integers!("dot4_small, upper", v.dot4_small(i, upper, x.int8[1]));
        integers!("dot2", v.dot2(i, v.pairs(&x.pairs), x.int16));
        let w = v.bf16_pairs(&x.bf16_weights);
        floats!("dot_bf16", v.dot_bf16(v.load(&x.bf16_sum), w, x.bf16_pair));
        results
    }
}

/// The payload of a NaN is not promised.
fn bits(x: f32) -> i32 {
    if x.is_nan() { f32::NAN } else { x }.to_bits() as i32
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }

    /// Zeros of both signs, what lies at the edges of rounding and of ranges, or any bits at all.
    fn float(&mut self) -> f32 {
        const EDGES: &[f32] = &[
            0.0,
            1.0,
            0.5,
            1.5,
            2.5,
            88.0,
            87.3,
            103.9,
            f32::MIN_POSITIVE,
            1e-45,
            1e-39,
            f32::MAX,
            f32::INFINITY,
            f32::NAN,
            2_147_483_520.0,
            2_147_483_648.0,
            2_147_483_904.0,
            8_388_607.5,
            16_777_217.0,
        ];
        let x = match self.next() % 3 {
            0 => self.pick(EDGES),
            1 => (self.next() >> 40) as f32 / (1 << 20) as f32,
            _ => f32::from_bits(self.next() as u32),
        };
        if self.next().is_multiple_of(2) { x } else { -x }
    }

    fn integer(&mut self) -> i32 {
        let any = self.next() as i32;
        self.pick(&[0, 1, -1, 127, i32::MAX, i32::MIN, 16_777_217, any, any, any])
    }

    /// Between 2^-50 and 2^40 in magnitude, or zero: a number with no more bits than bf16 has.
    fn bf16(&mut self) -> u16 {
        let exponent = 127 - 50 + (self.next() % 90) as u16;
        let rest = self.next() as u16;
        let number = rest & 0x8000 | exponent << 7 | rest & 0x7F;
        self.pick(&[number, number, number, rest & 0x8000])
    }

    fn array<T, const N: usize>(&mut self, mut one: impl FnMut(&mut Random) -> T) -> [T; N] {
        std::array::from_fn(|_| one(self))
    }

    fn input(&mut self) -> Input {
        let no_less = |r: &mut Random| (r.next() as i8).max(-127) as u8;
        let pairs: [u16; 32] = self.array(Random::bf16);
        let mut bf16_weights = [0; 64];
        for (to, number) in bf16_weights.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
            *to = number.to_le_bytes();
        }
        Input {
            a: self.array(Random::float),
            b: self.array(Random::float),
            c: self.array(Random::float),
            limit: self.float(),
            i: self.array(Random::integer),
            j: self.array(Random::integer),
            narrow: self.array(|r| i32::from(r.next() as i8)),
            f16: self.array(|r| f16::from_bits(r.next() as u16)),
            bytes: self.array(|r| {
                let any = r.next() as u8;
                r.pick(&[0, 1, 127, 128, 255, any, any, any])
            }),
            int8: self.array(|r| i32::from_le_bytes(r.array(no_less))),
            pairs: self.array(|r| r.next() as i8),
            int16: self.next() as i32,
            bf16_sum: self.array(|r| f32::from_bits(u32::from(r.bf16()) << 16)),
            bf16_weights,
            bf16_pair: i32::from(self.bf16()) | i32::from(self.bf16()) << 16,
        }
    }
}

#[test]
fn every_operation_has_the_bits_of_its_scalar_twin() {
    let mut random = Random(77);
    for round in 0..2_000 {
        let input = random.input();
        let expected = Isa::SCALAR.dispatch(All(&input));
        for isa in Isa::available() {
            let found = isa.dispatch(All(&input));
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found, expected, "{isa}, round {round}");
            }
        }
    }
}

#[test]
fn every_half_number_is_widened_exactly() {
    let mut input = Random(78).input();
    for first in (0..=u16::MAX).step_by(LANES) {
        input.f16 = std::array::from_fn(|lane| f16::from_bits(first + lane as u16));
        let expected = input.f16.map(|x| bits(x.to_f32()));
        for isa in Isa::available() {
            let found = isa.dispatch(All(&input));
            let (_, widened) = found.iter().find(|(name, _)| *name == "load_f16").unwrap();
            assert_eq!(*widened, expected, "{isa}");
        }
    }
}
