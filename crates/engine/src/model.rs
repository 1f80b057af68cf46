//! The forward pass of a Llama-family decoder over one batch: embedding, blocks of attention and
//! gated feed-forward, final norm and logits. It owns weights and working memory; which rows to
//! compute is the scheduler's choice, and where keys and values lie the cache's.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use casemate_container::ModelConfig;
use casemate_kernels::attention::{Attention, AttentionScratch};
use casemate_kernels::elementwise::{add, add_bias, silu_mul};
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::norm::rmsnorm;
use casemate_kernels::oblivious::Found;
use casemate_kernels::rope::{RopeLayout, RopeTable};
use casemate_kernels::team::Team;

use crate::adapters::{Adapted, Adapters, LowRank};
use crate::kv::{KvCache, Slot};
use crate::linear::LinearScratch;
use crate::outsource::Stack;
use crate::rope;
use crate::weights::Weights;

/// Fewest rows of logits that there is room for.
const LOGIT_ROWS: usize = 32;
/// Below this many elements, waking the team costs more than it saves.
const WORTH_SHARING: usize = 1 << 15;

/// Which logits a span's caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// None: more of the prompt follows.
    None,
    /// Those after its last token.
    Last,
    /// Those after each token.
    All,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) slot: Slot,
    /// Position of the first token.
    pub(crate) first: usize,
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
    pub(crate) wanted: Wanted,
}

/// The rows of one forward pass.
#[derive(Default)]
pub(crate) struct Batch {
    tokens: Vec<u32>,
    /// Of each token in its sequence.
    positions: Vec<usize>,
    spans: Vec<Span>,
}

impl Batch {
    /// Room for so many rows and sequences.
    pub(crate) fn with_capacity(rows: usize, sequences: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            spans: Vec::with_capacity(sequences),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
    }

    /// Adds `tokens` of the sequence in `slot`, from position `first` on.
    pub(crate) fn push(&mut self, slot: Slot, first: usize, tokens: &[u32], wanted: Wanted) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(first..first + tokens.len());
        self.spans.push(Span {
            slot,
            first,
            rows: start..self.tokens.len(),
            wanted,
        });
    }

    pub(crate) fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The tokens of a span.
    pub(crate) fn tokens(&self, span: &Span) -> &[u32] {
        &self.tokens[span.rows.clone()]
    }
}

/// A model ready to compute.
pub(crate) struct Model {
    weights: Weights,
    adapters: Arc<Adapters>,
    /// Of the batch at hand; kept for its memory.
    adapted: Vec<Adapted>,
    low_rank: LowRank,
    team: Team,
    rope: RopeTable,
    rope_layout: RopeLayout,
    hidden: usize,
    heads: usize,
    head_dim: usize,
    /// Widths of Q, of K and of V.
    q: usize,
    kv: usize,
    ffn: usize,
    vocab: usize,
    eps: f32,
    window: Option<usize>,
    scratch: LinearScratch,
    /// What finds embeddings, where nobody may see of which tokens.
    found: Option<Found>,
    attention: AttentionScratch,
    buffers: Buffers,
    logit_rows: usize,
}

/// Working memory for the largest batch. It holds what prompts turn into, so it lies where core
/// dumps do not reach.
struct Buffers {
    /// The residual stream.
    stream: Region,
    /// Input and output rows of layers, as wide as the residual stream.
    rows: Region,
    qkv: Region,
    queries: Region,
    keys: Region,
    values: Region,
    attended: Region,
    gate_up: Region,
    activated: Region,
    logits: Region,
}

