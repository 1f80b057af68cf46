//! The product in groups: register-blocked over activation rows, each weight tile streamed once per
//! block of rows. How a tile holds its weights is a [`Packed`]'s.

use half::f16;

use super::matrix::Q8Matrix;
use super::rows::{Q8Rows, RowGroup};
use super::{GROUP, TILE};
use crate::cpu::Kernel;
use crate::isa::{LANES, Simd};
use crate::mem::Element;
use crate::team::{SharedMut, Team};

/// Most activation rows that one pass over a tile takes.
const ROWS_WIDE: usize = 6;
const ROWS_NARROW: usize = 4;
/// How far ahead of its use a tile is asked for, in bytes.
const AHEAD: usize = 4 * 1088;
const PAGE: usize = 4096;
/// Bytes at the beginning of a page that are asked for ahead even where the processor does the rest.
const KICK: usize = 256;

/// Asks for what a product of `M` rows needs later, while it reads a line.
///
/// The processor's own prefetcher stops at each page of 4 KiB. With up to `FEW` rows it is faster by
/// itself from page begin to page end than together with requests of ours, so it is only led into
/// each page. With more rows, lines come too slowly for it to run far ahead, and it is the other way
/// round. Both were measured on Zen 4; `docs/kernels.md` has the figures.
#[inline(always)]
pub(crate) fn ask<V: Simd, const M: usize, const FEW: usize>(v: V, line: *const u8) {
    if M > FEW {
        v.prefetch_l2(line.wrapping_add(2 * AHEAD));
    } else {
        let ahead = line.wrapping_add(AHEAD);
        let begins_page = ahead.addr() % PAGE < KICK;
        v.prefetch(if begins_page { ahead } else { line });
    }
}

/// Weights of 32 rows (a tile) by one or more groups of 32 columns.
pub(crate) trait Packed: Element {
    /// Groups that one of these holds.
    const GROUPS: usize;

    /// The exact sums of a group: `M` rows of activations times `N` vectors of sixteen weight rows,
    /// starting with vector `half`. [Asks](ask) for each line that it reads.
    fn dots<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        at: (usize, usize),
        x: [&RowGroup; M],
    ) -> [[V::I; N]; M];

    /// Adds them to `sums`, scaled.
    fn add<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        at: (usize, usize),
        x: [&RowGroup; M],
        dots: [[V::I; N]; M],
        sums: [[V::F; N]; M],
    ) -> [[V::F; N]; M];
}

/// Adds sums times scales and, for encodings that have them, offsets.
#[inline(always)]
pub(crate) fn add<V: Simd, const M: usize, const N: usize>(
    v: V,
    x: [&RowGroup; M],
    dots: [[V::I; N]; M],
    scales: [V::F; N],
    offsets: Option<[V::F; N]>,
    mut sums: [[V::F; N]; M],
) -> [[V::F; N]; M] {
    for i in 0..M {
        let scale = v.splat(x[i].scale);
        for n in 0..N {
            sums[i][n] = v.fma(v.widen(dots[i][n]), v.mul(scales[n], scale), sums[i][n]);
        }
        if let Some(offsets) = offsets {
            let total = v.splat(x[i].total());
            for n in 0..N {
                sums[i][n] = v.fma(offsets[n], total, sums[i][n]);
            }
        }
    }
    sums
}

/// Sixteen of a tile's 32 numbers for each of `N` vectors.
#[inline(always)]
pub(crate) fn halves<V: Simd, const N: usize>(
    v: V,
    numbers: &[f16; TILE],
    half: usize,
) -> [V::F; N] {
    let mut out = [v.splat(0.0); N];
    for n in 0..N {
        out[n] = v.load_f16(&numbers.as_chunks::<LANES>().0[half + n]);
    }
    out
}

/// All weights of a matrix, tile by tile.
#[derive(Clone, Copy)]
pub(crate) struct Tiles<'a, P> {
    pub(crate) packed: &'a [P],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl<'a, P: Packed> Tiles<'a, P> {
    pub(crate) fn tile(&self, tile: usize) -> &'a [P] {
        let length = self.columns.div_ceil(GROUP).div_ceil(P::GROUPS);
        &self.packed[tile * length..(tile + 1) * length]
    }
}

/// Where a product goes: columns `first..` of rows of `width`.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    pub(crate) width: usize,
    pub(crate) first: usize,
}

/// `y = x * w^T`: `y[i * w.rows() + j] = sum over k of x[i][k] * w[j][k]`, rounded as the
/// [module](super) says.
///
/// # Panics
/// If `x` and `w` differ in columns or `y` is not `x.rows() * w.rows()` long.
pub fn matmul_q8(team: &Team, x: &Q8Rows, w: &Q8Matrix, y: &mut [f32]) {
    matmul_q8_in(team, x, w, y, w.rows(), 0);
}

/// As [`matmul_q8`], into rows of `width` that several matrices fill: `y[i * width + first + j]`.
///
/// # Panics
/// If `x` and `w` differ in columns, `y` is not `x.rows() * width` long or the columns do not fit it.
pub fn matmul_q8_in(
    team: &Team,
    x: &Q8Rows,
    w: &Q8Matrix,
    y: &mut [f32],
    width: usize,
    first: usize,
) {
    multiply(team, x, w.tiles(), y, Columns { width, first });
}

