//! The product of rows on tile registers. A line of a panel is a row of a tile: sixteen lines are the
//! second factor of a multiplication, sixteen rows of activations of as many words the first.

use super::product::{Arithmetic, DEEP, divide};
use super::{PANEL, packed::Panels};
use crate::cpu::TileKernel;
use crate::isa::amx::{Config, ROW_BYTES, ROWS, Tiles};
use crate::isa::{LANES, Simd};
use crate::team::{SharedMut, Team};

/// Bytes of panels that blocks of rows take turns on: half of the L2 cache of the processors that have
/// tiles.
const CLOSE: usize = 1 << 20;

/// Multiplies rows that are [laid out for tiles](super::blocks::Blocks::tiled).
pub(super) fn multiply<A: Arithmetic>(team: &Team, arithmetic: A, out: &mut [i32]) {
    let isa = team.isa();
    let (x, w) = (arithmetic.rows(), arithmetic.panels());
    let out = SharedMut::new(out);
    divide(team, x, w, (2, CLOSE), |first, last| {
        isa.dispatch_tiles(Piece {
            arithmetic,
            out: &out,
            panels: (first, last),
        });
    });
}

/// All rows of activations against a range of panels.
struct Piece<'a, A> {
    arithmetic: A,
    out: &'a SharedMut<'a, i32>,
    panels: (usize, usize),
}

/// Sums of up to two blocks of rows by up to two panels, each a tile, as memory holds them.
#[repr(align(64))]
struct Sums([[[[i32; PANEL]; ROWS]; 2]; 2]);

/// Up to two blocks and two panels, and a range of their lines.
#[derive(Clone, Copy)]
struct At {
    block: usize,
    blocks: usize,
    panel: usize,
    panels: usize,
    lines: (usize, usize),
}

impl<A: Arithmetic> TileKernel for Piece<'_, A> {
    #[inline(always)]
    fn run<V: Simd, T: Tiles>(self, v: V, tiles: &mut T) {
        let (rows, panels) = (self.arithmetic.rows(), self.arithmetic.panels());
        let mut configured = None;
        let mut sums = Sums([[[[0; PANEL]; ROWS]; 2]; 2]);
        let mut line = 0;
        while line < panels.lines() {
            let lines = (line, panels.lines().min(line + DEEP));
            for block in (0..rows.count()).step_by(2) {
                for panel in (self.panels.0..self.panels.1).step_by(2) {
                    let at = At {
                        block,
                        blocks: (rows.count() - block).min(2),
                        panel,
                        panels: (self.panels.1 - panel).min(2),
                        lines,
                    };
                    self.before(at, &mut sums);
                    self.add(tiles, &mut configured, at, &mut sums);
                    self.after(v, at, &sums);
                }
            }
            line = lines.1;
        }
        tiles.release();
    }
}

