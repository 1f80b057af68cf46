//! The way of some queries of one key/value head through their context, whatever the products are
//! made of: scores, weights, values, segment by segment.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::slice::Chunks;

use super::bf16::Bf16;
use super::floats::Floats;
use super::int8::Int8;
use super::{Attention, ITEM, KvPool, KvShape, KvType, MAX_HEAD_DIM, PAGE, SEGMENT, Span};
use crate::cpu::Kernel;
use crate::isa::{LANES, Simd, exp};
use crate::team::SharedMut;

/// Scores of a segment's positions, later weights.
pub(super) type Weights = [[f32; LANES]; SEGMENT / LANES];

/// Vectors of what a query has gathered: values, and behind them a line of maximum and sum.
const GATHERED: usize = MAX_HEAD_DIM / LANES + 1;
const LARGEST: usize = 0;
const SUM: usize = 1;

/// One key/value head of a span, and the query heads that read it. Its queries are counted token by
/// token and within a token head by head.
pub(super) struct Head<'a> {
    pub(super) of: &'a Attention,
    pub(super) shape: KvShape,
    pub(super) span: Span<'a>,
    pub(super) kv_head: usize,
}

/// One query.
#[derive(Clone, Copy, Default)]
pub(super) struct Query {
    /// Where it starts in the queries and the output.
    pub(super) start: usize,
    /// The positions it sees.
    first: usize,
    end: usize,
}

impl Query {
    /// The positions it sees among the `len` from `start` on, counted from there.
    #[inline(always)]
    pub(super) fn seen(&self, start: usize, len: usize) -> Range<usize> {
        let first = self.first.saturating_sub(start).min(len);
        first..self.end.saturating_sub(start).min(len).max(first)
    }
}

impl Head<'_> {
    #[inline(always)]
    fn query(&self, i: usize) -> Query {
        let group = self.of.heads / self.shape.kv_heads;
        let (token, head) = (i / group, self.kv_head * group + i % group);
        let position = self.span.position + token;
        Query {
            start: ((self.span.rows.start + token) * self.of.heads + head) * self.shape.head_dim,
            first: self.of.first_seen(position),
            end: position + 1,
        }
    }

    /// The page of a block of positions.
    #[inline(always)]
    pub(super) fn page(&self, block: usize) -> u32 {
        self.span.pages[block]
    }
}

/// Where results go.
pub(super) enum Target<'a> {
    /// All segments are merged here, into the output.
    Out(&'a SharedMut<'a, f32>),
    /// Only this segment is computed, and left for [`Merge`].
    Segment(usize, &'a mut [f32]),
    /// It is taken.
    None,
}

/// Some queries of a head, at most [`ITEM`].
pub(super) struct Item<'a> {
    pub(super) head: Head<'a>,
    pub(super) pool: &'a KvPool,
    /// All queries of the batch.
    pub(super) queries: &'a [f32],
    /// Which of the head's.
    pub(super) which: Range<usize>,
    pub(super) target: Target<'a>,
}

/// Bytes that are fetched while others are worked on: blocks of keys and values lie apart, and the
/// processor does not guess where the next begins.
#[derive(Clone, Copy)]
pub(super) struct Ahead<'a>(pub(super) &'a [u8]);

impl<'a> Ahead<'a> {
    /// The share of part `i` of `parts`.
    #[inline(always)]
    pub(super) fn part(self, i: usize, parts: usize) -> Ahead<'a> {
        let at = |i: usize| self.0.len() * i / parts / LINE * LINE;
        Ahead(&self.0[at(i)..at(i + 1)])
    }

    /// All of it in that many steps.
    #[inline(always)]
    pub(super) fn steps(self, steps: usize) -> Steps<'a> {
        let step = self.0.len().div_ceil(steps.max(1));
        Steps(self.0.chunks(step.next_multiple_of(LINE).max(LINE)))
    }
}

pub(super) struct Steps<'a>(Chunks<'a, u8>);

