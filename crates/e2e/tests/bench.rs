//! `casemate bench --protected` over the real programs: the figures are there, and belong to the load that was asked for.

use std::process::Command;

use casemate_testkit::deployment::Deployment;
use serde_json::Value;

#[test]
fn protection_is_compared_with_none_on_the_same_load() {
    let programs = Deployment::programs_of_this_build().unwrap();
    let output = Command::new(programs.join("casemate"))
        .args([
            "bench",
            "--synthetic",
            "smoke",
            "--quick",
            "--compute",
            "int8-g32",
        ])
        .args(["--kv-type", "int8", "--protected", "--json"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let protected = &report["protected"];
    let number = |name: &str| protected[name].as_f64().unwrap();
    assert_eq!(protected["kv_type"], "int8");
    assert_eq!(protected["ratio"]["pairs"], 20);
    assert_eq!(protected["ratios"].as_array().unwrap().len(), 20);
    assert!(
        (56.0..72.0).contains(&number("prompt_tokens")),
        "{protected}"
    );
    assert_eq!(number("tokens"), 16.0);
    // A role, the tokens (a piece may hold none or wait for the next), usage and the end.
    assert!(number("events") >= 3.0);
    let ratio = |end: &str| protected["ratio"][end].as_f64().unwrap();
    assert!(0.0 < ratio("low") && ratio("low") <= ratio("mean") && ratio("mean") <= ratio("high"));
    // Encrypting and signing take time, and the enclave does more than that.
    assert!(
        number("cpu_protection") > 0.0 && number("cpu_share") < 1.0,
        "{protected}"
    );
}
