//! `cargo run -p casemate-e2e --bin soak -- --minutes 30`: mixed clients against a deployment of the programs beside it.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::Result;
use clap::Parser;

/// Honest and hostile clients together, for a while; fails unless all gauges return to zero and memory stays flat.
///
/// Build the programs first: cargo build --workspace --bins
#[derive(Parser)]
struct Arguments {
    /// How long
    #[arg(long, default_value_t = 30)]
    minutes: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let duration = Duration::from_secs(60 * arguments.minutes);
    let report = casemate_e2e::soak::run(duration, |line| println!("{line}"))?;
    print!("{report}");
    println!("all gauges are back at zero, and memory is flat");
    Ok(())
}
