//! `cargo xtask test`: everything that decides whether the tree is good.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{arm, cuda, fetch, licences, process, rooms, threats, workspace};

/// Debian packages that tests use, each with a command that succeeds where it is there. Rust, Python 3 and pip are
/// expected.
const DEBIAN: &[(&str, &[&str])] = &[
    ("npm", &["npm", "--version"]),
    ("nginx-light", &["/usr/sbin/nginx", "-v"]),
    ("strace", &["strace", "--version"]),
    ("curl", &["curl", "--version"]),
    ("python3-venv", &["python3", "-c", "import ensurepip, venv"]),
];

/// Vulkan in software, for tests of a GPU's arithmetic.
const VULKAN: (&str, &[&str]) = (
    "mesa-vulkan-drivers",
    &["sh", "-c", "ls /usr/share/vulkan/icd.d/*.json"],
);

/// Packages of the virtual environment for the client tests.
const PYTHON: &str = "openai==3.52.0";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only run tests whose name contains this; format, lints and licences are skipped. `neon` runs the kernels' tests for
    /// aarch64 in an emulator, `wgpu` those of products on a GPU or on Vulkan in software, whose libraries are built for
    /// nothing else, `cuda` those of kernels for NVIDIA GPUs: emulated, and on a GPU with measurements if there is one
    #[arg(long)]
    only: Option<String>,
}

impl Options {
    fn wgpu(&self) -> bool {
        self.only.as_deref() == Some("wgpu")
    }

