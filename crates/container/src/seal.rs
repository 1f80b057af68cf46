//! Sealing: a model in the clear becomes one file. Streams twice through the source, once for the digests and once
//! for the encryption; holds one chunk per thread.

use std::fmt;
use std::path::Path;

use zeroize::Zeroizing;

use crate::atomic_file::{AtomicFile, Mode, Replace};
use crate::data_key::DataKey;
use crate::digest::ModelDigest;
use crate::error::SealError;
use crate::header::{CHUNK_LOG2, HEADER_LEN, Header, PREAMBLE_LEN, TAG_LEN};
use crate::keys::{FileKeys, PayloadKey};
use crate::manifest::{Access, AssetEntry, Kind, Manifest, ManifestError, TensorEntry, digest_of};
use crate::progress::{Progress, Stage};
use crate::signing::SigningKey;
use crate::source::{AdapterSource, ModelSource, SourceError, SourceTensor};
use crate::tree::DigestTree;
use crate::workers;

/// Domain of the provider's signature over a model digest.
pub(crate) const SIGNATURE_DOMAIN: &str = "casemate/1 model";

/// What a provider decides about a sealing.
#[derive(Clone, Debug, Default)]
pub struct SealOptions {
    /// Name of the model; the source's when absent.
    pub name: Option<String>,
    /// Version of the model, which a provider only ever raises.
    pub version: u64,
    /// Tensors that may leave the enclave: names in which `*` stands for any characters. Empty = none.
    pub public_tensors: Vec<String>,
    /// Replace a file that stands at the output path.
    pub overwrite: bool,
    /// Threads; 0 = as many as the machine runs at once.
    pub threads: usize,
}

/// A model was sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// What names the model.
    pub digest: ModelDigest,
    /// Length of the file.
    pub file_len: u64,
    /// Tensors in it.
    pub tensors: usize,
    /// How many of them are public.
    pub public_tensors: usize,
}

/// What must be fresh for each file. Two files with the same would share AES-GCM nonces, hence not public.
pub(crate) struct Fresh {
    pub(crate) file_id: [u8; 16],
    pub(crate) salt: [u8; 32],
}

impl Fresh {
    fn random() -> Self {
        let mut fresh = Fresh {
            file_id: [0; 16],
            salt: [0; 32],
        };
        aws_lc_rs::rand::fill(&mut fresh.file_id).expect("the system provides randomness");
        aws_lc_rs::rand::fill(&mut fresh.salt).expect("the system provides randomness");
        fresh
    }
}

/// Seals `source` into a new file at `out`, which appears whole or not at all.
///
/// # Errors
/// When the source cannot be read or described, changes meanwhile, or the file cannot be written. Whatever stood at
/// `out` is then as it was.
pub fn seal(
    source: &dyn ModelSource,
    options: &SealOptions,
    data_key: &DataKey,
    signing_key: &SigningKey,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Sealed, SealError> {
    seal_subject(
        Subject::Model(source),
        options,
        data_key,
        signing_key,
        out,
        progress,
    )
}

/// As [`seal`], of an adapter. None of its tensors can be public.
///
/// # Errors
/// As [`seal`].
pub fn seal_adapter(
    source: &dyn AdapterSource,
    options: &SealOptions,
    data_key: &DataKey,
    signing_key: &SigningKey,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Sealed, SealError> {
    seal_subject(
        Subject::Adapter(source),
        options,
        data_key,
        signing_key,
        out,
        progress,
    )
}

/// What is sealed.
#[derive(Clone, Copy)]
pub(crate) enum Subject<'a> {
    Model(&'a dyn ModelSource),
    Adapter(&'a dyn AdapterSource),
}

impl<'a> Subject<'a> {
    fn kind(self) -> Kind<'a> {
        match self {
            Subject::Model(model) => Kind::Model(model.config()),
            Subject::Adapter(adapter) => Kind::Adapter(adapter.config()),
        }
    }

    fn name(self) -> &'a str {
        match self {
            Subject::Model(model) => model.name(),
            Subject::Adapter(adapter) => adapter.name(),
        }
    }

    fn tensors(self) -> &'a [SourceTensor] {
        match self {
            Subject::Model(model) => model.tensors(),
            Subject::Adapter(adapter) => adapter.tensors(),
        }
    }

    fn assets(self) -> &'a [(String, Vec<u8>)] {
        match self {
            Subject::Model(model) => model.assets(),
            Subject::Adapter(_) => &[],
        }
    }

    fn read_tensor(self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        match self {
            Subject::Model(model) => model.read_tensor(index, offset, out),
            Subject::Adapter(adapter) => adapter.read_tensor(index, offset, out),
        }
    }
}

