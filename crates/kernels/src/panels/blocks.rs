//! Rows of activations in blocks, whatever their words hold.
//!
//! Rows are dealt into blocks as high as the product holds in registers, and a block is stored
//! column by column, so that its addresses are consecutive:
//!
//! ```text
//! block of h rows, step k:  row 0: word k | row 1: word k | ... | row h-1: word k        4 bytes each
//! ```
//! For tile registers blocks are sixteen rows, each of which is stored by itself.

use crate::cpu::Isa;
use crate::mem::{Purpose, Region};
use crate::team::Team;

/// Most rows that are multiplied with one pass over the weights: on wide machines (32 registers)
/// each panel by itself takes up to 24, three at once take 8 each.
const ONE_PASS: usize = 24;
const WIDE_BLOCK: usize = 8;
const NARROW_BLOCK: usize = 4;
/// Rows of a tile.
const TILE_BLOCK: usize = 16;

/// Rows of each block but the last, for so many rows.
fn block_height(rows: usize, wide: bool) -> usize {
    let most = match (wide, rows) {
        (true, ..=ONE_PASS) => ONE_PASS,
        (true, _) => WIDE_BLOCK,
        (false, _) => NARROW_BLOCK,
    };
    // Of nearly equal height: 9 rows in blocks of 8 are 5 + 4, not 8 + 1.
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Whether so many rows, of which a word holds `word` columns, are for tile registers. Sums of integers
/// are exact, so products with few rows, which wait for memory, need none; sums of bf16 must not
/// depend on how many rows there are.
fn for_tiles(isa: Isa, rows: usize, word: usize) -> bool {
    isa.has_tiles() && (word == 2 || rows > ONE_PASS)
}

/// A reusable buffer of rows, all of one length.
pub(super) struct Blocks {
    /// Zeros after the last column.
    words: Region,
    rows: usize,
    columns: usize,
    /// Columns of a row in a word.
    word: usize,
    height: usize,
    tiled: bool,
}

impl Blocks {
    /// Room for `capacity` rows of `columns` elements, of which a word holds `word`.
    ///
    /// # Panics
    /// If the operating system refuses the memory, as any vector would.
    pub(super) fn with_capacity(capacity: usize, columns: usize, word: usize) -> Blocks {
        Blocks {
            words: reserve(capacity.saturating_mul(columns.div_ceil(word))),
            rows: 0,
            columns,
            word,
            height: 1,
            tiled: false,
        }
    }

    /// Replaces the contents by `x`, row-major: `write(own, row, elements, words, stride)` puts the
    /// words of a row into every `stride`-th of `words`. `own` makes what a member needs once.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `columns` elements.
    pub(super) fn write<E: Sync, S>(
        &mut self,
        team: &Team,
        x: &[E],
        columns: usize,
        own: impl Fn() -> S + Sync,
        write: impl Fn(&mut S, usize, &[E], &mut [i32], usize) + Sync,
    ) {
        self.columns = columns;
        self.rows = row_count(x, columns);
        self.tiled = for_tiles(team.isa(), self.rows, self.word);
        self.height = if self.tiled {
            TILE_BLOCK
        } else {
            block_height(self.rows, team.isa().wide())
        };
        let tiled = self.tiled;
        let lines = self.lines();
        grow(&mut self.words, self.rows * lines);
        let height = self.height;
        let block = |own: &mut S, block: usize, words: &mut [i32]| {
            let rows = words.len() / lines;
            for i in 0..rows {
                let row = block * height + i;
                let x = &x[row * columns..(row + 1) * columns];
                if tiled {
                    write(own, row, x, &mut words[i * lines..(i + 1) * lines], 1);
                } else {
                    write(own, row, x, &mut words[i..], rows);
                }
            }
        };
        let words = &mut self.words.view_mut::<i32>()[..self.rows * lines];
        // Waking the team costs more than converting a handful of rows.
        const WORTH_SHARING: usize = 1 << 14;
        if words.is_empty() {
        } else if x.len() < WORTH_SHARING {
            let mut own = own();
            for (i, words) in words.chunks_mut(height * lines).enumerate() {
                block(&mut own, i, words);
            }
        } else {
            team.for_each_chunk_mut_with(words, height * lines, own, block);
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Words of a row.
    fn lines(&self) -> usize {
        self.columns.div_ceil(self.word)
    }

    /// Rows of each block but the last.
    pub(super) fn height(&self) -> usize {
        self.height
    }

    /// Whether they are laid out for tile registers.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tiled(&self) -> bool {
        self.tiled
    }

    /// How many blocks there are.
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.height)
    }

    /// A block and its height.
    pub(super) fn block(&self, block: usize) -> (&[i32], usize) {
        let lines = self.lines();
        let height = self.height.min(self.rows - block * self.height);
        let words = &self.words.view::<i32>()[block * self.height * lines..][..height * lines];
        (words, height)
    }

    /// The words of a row, in order.
    ///
    /// # Panics
    /// If there is no such row or `elements` is not the number of columns.
    pub(super) fn row(&self, row: usize, elements: usize) -> impl Iterator<Item = i32> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(
            elements, self.columns,
            "a row has as many elements as there are columns"
        );
        let (words, height) = self.block(row / self.height);
        let lines = self.lines();
        let (first, step) = match self.tiled {
            true => (row % self.height * lines, 1),
            false => (row % self.height, height),
        };
        words[first..].iter().step_by(step).take(lines).copied()
    }
}

/// Rows of `columns` elements in `x`.
///
/// # Panics
/// If that is no whole number.
pub(super) fn row_count<E>(x: &[E], columns: usize) -> usize {
    assert!(
        columns > 0 && x.len().is_multiple_of(columns),
        "{} is not a number of rows of {columns}",
        x.len()
    );
    x.len() / columns
}

/// Room for so many words. Activations are prompts in another form, so they lie where dumps and swap
/// do not reach.
pub(super) fn reserve(words: usize) -> Region {
    Region::zeroed(words.saturating_mul(4), Purpose::State).expect("memory for activations")
}

pub(super) fn grow(region: &mut Region, words: usize) {
    if region.len() / 4 < words {
        *region = reserve(words);
    }
}
