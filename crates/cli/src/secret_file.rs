//! Files that only their owner may read, written whole or not at all.

use std::io;
use std::path::Path;

use anyhow::anyhow;
use casemate_container::atomic_file::{AtomicFile, Mode, Replace};

use crate::exit::{Class, Failure};

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write(path: &Path, bytes: &[u8], force: bool) -> Result<(), Failure> {
    let replace = match force {
        true => Replace::Existing,
        false => Replace::Nothing,
    };
    let written = AtomicFile::create(path, replace, Mode::OwnerOnly).and_then(|file| {
        file.write_all_at(bytes, 0)?;
        file.commit()
    });
    written.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            let error = anyhow!(
                "{} exists already and was left as it is; --force replaces it",
                path.display()
            );
            Failure::new(Class::Io, "exists", error)
        }
        _ => Failure::io(anyhow::Error::from(error).context(path.display().to_string())),
    })
}
