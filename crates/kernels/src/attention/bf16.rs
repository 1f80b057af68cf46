//! Products with keys and values of bf16: pairs of numbers with sums in f32, as
//! [`Simd::dot_bf16`] adds them up. Nothing is widened, and where the processor multiplies pairs they are as fast
//! as anything it can do with 16 bits.
//!
//! - Keys, values, queries and weights are rounded to nearest even; below 2^-56 in magnitude they
//!   are zero, so that no sum is ever subnormal (as in [`crate::panels`]).
//! - Score of a position: from zero, pair by pair of elements, the second of a pair first.
//! - Values of a segment: from zero, pair by pair of positions, the second first. A pair of which a query sees
//!   one position counts with that one alone.
//! - Maximum and sum of a segment are those of the weights before they are rounded.

use std::ops::Range;

use super::item::{Ahead, Item, Products, Query, Scores, Weights, in_groups};
use super::{ITEM, MAX_HEAD_DIM, PAGE, SEGMENT};
use crate::isa::{LANES, Simd};
use crate::panels::round_bf16;

/// Lines of a pair of elements of keys, and vectors of their scores.
const LINES: usize = PAGE / LANES;

/// Sixteen pairs.
type Line = [u8; 64];

/// What is made of each query, and of its weights: two numbers a word.
pub(super) struct Bf16 {
    queries: [[i32; MAX_HEAD_DIM / 2]; ITEM],
    weights: [[i32; SEGMENT / 2]; ITEM],
}

impl<V: Simd> Products<V> for Bf16 {
    #[inline(always)]
    fn new(_: V, item: &Item<'_>, queries: &[Query]) -> Self {
        let mut made = Bf16 {
            queries: [[0; MAX_HEAD_DIM / 2]; ITEM],
            weights: [[0; SEGMENT / 2]; ITEM],
        };
        for (words, query) in made.queries.iter_mut().zip(queries) {
            let x = &item.queries[query.start..][..item.head.shape.head_dim];
            round_pairs(x, words);
        }
        made
    }

    #[inline(always)]
    fn scores(
        &mut self,
        v: V,
        item: &Item<'_>,
        block: usize,
        ahead: Ahead<'_>,
        queries: &[Query],
        weights: &mut [Weights],
    ) {
        in_groups(v, self, item, block, ahead, &mut weights[..queries.len()]);
    }

    #[inline(always)]
    fn values(
        &mut self,
        v: V,
        item: &Item<'_>,
        blocks: Range<usize>,
        queries: &[Query],
        weights: &[Weights],
        gathered: &mut [[f32; LANES]],
    ) {
        let start = blocks.start * PAGE / SEGMENT * SEGMENT;
        for (i, query) in queries.iter().enumerate() {
            let seen = query.seen(start, SEGMENT);
            // Slots that are not seen are not added below, or weigh 0, or stand beside a NaN.
            let vectors = seen.start / LANES..seen.end.div_ceil(LANES).max(seen.start / LANES);
            let words = self.weights[i].as_chunks_mut::<{ LANES / 2 }>().0;
            for (x, words) in weights[i][vectors.clone()].iter().zip(&mut words[vectors]) {
                round_vector(x, words);
            }
        }
        let stride = gathered.len() / queries.len();
        for block in blocks.clone() {
            let mut ahead = if block + 1 < blocks.end {
                Ahead(item.bytes(block + 1).1)
            } else {
                Ahead(&[])
            };
            let mut at = 0;
            while at < queries.len() {
                let seen = queries[at].seen(block * PAGE, PAGE);
                // Only queries that see the same go together: a weight of 0 would let a NaN through.
                let mut alike = 1;
                while at + alike < queries.len()
                    && alike < 4
                    && queries[at + alike].seen(block * PAGE, PAGE) == seen
                {
                    alike += 1;
                }
                let part = Part {
                    item,
                    block,
                    seen,
                    ahead,
                    stride,
                };
                let to = &mut gathered[at * stride..];
                if V::WIDE && alike >= 4 {
                    self.add_to::<V, 4>(v, &part, at, to);
                    at += 4;
                } else if V::WIDE && alike >= 2 {
                    self.add_to::<V, 2>(v, &part, at, to);
                    at += 2;
                } else {
                    self.add_to::<V, 1>(v, &part, at, to);
                    at += 1;
                }
                ahead = Ahead(&[]);
            }
        }
    }
}

/// The values of a block that some queries see.
struct Part<'a> {
    item: &'a Item<'a>,
    block: usize,
    seen: Range<usize>,
    ahead: Ahead<'a>,
    /// How far apart lies what queries have gathered.
    stride: usize,
}

impl<V: Simd> Scores<V> for Bf16 {
    #[inline(always)]
    fn scores_of<const M: usize>(
        &self,
        v: V,
        item: &Item<'_>,
        block: usize,
        ahead: Ahead<'_>,
        at: usize,
        weights: &mut [Weights],
    ) {
        let (layer, kv_head) = (item.head.of.layer, item.head.kv_head);
        let lines = item.pool.bf16_keys(item.head.page(block), layer, kv_head);
        let (pairs, _) = lines.as_chunks::<LINES>();
        let mut words: [&[i32]; M] = [&[]; M];
        for m in 0..M {
            words[m] = &self.queries[at + m][..pairs.len()];
        }
        let mut sums = [[v.splat(0.0); LINES]; M];
        let mut ahead = ahead.steps(pairs.len());
        for (k, pair) in pairs.iter().enumerate() {
            ahead.fetch(v);
            let mut keys = [v.bf16_pairs(&pair[0]); LINES];
            for n in 1..LINES {
                keys[n] = v.bf16_pairs(&pair[n]);
            }
            for m in 0..M {
                for n in 0..LINES {
                    sums[m][n] = v.dot_bf16(sums[m][n], keys[n], words[m][k]);
                }
            }
        }
        let vector = block * PAGE % SEGMENT / LANES;
        for m in 0..M {
            for n in 0..LINES {
                v.store(sums[m][n], &mut weights[m][vector + n]);
            }
        }
    }
}

