//! Why a container is refused or could not be made, sorted by who is at fault.

use std::io;
use std::path::PathBuf;

use crate::manifest::ManifestError;
use crate::signing::VerifyingKey;
use crate::source::SourceError;

/// A sealed file does not become a model.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file is not what the specification describes; no key would help.
    #[error("malformed container: {0}")]
    Malformed(#[from] Malformed),
    /// The file is well formed, but not the one that the keys in hand stand for.
    #[error("not authentic: {0}")]
    NotAuthentic(#[from] NotAuthentic),
    /// The memory for the model is not to be had.
    #[error("{bytes} bytes of memory for the model are not available")]
    Memory {
        /// How many bytes were asked for.
        bytes: u64,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// Reading failed.
    #[error("reading {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// How a file departs from the specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It does not begin as a container does.
    #[error("this is not a sealed model")]
    NotAContainer,
    /// A later format.
    #[error("format {found} is not known to this program")]
    Format {
        /// Value of the field.
        found: u16,
    },
    /// A later set of algorithms.
    #[error("suite {found} is not known to this program")]
    Suite {
        /// Value of the field.
        found: u8,
    },
    /// Chunks smaller or larger than the specification allows.
    #[error("chunks of 2^{log2} bytes")]
    ChunkSize {
        /// Value of the field.
        log2: u8,
    },
    /// The manifest section is shorter or longer than any can be.
    #[error("a manifest section of {found} bytes")]
    ManifestLength {
        /// Value of the field.
        found: u32,
    },
    /// The payload is empty or longer than any can be.
    #[error("a payload of {found} bytes")]
    PayloadLength {
        /// Value of the field.
        found: u64,
    },
    /// The file ends before it should.
    #[error("the file is truncated: {found} of {expected} bytes")]
    Truncated {
        /// Length that the header implies (104 where the header itself is incomplete).
        expected: u64,
        /// Length of the file.
        found: u64,
    },
    /// The file goes on after its final chunk.
    #[error("{extra} bytes follow the final chunk")]
    TrailingData {
        /// How many.
        extra: u64,
    },
    /// Header and manifest disagree on the length of the payload.
    #[error("the header states a payload of {header} bytes, the manifest one of {manifest}")]
    PayloadMismatch {
        /// What the header says.
        header: u64,
        /// What the manifest's entries add up to.
        manifest: u64,
    },
    /// The manifest is refused.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A model where an adapter is wanted, or an adapter where a model is.
    #[error("this is {found}, where {wanted} belongs")]
    OtherKind {
        /// What it is.
        found: &'static str,
        /// What belongs there.
        wanted: &'static str,
    },
    /// Bytes between two entries are not zero.
    #[error("bytes between entries are not zero near payload byte {offset}")]
    Padding {
        /// First byte of the gap, in the payload.
        offset: u64,
    },
}

/// What does not fit together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAuthentic {
    /// The data key is another file's, or the header was altered.
    #[error("the data key does not belong to this file (or its header was altered)")]
    WrongKey,
    /// Header or manifest section were altered.
    #[error("the header or the encrypted manifest was altered")]
    Manifest,
    /// Signed by somebody else.
    #[error("signed by {found}, expected {expected}")]
    WrongSigner {
        /// The provider that was expected.
        expected: VerifyingKey,
        /// Who the file says signed it.
        found: VerifyingKey,
    },
    /// The signature is not the stated signer's over this model.
    #[error("the provider's signature does not verify")]
    Signature,
    /// A chunk was altered, moved, or comes from another file.
    #[error("chunk {index} was altered, moved, or belongs to another file")]
    Chunk {
        /// The first such chunk.
        index: u64,
    },
    /// A tensor's bytes are not those that the manifest names.
    #[error("tensor `{name}` does not have the digest that the manifest states")]
    Tensor {
        /// The first such tensor.
        name: String,
    },
    /// An asset's bytes are not those that the manifest names.
    #[error("asset `{name}` does not have the digest that the manifest states")]
    Asset {
        /// The first such asset.
        name: String,
    },
}

impl OpenError {
    /// A stable word for this error, as used by test vectors and `--json`.
    pub fn code(&self) -> &'static str {
        match self {
            OpenError::Malformed(m) => match m {
                Malformed::NotAContainer => "not-a-container",
                Malformed::Format { .. } => "format",
                Malformed::Suite { .. } => "suite",
                Malformed::ChunkSize { .. } => "chunk-size",
                Malformed::ManifestLength { .. } => "manifest-length",
                Malformed::PayloadLength { .. } => "payload-length",
                Malformed::Truncated { .. } => "truncated",
                Malformed::TrailingData { .. } => "trailing-data",
                Malformed::PayloadMismatch { .. } => "payload-mismatch",
                Malformed::Manifest(m) => m.code(),
                Malformed::OtherKind { .. } => "other-kind",
                Malformed::Padding { .. } => "padding",
            },
            OpenError::NotAuthentic(n) => match n {
                NotAuthentic::WrongKey => "wrong-key",
                NotAuthentic::Manifest => "manifest-altered",
                NotAuthentic::WrongSigner { .. } => "wrong-signer",
                NotAuthentic::Signature => "signature",
                NotAuthentic::Chunk { .. } => "chunk",
                NotAuthentic::Tensor { .. } => "tensor-digest",
                NotAuthentic::Asset { .. } => "asset-digest",
            },
            OpenError::Memory { .. } => "memory",
            OpenError::Io { .. } => "io",
        }
    }
}

