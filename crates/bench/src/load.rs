//! From a model's origin to an engine: sealed for this run only, opened and converted as in production, and timed. The
//! sealed copy lies in memory (or where `--scratch` says), has no name any more once it is open, and is gone once the
//! model is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use casemate_container::signing::SigningKey;
use casemate_container::{
    DType, DataKey, ModelConfig, ModelSource, SealOptions, SealedFile, Silent, seal,
};
use casemate_engine::{Compute, Engine, EngineOptions, KvType};
use casemate_kernels::attention::{KvShape, PAGE};
use serde::{Deserialize, Serialize};

use crate::exit::Usage;
use crate::machine::available_memory;
use crate::memory::Peak;
use crate::synthetic::{Shape, Synthetic};

/// A file system in memory.
const MEMORY: &str = "/dev/shm";
/// Memory besides weights and keys and values: working memory, tokenizer, this program.
const BESIDES: u64 = 256 << 20;

/// Where the model comes from.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// A GGUF file or a Hugging Face directory.
    File(PathBuf),
    /// Random weights.
    Synthetic(Shape),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Synthetic(shape) => write!(f, "{shape}, random weights"),
        }
    }
}

impl Origin {
    /// The model as it is best given to this arithmetic.
    pub(crate) fn source(&self, compute: Compute) -> Result<Box<dyn ModelSource>> {
        Ok(match self {
            Origin::File(path) => casemate_import::open(path)?,
            Origin::Synthetic(shape) => {
                let dtype = match compute.name() {
                    "q4-g32" => DType::Q4_0,
                    _ => DType::Q8_0,
                };
                Box::new(Synthetic::new(*shape, dtype))
            }
        })
    }
}

/// Refuses a model that this arithmetic is not for.
pub(crate) fn check_encodings(source: &dyn ModelSource, compute: Compute) -> Result<(), Usage> {
    if compute.suits(source.tensors().iter().map(|t| t.dtype)) {
        return Ok(());
    }
    Err(Usage(format!(
        "{}: the model has no tensors of 4 bits",
        compute.name()
    )))
}

/// Weights of all matrices and vectors.
pub(crate) fn parameters(source: &dyn ModelSource) -> u64 {
    source
        .tensors()
        .iter()
        .map(|t| t.shape.iter().product::<u64>())
        .sum()
}

/// Bytes that a weight takes in memory, by the format's name; what is not known here is taken for the largest.
fn bytes_per_weight(compute: &str) -> f64 {
    match compute {
        // Q4_1; what a file holds in more bits is less than that takes too much here.
        "q4-g32" => 0.64,
        "int8-row" => 1.01,
        "int8-g32" => 1.07,
        "bf16" => 2.0,
        _ => 4.0,
    }
}

/// Bytes of the keys and values of one position, as the engine stores them.
pub(crate) fn kv_position_bytes(c: &ModelConfig, kv_type: KvType) -> Result<u64, Usage> {
    let shape = KvShape {
        layers: c.layers as usize,
        kv_heads: c.kv_heads as usize,
        head_dim: c.head_dim as usize,
        kv_type,
    };
    match shape.page_bytes() {
        Some(page) => Ok((page / PAGE) as u64),
        None => Err(Usage(format!(
            "no cache of keys and values has heads of {} elements",
            c.head_dim
        ))),
    }
}

/// What loading and serving will take, before anything is allocated. An estimate, and meant to be a little high.
pub(crate) struct Needed {
    sealed: u64,
    weights: u64,
    kv: u64,
    in_memory: bool,
}

impl Needed {
    /// `positions` are those that keys and values are kept for, of all requests together.
    pub(crate) fn new(
        source: &dyn ModelSource,
        options: &EngineOptions,
        positions: u64,
        in_memory: bool,
    ) -> Result<Needed, Usage> {
        let position = kv_position_bytes(source.config(), options.kv_type())?;
        let weight = bytes_per_weight(options.compute.name());
        Ok(Needed {
            sealed: source.tensors().iter().map(|t| t.size).sum(),
            weights: (parameters(source) as f64 * weight) as u64,
            kv: position * positions,
            in_memory,
        })
    }

    fn while_opening(&self) -> u64 {
        self.sealed * if self.in_memory { 2 } else { 1 } + BESIDES
    }

    // Converted piece by piece: what is not yet converted and what is are never more than the larger of both.
    fn while_running(&self) -> u64 {
        self.weights.max(self.sealed) + self.kv + BESIDES
    }

    /// Refuses what cannot fit, with the numbers.
    pub(crate) fn check(&self, available: u64) -> Result<(), Usage> {
        let gb = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        if self.while_running() > available {
            return Err(Usage(format!(
                "about {} of memory are needed ({} for weights, {} for keys and values), but {} are available; choose a \
                 smaller --batch, --prompt or --contexts, or another --compute or --kv-type",
                gb(self.while_running()),
                gb(self.weights.max(self.sealed)),
                gb(self.kv),
                gb(available),
            )));
        }
        if self.while_opening() > available {
            return Err(Usage(format!(
                "about {} of memory are needed to open the model, half of it for its sealed copy, but {} are available; \
                 --scratch DIR puts that copy on a disk, and then {} are enough",
                gb(self.while_opening()),
                gb(available),
                gb(self.while_running()),
            )));
        }
        Ok(())
    }
}