impl Model {
    /// Prepares for batches of at most `rows` rows, of which `wanted` need logits.
    pub(crate) fn new(
        weights: Weights,
        adapters: Arc<Adapters>,
        config: &ModelConfig,
        context: usize,
        rows: usize,
        wanted: usize,
        team: Team,
    ) -> io::Result<Self> {
        let (hidden, ffn, vocab) = (
            config.hidden as usize,
            config.ffn as usize,
            config.vocab as usize,
        );
        let (heads, head_dim) = (config.heads as usize, config.head_dim as usize);
        let (q, kv) = (heads * head_dim, config.kv_heads as usize * head_dim);
        let logit_rows = wanted.max(LOGIT_ROWS);
        let region = |rows: usize, width: usize| {
            let bytes = rows
                .checked_mul(width)
                .and_then(|n| n.checked_mul(size_of::<f32>()));
            Region::zeroed(bytes.ok_or(io::ErrorKind::OutOfMemory)?, Purpose::State)
        };
        let frequencies = rope::frequencies(
            head_dim,
            config.rope_theta,
            &config.rope_scaling,
            weights.rope_factors.as_deref(),
        );
        Ok(Self {
            rope: RopeTable::new(&frequencies, context),
            rope_layout: match config.rope_layout {
                casemate_container::RopeLayout::Interleaved => RopeLayout::Interleaved,
                casemate_container::RopeLayout::Half => RopeLayout::Half,
            },
            hidden,
            heads,
            head_dim,
            q,
            kv,
            ffn,
            vocab,
            eps: config.norm_eps,
            window: config.sliding_window.map(|w| w as usize),
            // One row of every request that generates.
            attention: AttentionScratch::new(wanted, heads, head_dim, context)?,
            scratch: LinearScratch::new(rows, hidden.max(ffn).max(q)),
            found: None,
            buffers: Buffers {
                stream: region(rows, hidden)?,
                rows: region(rows.max(logit_rows), hidden)?,
                qkv: region(rows, q + 2 * kv)?,
                queries: region(rows, q)?,
                keys: region(rows, kv)?,
                values: region(rows, kv)?,
                attended: region(rows, q)?,
                gate_up: region(rows, 2 * ffn)?,
                activated: region(rows, ffn)?,
                logits: region(logit_rows, vocab)?,
            },
            logit_rows,
            weights,
            low_rank: adapters.scratch(team.members(), rows)?,
            adapters,
            adapted: Vec::with_capacity(wanted),
            team,
        })
    }

    /// From now on looks embeddings up without telling of which tokens.
    pub(crate) fn oblivious(mut self) -> io::Result<Self> {
        self.found = Some(self.weights.embedding.found()?);
        Ok(self)
    }

    /// The threads that compute.
    pub(crate) fn team(&self) -> &Team {
        &self.team
    }

    /// Most rows of logits that one batch may ask for.
    pub(crate) fn maximum_wanted_rows(&self) -> usize {
        self.logit_rows
    }

    /// The logits of `count` wanted rows of the last batch, from the `row`-th on.
    pub(crate) fn logits_mut(&mut self, row: usize, count: usize) -> &mut [f32] {
        &mut self.buffers.logits.as_f32_mut()[row * self.vocab..(row + count) * self.vocab]
    }

