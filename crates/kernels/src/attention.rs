//! Attention over a paged cache of keys and values.
//!
//! A page holds [`PAGE`] consecutive positions of one sequence, for all layers and heads. The
//! caller decides which page belongs to whom (a list of page numbers per sequence) and may share
//! pages between sequences; nothing here allocates or frees them.
//!
//! ```text
//! page: for each layer, for each key/value head:
//!   keys    head_dim x 64 elements    row d: element d of positions 0..64   (so that 64 scores need no sum over lanes)
//!   values  64 x padded elements      row p: the value of position p, zero-padded to a multiple of 16
//! ```
//!
//! Order of sums, per query and head: scores by fused multiply-add over d from zero, then times
//! `scale`; blocks of 64 positions from position 0 in order, each with the running maximum m and
//! sum l (online softmax): values are scaled by exp(m_old - m_new), then accumulate by fused
//! multiply-add over positions in order; at the end divided by l. No instruction set, thread count,
//! batch or page assignment changes a bit of the result.

use std::io;
use std::ops::Range;

use half::f16;

use crate::cpu::Kernel;
use crate::isa::{LANES, Simd, exp};
use crate::mem::{Element, Granted, MemReport, Purpose, Region};
use crate::team::{SharedMut, Team};

/// Positions of a page.
pub const PAGE: usize = 64;

/// Largest dimension of a head.
pub const MAX_HEAD_DIM: usize = 256;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvType {
    /// Exactly as computed.
    F32,
    /// Rounded to half precision: half the memory and memory traffic.
    F16,
}

/// Shape of the cache of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Elements of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Storage of elements.
    pub kv_type: KvType,
}

impl KvShape {
    /// Bytes of one page, or `None` for a shape that is empty, too wide, or does not fit the
    /// address space.
    pub fn page_bytes(&self) -> Option<usize> {
        let valid =
            self.layers > 0 && self.kv_heads > 0 && (1..=MAX_HEAD_DIM).contains(&self.head_dim);
        let size = match self.kv_type {
            KvType::F32 => size_of::<f32>(),
            KvType::F16 => size_of::<f16>(),
        };
        valid
            .then(|| {
                self.layers
                    .checked_mul(self.kv_heads)?
                    .checked_mul(self.head_elements() * size)
            })
            .flatten()
    }

    fn head_elements(&self) -> usize {
        PAGE * (self.head_dim + self.padded_dim())
    }

    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Index of the first element of a head in a page.
    fn head_start(&self, page: usize, layer: usize, kv_head: usize) -> usize {
        ((page * self.layers + layer) * self.kv_heads + kv_head) * self.head_elements()
    }
}

/// Memory for the keys and values of all sequences.
pub struct KvPool {
    region: Region,
    shape: KvShape,
    pages: usize,
}

