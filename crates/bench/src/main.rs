//! `casemate-bench`, which people start as `casemate bench`: what a model costs on this machine, beside what the machine
//! could do at most. A program of its own, because it links the engine, which the user's `casemate` does not.
//!
//! This file holds the list of commands and nothing else.

#![forbid(unsafe_code)]

mod drive;
mod exit;
mod kernels;
mod limits;
mod load;
mod machine;
mod memory;
mod open;
mod options;
mod protected;
mod report;
mod run;
mod statistics;
mod synthetic;
mod syscalls;

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use casemate_container::DType;
use casemate_testkit::gguf;
use clap::{Parser, Subcommand};

use crate::exit::Usage;
use crate::report::{Report, csv, html, table};
use crate::synthetic::{Shape, Synthetic};

#[derive(Parser)]
#[command(
    name = "casemate bench",
    bin_name = "casemate bench",
    version,
    about = options::ABOUT,
    long_about = options::LONG_ABOUT,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: options::Args,
}

#[derive(Subcommand)]
enum Command {
    Open(open::Args),
    Kernels(kernels::Args),
    Report(ReportArgs),
    Write(WriteArgs),
    #[command(hide = true)]
    ServePlain(protected::ServePlain),
}

/// Show a report that was kept as JSON.
#[derive(clap::Args)]
struct ReportArgs {
    /// What `casemate bench --json` printed.
    file: PathBuf,
    /// Print every figure as one line of CSV.
    #[arg(long)]
    csv: bool,
    /// Write a report with plots instead of printing a table.
    #[arg(long, value_name = "FILE", conflicts_with = "csv")]
    html: Option<PathBuf>,
}

/// Write a model of random weights as a GGUF file, so that other engines can be given the same.
#[derive(clap::Args)]
struct WriteArgs {
    /// Whose shape.
    shape: Shape,
    /// Encoding of the matrices.
    #[arg(value_parser = ["q8_0", "q4_0", "bf16"])]
    encoding: String,
    /// Where to; what stands there is replaced.
    file: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    exit::report(match cli.command {
        None => measure(&cli.run),
        Some(Command::Open(args)) => open::run(&args),
        Some(Command::Kernels(args)) => kernels::run(&args),
        Some(Command::Report(args)) => show(&args),
        Some(Command::Write(args)) => write_model(&args),
        Some(Command::ServePlain(args)) => protected::serve(&args),
    })
}

fn measure(args: &options::Args) -> Result<()> {
    if let Some(path) = &args.html {
        // Nobody wants to learn after an hour that the report cannot be kept.
        fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .map_err(|error| Usage(format!("--html {}: {error}", path.display())))?;
    }
    let report = run::run(args)?;
    if let Some(path) = &args.html {
        write_html(&report, path)?;
    }
    print(&match (args.json, args.csv) {
        (true, _) => report.to_json(),
        (_, true) => csv::csv(&report),
        _ => table::table(&report),
    })
}

fn show(args: &ReportArgs) -> Result<()> {
    let text = fs::read_to_string(&args.file).with_context(|| args.file.display().to_string())?;
    let report = Report::from_json(&args.file, &text)?;
    match &args.html {
        Some(path) => write_html(&report, path),
        None if args.csv => print(&csv::csv(&report)),
        None => print(&table::table(&report)),
    }
}

fn write_model(args: &WriteArgs) -> Result<()> {
    let dtype = match args.encoding.as_str() {
        "q4_0" => DType::Q4_0,
        "bf16" => DType::BF16,
        _ => DType::Q8_0,
    };
    let model = Synthetic::new(args.shape, dtype);
    gguf::write_source(&model, model.vocabulary(), &args.file)
        .with_context(|| args.file.display().to_string())
}

fn write_html(report: &Report, path: &PathBuf) -> Result<()> {
    fs::write(path, html::html(report)).with_context(|| path.display().to_string())
}

/// Prints on standard output. A reader that left, as `head` does, has what it wanted.
fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}
