//! A file to hand to parsers that read from a path. It lies in memory where the system has such a place.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A new directory.
pub(crate) fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a temporary directory")
}

thread_local! {
    static FILE: (TempDir, PathBuf) = {
        let directory = directory();
        let path = directory.path().join("input");
        (directory, path)
    };
}

/// Calls `read` with a file that holds `bytes` and that only its owner may read.
pub(crate) fn with_file<T>(bytes: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    FILE.with(|(_, path)| {
        fs::write(path, bytes).expect("a file in memory");
        fs::set_permissions(path, Permissions::from_mode(0o600)).expect("our own file");
        read(path)
    })
}
