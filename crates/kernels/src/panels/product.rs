//! The int8 product of rows: register-blocked over activations and panels, each line of weights read
//! from memory once.

use super::int8::Line;
use super::{Int8Matrix, Int8Rows, PANEL};
use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd};
use crate::team::{SharedMut, Team};

/// Lines of a panel that many rows are multiplied with before the next: three panels' are 384 KiB.
const DEEP: usize = 2048;
/// Bytes of panels that blocks of rows take turns on: half of the smallest L2 cache we serve with
/// wide registers, and with narrow ones.
const CLOSE_WIDE: usize = 512 << 10;
const CLOSE_NARROW: usize = 256 << 10;
/// How far ahead of its use a line is asked for, in lines of its panel: from memory, where all
/// panels of a group together have 4 KiB on their way (the processor's own prefetcher stops at each
/// page of 4 KiB), and from L2.
const AHEAD_MEMORY: usize = 64;
const AHEAD_CLOSE: usize = 8;

/// `y = x * w^T`: `y[i * w.rows() + j] = (float(sum over k of x[i][k] * w[j][k]) * wscale[j]) *
/// xscale[i]`.
///
/// # Panics
/// If `x` and `w` differ in columns or `y` is not `x.rows() * w.rows()` long.
pub fn matmul_int8(team: &Team, x: &Int8Rows, w: &Int8Matrix, y: &mut [f32]) {
    // SAFETY: f32 and i32 have one size and alignment, and any bits are both; the slice is borrowed
    // for as long as the view.
    let bits = unsafe { std::slice::from_raw_parts_mut(y.as_mut_ptr().cast::<i32>(), y.len()) };
    multiply(team, x, w, bits, true);
}

/// The sums alone: `sums[i * w.rows() + j] = sum over k of x[i][k] * w[j][k]`, exact.
///
/// # Panics
/// As [`matmul_int8`].
pub fn matmul_int8_sums(team: &Team, x: &Int8Rows, w: &Int8Matrix, sums: &mut [i32]) {
    multiply(team, x, w, sums, false);
}

/// What [`matmul_int8`] does with its sums, wherever they were computed.
///
/// # Panics
/// As [`matmul_int8`], also if `sums` is not as long as `y`.
pub fn scale_sums(team: &Team, x: &Int8Rows, w: &Int8Matrix, sums: &[i32], y: &mut [f32]) {
    check(x, w, y.len());
    assert_eq!(sums.len(), y.len(), "there is one sum for each product");
    let isa = team.isa();
    let outputs = w.rows();
    // Waking the team costs more than scaling a handful of rows.
    const WORTH_SHARING: usize = 1 << 15;
    let scale = |row: usize, y: &mut [f32]| {
        isa.dispatch(Scale {
            sums: &sums[row * outputs..(row + 1) * outputs],
            w,
            scale: x.scales()[row],
            y,
        });
    };
    if y.len() < WORTH_SHARING {
        y.chunks_mut(outputs)
            .enumerate()
            .for_each(|(row, y)| scale(row, y));
    } else {
        team.for_each_chunk_mut(y, outputs, scale);
    }
}

fn check(x: &Int8Rows, w: &Int8Matrix, elements: usize) {
    assert_eq!(
        x.columns(),
        w.columns(),
        "activations and weights differ in columns"
    );
    assert_eq!(
        elements,
        x.rows() * w.rows(),
        "the product has x.rows() * w.rows() elements"
    );
}

/// Panels that are multiplied at once with blocks of so many rows: as many as registers hold, but at
/// most four, since memory likes few streams.
fn panels_at_once(wide: bool, height: usize) -> usize {
    match (wide, height) {
        (true, 0..=6) => 4,
        (true, 7..=8) => 3,
        (true, 9..=12) => 2,
        (false, 1) => 2,
        _ => 1,
    }
}

