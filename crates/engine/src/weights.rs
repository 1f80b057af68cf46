//! From a verified container to weights in the form that kernels read. Every tensor that the
//! configuration implies must be there in exactly its shape, and none besides; each is converted by
//! the whole team and its source memory released at once, so that loading never needs two copies of
//! the model. What the weights compute is [`crate::model`]'s.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use casemate_container::{DType, Model as Container, ModelConfig, Progress, RopeScaling, Stage};
use casemate_kernels::attention::MAX_HEAD_DIM;
use casemate_kernels::gemm::F32Matrix;
use casemate_kernels::q8::{PackError, Q8Matrix};
use casemate_kernels::team::Team;

use crate::dequant::dequantise;
use crate::error::LoadError;
use crate::linear::{F32Linear, LinearLayer, Q8Linear};

/// The arithmetic of linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// Weights, activations and KV cache in f32.
    F32,
    /// Weights and activations in int8 with a scale per group of 32 (`Q8_0` weights exactly as they
    /// are, others rounded from f32), KV cache in f16.
    Int8,
}

impl Compute {
    /// Its name in keysets and receipts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Compute::F32 => "f32",
            Compute::Int8 => casemate_kernels::q8::NAME,
        }
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
    Q8(Arc<Q8Matrix>),
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
            Embedding::Q8(matrix) => matrix.row(token, out),
            Embedding::Sealed {
                container,
                dtype,
                row_bytes,
            } => {
                let table = container
                    .tensor(EMBEDDING)
                    .expect("it was there at load and is never released")
                    .bytes;
                dequantise(
                    *dtype,
                    &table[token * row_bytes..(token + 1) * row_bytes],
                    out,
                );
            }
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            // Counted with the output layer.
            Embedding::F32(_) | Embedding::Q8(_) => 0,
            Embedding::Sealed { container, .. } => container
                .tensor(EMBEDDING)
                .map_or(0, |t| t.bytes.len() as u64),
        }
    }
}

impl Weights {
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

const EMBEDDING: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Refuses configurations that contradict themselves or exceed what the kernels can do. Every later
/// product of two dimensions fits 64 bits.
pub(crate) fn check_config(c: &ModelConfig) -> Result<(), LoadError> {
    let require = |ok: bool, field, value: &dyn std::fmt::Display, rule| {
        if ok {
            Ok(())
        } else {
            Err(LoadError::Config {
                field,
                value: value.to_string(),
                rule,
            })
        }
    };
    let dimension = |field, value: u32, most: u32, rule| {
        require((1..=most).contains(&value), field, &value, rule)
    };
    dimension("hidden", c.hidden, 1 << 20, "it must be from 1 to 1048576")?;
    dimension("layers", c.layers, 4096, "it must be from 1 to 4096")?;
    dimension("heads", c.heads, 1 << 14, "it must be from 1 to 16384")?;
    dimension(
        "kv_heads",
        c.kv_heads,
        1 << 14,
        "it must be from 1 to 16384",
    )?;
    require(
        c.heads.is_multiple_of(c.kv_heads),
        "kv_heads",
        &c.kv_heads,
        "it must divide the number of heads",
    )?;
    dimension(
        "head_dim",
        c.head_dim,
        MAX_HEAD_DIM as u32,
        "it must be from 1 to 256",
    )?;
    require(
        c.head_dim.is_multiple_of(2),
        "head_dim",
        &c.head_dim,
        "RoPE turns pairs, so it must be even",
    )?;
    dimension("ffn", c.ffn, 1 << 22, "it must be from 1 to 4194304")?;
    dimension("vocab", c.vocab, 1 << 24, "it must be from 1 to 16777216")?;
    dimension(
        "context",
        c.context,
        1 << 24,
        "it must be from 1 to 16777216",
    )?;
    let positive = |x: f32| x.is_finite() && x > 0.0;
    require(
        positive(c.norm_eps),
        "norm_eps",
        &c.norm_eps,
        "it must be positive",
    )?;
    require(
        positive(c.rope_theta),
        "rope_theta",
        &c.rope_theta,
        "it must be positive",
    )?;
    require(
        c.sliding_window != Some(0),
        "sliding_window",
        &0,
        "a token sees at least itself",
    )?;
    match c.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => {
            require(
                positive(factor),
                "rope_scaling.factor",
                &factor,
                "it must be positive",
            )?;
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_context,
        } => {
            require(
                positive(factor),
                "rope_scaling.factor",
                &factor,
                "it must be positive",
            )?;
            require(
                positive(low),
                "rope_scaling.low_freq_factor",
                &low,
                "it must be positive",
            )?;
            let rule = "it must be larger than low_freq_factor";
            require(
                high.is_finite() && high > low,
                "rope_scaling.high_freq_factor",
                &high,
                rule,
            )?;
            dimension(
                "rope_scaling.original_context",
                original_context,
                1 << 24,
                "it must be from 1 to 16777216",
            )?;
        }
    }
    for id in c.eos.iter().chain(&c.bos) {
        require(
            *id < c.vocab,
            "bos or eos",
            id,
            "it must be a token id of the vocabulary",
        )?;
    }
    require(
        !c.add_bos || c.bos.is_some(),
        "add_bos",
        &true,
        "there must be a bos token to add",
    )
}