impl KvPool {
    /// Reserves `pages` pages. They take memory as they are written.
    ///
    /// # Errors
    /// `InvalidInput` for a shape without [`KvShape::page_bytes`] or a size beyond the address
    /// space, otherwise the operating system's refusal.
    pub fn new(shape: KvShape, pages: usize) -> io::Result<KvPool> {
        let bytes = shape
            .page_bytes()
            .and_then(|bytes| bytes.checked_mul(pages));
        let region = Region::zeroed(bytes.ok_or(io::ErrorKind::InvalidInput)?, Purpose::State)?;
        Ok(KvPool {
            region,
            shape,
            pages,
        })
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The shape given at the start.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// What the kernel granted to the memory underneath.
    pub fn memory(&self) -> MemReport {
        self.region.report()
    }

    /// What the kernel makes of the memory underneath, after its first page was brought into being:
    /// before there is nothing to be seen, and all others are as that one.
    ///
    /// # Errors
    /// As [`Extent::granted`](crate::mem::Extent::granted).
    pub fn granted(&mut self) -> io::Result<Granted> {
        if let Some(first) = self.region.first_mut() {
            *first = 0;
        }
        self.region.extent().granted()
    }

    /// Stores the keys and values (`kv_heads * head_dim` a row) of the tokens of `spans`.
    ///
    /// # Panics
    /// If a length, the layer, a row or a page is out of range, or spans are not in the order of
    /// their rows.
    pub fn write(
        &mut self,
        team: &Team,
        layer: usize,
        spans: &[Span<'_>],
        keys: &[f32],
        values: &[f32],
    ) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        assert_eq!(keys.len(), values.len(), "keys and values have one shape");
        assert!(
            keys.len().is_multiple_of(width),
            "{} is not a number of rows of {width}",
            keys.len()
        );
        assert!(
            layer < self.shape.layers,
            "layer {layer} of {}",
            self.shape.layers
        );
        check(spans, keys.len() / width, self.pages);
        match self.shape.kv_type {
            KvType::F32 => self.write_as(team, layer, spans, keys, values, |x| x),
            KvType::F16 => self.write_as(team, layer, spans, keys, values, f16::from_f32),
        }
    }

    fn write_as<E: Element>(
        &mut self,
        team: &Team,
        layer: usize,
        spans: &[Span<'_>],
        keys: &[f32],
        values: &[f32],
        store: impl Fn(f32) -> E + Sync,
    ) {
        let shape = self.shape;
        let dim = shape.head_dim;
        let pool = SharedMut::new(self.region.view_mut::<E>());
        let write_head = |kv_head: usize| {
            for span in spans {
                for (token, row) in span.rows.clone().enumerate() {
                    let position = span.position + token;
                    let start =
                        shape.head_start(span.pages[position / PAGE] as usize, layer, kv_head);
                    // SAFETY: heads do not overlap, each is written by one call of this closure,
                    // and that call holds one such part at a time.
                    let head = unsafe { pool.slice(start, shape.head_elements()) };
                    let (key_rows, value_rows) = head.split_at_mut(PAGE * dim);
                    let slot = position % PAGE;
                    let at = (row * shape.kv_heads + kv_head) * dim;
                    for (to, x) in key_rows.chunks_exact_mut(PAGE).zip(&keys[at..at + dim]) {
                        to[slot] = store(*x);
                    }
                    let to = &mut value_rows[slot * shape.padded_dim()..][..dim];
                    to.iter_mut()
                        .zip(&values[at..at + dim])
                        .for_each(|(to, x)| *to = store(*x));
                }
            }
        };
        // Waking the team costs more than writing a handful of tokens.
        const WORTH_SHARING: usize = 1 << 14;
        if keys.len() < WORTH_SHARING {
            (0..shape.kv_heads).for_each(write_head);
        } else {
            team.for_each(shape.kv_heads, write_head);
        }
    }

    /// Copies all layers of page `from` to page `to` (copy on write for sequences that share
    /// pages).
    ///
    /// # Panics
    /// If there is no such page.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let bytes = self.page_bytes();
        let (from, to) = (from as usize, to as usize);
        assert!(
            from < self.pages && to < self.pages,
            "pages {from} and {to} of {}",
            self.pages
        );
        self.region
            .copy_within(from * bytes..(from + 1) * bytes, to * bytes);
    }

    /// Overwrites a page with zeros and gives its memory back to the system.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn erase_page(&mut self, page: u32) {
        let bytes = self.page_bytes();
        let page = page as usize;
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.region.release(page * bytes..(page + 1) * bytes);
    }

    fn page_bytes(&self) -> usize {
        self.shape
            .page_bytes()
            .expect("checked when the pool was made")
    }

    /// Keys and values of one head of one page.
    fn head<E: Element>(
        &self,
        page: u32,
        layer: usize,
        kv_head: usize,
    ) -> (&[[E; LANES]], &[[E; LANES]]) {
        let start = self.shape.head_start(page as usize, layer, kv_head);
        let head = &self.region.view::<E>()[start..start + self.shape.head_elements()];
        let (keys, values) = head.split_at(PAGE * self.shape.head_dim);
        (keys.as_chunks().0, values.as_chunks().0)
    }
}