    /// Features beyond those of every build.
    fn features(&self) -> &'static [&'static str] {
        match self.wgpu() {
            true => &["--features", "casemate-worker/wgpu"],
            false => &[],
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let data = data_folder();
    let mut skipped = BTreeSet::new();
    if options.only.as_deref() == Some(arm::NAME) {
        let outcome = emulated(&arm::Toolchain::obtain()?, &mut skipped)?;
        return report(&outcome, &skipped, &data, started);
    }
    if options.only.as_deref() == Some(cuda::NAME) {
        obtain([&cuda::COMPILER], &mut skipped);
        let mut outcome = cuda::emulated(&mut skipped)?;
        outcome.add(cuda::on_a_gpu(&mut skipped)?);
        return report(&outcome, &skipped, &data, started);
    }
    step("tools and models");
    let python = prepare(&mut skipped, options.wgpu())?;
    if !data.is_dir() {
        skipped.insert(format!(
            "data folder {} is absent: tests of captured evidence, tokenizers and texts (set CASEMATE_DATA)",
            data.display()
        ));
    }
    if options.only.is_none() {
        step("licences");
        println!("{} packages, every licence on the list", licences::check()?);
        step("rooms");
        println!("{} claims about who links what hold", rooms::check()?);
        step("threat model");
        println!("{} tests named, every one exists", threats::check()?);
        step("format");
        process::run(process::cargo().args(["fmt", "--all", "--check"]))?;
        step("lints");
        process::run(process::cargo().args([
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ]))?;
        step("documentation");
        process::run(process::cargo().env("RUSTDOCFLAGS", "-D warnings").args([
            "doc",
            "--locked",
            "--workspace",
            "--no-deps",
            "--quiet",
        ]))?;
    }
    step("build");
    // End-to-end tests start the real programs, which lie beside the test binaries.
    let mut build = process::cargo();
    build.args(["build", "--locked", "--workspace", "--bins", "--quiet"]);
    process::run(build.args(options.features()))?;
    step("tests");
    let mut cargo = process::cargo();
    cargo
        .args(["test", "--locked", "--workspace", "--no-fail-fast"])
        .args(options.features())
        .env("CASEMATE_DATA", &data)
        .env("CASEMATE_CACHE", fetch::cache());
    if let Some(python) = python {
        cargo.env("CASEMATE_PYTHON", python);
    }
    cargo.arg("--");
    cargo.args(&options.only).arg("--show-output");
    let mut outcome = run_tests(&mut cargo, "casemate-test.log", &mut skipped)?;
    if options.only.is_none() {
        match arm::Toolchain::obtain() {
            Ok(toolchain) => outcome.add(emulated(&toolchain, &mut skipped)?),
            Err(error) => {
                skipped.insert(format!("tests of NEON kernels in an emulator: {error:#}"));
            }
        }
        outcome.add(cuda::emulated(&mut skipped)?);
        skipped
            .insert("products on an NVIDIA GPU: `--only cuda` runs them where there is one".into());
    }
    report(&outcome, &skipped, &data, started)
}

/// The kernels' tests as programs for aarch64.
fn emulated(toolchain: &arm::Toolchain, skipped: &mut BTreeSet<String>) -> Result<Outcome> {
    step("kernels for aarch64 in an emulator");
    let mut sum = Outcome::none();
    for (at, mut cargo) in toolchain.tests().into_iter().enumerate() {
        let log = format!("casemate-test-neon-{at}.log");
        let outcome = run_tests(&mut cargo, &log, skipped)?;
        if outcome.passed == 0 {
            bail!("no test ran in the emulator");
        }
        sum.add(outcome);
    }
    Ok(sum)
}

pub(crate) fn step(name: &str) {
    println!("\n== {name}");
}

/// The folder of evidence, tokenizers and texts.
fn data_folder() -> PathBuf {
    std::env::var_os("CASEMATE_DATA").map_or_else(|| workspace().join("../shared"), PathBuf::from)
}

/// Installs what is missing; what cannot be had is written into `skipped` and its tests skip themselves.
fn prepare(skipped: &mut BTreeSet<String>, wgpu: bool) -> Result<Option<PathBuf>> {
    let also = [&cuda::COMPILER].into_iter().chain(wgpu.then_some(&VULKAN));
    obtain(DEBIAN.iter().chain(also), skipped);
    if let Err(error) = fetch::demo_model() {
        skipped.insert(format!("tests with SmolLM2-135M-Instruct: {error:#}"));
    }
    if let Err(error) = fetch::stories15m() {
        skipped.insert(format!("tests with stories15M: {error:#}"));
    }
    match environment("casemate-venv", &[PYTHON.to_owned()]) {
        Ok(python) => Ok(Some(python)),
        Err(error) => {
            skipped.insert(format!("tests with the openai package: {error:#}"));
            Ok(None)
        }
    }
}

/// Installs those Debian packages that are missing; that they cannot be had is written into `skipped`.
fn obtain<'a>(
    packages: impl IntoIterator<Item = &'a (&'a str, &'a [&'a str])>,
    skipped: &mut BTreeSet<String>,
) {
    let missing: Vec<_> = packages
        .into_iter()
        .filter(|(_, probe)| !process::succeeds(probe))
        .map(|(package, _)| *package)
        .collect();
    if !missing.is_empty()
        && let Err(error) = install(&missing)
    {
        skipped.insert(format!("Debian packages {}: {error:#}", missing.join(", ")));
    }
}

fn install(packages: &[&str]) -> Result<()> {
    let root = Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|id| id.stdout == b"0\n");
    if !root {
        bail!("not installed, and only root may install them");
    }
    let environment = [("DEBIAN_FRONTEND", "noninteractive")];
    process::run(
        Command::new("apt-get")
            .envs(environment)
            .args(["update", "-qq"]),
    )?;
    process::run(
        Command::new("apt-get")
            .envs(environment)
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(packages),
    )
}

/// A virtual environment with packages; made once per list of them.
pub(crate) fn environment(name: &str, packages: &[String]) -> Result<PathBuf> {
    let directory = workspace().join("target").join(name);
    let python = directory.join("bin/python");
    let marker = directory.join("packages");
    let wanted = packages.join("\n");
    if fs::read_to_string(&marker).is_ok_and(|have| have == wanted) {
        return Ok(python);
    }
    process::run(Command::new("python3").args(["-m", "venv"]).arg(&directory))?;
    process::run(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args(packages),
    )?;
    fs::write(&marker, wanted).with_context(|| format!("cannot write {}", marker.display()))?;
    Ok(python)
}