    /// Computes a batch: writes its keys and values into the cache and leaves the wanted logits.
    ///
    /// # Panics
    /// If the batch is larger than promised, or names tokens or positions that do not exist; the
    /// scheduler's requests are checked.
    pub(crate) fn forward(&mut self, cache: &mut KvCache, batch: &Batch) {
        let n = batch.tokens.len();
        let (team, isa) = (&self.team, self.team.isa());
        let b = &mut self.buffers;
        let stream = &mut b.stream.as_f32_mut()[..n * self.hidden];
        let rows = &mut b.rows.as_f32_mut()[..n * self.hidden];
        let qkv = &mut b.qkv.as_f32_mut()[..n * (self.q + 2 * self.kv)];
        let queries = &mut b.queries.as_f32_mut()[..n * self.q];
        let keys = &mut b.keys.as_f32_mut()[..n * self.kv];
        let values = &mut b.values.as_f32_mut()[..n * self.kv];
        let attended = &mut b.attended.as_f32_mut()[..n * self.q];
        let gate_up = &mut b.gate_up.as_f32_mut()[..n * 2 * self.ffn];
        let activated = &mut b.activated.as_f32_mut()[..n * self.ffn];

        self.adapted.clear();
        for span in &batch.spans {
            if let Some(adapter) = cache.adapter_of(span.slot) {
                let rows = span.rows.clone();
                self.adapted.push(Adapted { adapter, rows });
            }
        }
        let (hidden, q, ffn) = (self.hidden, self.q, self.ffn);
        let mut adapt = |layer, stack, x: (&[f32], usize), y: (&mut [f32], usize)| {
            let (adapted, scratch) = (&self.adapted, &mut self.low_rank);
            self.adapters
                .apply(team, scratch, adapted, (layer, stack), x, y);
        };

        let (pool, spans) = cache.locate(&batch.spans);
        let embedding = &self.weights.embedding;
        match &mut self.found {
            Some(found) => embedding.find_rows(team, found, &batch.tokens, stream),
            None => by_rows(team, stream, self.hidden, |i, row| {
                embedding.row(batch.tokens[i] as usize, row);
            }),
        }
        for (index, layer) in self.weights.layers.iter().enumerate() {
            by_rows(team, rows, self.hidden, |i, row| {
                rmsnorm(
                    isa,
                    &stream[i * self.hidden..][..self.hidden],
                    &layer.attention_norm,
                    self.eps,
                    row,
                );
            });
            let width = self.q + 2 * self.kv;
            layer.qkv.forward(team, &mut self.scratch, rows, qkv);
            adapt(index, Stack::Qkv, (rows, hidden), (qkv, width));
            if let Some(bias) = &layer.qkv_bias {
                add_bias(isa, bias, qkv);
            }
            let (rope, layout, head_dim) = (&self.rope, self.rope_layout, self.head_dim);
            let part = |row: usize, first: usize, to: &mut [f32]| {
                to.copy_from_slice(&qkv[row * width + first..][..to.len()]);
            };
            by_rows(team, queries, self.q, |i, row| {
                part(i, 0, row);
                rope.apply(layout, batch.positions[i], head_dim, row);
            });
            by_rows(team, keys, self.kv, |i, row| {
                part(i, self.q, row);
                rope.apply(layout, batch.positions[i], head_dim, row);
            });
            by_rows(team, values, self.kv, |i, row| {
                part(i, self.q + self.kv, row)
            });
            pool.write(team, index, spans, keys, values);
            let attention = Attention {
                layer: index,
                heads: self.heads,
                scale: 1.0 / (self.head_dim as f32).sqrt(),
                window: self.window,
            };
            attention.run(team, pool, &mut self.attention, spans, queries, attended);
            layer
                .attention_output
                .forward(team, &mut self.scratch, attended, rows);
            adapt(index, Stack::AttentionOutput, (attended, q), (rows, hidden));
            by_rows(team, stream, self.hidden, |i, row| {
                add(isa, &rows[i * self.hidden..][..self.hidden], row)
            });

            by_rows(team, rows, self.hidden, |i, row| {
                rmsnorm(
                    isa,
                    &stream[i * self.hidden..][..self.hidden],
                    &layer.ffn_norm,
                    self.eps,
                    row,
                );
            });
            layer
                .gate_up
                .forward(team, &mut self.scratch, rows, gate_up);
            adapt(index, Stack::GateUp, (rows, hidden), (gate_up, 2 * ffn));
            by_rows(team, activated, self.ffn, |i, row| {
                let (gate, up) = gate_up[i * 2 * self.ffn..][..2 * self.ffn].split_at(self.ffn);
                row.copy_from_slice(gate);
                silu_mul(isa, row, up);
            });
            layer.down.forward(team, &mut self.scratch, activated, rows);
            adapt(index, Stack::Down, (activated, ffn), (rows, hidden));
            by_rows(team, stream, self.hidden, |i, row| {
                add(isa, &rows[i * self.hidden..][..self.hidden], row)
            });
        }

        let rows = b.rows.as_f32_mut();
        let mut wanted = 0;
        for span in &batch.spans {
            let from = match span.wanted {
                Wanted::None => continue,
                Wanted::Last => span.rows.end - 1..span.rows.end,
                Wanted::All => span.rows.clone(),
            };
            for i in from {
                let row = &mut rows[wanted * self.hidden..][..self.hidden];
                rmsnorm(
                    isa,
                    &stream[i * self.hidden..][..self.hidden],
                    &self.weights.output_norm,
                    self.eps,
                    row,
                );
                wanted += 1;
            }
        }
        if wanted > 0 {
            let logits = &mut b.logits.as_f32_mut()[..wanted * self.vocab];
            self.weights.output.forward(
                team,
                &mut self.scratch,
                &rows[..wanted * self.hidden],
                logits,
            );
        }
    }
}

/// Calls `work` for each row of `out`, on the whole team if there is enough of it.
fn by_rows(team: &Team, out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() < WORTH_SHARING {
        out.chunks_exact_mut(width)
            .enumerate()
            .for_each(|(i, row)| work(i, row));
    } else {
        team.for_each_chunk_mut(out, width, work);
    }
}
