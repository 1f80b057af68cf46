//! Products with keys and values that are stored as numbers: f32 or f16. They are widened to
//! f32 a part of a block at a time, once for all queries of an item.

use std::ops::Range;

use half::f16;

use super::item::{Ahead, Item, Products, Query, Weights};
use super::{KvType, PAGE, SEGMENT};
use crate::isa::{LANES, Simd};
use crate::mem::Element;

/// Vectors of a row of keys, and of a part of a value.
const VECTORS: usize = PAGE / LANES;

/// Rows of keys that are worked on at a time.
const ROWS: usize = 64;

/// A stored element that sixteen lanes can be loaded from.
trait Stored: Element {
    fn load<V: Simd>(v: V, x: &[Self; LANES]) -> V::F;
}

impl Stored for f32 {
    #[inline(always)]
    fn load<V: Simd>(v: V, x: &[f32; LANES]) -> V::F {
        v.load(x)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn load<V: Simd>(v: V, x: &[f16; LANES]) -> V::F {
        v.load_f16(x)
    }
}

/// Four vectors: of one row of keys, or of one value.
type Row = [[f32; LANES]; VECTORS];

/// Room for what is widened.
pub(super) struct Floats([Row; PAGE]);

impl<V: Simd> Products<V> for Floats {
    #[inline(always)]
    fn new(_: V, _: &Item<'_>, _: &[Query]) -> Self {
        const { assert!(ROWS <= PAGE) };
        Floats([[[0.0; LANES]; VECTORS]; PAGE])
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
        let dim = item.head.shape.head_dim;
        let mut first = 0;
        while first < dim {
            let rows = ROWS.min(dim - first);
            match item.head.shape.kv_type {
                KvType::F16 => self.keys::<V, f16>(v, item, block, first, rows),
                KvType::F32 | KvType::Bf16 | KvType::Int8 => {
                    self.keys::<V, f32>(v, item, block, first, rows)
                }
            }
            let elements = first..first + rows;
            let mut ahead = ahead.part(first / ROWS, dim.div_ceil(ROWS));
            let mut at = 0;
            while at < queries.len() {
                let (queries, weights) = (&queries[at..], &mut weights[at..]);
                let keys = (&self.0, ahead);
                if V::WIDE && queries.len() >= 4 {
                    scores_of::<V, 4>(v, item, block, &elements, keys, queries, weights);
                    at += 4;
                } else if V::WIDE && queries.len() >= 2 {
                    scores_of::<V, 2>(v, item, block, &elements, keys, queries, weights);
                    at += 2;
                } else {
                    scores_of::<V, 1>(v, item, block, &elements, keys, queries, weights);
                    at += 1;
                }
                ahead = Ahead(&[]);
            }
            first += rows;
        }
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
        let stride = gathered.len() / queries.len();
        for block in blocks.clone() {
            let mut column = 0;
            let next = if block + 1 < blocks.end {
                item.bytes(block + 1).1
            } else {
                &[]
            };
            while column < stride - 1 {
                let parts = (stride - 1).div_ceil(VECTORS);
                let mut ahead = Ahead(next).part(column / VECTORS, parts);
                let columns = VECTORS.min(stride - 1 - column);
                match item.head.shape.kv_type {
                    KvType::F16 => self.part::<V, f16>(v, item, block, column, columns),
                    KvType::F32 | KvType::Bf16 | KvType::Int8 => {
                        self.part::<V, f32>(v, item, block, column, columns);
                    }
                }
                let mut at = 0;
                while at < queries.len() {
                    let seen = queries[at].seen(block * PAGE, PAGE);
                    let (queries, weights) = (&queries[at..], &weights[at..]);
                    // Only queries that see the same go together: a weight of 0 would let a NaN
                    // through.
                    let mut alike = 1;
                    while alike < queries.len().min(4)
                        && queries[alike].seen(block * PAGE, PAGE) == seen
                    {
                        alike += 1;
                    }
                    let to = &mut gathered[at * stride + column..];
                    let to = (to, stride, columns);
                    let values = (&self.0, ahead);
                    if V::WIDE && alike >= 4 {
                        add_to::<V, 4>(v, block, seen, values, weights, to);
                        at += 4;
                    } else if V::WIDE && alike >= 2 {
                        add_to::<V, 2>(v, block, seen, values, weights, to);
                        at += 2;
                    } else {
                        add_to::<V, 1>(v, block, seen, values, weights, to);
                        at += 1;
                    }
                    ahead = Ahead(&[]);
                }
                column += columns;
            }
        }
    }
}

impl Floats {
    /// Widens `rows` rows of the keys of a block from `first` on.
    #[inline(always)]
    fn keys<V: Simd, E: Stored>(
        &mut self,
        v: V,
        item: &Item<'_>,
        block: usize,
        first: usize,
        rows: usize,
    ) {
        let (layer, kv_head) = (item.head.of.layer, item.head.kv_head);
        let keys = item.pool.keys::<E>(item.head.page(block), layer, kv_head);
        let keys = &keys[first * VECTORS..(first + rows) * VECTORS];
        for (to, x) in self.0.as_flattened_mut().iter_mut().zip(keys) {
            v.store(E::load(v, x), to);
        }
    }