impl From<ManifestError> for OpenError {
    fn from(error: ManifestError) -> Self {
        OpenError::Malformed(Malformed::Manifest(error))
    }
}

impl ManifestError {
    /// A stable word for this error, as used by test vectors and `--json`.
    pub fn code(&self) -> &'static str {
        match self {
            ManifestError::TooLarge { .. } => "manifest-too-large",
            ManifestError::NotAManifest => "not-a-manifest",
            ManifestError::NotCanonical => "not-canonical",
            ManifestError::Format { .. } => "manifest-format",
            ManifestError::ModelName => "model-name",
            ManifestError::Kind => "manifest-kind",
            ManifestError::Adapter { .. } => "adapter",
            ManifestError::Config { .. } => "config",
            ManifestError::Count { .. } => "entry-count",
            ManifestError::EntryName { .. } => "entry-name",
            ManifestError::Order { .. } => "entry-order",
            ManifestError::Rank { .. } => "tensor-rank",
            ManifestError::Size { .. } => "entry-size",
            ManifestError::Overlap { .. } => "entry-overlap",
            ManifestError::Gap { .. } => "entry-gap",
            ManifestError::PayloadTooLarge => "payload-too-large",
        }
    }
}

/// A model could not be sealed. Whatever stood at the output path is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The model cannot be described by a manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A pattern was to make tensors public but fits none.
    #[error("no tensor matches the public pattern `{pattern}`")]
    NothingPublic {
        /// The pattern.
        pattern: String,
    },
    /// Reading the model failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The model changed while it was being sealed.
    #[error("`{name}` changed while the model was being sealed")]
    SourceChanged {
        /// The first tensor that differs.
        name: String,
    },
    /// Something stands at the output path already.
    #[error("{} exists already and was left as it is", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// Writing failed.
    #[error("writing {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// An error and its causes on one line, each once: some messages quote their cause already.
#[must_use]
pub fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line
}

#[cfg(test)]
mod one_line_tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{words}")]
    struct Outer {
        words: &'static str,
        source: io::Error,
    }

    #[test]
    fn a_cause_is_told_once() {
        let told = |words| {
            let source = io::Error::other("disk full");
            one_line(&Outer { words, source })
        };
        assert_eq!(told("cannot write"), "cannot write: disk full");
        assert_eq!(told("cannot write: disk full"), "cannot write: disk full");
    }
}