/// The tensors that a configuration implies, with their shapes.
fn expected_tensors(c: &ModelConfig) -> Vec<(String, Vec<u64>)> {
    let [hidden, ffn, vocab, head_dim] = [c.hidden, c.ffn, c.vocab, c.head_dim].map(u64::from);
    let (q, kv) = (
        u64::from(c.heads) * head_dim,
        u64::from(c.kv_heads) * head_dim,
    );
    let mut expected = vec![
        (EMBEDDING.to_owned(), vec![vocab, hidden]),
        ("output_norm.weight".to_owned(), vec![hidden]),
    ];
    if !c.tied_embeddings {
        expected.push((OUTPUT.to_owned(), vec![vocab, hidden]));
    }
    for layer in 0..c.layers {
        let mut add = |name: &str, shape: &[u64]| {
            expected.push((format!("blk.{layer}.{name}"), shape.to_vec()))
        };
        add("attn_norm.weight", &[hidden]);
        add("attn_q.weight", &[q, hidden]);
        add("attn_k.weight", &[kv, hidden]);
        add("attn_v.weight", &[kv, hidden]);
        if c.qkv_bias {
            add("attn_q.bias", &[q]);
            add("attn_k.bias", &[kv]);
            add("attn_v.bias", &[kv]);
        }
        add("attn_output.weight", &[hidden, q]);
        add("ffn_norm.weight", &[hidden]);
        add("ffn_gate.weight", &[ffn, hidden]);
        add("ffn_up.weight", &[ffn, hidden]);
        add("ffn_down.weight", &[hidden, ffn]);
    }
    expected
}

/// Compares the container's tensor table with what the configuration implies. `rope_freqs.weight`
/// may be there or not.
fn check_tensors(container: &Container, c: &ModelConfig) -> Result<(), LoadError> {
    let mut expected = expected_tensors(c);
    if container.tensor(ROPE_FACTORS).is_some() {
        // Both state the same thing; which of them the model was trained with is not for us to
        // guess.
        if matches!(c.rope_scaling, RopeScaling::Llama3 { .. }) {
            return Err(LoadError::UnknownTensor {
                name: ROPE_FACTORS.to_owned(),
            });
        }
        expected.push((ROPE_FACTORS.to_owned(), vec![u64::from(c.head_dim) / 2]));
    }
    for (name, shape) in &expected {
        let tensor = container
            .tensor(name)
            .ok_or_else(|| LoadError::MissingTensor { name: name.clone() })?;
        let entry = tensor.entry;
        if entry.shape != *shape {
            let (found, expected) = (entry.shape.clone(), shape.clone());
            return Err(LoadError::Shape {
                name: name.clone(),
                found,
                expected,
            });
        }
        let bytes = tensor.bytes.len() as u64;
        if entry.dtype.bytes_for(shape) != Some(bytes) {
            return Err(LoadError::Size {
                name: name.clone(),
                shape: shape.clone(),
                dtype: entry.dtype,
                bytes,
            });
        }
    }
    let names: std::collections::HashSet<&str> =
        expected.iter().map(|(name, _)| name.as_str()).collect();
    match container
        .manifest()
        .tensors()
        .iter()
        .find(|entry| !names.contains(entry.name.as_str()))
    {
        Some(entry) => Err(LoadError::UnknownTensor {
            name: entry.name.clone(),
        }),
        None => Ok(()),
    }
}

