//! Opening: from a path to a [`Model`], one checked step after the other, in parallel over chunks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use casemate_kernels::mem::{Purpose, Region};
use zeroize::Zeroizing;

use crate::data_key::DataKey;
use crate::digest::ModelDigest;
use crate::error::{Malformed, NotAuthentic, OpenError};
use crate::header::{HEADER_LEN, Header, PREAMBLE_LEN, TAG_LEN};
use crate::keys::{FileKeys, PayloadKey};
use crate::manifest::{Kind, Manifest, digest_of};
use crate::model::{Adapter, Model};
use crate::progress::{Progress, Stage};
use crate::seal::{SIGNATURE_DOMAIN, threads};
use crate::signing::{Signature, VerifyingKey};
use crate::tree::DigestTree;
use crate::workers;

/// A file that has the shape of a sealed model: header in range, length exact. Nothing of it is authenticated yet.
#[derive(Debug)]
pub struct SealedFile {
    file: File,
    path: PathBuf,
    header: Header,
    header_bytes: [u8; HEADER_LEN],
}

impl SealedFile {
    /// Reads the header and checks the file's length against it.
    ///
    /// # Errors
    /// When the file cannot be read or is malformed.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |error| OpenError::Io {
            path: path.to_owned(),
            error,
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        let found = metadata.len();
        let mut header_bytes = [0; HEADER_LEN];
        let present = found.min(HEADER_LEN as u64) as usize;
        file.read_exact_at(&mut header_bytes[..present], 0)
            .map_err(failed)?;
        // What begins unlike a container is none, however short; what begins like one may be truncated.
        let header = match Header::parse(&header_bytes) {
            Err(e @ OpenError::Malformed(Malformed::NotAContainer)) => return Err(e),
            _ if present < HEADER_LEN => {
                return Err(Malformed::Truncated {
                    expected: HEADER_LEN as u64,
                    found,
                }
                .into());
            }
            parsed => parsed?,
        };
        let expected = header.file_len();
        if found < expected {
            return Err(Malformed::Truncated { expected, found }.into());
        }
        if found > expected {
            return Err(Malformed::TrailingData {
                extra: found - expected,
            }
            .into());
        }
        Ok(SealedFile {
            file,
            path: path.to_owned(),
            header,
            header_bytes,
        })
    }

    /// What can be read without a key.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Decrypts the manifest, requires that `provider` signed it, and checks it.
    ///
    /// # Errors
    /// [`NotAuthentic`] for another key or signer or an altered file, [`Malformed`] for a manifest that is not valid.
    pub fn unlock(
        self,
        data_key: &DataKey,
        provider: &VerifyingKey,
    ) -> Result<Unlocked, OpenError> {
        let Inspected {
            manifest,
            digest,
            signer,
            payload_key,
            file,
        } = self.decrypt_manifest(data_key, Some(provider))?;
        debug_assert_eq!(signer, *provider);
        Ok(Unlocked {
            file,
            manifest,
            digest,
            payload_key,
        })
    }

    /// Decrypts the manifest for looking at, whoever signed it. The signature must be that of the signer that the file
    /// names; whether that is the right one is for the caller to judge. No model can be loaded from the result.
    ///
    /// # Errors
    /// As [`Self::unlock`], apart from the signer.
    pub fn inspect(self, data_key: &DataKey) -> Result<Inspected, OpenError> {
        self.decrypt_manifest(data_key, None)
    }

    fn decrypt_manifest(
        self,
        data_key: &DataKey,
        provider: Option<&VerifyingKey>,
    ) -> Result<Inspected, OpenError> {
        let keys = FileKeys::derive(data_key, &self.header.salt, &self.header.file_id);
        if !keys.commits_to(&self.header.commitment) {
            return Err(NotAuthentic::WrongKey.into());
        }
        let mut section = Zeroizing::new(vec![0; self.header.section_len as usize]);
        self.read_exact_at(&mut section, HEADER_LEN as u64)?;
        let plain = keys
            .manifest_key()
            .open(&self.header_bytes, &mut section)
            .map_err(|_| NotAuthentic::Manifest)?;
        let (preamble, canonical) = plain.split_at(PREAMBLE_LEN);
        let (key, signature) = preamble.split_at(32);
        let signer = VerifyingKey::from_bytes(key.try_into().expect("split at 32"));
        let signature = Signature(signature.try_into().expect("96 - 32 = 64"));
        if let Some(&expected) = provider.filter(|&p| *p != signer) {
            return Err(NotAuthentic::WrongSigner {
                expected,
                found: signer,
            }
            .into());
        }
        let digest = digest_of(canonical);
        signer
            .verify(SIGNATURE_DOMAIN, digest.as_bytes(), &signature)
            .map_err(|_| NotAuthentic::Signature)?;
        let manifest = Manifest::from_cbor(canonical)?;
        if manifest.payload_len() != self.header.payload_len {
            return Err(Malformed::PayloadMismatch {
                header: self.header.payload_len,
                manifest: manifest.payload_len(),
            }
            .into());
        }
        let payload_key = keys.payload_key(&digest);
        Ok(Inspected {
            manifest,
            digest,
            signer,
            payload_key,
            file: self,
        })
    }

    fn read_exact_at(&self, out: &mut [u8], position: u64) -> Result<(), OpenError> {
        self.file
            .read_exact_at(out, position)
            .map_err(|error| match error.kind() {
                // The length was right when the file was opened: it was cut meanwhile.
                io::ErrorKind::UnexpectedEof => Malformed::Truncated {
                    expected: self.header.file_len(),
                    found: self.file.metadata().map_or(0, |m| m.len()),
                }
                .into(),
                _ => OpenError::Io {
                    path: self.path.clone(),
                    error,
                },
            })
    }
}

