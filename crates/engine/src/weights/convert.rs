//! Tensors as they were sealed to matrices as kernels read them, all in one region, so that small
//! matrices share huge pages.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use casemate_container::{Access, DType, Model as Container, ModelConfig, Progress, Target};
use casemate_kernels::gemm::F32Matrix;
use casemate_kernels::mem::{Extent, Purpose, Region};
use casemate_kernels::panels::{Bf16Matrix, Int8Matrix};
use casemate_kernels::q4::{Encoding, Q4Matrix};
use casemate_kernels::q8::{PackError, Q8Matrix};
use casemate_kernels::rotate::Rotation;
use casemate_kernels::team::Team;

use super::tensors::{EMBEDDING, OUTPUT, ROPE_FACTORS};
use super::{Compute, Layer};
use crate::dequant::dequantise;
use crate::error::LoadError;
use crate::linear::{Bf16Linear, F32Linear, GroupLinear, GroupMatrix, LinearLayer};
use crate::outsource::{ExactLayer, Outsource, Place, Stack};

/// A converted stack.
pub(super) enum Matrix {
    F32(Arc<F32Matrix>),
    Bf16(Arc<Bf16Matrix>),
    /// Stacked, at least one.
    Groups(Vec<GroupMatrix>),
    Int8Row(ExactLayer),
}

impl Matrix {
    fn into_layer(self) -> Box<dyn LinearLayer> {
        match self {
            Matrix::F32(matrix) => Box::new(F32Linear(matrix)),
            Matrix::Bf16(matrix) => Box::new(Bf16Linear(matrix)),
            Matrix::Groups(parts) => Box::new(GroupLinear::new(parts)),
            Matrix::Int8Row(layer) => Box::new(layer),
        }
    }
}

/// How weights lie in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    F32,
    Bf16,
    Q8,
    Q4(Encoding),
    Int8Row,
}

impl Form {
    /// What an arithmetic makes of an encoding.
    fn of(compute: Compute, dtype: DType) -> Form {
        match compute {
            Compute::F32 => Form::F32,
            Compute::Bf16 => Form::Bf16,
            Compute::Int8 => Form::Q8,
            Compute::Int8Row => Form::Int8Row,
            Compute::Q4G32 => four_bits(dtype).map_or(Form::Q8, Form::Q4),
        }
    }

    /// Bytes of a packed matrix, in whole pages.
    fn packed_bytes(self, rows: usize, columns: usize) -> Option<usize> {
        match self {
            Form::F32 => F32Matrix::packed_bytes(rows, columns),
            Form::Bf16 => Bf16Matrix::packed_bytes(rows, columns),
            Form::Q8 => Q8Matrix::packed_bytes(rows, columns),
            Form::Q4(encoding) => Q4Matrix::packed_bytes(encoding, rows, columns),
            Form::Int8Row => Int8Matrix::packed_bytes(rows, columns),
        }
    }
}

/// The encodings of 4 bits that kernels read as they are.
pub(super) fn four_bits(dtype: DType) -> Option<Encoding> {
    match dtype {
        DType::Q4_0 => Some(Encoding::Q4_0),
        DType::Q4_1 => Some(Encoding::Q4_1),
        DType::Q4_K => Some(Encoding::Q4K),
        _ => None,
    }
}

/// The names of a block's tensors that are stacked.
fn in_layer(index: u32, stack: Stack) -> Vec<String> {
    let full = |target: &Target| format!("blk.{index}.{}.weight", target.name());
    stack.targets().iter().map(full).collect()
}

/// The names of all tensors that become matrices, stack by stack, in the order of their conversion.
fn stacks(config: &ModelConfig) -> impl Iterator<Item = Vec<String>> {
    let layers =
        (0..config.layers).flat_map(|index| Stack::OF_A_BLOCK.map(|stack| in_layer(index, stack)));
    let head = if config.tied_embeddings {
        EMBEDDING
    } else {
        OUTPUT
    };
    layers.chain([vec![head.to_owned()]])
}

/// Takes tensors of a checked container and turns them into matrices.
pub(super) struct Loader<'a> {
    container: &'a mut Container,
    compute: Compute,
    team: &'a Team,
    progress: &'a dyn Progress,
    outsource: Option<&'a dyn Outsource>,
    /// What is left of the memory for all matrices. Its pages come into being as they are written,
    /// so that reserving it costs nothing while the sources are still there.
    arena: Region,
    /// By width.
    rotations: HashMap<usize, Arc<Rotation>>,
}

/// A tensor of the container.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    columns: usize,
    pub(super) bytes: &'a [u8],
}

impl<'a> Source<'a> {
    fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.bytes.len() / self.rows;
        &self.bytes[row * bytes..(row + 1) * bytes]
    }
}

