//! What a model must offer to be sealed. Importers of other formats implement it.

use crate::adapter::AdapterConfig;
use crate::config::ModelConfig;
use crate::dtype::DType;

/// One tensor of a source, under its canonical (GGUF) name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// Canonical name, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// Element encoding.
    pub dtype: DType,
    /// Row-major, outermost first: `[rows (out), columns (in)]`.
    pub shape: Vec<u64>,
    /// Bytes; equals `dtype.bytes_for(shape)`.
    pub size: u64,
}

/// A source failed while tensors were read from it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Reading failed.
    #[error("reading {tensor} failed")]
    Io {
        /// Tensor that was being read.
        tensor: String,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
    /// The tensor ends before the bytes that were asked for.
    #[error("{tensor} ends early")]
    Short {
        /// Tensor that was being read.
        tensor: String,
    },
}

/// A model in the clear, ready to be sealed: configuration, tensors and assets, all already checked by the importer.
///
/// Ranges of tensors are read from several threads at once and more than once (digests first, encryption after),
/// so that no tensor need ever be in memory whole.
pub trait ModelSource: Send + Sync {
    /// Name to seal under unless the provider gives another.
    fn name(&self) -> &str;
    /// Architecture.
    fn config(&self) -> &ModelConfig;
    /// Tensors in any order; names are unique.
    fn tensors(&self) -> &[SourceTensor];
    /// Fills `out` with the bytes of tensor `index` (of [`Self::tensors`]) from byte `offset` on.
    ///
    /// # Errors
    /// When the bytes cannot be read. `out` then holds anything.
    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError>;
    /// Assets as (name, bytes): `tokenizer.json` and, where present, `chat_template.jinja`, `config.json`,
    /// `generation_config.json`.
    fn assets(&self) -> &[(String, Vec<u8>)];
}

/// An adapter in the clear, ready to be sealed; as [`ModelSource`], but it has no assets.
pub trait AdapterSource: Send + Sync {
    /// Name to seal under unless the provider gives another.
    fn name(&self) -> &str;
    /// What it is, and for which base.
    fn config(&self) -> &AdapterConfig;
    /// Tensors in any order; names are unique.
    fn tensors(&self) -> &[SourceTensor];
    /// As [`ModelSource::read_tensor`].
    ///
    /// # Errors
    /// When the bytes cannot be read. `out` then holds anything.
    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError>;
}