pub(crate) fn multiply<P: Packed>(
    team: &Team,
    x: &Q8Rows,
    w: Tiles<'_, P>,
    y: &mut [f32],
    columns: Columns,
) {
    assert_eq!(
        x.columns(),
        w.columns,
        "activations and weights differ in columns"
    );
    assert_eq!(
        y.len(),
        x.rows() * columns.width,
        "the product has x.rows() * w.rows() elements, or rows of the width given"
    );
    assert!(
        columns.first <= columns.width && w.rows <= columns.width - columns.first,
        "{} columns from {} do not fit rows of {}",
        w.rows,
        columns.first,
        columns.width
    );
    if x.rows() == 0 {
        return;
    }
    let isa = team.isa();
    let y = &SharedMut::new(y);
    // Enough pieces for a slow member to be helped out, few enough for each to stream a good length
    // of memory.
    let tiles = w.rows.div_ceil(TILE);
    let pieces = tiles.min(team.members() * 8);
    team.for_each(pieces, |piece| {
        let tiles = piece * tiles / pieces..(piece + 1) * tiles / pieces;
        for tile in tiles {
            isa.dispatch(Tile {
                x,
                w,
                tile,
                y,
                columns,
            });
        }
    });
}

/// All rows of activations against one tile of weights.
struct Tile<'a, P> {
    x: &'a Q8Rows,
    w: Tiles<'a, P>,
    tile: usize,
    y: &'a SharedMut<'a, f32>,
    columns: Columns,
}

impl<P: Packed> Kernel for Tile<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let packed = self.w.tile(self.tile);
        let rows = self.x.rows();
        let most = if V::WIDE { ROWS_WIDE } else { ROWS_NARROW };
        // Blocks of equal height: 8 rows are 4 + 4, not 6 + 2.
        let blocks = rows.div_ceil(most);
        for block in 0..blocks {
            let first = block * rows / blocks;
            let height = (block + 1) * rows / blocks - first;
            match height {
                1 => self.block::<V, 1>(v, packed, first),
                2 => self.block::<V, 2>(v, packed, first),
                3 => self.block::<V, 3>(v, packed, first),
                4 => self.block::<V, 4>(v, packed, first),
                5 if V::WIDE => self.block::<V, 5>(v, packed, first),
                6 if V::WIDE => self.block::<V, 6>(v, packed, first),
                _ => unreachable!("blocks are at most {most} high"),
            }
        }
    }
}

impl<P: Packed> Tile<'_, P> {
    #[inline(always)]
    fn block<V: Simd, const M: usize>(&self, v: V, packed: &[P], first: usize) {
        // Plain loops, never closures: see `attention`.
        let mut rows: [&[RowGroup]; M] = [&[]; M];
        for i in 0..M {
            rows[i] = self.x.row(first + i);
        }
        let mut out = [[[0f32; LANES]; 2]; M];
        if V::WIDE {
            let sums = product::<P, V, M, 2>(v, packed, 0, rows);
            for (sums, out) in sums.iter().zip(&mut out) {
                v.store(sums[0], &mut out[0]);
                v.store(sums[1], &mut out[1]);
            }
        } else {
            for half in 0..2 {
                let sums = product::<P, V, M, 1>(v, packed, half, rows);
                for (sums, out) in sums.iter().zip(&mut out) {
                    v.store(sums[0], &mut out[half]);
                }
            }
        }
        let column = self.tile * TILE;
        let width = TILE.min(self.w.rows - column);
        for (i, out) in out.iter().enumerate() {
            let start = (first + i) * self.columns.width + self.columns.first + column;
            // SAFETY: tile `self.tile` is dispatched once per product, and only it writes these
            // columns of any row.
            let y = unsafe { self.y.slice(start, width) };
            y.copy_from_slice(&out.as_flattened()[..width]);
        }
    }
}

/// `M` rows of activations times `N` vectors of sixteen weight rows, starting with vector `half` of
/// the tile.
#[inline(always)]
fn product<P: Packed, V: Simd, const M: usize, const N: usize>(
    v: V,
    packed: &[P],
    half: usize,
    rows: [&[RowGroup]; M],
) -> [[V::F; N]; M] {
    for row in rows {
        assert_eq!(
            row.len(),
            packed.len() * P::GROUPS,
            "rows have as many groups as the tile"
        );
    }
    let mut sums = [[v.splat(0.0); N]; M];
    for (g, packed) in packed.iter().enumerate() {
        for group in 0..P::GROUPS {
            // SAFETY: every row has `GROUPS` groups for each of `packed`, and there is a row.
            let mut x = [unsafe { rows[0].get_unchecked(g * P::GROUPS + group) }; M];
            for i in 0..M {
                // SAFETY: as above. A check here would have the sums leave their registers.
                x[i] = unsafe { rows[i].get_unchecked(g * P::GROUPS + group) };
            }
            let dots = packed.dots::<V, M, N>(v, (group, half), x);
            sums = packed.add::<V, M, N>(v, (group, half), x, dots, sums);
        }
    }
    sums
}
