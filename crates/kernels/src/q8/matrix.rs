//! Packed int8 weights.
//!
//! Rows are dealt into tiles of 32, columns into groups of 32. A tile is one `PackedGroup` per
//! group, one after another, so that a product streams memory in order:
//!
//! ```text
//! PackedGroup, 1088 bytes (17 cache lines)
//!   0     32 x f16   scale of each row
//!   64    16 x 64 B  quants[2 * step + half], step 0..8, half 0..2:
//!                    row 16*half + 0: columns 4*step .. 4*step+4 | row 16*half + 1: ... | ... | row 16*half + 15
//! ```
//! Weights are stored as `w + 128` (unsigned), which is what `vpdpbusd` multiplies with signed
//! activations. Rows past the last and columns past the last are zeros with scale 0.

use std::io;

use half::f16;
use zeroize::Zeroizing;

use super::matmul::{Packed, Tiles, add, ask, halves};
use super::rows::{RowGroup, largest_magnitude, load_group, round};
use super::{GROUP, TILE};
use crate::cpu::Kernel;
use crate::isa::Simd;
use crate::mem::{Element, MemReport, Purpose, Region};
use crate::oblivious::{Found, Lanes, Table};
use crate::pack::{FirstFault, PackError};
use crate::team::Team;

/// 32 rows by 32 columns; see the module's drawing.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct PackedGroup {
    pub(super) scales: [f16; TILE],
    pub(super) quants: [[u8; 64]; 16],
}

const _: () = assert!(size_of::<PackedGroup>() == 1088);

// SAFETY: integers and f16 only, 64 + 1024 bytes without padding, alignment 64.
unsafe impl Element for PackedGroup {}

impl PackedGroup {
    /// Line and byte of a weight.
    fn quant(row: usize, column: usize) -> (usize, usize) {
        (column / 4 * 2 + row / 16, row % 16 * 4 + column % 4)
    }

    fn weight(&self, row: usize, column: usize) -> i8 {
        let (line, byte) = PackedGroup::quant(row, column);
        (self.quants[line][byte] ^ 0x80) as i8
    }
}

/// See [`ask`].
const FEW: usize = 4;

impl Packed for PackedGroup {
    const GROUPS: usize = 1;

    #[inline(always)]
    fn dots<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        (_, half): (usize, usize),
        x: [&RowGroup; M],
    ) -> [[V::I; N]; M] {
        ask::<V, M, FEW>(v, std::ptr::from_ref(&self.scales).cast());
        let mut dots = [[v.splat_i(0); N]; M];
        for i in 0..M {
            dots[i] = [v.dot_start(x[i].offset); N];
        }
        for step in 0..GROUP / 4 {
            let mut w = [v.weights(&self.quants[2 * step + half]); N];
            for n in 0..N {
                let line = &self.quants[2 * step + half + n];
                ask::<V, M, FEW>(v, line.as_ptr());
                w[n] = v.weights(line);
            }
            for i in 0..M {
                let a = x[i].quants[step];
                for n in 0..N {
                    dots[i][n] = v.dot4(dots[i][n], w[n], a);
                }
            }
        }
        dots
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
        add(v, x, dots, halves(v, &self.scales, half), None, sums)
    }
}

/// An int8 weight matrix of `rows` (outputs) by `columns` (inputs), packed for
/// [`matmul_q8`](super::matmul_q8).
pub struct Q8Matrix {
    region: Region,
    rows: usize,
    columns: usize,
}

