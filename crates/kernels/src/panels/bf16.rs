//! Weights and activations in bf16, two to a word.

use std::io;

use half::bf16;
use zeroize::Zeroizing;

use super::PANEL;
use super::blocks::Blocks;
use super::packed::{Line, Panels};
use crate::cpu::Kernel;
use crate::isa::Simd;
use crate::mem::Region;
use crate::oblivious::{Found, Lanes, Table};
use crate::pack::PackError;
use crate::team::Team;

/// Columns of a row in a word.
const WORD: usize = 2;

/// Numbers of smaller magnitude are zero, 2^-56 as bits of an f32. A bf16 that is not is a multiple of
/// 2^-63, so every product is one of 2^-126, and so is every sum of products, rounded or not: either
/// zero or at least the smallest normal f32. Therefore it makes no difference what an instruction
/// does with subnormal numbers.
const SMALLEST: u32 = (127 - 56) << 23;

/// The bf16 of a number as its upper half, rounded to nearest even; zero below 2^-56.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    // A NaN stays one, though its lower bits go.
    let rounded = if magnitude > 0x7F80_0000 {
        bits >> 16 | 0x40
    } else {
        rounded
    };
    if (rounded & 0x7FFF) << 16 < SMALLEST {
        0
    } else {
        rounded
    }
}

/// Rounds a row into every `stride`-th of `words`, two numbers each.
struct Round<'a> {
    x: &'a [f32],
    words: &'a mut [i32],
    stride: usize,
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, _: V) {
        let (pairs, rest) = self.x.as_chunks::<WORD>();
        // Without a stride the compiler makes vectors of this.
        if self.stride == 1 {
            for (word, [a, b]) in self.words.iter_mut().zip(pairs) {
                *word = (round(*a) | round(*b) << 16) as i32;
            }
        } else {
            for (word, [a, b]) in self.words.iter_mut().step_by(self.stride).zip(pairs) {
                *word = (round(*a) | round(*b) << 16) as i32;
            }
        }
        if let [last] = rest {
            self.words[pairs.len() * self.stride] = round(*last) as i32;
        }
    }
}

fn numbers(word: i32) -> [bf16; 2] {
    [word as u16, (word >> 16) as u16].map(bf16::from_bits)
}

/// A bf16 weight matrix of `rows` (outputs) by `columns` (inputs), packed for
/// [`matmul_bf16`](super::matmul_bf16).
pub struct Bf16Matrix {
    panels: Panels,
}

impl Bf16Matrix {
    /// Rounds f32 rows to nearest even: `fill(row, out)` writes row `row` (`columns` long). It is called
    /// once per row, from all members of the team at once. What is a bf16 already stays what it is,
    /// except that magnitudes below 2^-56 become zero. The memory is [taken](Region::take) from
    /// `arena` as long as it lasts.
    ///
    /// # Errors
    /// [`PackError::Empty`], [`PackError::TooLarge`], [`PackError::NotFinite`] (also of a number that
    /// rounds to infinity), [`PackError::Memory`]; of several faulty rows the first is named.
    pub fn from_rows_in(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Bf16Matrix, PackError> {
        let scratch = || {
            (
                Zeroizing::new(vec![0f32; columns]),
                Zeroizing::new(vec![0i32; columns.div_ceil(WORD)]),
            )
        };
        let isa = team.isa();
        let shape = (rows, columns);
        let panels = Panels::pack(arena, team, shape, (WORD, 0), scratch, |own, row, lane| {
            let (values, words) = own;
            fill(row, values);
            isa.dispatch(Round {
                x: values,
                words,
                stride: 1,
            });
            let infinite = |word: &i32| numbers(*word).iter().any(|x| !x.is_finite());
            if words.iter().any(infinite) {
                return Err(PackError::NotFinite { row });
            }
            lane.put(words.iter().map(|word| word.to_le_bytes()));
            Ok(())
        })?;
        Ok(Bf16Matrix { panels })
    }

    /// Bytes that a packed matrix takes, in whole pages, or `None` if it is empty or does not fit
    /// the address space.
    pub fn packed_bytes(rows: usize, columns: usize) -> Option<usize> {
        Panels::packed_bytes(rows, columns, WORD)
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.panels.rows()
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.panels.columns()
    }

    /// Bytes that one product streams from memory.
    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }

    /// Writes row `row` (for instance a token's embedding) as f32, exactly.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let words = self.panels.row(row, out.len());
        for (out, word) in out.chunks_mut(WORD).zip(words) {
            for (out, x) in out.iter_mut().zip(numbers(i32::from_le_bytes(word))) {
                *out = x.to_f32();
            }
        }
    }

    /// What finds rows of this matrix.
    ///
    /// # Errors
    /// The system's refusal of memory.
    pub fn found(&self) -> io::Result<Found> {
        Found::of_bytes(self.panels.lines() * size_of::<Line>())
    }

    /// As [`Bf16Matrix::row`] for each id, without telling which: see [`oblivious`](crate::oblivious).
    ///
    /// # Panics
    /// If `out` is not a row for each id, or `found` was made for a narrower matrix.
    pub fn find_rows(&self, team: &Team, found: &mut Found, ids: &[u32], out: &mut [f32]) {
        let table = Table {
            bytes: self.panels.view(),
            items: self.panels.count(),
            stride: self.panels.lines() * size_of::<Line>(),
            rows: PANEL,
            pattern: &[Lanes::First],
        };
        let decode = |panel: &[Line], out: &mut [f32]| {
            for (out, line) in out.chunks_mut(WORD).zip(panel) {
                let word = line.as_chunks::<4>().0[0];
                for (out, x) in out.iter_mut().zip(numbers(i32::from_le_bytes(word))) {
                    *out = x.to_f32();
                }
            }
        };
        found.rows(team, table, ids, self.columns(), out, decode);
    }

    pub(super) fn panels(&self) -> &Panels {
        &self.panels
    }
}

/// A reusable buffer of rows rounded to bf16, to nearest even, magnitudes below 2^-56 to zero; NaN and
/// infinity stay what they are.
pub struct Bf16Rows {
    /// Two bf16 a word, the first in the lower half.
    blocks: Blocks,
}

impl Bf16Rows {
    /// Room for `capacity` rows of `columns` elements; [`Bf16Rows::round`] grows it if more come.
    ///
    /// # Panics
    /// If the operating system refuses the memory, as any vector would.
    pub fn with_capacity(capacity: usize, columns: usize) -> Bf16Rows {
        Bf16Rows {
            blocks: Blocks::with_capacity(capacity, columns, WORD),
        }
    }

    /// Replaces the contents by `x`, row-major, `x.len() / columns` rows. Allocates only beyond the
    /// capacity.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `columns` elements.
    pub fn round(&mut self, team: &Team, x: &[f32], columns: usize) {
        let isa = team.isa();
        let write = |(): &mut (), _, x: &[f32], words: &mut [i32], stride| {
            isa.dispatch(Round { x, words, stride });
        };
        self.blocks.write(team, x, columns, || (), write);
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.blocks.rows()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.blocks.columns()
    }

    /// Writes row `row` as f32, exactly.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let words = self.blocks.row(row, out.len());
        for (out, word) in out.chunks_mut(WORD).zip(words) {
            for (out, x) in out.iter_mut().zip(numbers(word)) {
                *out = x.to_f32();
            }
        }
    }

    pub(super) fn blocks(&self) -> &Blocks {
        &self.blocks
    }
}
