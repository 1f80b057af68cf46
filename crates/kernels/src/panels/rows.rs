//! Activations quantised to int8, one scale a row, four to a word.

use crate::cpu::Kernel;
use crate::isa::{LANES, Simd, load_part};
use crate::mem::Region;
use crate::rotate::Rotation;
use crate::team::{SharedMut, Team};

use super::blocks::{Blocks, grow, reserve, row_count};

use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows whose largest magnitude is below this are zero.
pub(super) const TINY: f32 = 1e-30;

/// Columns of a row in a word.
pub(super) const WORD: usize = 4;

/// A reusable buffer of quantised rows, all of one length.
///
/// scale = largest magnitude of the row / 127; quant = nearest integer to `x * (1 / scale)`, ties to
/// even, so from -127 to 127. A row whose largest magnitude is below 1e-30 is zero; a row with a NaN
/// or an infinity gets a NaN scale, so that it shows in the product instead of vanishing.
pub struct Int8Rows {
    /// Four i8 a word, the first in the lowest byte.
    blocks: Blocks,
    scales: Region,
    /// `-128 * sum of the row's quants`: what undoes the offset of the weights.
    offsets: Region,
    /// For each member a row to rotate in.
    scratch: Region,
}

impl Int8Rows {
    /// Room for `capacity` rows of `columns` elements; [`Int8Rows::quantise`] grows it if more come.
    ///
    /// # Panics
    /// If the operating system refuses the memory, as any vector would.
    pub fn with_capacity(capacity: usize, columns: usize) -> Int8Rows {
        Int8Rows {
            blocks: Blocks::with_capacity(capacity, columns, WORD),
            scales: reserve(capacity),
            offsets: reserve(capacity),
            scratch: Region::default(),
        }
    }

    /// Replaces the contents by `x`, row-major, `x.len() / columns` rows, each rotated first if a
    /// rotation is given. Allocates only beyond the capacity and at the first rotation.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `columns` elements, or the rotation is of another
    /// width.
    pub fn quantise(
        &mut self,
        team: &Team,
        x: &[f32],
        columns: usize,
        rotation: Option<&Rotation>,
    ) {
        assert!(
            rotation.is_none_or(|rotation| rotation.width() == columns),
            "the rotation is of another width than {columns}"
        );
        let rows = row_count(x, columns);
        let isa = team.isa();
        grow(&mut self.scales, rows);
        grow(&mut self.offsets, rows);
        let scratch_row = columns.next_multiple_of(LANES);
        grow(&mut self.scratch, team.members() * scratch_row);
        let scales = SharedMut::new(self.scales.as_f32_mut());
        let offsets = SharedMut::new(self.offsets.view_mut::<i32>());
        let scratch = SharedMut::new(self.scratch.as_f32_mut());
        let next = AtomicUsize::new(0);
        let own = || {
            let member = next.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the counter hands each place out once, and a run asks at most once for each
            // member of the team.
            unsafe { scratch.slice(member * scratch_row, scratch_row) }
        };
        let write = |rotated: &mut &mut [f32], row: usize, x: &[f32], words: &mut [i32], stride| {
            let mut x = x;
            if let Some(rotation) = rotation {
                rotation.apply_to(isa, x, &mut rotated[..columns]);
                x = &rotated[..columns];
            }
            let (scale, offset) = isa.dispatch(Quantise { x, words, stride });
            // SAFETY: each row lies in one block, and each block is one member's.
            unsafe {
                scales.slice(row, 1)[0] = scale;
                offsets.slice(row, 1)[0] = offset;
            }
        };
        self.blocks.write(team, x, columns, own, write);
    }

