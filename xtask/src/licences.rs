//! Licence check over everything that is linked: each crate's SPDX expression must be satisfiable from the list
//! below. AGPL and other copyleft licences are not on it.

use anyhow::{Context, Result, bail};
use spdx::Expression;

use crate::process;

/// Licences that may be linked into the product.
const ALLOWED: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "BlueOak-1.0.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks every package of the lock file and returns how many there are.
pub(crate) fn check() -> Result<usize> {
    let output = process::cargo()
        .args(["metadata", "--format-version", "1", "--locked"])
        // Also what is built only when asked for.
        .arg("--all-features")
        .output()
        .context("cannot start cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists packages")?;
    let mut refused = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or("?");
        match package["license"].as_str() {
            Some(licence) if allowed(licence)? => {}
            Some(licence) => refused.push(format!("{name}: {licence}")),
            None => refused.push(format!("{name}: no licence named")),
        }
    }
    if !refused.is_empty() {
        bail!("licences not on the list:\n  {}", refused.join("\n  "));
    }
    Ok(packages.len())
}

fn allowed(expression: &str) -> Result<bool> {
    // Old manifests write "MIT/Apache-2.0" for "MIT OR Apache-2.0".
    let expression = Expression::parse(&expression.replace('/', " OR "))
        .with_context(|| format!("licence expression {expression:?}"))?;
    Ok(expression.evaluate(|requirement| {
        requirement
            .license
            .id()
            .is_some_and(|id| ALLOWED.contains(&id.name))
    }))
}

#[cfg(test)]
mod tests {
    use super::allowed;

    #[test]
    fn a_choice_is_allowed_if_one_side_is() {
        assert!(allowed("MIT OR AGPL-3.0-only").unwrap());
        assert!(allowed("MIT/Apache-2.0").unwrap());
        assert!(allowed("Apache-2.0 WITH LLVM-exception OR GPL-2.0-only").unwrap());
    }

    #[test]
    fn copyleft_is_refused_alone_and_in_conjunction() {
        assert!(!allowed("AGPL-3.0-only").unwrap());
        assert!(!allowed("MIT AND GPL-3.0-only").unwrap());
        assert!(!allowed("LGPL-2.1-or-later").unwrap());
    }
}
