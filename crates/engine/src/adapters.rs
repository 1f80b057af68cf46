//! Low-rank adapters beside the weights of their base: `y += scale · B (A x)` for the rows of requests that asked for one.
//!
//! Factors are f32, and `x` is the row that enters the layer, before it is rounded or rotated for any arithmetic; `y` is
//! what the layer gave, wherever it was computed. So a layer behind [`crate::linear::LinearLayer`] knows nothing of
//! adapters, nothing is merged into weights, and rows without an adapter keep every bit. A row's sum depends on nothing
//! but the row, so neither does its answer on neighbours, threads or instruction set.
//!
//! Per product: A as its rank rows of inputs, and B transposed, as rank rows of outputs.

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

/// Below this many multiplications, waking the team costs more than it saves.
const WORTH_SHARING: usize = 1 << 15;

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

    /// Adds to the output rows `y` of a layer's stack what the adapters of `spans` make of its input rows `x`.
    pub(crate) fn apply(
        &self,
        team: &Team,
        spans: &[Adapted],
        layer: usize,
        stack: Stack,
        (x, inputs): (&[f32], usize),
        (y, outputs): (&mut [f32], usize),
    ) {
        for span in spans {
            let lora = &self.0[span.adapter.0];
            let rows = span.rows.len();
            let x = &x[span.rows.start * inputs..span.rows.end * inputs];
            let y = &mut y[span.rows.start * outputs..span.rows.end * outputs];
            let row = |i: usize, y: &mut [f32]| {
                lora.add(
                    team.isa(),
                    layer,
                    stack,
                    &x[i * inputs..(i + 1) * inputs],
                    y,
                );
            };
            if rows * lora.rank * (inputs + outputs) < WORTH_SHARING {
                y.chunks_exact_mut(outputs)
                    .enumerate()
                    .for_each(|(i, y)| row(i, y));
            } else {
                team.for_each_chunk_mut(y, outputs, row);
            }
        }
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
}

fn check_finite(name: &str, values: &[f32]) -> Result<(), LoadError> {
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(LoadError::NonFinite {
            name: name.to_owned(),
        }),
    }
}
