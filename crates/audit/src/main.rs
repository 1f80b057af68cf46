//! `casemate-audit`, which people start as `casemate audit`: attacks on a model that are measured. A program of its own,
//! because it links the engine and the API of the enclave, which the user's `casemate` does not.
//!
//! | module | holds |
//! |---|---|
//! | `options`, `exit` | what can be asked for, and how it ends |
//! | `victim` | the model: asked in this process, and taken apart |
//! | `texts` | what is asked, and what copies are compared on |
//! | `service` | asking, by requests of OpenAI's API |
//! | `trainer` | the process that trains students |
//! | `recorded`, `probe` | what a worker is sent, written down, and what can be read off it |
//! | `metrics` | how near a copy is |
//! | `run`, `report`, `html` | one audit, and what it found |

#![forbid(unsafe_code)]

mod exit;
mod html;
mod metrics;
mod options;
mod probe;
mod random;
mod recorded;
mod report;
mod run;
mod service;
mod texts;
mod trainer;
mod victim;

use std::fs;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::exit::Usage;

/// Attacks on a model, measured.
#[derive(Parser)]
#[command(name = "casemate audit", bin_name = "casemate audit", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Extraction(options::Args),
}

fn main() -> ExitCode {
    exit::report(match Cli::parse().command {
        Command::Extraction(args) => extraction(&args),
    })
}

fn extraction(args: &options::Args) -> Result<()> {
    if let Some(path) = &args.html {
        // Nobody wants to learn after an hour that the report cannot be kept.
        fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .map_err(|error| Usage(format!("--html {}: {error}", path.display())))?;
    }
    let words = std::env::args().skip(1);
    let command = ["casemate".to_owned(), "audit".to_owned()]
        .into_iter()
        .chain(words);
    let report = run::run(args, command.collect::<Vec<_>>().join(" "))?;
    if let Some(path) = &args.html {
        fs::write(path, html::html(&report)).with_context(|| path.display().to_string())?;
    }
    let text = match args.json {
        true => report.to_json(),
        false => report.table(),
    };
    match writeln!(std::io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}
