//! Panels of weights, whatever their words hold. The drawing is in the [module above](super).

use super::PANEL;
use crate::mem::{Element, PAGE, Purpose, Region};
use crate::pack::{FirstFault, PackError};
use crate::team::Team;

/// A word of each of sixteen rows.
pub(super) type Line = [u8; 64];

// SAFETY: bytes.
unsafe impl Element for Line {}

/// `rows` (outputs) by `columns` (inputs) in panels. Rows past the last and columns past the last
/// are what the packed form calls zero.
pub(super) struct Panels {
    region: Region,
    rows: usize,
    columns: usize,
    /// Columns of a row in a word.
    word: usize,
}

/// One row's place in a panel.
pub(super) struct Lane<'a> {
    panel: &'a mut [Line],
    lane: usize,
}

impl Lane<'_> {
    /// Writes the row's words.
    pub(super) fn put(self, words: impl Iterator<Item = [u8; 4]>) {
        for (line, word) in self.panel.iter_mut().zip(words) {
            line.as_chunks_mut::<4>().0[self.lane] = word;
        }
    }
}

impl Panels {
    /// Packs a matrix whose words hold `word` columns each and start as `zero`: `pack_row(scratch,
    /// row, lane)` writes a row, or tells what is wrong with it. The memory is [taken](Region::take)
    /// from `arena` as long as it lasts.
    pub(super) fn pack<S>(
        arena: &mut Region,
        team: &Team,
        (rows, columns): (usize, usize),
        (word, zero): (usize, u8),
        scratch: impl Fn() -> S + Sync,
        pack_row: impl Fn(&mut S, usize, Lane<'_>) -> Result<(), PackError> + Sync,
    ) -> Result<Panels, PackError> {
        if rows == 0 || columns == 0 {
            return Err(PackError::Empty { rows, columns });
        }
        let bytes =
            Panels::bytes_of(rows, columns, word).ok_or(PackError::TooLarge { rows, columns })?;
        let mut region = arena.take_or_reserve(bytes, Purpose::Weights)?;
        let fault = FirstFault::default();
        let lines = columns.div_ceil(word);
        let packed = region.view_mut::<Line>();
        team.for_each_chunk_mut_with(packed, lines, scratch, |scratch, index, panel| {
            panel.fill([zero; 64]);
            for lane in 0..PANEL.min(rows - index * PANEL) {
                let row = index * PANEL + lane;
                let panel = &mut *panel;
                if let Err(error) = pack_row(scratch, row, Lane { panel, lane }) {
                    fault.note(row, error);
                    return;
                }
            }
        });
        fault.none()?;
        Ok(Panels {
            region,
            rows,
            columns,
            word,
        })
    }

    /// Bytes of so many panels, or `None` if they do not fit the address space.
    fn bytes_of(rows: usize, columns: usize, word: usize) -> Option<usize> {
        rows.div_ceil(PANEL)
            .checked_mul(columns.div_ceil(word))?
            .checked_mul(size_of::<Line>())
    }

    /// Bytes in whole pages, or `None` if the matrix is empty or does not fit the address space.
    pub(super) fn packed_bytes(rows: usize, columns: usize, word: usize) -> Option<usize> {
        if rows == 0 || columns == 0 {
            return None;
        }
        Panels::bytes_of(rows, columns, word)?.checked_next_multiple_of(PAGE)
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn bytes(&self) -> usize {
        self.region.len()
    }

    /// All panels.
    pub(super) fn view(&self) -> &[u8] {
        self.region.view()
    }

    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Lines of a panel.
    pub(super) fn lines(&self) -> usize {
        self.columns.div_ceil(self.word)
    }

    pub(super) fn panel(&self, panel: usize) -> &[Line] {
        let lines = self.lines();
        &self.region.view::<Line>()[panel * lines..(panel + 1) * lines]
    }

    /// The words of a row, in order.
    ///
    /// # Panics
    /// If there is no such row or `elements` is not the number of columns.
    pub(super) fn row(&self, row: usize, elements: usize) -> impl Iterator<Item = [u8; 4]> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(
            elements, self.columns,
            "a row has as many elements as the matrix has columns"
        );
        let lines = self.panel(row / PANEL).iter();
        lines.map(move |line| line.as_chunks::<4>().0[row % PANEL])
    }
}