/// Spans name rows below `rows`, in order and without overlap, and pages below `pages` for all
/// their positions.
fn check(spans: &[Span<'_>], rows: usize, pages: usize) {
    let mut end_of_previous = 0;
    for span in spans {
        assert!(
            span.rows.start >= end_of_previous,
            "spans are in the order of their rows and share none"
        );
        assert!(
            span.rows.start <= span.rows.end && span.rows.end <= rows,
            "rows {:?} of {rows}",
            span.rows
        );
        end_of_previous = span.rows.end;
        let needed = span
            .position
            .checked_add(span.rows.len())
            .expect("positions fit")
            .div_ceil(PAGE);
        assert!(
            span.pages.len() >= needed,
            "{} pages where {needed} are needed",
            span.pages.len()
        );
        assert!(
            span.pages[..needed]
                .iter()
                .all(|page| (*page as usize) < pages),
            "a page beyond {pages}"
        );
    }
}

/// Consecutive tokens of one sequence in a batch.
#[derive(Debug, Clone)]
pub struct Span<'a> {
    /// Their rows in the queries and the output.
    pub rows: Range<usize>,
    /// Position of the first of them in its sequence; the others follow.
    pub position: usize,
    /// Pages of the sequence, from position 0. [`Attention::run`] wants the keys and values up to
    /// the last of these tokens written.
    pub pages: &'a [u32],
}

/// One layer's attention.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// The layer whose keys and values are read.
    pub layer: usize,
    /// Query heads, a multiple of the key/value heads; head h reads key/value head `h / (heads /
    /// kv_heads)`.
    pub heads: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A token sees itself and the `window - 1` positions before it; all before it if `None`.
    pub window: Option<usize>,
}

impl Attention {
    /// Causal attention of every row of `queries` (`heads * head_dim` a row) over its sequence,
    /// into the same row of `out`. Rows of `out` that belong to no span are left as they are.
    ///
    /// # Panics
    /// If a length does not fit, a span names rows or pages that are not there, or spans are not in
    /// the order of their rows.
    pub fn run(
        &self,
        team: &Team,
        pool: &KvPool,
        spans: &[Span<'_>],
        queries: &[f32],
        out: &mut [f32],
    ) {
        let shape = pool.shape;
        let width = self.heads * shape.head_dim;
        assert!(
            self.heads > 0 && self.heads.is_multiple_of(shape.kv_heads),
            "{} heads",
            self.heads
        );
        assert!(
            self.layer < shape.layers,
            "layer {} of {}",
            self.layer,
            shape.layers
        );
        assert!(self.window != Some(0), "a token sees at least itself");
        assert_eq!(
            queries.len(),
            out.len(),
            "queries and output have one shape"
        );
        assert!(
            queries.len().is_multiple_of(width),
            "{} is not a number of rows of {width}",
            queries.len()
        );
        check(spans, queries.len() / width, pool.pages);
        let group = self.heads / shape.kv_heads;
        let items = |height: usize| -> usize {
            spans
                .iter()
                .map(|s| (s.rows.len() * group).div_ceil(height) * shape.kv_heads)
                .sum()
        };
        // Tall items read keys and values once for many queries; but every member needs a few
        // items.
        let mut height = ITEM;
        while height > 1 && items(height) < 4 * team.members() {
            height /= 2;
        }
        let isa = team.isa();
        let out = SharedMut::new(out);
        team.for_each(items(height), |mut index| {
            for span in spans {
                let per_head = (span.rows.len() * group).div_ceil(height);
                if index < per_head * shape.kv_heads {
                    let first = index % per_head * height;
                    let count = height.min(span.rows.len() * group - first);
                    let kv_head = index / per_head;
                    isa.dispatch(Item {
                        of: self,
                        pool,
                        span,
                        kv_head,
                        first,
                        count,
                        queries,
                        out: &out,
                    });
                    return;
                }
                index -= per_head * shape.kv_heads;
            }
        });
    }
}

/// Most queries of one key/value head that are worked on together.
const ITEM: usize = 16;

/// Elements of keys, and as many of values, for which there is room to widen a block: heads of up
/// to 128.
const WIDENED: usize = PAGE * 128;

/// Queries `first..first + count` of one key/value head of a span, counted token by token and
/// within a token head by head.
struct Item<'a> {
    of: &'a Attention,
    pool: &'a KvPool,
    span: &'a Span<'a>,
    kv_head: usize,
    first: usize,
    count: usize,
    queries: &'a [f32],
    out: &'a SharedMut<'a, f32>,
}

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

/// One query, and what is known of it after some blocks.
#[derive(Clone, Copy)]
struct Query {
    /// Where it starts in `queries` and `out`.
    start: usize,
    /// The positions it sees.
    first: usize,
    end: usize,
    largest: f32,
    sum: f32,
    values: [[f32; LANES]; MAX_HEAD_DIM / LANES],
}

