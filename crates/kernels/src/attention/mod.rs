//! Attention over a paged cache of keys and values.
//!
//! A page holds [`PAGE`] consecutive positions of one sequence, for all layers and heads
//! (`pool` has the layouts). The caller decides which page belongs to whom (a list of page
//! numbers per sequence) and may share pages between sequences; nothing here allocates or frees
//! them.
//!
//! Order of sums, per query and head, with keys and values in f32 or f16. The context is cut
//! into *segments* of [`SEGMENT`] positions, from position 0. In a segment: scores by fused
//! multiply-add over d from zero, then times `scale`; their maximum m; weights exp(score - m); their
//! sum l, position p in lane p mod 16, lanes added up as everywhere; values by fused multiply-add of
//! weight and value over positions in order, from zero. Segments are merged in order, the first into
//! m = -infinity, l = 0 and zeros: both sides are scaled by exp of their m minus the larger one, the
//! new side by fused multiply-add. At the end values are multiplied by 1 / l. Segments in which a
//! query sees nothing play no part.
//!
//! bf16 and int8 have the same order with other products inside a segment, see `bf16` and `int8`.
//!
//! So no instruction set, thread count, batch or page assignment changes a bit of the result, and it
//! is all the same whether one member works through a query's segments or several share them.

mod bf16;
mod floats;
mod int8;
mod item;
mod pool;
mod quant;
mod spans;

pub use pool::{KvPool, KvShape, KvType};
pub use spans::{Span, Spans};

use std::io;
use std::ops::Range;

use item::{Head, InPairs, Item, Merge, Target};

use crate::isa::LANES;
use crate::mem::{Purpose, Region};
use crate::team::{SharedMut, Team};

/// Positions of a page.
pub const PAGE: usize = 64;

/// Positions of a segment: what one member works through at least, where several share the context
/// of one token.
pub const SEGMENT: usize = 256;

/// Largest dimension of a head.
pub const MAX_HEAD_DIM: usize = 256;

/// Most queries of one key/value head that are worked on together.
const ITEM: usize = 16;

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

/// Working memory: what segments of a few tokens' contexts come to before they are merged.
pub struct AttentionScratch(Region);

impl AttentionScratch {
    /// Room for sharing out `rows` tokens of `heads` query heads with contexts of up to `context`
    /// positions. Where there is less room than it takes, contexts are not shared out, which
    /// changes time only.
    ///
    /// # Errors
    /// The operating system's refusal.
    pub fn new(
        rows: usize,
        heads: usize,
        head_dim: usize,
        context: usize,
    ) -> io::Result<AttentionScratch> {
        let bytes = rows
            .checked_mul(heads)
            .and_then(|n| n.checked_mul(context.div_ceil(SEGMENT)))
            .and_then(|n| n.checked_mul(head_dim.next_multiple_of(LANES) + LANES))
            .and_then(|n| n.checked_mul(size_of::<f32>()));
        let bytes = bytes.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(AttentionScratch(Region::zeroed(bytes, Purpose::State)?))
    }
}

/// How a span's work is divided.
#[derive(Clone, Copy)]
struct Division {
    /// Queries of each key/value head.
    queries: usize,
    /// Pieces of each key/value head: parts of its queries, or segments of its context.
    pieces: usize,
    /// Where results of segments go, if the context is shared out.
    partials: Option<usize>,
}

