//! What lies in memory for each encoding: a block of each of 32 rows, numbers that a product loads
//! together beside each other. As many bytes as in the file, but for Q4_K, whose scales and minima
//! take a byte each instead of six bits.
//!
//! ```text
//! Nibbles, 512 bytes, 32 rows by 32 columns; line 2 * step + half (step 0..4, half 0..2):
//!   row 16 * half + 0: 4 bytes | row 16 * half + 1: 4 bytes | ... | row 16 * half + 15
//!   lower halves: columns 4 * step .. 4 * step + 4; upper halves: those of 16 more
//!
//! Q4_0,  576 bytes:   0 32 x f16 d |  64 Nibbles
//! Q4_1,  640 bytes:   0 32 x f16 d |  64 32 x f16 m    | 128 Nibbles
//! Q4_K, 4736 bytes:   0 32 x f16 d |  64 32 x f16 dmin | 128 8 x ( 32 x u8 scale | 32 x u8 minimum | Nibbles )
//! ```

use half::f16;

use crate::isa::{LANES, Simd};
use crate::mem::Element;
use crate::oblivious::Lanes;
use crate::q8::{GROUP, Packed, RowGroup, TILE, add, ask, halves};

/// See [`ask`]: unpacking makes lines come more slowly than those of 8 bits.
const FEW: usize = 1;

/// A block of a file's rows, packed.
pub(super) trait Block: Packed {
    /// Whose its lines are.
    const LANES: &'static [Lanes];
    /// Bytes of one row's block in the file.
    const BYTES: usize;

    /// Takes a row's block of `BYTES` bytes; false if a number in it is not finite.
    fn put(&mut self, lane: usize, block: &[u8]) -> bool;

    /// Writes a row's weights, the `32 * GROUPS` numbers that the file means.
    fn row(&self, lane: usize, out: &mut [f32]);
}

/// See the module's drawing.
#[derive(Clone, Copy)]
#[repr(C)]
struct Nibbles([[u8; 64]; 8]);

impl Nibbles {
    /// Takes a row's 16 bytes: weight i in the lower half of byte i, weight i + 16 in the upper.
    fn put(&mut self, lane: usize, bytes: &[u8; 16]) {
        for (step, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
            self.0[2 * step + lane / 16].as_chunks_mut::<4>().0[lane % 16] = *four;
        }
    }

    fn row(&self, lane: usize) -> [u8; GROUP] {
        std::array::from_fn(|i| {
            let byte = self.0[i % 16 / 4 * 2 + lane / 16][lane % 16 * 4 + i % 4];
            if i < 16 { byte & 15 } else { byte >> 4 }
        })
    }

    /// See [`Packed::dots`], from the sums given.
    #[inline(always)]
    fn dots<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        half: usize,
        x: [&RowGroup; M],
        mut dots: [[V::I; N]; M],
    ) -> [[V::I; N]; M] {
        for step in 0..4 {
            for n in 0..N {
                let line = &self.0[2 * step + half + n];
                ask::<V, M, FEW>(v, line.as_ptr());
                let [lower, upper] = v.nibbles(line);
                for i in 0..M {
                    dots[i][n] = v.dot4_small(dots[i][n], lower, x[i].quants[step]);
                    dots[i][n] = v.dot4_small(dots[i][n], upper, x[i].quants[step + 4]);
                }
            }
        }
        dots
    }
}

fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

fn nibbles_at(block: &[u8], at: usize) -> &[u8; 16] {
    block[at..]
        .first_chunk()
        .expect("a block ends with nibbles")
}

/// 32 rows by 32 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Q4_0 {
    d: [f16; TILE],
    nibbles: Nibbles,
}

const _: () = assert!(size_of::<Q4_0>() == 576);

// SAFETY: f16 and bytes, 64 + 512 without padding, any bits, alignment 64.
unsafe impl Element for Q4_0 {}

impl Packed for Q4_0 {
    const GROUPS: usize = 1;