    /// Widens `columns` vectors of each value of a block from vector `first` on.
    #[inline(always)]
    fn part<V: Simd, E: Stored>(
        &mut self,
        v: V,
        item: &Item<'_>,
        block: usize,
        first: usize,
        columns: usize,
    ) {
        let (layer, kv_head) = (item.head.of.layer, item.head.kv_head);
        let values = item.pool.values::<E>(item.head.page(block), layer, kv_head);
        let width = item.head.shape.padded_dim() / LANES;
        for (to, value) in self.0.iter_mut().zip(values.chunks_exact(width)) {
            for (to, x) in to[..columns].iter_mut().zip(&value[first..]) {
                v.store(E::load(v, x), to);
            }
        }
    }
}

/// Scores of the first `M` queries, or, beyond the first elements, what is to be added to them.
#[inline(always)]
fn scores_of<V: Simd, const M: usize>(
    v: V,
    item: &Item<'_>,
    block: usize,
    elements: &Range<usize>,
    (keys, ahead): (&[Row; PAGE], Ahead<'_>),
    queries: &[Query],
    weights: &mut [Weights],
) {
    let at = block * PAGE % SEGMENT / LANES;
    let mut of_queries: [&[f32]; M] = [&[]; M];
    let mut sums = [[v.splat(0.0); VECTORS]; M];
    for m in 0..M {
        of_queries[m] = &item.queries[queries[m].start..][elements.clone()];
        if elements.start > 0 {
            for n in 0..VECTORS {
                sums[m][n] = v.load(&weights[m][at + n]);
            }
        }
    }
    sums = panel::<V, M>(v, of_queries, keys, ahead, sums);
    for m in 0..M {
        for n in 0..VECTORS {
            v.store(sums[m][n], &mut weights[m][at + n]);
        }
    }
}

/// Adds parts of the values seen of a block to what the first `M` queries have gathered: `to` is
/// where that part of the first query's lies, how far apart queries' are, and the vectors of a part.
#[inline(always)]
fn add_to<V: Simd, const M: usize>(
    v: V,
    block: usize,
    seen: Range<usize>,
    (values, ahead): (&[Row; PAGE], Ahead<'_>),
    weights: &[Weights],
    to: (&mut [[f32; LANES]], usize, usize),
) {
    let at = block * PAGE % SEGMENT;
    let (to, stride, columns) = to;
    let mut of_values: [&[f32]; M] = [&[]; M];
    let mut sums = [[v.splat(0.0); VECTORS]; M];
    for m in 0..M {
        of_values[m] = &weights[m].as_flattened()[at + seen.start..at + seen.end];
        for n in 0..VECTORS {
            if n < columns {
                sums[m][n] = v.load(&to[m * stride + n]);
            }
        }
    }
    sums = panel::<V, M>(v, of_values, &values[seen.start..], ahead, sums);
    for m in 0..M {
        for n in 0..VECTORS {
            if n < columns {
                v.store(sums[m][n], &mut to[m * stride + n]);
            }
        }
    }
}

/// `start[m][n] + sum over k of a[m][k] * b[k][n]`.
#[inline(always)]
fn panel<V: Simd, const M: usize>(
    v: V,
    mut a: [&[f32]; M],
    b: &[Row],
    ahead: Ahead<'_>,
    start: [[V::F; VECTORS]; M],
) -> [[V::F; VECTORS]; M] {
    let depth = a[0].len().min(b.len());
    for a in &mut a {
        *a = &a[..depth];
    }
    let mut sums = start;
    let mut ahead = ahead.steps(depth);
    for k in 0..depth {
        ahead.fetch(v);
        let mut row = [v.splat(0.0); VECTORS];
        for n in 0..VECTORS {
            row[n] = v.load(&b[k][n]);
        }
        for m in 0..M {
            let x = v.splat(a[m][k]);
            for n in 0..VECTORS {
                sums[m][n] = v.fma(x, row[n], sums[m][n]);
            }
        }
    }
    sums
}
