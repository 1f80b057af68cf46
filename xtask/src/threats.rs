//! Whether the threat model tells the truth about its tests: each row of a boundary names a test that exists, or says
//! that nothing is done.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::workspace;

/// A mitigation that names no test begins with one of these: nothing is done, or somebody else does it.
const WITHOUT_TEST: &[&str] = &["none", "the TEE's:", "the platform's:", "the library's:"];

/// Checks every row and returns how many tests the document names.
pub(crate) fn check() -> Result<usize> {
    let document = workspace().join("THREAT_MODEL.md");
    let text = fs::read_to_string(&document)
        .with_context(|| format!("cannot read {}", document.display()))?;
    let mut tests = BTreeSet::new();
    collect_tests(&workspace().join("crates"), &mut tests)?;
    collect_tests(&workspace().join("xtask"), &mut tests)?;
    judge(&text, &tests)
}

fn judge(text: &str, tests: &BTreeSet<String>) -> Result<usize> {
    let mut named = BTreeSet::new();
    let mut wrong = Vec::new();
    let mut boundary = None;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            boundary = title.strip_prefix("Boundary: ");
        }
        let Some(boundary) = boundary else { continue };
        let Some(row) = line.strip_prefix("| ") else {
            continue;
        };
        let cells: Vec<_> = row.split(" | ").map(str::trim).collect();
        let (threat, mitigation) = match cells[..] {
            ["threat", ..] => continue,
            [threat, mitigation, _] => (threat, mitigation),
            _ => {
                wrong.push(format!("{boundary}: not three cells: {line}"));
                continue;
            }
        };
        let in_row: Vec<_> = backticked(row).filter(|name| is_test_name(name)).collect();
        let excused = WITHOUT_TEST
            .iter()
            .any(|beginning| mitigation.starts_with(beginning));
        if in_row.is_empty() && !excused {
            wrong.push(format!("{boundary}: no test shows: {threat}"));
        }
        for name in in_row {
            if !tests.contains(name) {
                wrong.push(format!("{boundary}: no test is called {name}"));
            }
            named.insert(name);
        }
    }
    if !wrong.is_empty() {
        bail!("THREAT_MODEL.md does not hold:\n  {}", wrong.join("\n  "));
    }
    if named.is_empty() {
        bail!("THREAT_MODEL.md names no tests");
    }
    Ok(named.len())
}

/// What stands between backticks.
fn backticked(row: &str) -> impl Iterator<Item = &str> {
    row.split('`').skip(1).step_by(2)
}

/// Tests of this project are sentences: lower case, at least three words.
fn is_test_name(text: &str) -> bool {
    text.matches('_').count() >= 2
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Collects the names of functions that follow a test attribute.
fn collect_tests(directory: &Path, tests: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_tests(&path, tests)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            tests.extend(tests_of(&fs::read_to_string(&path)?).map(str::to_owned));
        }
    }
    Ok(())
}

fn tests_of(source: &str) -> impl Iterator<Item = &str> {
    let mut is_test = false;
    source.lines().filter_map(move |line| {
        let line = line.trim_start();
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if let Some(rest) = line
            .strip_prefix("fn ")
            .or_else(|| line.strip_prefix("async fn "))
            && std::mem::take(&mut is_test)
        {
            return rest.split('(').next();
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tests() -> BTreeSet<String> {
        BTreeSet::from(["a_lie_is_refused".to_owned()])
    }

    fn complaint(text: &str) -> String {
        judge(text, &tests()).unwrap_err().to_string()
    }

    #[test]
    fn rows_without_a_test_or_with_one_that_is_not_there_are_found() {
        let row = |mitigation| {
            format!(
                "## Boundary: x\n| threat | mitigation | residual |\n|---|---|---|\n| lies | {mitigation} | |\n"
            )
        };
        assert_eq!(
            judge(&row("it looks. `a_lie_is_refused`"), &tests()).unwrap(),
            1
        );
        assert!(complaint(&row("it looks")).contains("no test shows: lies"));
        assert!(
            complaint(&row("`a_lie_was_refused`")).contains("no test is called a_lie_was_refused")
        );
        assert!(complaint(&row("none")).contains("names no tests"));
        assert!(complaint("## Boundary: x\n| a | b |\n").contains("not three cells"));
    }

    #[test]
    fn the_threat_model_holds() {
        assert!(check().unwrap() > 40);
    }

    #[test]
    fn only_functions_under_a_test_attribute_are_tests() {
        let source = "#[test]\nfn one_two_three() {}\nfn four_five_six() {}\n#[tokio::test(x)]\n#[y]\nasync fn seven() {}";
        assert_eq!(
            tests_of(source).collect::<Vec<_>>(),
            ["one_two_three", "seven"]
        );
    }
}
