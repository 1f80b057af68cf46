//! From a verified container to weights in the form that kernels read. Every tensor that the
//! configuration implies must be there in exactly its shape, and none besides; each is converted by
//! the whole team and its source memory released at once, so that loading never needs two copies of
//! the model. What the weights compute is [`crate::model`]'s.

mod config;
mod convert;
mod tensors;

use std::io;
use std::sync::Arc;

use casemate_container::{DType, Model as Container, ModelConfig, Progress, Stage};
use casemate_kernels::gemm::F32Matrix;
use casemate_kernels::mem::Granted;
use casemate_kernels::oblivious::{AT_ONCE, Found};
use casemate_kernels::panels::Bf16Matrix;
use casemate_kernels::q4::Q4Matrix;
use casemate_kernels::q8::Q8Matrix;
use casemate_kernels::team::Team;

use crate::dequant::dequantise;
use crate::error::LoadError;
use crate::linear::{GroupMatrix, LinearLayer};
use crate::outsource::{Outsource, Place, Stack};
pub(crate) use config::check_config;
use config::check_widths;
use convert::{Loader, Matrix};
use tensors::{EMBEDDING, OUTPUT, check_tensors};

/// The arithmetic of linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// Weights, activations and KV cache in f32.
    F32,
    /// Weights and activations rounded to bf16, sums in f32; KV cache in bf16.
    Bf16,
    /// Weights and activations in int8 with a scale per group of 32 (`Q8_0` weights exactly as they
    /// are, others rounded from f32), KV cache in f16.
    Int8,
    /// Weights of 4 bits exactly as they are (`Q4_0`, `Q4_1`, `Q4_K`), the matrices that have none as
    /// [`Compute::Int8`] has them; activations as there, KV cache in f16.
    Q4G32,
    /// Weights and activations in int8 with a scale per row, both rotated, rounded from f32
    /// whatever they were; KV cache in bf16.
    Int8Row,
}

impl Compute {
    /// Every arithmetic there is.
    pub const ALL: &[Compute] = &[
        Compute::F32,
        Compute::Bf16,
        Compute::Int8,
        Compute::Int8Row,
        Compute::Q4G32,
    ];

    /// Its name in keysets and receipts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Compute::F32 => "f32",
            Compute::Bf16 => casemate_kernels::panels::BF16_NAME,
            Compute::Int8 => casemate_kernels::q8::NAME,
            Compute::Q4G32 => casemate_kernels::q4::NAME,
            Compute::Int8Row => casemate_kernels::panels::NAME,
        }
    }
}

impl Compute {
    /// Whether it is for models whose tensors are encoded so: 4-bit arithmetic wants some of 4 bits.
    #[must_use]
    pub fn suits(self, mut encodings: impl Iterator<Item = DType>) -> bool {
        self != Compute::Q4G32 || encodings.any(|dtype| convert::four_bits(dtype).is_some())
    }
}

/// All weights of a model.
pub(crate) struct Weights {
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<Layer>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) output: Box<dyn LinearLayer>,
    /// Divisors of the RoPE frequencies.
    pub(crate) rope_factors: Option<Vec<f32>>,
    /// What the kernel made of the memory of all matrices, if it says.
    pub(crate) memory: Option<Granted>,
}

/// One block.
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    /// Q, K and V.
    pub(crate) qkv: Box<dyn LinearLayer>,
    pub(crate) qkv_bias: Option<Vec<f32>>,
    pub(crate) attention_output: Box<dyn LinearLayer>,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate_up: Box<dyn LinearLayer>,
    pub(crate) down: Box<dyn LinearLayer>,
}

/// Where the rows of the embedding table come from.
pub(crate) enum Embedding {
    /// The tied output layer's own weights.
    F32(Arc<F32Matrix>),
    /// The tied output layer's own weights.
    Bf16(Arc<Bf16Matrix>),
    /// The tied output layer's own weights.
    Q8(Arc<Q8Matrix>),
    /// The tied output layer's own weights.
    Q4(Arc<Q4Matrix>),
    /// The tensor as it was sealed, one row converted at a time. The container holds nothing else
    /// any more.
    Sealed {
        container: Box<Container>,
        dtype: DType,
        row_bytes: usize,
    },
}

impl Embedding {
    /// Writes a token's row.
    ///
    /// # Panics
    /// If there is no such row.
    pub(crate) fn row(&self, token: usize, out: &mut [f32]) {
        match self {
            Embedding::F32(matrix) => matrix.row(token, out),
            Embedding::Bf16(matrix) => matrix.row(token, out),
            Embedding::Q8(matrix) => matrix.row(token, out),
            Embedding::Q4(matrix) => matrix.row(token, out),
            Embedding::Sealed {
                container,
                dtype,
                row_bytes,
            } => {
                let row = &sealed(container)[token * row_bytes..(token + 1) * row_bytes];
                dequantise(*dtype, row, out);
            }
        }
    }

    /// What finds rows.
    pub(crate) fn found(&self) -> io::Result<Found> {
        match self {
            Embedding::F32(matrix) => matrix.found(),
            Embedding::Bf16(matrix) => matrix.found(),
            Embedding::Q8(matrix) => matrix.found(),
            Embedding::Q4(matrix) => matrix.found(),
            Embedding::Sealed { row_bytes, .. } => Found::of_bytes(*row_bytes),
        }
    }

