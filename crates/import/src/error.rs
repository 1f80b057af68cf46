//! Why an import failed, sorted by who can mend it: the file is malformed, it wants something Casemate does not
//! do, a part of it is missing, or the machine could not read it.
//!
//! Variants carry data; the words for a person are made in `Display`, with the file in front and, where there is
//! one, the remedy behind.

use std::fmt;
use std::path::{Path, PathBuf};

use casemate_container::AdapterMismatch;

/// The reason that a model could not be imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file contradicts its format or itself; get a good copy.
    #[error("{}: {fault}", path.display())]
    Malformed {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong in it.
        fault: Fault,
    },
    /// The file is in order but needs something that Casemate does not have.
    #[error("{}: {need}", path.display())]
    Unsupported {
        /// The file that asks for it.
        path: PathBuf,
        /// What it asks for.
        need: Unsupported,
    },
    /// A necessary part is absent.
    #[error("{}: {part}", path.display())]
    Missing {
        /// The file or directory that lacks it.
        path: PathBuf,
        /// What it lacks.
        part: Missing,
    },
    /// The operating system refused to open or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file that was being read.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
}

impl ImportError {
    pub(crate) fn malformed(path: &Path, fault: Fault) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            fault,
        }
    }

    pub(crate) fn unsupported(path: &Path, need: Unsupported) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            need,
        }
    }

    pub(crate) fn missing(path: &Path, part: Missing) -> Self {
        Self::Missing {
            path: path.to_owned(),
            part,
        }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// A fault of one file, before its path is known.
#[derive(Debug)]
pub(crate) enum Problem {
    Malformed(Fault),
    Unsupported(Unsupported),
    Missing(Missing),
    Io(std::io::Error),
}

impl Problem {
    pub(crate) fn at(self, path: &Path) -> ImportError {
        match self {
            Self::Malformed(fault) => ImportError::malformed(path, fault),
            Self::Unsupported(need) => ImportError::unsupported(path, need),
            Self::Missing(part) => ImportError::missing(path, part),
            Self::Io(source) => ImportError::io(path, source),
        }
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        Self::Malformed(fault)
    }
}

impl From<Unsupported> for Problem {
    fn from(need: Unsupported) -> Self {
        Self::Unsupported(need)
    }
}

impl From<Missing> for Problem {
    fn from(part: Missing) -> Self {
        Self::Missing(part)
    }
}

impl From<std::io::Error> for Problem {
    fn from(source: std::io::Error) -> Self {
        Self::Io(source)
    }
}

/// What is wrong in a malformed file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are named for what they hold")]
pub enum Fault {
    /// The first four bytes are not `GGUF`.
    NotGguf { magic: [u8; 4] },
    /// The file ends inside `what`.
    Truncated {
        what: &'static str,
        offset: u64,
        wanted: u64,
        available: u64,
    },
    /// A count exceeds its limit.
    TooMany {
        what: &'static str,
        count: u64,
        limit: u64,
    },
    /// A length in bytes exceeds its limit.
    TooLong {
        what: &'static str,
        length: u64,
        limit: u64,
    },
    /// Text that is not UTF-8.
    NotUtf8 { what: &'static str, offset: u64 },
    /// A metadata array whose elements are arrays.
    NestedArray { key: String },
    /// A metadata value type that the format does not define.
    UnknownValueType { key: String, code: u32 },
    /// A Boolean that is neither 0 nor 1.
    InvalidBool { key: String, value: u8 },
    /// The same metadata key, JSON key or tokenizer entry twice.
    DuplicateKey { key: String },
    /// The same tensor twice.
    DuplicateTensor { tensor: String },
    /// Two tokens with the same text.
    DuplicateToken { token: String, ids: (u64, u64) },
    /// A metadata value of another type than its key demands.
    WrongType { key: String, expected: &'static str },
    /// A value outside what is possible.
    OutOfRange { key: String, value: String },
    /// An alignment that is not a power of two.
    Alignment { alignment: u64 },
    /// A tensor without dimensions, or with more than four.
    DimensionCount { tensor: String, count: u64 },
    /// A dimension of zero, or dimensions whose product does not fit.
    Dimensions {
        tensor: String,
        dimensions: Vec<u64>,
    },
    /// Rows that are not a whole number of quantisation blocks.
    PartialBlock {
        tensor: String,
        columns: u64,
        block: u64,
    },
    /// A tensor that does not begin on the file's alignment.
    Misaligned {
        tensor: String,
        offset: u64,
        alignment: u64,
    },
    /// A tensor that reaches past the end of its file.
    OutOfBounds {
        tensor: String,
        offset: u64,
        size: u64,
        available: u64,
    },
    /// Two tensors that share bytes.
    Overlap { first: String, second: String },
    /// Bytes that belong to no tensor, in a format that allows none.
    Hole { offset: u64, size: u64 },
    /// A tensor whose byte length disagrees with its shape and type.
    WrongSize {
        tensor: String,
        found: u64,
        expected: u64,
    },
    /// A tensor whose shape disagrees with the configuration.
    WrongShape {
        tensor: String,
        found: Vec<u64>,
        expected: Vec<u64>,
    },
    /// JSON that does not parse, or does not have the expected shape.
    Json {
        what: &'static str,
        line: usize,
        column: usize,
        reason: String,
    },
    /// A number of the architecture with which no model can run, by its name in `ModelConfig`.
    Configuration { field: &'static str },
    /// Two statements that cannot both be true.
    Contradiction { first: String, second: String },
    /// A shard name that is not a plain file name.
    ShardName { name: String },
    /// A tensor that lies in another shard than the index says.
    WrongShard {
        tensor: String,
        found: String,
        expected: Option<String>,
    },
    /// A protobuf message that does not parse.
    Protobuf { offset: u64, reason: &'static str },
    /// A line of a tiktoken vocabulary that does not parse.
    Tiktoken { line: usize, reason: &'static str },
    /// A merge rule that names a token outside the vocabulary.
    Merge { index: usize, rule: String },
    /// A token id outside the vocabulary.
    TokenId {
        what: &'static str,
        id: u64,
        vocabulary: u64,
    },
    /// The tokenizer library refuses the tokenizer.
    Tokenizer { reason: String },
    /// Tensors that are not those of an adapter, or not of one to this base.
    Adapter { mismatch: AdapterMismatch },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotGguf { magic } => {
                write!(
                    f,
                    "not a GGUF file: it begins with the bytes {magic:02x?}, not with \"GGUF\""
                )
            }
            Self::Truncated {
                what,
                offset,
                wanted,
                available,
            } => write!(
                f,
                "the file ends inside {what}: {wanted} bytes are announced at offset {offset}, {available} are \
                 left; copy or download the file again"
            ),
            Self::TooMany { what, count, limit } => {
                write!(
                    f,
                    "{count} {what} are announced, at most {limit} are accepted"
                )
            }
            Self::TooLong {
                what,
                length,
                limit,
            } => write!(
                f,
                "{what} of {length} bytes is announced, at most {limit} are accepted"
            ),
            Self::NotUtf8 { what, offset } => write!(f, "{what} at offset {offset} is not UTF-8"),
            Self::NestedArray { key } => write!(f, "metadata `{key}` is an array of arrays"),
            Self::UnknownValueType { key, code } => {
                write!(
                    f,
                    "metadata `{key}` has the value type {code}, which GGUF does not define"
                )
            }
            Self::InvalidBool { key, value } => {
                write!(
                    f,
                    "metadata `{key}` holds {value} where a Boolean is 0 or 1"
                )
            }
            Self::DuplicateKey { key } => write!(f, "`{key}` appears twice"),
            Self::DuplicateTensor { tensor } => write!(f, "tensor `{tensor}` appears twice"),
            Self::DuplicateToken { token, ids } => {
                write!(
                    f,
                    "the tokens {} and {} have the same text {token:?}",
                    ids.0, ids.1
                )
            }
            Self::WrongType { key, expected } => write!(f, "`{key}` is not {expected}"),
            Self::OutOfRange { key, value } => write!(f, "`{key}` is {value}, which is impossible"),
            Self::Alignment { alignment } => write!(
                f,
                "an alignment of {alignment} is announced; it must be a power of two and at most {}",
                crate::gguf::MAX_ALIGNMENT
            ),
            Self::DimensionCount { tensor, count } => {
                write!(
                    f,
                    "tensor `{tensor}` has {count} dimensions; 1 to 4 are possible"
                )
            }
            Self::Dimensions { tensor, dimensions } => {
                write!(
                    f,
                    "tensor `{tensor}` has the impossible dimensions {dimensions:?}"
                )
            }
            Self::PartialBlock {
                tensor,
                columns,
                block,
            } => write!(
                f,
                "tensor `{tensor}` has rows of {columns} values, not a multiple of its blocks of {block}"
            ),
            Self::Misaligned {
                tensor,
                offset,
                alignment,
            } => write!(
                f,
                "tensor `{tensor}` begins at {offset}, which is not a multiple of the alignment {alignment}"
            ),
            Self::OutOfBounds {
                tensor,
                offset,
                size,
                available,
            } => write!(
                f,
                "tensor `{tensor}` should occupy {size} bytes from {offset} of the data, of which the file has \
                 {available}; copy or download the file again"
            ),
            Self::Overlap { first, second } => {
                write!(f, "the tensors `{first}` and `{second}` overlap")
            }
            Self::Hole { offset, size } => {
                write!(
                    f,
                    "{size} bytes at {offset} of the data belong to no tensor"
                )
            }
            Self::WrongSize {
                tensor,
                found,
                expected,
            } => write!(
                f,
                "tensor `{tensor}` has {found} bytes; its shape and type make {expected}"
            ),
            Self::WrongShape {
                tensor,
                found,
                expected,
            } => write!(
                f,
                "tensor `{tensor}` has the shape {found:?}; the configuration makes it {expected:?}"
            ),
            Self::Json {
                what,
                line,
                column,
                reason,
            } => write!(
                f,
                "{what} is not the expected JSON, line {line} column {column}: {reason}"
            ),
            Self::Configuration { field } => {
                write!(f, "the architecture's `{field}` is impossible")
            }
            Self::Contradiction { first, second } => write!(f, "{first}, but {second}"),
            Self::ShardName { name } => write!(
                f,
                "the index names the shard {name:?}, which is not a plain name ending in .safetensors"
            ),
            Self::WrongShard {
                tensor,
                found,
                expected: Some(expected),
            } => write!(
                f,
                "tensor `{tensor}` lies in {found}, while the index says {expected}"
            ),
            Self::WrongShard {
                tensor,
                found,
                expected: None,
            } => write!(
                f,
                "tensor `{tensor}` lies in {found}, but the index does not know it"
            ),
            Self::Protobuf { offset, reason } => {
                write!(f, "not a SentencePiece model: {reason} at offset {offset}")
            }
            Self::Tiktoken { line, reason } => {
                write!(f, "not a tiktoken vocabulary: {reason} in line {line}")
            }
            Self::Merge { index, rule } => write!(
                f,
                "merge rule {index}, {rule:?}, is not two tokens whose joined text is a token"
            ),
            Self::TokenId {
                what,
                id,
                vocabulary,
            } => write!(
                f,
                "{what} is token {id}, which the vocabulary of {vocabulary} tokens does not have"
            ),
            Self::Tokenizer { reason } => write!(f, "the tokenizer does not load: {reason}"),
            Self::Adapter { mismatch } => mismatch.fmt(f),
        }
    }
}

/// What a file asks for that Casemate does not have.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are named for what they hold")]
pub enum Unsupported {
    /// Neither a GGUF file nor a directory.
    FileKind,
    /// A GGUF version other than 2 and 3.
    GgufVersion { version: u32 },
    /// A GGUF file for big-endian machines.
    BigEndian,
    /// A model split over several GGUF files.
    SplitGguf { parts: u64 },
    /// An architecture outside the Llama family.
    Architecture { name: String },
    /// A tensor type without a kernel or decoder.
    TensorType { tensor: String, name: String },
    /// A tensor that the architecture does not have.
    UnknownTensor { tensor: String },
    /// A setting with a value that the engine cannot honour.
    Setting { key: String, value: String },
    /// A kind of tokenizer.
    TokenizerModel { name: String },
    /// A pre-tokenizer of a byte-level BPE vocabulary.
    PreTokenizer { name: String },
    /// Pieces whose scores do not order their merges.
    UnrankedPieces { results: usize, scores: usize },
    /// A piece made of characters that are not pieces themselves.
    OrphanPiece { piece: String },
    /// Weights in a format other than safetensors.
    WeightFormat { file: String },
    /// An adapter where a model is asked for.
    Adapter,
    /// A tensor of an adapter that is not a factor of a product.
    AdapterTensor { tensor: String },
    /// A regular expression over names of modules, and tensors that are not of the same modules in every block.
    ModulePattern { key: String, pattern: String },
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FileKind => f.write_str("neither a GGUF file nor a Hugging Face model directory"),
            Self::GgufVersion { version } => {
                write!(f, "GGUF version {version}; versions 2 and 3 are supported")
            }
            Self::BigEndian => {
                f.write_str("a big-endian GGUF file; only little-endian ones are supported")
            }
            Self::SplitGguf { parts } => write!(
                f,
                "one of {parts} parts of a split model; join them first with llama-gguf-split --merge"
            ),
            Self::Architecture { name } => write!(
                f,
                "architecture {name:?} is not supported; supported are llama and qwen2 in GGUF and {} in \
                 Hugging Face directories",
                crate::huggingface::ARCHITECTURES
            ),
            Self::TensorType { tensor, name } => write!(
                f,
                "tensor `{tensor}` has the type {name}; supported are {}",
                crate::gguf::SUPPORTED_TYPES
            ),
            Self::UnknownTensor { tensor } => {
                write!(f, "tensor `{tensor}` has no place in this architecture")
            }
            Self::Setting { key, value } => write!(f, "`{key}` = {value} is not supported"),
            Self::TokenizerModel { name } => write!(f, "tokenizer kind {name:?} is not supported"),
            Self::PreTokenizer { name } => write!(
                f,
                "pre-tokenizer {name:?} is not supported; supported are {}",
                crate::tokenizer::split::NAMES
            ),
            Self::UnrankedPieces { results, scores } => write!(
                f,
                "{results} pieces share {scores} scores, which do not order their merges; convert the model \
                 again from its tokenizer.model"
            ),
            Self::OrphanPiece { piece } => write!(
                f,
                "piece {piece:?} is made of characters that are not pieces themselves"
            ),
            Self::WeightFormat { file } => write!(
                f,
                "the weights are in {file}; only safetensors are read, so convert them first"
            ),
            Self::Adapter => f.write_str(
                "this is a LoRA adapter and no model; seal it with `casemate seal --adapter DIR --base MODEL`",
            ),
            Self::AdapterTensor { tensor } => write!(
                f,
                "tensor `{tensor}` is not lora_A or lora_B of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or \
                 down_proj; adapters of other modules, embeddings, biases or magnitudes (DoRA) are not supported"
            ),
            Self::ModulePattern { key, pattern } => write!(
                f,
                "`{key}` is the regular expression {pattern:?}, which is not evaluated here, and there are tensors for \
                 some modules in some blocks only: write the names of the adapter's modules as a list into \
                 `target_modules`, in full where they differ from block to block, and leave `exclude_modules` empty"
            ),
        }
    }
}

/// A necessary part that is absent.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are named for what they hold")]
pub enum Missing {
    /// A metadata or configuration key.
    Key { key: String },
    /// A tensor of the architecture.
    Tensor { tensor: String },
    /// A file of the directory.
    File { name: String },
    /// A shard that the index names.
    Shard { name: String },
    /// A tensor that the index promises and its shard lacks.
    IndexedTensor { tensor: String, shard: String },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key { key } => write!(f, "`{key}` is missing"),
            Self::Tensor { tensor } => write!(f, "tensor `{tensor}` is missing"),
            Self::File { name } => write!(f, "there is no {name} in this directory"),
            Self::Shard { name } => write!(f, "the index names the shard {name}, which is absent"),
            Self::IndexedTensor { tensor, shard } => {
                write!(
                    f,
                    "tensor `{tensor}` is missing from {shard}, where the index places it"
                )
            }
        }
    }
}
