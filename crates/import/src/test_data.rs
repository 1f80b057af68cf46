//! Where the tests of this crate find real models, tokenizers and text.

use std::path::{Path, PathBuf};

/// A file or directory of the test data, or `None`, said on stderr, where there are no test data at all. A folder
/// without the file is a failure.
pub(crate) fn shared(name: &str) -> Option<PathBuf> {
    let root = root(
        "CASEMATE_DATA",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"),
    );
    if !root.is_dir() {
        eprintln!("skipped: no test data at {}", root.display());
        return None;
    }
    let path = root.join(name);
    assert!(path.exists(), "{} is missing", path.display());
    Some(path)
}

/// A downloaded file, or `None`, said on stderr, where it has not been fetched.
pub(crate) fn cached(name: &str) -> Option<PathBuf> {
    let root = root(
        "CASEMATE_CACHE",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/casemate-cache"),
    );
    let path = root.join(name);
    if !path.exists() {
        eprintln!("skipped: {} has not been fetched", path.display());
        return None;
    }
    Some(path)
}

fn root(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| Path::new(default).to_owned(), PathBuf::from)
}

/// Numbers that look random and are the same every time (SplitMix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}