    /// Replaces the contents by integers that somebody else made, row-major, `quants.len() / columns`
    /// rows, each with scale 1. They reach from -127 to 127, as weights do. Allocates only beyond the
    /// capacity.
    ///
    /// # Panics
    /// If `quants` is not a whole number of rows of `columns` elements, or holds -128.
    pub fn assign(&mut self, team: &Team, quants: &[i8], columns: usize) {
        let rows = row_count(quants, columns);
        grow(&mut self.scales, rows);
        grow(&mut self.offsets, rows);
        self.scales.as_f32_mut()[..rows].fill(1.0);
        let offsets = SharedMut::new(self.offsets.view_mut::<i32>());
        let write = |(): &mut (), row: usize, quants: &[i8], words: &mut [i32], stride: usize| {
            assert!(
                quants.iter().fold(true, |fine, q| fine & (*q != -128)),
                "integers reach from -127 to 127"
            );
            let (full, rest) = quants.as_chunks::<WORD>();
            let mut last = [0; WORD];
            last[..rest.len()].copy_from_slice(rest);
            let quads = full.iter().chain((!rest.is_empty()).then_some(&last));
            for (word, quad) in words.iter_mut().step_by(stride).zip(quads) {
                *word = i32::from_le_bytes(quad.map(|q| q as u8));
            }
            let sum: i32 = quants.iter().map(|q| i32::from(*q)).sum();
            // SAFETY: each row lies in one block, and each block is one member's.
            unsafe { offsets.slice(row, 1)[0] = sum.wrapping_mul(-128) };
        };
        self.blocks.write(team, quants, columns, || (), write);
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.blocks.rows()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.blocks.columns()
    }

    /// Writes row `row` as it is quantised and returns its scale.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [i8]) -> f32 {
        let words = self.blocks.row(row, out.len());
        for (out, word) in out.chunks_mut(WORD).zip(words) {
            for (out, q) in out.iter_mut().zip(word.to_le_bytes()) {
                *out = q as i8;
            }
        }
        self.scales()[row]
    }

    pub(super) fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    pub(super) fn scales(&self) -> &[f32] {
        &self.scales.as_f32()[..self.rows()]
    }

    pub(super) fn offsets(&self) -> &[i32] {
        &self.offsets.view::<i32>()[..self.rows()]
    }
}

/// Largest magnitude of a row. Compared as integers, NaN comes above infinity and infinity above
/// every number.
#[inline(always)]
pub(super) fn largest_magnitude<V: Simd>(v: V, x: &[f32]) -> f32 {
    let magnitude = v.splat_i(0x7FFF_FFFF);
    let (full, rest) = x.as_chunks::<LANES>();
    let (pairs, odd) = full.as_chunks::<2>();
    let mut largest = [v.splat_i(0); 2];
    for [a, b] in pairs {
        largest[0] = v.max_i(largest[0], v.and_i(v.bits(v.load(a)), magnitude));
        largest[1] = v.max_i(largest[1], v.and_i(v.bits(v.load(b)), magnitude));
    }
    for x in odd {
        largest[0] = v.max_i(largest[0], v.and_i(v.bits(v.load(x)), magnitude));
    }
    let rest = v.and_i(v.bits(load_part(v, rest)), magnitude);
    let mut lanes = [0; LANES];
    v.store_i(v.max_i(v.max_i(largest[0], largest[1]), rest), &mut lanes);
    f32::from_bits(lanes.iter().fold(0, |a, b| a.max(*b)) as u32)
}

/// Quantises a row into every `stride`-th of `words`; returns its scale and its offset.
struct Quantise<'a> {
    x: &'a [f32],
    words: &'a mut [i32],
    stride: usize,
}

impl Kernel for Quantise<'_> {
    type Output = (f32, i32);

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> (f32, i32) {
        let largest = largest_magnitude(v, self.x);
        if !(TINY..=f32::MAX).contains(&largest) {
            for word in self.words.iter_mut().step_by(self.stride) {
                *word = 0;
            }
            let scale = if largest < TINY { 0.0 } else { f32::NAN };
            return (scale, 0);
        }
        let scale = largest / 127.0;
        let inverse = v.splat(1.0 / scale);
        let mut sums = v.splat_i(0);
        let (full, rest) = self.x.as_chunks::<LANES>();
        let mut at = 0;
        for x in full {
            // |x / scale| <= 127 up to rounding, so every quant fits an i8 and none is -128.
            let quants = v.round(v.mul(v.load(x), inverse));
            sums = v.add_i(sums, quants);
            for word in v.narrow(quants) {
                self.words[at] = word;
                at += self.stride;
            }
        }
        if !rest.is_empty() {
            let quants = v.round(v.mul(load_part(v, rest), inverse));
            sums = v.add_i(sums, quants);
            let words = v.narrow(quants);
            for word in &words[..rest.len().div_ceil(4)] {
                self.words[at] = *word;
                at += self.stride;
            }
        }
        let mut lanes = [0; LANES];
        v.store_i(sums, &mut lanes);
        let sum: i32 = lanes.iter().sum();
        (scale, sum.wrapping_mul(-128))
    }
}
