//! The model under attack: run in f32 for reference, and taken apart for the attackers that know some of it.

use std::fs;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use anyhow::{Context, Result, bail};
use casemate_audit::transcript::{Stack, mask};
use casemate_container::signing::SigningKey;
use casemate_container::{
    DataKey, ModelConfig, ModelSource, RopeLayout, RopeScaling, SealOptions, SealedFile, Silent,
    seal,
};
use casemate_enclave::api::Api;
use casemate_engine::outsource::Outsource;
use casemate_engine::{Compute, Engine, EngineOptions, Event, Request, Tokenizer};
use casemate_field::Field;
use casemate_testkit::{gguf, llama2c};
use serde::Serialize;

use crate::exit::Usage;
use crate::metrics::log_softmax;
use crate::run::OFFLOADED;

/// The name under which it is asked.
pub(crate) const NAME: &str = "victim";
/// Answers at the same time.
pub(crate) const BATCH: usize = 8;

/// The model, and all that is known of it.
pub(crate) struct Victim {
    /// The enclave's API over its engine, which shows nothing until a policy says so.
    pub(crate) api: Api,
    source: Box<dyn ModelSource>,
    /// Holds what `source` may read from.
    _folder: tempfile::TempDir,
}

/// Where a tensor lies in a file of f32.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Placed {
    pub(crate) name: String,
    shape: Vec<u64>,
    /// In bytes.
    offset: u64,
}

/// What a student is told of the architecture, under the names of its script.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Architecture {
    hidden: u32,
    layers: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    ffn: u32,
    vocab: u32,
    norm_eps: f32,
    rope_theta: f32,
    /// Whether pairs of RoPE are neighbours.
    interleaved: bool,
    tied: bool,
    bias: bool,
}

impl Victim {
    /// Opens a GGUF file, a Hugging Face directory, or a checkpoint of llama2.c with `tok512.bin` beside it.
    pub(crate) fn open(path: &Path, context: usize, threads: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let source = source(path, folder.path())?;
        check(source.config()).map_err(Usage)?;
        let sealed = folder.path().join("victim.casemate");
        let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
        let sealing = SealOptions {
            version: 1,
            threads,
            ..SealOptions::default()
        };
        seal(&*source, &sealing, &data_key, &provider, &sealed, &Silent)?;
        let model = SealedFile::open(&sealed)?
            .unlock(&data_key, &provider.verifying_key())?
            .load(threads, &Silent)?;
        fs::remove_file(&sealed)?;
        let options = EngineOptions {
            compute: Compute::F32,
            threads,
            max_context: context,
            max_batch: BATCH,
            ..EngineOptions::default()
        };
        let engine = Engine::load(model, &options, &Silent)?;
        Ok(Self {
            api: Api::new(engine, NAME.into(), "fp_audit".into(), || 0),
            source,
            _folder: folder,
        })
    }

    /// The model as an enclave has it that sends products out: in int8 by rows, of which a worker may have the matrices of
    /// layers.
    pub(crate) fn exact(&self, threads: usize, outsource: Arc<dyn Outsource>) -> Result<Engine> {
        let folder = tempfile::tempdir()?;
        let sealed = folder.path().join("exact.casemate");
        let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
        let sealing = SealOptions {
            version: 1,
            public_tensors: OFFLOADED.map(|end| format!("*.{end}")).to_vec(),
            threads,
            ..SealOptions::default()
        };
        seal(
            &*self.source,
            &sealing,
            &data_key,
            &provider,
            &sealed,
            &Silent,
        )?;
        let model = SealedFile::open(&sealed)?
            .unlock(&data_key, &provider.verifying_key())?
            .load(threads, &Silent)?;
        let options = EngineOptions {
            compute: Compute::Int8Row,
            threads,
            max_context: self.context(),
            ..EngineOptions::default()
        };
        Ok(Engine::load_with(
            model,
            Vec::new(),
            &options,
            Some(outsource),
            &Silent,
        )?)
    }

    /// Bytes of the masks of one token: 4 for each output of each product of the layers.
    pub(crate) fn bytes_of_masks(&self) -> u64 {
        let matrices = self.source.tensors().iter();
        let matrices =
            matrices.filter(|tensor| OFFLOADED.iter().any(|end| tensor.name.ends_with(end)));
        matrices.map(|tensor| 4 * tensor.shape[0]).sum()
    }

    fn engine(&self) -> &Engine {
        self.api.engine()
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        self.engine().tokenizer()
    }

    pub(crate) fn name(&self) -> &str {
        self.source.name()
    }

    pub(crate) fn config(&self) -> &ModelConfig {
        self.source.config()
    }

    /// Longest text, in tokens.
    pub(crate) fn context(&self) -> usize {
        self.engine().context()
    }

    pub(crate) fn vocab(&self) -> usize {
        self.config().vocab as usize
    }

    pub(crate) fn architecture(&self) -> Architecture {
        let c = self.config();
        Architecture {
            hidden: c.hidden,
            layers: c.layers,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            ffn: c.ffn,
            vocab: c.vocab,
            norm_eps: c.norm_eps,
            rope_theta: c.rope_theta,
            interleaved: c.rope_layout == RopeLayout::Interleaved,
            tied: c.tied_embeddings,
            bias: c.qkv_bias,
        }
    }

