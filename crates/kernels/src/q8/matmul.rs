//! The int8 product: register-blocked over activation rows, each weight tile streamed once per
//! block of rows.

use super::matrix::{PackedGroup, Q8Matrix};
use super::rows::{Q8Rows, RowGroup};
use super::{GROUP, TILE};
use crate::cpu::Kernel;
use crate::isa::{LANES, Simd};
use crate::team::{SharedMut, Team};

/// Most activation rows that one pass over a tile takes.
const ROWS_WIDE: usize = 6;
const ROWS_NARROW: usize = 4;
/// How far ahead of its use a tile is asked for, in bytes. The processor's own prefetcher stops at
/// each 4 KiB page.
const AHEAD: usize = 4 * 1088;

/// `y = x * w^T`: `y[i * w.rows() + j] = sum over k of x[i][k] * w[j][k]`, rounded as the
/// [module](super) says.
///
/// # Panics
/// If `x` and `w` differ in columns or `y` is not `x.rows() * w.rows()` long.
pub fn matmul_q8(team: &Team, x: &Q8Rows, w: &Q8Matrix, y: &mut [f32]) {
    assert_eq!(
        x.columns(),
        w.columns(),
        "activations and weights differ in columns"
    );
    assert_eq!(
        y.len(),
        x.rows() * w.rows(),
        "the product has x.rows() * w.rows() elements"
    );
    if x.rows() == 0 {
        return;
    }
    let isa = team.isa();
    let y = SharedMut::new(y);
    // Enough pieces for a slow member to be helped out, few enough for each to stream a good length
    // of memory.
    let tiles = w.tiles();
    let pieces = tiles.min(team.members() * 8);
    team.for_each(pieces, |piece| {
        let tiles = piece * tiles / pieces..(piece + 1) * tiles / pieces;
        for tile in tiles {
            isa.dispatch(Tile { x, w, tile, y: &y });
        }
    });
}

/// All rows of activations against one tile of weights.
struct Tile<'a> {
    x: &'a Q8Rows,
    w: &'a Q8Matrix,
    tile: usize,
    y: &'a SharedMut<'a, f32>,
}

impl Kernel for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let groups = self.w.tile(self.tile);
        let rows = self.x.rows();
        let most = if V::WIDE { ROWS_WIDE } else { ROWS_NARROW };
        // Blocks of equal height: 8 rows are 4 + 4, not 6 + 2.
        let blocks = rows.div_ceil(most);
        for block in 0..blocks {
            let first = block * rows / blocks;
            let height = (block + 1) * rows / blocks - first;
            match height {
                1 => self.block::<V, 1>(v, groups, first),
                2 => self.block::<V, 2>(v, groups, first),
                3 => self.block::<V, 3>(v, groups, first),
                4 => self.block::<V, 4>(v, groups, first),
                5 if V::WIDE => self.block::<V, 5>(v, groups, first),
                6 if V::WIDE => self.block::<V, 6>(v, groups, first),
                _ => unreachable!("blocks are at most {most} high"),
            }
        }
    }
}

impl Tile<'_> {
    #[inline(always)]
    fn block<V: Simd, const M: usize>(&self, v: V, groups: &[PackedGroup], first: usize) {
        let rows: [&[RowGroup]; M] = std::array::from_fn(|i| self.x.row(first + i));
        let mut out = [[[0f32; LANES]; 2]; M];
        if V::WIDE {
            let sums = product::<V, M, 2>(v, groups, 0, rows);
            for (sums, out) in sums.iter().zip(&mut out) {
                v.store(sums[0], &mut out[0]);
                v.store(sums[1], &mut out[1]);
            }
        } else {
            for half in 0..2 {
                let sums = product::<V, M, 1>(v, groups, half, rows);
                for (sums, out) in sums.iter().zip(&mut out) {
                    v.store(sums[0], &mut out[half]);
                }
            }
        }
        let column = self.tile * TILE;
        let width = TILE.min(self.w.rows() - column);
        for (i, out) in out.iter().enumerate() {
            // SAFETY: tile `self.tile` is dispatched once per product, and only it writes these
            // columns of any row.
            let y = unsafe { self.y.slice((first + i) * self.w.rows() + column, width) };
            y.copy_from_slice(&out.as_flattened()[..width]);
        }
    }
}

/// `M` rows of activations times `N` vectors of sixteen weight rows, starting with vector `half` of
/// the tile.
#[inline(always)]
fn product<V: Simd, const M: usize, const N: usize>(
    v: V,
    groups: &[PackedGroup],
    half: usize,
    mut rows: [&[RowGroup]; M],
) -> [[V::F; N]; M] {
    for row in &mut rows {
        *row = &row[..groups.len()];
    }
    // Plain loops, never closures: see `attention`.
    let mut sums = [[v.splat(0.0); N]; M];
    for (g, group) in groups.iter().enumerate() {
        let ahead = std::ptr::from_ref(group).cast::<u8>().wrapping_add(AHEAD);
        v.prefetch(ahead);
        let mut dots = [[v.splat_i(0); N]; M];
        for i in 0..M {
            dots[i] = [v.dot_start(rows[i][g].offset); N];
        }
        for step in 0..GROUP / 4 {
            let mut w = [v.weights(&group.quants[2 * step + half]); N];
            for n in 0..N {
                v.prefetch(ahead.wrapping_add(64 * (1 + 2 * step + half + n)));
                w[n] = v.weights(&group.quants[2 * step + half + n]);
            }
            for i in 0..M {
                let a = rows[i][g].quants[step];
                for n in 0..N {
                    dots[i][n] = v.dot4(dots[i][n], w[n], a);
                }
            }
        }
        let mut scales = [v.splat(0.0); N];
        for n in 0..N {
            scales[n] = v.load_f16(&group.scales.as_chunks::<LANES>().0[half + n]);
        }
        for i in 0..M {
            let scale = v.splat(rows[i][g].scale);
            for n in 0..N {
                sums[i][n] = v.fma(v.widen(dots[i][n]), v.mul(scales[n], scale), sums[i][n]);
            }
        }
    }
    sums
}
