//! The product of rows: register-blocked over activations and panels, each line of weights read from
//! memory once. What words hold, and what becomes of a sum, is an [`Arithmetic`]'s.

use super::blocks::Blocks;
use super::packed::{Line, Panels};
use super::{Bf16Matrix, Bf16Rows, Int8Matrix, Int8Rows, PANEL};
use crate::cpu::{Isa, Kernel};
#[cfg(target_arch = "x86_64")]
use crate::isa::amx::Tiles;
use crate::isa::{LANES, Simd};
use crate::team::{SharedMut, Team};

/// Lines of a panel that many rows are multiplied with before the next: three panels' are 384 KiB.
pub(super) const DEEP: usize = 2048;
/// Bytes of panels that blocks of rows take turns on: half of the smallest L2 cache we serve with
/// wide registers, and with narrow ones.
const CLOSE_WIDE: usize = 512 << 10;
const CLOSE_NARROW: usize = 256 << 10;
/// How far ahead of its use a line is asked for, in lines of its panel: from memory, where all
/// panels of a group together have 4 KiB on their way (the processor's own prefetcher stops at each
/// page of 4 KiB), and from L2. Lines from memory are asked for into L2 only: asked for into L1,
/// several streams at once ran at 80 % of the read bandwidth instead of 96 % (Zen 4).
const AHEAD_MEMORY: usize = 64;
const AHEAD_CLOSE: usize = 8;

/// `y = x * w^T`: `y[i * w.rows() + j] = (float(sum over k of x[i][k] * w[j][k]) * wscale[j]) *
/// xscale[i]`.
///
/// # Panics
/// If `x` and `w` differ in columns or `y` is not `x.rows() * w.rows()` long.
pub fn matmul_int8(team: &Team, x: &Int8Rows, w: &Int8Matrix, y: &mut [f32]) {
    let scaled = true;
    multiply(team, Int8 { x, w, scaled }, as_bits(y));
}

/// The sums alone: `sums[i * w.rows() + j] = sum over k of x[i][k] * w[j][k]`, exact.
///
/// # Panics
/// As [`matmul_int8`].
pub fn matmul_int8_sums(team: &Team, x: &Int8Rows, w: &Int8Matrix, sums: &mut [i32]) {
    let scaled = false;
    multiply(team, Int8 { x, w, scaled }, sums);
}

/// `y = x * w^T` in bf16: `y[i * w.rows() + j] = sum over k of x[i][k] * w[j][k]`, rounded as the
/// [module](super) says.
///
/// # Panics
/// As [`matmul_int8`].
pub fn matmul_bf16(team: &Team, x: &Bf16Rows, w: &Bf16Matrix, y: &mut [f32]) {
    multiply(team, Bf16 { x, w }, as_bits(y));
}