impl Steps<'_> {
    /// Asks for the lines of the next step.
    #[inline(always)]
    pub(super) fn fetch<V: Simd>(&mut self, v: V) {
        for line in self.0.next().unwrap_or(&[]).chunks(LINE) {
            v.prefetch(line.as_ptr());
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// What keys and values of one type are multiplied with, and how.
pub(super) trait Products<V: Simd>: Sized {
    fn new(v: V, item: &Item<'_>, queries: &[Query]) -> Self;

    /// The scores of all queries with a block's keys, where they belong in their segment. What is
    /// ahead is wanted next.
    fn scores(
        &mut self,
        v: V,
        item: &Item<'_>,
        block: usize,
        ahead: Ahead<'_>,
        queries: &[Query],
        weights: &mut [Weights],
    );

    /// Adds to what each query has gathered (zeros) the values of the blocks, all of one segment,
    /// by their weights, where it sees them.
    fn values(
        &mut self,
        v: V,
        item: &Item<'_>,
        blocks: Range<usize>,
        queries: &[Query],
        weights: &[Weights],
        gathered: &mut [[f32; LANES]],
    );
}

/// Scores of so many queries at a time as registers hold.
pub(super) trait Scores<V: Simd> {
    /// The scores of the `M` queries from `at` on with a block's keys, where they belong in their
    /// segment. `weights` begins with the first one's.
    fn scores_of<const M: usize>(
        &self,
        v: V,
        item: &Item<'_>,
        block: usize,
        ahead: Ahead<'_>,
        at: usize,
        weights: &mut [Weights],
    );
}

/// The scores of as many queries as there are weights.
#[inline(always)]
pub(super) fn in_groups<V: Simd, S: Scores<V>>(
    v: V,
    scores: &S,
    item: &Item<'_>,
    block: usize,
    mut ahead: Ahead<'_>,
    weights: &mut [Weights],
) {
    let mut at = 0;
    while at < weights.len() {
        let (left, weights) = (weights.len() - at, &mut weights[at..]);
        if V::WIDE && left >= 4 {
            scores.scores_of::<4>(v, item, block, ahead, at, weights);
            at += 4;
        } else if V::WIDE && left >= 2 {
            scores.scores_of::<2>(v, item, block, ahead, at, weights);
            at += 2;
        } else {
            scores.scores_of::<1>(v, item, block, ahead, at, weights);
            at += 1;
        }
        ahead = Ahead(&[]);
    }
}

impl Kernel for Item<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        match self.head.shape.kv_type {
            KvType::F32 | KvType::F16 => self.over::<V, Floats>(v),
            KvType::Int8 => self.over::<V, Int8>(v),
            KvType::Bf16 => unreachable!("keys of bf16 are multiplied in pairs"),
        }
    }
}

/// An item with keys and values of bf16.
pub(super) struct InPairs<'a>(pub(super) Item<'a>);

impl Kernel for InPairs<'_> {
    type Output = ();

    const BF16: bool = true;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        self.0.over::<V, Bf16>(v);
    }
}

// In what follows vector operations stand in plain loops, never in closures: a closure is a
// function of its own, and when the compiler does not inline it, it is compiled without the
// instruction set.
impl Item<'_> {
    #[inline(always)]
    fn over<V: Simd, P: Products<V>>(mut self, v: V) {
        let shape = self.head.shape;
        let stride = shape.padded_dim() / LANES + 1;
        let mut all = [Query::default(); ITEM];
        let queries = &mut all[..self.which.len()];
        for (query, i) in queries.iter_mut().zip(self.which.clone()) {
            *query = self.head.query(i);
        }
        let queries = &*queries;
        // Later tokens see from later and up to later positions.
        let (first, end) = (queries[0].first, queries[queries.len() - 1].end);
        let mut products = P::new(v, &self, queries);
        let mut weights = [[[0.0; LANES]; SEGMENT / LANES]; ITEM];
        let weights = &mut weights[..queries.len()];

        // Only what merges here needs room of its own.
        let (mut own, mut own_totals);
        let (segments, gathered, out) = match std::mem::replace(&mut self.target, Target::None) {
            Target::Segment(segment, partials) => {
                (segment..segment + 1, partials.as_chunks_mut().0, None)
            }
            Target::Out(out) => {
                own = [const { MaybeUninit::uninit() }; ITEM * GATHERED];
                let own = zeroed(&mut own[..queries.len() * stride]);
                (first / SEGMENT..end.div_ceil(SEGMENT), own, Some(out))
            }
            Target::None => return,
        };
        let totals = if out.is_some() {
            own_totals = [const { MaybeUninit::uninit() }; ITEM * GATHERED];
            zeroed(&mut own_totals[..queries.len() * stride])
        } else {
            &mut []
        };
        for total in totals.chunks_exact_mut(stride) {
            total[stride - 1][LARGEST] = f32::NEG_INFINITY;
        }
        for segment in segments {
            self.segment(v, &mut products, segment, queries, weights, gathered);
            for (i, total) in totals.chunks_exact_mut(stride).enumerate() {
                if !queries[i].seen(segment * SEGMENT, SEGMENT).is_empty() {
                    merge(v, total, &gathered[i * stride..][..stride]);
                }
            }
        }
        let Some(out) = out else { return };
        for (query, total) in queries.iter().zip(totals.chunks_exact(stride)) {
            // SAFETY: this head of this token belongs to one item, spans share no rows, and nobody
            // else writes the output meanwhile.
            finish(total, unsafe { out.slice(query.start, shape.head_dim) });
        }
    }

    /// All bytes of the keys, and of the values, of a block.
    #[inline(always)]
    pub(super) fn bytes(&self, block: usize) -> (&[u8], &[u8]) {
        let (layer, kv_head) = (self.head.of.layer, self.head.kv_head);
        self.pool.bytes(self.head.page(block), layer, kv_head)
    }

    /// What a segment comes to for each query.
    #[inline(always)]
    fn segment<V: Simd, P: Products<V>>(
        &self,
        v: V,
        products: &mut P,
        segment: usize,
        queries: &[Query],
        weights: &mut [Weights],
        gathered: &mut [[f32; LANES]],
    ) {
        let start = segment * SEGMENT;
        let first = queries[0].first.max(start);
        let end = queries[queries.len() - 1].end.min(start + SEGMENT);
        let blocks = first / PAGE..end.div_ceil(PAGE);
        for block in blocks.clone() {
            let ahead = if block + 1 < blocks.end {
                self.bytes(block + 1).0
            } else {
                self.bytes(blocks.start).1
            };
            products.scores(v, self, block, Ahead(ahead), queries, weights);
        }
        let stride = gathered.len() / queries.len();
        for (i, query) in queries.iter().enumerate() {
            let gathered = &mut gathered[i * stride..][..stride];
            gathered.fill([0.0; LANES]);
            weigh(
                v,
                self.head.of.scale,
                query.seen(start, SEGMENT),
                &mut weights[i],
                &mut gathered[stride - 1],
            );
        }
        products.values(v, self, blocks, queries, weights, gathered);
    }
}