impl<A: Arithmetic> Piece<'_, A> {
    /// Calls `with(block, panel, row of the block, place in the output, width)` for each row of sums.
    #[inline(always)]
    fn each_row(&self, at: At, mut with: impl FnMut(usize, usize, usize, usize, usize)) {
        let outputs = self.arithmetic.panels().rows();
        for b in 0..at.blocks {
            let (_, height) = self.arithmetic.rows().block(at.block + b);
            for p in 0..at.panels {
                let column = (at.panel + p) * PANEL;
                for i in 0..height {
                    let row = (at.block + b) * ROWS + i;
                    with(b, p, i, row * outputs + column, PANEL.min(outputs - column));
                }
            }
        }
    }

    /// Sums to go on with.
    #[inline(always)]
    fn before(&self, at: At, sums: &mut Sums) {
        self.each_row(at, |b, p, i, start, width| {
            let sums = &mut sums.0[b][p][i];
            if at.lines.0 == 0 {
                *sums = [self.arithmetic.start_of_tile((at.block + b) * ROWS + i); PANEL];
            } else {
                // SAFETY: each panel belongs to one piece, and only its columns are used here.
                sums[..width].copy_from_slice(unsafe { self.out.slice(start, width) });
            }
        });
    }

    /// Results, or sums that more lines follow.
    #[inline(always)]
    fn after<V: Simd>(&self, v: V, at: At, sums: &Sums) {
        let finish = at.lines.1 == self.arithmetic.panels().lines();
        self.each_row(at, |b, p, i, start, width| {
            let sums = A::resume(v, v.load_i(&sums.0[b][p][i]));
            let result = if finish {
                let row = (at.block + b) * ROWS + i;
                self.arithmetic.finish(v, sums, row, at.panel + p)
            } else {
                A::pause(v, sums)
            };
            let mut lanes = [0; LANES];
            v.store_i(result, &mut lanes);
            // SAFETY: as before.
            let out = unsafe { self.out.slice(start, width) };
            out.copy_from_slice(&lanes[..width]);
        });
    }

    /// Adds the products of all lines: as many as a tile has rows at a time, then what is left.
    #[inline(always)]
    fn add<T: Tiles>(
        &self,
        tiles: &mut T,
        configured: &mut Option<Config>,
        at: At,
        sums: &mut Sums,
    ) {
        let lines = at.lines.1 - at.lines.0;
        let whole = lines / ROWS;
        let first = at.lines.0;
        if whole > 0 {
            self.configure(tiles, configured, at, ROWS);
            self.steps(tiles, at, first, ROWS, whole, sums);
        }
        let rest = lines % ROWS;
        if rest > 0 {
            self.configure(tiles, configured, at, rest);
            self.steps(tiles, at, first + whole * ROWS, rest, 1, sums);
        }
    }

    /// Tiles 0 to 3 hold sums, 4 and 5 rows of activations, 6 and 7 panels, `depth` words deep.
    #[inline(always)]
    fn configure<T: Tiles>(
        &self,
        tiles: &mut T,
        configured: &mut Option<Config>,
        at: At,
        depth: usize,
    ) {
        let height = |b: usize| match b < at.blocks {
            true => self.arithmetic.rows().block(at.block + b).1,
            false => 0,
        };
        let bytes = |rows: usize, bytes: usize| if rows > 0 { (rows, bytes) } else { (0, 0) };
        let (upper, lower) = (height(0), height(1));
        let config = Config::new([
            bytes(upper, ROW_BYTES),
            bytes(upper, ROW_BYTES),
            bytes(lower, ROW_BYTES),
            bytes(lower, ROW_BYTES),
            bytes(upper, depth * 4),
            bytes(lower, depth * 4),
            (depth, ROW_BYTES),
            (depth, ROW_BYTES),
        ]);
        if *configured != Some(config) {
            tiles.configure(&config);
            *configured = Some(config);
        }
    }

    /// `steps` multiplications, each `depth` words deep, from line `line` on.
    #[inline(always)]
    fn steps<T: Tiles>(
        &self,
        tiles: &mut T,
        at: At,
        line: usize,
        depth: usize,
        steps: usize,
        sums: &mut Sums,
    ) {
        let (rows, panels) = (self.arithmetic.rows(), self.arithmetic.panels());
        let stride = panels.lines() * 4;
        let (two_blocks, two_panels) = (at.blocks == 2, at.panels == 2);
        let x = |b: usize| rows.block(at.block + b).0[line..].as_ptr().cast::<u8>();
        let w = |p: usize| first_bytes(panels, at.panel + p, line, steps * depth);
        let x = [x(0), if two_blocks { x(1) } else { x(0) }];
        let w = [w(0), if two_panels { w(1) } else { w(0) }];
        let [[s00, s01], [s10, s11]] = &mut sums.0;
        // SAFETY: a tile of sums has at most 16 rows of 64 bytes, as each of these has. Rows of
        // activations are `stride` bytes apart, as many as their block and so their tile has, and
        // `line + steps * depth` words long at least; panels have so many lines, which
        // `first_bytes` checked. Tiles are multiplied only as configured above.
        unsafe {
            tiles.load::<0>(s00.as_ptr().cast(), ROW_BYTES);
            if two_panels {
                tiles.load::<1>(s01.as_ptr().cast(), ROW_BYTES);
            }
            if two_blocks {
                tiles.load::<2>(s10.as_ptr().cast(), ROW_BYTES);
                if two_panels {
                    tiles.load::<3>(s11.as_ptr().cast(), ROW_BYTES);
                }
            }
            for step in 0..steps {
                let (words, bytes) = (step * depth * 4, step * depth * ROW_BYTES);
                tiles.load::<4>(x[0].add(words), stride);
                tiles.load::<6>(w[0].add(bytes), ROW_BYTES);
                A::tiles::<T, 0, 4, 6>(tiles);
                if two_panels {
                    tiles.load::<7>(w[1].add(bytes), ROW_BYTES);
                    A::tiles::<T, 1, 4, 7>(tiles);
                }
                if two_blocks {
                    tiles.load::<5>(x[1].add(words), stride);
                    A::tiles::<T, 2, 5, 6>(tiles);
                    if two_panels {
                        A::tiles::<T, 3, 5, 7>(tiles);
                    }
                }
            }
            tiles.store::<0>(s00.as_mut_ptr().cast(), ROW_BYTES);
            if two_panels {
                tiles.store::<1>(s01.as_mut_ptr().cast(), ROW_BYTES);
            }
            if two_blocks {
                tiles.store::<2>(s10.as_mut_ptr().cast(), ROW_BYTES);
                if two_panels {
                    tiles.store::<3>(s11.as_mut_ptr().cast(), ROW_BYTES);
                }
            }
        }
    }
}

