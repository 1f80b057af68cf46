//! Files that only their owner may read, written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::exit::{Class, Failure};

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write(path: &Path, bytes: &[u8], force: bool) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        let exists = error.kind() == io::ErrorKind::AlreadyExists;
        let error = anyhow::Error::from(error).context(path.display().to_string());
        match exists {
            true => Failure::new(Class::Io, "exists", error.context("--force replaces it")),
            false => Failure::io(error),
        }
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        match force {
            true => fs::rename(&part, path),
            // A link fails where a rename would replace.
            false => fs::hard_link(&part, path).and_then(|()| fs::remove_file(&part)),
        }?;
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written.map_err(failed)
}
