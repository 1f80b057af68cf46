//! GGUF files and Hugging Face directories, parsed with limits into tensors, configuration and tokenizer.
//!
//! [`open`] accepts either and returns a [`ModelSource`]: canonical tensor names (GGUF's), one typed
//! configuration, and assets, among which there is always a `tokenizer.json`. Everything in front of the tensor data
//! is checked here; the data themselves are read on demand, one tensor at a time, so that a model larger than
//! memory can be sealed.
//!
//! [`open_adapter`] does the same with a LoRA adapter as PEFT saves it.
//!
//! Files come from strangers: every count and length is checked against a limit and against the file before
//! anything is allocated, and what this crate does not understand it refuses by name ([`ImportError`]).
//!
//! Not here: sealing (`container`), decoding of quantised blocks and running of tokenizers (`engine`).

#![forbid(unsafe_code)]

mod architecture;
mod error;
mod gguf;
mod huggingface;
mod source;
#[cfg(test)]
mod test_data;
mod tokenizer;

use std::path::Path;

use casemate_container::{AdapterSource, ModelConfig, ModelDigest, ModelSource};

pub use self::error::{Fault, ImportError, Missing, Unsupported};

/// The asset that holds the tokenizer, in the form of the `tokenizers` library. Always present.
pub const TOKENIZER_JSON: &str = "tokenizer.json";
/// The asset that holds the chat template, a Jinja text. Present where the model has one.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The asset that holds a directory's `config.json` as found.
pub const CONFIG_JSON: &str = "config.json";
/// The asset that holds a directory's `generation_config.json` as found.
pub const GENERATION_CONFIG_JSON: &str = "generation_config.json";

/// Opens the model at `path`: a GGUF file or a Hugging Face directory.
///
/// # Errors
/// [`ImportError`] names the file, what is wrong with it and, where there is one, the remedy.
pub fn open(path: &Path) -> Result<Box<dyn ModelSource>, ImportError> {
    let kind = std::fs::metadata(path).map_err(|e| ImportError::io(path, e))?;
    if kind.is_dir() {
        huggingface::open(path).map(|model| Box::new(model) as _)
    } else if kind.is_file() {
        gguf::open(path).map(|model| Box::new(model) as _)
    } else {
        Err(ImportError::unsupported(path, Unsupported::FileKind))
    }
}

/// Opens the LoRA adapter at `path`, a directory as PEFT saves it, as one to the model `base`. Its tensors are held
/// against that model's architecture where it is given.
///
/// # Errors
/// [`ImportError`], as [`open`].
pub fn open_adapter(
    path: &Path,
    base: ModelDigest,
    architecture: Option<&ModelConfig>,
) -> Result<Box<dyn AdapterSource>, ImportError> {
    huggingface::adapter::open(path, base, architecture)
}
