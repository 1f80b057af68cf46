//! Reading small files of a model directory whole, under limits, with their paths in the errors.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Fault, ImportError, Missing, Problem};

/// The largest settings file. Real ones have a few kilobytes; tokenizer_config.json of Llama 3 has 50.
pub(super) const MAX_SETTINGS: u64 = 4 << 20;
/// The largest tokenizer file. Llama 3's tokenizer.json has 17 MB.
pub(super) const MAX_TOKENIZER: u64 = 64 << 20;
/// The largest index of shards. Llama 3.1 405B's has 100 kB.
pub(super) const MAX_INDEX: u64 = 16 << 20;

/// A model directory.
pub(super) struct Directory<'a> {
    path: &'a Path,
}

impl<'a> Directory<'a> {
    pub(super) fn new(path: &'a Path) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        self.path
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The contents of `name`, if it exists.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ImportError> {
        let path = self.file(name);
        let io = |e| ImportError::io(&path, e);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > limit {
            return Err(ImportError::malformed(
                &path,
                Fault::TooLong {
                    what: "a file",
                    length: bytes.len() as u64,
                    limit,
                },
            ));
        }
        Ok(Some(bytes))
    }

    /// The contents of `name`, which must exist.
    pub(super) fn require(&self, name: &str, limit: u64) -> Result<Vec<u8>, ImportError> {
        self.read(name, limit)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn missing(&self, name: &str) -> ImportError {
        ImportError::missing(
            self.path,
            Missing::File {
                name: name.to_owned(),
            },
        )
    }

    /// Puts the path of `name` to a problem.
    pub(super) fn explain<T>(
        &self,
        name: &str,
        result: Result<T, Problem>,
    ) -> Result<T, ImportError> {
        result.map_err(|problem| problem.at(&self.file(name)))
    }
}

/// `error` of the JSON library about `what`.
pub(super) fn json_fault(what: &'static str, error: &serde_json::Error) -> Problem {
    Fault::Json {
        what,
        line: error.line(),
        column: error.column(),
        reason: error.to_string(),
    }
    .into()
}