impl Kernel for Item<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        match self.pool.shape.kv_type {
            KvType::F32 => self.over::<V, f32, 0>(v),
            // Widening costs as much as a product with one query: with many, it is done once for
            // all of them.
            KvType::F16 if self.count > 4 && self.pool.shape.padded_dim() <= WIDENED / PAGE => {
                self.over::<V, f16, { WIDENED / LANES }>(v);
            }
            KvType::F16 => self.over::<V, f16, 0>(v),
        }
    }
}

// In what follows vector operations stand in plain loops, never in closures: a closure is a
// function of its own, and when the compiler does not inline it, it is compiled without the
// instruction set.
impl Item<'_> {
    fn query(&self, i: usize) -> Query {
        let shape = self.pool.shape;
        let group = self.of.heads / shape.kv_heads;
        let token = (self.first + i) / group;
        let head = self.kv_head * group + (self.first + i) % group;
        let end = self.span.position + token + 1;
        Query {
            start: ((self.span.rows.start + token) * self.of.heads + head) * shape.head_dim,
            first: end.saturating_sub(self.of.window.unwrap_or(end)),
            end,
            largest: f32::NEG_INFINITY,
            sum: 0.0,
            values: [[0.0; LANES]; MAX_HEAD_DIM / LANES],
        }
    }

    /// All queries of the item. `W` vectors of keys and as many of values are widened before use;
    /// with 0, none are.
    #[inline(always)]
    fn over<V: Simd, E: Stored, const W: usize>(&self, v: V) {
        let dim = self.pool.shape.head_dim;
        let mut all = [self.query(0); ITEM];
        let all = &mut all[..self.count];
        for i in 1..all.len() {
            all[i] = self.query(i);
        }
        // Later tokens see from later and up to later positions.
        let blocks = all[0].first / PAGE..all[self.count - 1].end.div_ceil(PAGE);
        let (mut wide_keys, mut wide_values) = ([[0f32; LANES]; W], [[0f32; LANES]; W]);
        for block in blocks {
            let page = self.span.pages[block];
            let (keys, values) = self.pool.head::<E>(page, self.of.layer, self.kv_head);
            if W == 0 {
                self.all::<V, E>(v, block * PAGE, (keys, values), all);
            } else {
                for (to, x) in wide_keys.iter_mut().zip(keys) {
                    v.store(E::load(v, x), to);
                }
                for (to, x) in wide_values.iter_mut().zip(values) {
                    v.store(E::load(v, x), to);
                }
                let widened = (&wide_keys[..keys.len()], &wide_values[..values.len()]);
                self.all::<V, f32>(v, block * PAGE, widened, all);
            }
        }
        for query in all {
            let inverse = 1.0 / query.sum;
            // SAFETY: this head of this token belongs to one item, spans share no rows, and nobody
            // else writes `out`.
            let out = unsafe { self.out.slice(query.start, dim) };
            for (out, x) in out.iter_mut().zip(query.values.as_flattened()) {
                *out = x * inverse;
            }
        }
    }

    /// All queries over the block of positions that starts at `start`.
    #[inline(always)]
    fn all<V: Simd, E: Stored>(
        &self,
        v: V,
        start: usize,
        head: (&[[E; LANES]], &[[E; LANES]]),
        all: &mut [Query],
    ) {
        // Four queries at a time keep their scores in registers; a narrow machine has room for one.
        for queries in all.chunks_mut(if V::WIDE { 4 } else { 1 }) {
            match queries.len() {
                1 => self.block::<V, E, 1>(v, start, head, queries),
                2 => self.block::<V, E, 2>(v, start, head, queries),
                3 => self.block::<V, E, 3>(v, start, head, queries),
                _ => self.block::<V, E, 4>(v, start, head, queries),
            }
        }
    }

    /// `M` queries over the block of positions that starts at `start`.
    #[inline(always)]
    fn block<V: Simd, E: Stored, const M: usize>(
        &self,
        v: V,
        start: usize,
        (keys, values): (&[[E; LANES]], &[[E; LANES]]),
        queries: &mut [Query],
    ) {
        const VECTORS: usize = PAGE / LANES;
        let dim = self.pool.shape.head_dim;
        let mut elements: [&[f32]; M] = [&[]; M];
        // Positions of this block that each query sees, counted within the block, and that any of
        // them sees.
        let mut seen = [(0, 0); M];
        let (mut first, mut end) = (PAGE, 0);
        for m in 0..M {
            let query = &queries[m];
            elements[m] = &self.queries[query.start..][..dim];
            seen[m].0 = query.first.saturating_sub(start).min(PAGE);
            seen[m].1 = query.end.saturating_sub(start).min(PAGE);
            if seen[m].0 < seen[m].1 {
                first = first.min(seen[m].0);
                end = end.max(seen[m].1);
            }
        }
        if first >= end {
            return;
        }
        let zero = [[v.splat(0.0); VECTORS]; M];
        let scores = panel::<V, E, M, VECTORS>(v, elements, keys, VECTORS, zero);
        let scale = v.splat(self.of.scale);
        let mut weights = [[[0f32; LANES]; VECTORS]; M];
        let mut keep = [1f32; M];
        for m in 0..M {
            let (weights, query, (first, end)) = (&mut weights[m], &mut queries[m], seen[m]);
            if first >= end {
                continue; // all weights stay 0
            }
            for n in 0..VECTORS {
                v.store(v.mul(scores[m][n], scale), &mut weights[n]);
            }
            if (first, end) != (0, PAGE) {
                weights.as_flattened_mut()[..first].fill(f32::NEG_INFINITY);
                weights.as_flattened_mut()[end..].fill(f32::NEG_INFINITY);
            }
            let mut best = v.splat(query.largest);
            for x in weights.iter() {
                best = v.max(best, v.load(x));
            }
            let largest = v.largest(best);
            let mut lanes = [0.0; LANES];
            v.store(exp(v, v.splat(query.largest - largest)), &mut lanes);
            keep[m] = lanes[0];
            let mut total = v.splat(0.0);
            for x in weights.iter_mut() {
                let e = exp(v, v.sub(v.load(x), v.splat(largest)));
                total = v.add(total, e);
                v.store(e, x);
            }
            query.largest = largest;
            query.sum = query.sum.mul_add(keep[m], v.sum(total));
        }
        let mut seen_weights: [&[f32]; M] = [&[]; M];
        for m in 0..M {
            seen_weights[m] = &weights[m].as_flattened()[first..end];
        }
        let width = self.pool.shape.padded_dim() / LANES;
        let values = &values[first * width..];
        let mut column = 0;
        while column + 4 <= width {
            add_values::<V, E, M, 4>(v, seen_weights, values, width, column, keep, queries);
            column += 4;
        }
        while column < width {
            add_values::<V, E, M, 1>(v, seen_weights, values, width, column, keep, queries);
            column += 1;
        }
    }
}

