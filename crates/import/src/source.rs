//! The result of an import: a [`ModelSource`] over open files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use casemate_container::{ModelConfig, ModelSource, SourceError, SourceTensor};

/// The longest model name.
const MAX_NAME: usize = 128;

/// A checked model whose tensors are still in its files.
#[derive(Debug)]
pub(crate) struct Imported {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) tensors: Vec<SourceTensor>,
    /// Where each tensor lies, in the order of `tensors`.
    pub(crate) places: Vec<Place>,
    pub(crate) files: Vec<(PathBuf, File)>,
    pub(crate) assets: Vec<(String, Vec<u8>)>,
}

/// The first byte of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Index into [`Imported::files`].
    pub(crate) file: usize,
    pub(crate) offset: u64,
}

impl ModelSource for Imported {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        let place = self.places[index];
        read_range(
            &self.files[place.file].1,
            place.offset,
            &self.tensors[index],
            offset,
            out,
        )
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &self.assets
    }
}

/// Fills `out` from byte `offset` of a tensor on, which lies at `start` of `file`: the import checked that it ends there.
pub(crate) fn read_range(
    file: &File,
    start: u64,
    tensor: &SourceTensor,
    offset: u64,
    out: &mut [u8],
) -> Result<(), SourceError> {
    let short = || SourceError::Short {
        tensor: tensor.name.clone(),
    };
    let within = offset
        .checked_add(out.len() as u64)
        .is_some_and(|end| end <= tensor.size);
    if !within {
        return Err(short());
    }
    file.read_exact_at(out, start + offset)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => short(),
            _ => SourceError::Io {
                tensor: tensor.name.clone(),
                error,
            },
        })
}

/// A name for the model: what the file calls it, if that is short and printable, or else the path's last part.
pub(crate) fn model_name(stated: Option<&str>, path: &Path) -> String {
    let usable = |name: &&str| {
        !name.trim().is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control)
    };
    stated
        .filter(usable)
        .map(|name| name.trim().to_owned())
        .or_else(|| {
            let path = path.canonicalize().ok()?;
            let part = if path.is_dir() {
                path.file_name()
            } else {
                path.file_stem()
            };
            part.and_then(|part| part.to_str())
                .filter(usable)
                .map(str::to_owned)
        })
        .unwrap_or_else(|| "model".to_owned())
}
