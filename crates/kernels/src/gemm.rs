//! The f32 product of activations and packed weights, blocked for registers and cache, shared by
//! the team.
//!
//! ```text
//! y[i][j] = sum over blocks of 256 columns, in order, of (sum over the block's k, in order, of x[i][k] * w[j][k])
//! ```
//! the inner sum by fused multiply-add from zero, the outer by addition. No instruction set, thread
//! count or number of rows changes a bit of the result.
//!
//! Weights are dealt into tiles of 32 rows; a tile is stored column by column, 32 numbers (two
//! cache lines) each:
//!
//! ```text
//! tile:  column 0: rows 0..32 | column 1: rows 0..32 | ...        rows past the last are zero
//! ```

use std::io;

use crate::cpu::Kernel;
use crate::isa::{LANES, Simd};
use crate::mem::{MemReport, Purpose, Region};
use crate::oblivious::{Found, Lanes, Table};
use crate::pack::PackError;
use crate::team::{SharedMut, Team};

const TILE: usize = 32;
/// Columns of one block.
const BLOCK: usize = 256;
/// Tiles that share one packed block of activations: 8 * 256 * 32 f32 are 256 KiB, half of the
/// smallest L2 we serve.
const TILES: usize = 8;
/// Most activation rows that one pass over a tile takes.
const ROWS_WIDE: usize = 12;
const ROWS_NARROW: usize = 6;
/// How far ahead of its use a tile is asked for, in bytes. The processor's own prefetcher stops at
/// each 4 KiB page.
const AHEAD: usize = 4096;

/// An f32 weight matrix of `rows` (outputs) by `columns` (inputs), packed for [`gemm_f32`].
pub struct F32Matrix {
    region: Region,
    rows: usize,
    columns: usize,
}

