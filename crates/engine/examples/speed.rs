//! How fast a model is read and generated from, beside the memory bandwidth of the same machine at
//! the same moment.
//!
//! ```sh
//! cargo run --release -p casemate-engine --example speed -- [MODEL.gguf] [--compute f32|int8|int8-row] [--threads N]
//! ```
//! Without a file: random Q8_0 weights in the shape of TinyLlama-1.1B. The model goes through a
//! sealed file in the temporary folder, as in production, so a gigabyte of disk is needed.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Instant;

use anyhow::{Context, bail};
use casemate_container::signing::SigningKey;
use casemate_container::{
    DType, DataKey, Family, ModelConfig, ModelSource, RopeLayout, RopeScaling, SealOptions,
    SealedFile, Silent, SourceError, SourceTensor, seal,
};
use casemate_engine::{Compute, Engine, EngineOptions, Event, Request};
use casemate_kernels::bandwidth::measure_read;
use casemate_kernels::team::Team;

fn main() -> anyhow::Result<()> {
    let mut file = None;
    let mut options = EngineOptions {
        max_context: 1024 + 256,
        max_batch: 6,
        ..EngineOptions::default()
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--compute" => match arguments.next().as_deref() {
                Some("f32") => options.compute = Compute::F32,
                Some("int8") => options.compute = Compute::Int8,
                Some("int8-row") => options.compute = Compute::Int8Row,
                other => bail!("--compute f32, int8 or int8-row, not {other:?}"),
            },
            "--threads" => options.threads = arguments.next().context("--threads N")?.parse()?,
            _ => file = Some(PathBuf::from(argument)),
        }
    }

    let source: Box<dyn ModelSource> = match &file {
        Some(path) => casemate_import::open(path)?,
        None => Box::new(Random::tiny_llama_1b()),
    };
    let folder = tempfile::tempdir()?;
    let sealed = folder.path().join("model.casemate");
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    seal(
        &*source,
        &SealOptions {
            version: 1,
            ..SealOptions::default()
        },
        &data_key,
        &provider,
        &sealed,
        &Silent,
    )?;
    drop(source);

    let started = Instant::now();
    let unlocked = SealedFile::open(&sealed)?.unlock(&data_key, &provider.verifying_key())?;
    let model = unlocked.load(options.threads, &Silent)?;
    let opened = started.elapsed();
    let tensor_bytes = model.manifest().tensor_bytes();
    let started = Instant::now();
    let engine = Engine::load(model, &options, &Silent)?;
    println!(
        "compute {}, {} threads",
        engine.compute_name(),
        options.threads
    );
    println!(
        "opened in {:.2} s, converted in {:.2} s; {} MB sealed, {} MB converted, peak memory {} MB",
        opened.as_secs_f64(),
        started.elapsed().as_secs_f64(),
        tensor_bytes / 1_000_000,
        engine.weight_bytes() / 1_000_000,
        peak_memory()? / 1_000_000,
    );

    println!(
        "| read GB/s | prompt | batch | prefill tokens/s | decode tokens/s | share of bandwidth |"
    );
    println!("|---|---|---|---|---|---|");
    for (prompt, batch) in [(128, 1), (1024, 1), (128, 6)] {
        let bandwidth =
            measure_read(&Team::new(options.threads)?, 1 << 30, 5)?.gigabytes_per_second();
        let (prefill, decode) = run(&engine, prompt, batch)?;
        // One pass over the weights gives a token to each request of the batch.
        let bytes = engine.bytes_per_pass() as f64 * decode / batch as f64;
        println!(
            "| {bandwidth:.1} | {prompt} | {batch} | {prefill:.1} | {decode:.1} | {:.0} % |",
            bytes / bandwidth / 1e7
        );
    }
    Ok(())
}

