//! Packed 4-bit weights of a matrix: tiles of 32 rows, each its blocks of columns in order, so that a
//! product streams memory. What a block looks like is `packed`'s.

use std::io;

use super::Encoding;
use super::packed::{self, Block};
use crate::mem::{PAGE, Purpose, Region};
use crate::oblivious::{Found, Table};
use crate::pack::{FirstFault, PackError};
use crate::q8::{GROUP, TILE, Tiles};
use crate::team::Team;

/// A matrix of `rows` (outputs) by `columns` (inputs) in one of the 4-bit encodings, packed for
/// [`matmul_q4`](super::matmul_q4).
pub struct Q4Matrix {
    region: Region,
    rows: usize,
    columns: usize,
    encoding: Encoding,
}

/// What there is to do with whatever type an encoding's blocks have.
macro_rules! with_blocks {
    ($encoding:expr, $block:ident => $body:expr) => {
        match $encoding {
            Encoding::Q4_0 => {
                type $block = packed::Q4_0;
                $body
            }
            Encoding::Q4_1 => {
                type $block = packed::Q4_1;
                $body
            }
            Encoding::Q4K => {
                type $block = packed::Q4K;
                $body
            }
        }
    };
}

impl Encoding {
    /// Weights of a row in a block.
    #[must_use]
    pub fn block_columns(self) -> usize {
        with_blocks!(self, B => columns_of::<B>())
    }

    /// Bytes of a row's block in the file.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        with_blocks!(self, B => B::BYTES)
    }
}

fn columns_of<B: Block>() -> usize {
    B::GROUPS * GROUP
}

impl Q4Matrix {
    /// Takes rows as a file holds them, without loss: `row(i)` is row `i`, its blocks one after another.
    /// The memory is [taken](Region::take) from `arena` as long as it lasts.
    ///
    /// # Errors
    /// [`PackError::Empty`], [`PackError::TooLarge`], [`PackError::PartialBlock`],
    /// [`PackError::RowLength`], [`PackError::NotFinite`], [`PackError::Memory`]; of several faulty
    /// rows the first is named.
    pub fn from_blocks_in<'a>(
        arena: &mut Region,
        team: &Team,
        encoding: Encoding,
        (rows, columns): (usize, usize),
        row: impl Fn(usize) -> &'a [u8] + Sync,
    ) -> Result<Q4Matrix, PackError> {
        let region = with_blocks!(encoding, B => pack::<B>(arena, team, rows, columns, &row))?;
        Ok(Q4Matrix {
            region,
            rows,
            columns,
            encoding,
        })
    }

    /// Bytes that a packed matrix takes, in whole pages, or `None` if it is empty or does not fit
    /// the address space.
    pub fn packed_bytes(encoding: Encoding, rows: usize, columns: usize) -> Option<usize> {
        if rows == 0 || columns == 0 {
            return None;
        }
        with_blocks!(encoding, B => bytes_of::<B>(rows, columns))?.checked_next_multiple_of(PAGE)
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How the weights are encoded.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Bytes that one product streams from memory.
    pub fn bytes(&self) -> usize {
        self.region.len()
    }

    /// Writes row `row` (for instance a token's embedding) as f32, the numbers that the file means.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(
            out.len(),
            self.columns,
            "a row has as many elements as the matrix has columns"
        );
        with_blocks!(self.encoding, B => {
            let blocks = self.tiles::<B>().tile(row / TILE);
            for (block, out) in blocks.iter().zip(out.chunks_mut(columns_of::<B>())) {
                block.row(row % TILE, out);
            }
        });
    }

    /// What finds rows of this matrix.
    ///
    /// # Errors
    /// The system's refusal of memory.
    pub fn found(&self) -> io::Result<Found> {
        with_blocks!(self.encoding, B => Found::of_bytes(self.tile_bytes::<B>()))
    }

    /// As [`Q4Matrix::row`] for each id, without telling which: see [`oblivious`](crate::oblivious).
    ///
    /// # Panics
    /// If `out` is not a row for each id, or `found` was made for a narrower matrix.
    pub fn find_rows(&self, team: &Team, found: &mut Found, ids: &[u32], out: &mut [f32]) {
        with_blocks!(self.encoding, B => {
            let table = Table {
                bytes: self.region.view(),
                items: self.rows.div_ceil(TILE),
                stride: self.tile_bytes::<B>(),
                rows: TILE,
                pattern: B::LANES,
            };
            let decode = |tile: &[B], out: &mut [f32]| {
                for (block, out) in tile.iter().zip(out.chunks_mut(columns_of::<B>())) {
                    block.row(0, out);
                }
            };
            found.rows(team, table, ids, self.columns, out, decode);
        });
    }

    fn tile_bytes<B: Block>(&self) -> usize {
        self.columns / columns_of::<B>() * size_of::<B>()
    }

    /// `B` is the encoding's.
    pub(super) fn tiles<B: Block>(&self) -> Tiles<'_, B> {
        Tiles {
            packed: self.region.view(),
            rows: self.rows,
            columns: self.columns,
        }
    }
}

fn bytes_of<B: Block>(rows: usize, columns: usize) -> Option<usize> {
    rows.div_ceil(TILE)
        .checked_mul(columns.div_ceil(columns_of::<B>()))?
        .checked_mul(size_of::<B>())
}

fn pack<'a, B: Block>(
    arena: &mut Region,
    team: &Team,
    rows: usize,
    columns: usize,
    row: &(impl Fn(usize) -> &'a [u8] + Sync),
) -> Result<Region, PackError> {
    if rows == 0 || columns == 0 {
        return Err(PackError::Empty { rows, columns });
    }
    if !columns.is_multiple_of(columns_of::<B>()) {
        return Err(PackError::PartialBlock {
            columns,
            block: columns_of::<B>(),
        });
    }
    let bytes = bytes_of::<B>(rows, columns).ok_or(PackError::TooLarge { rows, columns })?;
    let blocks = columns / columns_of::<B>();
    let mut region = arena.take_or_reserve(bytes, Purpose::Weights)?;
    let fault = FirstFault::default();
    team.for_each_chunk_mut(region.view_mut::<B>(), blocks, |tile, packed| {
        for lane in 0..TILE.min(rows - tile * TILE) {
            let index = tile * TILE + lane;
            let bytes = row(index);
            if bytes.len() != blocks * B::BYTES {
                let (expected, found) = (blocks * B::BYTES, bytes.len());
                return fault.note(
                    index,
                    PackError::RowLength {
                        row: index,
                        expected,
                        found,
                    },
                );
            }
            for (packed, block) in packed.iter_mut().zip(bytes.chunks_exact(B::BYTES)) {
                if !packed.put(lane, block) {
                    return fault.note(index, PackError::NotFinite { row: index });
                }
            }
        }
    });
    fault.none()?;
    Ok(region)
}