/// Scales what `M` queries have gathered by `keep` and adds their weights times `N` vectors of each
/// value, from vector `column` on.
#[inline(always)]
fn add_values<V: Simd, E: Stored, const M: usize, const N: usize>(
    v: V,
    weights: [&[f32]; M],
    values: &[[E; LANES]],
    width: usize,
    column: usize,
    keep: [f32; M],
    queries: &mut [Query],
) {
    let mut start = [[v.splat(0.0); N]; M];
    for m in 0..M {
        for n in 0..N {
            start[m][n] = v.mul(v.load(&queries[m].values[column + n]), v.splat(keep[m]));
        }
    }
    let sums = panel::<V, E, M, N>(v, weights, &values[column..], width, start);
    for m in 0..M {
        for n in 0..N {
            v.store(sums[m][n], &mut queries[m].values[column + n]);
        }
    }
}

/// `start[m][n] + sum over k of a[m][k] * b[k * stride + n]`.
#[inline(always)]
fn panel<V: Simd, E: Stored, const M: usize, const N: usize>(
    v: V,
    mut a: [&[f32]; M],
    b: &[[E; LANES]],
    stride: usize,
    start: [[V::F; N]; M],
) -> [[V::F; N]; M] {
    let depth = a[0].len();
    for a in &mut a {
        *a = &a[..depth];
    }
    let mut sums = start;
    for k in 0..depth {
        let row = &b[k * stride..][..N];
        let mut b = [v.splat(0.0); N];
        for n in 0..N {
            b[n] = E::load(v, &row[n]);
        }
        for m in 0..M {
            let x = v.splat(a[m][k]);
            for n in 0..N {
                sums[m][n] = v.fma(x, b[n], sums[m][n]);
            }
        }
    }
    sums
}