/// Tokens per second of reading `batch` prompts and of generating from them together.
fn run(engine: &Engine, prompt: usize, batch: usize) -> anyhow::Result<(f64, f64)> {
    const GENERATED: usize = 64;
    let (sender, receiver) = channel();
    let started = Instant::now();
    for i in 0..batch {
        let sender = sender.clone();
        let vocab = engine.config().vocab;
        let request = Request {
            prompt: (0..prompt)
                .map(|t| ((t * 7919 + i * 104_729) as u32) % vocab)
                .collect(),
            max_tokens: GENERATED,
            ignore_end: true,
            ..Request::default()
        };
        engine.submit(
            request,
            Box::new(move |event| {
                let _ = sender.send((i, Instant::now(), event));
                ControlFlow::Continue(())
            }),
        )?;
    }
    drop(sender);
    let mut counts = vec![0; batch];
    let mut all_read = None;
    let mut last = started;
    let mut generated = 0;
    for (i, at, event) in receiver {
        if matches!(event, Event::Token { .. }) {
            counts[i] += 1;
            last = at;
            generated += usize::from(all_read.is_some());
            // From here on every request generates.
            if all_read.is_none() && counts.iter().all(|&n| n > 0) {
                all_read = Some(at);
            }
        }
    }
    let all_read = all_read.context("a request failed")?;
    let read = (prompt * batch) as f64 / (all_read - started).as_secs_f64();
    Ok((read, generated as f64 / (last - all_read).as_secs_f64()))
}

/// The largest resident size of this process so far, in bytes.
fn peak_memory() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Random Q8_0 weights.
struct Random {
    config: ModelConfig,
    tensors: Vec<SourceTensor>,
    assets: Vec<(String, Vec<u8>)>,
}

impl Random {
    fn tiny_llama_1b() -> Self {
        let config = ModelConfig {
            family: Family::Llama,
            hidden: 2048,
            layers: 22,
            heads: 32,
            kv_heads: 4,
            head_dim: 64,
            ffn: 5632,
            vocab: 32000,
            context: 2048,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Half,
            sliding_window: None,
            tied_embeddings: false,
            qkv_bias: false,
            bos: None,
            eos: vec![],
            add_bos: false,
        };
        let mut tensors = Vec::new();
        let mut add = |name: String, dtype: DType, shape: &[u64]| {
            let size = dtype.bytes_for(shape).expect("a sound shape");
            tensors.push(SourceTensor {
                name,
                dtype,
                shape: shape.to_vec(),
                size,
            });
        };
        add("token_embd.weight".into(), DType::Q8_0, &[32000, 2048]);
        add("output.weight".into(), DType::Q8_0, &[32000, 2048]);
        add("output_norm.weight".into(), DType::F32, &[2048]);
        for layer in 0..22 {
            for (name, rows, columns) in [
                ("attn_q", 2048, 2048),
                ("attn_k", 256, 2048),
                ("attn_v", 256, 2048),
                ("attn_output", 2048, 2048),
                ("ffn_gate", 5632, 2048),
                ("ffn_up", 5632, 2048),
                ("ffn_down", 2048, 5632),
            ] {
                add(
                    format!("blk.{layer}.{name}.weight"),
                    DType::Q8_0,
                    &[rows, columns],
                );
            }
            add(format!("blk.{layer}.attn_norm.weight"), DType::F32, &[2048]);
            add(format!("blk.{layer}.ffn_norm.weight"), DType::F32, &[2048]);
        }
        let tokenizer = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"Fuse"},
            "model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
        Self {
            config,
            tensors,
            assets: vec![("tokenizer.json".into(), tokenizer.into())],
        }
    }
}

impl ModelSource for Random {
    fn name(&self) -> &str {
        "random"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        // Every byte depends on its place only, so that ranges may be read in any order.
        let q8 = self.tensors[index].dtype == DType::Q8_0;
        for (at, byte) in (offset..).zip(out) {
            *byte = match (q8, at % 34) {
                // Scale 0.00045: standard deviation 0.033 of the weights.
                (true, 0) => 0x60,
                (true, 1) => 0x0f,
                (true, _) => {
                    ((at ^ ((index as u64) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
                }
                (false, _) => [0, 0, 0x80, 0x3f][(at % 4) as usize],
            };
        }
        Ok(())
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &self.assets
    }
}