    /// Writes the rows of tokens, reading the whole table, so that who sees what is read does not learn which.
    ///
    /// # Panics
    /// If `out` is not a row for each token.
    pub(crate) fn find_rows(&self, team: &Team, found: &mut Found, ids: &[u32], out: &mut [f32]) {
        match self {
            Embedding::F32(matrix) => matrix.find_rows(team, found, ids, out),
            Embedding::Bf16(matrix) => matrix.find_rows(team, found, ids, out),
            Embedding::Q8(matrix) => matrix.find_rows(team, found, ids, out),
            Embedding::Q4(matrix) => matrix.find_rows(team, found, ids, out),
            Embedding::Sealed {
                container,
                dtype,
                row_bytes,
            } => {
                let table = sealed(container);
                let width = out.len() / ids.len().max(1);
                for (ids, out) in ids.chunks(AT_ONCE).zip(out.chunks_mut(AT_ONCE * width)) {
                    let found = found.rows_of_bytes(team, table, *row_bytes, ids);
                    team.for_each_chunk_mut(out, width, |i, out| {
                        dequantise(*dtype, found.row(i), out);
                    });
                }
            }
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            // Counted with the output layer.
            Embedding::F32(_) | Embedding::Bf16(_) | Embedding::Q8(_) | Embedding::Q4(_) => 0,
            Embedding::Sealed { container, .. } => container
                .tensor(EMBEDDING)
                .map_or(0, |t| t.bytes.len() as u64),
        }
    }
}

fn sealed(container: &Container) -> &[u8] {
    let table = container.tensor(EMBEDDING);
    table
        .expect("it was there at load and is never released")
        .bytes
}

impl Weights {
    /// Bytes of the embedding table, whoever else has it.
    pub(crate) fn embedding_bytes(&self) -> u64 {
        match &self.embedding {
            Embedding::F32(matrix) => matrix.bytes() as u64,
            Embedding::Bf16(matrix) => matrix.bytes() as u64,
            Embedding::Q8(matrix) => matrix.bytes() as u64,
            Embedding::Q4(matrix) => matrix.bytes() as u64,
            Embedding::Sealed { .. } => self.embedding.bytes(),
        }
    }

    /// Bytes of all matrices.
    pub(crate) fn bytes(&self) -> u64 {
        self.embedding.bytes() + self.bytes_per_pass()
    }

    /// Bytes of the matrices that every forward pass reads as a whole.
    pub(crate) fn bytes_per_pass(&self) -> u64 {
        let layer = |l: &Layer| {
            l.qkv.bytes() + l.attention_output.bytes() + l.gate_up.bytes() + l.down.bytes()
        };
        self.output.bytes() + self.layers.iter().map(layer).sum::<u64>()
    }
}

/// Converts all weights. `container` is emptied as far as possible.
pub(crate) fn load(
    mut container: Container,
    config: &ModelConfig,
    compute: Compute,
    team: &Team,
    progress: &dyn Progress,
    outsource: Option<&dyn Outsource>,
) -> Result<Weights, LoadError> {
    check_widths(config, compute)?;
    check_tensors(&container, config)?;
    if !compute.suits(container.manifest().tensors().iter().map(|t| t.dtype)) {
        return Err(LoadError::NoFourBits);
    }
    progress.begin(Stage::Convert, container.manifest().tensor_bytes());
    let mut loader = Loader::new(&mut container, config, compute, team, progress, outsource)?;
    let extent = loader.extent();
    let rope_factors = loader.rope_factors()?;
    let layers = (0..config.layers)
        .map(|i| loader.layer(i, config.qkv_bias))
        .collect::<Result<_, _>>()?;
    let output_norm = loader.vector("output_norm.weight")?;
    let head_name = if config.tied_embeddings {
        EMBEDDING
    } else {
        OUTPUT
    };
    let head = loader.matrix(&[head_name])?;
    let sealed = loader.tensor(EMBEDDING);
    let (dtype, row_bytes) = (sealed.dtype, sealed.bytes.len() / sealed.rows);
    progress.advance(sealed.bytes.len() as u64);
    let tied = config.tied_embeddings;
    let plain = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    let shared = match &head {
        _ if !tied => None,
        Matrix::F32(matrix) => Some(Embedding::F32(Arc::clone(matrix))),
        // Of 4-bit and 8-bit encodings the sealed table is smaller and exact.
        Matrix::Bf16(matrix) if plain => Some(Embedding::Bf16(Arc::clone(matrix))),
        Matrix::Groups(parts) => match &parts[..] {
            // From 4-bit encodings int8 would lose something and save nothing.
            [GroupMatrix::Q8(matrix)] if plain || dtype == DType::Q8_0 => {
                Some(Embedding::Q8(Arc::clone(matrix)))
            }
            [GroupMatrix::Q4(matrix)] => Some(Embedding::Q4(Arc::clone(matrix))),
            _ => None,
        },
        _ => None,
    };
    let place = Place {
        layer: None,
        stack: Stack::Head,
    };
    let output = loader.placed(place, &[head_name], head);
    if !tied {
        loader.done(OUTPUT);
    }
    let embedding = match shared {
        Some(embedding) => embedding,
        None => {
            loader.check_finite(EMBEDDING)?;
            Embedding::Sealed {
                container: Box::new(container),
                dtype,
                row_bytes,
            }
        }
    };
    progress.end();
    Ok(Weights {
        embedding,
        layers,
        output_norm,
        output,
        rope_factors,
        // A system without /proc tells nothing, which is no reason not to serve.
        memory: extent.granted().ok(),
    })
}