/// Converts all weights. `container` is emptied as far as possible.
pub(crate) fn load(
    mut container: Container,
    config: &ModelConfig,
    compute: Compute,
    team: &Team,
    progress: &dyn Progress,
) -> Result<Weights, LoadError> {
    check_tensors(&container, config)?;
    progress.begin(Stage::Convert, container.manifest().tensor_bytes());
    let mut loader = Loader {
        container: &mut container,
        compute,
        team,
        progress,
    };
    let rope_factors = loader.rope_factors()?;
    let layers = (0..config.layers)
        .map(|i| loader.layer(i, config.qkv_bias))
        .collect::<Result<_, _>>()?;
    let output_norm = loader.vector("output_norm.weight")?;
    let head = if config.tied_embeddings {
        loader.matrix(&[EMBEDDING])?
    } else {
        let head = loader.matrix(&[OUTPUT])?;
        loader.done(OUTPUT);
        head
    };
    let sealed = loader.tensor(EMBEDDING);
    let (dtype, row_bytes) = (sealed.dtype, sealed.bytes.len() / sealed.rows);
    progress.advance(sealed.bytes.len() as u64);
    let tied = config.tied_embeddings;
    let embedding = match &head {
        Matrix::F32(matrix) if tied => Embedding::F32(Arc::clone(matrix)),
        // From 4-bit encodings int8 would lose something and save nothing.
        Matrix::Q8(matrix)
            if tied && matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0) =>
        {
            Embedding::Q8(Arc::clone(matrix))
        }
        _ => {
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
        output: head.into_layer(),
        rope_factors,
    })
}

/// A converted matrix.
enum Matrix {
    F32(Arc<F32Matrix>),
    Q8(Arc<Q8Matrix>),
}

impl Matrix {
    fn into_layer(self) -> Box<dyn LinearLayer> {
        match self {
            Matrix::F32(matrix) => Box::new(F32Linear(matrix)),
            Matrix::Q8(matrix) => Box::new(Q8Linear(matrix)),
        }
    }
}

struct Loader<'a> {
    container: &'a mut Container,
    compute: Compute,
    team: &'a Team,
    progress: &'a dyn Progress,
}

/// A tensor of the container.
#[derive(Clone, Copy)]
struct Source<'a> {
    dtype: DType,
    rows: usize,
    columns: usize,
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.bytes.len() / self.rows;
        &self.bytes[row * bytes..(row + 1) * bytes]
    }
}