impl F32Matrix {
    /// Packs f32 rows: `fill(row, out)` writes row `row` (`columns` long). It is called once per
    /// row, from all members of the team at once.
    ///
    /// # Errors
    /// [`PackError::Empty`], [`PackError::TooLarge`], [`PackError::Memory`]. Numbers that are not
    /// finite are taken as they are.
    pub fn from_rows(
        team: &Team,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<F32Matrix, PackError> {
        F32Matrix::from_rows_in(&mut Region::default(), team, rows, columns, fill)
    }

    /// As [`F32Matrix::from_rows`], in memory [taken](Region::take) from `arena` as long as it
    /// lasts.
    ///
    /// # Errors
    /// As [`F32Matrix::from_rows`].
    pub fn from_rows_in(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<F32Matrix, PackError> {
        if rows == 0 || columns == 0 {
            return Err(PackError::Empty { rows, columns });
        }
        F32Matrix::packed_bytes(rows, columns).ok_or(PackError::TooLarge { rows, columns })?;
        let bytes = rows.div_ceil(TILE) * columns * TILE * size_of::<f32>();
        let mut region = arena.take_or_reserve(bytes, Purpose::Weights)?;
        let scratch = || zeroize::Zeroizing::new(vec![0f32; columns]);
        team.for_each_chunk_mut_with(
            region.as_f32_mut(),
            columns * TILE,
            scratch,
            |scratch, tile, packed| {
                for lane in 0..TILE.min(rows - tile * TILE) {
                    fill(tile * TILE + lane, scratch);
                    for (column, x) in packed
                        .as_chunks_mut::<TILE>()
                        .0
                        .iter_mut()
                        .zip(scratch.iter())
                    {
                        column[lane] = *x;
                    }
                }
            },
        );
        Ok(F32Matrix {
            region,
            rows,
            columns,
        })
    }

    /// Bytes that a packed matrix takes, in whole pages, or `None` if it is empty or does not fit
    /// the address space.
    pub fn packed_bytes(rows: usize, columns: usize) -> Option<usize> {
        if rows == 0 || columns == 0 {
            return None;
        }
        let bytes = rows
            .div_ceil(TILE)
            .checked_mul(columns)?
            .checked_mul(TILE * size_of::<f32>())?;
        bytes.checked_next_multiple_of(crate::mem::PAGE)
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that one product streams from memory.
    pub fn bytes(&self) -> usize {
        self.region.len()
    }

    /// What the kernel granted to the memory underneath.
    pub fn memory(&self) -> MemReport {
        self.region.report()
    }

    /// Copies row `row` (for instance a token's embedding).
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
        for (out, column) in out.iter_mut().zip(self.tile(row / TILE)) {
            *out = column[row % TILE];
        }
    }

    /// What finds rows of this matrix.
    ///
    /// # Errors
    /// The system's refusal of memory.
    pub fn found(&self) -> io::Result<Found> {
        Found::of_bytes(self.tile_bytes())
    }

    /// As [`F32Matrix::row`] for each id, without telling which: see [`oblivious`](crate::oblivious).
    ///
    /// # Panics
    /// If `out` is not a row for each id, or `found` was made for a narrower matrix.
    pub fn find_rows(&self, team: &Team, found: &mut Found, ids: &[u32], out: &mut [f32]) {
        let table = Table {
            bytes: self.region.view(),
            items: self.tiles(),
            stride: self.tile_bytes(),
            rows: TILE,
            pattern: &[Lanes::First, Lanes::Second],
        };
        let decode = |tile: &[f32], out: &mut [f32]| {
            for (out, column) in out.iter_mut().zip(tile.as_chunks::<TILE>().0) {
                *out = column[0];
            }
        };
        found.rows(team, table, ids, self.columns, out, decode);
    }

    fn tile_bytes(&self) -> usize {
        self.columns * TILE * size_of::<f32>()
    }

    fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    fn tile(&self, tile: usize) -> &[[f32; TILE]] {
        &self.region.as_f32().as_chunks::<TILE>().0[tile * self.columns..(tile + 1) * self.columns]
    }
}

/// `y = x * w^T`: `y[i * w.rows() + j] = sum over k of x[i * w.columns() + k] * w[j][k]`, rounded
/// as the [module](self) says. The number of activation rows is `x.len() / w.columns()`.
///
/// # Panics
/// If `x` is not a whole number of rows or `y` has another number of rows.
pub fn gemm_f32(team: &Team, x: &[f32], w: &F32Matrix, y: &mut [f32]) {
    assert!(
        x.len().is_multiple_of(w.columns),
        "{} is not a number of rows of {}",
        x.len(),
        w.columns
    );
    let rows = x.len() / w.columns;
    assert_eq!(
        y.len(),
        rows * w.rows,
        "the product has one row of w.rows() for each row of x"
    );
    if rows == 0 {
        return;
    }
    let isa = team.isa();
    let y = SharedMut::new(y);
    let tiles = w.tiles();
    let pieces = tiles.min(team.members() * 8);
    team.for_each(pieces, |piece| {
        let last = (piece + 1) * tiles / pieces;
        isa.dispatch(Tiles {
            x,
            rows,
            w,
            first: piece * tiles / pieces,
            last,
            y: &y,
        });
    });
}

/// All rows of activations against tiles `first..last`.
struct Tiles<'a> {
    x: &'a [f32],
    rows: usize,
    w: &'a F32Matrix,
    first: usize,
    last: usize,
    y: &'a SharedMut<'a, f32>,
}

impl Kernel for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let most = if V::WIDE { ROWS_WIDE } else { ROWS_NARROW };
        let blocks = self.rows.div_ceil(most);
        // With one block of rows nothing is reused from cache, and each tile should be streamed
        // from end to end.
        let together = if blocks == 1 { 1 } else { TILES };
        let mut first_tile = self.first;
        while first_tile < self.last {
            let tiles = first_tile..self.last.min(first_tile + together);
            for column in (0..self.w.columns).step_by(BLOCK) {
                for block in 0..blocks {
                    let first = block * self.rows / blocks;
                    let height = (block + 1) * self.rows / blocks - first;
                    let at = Block {
                        tiles: (tiles.start, tiles.end),
                        column,
                        first,
                    };
                    match height {
                        1 => self.block::<V, 1>(v, at),
                        2 => self.block::<V, 2>(v, at),
                        3 => self.block::<V, 3>(v, at),
                        4 => self.block::<V, 4>(v, at),
                        5 => self.block::<V, 5>(v, at),
                        6 => self.block::<V, 6>(v, at),
                        7 if V::WIDE => self.block::<V, 7>(v, at),
                        8 if V::WIDE => self.block::<V, 8>(v, at),
                        9 if V::WIDE => self.block::<V, 9>(v, at),
                        10 if V::WIDE => self.block::<V, 10>(v, at),
                        11 if V::WIDE => self.block::<V, 11>(v, at),
                        12 if V::WIDE => self.block::<V, 12>(v, at),
                        _ => unreachable!("blocks are at most {most} high"),
                    }
                }
            }
            first_tile = tiles.end;
        }
    }
}

