//! `casemate-fake-tee`: quotes for development on machines without a TEE. See `casemate_testkit::fake_tee`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, Result};
use casemate_container::one_line;
use casemate_testkit::fake_tee::server::{Event, Options, Server};
use casemate_testkit::fake_tee::{FakeTee, FakeTeeError};
use clap::Parser;

/// Signs quotes for whoever connects, under a root of trust made on this machine. NOT A TEE: it protects nothing.
///
/// It measures the process at the other end of its socket by itself: executable, arguments, environment, and the file
/// named by `--config`. `casemate measure` computes the same values beforehand. A policy accepts these quotes only by
/// naming the root printed at start as `dangerous_development_root`.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Where keys and root certificate are kept; made at first start
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// The Unix socket to serve on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Permissions of the socket, octal
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = octal)]
    listen_mode: u32,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-fake-tee: {}", one_line(error.as_ref()));
            ExitCode::from(code(&error))
        }
    }
}

/// As those of `casemate`: 10 for files that are not what they should be, 40 for the system.
fn code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref() {
        Some(FakeTeeError::Damaged { .. }) => 10,
        _ => 40,
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let tee = FakeTee::open(&arguments.state, now())?;
    println!(
        "*** casemate-fake-tee is NOT a TEE. Whoever can read {} can claim to be anything.",
        arguments.state.display()
    );
    println!("*** Use it for development only. Quotes are signed under this root:");
    println!("root SPKI SHA-256 {}", hex::encode(tee.root_spki_sha256()));

    let options = Options {
        mode: arguments.listen_mode,
        ..Options::new(arguments.socket.clone())
    };
    let server =
        Server::start(tee, options, Box::new(now), Box::new(report)).context("cannot serve")?;
    println!("listening on {}", arguments.socket.display());
    server.wait();
    Ok(())
}

fn report(event: &Event) {
    match event {
        Event::Measured(peer) => {
            let measurement = &peer.measurement;
            eprintln!(
                "measured process {} ({:?}): mr_td {} mr_config_id {} rtmr1 {} rtmr2 {}",
                peer.pid,
                peer.executable,
                hex::encode(measurement.mr_td),
                hex::encode(measurement.mr_config_id),
                hex::encode(measurement.rtmr[1]),
                hex::encode(measurement.rtmr[2]),
            );
        }
        Event::NotMeasured(error) => eprintln!("turned away: {error}"),
        Event::TooMany { pid } => eprintln!("turned away process {pid}: too many connections"),
        Event::CutOff(reason) => eprintln!("cut off: {reason:?}"),
        Event::Failed(error) => eprintln!("cannot quote: {error}"),
        Event::Accept(error) => eprintln!("cannot accept: {error}"),
    }
}

fn now() -> u64 {
    // A clock before 1970 yields certificates that nobody accepts.
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("expected octal permissions such as 0600".into()),
    }
}