impl<'a> Loader<'a> {
    /// `container` has passed [`check_tensors`](super::tensors::check_tensors) for `config`.
    pub(super) fn new(
        container: &'a mut Container,
        config: &ModelConfig,
        compute: Compute,
        team: &'a Team,
        progress: &'a dyn Progress,
        outsource: Option<&'a dyn Outsource>,
    ) -> Result<Self, LoadError> {
        let mut loader = Loader {
            container,
            compute,
            team,
            progress,
            outsource,
            arena: Region::default(),
            rotations: HashMap::new(),
        };
        let bytes = stacks(config)
            .try_fold(0usize, |sum, names| {
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let runs = loader.runs(&names);
                runs.into_iter().try_fold(sum, |sum, (form, names)| {
                    let rows = names.iter().map(|name| loader.tensor(name).rows).sum();
                    let columns = loader.tensor(names[0]).columns;
                    sum.checked_add(form.packed_bytes(rows, columns)?)
                })
            })
            .ok_or(io::ErrorKind::OutOfMemory)
            .map_err(io::Error::from)?;
        loader.arena = Region::zeroed(bytes, Purpose::Weights)?;
        Ok(loader)
    }

    /// Where all matrices will lie. Complete only before the first is made.
    pub(super) fn extent(&self) -> Extent {
        self.arena.extent()
    }