fn multiply(team: &Team, x: &Int8Rows, w: &Int8Matrix, out: &mut [i32], scaled: bool) {
    check(x, w, out.len());
    if x.rows() == 0 {
        return;
    }
    let isa = team.isa();
    let blocks = x.rows().div_ceil(x.height());
    let at_once = panels_at_once(isa.wide(), x.height());
    let groups = w.panels().div_ceil(at_once);
    let pieces = if blocks == 1 {
        // Enough for a slow member to be helped out, few enough for each to stream a good length of
        // memory.
        team.members() * 8
    } else {
        let close = if isa.wide() { CLOSE_WIDE } else { CLOSE_NARROW };
        let group = at_once * w.lines().min(DEEP) * size_of::<Line>();
        groups
            .div_ceil((close / group).max(1))
            .next_multiple_of(team.members())
    }
    .min(groups);
    let out = SharedMut::new(out);
    team.for_each(pieces, |piece| {
        let first = piece * groups / pieces * at_once;
        let last = ((piece + 1) * groups / pieces * at_once).min(w.panels());
        let product = Product {
            x,
            w,
            isa,
            out: &out,
            scaled,
        };
        product.panels(first, last, at_once);
    });
}

/// What all pieces of a product share.
#[derive(Clone, Copy)]
struct Product<'a> {
    x: &'a Int8Rows,
    w: &'a Int8Matrix,
    isa: Isa,
    /// Sums, or the bits of f32.
    out: &'a SharedMut<'a, i32>,
    scaled: bool,
}

/// A block of rows, the first of some panels, and a range of their lines.
#[derive(Clone, Copy)]
struct At {
    block: usize,
    panel: usize,
    lines: (usize, usize),
}

impl Product<'_> {
    /// All rows of activations against panels `first..last`.
    fn panels(&self, first: usize, last: usize, at_once: usize) {
        let blocks = self.x.rows().div_ceil(self.x.height());
        let all = self.w.lines();
        // With one block nothing is used twice, and each panel should be streamed to its end.
        let deep = if blocks == 1 { all } else { DEEP };
        let mut line = 0;
        while line < all {
            let lines = (line, all.min(line + deep));
            for block in 0..blocks {
                let mut panel = first;
                while panel < last {
                    let at = At {
                        block,
                        panel,
                        lines,
                    };
                    panel += match if last - panel < at_once { 1 } else { at_once } {
                        4 => self.four(at),
                        3 => self.three(at),
                        2 => self.two(at),
                        _ => self.one(at),
                    };
                }
            }
            line = lines.1;
        }
    }
}

/// A method that multiplies `$panels` panels with a block of one of the heights that registers hold
/// and returns `$panels`. Blocks of other heights never meet so many.
macro_rules! heights {
    ($name:ident, $panels:literal: $($height:literal)*) => {
        fn $name(&self, at: At) -> usize {
            match self.x.block(at.block).1 {
                $($height => self.isa.dispatch(Tile::<$height, $panels> { product: *self, at }),)*
                height => unreachable!("blocks of {height} rows do not meet {} panels", $panels),
            }
            $panels
        }
    };
}

impl Product<'_> {
    heights!(one, 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24);
    heights!(two, 2: 1 9 10 11 12);
    heights!(three, 3: 1 2 3 4 5 6 7 8);
    heights!(four, 4: 1 2 3 4 5 6);
}

/// A block of `M` rows of activations against `P` panels.
struct Tile<'a, const M: usize, const P: usize> {
    product: Product<'a>,
    at: At,
}

impl<const M: usize, const P: usize> Kernel for Tile<'_, M, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        // Compiled only where `panels_at_once` and the rows' blocks can lead.
        if V::WIDE || (M <= 4 && P == 1) || (M == 1 && P == 2) {
            self.product.tile::<V, M, P>(v, self.at);
        } else {
            unreachable!("{M} rows by {P} panels are for more registers");
        }
    }
}