impl Loader<'_> {
    fn layer(&mut self, index: u32, qkv_bias: bool) -> Result<Layer, LoadError> {
        let name = |rest: &str| format!("blk.{index}.{rest}");
        let names = |rest: &[&str]| rest.iter().map(|r| name(r)).collect::<Vec<_>>();
        let mut qkv_biases = None;
        if qkv_bias {
            let mut bias = self.vector(&name("attn_q.bias"))?;
            bias.extend(self.vector(&name("attn_k.bias"))?);
            bias.extend(self.vector(&name("attn_v.bias"))?);
            qkv_biases = Some(bias);
        }
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm.weight"))?,
            qkv: self.linear(&names(&["attn_q.weight", "attn_k.weight", "attn_v.weight"]))?,
            qkv_bias: qkv_biases,
            attention_output: self.linear(&names(&["attn_output.weight"]))?,
            ffn_norm: self.vector(&name("ffn_norm.weight"))?,
            gate_up: self.linear(&names(&["ffn_gate.weight", "ffn_up.weight"]))?,
            down: self.linear(&names(&["ffn_down.weight"]))?,
        })
    }

    /// A tensor that [`check_tensors`] has found.
    fn tensor(&self, name: &str) -> Source<'_> {
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

    fn linear(&mut self, names: &[String]) -> Result<Box<dyn LinearLayer>, LoadError> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let matrix = self.matrix(&names)?;
        names.iter().for_each(|name| self.done(name));
        Ok(matrix.into_layer())
    }

    /// Stacks matrices of one width by rows and packs them. Their sources stay.
    fn matrix(&self, names: &[&str]) -> Result<Matrix, LoadError> {
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
        match self.compute {
            Compute::F32 => {
                let matrix =
                    F32Matrix::from_rows(self.team, rows, columns, fill).map_err(refused)?;
                if finite.load(Ordering::Relaxed) {
                    Ok(Matrix::F32(Arc::new(matrix)))
                } else {
                    Err(LoadError::NonFinite {
                        name: names.join(", "),
                    })
                }
            }
            Compute::Int8 if parts.iter().all(|p| p.dtype == DType::Q8_0) => {
                let row = |row: usize| {
                    let (part, row, _) = locate(row);
                    part.row(row)
                };
                Ok(Matrix::Q8(Arc::new(
                    Q8Matrix::from_q8_0(self.team, rows, columns, row).map_err(refused)?,
                )))
            }
            Compute::Int8 => Ok(Matrix::Q8(Arc::new(
                Q8Matrix::from_rows(self.team, rows, columns, fill).map_err(refused)?,
            ))),
        }
    }

    /// A whole tensor in f32.
    fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
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

    fn rope_factors(&mut self) -> Result<Option<Vec<f32>>, LoadError> {
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

    fn check_finite(&self, name: &str) -> Result<(), LoadError> {
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
    fn done(&mut self, name: &str) {
        self.progress.advance(self.tensor(name).bytes.len() as u64);
        self.container.release(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_container::{Family, RopeLayout};

    fn config() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: 64,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            vocab: 300,
            context: 512,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Half,
            sliding_window: None,
            tied_embeddings: false,
            qkv_bias: false,
            bos: Some(1),
            eos: vec![2],
            add_bos: true,
        }
    }

    #[test]
    fn refuses_contradictory_configurations() {
        let llama3 =
            |factor, low_freq_factor, high_freq_factor, original_context| RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            };
        check_config(&config()).unwrap();
        check_config(&ModelConfig {
            rope_scaling: llama3(8.0, 1.0, 4.0, 8192),
            ..config()
        })
        .unwrap();
        type Change = fn(&mut ModelConfig);
        let changes: [(&str, Change); 17] = [
            ("hidden", |c| c.hidden = 0),
            ("layers", |c| c.layers = 4097),
            ("heads", |c| c.heads = 0),
            ("kv_heads", |c| c.kv_heads = 0),
            ("kv_heads", |c| c.kv_heads = 3),
            ("head_dim", |c| c.head_dim = 15),
            ("head_dim", |c| c.head_dim = 258),
            ("ffn", |c| c.ffn = 0),
            ("vocab", |c| c.vocab = 0),
            ("context", |c| c.context = 0),
            ("norm_eps", |c| c.norm_eps = f32::NAN),
            ("rope_theta", |c| c.rope_theta = 0.0),
            ("sliding_window", |c| c.sliding_window = Some(0)),
            ("rope_scaling.factor", |c| {
                c.rope_scaling = RopeScaling::Linear { factor: 0.0 }
            }),
            ("bos or eos", |c| c.eos = vec![2, 300]),
            ("bos or eos", |c| c.bos = Some(300)),
            ("add_bos", |c| c.bos = None),
        ];
        for (expected, change) in changes {
            let mut config = config();
            change(&mut config);
            match check_config(&config) {
                Err(LoadError::Config { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        for (scaling, expected) in [
            (llama3(f32::INFINITY, 1.0, 4.0, 8192), "rope_scaling.factor"),
            (llama3(8.0, 0.0, 4.0, 8192), "rope_scaling.low_freq_factor"),
            (llama3(8.0, 1.0, 1.0, 8192), "rope_scaling.high_freq_factor"),
            (llama3(8.0, 1.0, 4.0, 0), "rope_scaling.original_context"),
        ] {
            let checked = check_config(&ModelConfig {
                rope_scaling: scaling,
                ..config()
            });
            assert!(matches!(checked, Err(LoadError::Config { field, .. }) if field == expected));
        }
    }
}
