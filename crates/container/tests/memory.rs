//! The loader's promise of memory: at most the weights × 1.05 + 64 MiB, measured by the kernel.
//!
//! Alone in its binary, since the peak is that of the whole process.

use std::fs;

use casemate_container::bench::Synthetic;
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, SealOptions, SealedFile, Silent, seal};

/// Field of /proc/self/status, in bytes.
fn status(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

#[test]
fn opening_peaks_below_105_percent_plus_64_mib_and_sealing_streams() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    let source = Synthetic::new(256 * MIB);
    seal(
        &source,
        &SealOptions::default(),
        &data_key,
        &provider,
        &path,
        &Silent,
    )
    .unwrap();
    let after_sealing = status("VmHWM:");
    assert!(
        after_sealing < 64 * MIB,
        "sealing 256 MiB peaked at {} MiB",
        after_sealing / MIB
    );

    let unlocked = SealedFile::open(&path)
        .unwrap()
        .unlock(&data_key, &provider.verifying_key())
        .unwrap();
    let weights = unlocked.manifest().tensor_bytes();
    assert!(weights >= 256 * MIB);
    unlocked.check(2, &Silent).unwrap();
    let after_checking = status("VmHWM:");
    assert!(
        after_checking < 64 * MIB,
        "checking 256 MiB peaked at {} MiB",
        after_checking / MIB
    );

    let mut model = unlocked.load(2, &Silent).unwrap();
    let peak = status("VmHWM:");
    assert!(peak >= weights, "the peak covers the model");
    let limit = weights + weights / 20 + 64 * MIB;
    assert!(
        peak <= limit,
        "peak {} MiB, limit {} MiB",
        peak / MIB,
        limit / MIB
    );

    let names: Vec<_> = model
        .manifest()
        .tensors()
        .iter()
        .map(|t| t.name.clone())
        .collect();
    for name in &names {
        model.release(name);
    }
    let rest = status("VmRSS:");
    assert!(rest < 64 * MIB, "{} MiB remain after release", rest / MIB);
}
