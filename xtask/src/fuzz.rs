//! `cargo xtask fuzz`: seeds, builds and runs the fuzzers of `fuzz/`, one after the other or several at once, and keeps
//! account of how long each has run and how far it got. Needs a nightly toolchain and `cargo install cargo-fuzz`.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

/// The triple that cargo-fuzz builds for.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Minutes per target
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Fuzzers at the same time; each takes a core and up to 1 GiB
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Only these targets [default: all, those that have run the shortest first]
    #[arg(long = "target", value_name = "NAME")]
    targets: Vec<String>,
    /// Skip targets that have run this many minutes already, all runs together
    #[arg(long, value_name = "MINUTES")]
    until: Option<f64>,
    /// Print what the ledger knows, and run nothing
    #[arg(long)]
    report: bool,
}

/// A target and the longest input worth trying.
struct Target {
    name: String,
    max_len: String,
}

/// What one or several runs of a target came to.
#[derive(Clone, Copy, Default)]
struct Account {
    seconds: f64,
    executions: u64,
    edges: u64,
    findings: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let fuzz = workspace().join("fuzz");
    let build = target_directory(&fuzz);
    let ledger = build.join("ledger.tsv");
    if options.report {
        print!("{}", report(&names(&fuzz)?, &ledger)?);
        return Ok(());
    }
    let mut targets = seed(&fuzz)?;
    if let Some(unknown) = options
        .targets
        .iter()
        .find(|wanted| targets.iter().all(|target| target.name != **wanted))
    {
        bail!("there is no target {unknown}; see fuzz/fuzz_targets");
    }
    targets.retain(|target| options.targets.is_empty() || options.targets.contains(&target.name));
    targets.sort_by(|a, b| {
        let seconds = |target: &Target| account(&ledger, &target.name).unwrap_or_default().seconds;
        seconds(a).total_cmp(&seconds(b))
    });
    compile(&fuzz, &build)?;
    let mut due = Vec::new();
    for target in targets {
        let so_far = account(&ledger, &target.name)?.seconds;
        if options.until.is_none_or(|enough| so_far < enough * 60.0) {
            due.push(target);
        }
    }
    let found = fuzz_all(due, options.jobs, |target| {
        let run = fuzz_one(target, options.minutes, &fuzz, &build)?;
        append(&ledger, &target.name, run)?;
        Ok(run.findings > 0)
    })?;
    print!("{}", report(&names(&fuzz)?, &ledger)?);
    if !found.is_empty() {
        bail!(
            "findings in {}: see fuzz/artifacts and {}",
            found.join(", "),
            build.display()
        );
    }
    Ok(())
}

/// Runs every target, the first ones first and `jobs` at once; returns the names of those that found something. The first
/// error ends it, when those that run by then are through.
fn fuzz_all(
    mut due: Vec<Target>,
    jobs: usize,
    fuzz: impl Fn(&Target) -> Result<bool> + Sync,
) -> Result<Vec<String>> {
    due.reverse();
    let due = Mutex::new(due);
    let next = || due.lock().expect("nobody panics with it").pop();
    let work = || {
        let mut found = Vec::new();
        while let Some(target) = next() {
            match fuzz(&target) {
                Ok(true) => found.push(target.name),
                Ok(false) => {}
                Err(error) => {
                    due.lock().expect("nobody panics with it").clear();
                    return Err(error);
                }
            }
        }
        Ok(found)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        let mut found = Vec::new();
        for worker in workers {
            found.extend(worker.join().expect("a worker reports errors")?);
        }
        Ok(found)
    })
}

/// Where the fuzzers are built: apart from the workspace, because sanitizers instrument every crate.
fn target_directory(fuzz: &Path) -> PathBuf {
    match std::env::var_os("CASEMATE_FUZZ_TARGET_DIR") {
        Some(directory) => directory.into(),
        None => fuzz.join("target"),
    }
}

/// Writes the seeds into the corpora; returns the targets.
fn seed(fuzz: &Path) -> Result<Vec<Target>> {
    let mut command = process::cargo();
    command.args([
        "run",
        "--locked",
        "--quiet",
        "--package",
        "casemate-fuzzing",
    ]);
    command
        .args(["--bin", "casemate-fuzz-seeds", "--"])
        .arg(fuzz.join("corpus"));
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!(
            "the seeds cannot be made: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let text = String::from_utf8(output.stdout)?;
    let targets = text.lines().filter_map(|line| line.split_once(' '));
    Ok(targets
        .map(|(name, max_len)| Target {
            name: name.into(),
            max_len: max_len.into(),
        })
        .collect())
}

/// The targets' names, in the order of their manifest.
fn names(fuzz: &Path) -> Result<Vec<String>> {
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml"))?;
    let bins = manifest.split("[[bin]]").skip(1);
    let name = |bin: &str| Some(bin.split('"').nth(1)?.to_owned());
    Ok(bins.filter_map(name).collect())
}

fn compile(fuzz: &Path, build: &Path) -> Result<()> {
    // Started through rustup's `cargo`, not the one that runs this program, to get at another toolchain.
    let mut command = Command::new("cargo");
    command
        .args(["+nightly", "fuzz", "build"])
        .current_dir(fuzz);
    command
        .env("CARGO_TARGET_DIR", build)
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    process::run(&mut command)
        .context("install cargo-fuzz: rustup toolchain install nightly; cargo install cargo-fuzz")
}

fn fuzz_one(target: &Target, minutes: f64, fuzz: &Path, build: &Path) -> Result<Account> {
    let name = &target.name;
    let artifacts = fuzz.join("artifacts").join(name);
    fs::create_dir_all(&artifacts)?;
    let log = build.join(format!("{name}.log"));
    let seconds = (minutes * 60.0).ceil().max(1.0) as u64;
    let mut command = Command::new(build.join(TRIPLE).join("release").join(name));
    command
        .arg(fuzz.join("corpus").join(name))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={}", target.max_len))
        .args(["-timeout=5", "-rss_limit_mb=1024", "-print_final_stats=1"])
        .env("ASAN_OPTIONS", "detect_odr_violation=0")
        .stdout(File::create(&log)?)
        .stderr(OpenOptions::new().append(true).open(&log)?);
    println!("{name}: {minutes} minutes, log {}", log.display());
    let started = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("cannot start the fuzzer {name}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    Ok(Account {
        seconds: started.elapsed().as_secs_f64(),
        findings: u64::from(!status.success()),
        ..figures(&text)
    })
}

