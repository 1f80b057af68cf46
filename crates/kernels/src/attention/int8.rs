//! Products with keys and values of 8 bits: exact sums of integers within a segment.
//!
//! - Keys and queries are rotated, which changes no product and spreads what some elements have too
//!   much of over all; then they are quantised, head by head. Score of position p, before it is scaled:
//!   `float(dot) * kscale[p] * qscale` from left to right, where `dot` is the exact i32.
//! - Weights, each times its value's scale, are quantised per segment to `round(w * (32767 / W))`,
//!   ties to even, where W is the largest of them; all are 0 if it is below 1e-30. What the segment
//!   comes to is `float(sum) * (W / 32767)`, where `sum` is the exact i32: at most 32767 * 127 * 256.
//! - Maximum and sum of a segment are those of the weights before they are quantised.

use std::ops::Range;

use super::item::{Ahead, Item, Products, Query, Scores, Weights, in_groups};
use super::quant::{NOTHING, quantise};
use super::{ITEM, MAX_HEAD_DIM, PAGE, SEGMENT};
use crate::isa::{LANES, Simd};

/// Lines of a quad of keys, and vectors of their scores.
const LINES: usize = PAGE / LANES;

/// Largest quantised weight.
const LARGEST_WEIGHT: f32 = 32767.0;

/// What is made of each query, and of its weights.
pub(super) struct Int8 {
    /// Four elements each.
    queries: [[i32; MAX_HEAD_DIM / 4]; ITEM],
    /// -128 times the sum of a query.
    offsets: [i32; ITEM],
    scales: [f32; ITEM],
    /// Two weights each.
    weights: [[i32; SEGMENT / 2]; ITEM],
    /// What sums of products with them are multiplied with.
    factors: [f32; ITEM],
}

impl<V: Simd> Products<V> for Int8 {
    #[inline(always)]
    fn new(v: V, item: &Item<'_>, queries: &[Query]) -> Self {
        let mut made = Int8 {
            queries: [[0; MAX_HEAD_DIM / 4]; ITEM],
            offsets: [0; ITEM],
            scales: [0.0; ITEM],
            weights: [[0; SEGMENT / 2]; ITEM],
            factors: [0.0; ITEM],
        };
        let mut quants = [0i8; MAX_HEAD_DIM];
        let mut rotated = [0f32; MAX_HEAD_DIM];
        for (i, query) in queries.iter().enumerate() {
            let x = &mut rotated[..item.head.shape.head_dim];
            x.copy_from_slice(&item.queries[query.start..][..x.len()]);
            if let Some(rotation) = item.pool.rotation() {
                rotation.apply_with(v, x);
            }
            made.scales[i] = quantise(v, x, &mut quants);
            let quants = &quants[..x.len().next_multiple_of(LANES)];
            let mut sum = 0;
            for (word, four) in made.queries[i].iter_mut().zip(quants.as_chunks::<4>().0) {
                *word = i32::from_le_bytes(four.map(|q| q as u8));
                sum += four.iter().map(|q| i32::from(*q)).sum::<i32>();
            }
            made.offsets[i] = -128 * sum;
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
        let mut scales = [[0f32; LANES]; SEGMENT / LANES];
        for block in blocks.clone() {
            let (of_block, _) =
                item.pool
                    .int8_values(item.head.page(block), item.head.of.layer, item.head.kv_head);
            scales[(block * PAGE - start) / LANES..][..LINES].copy_from_slice(of_block);
        }
        for (i, query) in queries.iter().enumerate() {
            let seen = query.seen(start, SEGMENT);
            self.factors[i] = quantise_weights(v, &weights[i], &scales, seen, &mut self.weights[i]);
        }
        let mut at = 0;
        while at < queries.len() {
            let left = queries.len() - at;
            if V::WIDE && left >= 4 {
                self.add_to::<V, 4>(v, item, &blocks, queries, at, gathered);
                at += 4;
            } else if V::WIDE && left >= 2 {
                self.add_to::<V, 2>(v, item, &blocks, queries, at, gathered);
                at += 2;
            } else {
                self.add_to::<V, 1>(v, item, &blocks, queries, at, gathered);
                at += 1;
            }
        }
    }
}

impl<V: Simd> Scores<V> for Int8 {
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
        let (scales, lines) = item.pool.int8_keys(item.head.page(block), layer, kv_head);
        let (quads, _) = lines.as_chunks::<LINES>();
        let mut words: [&[i32]; M] = [&[]; M];
        let mut sums = [[v.splat_i(0); LINES]; M];
        for m in 0..M {
            words[m] = &self.queries[at + m][..quads.len()];
            sums[m] = [v.dot_start(self.offsets[at + m]); LINES];
        }
        let mut ahead = ahead.steps(quads.len());
        for (k, quad) in quads.iter().enumerate() {
            ahead.fetch(v);
            let mut keys = [v.weights(&quad[0]); LINES];
            for n in 1..LINES {
                keys[n] = v.weights(&quad[n]);
            }
            for m in 0..M {
                for n in 0..LINES {
                    sums[m][n] = v.dot4(sums[m][n], keys[n], words[m][k]);
                }
            }
        }
        let vector = block * PAGE % SEGMENT / LANES;
        for m in 0..M {
            let scale = v.splat(self.scales[at + m]);
            for n in 0..LINES {
                let score = v.mul(v.widen(sums[m][n]), v.load(&scales[n]));
                v.store(v.mul(score, scale), &mut weights[m][vector + n]);
            }
        }
    }
}