pub(crate) struct Outcome {
    pub(crate) passed: usize,
    failed: usize,
    ignored: usize,
    pub(crate) ok: bool,
}

impl Outcome {
    /// Of no test.
    pub(crate) fn none() -> Outcome {
        Outcome {
            passed: 0,
            failed: 0,
            ignored: 0,
            ok: true,
        }
    }

    pub(crate) fn add(&mut self, other: Outcome) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.ok &= other.ok;
    }
}

/// Runs cargo test, shows one line per test program, keeps the whole output in a file, and collects what tests say
/// they skipped.
pub(crate) fn run_tests(
    cargo: &mut Command,
    log_name: &str,
    skipped: &mut BTreeSet<String>,
) -> Result<Outcome> {
    println!("$ {}", process::display(cargo));
    let folder = workspace().join("target");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let log_path = folder.join(log_name);
    let mut log = fs::File::create(&log_path)
        .with_context(|| format!("cannot write {}", log_path.display()))?;
    // One pipe for both streams keeps their order: the name of a test program, then its results.
    let (reader, writer) = std::io::pipe()?;
    let mut child = cargo
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()?;
    cargo.stdout(Stdio::null()).stderr(Stdio::null());
    let mut outcome = Outcome::none();
    let mut in_failures = false;
    for line in BufReader::new(reader).lines() {
        let line = line?;
        writeln!(log, "{line}")?;
        let text = line.trim_start();
        if let Some(reason) = text.strip_prefix("skipped: ") {
            skipped.insert(reason.to_owned());
        } else if let Some(counts) = text.strip_prefix("test result: ") {
            in_failures = false;
            outcome.passed += count(counts, "passed");
            outcome.failed += count(counts, "failed");
            outcome.ignored += count(counts, "ignored");
            println!("   {counts}");
        } else if text.starts_with("Running ") || text.starts_with("Doc-tests ") {
            println!("{text}");
        } else if line.starts_with("error:")
            || line.starts_with("error[")
            || text.contains("... FAILED")
            || line == "failures:"
        {
            in_failures |= line == "failures:";
            println!("{line}");
        } else if in_failures {
            println!("{line}");
        }
    }
    outcome.ok = child.wait()?.success();
    println!("whole output: {}", log_path.display());
    Ok(outcome)
}

fn count(counts: &str, what: &str) -> usize {
    let part = counts
        .split([';', '.'])
        .find(|part| part.trim_end().ends_with(what));
    part.and_then(|part| part.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn report(
    outcome: &Outcome,
    skipped: &BTreeSet<String>,
    data: &Path,
    started: Instant,
) -> Result<()> {
    println!();
    for reason in skipped {
        println!("skipped: {reason}");
    }
    println!("took {} s", started.elapsed().as_secs());
    println!(
        "{} passed, {} failed, {} skipped",
        outcome.passed,
        outcome.failed,
        outcome.ignored + skipped.len()
    );
    if !outcome.ok || outcome.failed > 0 {
        bail!("some tests failed");
    }
    if outcome.passed == 0 {
        bail!("no test ran");
    }
    let forbidden: Vec<_> = skipped
        .iter()
        .filter(|reason| reason.contains("CASEMATE_DATA"))
        .collect();
    if data.is_dir() && !forbidden.is_empty() {
        bail!(
            "{} exists, so nothing may be skipped for its absence",
            data.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn counts_are_read_from_the_closing_line() {
        let line =
            "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.02s";
        assert_eq!(
            (
                count(line, "passed"),
                count(line, "failed"),
                count(line, "ignored")
            ),
            (12, 3, 1)
        );
    }
}