/// Where `lines` lines of a panel begin.
fn first_bytes(panels: &Panels, panel: usize, line: usize, lines: usize) -> *const u8 {
    panels.panel(panel)[line..line + lines].as_ptr().cast()
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::Isa;
    use crate::mem::Region;
    use crate::panels::{
        Bf16Matrix, Bf16Rows, Int8Matrix, Int8Rows, matmul_bf16, matmul_int8, matmul_int8_sums,
    };

    /// Rows around tiles, pairs of tiles and one pass; outputs around panels and pairs; columns
    /// around words, tiles and a piece of a panel.
    const ROW_COUNTS: [usize; 12] = [1, 2, 15, 16, 17, 25, 31, 32, 33, 47, 48, 65];
    const SHAPES: [(usize, usize); 12] = [
        (1, 1),
        (15, 3),
        (16, 32),
        (17, 33),
        (31, 31),
        (32, 64),
        (33, 65),
        (48, 63),
        (49, 100),
        (64, 129),
        (97, 127),
        (5, 8300),
    ];

    fn numbers(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 2f32.powi((state >> 28) as i32 - 8)
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    fn int8(
        isa: Isa,
        threads: usize,
        x: &[f32],
        w: &[f32],
        k: usize,
    ) -> (Vec<i32>, Vec<u32>, bool) {
        let team = Team::with_isa(threads, isa).unwrap();
        let n = w.len() / k;
        let fill = |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * k..][..k]);
        let w = Int8Matrix::from_rows_in(&mut Region::default(), &team, n, k, fill).unwrap();
        let mut rows = Int8Rows::with_capacity(0, k);
        rows.quantise(&team, x, k, None);
        let mut sums = vec![i32::MIN; rows.rows() * n];
        let mut y = vec![f32::NAN; rows.rows() * n];
        matmul_int8_sums(&team, &rows, &w, &mut sums);
        matmul_int8(&team, &rows, &w, &mut y);
        let mut quants = vec![0; k];
        let scales: Vec<f32> = (0..rows.rows()).map(|i| rows.row(i, &mut quants)).collect();
        assert!(scales.iter().all(|s| s.is_finite()));
        let bits = y.into_iter().map(f32::to_bits).collect();
        (sums, bits, rows.blocks().tiled())
    }

    #[test]
    fn integers_have_the_bits_of_every_other_instruction_set() {
        for (n, k) in SHAPES {
            let w = numbers(7, n * k);
            for m in ROW_COUNTS.into_iter().filter(|m| m * n * k < 2_000_000) {
                let x = numbers(11, m * k);
                let expected = int8(Isa::SCALAR, 1, &x, &w, k);
                for threads in [1, 3] {
                    let found = int8(Isa::INTERPRETED, threads, &x, &w, k);
                    assert_eq!(found.2, m > 24, "few rows wait for memory");
                    assert!(found.0 == expected.0, "sums, m={m} n={n} k={k}");
                    assert!(found.1 == expected.1, "results, m={m} n={n} k={k}");
                }
            }
        }
    }

    /// The documented sum of a row of activations and one of weights.
    fn sum(x: &[f32], w: &[f32]) -> f32 {
        let round = |x: &f32| {
            let x = bf16::from_f32(*x).to_f32();
            if x.abs() < 2f32.powi(-56) { 0.0 } else { x }
        };
        let mut total = 0f32;
        for (x, w) in x.chunks(32).zip(w.chunks(32)) {
            let mut sums = [0f32; 2];
            for (i, (x, w)) in x.iter().zip(w).enumerate() {
                sums[i % 2] = round(x).mul_add(round(w), sums[i % 2]);
            }
            total += sums[0] + sums[1];
        }
        total
    }

    #[test]
    fn bf16_is_summed_in_the_documented_order_whatever_the_batch() {
        for (n, k) in SHAPES {
            let w = numbers(3, n * k);
            for m in ROW_COUNTS.into_iter().filter(|m| m * n * k < 2_000_000) {
                let x = numbers(5, m * k);
                for threads in [1, 3] {
                    let team = Team::with_isa(threads, Isa::INTERPRETED).unwrap();
                    let fill = |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * k..][..k]);
                    let packed =
                        Bf16Matrix::from_rows_in(&mut Region::default(), &team, n, k, fill)
                            .unwrap();
                    let mut rows = Bf16Rows::with_capacity(0, k);
                    rows.round(&team, &x, k);
                    assert!(rows.blocks().tiled());
                    let mut y = vec![f32::NAN; m * n];
                    matmul_bf16(&team, &rows, &packed, &mut y);
                    for (i, y) in y.iter().enumerate() {
                        let expected = sum(&x[i / n * k..][..k], &w[i % n * k..][..k]);
                        assert_eq!(y.to_bits(), expected.to_bits(), "{i} of m={m} n={n} k={k}");
                    }
                    let mut back = vec![0.0; k];
                    rows.row(m - 1, &mut back);
                    assert_eq!(back[k - 1], {
                        let x = bf16::from_f32(x[m * k - 1]).to_f32();
                        if x.abs() < 2f32.powi(-56) { 0.0 } else { x }
                    });
                }
            }
        }
    }
}
