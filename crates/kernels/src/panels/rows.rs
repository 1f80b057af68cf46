//! Activations quantised to int8, one scale a row.
//!
//! Rows are dealt into blocks as high as the product holds in registers, and a block is stored
//! column by column, so that its addresses are consecutive:
//!
//! ```text
//! block of h rows, step k:  row 0: columns 4k .. 4k+4 | row 1: the same columns | ... | row h-1      4 x i8 each
//! ```

use crate::cpu::Kernel;
use crate::isa::{LANES, Simd, load_part};
use crate::mem::{Purpose, Region};
use crate::rotate::Rotation;
use crate::team::{SharedMut, Team};

use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows whose largest magnitude is below this are zero.
pub(super) const TINY: f32 = 1e-30;

/// Most rows that are multiplied with one pass over the weights: on wide machines (32 registers)
/// each panel by itself takes up to 24, three at once take 8 each.
const ONE_PASS: usize = 24;
const WIDE_BLOCK: usize = 8;
const NARROW_BLOCK: usize = 4;

/// Rows of each block but the last, for so many rows.
fn block_height(rows: usize, wide: bool) -> usize {
    let most = match (wide, rows) {
        (true, ..=ONE_PASS) => ONE_PASS,
        (true, _) => WIDE_BLOCK,
        (false, _) => NARROW_BLOCK,
    };
    // Of nearly equal height: 9 rows in blocks of 8 are 5 + 4, not 8 + 1.
    rows.div_ceil(rows.div_ceil(most).max(1))
}

/// A reusable buffer of quantised rows, all of one length.
///
/// scale = largest magnitude of the row / 127; quant = nearest integer to `x * (1 / scale)`, ties to
/// even, so from -127 to 127. A row whose largest magnitude is below 1e-30 is zero; a row with a NaN
/// or an infinity gets a NaN scale, so that it shows in the product instead of vanishing.
pub struct Int8Rows {
    /// Four i8 a word, the first in the lowest byte; zeros after the last column.
    words: Region,
    scales: Region,
    /// `-128 * sum of the row's quants`: what undoes the offset of the weights.
    offsets: Region,
    /// For each member a row to rotate in.
    scratch: Region,
    columns: usize,
    rows: usize,
    height: usize,
}

impl Int8Rows {
    /// Room for `capacity` rows of `columns` elements; [`Int8Rows::quantise`] grows it if more come.
    ///
    /// # Panics
    /// If the operating system refuses the memory, as any vector would.
    pub fn with_capacity(capacity: usize, columns: usize) -> Int8Rows {
        Int8Rows {
            words: reserve(capacity.saturating_mul(columns.div_ceil(4))),
            scales: reserve(capacity),
            offsets: reserve(capacity),
            scratch: Region::default(),
            columns,
            rows: 0,
            height: 1,
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
            columns > 0 && x.len().is_multiple_of(columns),
            "{} is not a number of rows of {columns}",
            x.len()
        );
        assert!(
            rotation.is_none_or(|rotation| rotation.width() == columns),
            "the rotation is of another width than {columns}"
        );
        let rows = x.len() / columns;
        let isa = team.isa();
        (self.columns, self.rows) = (columns, rows);
        self.height = block_height(rows, isa.wide());
        let lines = columns.div_ceil(4);
        grow(&mut self.words, rows * lines);
        grow(&mut self.scales, rows);
        grow(&mut self.offsets, rows);
        let scratch_row = columns.next_multiple_of(LANES);
        grow(&mut self.scratch, team.members() * scratch_row);
        let scales = SharedMut::new(self.scales.as_f32_mut());
        let offsets = SharedMut::new(self.offsets.view_mut::<i32>());
        let scratch = SharedMut::new(self.scratch.as_f32_mut());
        let height = self.height;
        let block = |rotated: &mut [f32], block: usize, words: &mut [i32]| {
            let first = block * height;
            let height = words.len() / lines;
            for i in 0..height {
                let row = first + i;
                let mut x = &x[row * columns..(row + 1) * columns];
                if let Some(rotation) = rotation {
                    rotation.apply_to(isa, x, &mut rotated[..columns]);
                    x = &rotated[..columns];
                }
                let (scale, offset) = isa.dispatch(Quantise {
                    x,
                    words: &mut words[i..],
                    stride: height,
                });
                // SAFETY: each row lies in one block, and each block is one member's.
                unsafe {
                    scales.slice(row, 1)[0] = scale;
                    offsets.slice(row, 1)[0] = offset;
                }
            }
        };
        let words = &mut self.words.view_mut::<i32>()[..rows * lines];
        // Waking the team costs more than quantising a handful of rows.
        const WORTH_SHARING: usize = 1 << 14;
        let next = AtomicUsize::new(0);
        let own = || {
            let member = next.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the counter hands each place out once, and a run asks at most once for each
            // member of the team.
            unsafe { scratch.slice(member * scratch_row, scratch_row) }
        };
        if rows == 0 {
        } else if x.len() < WORTH_SHARING {
            let rotated = own();
            for (i, words) in words.chunks_mut(height * lines).enumerate() {
                block(rotated, i, words);
            }
        } else {
            team.for_each_chunk_mut_with(words, height * lines, own, |rotated, i, words| {
                block(rotated, i, words)
            });
        }
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Writes row `row` as it is quantised and returns its scale.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [i8]) -> f32 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(
            out.len(),
            self.columns,
            "a row has as many elements as there are columns"
        );
        let block = row / self.height;
        let (words, height) = self.block(block);
        let words = words[row % self.height..].iter().step_by(height);
        for (out, word) in out.chunks_mut(4).zip(words) {
            for (out, q) in out.iter_mut().zip(word.to_le_bytes()) {
                *out = q as i8;
            }
        }
        self.scales()[row]
    }

    /// Rows of each block but the last.
    pub(super) fn height(&self) -> usize {
        self.height
    }

    /// A block and its height.
    pub(super) fn block(&self, block: usize) -> (&[i32], usize) {
        let lines = self.columns.div_ceil(4);
        let height = self.height.min(self.rows - block * self.height);
        let words = &self.words.view::<i32>()[block * self.height * lines..][..height * lines];
        (words, height)
    }

    pub(super) fn scales(&self) -> &[f32] {
        &self.scales.as_f32()[..self.rows]
    }

    pub(super) fn offsets(&self) -> &[i32] {
        &self.offsets.view::<i32>()[..self.rows]
    }
}

/// Room for so many words. Activations are prompts in another form, so they lie where dumps and swap
/// do not reach.
fn reserve(words: usize) -> Region {
    Region::zeroed(words.saturating_mul(4), Purpose::State).expect("memory for activations")
}

fn grow(region: &mut Region, words: usize) {
    if region.len() / 4 < words {
        *region = reserve(words);
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