    /// All log-probabilities behind each token of a text.
    pub(crate) fn log_probabilities(&self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(tokens.len());
        self.engine()
            .evaluate(tokens, |_, logits| rows.push(log_softmax(logits)))
            .context("the model cannot be evaluated")?;
        Ok(rows)
    }

    /// The likeliest continuation, end tokens and all, of exactly so many tokens.
    pub(crate) fn continuation(&self, prompt: &[u32], tokens: usize) -> Result<Vec<u32>> {
        let (sender, answer) = mpsc::channel();
        let request = Request {
            prompt: prompt.to_vec(),
            max_tokens: tokens,
            ignore_end: true,
            ..Request::default()
        };
        let sink = move |event: Event<'_>| {
            if let Event::Token { id, .. } = event {
                let _ = sender.send(id);
            }
            ControlFlow::Continue(())
        };
        self.engine().submit(request, Box::new(sink))?;
        let answer: Vec<u32> = answer.iter().collect();
        if answer.len() != tokens {
            bail!("the engine stopped after {} tokens", answer.len());
        }
        Ok(answer)
    }

    /// Writes every tensor as f32, and says where each lies.
    pub(crate) fn write_weights(&self, path: &Path) -> Result<Vec<Placed>> {
        let mut file = std::io::BufWriter::new(fs::File::create(path)?);
        let mut placed = Vec::new();
        let mut offset = 0;
        for (index, tensor) in self.source.tensors().iter().enumerate() {
            let values = self.tensor(index)?;
            for value in &values {
                file.write_all(&value.to_le_bytes())?;
            }
            placed.push(Placed {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                offset,
            });
            offset += 4 * values.len() as u64;
        }
        file.flush()?;
        Ok(placed)
    }

    fn tensor(&self, index: usize) -> Result<Vec<f32>> {
        let tensor = &self.source.tensors()[index];
        let mut bytes = vec![0; usize::try_from(tensor.size)?];
        self.source.read_tensor(index, 0, &mut bytes)?;
        let count = usize::try_from(tensor.shape.iter().product::<u64>())?;
        let mut values = vec![0.0; count];
        casemate_engine::dequantise(tensor.dtype, &bytes, &mut values);
        Ok(values)
    }

    fn named(&self, name: &str) -> Result<Vec<f32>> {
        let tensors = self.source.tensors();
        let index = tensors.iter().position(|tensor| tensor.name == name);
        self.tensor(index.with_context(|| format!("the model has no tensor {name}"))?)
    }

    /// What the products of the first layer's attention get for these tokens, as 8-bit rows with a scale each, which
    /// stays inside. (The enclave turns rows by a rotation before that; it is public, and a linear classifier does not mind.)
    pub(crate) fn first_inputs(&self, tokens: &[u32]) -> Result<Vec<Vec<i8>>> {
        let embedding = self.named("token_embd.weight")?;
        let norm = self.named("blk.0.attn_norm.weight")?;
        let eps = self.config().norm_eps;
        let row = |&token: &u32| {
            let from = token as usize * norm.len();
            let hidden = &embedding[from..from + norm.len()];
            let square = hidden.iter().map(|x| x * x).sum::<f32>() / norm.len() as f32;
            let scale = (square + eps).sqrt().recip();
            let inputs = hidden.iter().zip(&norm);
            quantised(&inputs.map(|(x, w)| x * scale * w).collect::<Vec<_>>())
        };
        Ok(tokens.iter().map(row).collect())
    }
}

fn quantised(row: &[f32]) -> Vec<i8> {
    let most = row
        .iter()
        .fold(0f32, |most, x| most.max(x.abs()))
        .max(1e-30);
    let quantised = |x: &f32| (x / most * 127.0).round() as i8;
    row.iter().map(quantised).collect()
}

/// Rows as a worker gets them, each element with a pad of its own.
pub(crate) fn transcript(rows: &[Vec<i8>], random: &mut impl FnMut() -> u32) -> Result<Stack> {
    let columns = rows.first().map_or(1, Vec::len);
    let field = Field::for_width(columns).context("rows are wider than any field allows")?;
    let elements = rows
        .iter()
        .flat_map(|row| mask(field, row, random))
        .collect();
    Ok(Stack {
        name: "blk.0.attn_qkv".into(),
        field,
        columns,
        elements,
    })
}

fn source(path: &Path, folder: &Path) -> Result<Box<dyn ModelSource>> {
    if path.extension().is_none_or(|extension| extension != "bin") {
        return Ok(casemate_import::open(path)?);
    }
    let vocabulary = path.with_file_name("tok512.bin");
    for file in [path, &vocabulary] {
        if !file.is_file() {
            let message = format!(
                "{} is not there; a checkpoint of llama2.c needs tok512.bin beside it",
                file.display()
            );
            return Err(Usage(message).into());
        }
    }
    let converted: PathBuf = folder.join("victim.gguf");
    gguf::write(&llama2c::read(path, &vocabulary), &converted)?;
    Ok(casemate_import::open(&converted)?)
}

/// The student's script knows plain models only.
fn check(config: &ModelConfig) -> Result<(), String> {
    let what = match config {
        c if c.rope_scaling != RopeScaling::None => "stretched RoPE",
        c if c.sliding_window.is_some() => "a sliding window",
        _ => return Ok(()),
    };
    Err(format!(
        "the model has {what}, which the students of this audit do not"
    ))
}
