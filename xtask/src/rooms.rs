//! Claims about the rooms that a compiler does not check: who links what, and where `unsafe` may stand.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

/// Packages that must not be reachable from a package by ordinary dependencies, and why.
const UNREACHABLE: &[(&str, &[&str], &str)] = &[
    (
        "casemate-enclave",
        &["casemate-testkit"],
        "a production program knows no fake TEE",
    ),
    (
        "casemate-enclave",
        &["casemate-import"],
        "the enclave parses no foreign model file",
    ),
    (
        "casemate-enclave",
        &["casemate-worker", "casemate-cuda"],
        "an enclave loads no driver",
    ),
    (
        "casemate-broker",
        &["casemate-testkit"],
        "a production program knows no fake TEE",
    ),
    (
        "casemate-broker",
        &["casemate-engine", "casemate-import"],
        "a broker runs no model",
    ),
    (
        "casemate-cli",
        &["casemate-testkit"],
        "a production program knows no fake TEE",
    ),
    (
        "casemate-cli",
        &["casemate-engine", "casemate-audit", "casemate-bench"],
        "who reviews the proxy reads no engine",
    ),
    (
        "casemate-attest",
        &["tokio", "reqwest", "rustix"],
        "appraisal does no I/O",
    ),
    (
        "casemate-listen",
        &["casemate-attest", "casemate-release", "casemate-engine"],
        "connections know nothing of what is said on them",
    ),
    (
        "casemate-worker",
        &[
            "casemate-engine",
            "casemate-container",
            "casemate-channel",
            "casemate-release",
            "casemate-attest",
            "casemate-enclave",
            "casemate-offload",
            "casemate-testkit",
        ],
        "a worker knows no model, no key and no mask",
    ),
    (
        "casemate-offload",
        &[
            "casemate-attest",
            "casemate-release",
            "casemate-channel",
            "casemate-worker",
            "casemate-testkit",
            "tokio",
        ],
        "who reviews masks reads no more than masks",
    ),
    (
        "casemate-engine",
        &["casemate-offload", "casemate-wire"],
        "the engine knows one trait",
    ),
    ("casemate-release", &["tokio", "reqwest"], "no sockets"),
    ("casemate-channel", &["tokio", "reqwest"], "no sockets"),
    (
        "casemate-engine",
        &["casemate-attest", "casemate-release", "casemate-channel"],
        "a model knows no keys",
    ),
];

/// Packages that read what strangers send, and libraries that decompress: a few bytes must stay a few bytes.
const COMPRESSION_FREE: &[&str] = &[
    "casemate-enclave",
    "casemate-broker",
    "casemate-cli",
    "casemate-channel",
    "casemate-release",
    "casemate-import",
];
const DECOMPRESSORS: &[&str] = &[
    "async-compression",
    "brotli",
    "brotli-decompressor",
    "bzip2",
    "compression-codecs",
    "flate2",
    "libz-sys",
    "lz4_flex",
    "miniz_oxide",
    "ruzstd",
    "snap",
    "xz2",
    "zlib-rs",
    "zstd",
    "zstd-safe",
];

/// The rooms that may hold `unsafe`.
const UNSAFE_ROOMS: &[&str] = &["kernels", "cuda"];

/// Checks every claim and returns how many there are.
pub(crate) fn check() -> Result<usize> {
    let mut broken = Vec::new();
    for (package, forbidden, why) in UNREACHABLE {
        let linked = linked_by(package)?;
        for name in forbidden
            .iter()
            .filter(|name| linked.iter().any(|l| l == *name))
        {
            broken.push(format!("{package} links {name}: {why}"));
        }
    }
    for package in COMPRESSION_FREE {
        let linked = linked_by(package)?;
        for name in DECOMPRESSORS
            .iter()
            .filter(|name| linked.iter().any(|l| l == *name))
        {
            broken.push(format!(
                "{package} links {name}: nothing decompresses what strangers send"
            ));
        }
    }
    let mut rooms = 0;
    for entry in fs::read_dir(workspace().join("crates"))? {
        let room = entry?.path();
        let name = room
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if UNSAFE_ROOMS.contains(&name.as_str()) {
            continue;
        }
        rooms += 1;
        for root in ["src/lib.rs", "src/main.rs"] {
            let path = room.join(root);
            if path.exists() && !fs::read_to_string(&path)?.contains("#![forbid(unsafe_code)]") {
                broken.push(format!("{} does not forbid unsafe code", path.display()));
            }
        }
    }
    if !broken.is_empty() {
        bail!(
            "rooms do not hold what they claim:\n  {}",
            broken.join("\n  ")
        );
    }
    Ok(UNREACHABLE.len() + COMPRESSION_FREE.len() + rooms)
}

/// Names of all packages that `package` links.
fn linked_by(package: &str) -> Result<Vec<String>> {
    let output = process::cargo()
        .args([
            "tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}",
        ])
        .args(["--package", package])
        .output()
        .context("cannot start cargo tree")?;
    if !output.status.success() {
        bail!(
            "cargo tree failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let names = String::from_utf8(output.stdout)?;
    let names: Vec<_> = names
        .lines()
        .filter_map(|line| line.split(' ').next().map(str::to_owned))
        .collect();
    if names.len() < 2 {
        bail!("cargo tree names no dependencies of {package}");
    }
    Ok(names)
}
