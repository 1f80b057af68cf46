//! The program around [`casemate_enclave`]: arguments, logging, signals.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use casemate_container::one_line;
use casemate_enclave::config::MeasuredConfig;
use casemate_enclave::denial::StartDenial;
use casemate_enclave::workers::Workers;
use casemate_enclave::{exit, startup};
use casemate_kernels::hardening;
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Serves a sealed model from inside a TEE.
///
/// Attests to the key broker, receives the model key, opens the model and recomputes every digest, publishes a keyset
/// with evidence, and answers encrypted requests. Everything that matters is in the configuration file, whose bytes are
/// part of the measurement.
#[derive(Parser)]
#[command(name = "casemate-enclave", version, after_help = exit::CODES)]
struct Arguments {
    /// The configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Which events are logged: error, warn, info, debug or trace. Contents of requests never are
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: tracing::Level,
}

fn main() -> ExitCode {
    hardening::at_start();
    let arguments = Arguments::parse();
    // Only this program's own events: libraries may log what they carry. The environment has no say.
    let filter = EnvFilter::new(format!("off,casemate_enclave={}", arguments.log));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(error.as_ref()));
            if let Some(denial) = StartDenial::of(&error) {
                eprintln!("{}", denial.line());
                eprintln!("`casemate explain` reads this log and tells what to do about it");
            }
            ExitCode::from(exit::code(&error))
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let config = MeasuredConfig::read(&arguments.config)
        .with_context(|| arguments.config.display().to_string())?;
    let runtime = |name: &str| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(name)
            .enable_all()
            .build()
    };
    let (serving, preparing) = (runtime("serving")?, runtime("preparing")?);
    let workers = Workers::new(preparing.handle().clone());
    let result = serving.block_on(startup::run(config, workers));
    // Answers that are still being generated have had their time; their threads need not be waited for.
    serving.shutdown_background();
    preparing.shutdown_background();
    result
}
