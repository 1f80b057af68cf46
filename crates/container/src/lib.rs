//! The sealed model format: manifest, digests, chunked AEAD, signatures.
//!
//! A model is *sealed* by its provider into one file (`*.casemate`) and *opened* by the enclave that was
//! released the data key. The byte layout is specified in `docs/container-format.md`; this crate is its
//! implementation and holds nothing else: it reads no GGUF and no safetensors (see `casemate_import`), runs no
//! model and opens no socket.
//!
//! The road from a path to weights is one way, and every step is a type that only the step before can make:
//!
//! ```text
//! SealedFile::open(path)          layout is well formed, length is exact      (no key needed)
//!   └─ .unlock(key, provider)     key commitment, manifest AEAD, canonical CBOR, limits, signature
//!        └─ Unlocked::load(..)    every chunk authentic, every tensor and asset digest recomputed
//!             └─ Model                                        (of an adapter: load_adapter, Adapter)
//! ```

#![forbid(unsafe_code)]

mod adapter;
pub mod atomic_file;
pub mod bench;
mod config;
mod data_key;
mod digest;
mod dtype;
mod error;
mod header;
mod key_file;
mod keys;
mod manifest;
mod model;
mod open;
mod progress;
mod seal;
pub mod signing;
mod source;
mod tree;
#[cfg(test)]
mod vectors;
mod workers;

pub use adapter::{
    AdapterConfig, AdapterMismatch, AdapterTensor, Factor, MAX_RANK, Target, reordered_row,
};
pub use config::{Family, ModelConfig, RopeLayout, RopeScaling};
pub use data_key::DataKey;
pub use digest::{DigestParseError, ModelDigest};
pub use dtype::{DType, UnknownDType};
pub use error::{Malformed, NotAuthentic, OpenError, SealError, one_line};
pub use header::Header;
pub use key_file::KeyFileError;
pub use manifest::{Access, AssetEntry, Kind, Manifest, ManifestError, TensorEntry};
pub use model::{Adapter, Model, TensorRef};
pub use open::{Inspected, SealedFile, Unlocked};
pub use progress::{Progress, Silent, Stage};
pub use seal::{SealOptions, Sealed, fits_pattern, seal, seal_adapter};
pub use source::{AdapterSource, ModelSource, SourceError, SourceTensor};
