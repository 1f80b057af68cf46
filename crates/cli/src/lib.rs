//! `casemate`: the provider's and the user's command line.
//!
//! This file holds the list of commands and nothing else; each command is a file of its own. Exit codes and the shape
//! of errors are in `exit`.

#![forbid(unsafe_code)]

mod apikey;
mod audit;
mod bench;
mod check;
mod companion;
mod direct;
mod exit;
pub mod explain;
mod grant;
mod inspect;
mod keygen;
mod keys;
mod measure;
mod offload;
mod progress;
mod proxy;
mod receipt;
mod rollback;
mod seal;
mod sealed;
mod secret_file;
mod service;
mod terminal;
mod verdict;
mod verify;

use std::process::ExitCode;

use casemate_kernels::hardening;
use clap::{Parser, Subcommand};

use crate::exit::Failure;

/// Private language models on machines that their owner does not trust.
///
/// A provider makes keys (keygen), encrypts a model (seal), looks at it (inspect, check) and grants its key to an
/// attested enclave. A user verifies that enclave and talks to it through a local proxy. Whatever is refused, explain
/// puts into plain words.
#[derive(Parser)]
#[command(name = "casemate", version, after_help = exit::CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Keygen(keygen::Args),
    Seal(seal::Args),
    Inspect(inspect::Args),
    Check(check::Args),
    Grant(grant::Args),
    #[command(subcommand)]
    Apikey(apikey::Command),
    Rollback(rollback::Args),
    Measure(measure::Args),
    #[command(subcommand)]
    Offload(offload::Command),
    Verify(verify::Args),
    Proxy(proxy::Args),
    Receipt(receipt::Args),
    Explain(explain::Args),
    Audit(audit::Args),
    Bench(bench::Args),
}

/// Runs the program with the arguments and in the environment of this process.
#[must_use]
pub fn main() -> ExitCode {
    // Data keys, signing keys and prompts pass through here. The proxy shows what was granted.
    hardening::at_start();
    let granted = hardening::before_secrets();
    let cli = Cli::parse();
    let done: Result<(), Failure> = match cli.command {
        Command::Keygen(args) => keygen::run(&args),
        Command::Seal(args) => seal::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Grant(args) => grant::run(&args),
        Command::Apikey(command) => apikey::run(&command),
        Command::Rollback(args) => rollback::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Offload(command) => offload::run(&command),
        Command::Verify(args) => verify::run(&args),
        Command::Proxy(args) => proxy::run(&args, granted),
        Command::Receipt(args) => receipt::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Audit(args) => audit::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    exit::report(done)
}
