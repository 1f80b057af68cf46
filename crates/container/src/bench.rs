//! What the loader costs with and without encryption, measured on made-up data.
//!
//! Nothing here touches a model: [`Unsealed`] holds only what it has written itself, and what it loads can be counted
//! but not read. There is no way from here to a [`crate::Model`].

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use casemate_kernels::mem::{Purpose, Region};

use crate::config::{Family, ModelConfig, RopeLayout, RopeScaling};
use crate::dtype::DType;
use crate::error::{OpenError, SealError};
use crate::header::CHUNK_LOG2;
use crate::manifest::Manifest;
use crate::open::{Chunks, fill_region};
use crate::progress::Silent;
use crate::seal::{Plan, SealOptions, Subject, threads};
use crate::source::{ModelSource, SourceError, SourceTensor};
use crate::workers;

/// A made-up model of a wanted size: tensors with the shapes of a Llama block, filled with pseudo-random bytes.
pub struct Synthetic {
    config: ModelConfig,
    tensors: Vec<SourceTensor>,
}

impl Synthetic {
    /// About `bytes` bytes (never more than one block beyond), at least one block.
    pub fn new(bytes: u64) -> Self {
        const HIDDEN: u64 = 2048;
        const FFN: u64 = 5632;
        let shapes = [
            ("attn_norm", DType::F32, vec![HIDDEN]),
            ("attn_q", DType::Q8_0, vec![HIDDEN, HIDDEN]),
            ("attn_k", DType::Q8_0, vec![256, HIDDEN]),
            ("attn_v", DType::Q8_0, vec![256, HIDDEN]),
            ("attn_output", DType::Q8_0, vec![HIDDEN, HIDDEN]),
            ("ffn_norm", DType::F32, vec![HIDDEN]),
            ("ffn_gate", DType::Q8_0, vec![FFN, HIDDEN]),
            ("ffn_up", DType::Q8_0, vec![FFN, HIDDEN]),
            ("ffn_down", DType::Q8_0, vec![HIDDEN, FFN]),
        ];
        let mut tensors = Vec::new();
        let mut total = 0;
        let mut layers = 0;
        while total < bytes || layers == 0 {
            for (name, dtype, shape) in &shapes {
                let size = dtype.bytes_for(shape).expect("the shapes above have sizes");
                let name = format!("blk.{layers}.{name}.weight");
                tensors.push(SourceTensor {
                    name,
                    dtype: *dtype,
                    shape: shape.clone(),
                    size,
                });
                total += size;
                if total >= bytes {
                    break;
                }
            }
            layers += 1;
        }
        let config = ModelConfig {
            family: Family::Llama,
            hidden: HIDDEN as u32,
            layers,
            heads: 32,
            kv_heads: 4,
            head_dim: 64,
            ffn: FFN as u32,
            vocab: 32_000,
            context: 2048,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Half,
            sliding_window: None,
            tied_embeddings: true,
            qkv_bias: false,
            bos: None,
            eos: Vec::new(),
            add_bos: false,
        };
        Synthetic { config, tensors }
    }
}

impl ModelSource for Synthetic {
    fn name(&self) -> &str {
        "synthetic"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        // A function of the position alone, as two readings in different pieces must agree.
        let word = |at: u64| {
            let x = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((index as u64) << 32);
            (x ^ (x >> 29))
                .wrapping_mul(0xbf58_476d_1ce4_e5b9)
                .to_le_bytes()
        };
        let mut at = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let skip = (at % 8) as usize;
            let take = (8 - skip).min(rest.len());
            let (head, tail) = rest.split_at_mut(take);
            head.copy_from_slice(&word(at / 8)[skip..skip + take]);
            rest = tail;
            at += take as u64;
        }
        Ok(())
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &[]
    }
}

/// A payload in the clear, for comparison only.
pub struct Unsealed {
    path: PathBuf,
    manifest: Manifest,
    file: File,
}

/// What stands where sealed models have their AEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// A copy from the thread's buffer to the final place: the same loader, moving the same bytes.
    Copy,
    /// Nothing: the system reads straight into the final place. No loader of sealed data can move fewer bytes.
    Nothing,
}

/// What a load without AEAD brought into memory: can be counted, not read.
pub struct Loaded {
    region: Region,
}

impl Loaded {
    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.region.len()
    }
}