impl Q8Matrix {
    /// Quantises f32 rows: `fill(row, out)` writes row `row` (`columns` long). It is called once
    /// per row, from all members of the team at once.
    ///
    /// Each group of 32 gets scale = largest magnitude / 127 rounded to half precision (rounded up
    /// where rounding down would clip) and weights to the nearest multiple, ties to even. `columns`
    /// need not be a multiple of 32.
    ///
    /// # Errors
    /// [`PackError`]; of several faulty rows the first is named.
    pub fn from_rows(
        team: &Team,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Q8Matrix, PackError> {
        Q8Matrix::from_rows_in(&mut Region::default(), team, rows, columns, fill)
    }

    /// As [`Q8Matrix::from_rows`], in memory [taken](Region::take) from `arena` as long as it
    /// lasts.
    ///
    /// # Errors
    /// As [`Q8Matrix::from_rows`].
    pub fn from_rows_in(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Q8Matrix, PackError> {
        let scratch = || Zeroizing::new(vec![0f32; columns]);
        let isa = team.isa();
        Q8Matrix::pack(
            arena,
            team,
            rows,
            columns,
            scratch,
            |scratch, row, lane, groups| {
                fill(row, scratch);
                isa.dispatch(PackRow {
                    values: scratch,
                    row,
                    lane,
                    groups,
                })
            },
        )
    }

    /// Takes GGUF Q8_0 rows as they are, without loss: `row(i)` is row `i` as `columns / 32` blocks
    /// of a little-endian f16 scale and 32 i8.
    ///
    /// # Errors
    /// [`PackError`]; of several faulty rows the first is named.
    pub fn from_q8_0<'a>(
        team: &Team,
        rows: usize,
        columns: usize,
        row: impl Fn(usize) -> &'a [u8] + Sync,
    ) -> Result<Q8Matrix, PackError> {
        Q8Matrix::from_q8_0_in(&mut Region::default(), team, rows, columns, row)
    }

    /// As [`Q8Matrix::from_q8_0`], in memory [taken](Region::take) from `arena` as long as it
    /// lasts.
    ///
    /// # Errors
    /// As [`Q8Matrix::from_q8_0`].
    pub fn from_q8_0_in<'a>(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        row: impl Fn(usize) -> &'a [u8] + Sync,
    ) -> Result<Q8Matrix, PackError> {
        const BLOCK: usize = 2 + GROUP;
        if !columns.is_multiple_of(GROUP) {
            return Err(PackError::PartialBlock {
                columns,
                block: GROUP,
            });
        }
        let expected = columns / GROUP * BLOCK;
        Q8Matrix::pack(
            arena,
            team,
            rows,
            columns,
            || (),
            |(), i, lane, groups| {
                let bytes = row(i);
                if bytes.len() != expected {
                    return Err(PackError::RowLength {
                        row: i,
                        expected,
                        found: bytes.len(),
                    });
                }
                for (group, block) in groups.iter_mut().zip(bytes.chunks_exact(BLOCK)) {
                    let scale = f16::from_le_bytes([block[0], block[1]]);
                    if !scale.is_finite() {
                        return Err(PackError::NotFinite { row: i });
                    }
                    group.scales[lane] = scale;
                    for (step, four) in block[2..].as_chunks::<4>().0.iter().enumerate() {
                        let (line, byte) = PackedGroup::quant(lane, 4 * step);
                        group.quants[line][byte..byte + 4].copy_from_slice(&four.map(|w| w ^ 0x80));
                    }
                }
                Ok(())
            },
        )
    }

    /// Bytes that a packed matrix takes, in whole pages, or `None` if it is empty or does not fit
    /// the address space.
    pub fn packed_bytes(rows: usize, columns: usize) -> Option<usize> {
        if rows == 0 || columns == 0 {
            return None;
        }
        let groups = rows.div_ceil(TILE).checked_mul(columns.div_ceil(GROUP))?;
        groups
            .checked_mul(size_of::<PackedGroup>())?
            .checked_next_multiple_of(crate::mem::PAGE)
    }

    fn pack<S>(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        scratch: impl Fn() -> S + Sync,
        pack_row: impl Fn(&mut S, usize, usize, &mut [PackedGroup]) -> Result<(), PackError> + Sync,
    ) -> Result<Q8Matrix, PackError> {
        if rows == 0 || columns == 0 {
            return Err(PackError::Empty { rows, columns });
        }
        Q8Matrix::packed_bytes(rows, columns).ok_or(PackError::TooLarge { rows, columns })?;
        let groups = columns.div_ceil(GROUP);
        let bytes = rows.div_ceil(TILE) * groups * size_of::<PackedGroup>();
        let mut region = arena.take_or_reserve(bytes, Purpose::Weights)?;
        let fault = FirstFault::default();
        team.for_each_chunk_mut_with(
            region.view_mut::<PackedGroup>(),
            groups,
            scratch,
            |scratch, tile, packed| {
                for group in packed.iter_mut() {
                    group.quants = [[0x80; 64]; 16];
                }
                for lane in 0..TILE.min(rows - tile * TILE) {
                    let row = tile * TILE + lane;
                    if let Err(error) = pack_row(scratch, row, lane, packed) {
                        fault.note(row, error);
                        return;
                    }
                }
            },
        );
        fault.none()?;
        Ok(Q8Matrix {
            region,
            rows,
            columns,
        })
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

    /// Writes row `row` (for instance a token's embedding) as f32, exactly `weight * scale`.
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
        unpack(self.tiles().tile(row / TILE), row % TILE, out);
    }

