//! Opening the file that a command was given as a sealed model, and saying what it is if it is none.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::anyhow;
use casemate_container::{Malformed, OpenError, SealedFile};

use crate::exit::{Class, Failure};
use crate::explain::kinds;

const SEALED: &[u8] = b"\x89CSMT";

/// Opens a sealed model.
pub(crate) fn open(path: &Path) -> Result<SealedFile, Failure> {
    SealedFile::open(path).map_err(|error| match error {
        OpenError::Malformed(Malformed::NotAContainer) => {
            let what = kinds::describe(&beginning(path));
            let error = anyhow!("{} is not a sealed model: {what}", path.display());
            Failure::new(Class::Malformed, "not-a-container", error)
        }
        error => of(path, error),
    })
}

/// The failure of a command by what is wrong with a sealed model, with the model's name.
pub(crate) fn of(path: &Path, error: OpenError) -> Failure {
    let names_itself = matches!(error, OpenError::Io { .. });
    let failure = Failure::from(error);
    match names_itself {
        true => failure,
        false => failure.about(path.display().to_string()),
    }
}

/// Refuses what is sealed where a model in the clear is asked for.
pub(crate) fn refuse_sealed(path: &Path) -> Result<(), Failure> {
    if beginning(path).starts_with(SEALED) {
        let error = anyhow!(
            "{} is a sealed model already; seal takes the GGUF file or directory that it was made from",
            path.display()
        );
        return Err(Failure::new(Class::Malformed, "sealed-already", error));
    }
    Ok(())
}

/// The first bytes of a file; none of what cannot be read, which whoever opens it will say.
fn beginning(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if path.is_file()
        && let Ok(file) = File::open(path)
    {
        let _ = file.take(4096).read_to_end(&mut bytes);
    }
    bytes
}