    #[inline(always)]
    fn dots<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (_, half): (usize, usize),
        x: [&RowGroup; M],
    ) -> [[V::I; N]; M] {
        ask::<V, M, FEW>(v, self.d.as_ptr().cast());
        let mut dots = [[v.splat_i(0); N]; M];
        for i in 0..M {
            // -8 times the sum of the activations.
            dots[i] = [v.splat_i(x[i].offset >> 4); N];
        }
        self.nibbles.dots(v, half, x, dots)
    }

    #[inline(always)]
    fn add<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (_, half): (usize, usize),
        x: [&RowGroup; M],
        dots: [[V::I; N]; M],
        sums: [[V::F; N]; M],
    ) -> [[V::F; N]; M] {
        add(v, x, dots, halves(v, &self.d, half), None, sums)
    }
}

/// Whose the lines of [`Nibbles`] are.
const NIBBLES: [Lanes; 8] = [
    Lanes::First,
    Lanes::Second,
    Lanes::First,
    Lanes::Second,
    Lanes::First,
    Lanes::Second,
    Lanes::First,
    Lanes::Second,
];

/// The lines of a block: `head` and then nibbles, over and over but for the first `once` of them.
const fn lanes<const N: usize>(head: &[Lanes], once: usize) -> [Lanes; N] {
    let mut lanes = [Lanes::Halves; N];
    let mut line = 0;
    while line < once {
        lanes[line] = head[line];
        line += 1;
    }
    while line < N {
        let period = head.len() - once + NIBBLES.len();
        let at = (line - once) % period;
        lanes[line] = match at < head.len() - once {
            true => head[once + at],
            false => NIBBLES[at - (head.len() - once)],
        };
        line += 1;
    }
    lanes
}

impl Block for Q4_0 {
    const LANES: &'static [Lanes] = &lanes::<9>(&[Lanes::Halves], 1);
    const BYTES: usize = 18;

    fn put(&mut self, lane: usize, block: &[u8]) -> bool {
        self.d[lane] = half_at(block, 0);
        self.nibbles.put(lane, nibbles_at(block, 2));
        self.d[lane].is_finite()
    }

    fn row(&self, lane: usize, out: &mut [f32]) {
        let d = self.d[lane].to_f32();
        for (out, n) in out.iter_mut().zip(self.nibbles.row(lane)) {
            *out = d * (f32::from(n) - 8.0);
        }
    }
}

/// 32 rows by 32 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Q4_1 {
    d: [f16; TILE],
    m: [f16; TILE],
    nibbles: Nibbles,
}

const _: () = assert!(size_of::<Q4_1>() == 640);

// SAFETY: f16 and bytes, 128 + 512 without padding, any bits, alignment 64.
unsafe impl Element for Q4_1 {}

impl Packed for Q4_1 {
    const GROUPS: usize = 1;

    #[inline(always)]
    fn dots<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (_, half): (usize, usize),
        x: [&RowGroup; M],
    ) -> [[V::I; N]; M] {
        ask::<V, M, FEW>(v, self.d.as_ptr().cast());
        ask::<V, M, FEW>(v, self.m.as_ptr().cast());
        let dots = [[v.splat_i(0); N]; M];
        self.nibbles.dots(v, half, x, dots)
    }

    #[inline(always)]
    fn add<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (_, half): (usize, usize),
        x: [&RowGroup; M],
        dots: [[V::I; N]; M],
        sums: [[V::F; N]; M],
    ) -> [[V::F; N]; M] {
        let offsets = Some(halves(v, &self.m, half));
        add(v, x, dots, halves(v, &self.d, half), offsets, sums)
    }
}

impl Block for Q4_1 {
    const LANES: &'static [Lanes] = &lanes::<10>(&[Lanes::Halves, Lanes::Halves], 2);
    const BYTES: usize = 20;

    fn put(&mut self, lane: usize, block: &[u8]) -> bool {
        (self.d[lane], self.m[lane]) = (half_at(block, 0), half_at(block, 2));
        self.nibbles.put(lane, nibbles_at(block, 4));
        self.d[lane].is_finite() && self.m[lane].is_finite()
    }

    fn row(&self, lane: usize, out: &mut [f32]) {
        let (d, m) = (self.d[lane].to_f32(), self.m[lane].to_f32());
        for (out, n) in out.iter_mut().zip(self.nibbles.row(lane)) {
            *out = d * f32::from(n) + m;
        }
    }
}

