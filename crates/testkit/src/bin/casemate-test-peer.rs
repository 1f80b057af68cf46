//! `casemate-test-peer SOCKET [anything…]`: asks a quoting service for one quote over zeros and prints the evidence.
//! Tests start it with different arguments, environments and configurations and compare what the service measured.
//! With `--hang-up` as second argument it only connects and ends.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use casemate_attest::ReportData;
use casemate_tee::{QuoteProvider, QuotingService};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let socket = arguments
        .next()
        .context("usage: casemate-test-peer SOCKET")?;
    let socket = Path::new(&socket);
    if arguments
        .next()
        .is_some_and(|argument| argument == "--hang-up")
    {
        UnixStream::connect(socket)?;
        return Ok(());
    }
    let service = QuotingService::connect(socket, Duration::from_secs(20))?;
    println!("{}", service.quote(&ReportData::new([0; 64]))?.to_json());
    Ok(())
}
