//! Opening the file that a command was given as a sealed model, and saying what it is if it is none.

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
            let what = kinds::describe(&kinds::beginning(path));
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
    if kinds::beginning(path).starts_with(SEALED) {
        let error = anyhow!(
            "{} is a sealed model already; seal takes the GGUF file or directory that it was made from",
            path.display()
        );
        return Err(Failure::new(Class::Malformed, "sealed-already", error));
    }
    Ok(())
}