    pub(super) fn layer(&mut self, index: u32, qkv_bias: bool) -> Result<Layer, LoadError> {
        let name = |rest: &str| format!("blk.{index}.{rest}");
        let mut qkv_biases = None;
        if qkv_bias {
            let mut bias = self.vector(&name("attn_q.bias"))?;
            bias.extend(self.vector(&name("attn_k.bias"))?);
            bias.extend(self.vector(&name("attn_v.bias"))?);
            qkv_biases = Some(bias);
        }
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm.weight"))?,
            qkv: self.linear(index, Stack::Qkv)?,
            qkv_bias: qkv_biases,
            attention_output: self.linear(index, Stack::AttentionOutput)?,
            ffn_norm: self.vector(&name("ffn_norm.weight"))?,
            gate_up: self.linear(index, Stack::GateUp)?,
            down: self.linear(index, Stack::Down)?,
        })
    }

    /// A tensor that is there, as the table was checked.
    pub(super) fn tensor(&self, name: &str) -> Source<'_> {
        let tensor = self
            .container
            .tensor(name)
            .expect("the table was checked and nothing is read twice");
        let shape = &tensor.entry.shape;
        let columns = shape[shape.len() - 1] as usize;
        let rows = shape[..shape.len() - 1].iter().product::<u64>() as usize;
        Source {
            dtype: tensor.entry.dtype,
            rows,
            columns,
            bytes: tensor.bytes,
        }
    }

    fn linear(&mut self, layer: u32, stack: Stack) -> Result<Box<dyn LinearLayer>, LoadError> {
        let names = in_layer(layer, stack);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let matrix = self.matrix(&names)?;
        let place = Place {
            layer: Some(layer),
            stack,
        };
        let linear = self.placed(place, &names, matrix);
        names.iter().for_each(|name| self.done(name));
        Ok(linear)
    }

    /// The layer that a converted stack of these tensors becomes, by whomever it is computed. The
    /// tensors are still there.
    pub(super) fn placed(
        &self,
        place: Place,
        names: &[&str],
        matrix: Matrix,
    ) -> Box<dyn LinearLayer> {
        match (matrix, self.outsource) {
            (Matrix::Int8Row(exact), Some(outsource)) => {
                outsource.layer(place, self.access(names), exact)
            }
            (matrix, _) => matrix.into_layer(),
        }
    }

    /// Public if all of the tensors are.
    fn access(&self, names: &[&str]) -> Access {
        let public = |name: &&str| {
            let tensor = self.container.tensor(name);
            tensor.is_some_and(|tensor| tensor.entry.access == Access::Public)
        };
        if names.iter().all(public) {
            Access::Public
        } else {
            Access::Private
        }
    }

    /// Tensors of a stack that follow each other and take one form.
    fn runs<'n>(&self, names: &'n [&'n str]) -> Vec<(Form, &'n [&'n str])> {
        let form = |name: &str| Form::of(self.compute, self.tensor(name).dtype);
        names
            .chunk_by(|a, b| form(a) == form(b))
            .map(|run| (form(run[0]), run))
            .collect()
    }

    /// Stacks matrices of one width by rows and packs them. Their sources stay.
    pub(super) fn matrix(&mut self, names: &[&str]) -> Result<Matrix, LoadError> {
        let mut arena = std::mem::take(&mut self.arena);
        let width = self.tensor(names[0]).columns;
        let rotation = self.rotations.entry(width);
        let rotation = Arc::clone(rotation.or_insert_with(|| Arc::new(Rotation::new(width))));
        let runs = self.runs(names).into_iter();
        let matrices = runs.map(|(form, run)| self.matrix_in(&mut arena, &rotation, form, run));
        let stacked = matrices.reduce(|stack, next| match (stack?, next?) {
            (Matrix::Groups(mut stack), Matrix::Groups(next)) => {
                stack.extend(next);
                Ok(Matrix::Groups(stack))
            }
            _ => unreachable!("only arithmetic in groups has several forms"),
        });
        self.arena = arena;
        stacked.expect("a stack has at least one tensor")
    }

    fn matrix_in(
        &self,
        arena: &mut Region,
        rotation: &Arc<Rotation>,
        form: Form,
        names: &[&str],
    ) -> Result<Matrix, LoadError> {
        let parts: Vec<Source<'_>> = names.iter().map(|name| self.tensor(name)).collect();
        let columns = parts[0].columns;
        let rows = parts.iter().map(|p| p.rows).sum();
        // The part that a row of the stack lies in, and its row there.
        let locate = |mut row: usize| {
            for (part, name) in parts.iter().zip(names) {
                if row < part.rows {
                    return (part, row, *name);
                }
                row -= part.rows;
            }
            unreachable!("the stack has as many rows as its parts")
        };
        let finite = AtomicBool::new(true);
        let fill = |row: usize, out: &mut [f32]| {
            let (part, row, _) = locate(row);
            dequantise(part.dtype, part.row(row), out);
            if !out.iter().all(|x| x.is_finite()) {
                finite.store(false, Ordering::Relaxed);
            }
        };
        let refused = |error| match error {
            PackError::NotFinite { row } | PackError::ScaleOverflow { row } => {
                LoadError::NonFinite {
                    name: locate(row).2.to_owned(),
                }
            }
            PackError::Memory(error) => LoadError::System(error),
            // The configuration's limits exclude the others, as far as memory that exists can be.
            _ => LoadError::System(std::io::ErrorKind::OutOfMemory.into()),
        };
        let sealed = |row: usize| {
            let (part, row, _) = locate(row);
            part.row(row)
        };
        let team = self.team;
        match form {
            Form::F32 => {
                let matrix = F32Matrix::from_rows_in(arena, team, rows, columns, fill);
                let matrix = matrix.map_err(refused)?;
                if finite.load(Ordering::Relaxed) {
                    Ok(Matrix::F32(Arc::new(matrix)))
                } else {
                    Err(LoadError::NonFinite {
                        name: names.join(", "),
                    })
                }
            }
            Form::Bf16 => {
                let matrix = Bf16Matrix::from_rows_in(arena, team, rows, columns, fill);
                Ok(Matrix::Bf16(Arc::new(matrix.map_err(refused)?)))
            }
            Form::Q8 => {
                let matrix = if parts.iter().all(|p| p.dtype == DType::Q8_0) {
                    Q8Matrix::from_q8_0_in(arena, team, rows, columns, sealed)
                } else {
                    Q8Matrix::from_rows_in(arena, team, rows, columns, fill)
                };
                let matrix = Arc::new(matrix.map_err(refused)?);
                Ok(Matrix::Groups(vec![GroupMatrix::Q8(matrix)]))
            }
            Form::Q4(encoding) => {
                let shape = (rows, columns);
                let matrix = Q4Matrix::from_blocks_in(arena, team, encoding, shape, sealed);
                let matrix = Arc::new(matrix.map_err(refused)?);
                Ok(Matrix::Groups(vec![GroupMatrix::Q4(matrix)]))
            }
            Form::Int8Row => {
                let rotated = |row: usize, out: &mut [f32]| {
                    fill(row, out);
                    rotation.apply(team.isa(), out);
                };
                let weights = Int8Matrix::from_rows_in(arena, team, rows, columns, rotated);
                let layer = ExactLayer::new(weights.map_err(refused)?, Arc::clone(rotation));
                Ok(Matrix::Int8Row(layer))
            }
        }
    }

    /// A whole tensor in f32.
    pub(super) fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        let source = self.tensor(name);
        let mut out = vec![0.0; source.rows * source.columns];
        dequantise(source.dtype, source.bytes, &mut out);
        if !out.iter().all(|x| x.is_finite()) {
            return Err(LoadError::NonFinite {
                name: name.to_owned(),
            });
        }
        self.done(name);
        Ok(out)
    }

    pub(super) fn rope_factors(&mut self) -> Result<Option<Vec<f32>>, LoadError> {
        if self.container.tensor(ROPE_FACTORS).is_none() {
            return Ok(None);
        }
        let factors = self.vector(ROPE_FACTORS)?;
        match factors.iter().find(|&&f| f <= 0.0) {
            Some(f) => Err(LoadError::Config {
                field: ROPE_FACTORS,
                value: f.to_string(),
                rule: "each factor must be positive",
            }),
            None => Ok(Some(factors)),
        }
    }

    pub(super) fn check_finite(&self, name: &str) -> Result<(), LoadError> {
        let source = self.tensor(name);
        let finite = AtomicBool::new(true);
        self.team.run(|member, members| {
            let mut row = vec![0.0; source.columns];
            for i in (member..source.rows).step_by(members) {
                dequantise(source.dtype, source.row(i), &mut row);
                if !row.iter().all(|x| x.is_finite()) {
                    finite.store(false, Ordering::Relaxed);
                }
            }
        });
        if finite.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(LoadError::NonFinite {
                name: name.to_owned(),
            })
        }
    }

    /// The tensor is converted: its memory goes back.
    pub(super) fn done(&mut self, name: &str) {
        self.progress.advance(self.tensor(name).bytes.len() as u64);
        self.container.release(name);
    }
}