fn seal_subject(
    source: Subject<'_>,
    options: &SealOptions,
    data_key: &DataKey,
    signing_key: &SigningKey,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Sealed, SealError> {
    // First, so that nobody waits for the digests of a large model to learn that the path is taken.
    let replace = if options.overwrite {
        Replace::Existing
    } else {
        Replace::Nothing
    };
    let file = AtomicFile::create(out, replace, Mode::Readable).map_err(|e| at(out, e))?;
    let plan = Plan::new(source, options)?;
    let threads = threads(options.threads);
    let manifest = plan.with_digests(threads, progress)?;
    let sealed = write(
        &Sealing {
            plan: &plan,
            manifest: &manifest,
            threads,
            progress,
        },
        data_key,
        signing_key,
        Fresh::random(),
        &file,
        out,
    )?;
    file.commit().map_err(|e| at(out, e))?;
    Ok(sealed)
}

pub(crate) fn threads(wanted: usize) -> usize {
    match wanted {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

fn at(path: &Path, error: std::io::Error) -> SealError {
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => SealError::Exists {
            path: path.to_owned(),
        },
        _ => SealError::Io {
            path: path.to_owned(),
            error,
        },
    }
}

struct Sealing<'a> {
    plan: &'a Plan<'a>,
    manifest: &'a Manifest,
    threads: usize,
    progress: &'a dyn Progress,
}

fn write(
    sealing: &Sealing<'_>,
    data_key: &DataKey,
    signing_key: &SigningKey,
    fresh: Fresh,
    file: &AtomicFile,
    out: &Path,
) -> Result<Sealed, SealError> {
    let Sealing {
        plan,
        manifest,
        threads,
        progress,
    } = *sealing;
    let Front {
        header,
        digest,
        payload_key,
        bytes,
    } = front(
        &manifest.to_cbor(),
        manifest.payload_len(),
        CHUNK_LOG2,
        data_key,
        signing_key,
        fresh,
    )?;
    file.write_all_at(&bytes, 0).map_err(|e| at(out, e))?;

    let tree = DigestTree::new(manifest.extents());
    progress.begin(Stage::Seal, header.payload_len());
    let written: Result<(), SealError> = workers::for_each(
        workers::threads_for(threads, header.chunk_len()),
        0..header.chunks(),
        || Zeroizing::new(vec![0; header.chunk_len() as usize + TAG_LEN]),
        |buffer, index| {
            let length = header.chunk_plain_len(index);
            let start = index * header.chunk_len();
            plan.read(manifest, start, &mut buffer[..length])?;
            tree.absorb(start, &buffer[..length])
                .expect("padding is written as zeros");
            let tag = payload_key.seal(index, header.is_final(index), &mut buffer[..length]);
            buffer[length..length + TAG_LEN].copy_from_slice(&tag);
            file.write_all_at(&buffer[..length + TAG_LEN], header.chunk_position(index))
                .map_err(|e| at(out, e))?;
            progress.advance(length as u64);
            Ok(())
        },
    );
    progress.end();
    written?;
    // A source that changed between the two readings would give a file that nobody can open.
    if let Some(i) = tree.first_mismatch() {
        return Err(SealError::SourceChanged {
            name: manifest.entry_name(i).to_owned(),
        });
    }
    Ok(Sealed {
        digest,
        file_len: header.file_len(),
        tensors: manifest.tensors().len(),
        public_tensors: manifest
            .tensors()
            .iter()
            .filter(|t| t.access == Access::Public)
            .count(),
    })
}

/// What stands in front of the chunks, and the key for them.
pub(crate) struct Front {
    pub(crate) header: Header,
    pub(crate) digest: ModelDigest,
    pub(crate) payload_key: PayloadKey,
    pub(crate) bytes: Vec<u8>,
}

/// Makes everything that stands in front of the chunks. The manifest is taken as bytes so that tests can put
/// there what no manifest would encode to.
pub(crate) fn front(
    manifest: &[u8],
    payload_len: u64,
    chunk_log2: u8,
    data_key: &DataKey,
    signing_key: &SigningKey,
    fresh: Fresh,
) -> Result<Front, SealError> {
    if manifest.len() > crate::manifest::LARGEST_MANIFEST {
        return Err(ManifestError::TooLarge {
            bytes: manifest.len() as u64,
        }
        .into());
    }
    let digest = digest_of(manifest);
    let keys = FileKeys::derive(data_key, &fresh.salt, &fresh.file_id);
    let header = Header {
        chunk_log2,
        section_len: (PREAMBLE_LEN + manifest.len() + TAG_LEN) as u32,
        payload_len,
        file_id: fresh.file_id,
        salt: fresh.salt,
        commitment: keys.commitment(),
    };
    let header_bytes = header.to_bytes();
    let mut section = Vec::with_capacity(header.section_len as usize);
    section.extend_from_slice(signing_key.verifying_key().as_bytes());
    section.extend_from_slice(&signing_key.sign(SIGNATURE_DOMAIN, digest.as_bytes()).0);
    section.extend_from_slice(manifest);
    keys.manifest_key().seal(&header_bytes, &mut section);
    let mut front = Vec::with_capacity(HEADER_LEN + section.len());
    front.extend_from_slice(&header_bytes);
    front.append(&mut section);
    Ok(Front {
        header,
        digest,
        payload_key: keys.payload_key(&digest),
        bytes: front,
    })
}

/// A source whose entries have their places in the payload, but not yet their digests.
pub(crate) struct Plan<'a> {
    source: Subject<'a>,
    layout: Manifest,
    /// For each entry of the layout, its index in the source's tensors or assets.
    tensors: Vec<usize>,
    assets: Vec<usize>,
}