/// What [`matmul_int8`] does with its sums, wherever they were computed.
///
/// # Panics
/// As [`matmul_int8`], also if `sums` is not as long as `y`.
pub fn scale_sums(team: &Team, x: &Int8Rows, w: &Int8Matrix, sums: &[i32], y: &mut [f32]) {
    check(x.blocks(), w.panels(), y.len());
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

fn as_bits(y: &mut [f32]) -> &mut [i32] {
    // SAFETY: f32 and i32 have one size and alignment, and any bits are both; the slice is borrowed
    // for as long as the view.
    unsafe { std::slice::from_raw_parts_mut(y.as_mut_ptr().cast(), y.len()) }
}

fn check(x: &Blocks, w: &Panels, elements: usize) {
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

/// Rows and weights, what their words hold, and what becomes of their products.
pub(super) trait Arithmetic: Copy + Sync {
    /// Whether words are pairs of bf16: [`Kernel::BF16`].
    const BF16: bool;
    /// A line of weights, loaded.
    type Weights<V: Simd>: Copy;
    /// Unfinished sums of sixteen rows of weights.
    type Sums<V: Simd>: Copy;

    fn rows(&self) -> &Blocks;
    fn panels(&self) -> &Panels;
    fn load<V: Simd>(v: V, line: &Line) -> Self::Weights<V>;
    /// What sums of a row of activations start from.
    fn start<V: Simd>(&self, v: V, row: usize) -> Self::Sums<V>;
    /// Adds the products of a line and a word.
    fn add<V: Simd>(v: V, sums: Self::Sums<V>, w: Self::Weights<V>, x: i32) -> Self::Sums<V>;
    /// Unfinished sums as the output holds them, and back.
    fn pause<V: Simd>(v: V, sums: Self::Sums<V>) -> V::I;
    fn resume<V: Simd>(v: V, sums: V::I) -> Self::Sums<V>;
    /// What a row of a tile of sums starts from, in each of its words.
    #[cfg(target_arch = "x86_64")]
    fn start_of_tile(&self, row: usize) -> i32;
    /// Adds the products of two tiles, `A` of activations and `B` of weights, to tile `C`.
    ///
    /// # Safety
    /// As [`Tiles::dot_int8`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn tiles<T: Tiles, const C: u8, const A: u8, const B: u8>(tiles: &mut T);
    /// The bits of the result of a row of activations and a panel.
    fn finish<V: Simd>(&self, v: V, sums: Self::Sums<V>, row: usize, panel: usize) -> V::I;
}

/// int8 with exact sums.
#[derive(Clone, Copy)]
struct Int8<'a> {
    x: &'a Int8Rows,
    w: &'a Int8Matrix,
    /// Whether results are f32, not sums.
    scaled: bool,
}

impl Arithmetic for Int8<'_> {
    const BF16: bool = false;
    type Weights<V: Simd> = V::W;
    type Sums<V: Simd> = V::I;

    #[inline(always)]
    fn rows(&self) -> &Blocks {
        self.x.blocks()
    }
    #[inline(always)]
    fn panels(&self) -> &Panels {
        self.w.panels()
    }
    #[inline(always)]
    fn load<V: Simd>(v: V, line: &Line) -> V::W {
        v.weights(line)
    }
    #[inline(always)]
    fn start<V: Simd>(&self, v: V, row: usize) -> V::I {
        v.dot_start(self.x.offsets()[row])
    }
    #[inline(always)]
    fn add<V: Simd>(v: V, sums: V::I, w: V::W, x: i32) -> V::I {
        v.dot4(sums, w, x)
    }
    #[inline(always)]
    fn pause<V: Simd>(_: V, sums: V::I) -> V::I {
        sums
    }
    #[inline(always)]
    fn resume<V: Simd>(_: V, sums: V::I) -> V::I {
        sums
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn start_of_tile(&self, row: usize) -> i32 {
        self.x.offsets()[row]
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn tiles<T: Tiles, const C: u8, const A: u8, const B: u8>(tiles: &mut T) {
        // SAFETY: the caller's.
        unsafe { tiles.dot_int8::<C, A, B>() };
    }
    #[inline(always)]
    fn finish<V: Simd>(&self, v: V, sums: V::I, row: usize, panel: usize) -> V::I {
        if !self.scaled {
            return sums;
        }
        let scaled = v.mul(v.widen(sums), v.load(self.w.scales(panel)));
        v.bits(v.mul(scaled, v.splat(self.x.scales()[row])))
    }
}

/// bf16 with sums in f32.
#[derive(Clone, Copy)]
struct Bf16<'a> {
    x: &'a Bf16Rows,
    w: &'a Bf16Matrix,
}

impl Arithmetic for Bf16<'_> {
    const BF16: bool = true;
    type Weights<V: Simd> = V::B;
    type Sums<V: Simd> = V::F;

    #[inline(always)]
    fn rows(&self) -> &Blocks {
        self.x.blocks()
    }
    #[inline(always)]
    fn panels(&self) -> &Panels {
        self.w.panels()
    }
    #[inline(always)]
    fn load<V: Simd>(v: V, line: &Line) -> V::B {
        v.bf16_pairs(line)
    }
    #[inline(always)]
    fn start<V: Simd>(&self, v: V, _: usize) -> V::F {
        v.splat(0.0)
    }
    #[inline(always)]
    fn add<V: Simd>(v: V, sums: V::F, w: V::B, x: i32) -> V::F {
        v.dot_bf16(sums, w, x)
    }
    #[inline(always)]
    fn pause<V: Simd>(v: V, sums: V::F) -> V::I {
        v.bits(sums)
    }
    #[inline(always)]
    fn resume<V: Simd>(v: V, sums: V::I) -> V::F {
        v.float_from_bits(sums)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn start_of_tile(&self, _: usize) -> i32 {
        0f32.to_bits() as i32
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn tiles<T: Tiles, const C: u8, const A: u8, const B: u8>(tiles: &mut T) {
        // SAFETY: the caller's.
        unsafe { tiles.dot_bf16::<C, A, B>() };
    }
    #[inline(always)]
    fn finish<V: Simd>(&self, v: V, sums: V::F, _: usize, _: usize) -> V::I {
        v.bits(sums)
    }
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

fn multiply<A: Arithmetic>(team: &Team, arithmetic: A, out: &mut [i32]) {
    let (x, w) = (arithmetic.rows(), arithmetic.panels());
    check(x, w, out.len());
    if x.rows() == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if x.tiled() {
        return super::tiles::multiply(team, arithmetic, out);
    }
    let isa = team.isa();
    let at_once = panels_at_once(isa.wide(), x.height());
    let close = if isa.wide() { CLOSE_WIDE } else { CLOSE_NARROW };
    let out = SharedMut::new(out);
    divide(team, x, w, (at_once, close), |first, last| {
        let product = Product {
            arithmetic,
            isa,
            out: &out,
        };
        product.panels(first, last, at_once);
    });
}

/// Shares out panels: calls `multiply(first, last)` for ranges that are whole groups of `at_once` panels, but for the last.
/// Blocks of rows take turns on as many panels as fit `close` bytes.
pub(super) fn divide(
    team: &Team,
    x: &Blocks,
    w: &Panels,
    (at_once, close): (usize, usize),
    multiply: impl Fn(usize, usize) + Sync,
) {
    let groups = w.count().div_ceil(at_once);
    let pieces = if x.count() == 1 {
        // Enough for a slow member to be helped out, few enough for each to stream a good length of
        // memory.
        team.members() * 8
    } else {
        let group = at_once * w.lines().min(DEEP) * size_of::<Line>();
        groups
            .div_ceil((close / group).max(1))
            .next_multiple_of(team.members())
    }
    .min(groups);
    team.for_each(pieces, |piece| {
        let first = piece * groups / pieces * at_once;
        let last = ((piece + 1) * groups / pieces * at_once).min(w.count());
        multiply(first, last);
    });
}

/// What all pieces of a product share.
#[derive(Clone, Copy)]
struct Product<'a, A> {
    arithmetic: A,
    isa: Isa,
    /// Sums, or the bits of f32.
    out: &'a SharedMut<'a, i32>,
}

/// A block of rows, the first of some panels, and a range of their lines.
#[derive(Clone, Copy)]
struct At {
    block: usize,
    panel: usize,
    lines: (usize, usize),
}

impl<A: Arithmetic> Product<'_, A> {
    /// All rows of activations against panels `first..last`.
    fn panels(&self, first: usize, last: usize, at_once: usize) {
        let blocks = self.arithmetic.rows().count();
        let all = self.arithmetic.panels().lines();
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
            match self.arithmetic.rows().block(at.block).1 {
                $($height => self.isa.dispatch(Tile::<A, $height, $panels> { product: *self, at }),)*
                height => unreachable!("blocks of {height} rows do not meet {} panels", $panels),
            }
            $panels
        }
    };
}

