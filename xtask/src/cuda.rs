//! `cargo xtask test --only cuda`: the kernels for NVIDIA GPUs. Without a GPU: that the committed PTX is what the source gives,
//! and the source itself in an emulator. With one: the same tests there, and then measurements.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::test::{Outcome, environment, run_tests, step};
use crate::{process, workspace};

/// What `--only` calls these tests.
pub(crate) const NAME: &str = "cuda";

/// What compiles the emulator, and a command that succeeds where it is there.
pub(crate) const COMPILER: (&str, &[&str]) = ("g++", &["c++", "--version"]);

/// Tests whose GPU is emulated, and of sizes.
pub(crate) fn emulated(skipped: &mut BTreeSet<String>) -> Result<Outcome> {
    step("kernels for CUDA");
    match environment("casemate-cuda-venv", &requirements()?) {
        Ok(python) => process::run(Command::new(python).arg(script()).arg("--check"))?,
        Err(error) => {
            skipped.insert(format!(
                "whether the PTX of CUDA kernels is that of their source: {error:#}"
            ));
        }
    }
    let outcome = run_tests(
        test().args(["--package", "casemate-cuda", "--", "--show-output"]),
        "casemate-test-cuda.log",
        skipped,
    )?;
    if outcome.passed == 0 {
        bail!("no test of CUDA kernels ran");
    }
    Ok(outcome)
}

/// Tests and measurements on a GPU, if there is one; otherwise nothing has run, and that is said.
pub(crate) fn on_a_gpu(skipped: &mut BTreeSet<String>) -> Result<Outcome> {
    step("kernels for CUDA on a GPU");
    if let Some(why) = no_gpu()? {
        skipped.insert(format!("products on an NVIDIA GPU, not run: {why}"));
        return Ok(Outcome::none());
    }
    let outcome = run_tests(
        test().args(["--", "--ignored", "--show-output"]),
        "casemate-test-cuda-gpu.log",
        skipped,
    )?;
    if outcome.ok {
        process::run(
            process::cargo()
                .args(["run", "--locked", "--release", "--quiet"])
                .args(["--package", "casemate-worker", "--features", "cuda"])
                .args(["--example", "cuda"]),
        )?;
    }
    Ok(outcome)
}

/// Why the worker does not take a GPU; none if it does.
fn no_gpu() -> Result<Option<String>> {
    // It looks for its device before it listens, and nobody can listen there.
    let output = process::cargo()
        .args(["run", "--locked", "--quiet"])
        .args(["--package", "casemate-worker", "--features", "cuda", "--"])
        .args(["--backend", "cuda", "--memory", "1GiB", "--log", "error"])
        .args(["--listen", "unix:/nonexistent/socket"])
        .output()
        .context("cannot start casemate-worker")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    if said.contains("cannot listen on unix:/nonexistent/socket") {
        return Ok(None);
    }
    match said.strip_prefix("casemate-worker: ") {
        Some(why) => Ok(Some(why.to_owned())),
        None => bail!("casemate-worker does not start: {said}"),
    }
}

fn test() -> Command {
    let mut cargo = process::cargo();
    cargo
        .args(["test", "--locked", "--no-fail-fast"])
        .args([
            "--package",
            "casemate-worker",
            "--features",
            "casemate-worker/cuda",
        ])
        .args(["--lib", "--test", "cuda"]);
    cargo
}

fn script() -> PathBuf {
    workspace().join("tools/cuda/ptx.py")
}

/// The packages of the script.
fn requirements() -> Result<Vec<String>> {
    let path = workspace().join("tools/cuda/requirements.txt");
    let text = std::fs::read_to_string(&path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().map(str::to_owned).collect())
}
