//! Low-rank adapters beside the weights of their base: `y += scale · B (A x)` for the rows of requests that asked for one.
//!
//! Factors are f32, and `x` is the row that enters the layer, before it is rounded or rotated for any arithmetic; `y` is
//! what the layer gave, wherever it was computed. So a layer behind [`crate::linear::LinearLayer`] knows nothing of
//! adapters, nothing is merged into weights, and rows without an adapter keep every bit. A row's sum depends on nothing
//! but the row, so neither does its answer on neighbours, threads or instruction set.
//!
//! Per product: A as its rank rows of inputs, and B transposed, as rank rows of outputs. Each of `A x` is one dot product, and
//! each output adds its `rank` terms one after another, whoever does: so many rows are shared out by rows, and few (tokens)
//! in two steps, first the elements of all `A x`, then columns of the outputs.

use std::io;
use std::ops::Range;

use casemate_container::{
    Adapter as Container, AdapterTensor, Factor, ModelConfig, ModelDigest, Target, reordered_row,
};
use casemate_kernels::cpu::Isa;
use casemate_kernels::elementwise::{axpy, dot};
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::team::Team;

use crate::dequant::dequantise;
use crate::error::{LoadError, SubmitError};
use crate::outsource::Stack;

/// Below this many multiplications, which read as many numbers, waking the team costs more than it saves: these take one
/// thread some 10 µs, a run of the team takes one or two.
const WORTH_SHARING: usize = 1 << 15;
/// With fewer rows for each member than this, rows are not shared out, but what there is to do for them.
const ROWS_PER_MEMBER: usize = 2;
/// Into how many pieces for each member that is divided, since some come late.
const PIECES: usize = 4;
/// Fewest columns of a piece: shorter ones take longer to hand out than to add to.
const LEAST_COLUMNS: usize = 256;

/// Which of the loaded adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct AdapterIndex(usize);

/// The adapters to one model.
#[derive(Default)]
pub(crate) struct Adapters(Vec<Lora>);

struct Lora {
    digest: ModelDigest,
    scale: f32,
    rank: usize,
    /// All factors.
    factors: Region,
    /// Outputs of each product of the base, in the order of [`Target::ALL`], which is that of its numbers.
    outputs: [usize; Target::ALL.len()],
    /// By layer, in the same order.
    layers: Vec<[Option<Product>; Target::ALL.len()]>,
}

/// Where the factors of one product lie, in numbers.
#[derive(Clone)]
struct Product {
    /// rank × inputs.
    a: Range<usize>,
    /// rank × outputs.
    b: Range<usize>,
}

/// Rows that one adapter is for.
pub(crate) struct Adapted {
    pub(crate) adapter: AdapterIndex,
    pub(crate) rows: Range<usize>,
}

/// Room for the `A x` of rows that the team works on together. It comes from prompts, so it lies where they do.
pub(crate) struct LowRank(Region);

impl Adapters {
    /// Takes verified adapters to the model `digest` with this configuration.
    pub(crate) fn load(
        containers: Vec<Container>,
        config: &ModelConfig,
        digest: ModelDigest,
    ) -> Result<Self, LoadError> {
        let mut loaded: Vec<Lora> = Vec::with_capacity(containers.len());
        for container in containers {
            if loaded.iter().any(|lora| lora.digest == container.digest()) {
                return Err(LoadError::AdapterTwice {
                    adapter: container.digest(),
                });
            }
            loaded.push(Lora::load(&container, config, digest)?);
        }
        Ok(Self(loaded))
    }

    /// The adapter of this digest.
    pub(crate) fn find(&self, digest: ModelDigest) -> Result<AdapterIndex, SubmitError> {
        let at = self.0.iter().position(|lora| lora.digest == digest);
        at.map(AdapterIndex)
            .ok_or(SubmitError::UnknownAdapter { adapter: digest })
    }

    /// Digests of all, in the order in which they were given.
    pub(crate) fn digests(&self) -> Vec<ModelDigest> {
        self.0.iter().map(|lora| lora.digest).collect()
    }