impl<A: Arithmetic> Product<'_, A> {
    heights!(one, 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24);
    heights!(two, 2: 1 9 10 11 12);
    heights!(three, 3: 1 2 3 4 5 6 7 8);
    heights!(four, 4: 1 2 3 4 5 6);
}

/// A block of `M` rows of activations against `P` panels.
struct Tile<'a, A, const M: usize, const P: usize> {
    product: Product<'a, A>,
    at: At,
}

impl<A: Arithmetic, const M: usize, const P: usize> Kernel for Tile<'_, A, M, P> {
    type Output = ();

    const BF16: bool = A::BF16;

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

impl<A: Arithmetic> Product<'_, A> {
    /// `M` rows of activations against `P` panels.
    #[inline(always)]
    fn tile<V: Simd, const M: usize, const P: usize>(&self, v: V, at: At) {
        let arithmetic = &self.arithmetic;
        let first_row = at.block * arithmetic.rows().height();
        let outputs = arithmetic.panels().rows();
        let start = |i: usize, p: usize| (first_row + i) * outputs + (at.panel + p) * PANEL;
        let width = |p: usize| PANEL.min(outputs - (at.panel + p) * PANEL);
        let mut sums = [[A::resume(v, v.splat_i(0)); P]; M];
        if at.lines.0 == 0 {
            for i in 0..M {
                sums[i] = [arithmetic.start(v, first_row + i); P];
            }
        } else {
            for i in 0..M {
                for p in 0..P {
                    // SAFETY: each panel belongs to one piece of the product, and only its columns
                    // of the output are used here.
                    let so_far = unsafe { self.out.slice(start(i, p), width(p)) };
                    let mut lanes = [0; LANES];
                    lanes[..so_far.len()].copy_from_slice(so_far);
                    sums[i][p] = A::resume(v, v.load_i(&lanes));
                }
            }
        }
        let sums = self.accumulate::<V, M, P>(v, at, sums);
        let finish = at.lines.1 == arithmetic.panels().lines();
        for i in 0..M {
            for p in 0..P {
                let result = if finish {
                    arithmetic.finish(v, sums[i][p], first_row + i, at.panel + p)
                } else {
                    A::pause(v, sums[i][p])
                };
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
        sums: [[A::Sums<V>; P]; M],
    ) -> [[A::Sums<V>; P]; M] {
        let (rows, panels) = (self.arithmetic.rows(), self.arithmetic.panels());
        let x = &rows.block(at.block).0.as_chunks::<M>().0[at.lines.0..at.lines.1];
        let mut w: [&[Line]; P] = [&[]; P];
        for p in 0..P {
            w[p] = &panels.panel(at.panel + p)[at.lines.0..at.lines.1][..x.len()];
        }
        let ahead = if rows.count() == 1 {
            AHEAD_MEMORY / P
        } else {
            AHEAD_CLOSE
        };
        // What follows a panel in this group was read already: towards the end the lines to ask for
        // are those of the next group.
        let near = x.len().saturating_sub(ahead);
        let far = ahead + (P - 1) * panels.lines();
        let (x_near, x_far) = x.split_at(near);
        let mut w_near = w;
        let mut w_far = w;
        for p in 0..P {
            (w_near[p], w_far[p]) = w[p].split_at(near);
        }
        let sums = steps::<A, V, M, P>(v, sums, x_near, w_near, ahead);
        steps::<A, V, M, P>(v, sums, x_far, w_far, far)
    }
}

/// Adds `M` rows by `P` panels of as many lines, with none of the checks that would have sums
/// leave their registers.
#[inline(always)]
fn steps<A: Arithmetic, V: Simd, const M: usize, const P: usize>(
    v: V,
    mut sums: [[A::Sums<V>; P]; M],
    x: &[[i32; M]],
    w: [&[Line]; P],
    ahead: usize,
) -> [[A::Sums<V>; P]; M] {
    for w in w {
        assert_eq!(w.len(), x.len(), "panels and rows have one length");
    }
    for (k, x) in x.iter().enumerate() {
        let mut loaded = [A::load(v, &[0; 64]); P];
        for p in 0..P {
            // SAFETY: `k` is below the length of `x`, which is that of each of `w`.
            let line = unsafe { w[p].get_unchecked(k) };
            let line_ahead = (&raw const *line).wrapping_add(ahead).cast();
            // Shapes that (almost) only products from memory have; see `panels_at_once`.
            if if V::WIDE { P != 3 } else { M == 1 } {
                v.prefetch_l2(line_ahead);
            } else {
                v.prefetch(line_ahead);
            }
            loaded[p] = A::load(v, line);
        }
        for i in 0..M {
            for p in 0..P {
                sums[i][p] = A::add(v, sums[i][p], loaded[p], x[i]);
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