/// Times of a load, in seconds, and what it left in memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Loaded {
    /// Bytes of the sealed copy.
    pub(crate) sealed_bytes: u64,
    /// Making (or reading) the weights and encrypting them; no part of a load in production.
    pub(crate) seal_seconds: f64,
    /// Decrypting, every digest recomputed.
    pub(crate) open_seconds: f64,
    /// Into the form that kernels read.
    pub(crate) convert_seconds: f64,
}

/// Seals `source`, opens it and loads it. Counting of the peak begins with the opening.
pub(crate) fn load(
    source: Box<dyn ModelSource>,
    scratch: Option<&Path>,
    options: &EngineOptions,
) -> Result<(Engine, Loaded, Peak)> {
    let sealed_bytes: u64 = source.tensors().iter().map(|t| t.size).sum();
    let folder = scratch_folder(scratch, sealed_bytes)?;
    let path = folder.path().join("model.casemate");
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    let started = Instant::now();
    let sealing = SealOptions {
        version: 1,
        threads: options.threads,
        ..SealOptions::default()
    };
    seal(&*source, &sealing, &data_key, &provider, &path, &Silent)?;
    drop(source);
    let seal_seconds = started.elapsed().as_secs_f64();

    let peak = Peak::start()?;
    let started = Instant::now();
    let file = SealedFile::open(&path)?;
    // From here on nothing is left behind, however the program ends.
    drop(folder);
    let model = file
        .unlock(&data_key, &provider.verifying_key())?
        .load(options.threads, &Silent)?;
    let open_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let engine = Engine::load(model, options, &Silent)?;
    let loaded = Loaded {
        sealed_bytes,
        seal_seconds,
        open_seconds,
        convert_seconds: started.elapsed().as_secs_f64(),
    };
    Ok((engine, loaded, peak))
}

/// A new folder with room for `bytes`.
pub(crate) fn scratch_folder(scratch: Option<&Path>, bytes: u64) -> Result<tempfile::TempDir> {
    let parent = scratch.unwrap_or(Path::new(MEMORY));
    let space = rustix::fs::statvfs(parent).map_err(|error| {
        Usage(format!(
            "{} cannot be used: {error}; --scratch DIR names another place",
            parent.display()
        ))
    })?;
    let free = space.f_bavail * space.f_frsize;
    if free < bytes + bytes / 50 + (1 << 20) {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        return Err(Usage(format!(
            "{} has {:.1} GB free, but the sealed copy of the model needs {:.1} GB; --scratch DIR names another place",
            parent.display(),
            gb(free),
            gb(bytes),
        ))
        .into());
    }
    tempfile::Builder::new()
        .prefix("casemate-bench-")
        .tempdir_in(parent)
        .with_context(|| format!("no folder can be made in {}", parent.display()))
}

/// Checks memory for one format, if the system says what there is.
pub(crate) fn check_memory(needed: &Needed) -> Result<(), Usage> {
    available_memory().map_or(Ok(()), |available| needed.check(available))
}

/// Multiply-adds of the linear layers, counted as two operations: for each token of a prompt, and once for its last.
pub(crate) fn linear_operations(c: &ModelConfig) -> (u64, u64) {
    let [hidden, ffn, vocab, head_dim] = [c.hidden, c.ffn, c.vocab, c.head_dim].map(u64::from);
    let (q, kv) = (
        u64::from(c.heads) * head_dim,
        u64::from(c.kv_heads) * head_dim,
    );
    let layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * ffn;
    (2 * u64::from(c.layers) * layer, 2 * vocab * hidden)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    #[test]
    fn operations_are_those_of_the_published_shape() {
        let (each, last) = linear_operations(&Shape::TinyLlama.config());
        // Two operations for each of the 1.1 billion weights but embedding and norms.
        assert_eq!(each + last, 2 * (1_100_048_384 - 32000 * 2048 - 45 * 2048));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_numbers() {
        let compute = Compute::Int8;
        let source = Origin::Synthetic(Shape::Llama2With7B)
            .source(compute)
            .unwrap();
        // The paper's setting: six requests of 1152 positions, 512 KiB each.
        let needed = |kv_type, in_memory| {
            let options = options::engine(compute, kv_type);
            Needed::new(&*source, &options, 6 * 1152, in_memory).unwrap()
        };
        // A scale beside each key and value of 128 bytes.
        let int8 = needed(Some(KvType::Int8), true);
        assert_eq!(int8.kv, 6 * 1152 * 2 * 32 * 32 * (4 + 128));
        let on_disk = needed(None, false);
        let needed = needed(None, true);
        assert_eq!(needed.kv, 6 * 1152 * (512 << 10));
        assert!(needed.check(24 << 30).is_ok(), "7B in int8 fits 24 GiB");
        let refused = needed.check(8 << 30).unwrap_err().to_string();
        assert!(
            refused.contains("11.1 GB") && refused.contains("8.6 GB are available"),
            "{refused}"
        );
        // Enough to run, not enough to hold the sealed copy as well.
        let refused = needed.check(13 << 30).unwrap_err().to_string();
        assert!(
            refused.contains("--scratch") && refused.contains("14.6 GB"),
            "{refused}"
        );
        assert!(on_disk.check(13 << 30).is_ok());
    }

    #[test]
    fn a_full_scratch_place_is_named() {
        let refused = scratch_folder(Some(Path::new("/dev/shm")), 1 << 60).unwrap_err();
        assert!(refused.to_string().contains("/dev/shm has"), "{refused}");
        let refused = scratch_folder(Some(Path::new("/nowhere")), 1).unwrap_err();
        assert!(refused.to_string().contains("--scratch"), "{refused}");
        assert!(refused.downcast_ref::<Usage>().is_some());
    }
}