impl Attention {
    /// Causal attention of every row of `queries` (`heads * head_dim` a row) over its sequence,
    /// into the same row of `out`. Rows of `out` that belong to no span are left as they are.
    ///
    /// # Panics
    /// If a length does not fit, or a span names rows or pages that are not there.
    pub fn run(
        &self,
        team: &Team,
        pool: &KvPool,
        scratch: &mut AttentionScratch,
        spans: &Spans,
        queries: &[f32],
        out: &mut [f32],
    ) {
        let shape = pool.shape();
        let kv_heads = shape.kv_heads;
        let width = self.heads * shape.head_dim;
        assert!(
            self.heads > 0 && self.heads.is_multiple_of(kv_heads),
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
        spans.check(queries.len() / width, pool.pages());

        let room = scratch.0.view::<f32>().len();
        let room = if team.members() > 1 { room } else { 0 };
        let items = |height: usize| -> usize {
            let pieces = self.divide(shape, spans, room, height);
            pieces.map(|(_, division)| division.pieces * kv_heads).sum()
        };
        // Tall items read keys and values once for many queries; but every member needs work.
        let mut height = ITEM;
        while height > 1 && items(height) < team.members() {
            height /= 2;
        }

        let isa = team.isa();
        let (out, partials) = (
            SharedMut::new(out),
            SharedMut::new(scratch.0.view_mut::<f32>()),
        );
        team.for_each(items(height), |mut index| {
            for (span, division) in self.divide(shape, spans, room, height) {
                if index >= division.pieces * kv_heads {
                    index -= division.pieces * kv_heads;
                    continue;
                }
                let head = Head {
                    of: self,
                    shape,
                    span,
                    kv_head: index / division.pieces,
                };
                let piece = index % division.pieces;
                let (queries_of_head, target) = match division.partials {
                    None => {
                        let first = piece * height;
                        let end = division.queries.min(first + height);
                        (first..end, Target::Out(&out))
                    }
                    Some(start) => {
                        let len = division.queries * partial_len(shape);
                        // SAFETY: parts of different spans, heads and segments do not overlap, and
                        // each is written by the one item that this index stands for.
                        let partials = unsafe { partials.slice(start + index * len, len) };
                        let segment = self.segments(&head.span).start + piece;
                        (0..division.queries, Target::Segment(segment, partials))
                    }
                };
                let item = Item {
                    head,
                    pool,
                    queries,
                    which: queries_of_head,
                    target,
                };
                match shape.kv_type {
                    KvType::Bf16 => isa.dispatch(InPairs(item)),
                    KvType::F32 | KvType::F16 | KvType::Int8 => isa.dispatch(item),
                }
                return;
            }
        });

        let partials = scratch.0.view::<f32>();
        let shared_out = || {
            self.divide(shape, spans, room, height)
                .filter_map(|(span, d)| Some((span, d, d.partials?)))
        };
        let merge = |mut index: usize| {
            for (span, division, start) in shared_out() {
                if index >= kv_heads {
                    index -= kv_heads;
                    continue;
                }
                let len = division.pieces * division.queries * partial_len(shape);
                isa.dispatch(Merge {
                    head: Head {
                        of: self,
                        shape,
                        span,
                        kv_head: index,
                    },
                    partials: &partials[start + index * len..][..len],
                    out: &out,
                });
                return;
            }
        };
        let heads = shared_out().count() * kv_heads;
        let last = shared_out().last();
        let numbers = last.map_or(0, |(_, d, start)| {
            start + kv_heads * d.pieces * d.queries * partial_len(shape)
        });
        // Waking the team costs more than merging a few segments.
        const WORTH_SHARING: usize = 1 << 16;
        if numbers < WORTH_SHARING {
            (0..heads).for_each(merge);
        } else {
            team.for_each(heads, merge);
        }
    }

    /// Shares out the context of spans of a few tokens while `room` numbers last, and the tokens of
    /// others, `height` queries at a time.
    fn divide<'a>(
        &self,
        shape: KvShape,
        spans: &'a Spans,
        room: usize,
        height: usize,
    ) -> impl Iterator<Item = (Span<'a>, Division)> {
        let of = *self;
        let mut used = 0;
        spans.iter().map(move |span| {
            let queries = span.rows.len() * (of.heads / shape.kv_heads);
            let segments = of.segments(&span).len();
            let needed = shape.kv_heads * segments * queries * partial_len(shape);
            let share = (1..=ITEM).contains(&queries) && segments > 1 && needed <= room - used;
            let division = Division {
                queries,
                pieces: if share {
                    segments
                } else {
                    queries.div_ceil(height)
                },
                partials: share.then_some(used),
            };
            used += if share { needed } else { 0 };
            (span, division)
        })
    }

    /// Segments that some token of the span sees something of.
    fn segments(&self, span: &Span<'_>) -> Range<usize> {
        self.first_seen(span.position) / SEGMENT..span.end().div_ceil(SEGMENT)
    }

    /// The first position that a token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.window.unwrap_or(usize::MAX))
    }
}

/// Numbers that a segment comes to for one query: values, and a line with maximum and sum.
fn partial_len(shape: KvShape) -> usize {
    shape.padded_dim() + LANES
}