    /// Bytes of all factors.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|lora| lora.factors.len() as u64).sum()
    }

    /// Working memory for batches of at most `rows` rows on a team of so many members.
    pub(crate) fn scratch(&self, members: usize, rows: usize) -> io::Result<LowRank> {
        let stacked = Stack::OF_A_BLOCK.map(|stack| stack.targets().len());
        let stacked = stacked.into_iter().max().unwrap_or(0);
        let rank = self.0.iter().map(|lora| lora.rank).max().unwrap_or(0);
        let rows = rows.min(members.saturating_mul(ROWS_PER_MEMBER));
        let bytes = rows
            .checked_mul(stacked * rank)
            .and_then(|numbers| numbers.checked_mul(size_of::<f32>()));
        let bytes = bytes.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(LowRank(Region::zeroed(bytes, Purpose::State)?))
    }

    /// Adds to the output rows `y` of a layer's stack what the adapters of `spans` make of its input rows `x`.
    pub(crate) fn apply(
        &self,
        team: &Team,
        scratch: &mut LowRank,
        spans: &[Adapted],
        (layer, stack): (usize, Stack),
        (x, inputs): (&[f32], usize),
        (y, outputs): (&mut [f32], usize),
    ) {
        let add = |row: usize, y: &mut [f32]| {
            if let Some((_, lora)) = self.adapter_of(spans, row) {
                let x = &x[row * inputs..(row + 1) * inputs];
                lora.add(team.isa(), layer, stack, x, y);
            }
        };
        let (mut rows, mut work) = (0, 0);
        for span in spans {
            rows += span.rows.len();
            work += span.rows.len() * self.0[span.adapter.0].numbers(layer, stack);
        }
        if work < WORTH_SHARING || team.members() == 1 {
            for row in spans.iter().flat_map(|span| span.rows.clone()) {
                add(row, &mut y[row * outputs..(row + 1) * outputs]);
            }
        } else if rows < ROWS_PER_MEMBER * team.members() {
            self.apply_together(
                team,
                scratch,
                spans,
                (layer, stack),
                (x, inputs),
                (y, outputs),
            );
        } else {
            team.for_each_chunk_mut(y, outputs, add);
        }
    }

    /// As [`Self::apply`], for few rows: every member has a part of each of them.
    fn apply_together(
        &self,
        team: &Team,
        scratch: &mut LowRank,
        spans: &[Adapted],
        (layer, stack): (usize, Stack),
        (x, inputs): (&[f32], usize),
        (y, outputs): (&mut [f32], usize),
    ) {
        let (isa, pieces) = (team.isa(), PIECES * team.members());
        let targets = stack.targets();
        let rows: usize = spans.iter().map(|span| span.rows.len()).sum();
        let of_spans = spans.iter().map(|span| self.0[span.adapter.0].rank);
        let rank = of_spans.max().unwrap_or(0);
        // For each row that has an adapter, and each product of the stack, as much as the largest rank.
        let width = targets.len() * rank;
        let inner = &mut scratch.0.as_f32_mut()[..rows * width];
        let few = inner.len().div_ceil(pieces).max(1);
        team.for_each_chunk_mut(inner, few, |index, inner| {
            for (at, value) in (index * few..).zip(inner) {
                let (nth, element) = (at / width, at % width);
                let Some((row, lora)) = self.nth(spans, nth) else {
                    continue;
                };
                let x = &x[row * inputs..(row + 1) * inputs];
                let (target, r) = (targets[element / rank], element % rank);
                if let Some(inner) = lora.inner(isa, layer, target, r, x) {
                    *value = inner;
                }
            }
        });
        let inner = &*inner;
        let few = (rows * outputs).div_ceil(pieces).max(LEAST_COLUMNS);
        team.for_each_chunk_mut(y, few, |index, mut y| {
            let mut at = index * few;
            while !y.is_empty() {
                let (row, column) = (at / outputs, at % outputs);
                let of_row = y.len().min(outputs - column);
                let (piece, rest) = y.split_at_mut(of_row);
                if let Some((nth, lora)) = self.adapter_of(spans, row) {
                    let inner = &inner[nth * width..(nth + 1) * width];
                    lora.add_columns(isa, layer, stack, (inner, rank), column, piece);
                }
                at += of_row;
                y = rest;
            }
        });
    }

    /// The adapter of a row, and the how-manieth row with one it is.
    fn adapter_of(&self, spans: &[Adapted], row: usize) -> Option<(usize, &Lora)> {
        let mut before = 0;
        for span in spans {
            if span.rows.contains(&row) {
                let nth = before + row - span.rows.start;
                return Some((nth, &self.0[span.adapter.0]));
            }
            before += span.rows.len();
        }
        None
    }

    /// The nth row with an adapter, and that.
    fn nth(&self, spans: &[Adapted], mut nth: usize) -> Option<(usize, &Lora)> {
        for span in spans {
            if nth < span.rows.len() {
                return Some((span.rows.start + nth, &self.0[span.adapter.0]));
            }
            nth -= span.rows.len();
        }
        None
    }
}