/// Executions and covered edges, from the last line that states each.
fn figures(log: &str) -> Account {
    let number = |text: &str| {
        let digits: String = text
            .trim_start()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().unwrap_or(0)
    };
    let last = |mark: &str| {
        log.rfind(mark)
            .map_or(0, |at| number(&log[at + mark.len()..]))
    };
    let progress = log.lines().rev().find_map(|line| line.strip_prefix('#'));
    Account {
        executions: last("stat::number_of_executed_units:").max(progress.map_or(0, number)),
        edges: last(" cov: "),
        ..Account::default()
    }
}

fn append(ledger: &Path, name: &str, run: Account) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(ledger)?;
    // Another `cargo xtask fuzz` may be at it.
    file.lock()?;
    let Account {
        seconds,
        executions,
        edges,
        findings,
    } = run;
    let line = format!("{name}\t{seconds:.0}\t{executions}\t{edges}\t{findings}\n");
    file.write_all(line.as_bytes())?;
    Ok(())
}

/// All runs of a target together.
fn account(ledger: &Path, name: &str) -> Result<Account> {
    let mut sum = Account::default();
    if !ledger.exists() {
        return Ok(sum);
    }
    for line in fs::read_to_string(ledger)?.lines() {
        let fields: Vec<_> = line.split('\t').collect();
        let [target, seconds, executions, edges, findings] = fields[..] else {
            bail!("{}: {line:?} is no line of a ledger", ledger.display());
        };
        if target == name {
            sum.seconds += seconds.parse::<f64>()?;
            sum.executions += executions.parse::<u64>()?;
            sum.edges = sum.edges.max(edges.parse()?);
            sum.findings += findings.parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// The table of `fuzz/README.md`.
fn report(names: &[String], ledger: &Path) -> Result<String> {
    let mut table = String::from(
        "| target | minutes | executions | edges | findings |\n|---|--:|--:|--:|--:|\n",
    );
    for name in names {
        let Account {
            seconds,
            executions,
            edges,
            findings,
        } = account(ledger, name)?;
        let minutes = seconds / 60.0;
        table.push_str(&format!(
            "| `{name}` | {minutes:.1} | {executions} | {edges} | {findings} |\n"
        ));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_figures_of_whole_runs_and_of_runs_that_ended_early() {
        let log = "INFO: Seed: 1\n#2\tINITED cov: 10 ft: 10 corp: 1/1b exec/s: 0\n#4096\tpulse  cov: 25 ft: 40\n";
        let early = figures(log);
        assert_eq!((early.executions, early.edges), (4096, 25));
        let whole = figures(&format!(
            "{log}stat::number_of_executed_units: 5000\nstat::peak_rss_mb: 90\n"
        ));
        assert_eq!((whole.executions, whole.edges), (5000, 25));
    }

    fn targets(names: &[&str]) -> Vec<Target> {
        let target = |name: &&str| Target {
            name: (*name).into(),
            max_len: "1".into(),
        };
        names.iter().map(target).collect()
    }

    #[test]
    fn several_run_at_once_and_each_once() {
        let both = std::sync::Barrier::new(2);
        let ran = Mutex::new(Vec::new());
        let found = fuzz_all(targets(&["a", "b", "c", "d"]), 2, |target| {
            // Nobody gets past this alone.
            both.wait();
            ran.lock().unwrap().push(target.name.clone());
            Ok(target.name == "c")
        });
        assert_eq!(found.unwrap(), ["c"]);
        let mut ran = ran.into_inner().unwrap();
        ran.sort();
        assert_eq!(ran, ["a", "b", "c", "d"]);
    }

    #[test]
    fn an_error_ends_the_run() {
        let ran = Mutex::new(0);
        let found = fuzz_all(targets(&["a", "b", "c"]), 1, |target| {
            *ran.lock().unwrap() += 1;
            anyhow::ensure!(target.name != "b", "no such fuzzer");
            Ok(false)
        });
        assert_eq!(found.unwrap_err().to_string(), "no such fuzzer");
        assert_eq!(ran.into_inner().unwrap(), 2);
    }

    #[test]
    fn a_ledger_adds_up_runs_of_the_same_target() {
        let directory =
            std::env::temp_dir().join(format!("casemate-ledger-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let ledger = directory.join("ledger.tsv");
        let run = |seconds, edges| Account {
            seconds,
            executions: 7,
            edges,
            findings: 0,
        };
        append(&ledger, "quote", run(60.0, 30)).unwrap();
        append(&ledger, "policy", run(6.0, 5)).unwrap();
        append(&ledger, "quote", run(540.0, 20)).unwrap();
        let names = ["quote", "policy", "grant"].map(str::to_owned);
        let table = report(&names, &ledger).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| `quote` | 10.0 | 14 | 30 | 0 |",
                "| `policy` | 0.1 | 7 | 5 | 0 |",
                "| `grant` | 0.0 | 0 | 0 | 0 |"
            ]
        );
    }
}