impl Product<'_> {
    /// `M` rows of activations against `P` panels.
    #[inline(always)]
    fn tile<V: Simd, const M: usize, const P: usize>(&self, v: V, at: At) {
        let first_row = at.block * self.x.height();
        let outputs = self.w.rows();
        let start = |i: usize, p: usize| (first_row + i) * outputs + (at.panel + p) * PANEL;
        let width = |p: usize| PANEL.min(outputs - (at.panel + p) * PANEL);
        let mut sums = [[v.splat_i(0); P]; M];
        if at.lines.0 == 0 {
            let offsets = &self.x.offsets()[first_row..first_row + M];
            for i in 0..M {
                sums[i] = [v.dot_start(offsets[i]); P];
            }
        } else {
            for i in 0..M {
                for p in 0..P {
                    // SAFETY: each panel belongs to one piece of the product, and only its columns
                    // of the output are used here.
                    let so_far = unsafe { self.out.slice(start(i, p), width(p)) };
                    let mut lanes = [0; LANES];
                    lanes[..so_far.len()].copy_from_slice(so_far);
                    sums[i][p] = v.load_i(&lanes);
                }
            }
        }
        let sums = self.accumulate::<V, M, P>(v, at, sums);
        let finish = self.scaled && at.lines.1 == self.w.lines();
        for i in 0..M {
            for p in 0..P {
                let mut result = sums[i][p];
                if finish {
                    let scaled = v.mul(v.widen(result), v.load(self.w.scales(at.panel + p)));
                    let scale = v.splat(self.x.scales()[first_row + i]);
                    result = v.bits(v.mul(scaled, scale));
                }
                // SAFETY: as above.
                let out = unsafe { self.out.slice(start(i, p), width(p)) };
                match out.as_mut_array() {
                    Some(out) => v.store_i(result, out),
                    None => {
                        let mut lanes = [0; LANES];
                        v.store_i(result, &mut lanes);
                        out.copy_from_slice(&lanes[..out.len()]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn accumulate<V: Simd, const M: usize, const P: usize>(
        &self,
        v: V,
        at: At,
        sums: [[V::I; P]; M],
    ) -> [[V::I; P]; M] {
        let x = &self.x.block(at.block).0.as_chunks::<M>().0[at.lines.0..at.lines.1];
        let mut w: [&[Line]; P] = [&[]; P];
        for p in 0..P {
            w[p] = &self.w.panel(at.panel + p)[at.lines.0..at.lines.1][..x.len()];
        }
        let ahead = if self.x.height() == self.x.rows() {
            AHEAD_MEMORY / P
        } else {
            AHEAD_CLOSE
        };
        // What follows a panel in this group was read already: towards the end the lines to ask for
        // are those of the next group.
        let near = x.len().saturating_sub(ahead);
        let far = ahead + (P - 1) * self.w.lines();
        let (x_near, x_far) = x.split_at(near);
        let mut w_near = w;
        let mut w_far = w;
        for p in 0..P {
            (w_near[p], w_far[p]) = w[p].split_at(near);
        }
        let sums = steps(v, sums, x_near, w_near, ahead);
        steps(v, sums, x_far, w_far, far)
    }
}

/// Adds `M` rows by `P` panels of as many lines, with none of the checks that would have sums
/// leave their registers.
#[inline(always)]
fn steps<V: Simd, const M: usize, const P: usize>(
    v: V,
    mut sums: [[V::I; P]; M],
    x: &[[i32; M]],
    w: [&[Line]; P],
    ahead: usize,
) -> [[V::I; P]; M] {
    for w in w {
        assert_eq!(w.len(), x.len(), "panels and rows have one length");
    }
    for (k, x) in x.iter().enumerate() {
        let mut loaded = [v.weights(&[0; 64]); P];
        for p in 0..P {
            // SAFETY: `k` is below the length of `x`, which is that of each of `w`.
            let line = unsafe { w[p].get_unchecked(k) };
            v.prefetch((&raw const *line).wrapping_add(ahead).cast());
            loaded[p] = v.weights(line);
        }
        for i in 0..M {
            for p in 0..P {
                sums[i][p] = v.dot4(sums[i][p], loaded[p], x[i]);
            }
        }
    }
    sums
}

/// One row of sums to one row of results.
struct Scale<'a> {
    sums: &'a [i32],
    w: &'a Int8Matrix,
    scale: f32,
    y: &'a mut [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let scale = v.splat(self.scale);
        let panels = self.sums.chunks(PANEL).zip(self.y.chunks_mut(PANEL));
        for (panel, (sums, y)) in panels.enumerate() {
            let mut lanes = [0; LANES];
            lanes[..sums.len()].copy_from_slice(sums);
            let scaled = v.mul(v.widen(v.load_i(&lanes)), v.load(self.w.scales(panel)));
            crate::isa::store_part(v, v.mul(scaled, scale), y);
        }
    }
}
