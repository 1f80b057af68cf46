//! Where tests find files that are not part of the project: captured evidence, tokenizers and texts (`CASEMATE_DATA`,
//! by default `../shared` beside the workspace), and fetched models (`CASEMATE_CACHE`, by default
//! `target/casemate-cache`). A test whose folder is absent says so and passes over; a file missing from a folder that
//! is there is an error.

use std::path::{Path, PathBuf};

/// The folder of evidence, tokenizers and texts. Without it, says that the calling test is skipped.
///
/// ```no_run
/// let Some(data) = casemate_testkit::data::dir() else { return };
/// ```
pub fn dir() -> Option<PathBuf> {
    let dir = from_environment("CASEMATE_DATA", "../shared");
    if dir.is_dir() {
        return Some(dir);
    }
    skip(&format!(
        "the data folder {} is absent (set CASEMATE_DATA)",
        dir.display()
    ))
}

/// A file of [`dir`].
///
/// # Panics
/// When the folder is there and the file is not.
pub fn file(relative: impl AsRef<Path>) -> Option<PathBuf> {
    let path = dir()?.join(relative);
    assert!(
        path.is_file(),
        "{} is missing from the data folder",
        path.display()
    );
    Some(path)
}

/// A fetched model. Without it, says that the calling test is skipped; `cargo xtask test` fetches it.
pub fn cached(name: &str) -> Option<PathBuf> {
    let path = from_environment("CASEMATE_CACHE", "target/casemate-cache").join(name);
    if path.is_file() {
        return Some(path);
    }
    skip(&format!(
        "{} is not in the cache (`cargo xtask test` fetches it)",
        path.display()
    ))
}

/// Says that the calling test is skipped, in the form that `cargo xtask test` counts.
pub fn skip<T>(why: &str) -> Option<T> {
    eprintln!("skipped: {why}");
    None
}

fn from_environment(variable: &str, default: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../..")
            .join(default),
    }
}