impl Bf16 {
    /// `M` queries from `at` on, which see the same; `to` is where the first one's is gathered.
    #[inline(always)]
    fn add_to<V: Simd, const M: usize>(
        &self,
        v: V,
        part: &Part<'_>,
        at: usize,
        to: &mut [[f32; LANES]],
    ) {
        let mut column = 0;
        while column + 4 < part.stride {
            self.columns::<V, M, 4>(v, part, at, column, to);
            column += 4;
        }
        while column + 1 < part.stride {
            self.columns::<V, M, 1>(v, part, at, column, to);
            column += 1;
        }
    }

    /// `N` vectors of each value, from vector `column` on.
    #[inline(always)]
    fn columns<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        part: &Part<'_>,
        at: usize,
        column: usize,
        to: &mut [[f32; LANES]],
    ) {
        let (item, seen, width) = (part.item, &part.seen, part.stride - 1);
        if seen.is_empty() {
            return;
        }
        let (layer, kv_head) = (item.head.of.layer, item.head.kv_head);
        let pairs = item
            .pool
            .bf16_values(item.head.page(part.block), layer, kv_head);
        let from = part.block * PAGE % SEGMENT / 2;
        let mut words: [&[i32]; M] = [&[]; M];
        let mut sums = [[v.splat(0.0); N]; M];
        for m in 0..M {
            words[m] = &self.weights[at + m][from..from + PAGE / 2];
            for n in 0..N {
                sums[m][n] = v.load(&to[m * part.stride + column + n]);
            }
        }
        let (mut first, mut end) = (seen.start / 2, seen.end.div_ceil(2));
        if seen.start % 2 == 1 {
            let row = one_of::<N>(&pairs[first * width + column..], 1);
            sums = add_pair(v, sums, &row, words, first);
            first += 1;
        }
        let half_at_end = seen.end % 2 == 1;
        if half_at_end {
            end -= 1;
        }
        let ahead = if column == 0 { part.ahead } else { Ahead(&[]) };
        let mut ahead = ahead.steps(end.saturating_sub(first));
        for k in first..end {
            ahead.fetch(v);
            let row = &pairs[k * width + column..].as_chunks::<N>().0[0];
            sums = add_pair(v, sums, row, words, k);
        }
        if half_at_end {
            let row = one_of::<N>(&pairs[end * width + column..], 0);
            sums = add_pair(v, sums, &row, words, end);
        }
        for m in 0..M {
            for n in 0..N {
                v.store(sums[m][n], &mut to[m * part.stride + column + n]);
            }
        }
    }
}

/// Adds pair `k` of values by its weights.
#[inline(always)]
fn add_pair<V: Simd, const M: usize, const N: usize>(
    v: V,
    mut sums: [[V::F; N]; M],
    row: &[Line; N],
    words: [&[i32]; M],
    k: usize,
) -> [[V::F; N]; M] {
    let mut values = [v.bf16_pairs(&row[0]); N];
    for n in 1..N {
        values[n] = v.bf16_pairs(&row[n]);
    }
    for m in 0..M {
        for n in 0..N {
            sums[m][n] = v.dot_bf16(sums[m][n], values[n], words[m][k]);
        }
    }
    sums
}

/// The first `N` lines, of which the numbers `which` of each pair count and the others are 0.
#[inline(always)]
fn one_of<const N: usize>(lines: &[Line], which: usize) -> [Line; N] {
    let mut row = [[0; 64]; N];
    for (to, line) in row.iter_mut().zip(lines) {
        let pairs = line.as_chunks::<4>().0;
        for (to, pair) in to.as_chunks_mut::<4>().0.iter_mut().zip(pairs) {
            to[2 * which..][..2].copy_from_slice(&pair[2 * which..][..2]);
        }
    }
    row
}

/// Rounds numbers into words, two each.
#[inline(always)]
fn round_vector(x: &[f32; LANES], words: &mut [i32; LANES / 2]) {
    let mut halves = [0u16; LANES];
    for (half, x) in halves.iter_mut().zip(x) {
        *half = round_bf16(*x) as u16;
    }
    for (word, [a, b]) in words.iter_mut().zip(halves.as_chunks::<2>().0) {
        *word = i32::from(*a) | i32::from(*b) << 16;
    }
}

/// Rounds numbers into words, two each; what is missing of the last is 0.
#[inline(always)]
fn round_pairs(x: &[f32], words: &mut [i32]) {
    let (pairs, rest) = x.as_chunks::<2>();
    for (word, [a, b]) in words.iter_mut().zip(pairs) {
        *word = (round_bf16(*a) | round_bf16(*b) << 16) as i32;
    }
    if let [last] = rest {
        words[pairs.len()] = round_bf16(*last) as i32;
    }
}
