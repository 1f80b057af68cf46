//! The two commands of the README, `cargo xtask demo` and `cargo xtask test`, and two more: `fuzz` and `fetch`.
//!
//! Holds what a person or a build machine starts by hand: fetching models and tools, running every check, walking
//! through a deployment. Holds no product code; nothing here is part of a released binary.

#![forbid(unsafe_code)]

mod arm;
mod cuda;
mod demo;
mod fetch;
mod fuzz;
mod licences;
mod process;
mod rooms;
mod test;
mod threats;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Casemate's development commands")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Seal a model, release its key to an attested enclave, and ask it a question, step by step
    Demo(demo::Options),
    /// Install what the tests need, then check format, lints and licences and run every test
    Test(test::Options),
    /// Run the fuzzers of `fuzz/` and report how far each got
    Fuzz(fuzz::Options),
    /// Fetch the models that demo and tests use into the cache, and print where they are
    Fetch,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Fetch => fetch_all(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fetch_all() -> anyhow::Result<()> {
    println!("{}", fetch::demo_model()?.display());
    println!("{}", fetch::stories15m()?.display());
    Ok(())
}

/// The root of the workspace.
fn workspace() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}
