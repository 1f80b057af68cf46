//! casemate-broker: appraises evidence, releases keys, signs credentials, logs decisions.

#![forbid(unsafe_code)]

mod admin_commands;
mod exit;
mod serve;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use casemate_broker::clock::{Clock, SystemClock};
use casemate_broker::state::State;
use casemate_container::one_line;
use casemate_container::signing::VerifyingKey;
use casemate_kernels::hardening;
use casemate_release::random::SystemRandom;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Releases model keys to attested enclaves and says whose deployment they are.
#[derive(Parser)]
#[command(name = "casemate-broker", version, after_help = exit::CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Creates a state directory with fresh keys and prints the issuer's public key.
    Init {
        /// Directory to create, mode 0700.
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
        /// The provider's public key in hex, as `casemate keygen` prints it. Only grants that it signed are stored then,
        /// and only with it can the policy be rolled back.
        #[arg(long, value_name = "HEX")]
        provider: Option<VerifyingKey>,
    },
    /// Serves the key-release protocol until SIGTERM or SIGINT.
    Serve(serve::Serve),
    /// Administers a serving broker over its Unix socket.
    Admin(admin_commands::Admin),
}

fn main() -> ExitCode {
    hardening::at_start();
    let granted = hardening::before_secrets();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .init();
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Init { state, provider } => init(&state, provider),
        Command::Serve(options) => {
            tracing::info!("{granted}");
            runtime().and_then(|runtime| runtime.block_on(serve::serve(options)))
        }
        Command::Admin(options) => {
            runtime().and_then(|runtime| runtime.block_on(admin_commands::administer(options)))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-broker: {}", one_line(error.as_ref()));
            ExitCode::from(exit::code(&error))
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting threads")
}

fn init(directory: &std::path::Path, provider: Option<VerifyingKey>) -> Result<()> {
    let random = Arc::new(SystemRandom);
    let state = State::init(directory, provider, random, SystemClock.now())?;
    println!("{}", state.issuer.verifying_key());
    Ok(())
}