    /// What finds rows of this matrix.
    ///
    /// # Errors
    /// The system's refusal of memory.
    pub fn found(&self) -> io::Result<Found> {
        Found::of_bytes(self.tile_bytes())
    }

    /// As [`Q8Matrix::row`] for each id, without telling which: see [`oblivious`](crate::oblivious).
    ///
    /// # Panics
    /// If `out` is not a row for each id, or `found` was made for a narrower matrix.
    pub fn find_rows(&self, team: &Team, found: &mut Found, ids: &[u32], out: &mut [f32]) {
        let table = Table {
            bytes: self.region.view(),
            items: self.rows.div_ceil(TILE),
            stride: self.tile_bytes(),
            rows: TILE,
            pattern: &PATTERN,
        };
        let decode = |tile: &[PackedGroup], out: &mut [f32]| unpack(tile, 0, out);
        found.rows(team, table, ids, self.columns, out, decode);
    }

    fn tile_bytes(&self) -> usize {
        self.columns.div_ceil(GROUP) * size_of::<PackedGroup>()
    }

    pub(super) fn tiles(&self) -> Tiles<'_, PackedGroup> {
        Tiles {
            packed: self.region.view(),
            rows: self.rows,
            columns: self.columns,
        }
    }
}

/// Whose the lines of a group are.
const PATTERN: [Lanes; 17] = {
    let mut pattern = [Lanes::Halves; 17];
    let mut line = 1;
    while line < 17 {
        pattern[line] = Lanes::First;
        pattern[line + 1] = Lanes::Second;
        line += 2;
    }
    pattern
};

/// Writes a row of a tile as f32.
fn unpack(groups: &[PackedGroup], lane: usize, out: &mut [f32]) {
    for (group, out) in groups.iter().zip(out.chunks_mut(GROUP)) {
        let scale = group.scales[lane].to_f32();
        for (column, out) in out.iter_mut().enumerate() {
            *out = f32::from(group.weight(lane, column)) * scale;
        }
    }
}

/// Quantises one row into its lane of a tile.
struct PackRow<'a> {
    values: &'a [f32],
    row: usize,
    lane: usize,
    groups: &'a mut [PackedGroup],
}

impl Kernel for PackRow<'_> {
    type Output = Result<(), PackError>;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> Result<(), PackError> {
        for (values, group) in self.values.chunks(GROUP).zip(self.groups.iter_mut()) {
            let (low, high) = load_group(v, values);
            let largest = largest_magnitude(v, low, high);
            if !largest.is_finite() {
                return Err(PackError::NotFinite { row: self.row });
            }
            let mut scale = f16::from_f32(largest / 127.0);
            // Rounding to half precision moves a normal scale by 2^-11 of itself, which cannot
            // reach 127.5; only scales below 2^-14, where halves are evenly spaced, can come out
            // too small.
            if largest > 127.5 * scale.to_f32() {
                scale = f16::from_bits(scale.to_bits() + 1);
            }
            if !scale.is_finite() {
                return Err(PackError::ScaleOverflow { row: self.row });
            }
            group.scales[self.lane] = scale;
            if largest == 0.0 {
                continue; // the quants are zeros already
            }
            let (divisor, top) = (v.splat(scale.to_f32()), v.splat(127.0));
            let quants = round(
                v,
                v.min(v.div(low, divisor), top),
                v.min(v.div(high, divisor), top),
            );
            for (step, four) in quants.as_chunks::<4>().0.iter().enumerate() {
                let (line, byte) = PackedGroup::quant(self.lane, 4 * step);
                group.quants[line][byte..byte + 4]
                    .copy_from_slice(&four.map(|w| w as i8 as u8 ^ 0x80));
            }
        }
        Ok(())
    }
}