/// 32 rows by 32 of a block's 256 columns.
#[derive(Clone, Copy)]
#[repr(C)]
struct Eighth {
    scales: [u8; TILE],
    minima: [u8; TILE],
    nibbles: Nibbles,
}

/// 32 rows by 256 columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Q4K {
    d: [f16; TILE],
    dmin: [f16; TILE],
    eighths: [Eighth; 8],
}

const _: () = assert!(size_of::<Q4K>() == 128 + 8 * 576);

// SAFETY: f16 and bytes, 128 + 8 * (64 + 512) without padding, any bits, alignment 64.
unsafe impl Element for Q4K {}

impl Packed for Q4K {
    const GROUPS: usize = 8;

    #[inline(always)]
    fn dots<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (group, half): (usize, usize),
        x: [&RowGroup; M],
    ) -> [[V::I; N]; M] {
        if group == 0 {
            ask::<V, M, FEW>(v, self.d.as_ptr().cast());
            ask::<V, M, FEW>(v, self.dmin.as_ptr().cast());
        }
        let eighth = &self.eighths[group];
        ask::<V, M, FEW>(v, eighth.scales.as_ptr());
        let dots = [[v.splat_i(0); N]; M];
        eighth.nibbles.dots(v, half, x, dots)
    }

    #[inline(always)]
    fn add<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (group, half): (usize, usize),
        x: [&RowGroup; M],
        dots: [[V::I; N]; M],
        sums: [[V::F; N]; M],
    ) -> [[V::F; N]; M] {
        let eighth = &self.eighths[group];
        let mut scales: [V::F; N] = halves(v, &self.d, half);
        let mut offsets: [V::F; N] = halves(v, &self.dmin, half);
        for n in 0..N {
            let scale = v.load_u8(&eighth.scales.as_chunks::<LANES>().0[half + n]);
            let minimum = v.load_u8(&eighth.minima.as_chunks::<LANES>().0[half + n]);
            scales[n] = v.mul(scales[n], scale);
            offsets[n] = v.sub(v.splat(0.0), v.mul(offsets[n], minimum));
        }
        add(v, x, dots, scales, Some(offsets), sums)
    }
}

impl Block for Q4K {
    // Scales and minima of a byte, with each eighth of the columns.
    const LANES: &'static [Lanes] = &lanes::<74>(&[Lanes::Halves, Lanes::Halves, Lanes::Bytes], 2);
    const BYTES: usize = 144;

    fn put(&mut self, lane: usize, block: &[u8]) -> bool {
        (self.d[lane], self.dmin[lane]) = (half_at(block, 0), half_at(block, 2));
        let (packed, quants) = block[4..].split_at(12);
        for (g, eighth) in self.eighths.iter_mut().enumerate() {
            // Six bits each: the first four in the low bits of bytes g and g + 4, the others split
            // over byte g + 4 and the high bits of the first eight.
            (eighth.scales[lane], eighth.minima[lane]) = if g < 4 {
                (packed[g] & 63, packed[g + 4] & 63)
            } else {
                (
                    (packed[g + 4] & 15) | (packed[g - 4] >> 6 << 4),
                    (packed[g + 4] >> 4) | (packed[g] >> 6 << 4),
                )
            };
            // Two groups share 32 bytes in the file: the even one has the lower halves.
            let shared = &quants[g / 2 * 32..][..32];
            let nibble = |i: usize| shared[i] >> (g % 2 * 4) & 15;
            let bytes = std::array::from_fn(|i| nibble(i) | nibble(i + 16) << 4);
            eighth.nibbles.put(lane, &bytes);
        }
        self.d[lane].is_finite() && self.dmin[lane].is_finite()
    }

    fn row(&self, lane: usize, out: &mut [f32]) {
        let (d, dmin) = (self.d[lane].to_f32(), self.dmin[lane].to_f32());
        for (eighth, out) in self.eighths.iter().zip(out.chunks_mut(GROUP)) {
            let scale = d * f32::from(eighth.scales[lane]);
            let minimum = dmin * f32::from(eighth.minima[lane]);
            for (out, n) in out.iter_mut().zip(eighth.nibbles.row(lane)) {
                *out = scale * f32::from(n) - minimum;
            }
        }
    }
}