#[derive(Clone, Copy)]
struct Block {
    tiles: (usize, usize),
    column: usize,
    first: usize,
}

impl Tiles<'_> {
    /// `M` rows from `at.first`, the block of columns from `at.column`, against `at.tiles`.
    #[inline(always)]
    fn block<V: Simd, const M: usize>(&self, v: V, at: Block) {
        let columns = self.w.columns;
        let depth = BLOCK.min(columns - at.column);
        let mut panel = [[0f32; M]; BLOCK];
        for i in 0..M {
            let row = &self.x[(at.first + i) * columns + at.column..][..depth];
            for (to, x) in panel.iter_mut().zip(row) {
                to[i] = *x;
            }
        }
        let panel = &panel[..depth];
        for tile in at.tiles.0..at.tiles.1 {
            let w = &self.w.tile(tile)[at.column..at.column + depth];
            let mut out = [[[0f32; LANES]; 2]; M];
            // Two vectors a row fit the registers of a narrow machine only for few rows.
            if V::WIDE || M <= 2 {
                let sums = product::<V, M, 2>(v, panel, w, 0);
                for (sums, out) in sums.iter().zip(&mut out) {
                    v.store(sums[0], &mut out[0]);
                    v.store(sums[1], &mut out[1]);
                }
            } else {
                for half in 0..2 {
                    let sums = product::<V, M, 1>(v, panel, w, half);
                    for (sums, out) in sums.iter().zip(&mut out) {
                        v.store(sums[0], &mut out[half]);
                    }
                }
            }
            let n = self.w.rows;
            let width = TILE.min(n - tile * TILE);
            for (i, out) in out.iter().enumerate() {
                // SAFETY: each tile belongs to one piece of the product, and only its columns of y
                // are written here.
                let y = unsafe { self.y.slice((at.first + i) * n + tile * TILE, width) };
                if at.column == 0 {
                    y.copy_from_slice(&out.as_flattened()[..width]);
                } else {
                    y.iter_mut()
                        .zip(out.as_flattened())
                        .for_each(|(y, x)| *y += x);
                }
            }
        }
    }
}

/// `M` packed rows of activations times `N` vectors of sixteen weight rows, starting with vector
/// `half` of the tile.
#[inline(always)]
fn product<V: Simd, const M: usize, const N: usize>(
    v: V,
    panel: &[[f32; M]],
    w: &[[f32; TILE]],
    half: usize,
) -> [[V::F; N]; M] {
    let mut sums = [[v.splat(0.0); N]; M];
    for (x, w) in panel.iter().zip(w) {
        let ahead = std::ptr::from_ref(w).cast::<u8>().wrapping_add(AHEAD);
        for n in 0..N {
            v.prefetch(ahead.wrapping_add(64 * (half + n)));
        }
        let mut loaded = [v.splat(0.0); N];
        for n in 0..N {
            loaded[n] = v.load(&w.as_chunks::<LANES>().0[half + n]);
        }
        for i in 0..M {
            let x = v.splat(x[i]);
            for n in 0..N {
                sums[i][n] = v.fma(x, loaded[n], sums[i][n]);
            }
        }
    }
    sums
}