/// A manifest that was decrypted for looking at. Its signature holds, but nobody has said that the signer is the right
/// one.
pub struct Inspected {
    manifest: Manifest,
    digest: ModelDigest,
    signer: VerifyingKey,
    payload_key: PayloadKey,
    file: SealedFile,
}

impl Inspected {
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What names the model.
    pub fn digest(&self) -> ModelDigest {
        self.digest
    }

    /// Who signed it, by its own account.
    pub fn signer(&self) -> VerifyingKey {
        self.signer
    }
}

/// A sealed file whose manifest is authentic and signed by the expected provider. Its chunks have not been read yet.
pub struct Unlocked {
    file: SealedFile,
    manifest: Manifest,
    digest: ModelDigest,
    payload_key: PayloadKey,
}

impl Unlocked {
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What names the model.
    pub fn digest(&self) -> ModelDigest {
        self.digest
    }

    /// Decrypts every chunk into its final place and recomputes every digest from the bytes there. `threads` 0 = as
    /// many as the machine runs at once.
    ///
    /// # Errors
    /// The first chunk, tensor or asset that is not authentic; bytes hidden between entries; no memory; I/O; or
    /// [`Malformed::OtherKind`] for an adapter.
    pub fn load(self, threads: usize, progress: &dyn Progress) -> Result<Model, OpenError> {
        if let Kind::Adapter(_) = self.manifest.kind() {
            return Err(other_kind("an adapter", "a model"));
        }
        let region = fill_region(&self, &self.manifest, threads, progress)?;
        Ok(Model::verified(self.manifest, self.digest, region))
    }

    /// As [`Self::load`], of an adapter.
    ///
    /// # Errors
    /// As [`Self::load`]; [`Malformed::OtherKind`] for a model.
    pub fn load_adapter(
        self,
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<Adapter, OpenError> {
        if let Kind::Model(_) = self.manifest.kind() {
            return Err(other_kind("a model", "an adapter"));
        }
        let region = fill_region(&self, &self.manifest, threads, progress)?;
        Ok(Adapter::verified(self.manifest, self.digest, region))
    }

    /// Everything that [`Self::load`] verifies, in memory for a few chunks only.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn check(&self, threads: usize, progress: &dyn Progress) -> Result<(), OpenError> {
        let chunks = 0..self.file.header.chunks();
        let scratch = 2 * self.file.header.chunk_len();
        let places = chunks.map(|_| Place::Passing);
        verify(self, &self.manifest, threads, scratch, progress, places)
    }
}

