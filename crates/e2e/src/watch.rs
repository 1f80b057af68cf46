//! What a running deployment says of itself: gauges of its metrics, and resident memory of its programs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use casemate_testkit::deployment::http_get;

/// Gauges of an enclave that are zero when nobody asks anything.
pub const GAUGES: [&str; 4] = [
    "casemate_requests_open",
    "casemate_requests_running",
    "casemate_requests_waiting",
    "casemate_kv_bytes_used",
];

/// One figure of an enclave's metrics.
pub fn metric(enclave: &str, name: &str) -> Result<f64> {
    let metrics = http_get(enclave, "/metrics").context("the enclave's metrics")?;
    let value = metrics
        .body
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.with_context(|| format!("no {name} in {}", metrics.body))?;
    Ok(value.parse()?)
}

/// Waits until every one of [`GAUGES`] is zero.
pub fn quiet(enclave: &str, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let mut held = Vec::new();
        for name in GAUGES {
            let value = metric(enclave, name)?;
            if value != 0.0 {
                held.push(format!("{name} {value}"));
            }
        }
        if held.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("not back at zero: {}", held.join(", "));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Resident memory of a process in KiB, as the system counts it.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    let kib = line.trim().strip_suffix("kB").context("VmRSS in kB")?;
    Ok(kib.trim().parse()?)
}
