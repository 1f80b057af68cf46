//! Says which commit the program was built from, so that a report can.

use std::process::Command;

fn main() {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    let commit = commit.map_or_else(
        || "unknown".to_owned(),
        |commit| format!("{commit}{}", if changed { ", changed" } else { "" }),
    );
    println!("cargo::rustc-env=CASEMATE_COMMIT={commit}");
    // What HEAD points to moves with each commit; its log does too.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    println!("cargo::rerun-if-changed=build.rs");
}
