//! Rotation of rows before they are quantised: an orthogonal change of basis that spreads outliers
//! over many columns. A product of two rows that were both rotated is the product of the rows.
//!
//! ```text
//! apply:   y = H (d * x)          d[k] = +n or -n, n = 1 / sqrt(block)
//! invert:  x = d * (H y)          H: Walsh-Hadamard matrix of each block of consecutive columns
//! ```
//! A block is the largest power of two that divides the width. The signs of `d` are the bits of
//! SplitMix64 seeded with the width: the sign of column `k` is minus where bit `k % 64` of output
//! `k / 64` is set. H is computed in `log2(block)` stages, the stage of stride 1 first, each taking
//! columns `i` and `i + stride` to their sum and difference: so many additions and one
//! multiplication an element, always in this order, so the same bits on every instruction set.

use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd, load_part, store_part};

/// The rotation of rows of one width.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    block: usize,
    /// Signs and normalisation, one a column.
    diagonal: Vec<f32>,
}

impl Rotation {
    /// The rotation of this width.
    ///
    /// # Panics
    /// If the width is 0.
    #[must_use]
    pub fn new(width: usize) -> Rotation {
        assert!(width > 0, "a row has at least one column");
        let block = 1 << width.trailing_zeros();
        let norm = (1.0 / (block as f64).sqrt()) as f32;
        let mut state = width as u64;
        let mut word = 0;
        let diagonal = (0..width)
            .map(|column| {
                if column % 64 == 0 {
                    word = split_mix(&mut state);
                }
                if word >> (column % 64) & 1 == 1 {
                    -norm
                } else {
                    norm
                }
            })
            .collect();
        Rotation { block, diagonal }
    }

    /// Columns of a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.diagonal.len()
    }

    /// Rotates a row.
    ///
    /// # Panics
    /// If `row` is of another width.
    pub fn apply(&self, isa: Isa, row: &mut [f32]) {
        self.check(row.len());
        multiply(isa, &self.diagonal, row);
        isa.dispatch(Stages {
            row,
            block: self.block,
        });
    }

    /// [`Rotation::apply`] as a part of another kernel.
    #[inline(always)]
    pub(crate) fn apply_with<V: Simd>(&self, v: V, row: &mut [f32]) {
        self.check(row.len());
        Multiply(&self.diagonal, row).run(v);
        Stages {
            row,
            block: self.block,
        }
        .run(v);
    }

    /// Writes the rotated `row` to `out`, with the same bits as [`Rotation::apply`].
    ///
    /// # Panics
    /// If `row` or `out` is of another width.
    pub fn apply_to(&self, isa: Isa, row: &[f32], out: &mut [f32]) {
        self.check(row.len());
        self.check(out.len());
        isa.dispatch(Apply {
            diagonal: &self.diagonal,
            row,
            out,
            block: self.block,
        });
    }

    /// Undoes [`Rotation::apply`], up to rounding.
    ///
    /// # Panics
    /// If `row` is of another width.
    pub fn invert(&self, isa: Isa, row: &mut [f32]) {
        self.check(row.len());
        isa.dispatch(Stages {
            row,
            block: self.block,
        });
        multiply(isa, &self.diagonal, row);
    }

    fn check(&self, columns: usize) {
        assert_eq!(columns, self.width(), "the row is of another width");
    }
}

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn multiply(isa: Isa, factors: &[f32], row: &mut [f32]) {
    isa.dispatch(Multiply(factors, row));
}

struct Multiply<'a>(&'a [f32], &'a mut [f32]);

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let (factors, factors_rest) = self.0.as_chunks::<LANES>();
        let (row, row_rest) = self.1.as_chunks_mut::<LANES>();
        for (factors, x) in factors.iter().zip(row) {
            v.store(v.mul(v.load(x), v.load(factors)), x);
        }
        let product = v.mul(load_part(v, row_rest), load_part(v, factors_rest));
        store_part(v, product, row_rest);
    }
}