impl fmt::Debug for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl<'a> Plan<'a> {
    pub(crate) fn new(source: Subject<'a>, options: &SealOptions) -> Result<Self, SealError> {
        let mut used = vec![false; options.public_tensors.len()];
        let mut access = |name: &str| {
            let mut access = Access::Private;
            for (pattern, used) in options.public_tensors.iter().zip(&mut used) {
                if fits_pattern(pattern, name) {
                    (*used, access) = (true, Access::Public);
                }
            }
            access
        };
        let tensors = source.tensors().iter().map(|t| TensorEntry {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            offset: 0,
            size: t.size,
            digest: [0; 32],
            access: access(&t.name),
        });
        let assets = source.assets().iter().map(|(name, bytes)| AssetEntry {
            name: name.clone(),
            offset: 0,
            size: bytes.len() as u64,
            digest: [0; 32],
        });
        let layout = Manifest::lay_out(
            options
                .name
                .clone()
                .unwrap_or_else(|| source.name().to_owned()),
            options.version,
            source.kind(),
            tensors.collect(),
            assets.collect(),
        )?;
        if let Some(i) = used.iter().position(|used| !used) {
            return Err(SealError::NothingPublic {
                pattern: options.public_tensors[i].clone(),
            });
        }
        // The layout is sorted by name and names are unique, so sorting the source the same way pairs them up.
        let mut tensors: Vec<usize> = (0..source.tensors().len()).collect();
        tensors.sort_by_key(|&i| &source.tensors()[i].name);
        let mut assets: Vec<usize> = (0..source.assets().len()).collect();
        assets.sort_by_key(|&i| &source.assets()[i].0);
        Ok(Plan {
            source,
            layout,
            tensors,
            assets,
        })
    }

    /// Reads the whole source and completes the manifest.
    pub(crate) fn with_digests(
        &self,
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<Manifest, SealError> {
        let chunk_len = 1u64 << CHUNK_LOG2;
        let payload_len = self.layout.payload_len();
        let tree = DigestTree::new(self.layout.extents());
        progress.begin(Stage::Digest, payload_len);
        let read = workers::for_each(
            workers::threads_for(threads, chunk_len),
            0..payload_len.div_ceil(chunk_len),
            || Zeroizing::new(vec![0; chunk_len as usize]),
            |buffer, index| {
                let start = index * chunk_len;
                let length = chunk_len.min(payload_len - start);
                let bytes = &mut buffer[..length as usize];
                self.read(&self.layout, start, bytes)?;
                tree.absorb(start, bytes).expect("padding is zeros");
                progress.advance(length);
                Ok::<_, SourceError>(())
            },
        );
        progress.end();
        read?;
        Ok(self.layout.with_digests(&tree.digests()))
    }

    /// Fills `out` with the payload from byte `start` on.
    pub(crate) fn read(
        &self,
        manifest: &Manifest,
        start: u64,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        out.fill(0);
        let end = start + out.len() as u64;
        // The part of an entry that lies in the window, as (bytes into the entry, range of `out`).
        let part = |offset: u64, size: u64| {
            let (from, to) = (offset.max(start), (offset + size).min(end));
            (from < to).then(|| {
                (
                    from - offset,
                    (from - start) as usize..(to - start) as usize,
                )
            })
        };
        let tensors = manifest.tensors();
        let first = tensors.partition_point(|t| t.offset + t.size <= start);
        for (t, &index) in tensors[first..].iter().zip(&self.tensors[first..]) {
            if t.offset >= end {
                return Ok(());
            }
            if let Some((skip, range)) = part(t.offset, t.size) {
                self.source.read_tensor(index, skip, &mut out[range])?;
            }
        }
        for (a, &index) in manifest.assets().iter().zip(&self.assets) {
            if let Some((skip, range)) = part(a.offset, a.size) {
                let skip = skip as usize;
                let bytes = &self.source.assets()[index].1[skip..skip + range.len()];
                out[range].copy_from_slice(bytes);
            }
        }
        Ok(())
    }
}

/// Whether `name` is `pattern`, in which `*` stands for any run of characters.
#[must_use]
pub fn fits_pattern(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.strip_prefix(head).is_some_and(|rest| {
            (0..=rest.len()).any(|i| rest.is_char_boundary(i) && fits_pattern(tail, &rest[i..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, want) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*.weight", "token_embd.weight", true),
            ("*.weight", "blk.0.attn_q.bias", false),
            ("blk.*.attn_*", "blk.11.attn_q.weight", true),
            ("blk.*.attn_*", "blk.11.ffn_up.weight", false),
            ("*", "anything", true),
            ("", "x", false),
        ] {
            assert_eq!(fits_pattern(pattern, name), want, "{pattern} {name}");
        }
    }
}