/// Zeros as many vectors as are asked for: heads are mostly narrower than there is room for.
#[inline(always)]
fn zeroed(room: &mut [MaybeUninit<[f32; LANES]>]) -> &mut [[f32; LANES]] {
    room.fill(MaybeUninit::new([0.0; LANES]));
    // SAFETY: all of it was just written.
    unsafe { room.assume_init_mut() }
}

/// Scales the scores at the positions seen, turns them into weights, and notes their maximum and sum.
#[inline(always)]
fn weigh<V: Simd>(
    v: V,
    scale: f32,
    seen: Range<usize>,
    weights: &mut Weights,
    noted: &mut [f32; LANES],
) {
    if seen.is_empty() {
        return;
    }
    let vectors = seen.start / LANES..seen.end.div_ceil(LANES);
    let from = vectors.start * LANES;
    let weights = &mut weights[vectors];
    let mut best = v.splat(f32::NEG_INFINITY);
    let scale = v.splat(scale);
    let edges = [seen.start - from, seen.end - from];
    let last = weights.len() - 1;
    for (i, x) in weights.iter_mut().enumerate() {
        v.store(v.mul(v.load(x), scale), x);
        if i == 0 {
            x[..edges[0]].fill(f32::NEG_INFINITY);
        }
        if i == last {
            x[edges[1] - last * LANES..].fill(f32::NEG_INFINITY);
        }
        best = v.max(best, v.load(x));
    }
    let largest = v.largest(best);
    let mut total = v.splat(0.0);
    for x in weights.iter_mut() {
        let e = exp(v, v.sub(v.load(x), v.splat(largest)));
        total = v.add(total, e);
        v.store(e, x);
    }
    noted[LARGEST] = largest;
    noted[SUM] = v.sum(total);
}

/// Merges what a segment came to into the total of those before it.
#[inline(always)]
fn merge<V: Simd>(v: V, total: &mut [[f32; LANES]], segment: &[[f32; LANES]]) {
    let width = total.len() - 1;
    let (noted, found) = (&mut total[width], &segment[width]);
    let largest = if found[LARGEST] > noted[LARGEST] {
        found[LARGEST]
    } else {
        noted[LARGEST]
    };
    let mut differences = [0.0; LANES];
    differences[0] = noted[LARGEST] - largest;
    differences[1] = found[LARGEST] - largest;
    let mut factors = [0.0; LANES];
    v.store(exp(v, v.load(&differences)), &mut factors);
    noted[SUM] = found[SUM].mul_add(factors[1], noted[SUM] * factors[0]);
    noted[LARGEST] = largest;
    let (keep, add) = (v.splat(factors[0]), v.splat(factors[1]));
    for (total, found) in total[..width].iter_mut().zip(segment) {
        let kept = v.mul(v.load(total), keep);
        v.store(v.fma(v.load(found), add, kept), total);
    }
}

#[inline(always)]
fn finish(total: &[[f32; LANES]], out: &mut [f32]) {
    let inverse = 1.0 / total[total.len() - 1][SUM];
    for (out, x) in out.iter_mut().zip(total.as_flattened()) {
        *out = x * inverse;
    }
}

/// Merges the segments of all queries of a head, which several members computed.
pub(super) struct Merge<'a> {
    pub(super) head: Head<'a>,
    /// Segment by segment, in each query by query.
    pub(super) partials: &'a [f32],
    pub(super) out: &'a SharedMut<'a, f32>,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let Head {
            of, shape, span, ..
        } = &self.head;
        let stride = shape.padded_dim() / LANES + 1;
        let queries = span.rows.len() * (of.heads / shape.kv_heads);
        let partials = self.partials.as_chunks().0;
        let segments = of.segments(span);
        for i in 0..queries {
            let query = self.head.query(i);
            let mut total = [[0f32; LANES]; GATHERED];
            let total = &mut total[..stride];
            total[stride - 1][LARGEST] = f32::NEG_INFINITY;
            for (at, segment) in segments.clone().enumerate() {
                if !query.seen(segment * SEGMENT, SEGMENT).is_empty() {
                    merge(v, total, &partials[(at * queries + i) * stride..][..stride]);
                }
            }
            // SAFETY: each head of each token is merged once, spans share no rows, and all items
            // are over.
            finish(total, unsafe {
                self.out.slice(query.start, shape.head_dim)
            });
        }
    }
}