impl Int8 {
    /// `M` queries from `at` on.
    #[inline(always)]
    fn add_to<V: Simd, const M: usize>(
        &self,
        v: V,
        item: &Item<'_>,
        blocks: &Range<usize>,
        queries: &[Query],
        at: usize,
        gathered: &mut [[f32; LANES]],
    ) {
        let stride = gathered.len() / queries.len();
        let (queries, gathered) = (
            &queries[at..][..M],
            &mut gathered[at * stride..][..M * stride],
        );
        let mut column = 0;
        while column + 4 < stride {
            self.columns::<V, M, 4>(v, item, blocks, queries, at, column, gathered);
            column += 4;
        }
        while column + 1 < stride {
            self.columns::<V, M, 1>(v, item, blocks, queries, at, column, gathered);
            column += 1;
        }
    }

    /// `N` vectors of each value, from vector `column` on.
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "parts of one loop nest")]
    fn columns<V: Simd, const M: usize, const N: usize>(
        &self,
        v: V,
        item: &Item<'_>,
        blocks: &Range<usize>,
        queries: &[Query],
        at: usize,
        column: usize,
        gathered: &mut [[f32; LANES]],
    ) {
        let stride = gathered.len() / M;
        let width = stride - 1;
        let (layer, kv_head) = (item.head.of.layer, item.head.kv_head);
        let mut sums = [[v.splat_i(0); N]; M];
        for block in blocks.clone() {
            let (_, pairs) = item.pool.int8_values(item.head.page(block), layer, kv_head);
            // Weights of positions that a query does not see are 0.
            let first = queries[0].seen(block * PAGE, PAGE).start / 2;
            let end = queries[M - 1].seen(block * PAGE, PAGE).end.div_ceil(2);
            let from = block * PAGE % SEGMENT / 2;
            let mut words: [&[i32]; M] = [&[]; M];
            for m in 0..M {
                words[m] = &self.weights[at + m][from..from + PAGE / 2];
            }
            let ahead = if at == 0 && column == 0 && block + 1 < blocks.end {
                Ahead(item.bytes(block + 1).1)
            } else {
                Ahead(&[])
            };
            let mut ahead = ahead.steps(end.saturating_sub(first));
            for k in first..end {
                ahead.fetch(v);
                let row = &pairs[k * width + column..][..N];
                let mut values = [v.pairs(&row[0]); N];
                for n in 1..N {
                    values[n] = v.pairs(&row[n]);
                }
                for m in 0..M {
                    for n in 0..N {
                        sums[m][n] = v.dot2(sums[m][n], values[n], words[m][k]);
                    }
                }
            }
        }
        for m in 0..M {
            let factor = v.splat(self.factors[at + m]);
            for n in 0..N {
                let sum = v.mul(v.widen(sums[m][n]), factor);
                v.store(sum, &mut gathered[m * stride + column + n]);
            }
        }
    }
}

/// Quantises the weights of the positions seen times the scales of their values; returns what
/// sums of products with them are to be multiplied with.
#[inline(always)]
fn quantise_weights<V: Simd>(
    v: V,
    weights: &Weights,
    scales: &Weights,
    seen: Range<usize>,
    words: &mut [i32; SEGMENT / 2],
) -> f32 {
    words.fill(0);
    if seen.is_empty() {
        return 0.0;
    }
    let vectors = seen.start / LANES..seen.end.div_ceil(LANES);
    let mut scaled = [[0f32; LANES]; SEGMENT / LANES];
    for i in vectors.clone() {
        v.store(
            v.mul(v.load(&weights[i]), v.load(&scales[i])),
            &mut scaled[i],
        );
    }
    // What lies in slots that are not seen counts for nothing, not even NaN.
    scaled.as_flattened_mut()[vectors.start * LANES..seen.start].fill(0.0);
    scaled.as_flattened_mut()[seen.end..vectors.end * LANES].fill(0.0);
    let (mut best, mut total) = (v.splat(0.0), v.splat(0.0));
    for x in &scaled[vectors.clone()] {
        best = v.max(v.load(x), best);
        total = v.add(total, v.load(x));
    }
    let largest = v.largest(best);
    if !v.sum(total).is_finite() {
        return f32::NAN;
    }
    if largest < NOTHING {
        return 0.0;
    }
    let inverse = v.splat(LARGEST_WEIGHT / largest);
    for i in vectors {
        let mut lanes = [0i32; LANES];
        v.store_i(v.round(v.mul(v.load(&scaled[i]), inverse)), &mut lanes);
        for (word, pair) in words[i * LANES / 2..]
            .iter_mut()
            .zip(lanes.as_chunks::<2>().0)
        {
            *word = pair[0] | pair[1] << 16;
        }
    }
    largest / LARGEST_WEIGHT
}