impl Lora {
    fn load(
        container: &Container,
        base: &ModelConfig,
        digest: ModelDigest,
    ) -> Result<Self, LoadError> {
        let config = container.config();
        if config.base != digest {
            return Err(LoadError::OtherBase {
                adapter: container.digest(),
                base: config.base,
                model: digest,
            });
        }
        let entries = container.manifest().tensors();
        let fields = entries.iter().map(|t| (&*t.name, t.dtype, &t.shape[..]));
        config
            .check_tensors(fields, Some(base))
            .map_err(LoadError::Adapter)?;
        let rank = config.rank as usize;
        let numbers = entries
            .iter()
            .try_fold(0usize, |sum, t| {
                let count = t.shape.iter().product::<u64>();
                sum.checked_add(usize::try_from(count).ok()?)
            })
            .and_then(|numbers| numbers.checked_mul(size_of::<f32>()))
            .ok_or(io::ErrorKind::OutOfMemory)
            .map_err(io::Error::from)?;
        let mut lora = Lora {
            digest: container.digest(),
            scale: config.scale(),
            rank,
            factors: Region::zeroed(numbers, Purpose::Weights)?,
            outputs: Target::ALL.map(|target| target.shape(base).0 as usize),
            layers: vec![Default::default(); base.layers as usize],
        };
        let mut scratch = Region::zeroed(rank * size_of::<f32>(), Purpose::Weights)?;
        let mut end = 0;
        for layer in 0..base.layers {
            for target in Target::ALL {
                let name = |factor| {
                    AdapterTensor {
                        layer,
                        target,
                        factor,
                    }
                    .to_string()
                };
                let (a, b) = (name(Factor::A), name(Factor::B));
                let (Some(a_tensor), Some(b_tensor)) = (container.tensor(&a), container.tensor(&b))
                else {
                    continue;
                };
                let (outputs, inputs) = target.shape(base);
                let (outputs, inputs) = (outputs as usize, inputs as usize);
                let product = Product {
                    a: end..end + rank * inputs,
                    b: end + rank * inputs..end + rank * (inputs + outputs),
                };
                end = product.b.end;
                let factors = lora.factors.as_f32_mut();
                let into = &mut factors[product.a.clone()];
                dequantise(a_tensor.entry.dtype, a_tensor.bytes, into);
                check_finite(&a, into)?;
                // Transposed, its rows in the order of the base.
                let into = &mut factors[product.b.clone()];
                let row_bytes = b_tensor.bytes.len() / outputs;
                let row = scratch.as_f32_mut();
                for output in 0..outputs {
                    let stored = match target {
                        Target::Query | Target::Key => reordered_row(
                            config.rope_layout,
                            base.rope_layout,
                            base.head_dim as usize,
                            output,
                        ),
                        _ => output,
                    };
                    let bytes = &b_tensor.bytes[stored * row_bytes..(stored + 1) * row_bytes];
                    dequantise(b_tensor.entry.dtype, bytes, &mut row[..rank]);
                    check_finite(&b, &row[..rank])?;
                    for (r, &value) in row[..rank].iter().enumerate() {
                        into[r * outputs + output] = value;
                    }
                }
                lora.layers[layer as usize][target as usize] = Some(product);
            }
        }
        Ok(lora)
    }

    /// How many numbers the factors of a stack's products have: as many multiplications a row takes.
    fn numbers(&self, layer: usize, stack: Stack) -> usize {
        let products = stack.targets().iter();
        let products = products.filter_map(|target| self.layers[layer][*target as usize].as_ref());
        products.map(|p| p.a.len() + p.b.len()).sum()
    }

    /// The rth element of `scale · A x`, where the adapter has one for this product.
    fn inner(&self, isa: Isa, layer: usize, target: Target, r: usize, x: &[f32]) -> Option<f32> {
        let product = self.layers[layer][target as usize].as_ref()?;
        let a = self.factors.as_f32()[product.a.clone()]
            .chunks_exact(x.len())
            .nth(r)?;
        Some(self.scale * dot(isa, a, x))
    }

    /// Adds to one output row what one input row makes.
    fn add(&self, isa: Isa, layer: usize, stack: Stack, x: &[f32], y: &mut [f32]) {
        let factors = self.factors.as_f32();
        let mut first = 0;
        for &target in stack.targets() {
            let outputs = self.outputs[target as usize];
            let y = &mut y[first..first + outputs];
            first += outputs;
            let Some(product) = &self.layers[layer][target as usize] else {
                continue;
            };
            let a = factors[product.a.clone()].chunks_exact(x.len());
            let b = factors[product.b.clone()].chunks_exact(outputs);
            for (a, b) in a.zip(b) {
                axpy(isa, self.scale * dot(isa, a, x), b, y);
            }
        }
    }

    /// Adds to columns of one output row, of which `column` is the first, what `inner` makes: `scale · A x` of each
    /// product, `rank` numbers apart.
    fn add_columns(
        &self,
        isa: Isa,
        layer: usize,
        stack: Stack,
        (inner, rank): (&[f32], usize),
        column: usize,
        y: &mut [f32],
    ) {
        let factors = self.factors.as_f32();
        let last = column + y.len();
        let mut first = 0;
        for (&target, inner) in stack.targets().iter().zip(inner.chunks_exact(rank)) {
            let outputs = self.outputs[target as usize];
            let (from, to) = (column.max(first), last.min(first + outputs));
            if let Some(product) = &self.layers[layer][target as usize]
                && from < to
            {
                let y = &mut y[from - column..to - column];
                let b = factors[product.b.clone()].chunks_exact(outputs);
                for (b, inner) in b.zip(inner) {
                    axpy(isa, *inner, &b[from - first..to - first], y);
                }
            }
            first += outputs;
        }
    }
}

fn check_finite(name: &str, values: &[f32]) -> Result<(), LoadError> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(LoadError::NonFinite {
            name: name.to_owned(),
        }),
    }
}