impl Unsealed {
    /// Writes the made-up payload to a new file.
    ///
    /// # Errors
    /// When the file exists or cannot be written.
    pub fn write(source: &Synthetic, path: &Path) -> Result<Self, SealError> {
        let failed = |error| SealError::Io {
            path: path.to_owned(),
            error,
        };
        let plan = Plan::new(Subject::Model(source), &SealOptions::default())?;
        let manifest = plan.with_digests(threads(0), &Silent)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(failed)?;
        let mut buffer = vec![0; 1 << CHUNK_LOG2];
        let mut start = 0;
        while start < manifest.payload_len() {
            let length = (buffer.len() as u64).min(manifest.payload_len() - start);
            let bytes = &mut buffer[..length as usize];
            plan.read(&manifest, start, bytes)?;
            file.write_all(bytes).map_err(failed)?;
            start += length;
        }
        file.sync_all().map_err(failed)?;
        Ok(Unsealed {
            path: path.to_owned(),
            manifest,
            file,
        })
    }

    /// Brings the payload into memory as [`crate::Unlocked::load`] does, digests verified, without AEAD.
    ///
    /// # Errors
    /// When the file cannot be read or its digests are wrong.
    pub fn load(&self, instead: Instead, threads: usize) -> Result<Loaded, OpenError> {
        let chunks = Passed {
            unsealed: self,
            instead,
        };
        let region = fill_region(&chunks, &self.manifest, threads, &Silent)?;
        Ok(Loaded { region })
    }
}

struct Passed<'a> {
    unsealed: &'a Unsealed,
    instead: Instead,
}

impl Chunks for Passed<'_> {
    fn chunk_len(&self) -> u64 {
        1 << CHUNK_LOG2
    }

    fn payload_len(&self) -> u64 {
        self.unsealed.manifest.payload_len()
    }

    fn fetch(&self, index: u64, scratch: &mut [u8], out: &mut [u8]) -> Result<(), OpenError> {
        let position = index << CHUNK_LOG2;
        let read = match self.instead {
            Instead::Nothing => self.unsealed.file.read_exact_at(out, position),
            Instead::Copy => {
                let passed = &mut scratch[..out.len()];
                self.unsealed
                    .file
                    .read_exact_at(passed, position)
                    .map(|()| out.copy_from_slice(passed))
            }
        };
        read.map_err(|error| OpenError::Io {
            path: self.unsealed.path.clone(),
            error,
        })
    }
}

/// How long each ingredient of loading takes alone, for the same number of bytes and threads.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Reading a file, from wherever the system has it.
    pub read: Duration,
    /// Making the kernel find memory, by writing to each page.
    pub first_touch: Duration,
    /// AES-256-GCM over chunks in the cache.
    pub aes_gcm: Duration,
    /// BLAKE3 over chunks in the cache.
    pub blake3: Duration,
}

/// Measures [`Limits`] over the bytes of `unsealed`.
///
/// # Errors
/// When the file cannot be read or there is no memory.
pub fn limits(unsealed: &Unsealed, wanted_threads: usize) -> io::Result<Limits> {
    let chunk_len = 1usize << CHUNK_LOG2;
    let payload_len = unsealed.manifest.payload_len();
    let chunks = 0..payload_len.div_ceil(chunk_len as u64);
    let threads = threads(wanted_threads);
    let buffer = || vec![0u8; chunk_len];
    let timed = |work: &(dyn Fn(&mut Vec<u8>, u64) -> io::Result<()> + Sync)| {
        let start = Instant::now();
        workers::for_each(threads, chunks.clone(), buffer, work)?;
        Ok::<_, io::Error>(start.elapsed())
    };
    let read = timed(&|buffer, index| {
        let start = index << CHUNK_LOG2;
        let length = (chunk_len as u64).min(payload_len - start) as usize;
        unsealed.file.read_exact_at(&mut buffer[..length], start)
    })?;
    let key = LessSafeKey::new(
        UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| io::ErrorKind::InvalidInput)?,
    );
    let aes_gcm = timed(&|buffer, index| {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&index.to_le_bytes());
        key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), buffer)
            .map(|_| ())
            .map_err(|_| io::ErrorKind::InvalidInput.into())
    })?;
    let blake3 = timed(&|buffer, _| {
        std::hint::black_box(blake3::hash(buffer));
        Ok(())
    })?;
    let mut region = Region::zeroed(payload_len as usize, Purpose::Weights)?;
    let start = Instant::now();
    workers::for_each(
        threads,
        region.chunks_mut(chunk_len),
        || (),
        |(), chunk| {
            for byte in chunk.iter_mut().step_by(4096) {
                *byte = 1;
            }
            Ok::<_, io::Error>(())
        },
    )?;
    Ok(Limits {
        read,
        first_touch: start.elapsed(),
        aes_gcm,
        blake3,
    })
}