fn other_kind(found: &'static str, wanted: &'static str) -> OpenError {
    Malformed::OtherKind { found, wanted }.into()
}

/// Where the plaintext chunks of a payload come from.
pub(crate) trait Chunks: Sync {
    fn chunk_len(&self) -> u64;
    fn payload_len(&self) -> u64;
    /// Fills `out` with chunk `index`, whose length it has. `scratch` has room for a chunk and its tag.
    fn fetch(&self, index: u64, scratch: &mut [u8], out: &mut [u8]) -> Result<(), OpenError>;
}

impl Chunks for Unlocked {
    fn chunk_len(&self) -> u64 {
        self.file.header.chunk_len()
    }

    fn payload_len(&self) -> u64 {
        self.file.header.payload_len
    }

    fn fetch(&self, index: u64, scratch: &mut [u8], out: &mut [u8]) -> Result<(), OpenError> {
        let header = &self.file.header;
        let sealed = &mut scratch[..out.len() + TAG_LEN];
        self.file
            .read_exact_at(sealed, header.chunk_position(index))?;
        self.payload_key
            .open(index, header.is_final(index), sealed, out)
            .map_err(|_| NotAuthentic::Chunk { index }.into())
    }
}

/// Brings a payload into memory, verified against the manifest. The one loader; [`crate::bench`] runs it without AEAD.
pub(crate) fn fill_region(
    chunks: &dyn Chunks,
    manifest: &Manifest,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Region, OpenError> {
    let bytes = chunks.payload_len();
    let unavailable = |error| OpenError::Memory { bytes, error };
    let length =
        usize::try_from(bytes).map_err(|_| unavailable(io::ErrorKind::OutOfMemory.into()))?;
    let mut region = Region::zeroed(length, Purpose::Weights).map_err(unavailable)?;
    let chunk_len = chunks.chunk_len();
    let places = region.chunks_mut(chunk_len as usize).map(Place::Final);
    verify(chunks, manifest, threads, chunk_len, progress, places)?;
    Ok(region)
}

/// Where a chunk is decrypted to.
enum Place<'a> {
    /// Where it will be used.
    Final(&'a mut [u8]),
    /// A thread's buffer, for the next chunk to take its place.
    Passing,
}

/// Fetches every chunk into its place and verifies digests and padding. A thread needs `scratch` bytes.
fn verify<'a>(
    chunks: &dyn Chunks,
    manifest: &Manifest,
    wanted_threads: usize,
    scratch: u64,
    progress: &dyn Progress,
    places: impl Iterator<Item = Place<'a>> + Send,
) -> Result<(), OpenError> {
    let chunk_len = chunks.chunk_len();
    let tree = DigestTree::new(manifest.extents());
    progress.begin(Stage::Open, chunks.payload_len());
    let fetched = workers::for_each(
        workers::threads_for(threads(wanted_threads), scratch),
        (0..).zip(places),
        // Ciphertext in the first, plaintext in the second, which grows only where it is used.
        || {
            (
                vec![0; chunk_len as usize + TAG_LEN],
                Zeroizing::new(Vec::new()),
            )
        },
        |(sealed, passing), (index, place)| {
            let start = index * chunk_len;
            let out = match place {
                Place::Final(out) => out,
                Place::Passing => {
                    let length = chunk_len.min(chunks.payload_len() - start);
                    passing.resize(length as usize, 0);
                    passing.as_mut_slice()
                }
            };
            chunks.fetch(index, sealed, out)?;
            tree.absorb(start, out)
                .map_err(|gap| Malformed::Padding { offset: gap.offset })?;
            progress.advance(out.len() as u64);
            Ok::<_, OpenError>(())
        },
    );
    progress.end();
    fetched?;
    match tree.first_mismatch() {
        None => Ok(()),
        Some(i) => {
            let name = manifest.entry_name(i).to_owned();
            Err(match i < manifest.tensors().len() {
                true => NotAuthentic::Tensor { name },
                false => NotAuthentic::Asset { name },
            }
            .into())
        }
    }
}