/// Diagonal and all stages, from one row to another.
struct Apply<'a> {
    diagonal: &'a [f32],
    row: &'a [f32],
    out: &'a mut [f32],
    block: usize,
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let (full, rest) = self.out.as_chunks_mut::<LANES>();
        let (row, row_rest) = self.row.as_chunks::<LANES>();
        let (diagonal, diagonal_rest) = self.diagonal.as_chunks::<LANES>();
        for ((x, d), out) in row.iter().zip(diagonal).zip(full.iter_mut()) {
            let x = v.mul(v.load(x), v.load(d));
            v.store(lanes(v, x, self.block), out);
        }
        if !rest.is_empty() {
            let x = v.mul(load_part(v, row_rest), load_part(v, diagonal_rest));
            store_part(v, lanes(v, x, self.block), rest);
        }
        wide_stages(v, full, self.block);
    }
}

/// All stages of the Walsh-Hadamard matrix in each block of a row.
struct Stages<'a> {
    row: &'a mut [f32],
    block: usize,
}

impl Kernel for Stages<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let (full, rest) = self.row.as_chunks_mut::<LANES>();
        for x in full.iter_mut() {
            v.store(lanes(v, v.load(x), self.block), x);
        }
        // The zeros after a row's end are blocks of their own.
        if !rest.is_empty() {
            let x = lanes(v, load_part(v, rest), self.block);
            store_part(v, x, rest);
        }
        wide_stages(v, full, self.block);
    }
}

/// The stages of strides from sixteen on, three at a time: eight vectors are loaded and stored once
/// for three stages.
#[inline(always)]
fn wide_stages<V: Simd>(v: V, row: &mut [[f32; LANES]], block: usize) {
    let vectors = block / LANES;
    if vectors < 2 {
        return;
    }
    for block in row.chunks_exact_mut(vectors) {
        let mut stride = 1;
        while stride < vectors {
            stride *= match vectors / stride {
                2 => stages::<V, 2>(v, block, stride),
                4 => stages::<V, 4>(v, block, stride),
                _ => stages::<V, 8>(v, block, stride),
            }
        }
    }
}

/// The stages of strides 1 to 8, as far as they lie within a block.
#[inline(always)]
fn lanes<V: Simd>(v: V, mut x: V::F, block: usize) -> V::F {
    // One rounding each: a product with 1 or -1 is exact.
    if block > 1 {
        x = v.fma(x, v.load(&signs(1)), v.swap1(x));
    }
    if block > 2 {
        x = v.fma(x, v.load(&signs(2)), v.swap2(x));
    }
    if block > 4 {
        x = v.fma(x, v.load(&signs(4)), v.swap4(x));
    }
    if block > 8 {
        x = v.fma(x, v.load(&signs(8)), v.swap8(x));
    }
    x
}

/// -1 in the lanes that a stage of this stride subtracts.
const fn signs(stride: usize) -> [f32; LANES] {
    let mut signs = [1.0; LANES];
    let mut lane = 0;
    while lane < LANES {
        if lane & stride != 0 {
            signs[lane] = -1.0;
        }
        lane += 1;
    }
    signs
}

/// The stages of strides `stride` to `stride * N / 2` vectors; returns N.
#[inline(always)]
fn stages<V: Simd, const N: usize>(v: V, block: &mut [[f32; LANES]], stride: usize) -> usize {
    for group in block.chunks_exact_mut(stride * N) {
        for at in 0..stride {
            let mut x = [v.splat(0.0); N];
            for i in 0..N {
                x[i] = v.load(&group[at + i * stride]);
            }
            let mut half = 1;
            while half < N {
                for i in 0..N {
                    if i & half == 0 {
                        (x[i], x[i + half]) = (v.add(x[i], x[i + half]), v.sub(x[i], x[i + half]));
                    }
                }
                half *= 2;
            }
            for i in 0..N {
                v.store(x[i], &mut group[at + i * stride]);
            }
        }
    }
    N
}
