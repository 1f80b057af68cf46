//! The record of an appraisal: every check that passed, failed or was skipped, in order, and its rendering as a
//! table. Rooms that check more (the keyset, the credential) append to it. It decides nothing.

use std::fmt::Write as _;

use serde::Serialize;

use crate::appraisal::RootOfTrust;
use crate::denial::Denial;

/// How a check ended. Skipped never counts as passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// What was found is what was expected.
    Passed,
    /// It is not.
    Failed,
    /// It was not looked at; `remedy` says why.
    Skipped,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Name of the claim.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What was expected; empty for a skipped check.
    pub expected: String,
    /// What to do about a failure, or why the check was skipped; empty for a passed check.
    pub remedy: String,
}

/// The checks of one appraisal in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Transcript {
    root_of_trust: RootOfTrust,
    checks: Vec<Check>,
}

impl Transcript {
    /// A transcript without checks and with an undetermined root of trust.
    pub fn new() -> Transcript {
        Transcript::default()
    }

    /// The checks in the order in which they were made.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// Where the evidence's chain of signatures ends.
    pub fn root_of_trust(&self) -> RootOfTrust {
        self.root_of_trust
    }

    pub(crate) fn set_root_of_trust(&mut self, root: RootOfTrust) {
        self.root_of_trust = root;
    }

    /// Whether there are checks and none failed. Not a verdict: that is [`crate::Appraised`].
    pub fn is_clean(&self) -> bool {
        !self.checks.is_empty() && self.failed().next().is_none()
    }

    /// The failed checks.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks
            .iter()
            .filter(|check| check.status == Status::Failed)
    }

    /// Records a check that passed.
    pub fn pass(
        &mut self,
        name: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.checks.push(Check {
            name,
            status: Status::Passed,
            found: found.into(),
            expected: expected.into(),
            remedy: String::new(),
        });
    }

    /// Records a check that failed.
    pub fn fail(&mut self, denial: &Denial) {
        self.checks.push(Check {
            name: denial.claim,
            status: Status::Failed,
            found: denial.found.clone(),
            expected: denial.expected.clone(),
            remedy: denial.remedy.clone(),
        });
    }

    /// Records a check that was not made, and why.
    pub fn skip(&mut self, name: &'static str, found: impl Into<String>, why: impl Into<String>) {
        self.checks.push(Check {
            name,
            status: Status::Skipped,
            found: found.into(),
            expected: String::new(),
            remedy: why.into(),
        });
    }

    /// Appends the checks of another transcript, and takes over where its evidence's chain ends.
    pub fn append(&mut self, later: Transcript) {
        self.root_of_trust = later.root_of_trust;
        self.checks.extend(later.checks);
    }

    /// The checks as a table for people: one line per check, followed by what was expected where it failed and by
    /// the reason where it was skipped. With `colour`, ANSI colours mark the status.
    ///
    /// Everything that comes from the evidence is shown with control characters escaped.
    pub fn to_table(&self, colour: bool) -> String {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(0);
        let mut table = String::new();
        for check in &self.checks {
            let (word, code) = match check.status {
                Status::Passed => ("passed ", "32"),
                Status::Failed => ("FAILED ", "1;31"),
                Status::Skipped => ("skipped", "33"),
            };
            let (on, off) = if colour {
                (format!("\u{1b}[{code}m"), "\u{1b}[0m")
            } else {
                (String::new(), "")
            };
            let found = printable(&check.found);
            // A String takes every write.
            let _ = writeln!(table, "{on}{word}{off}  {:width$}  {found}", check.name);
            let mut note = |label: &str, text: &str| {
                if !text.is_empty() {
                    let text = printable(text);
                    let _ = writeln!(table, "{:7}  {:width$}  {label}{text}", "", "");
                }
            };
            match check.status {
                Status::Passed => {}
                Status::Failed => {
                    note("expected: ", &check.expected);
                    note("to do:    ", &check.remedy);
                }
                Status::Skipped => note("because:  ", &check.remedy),
            }
        }
        let count = |status| {
            self.checks
                .iter()
                .filter(|check| check.status == status)
                .count()
        };
        let _ = writeln!(
            table,
            "{} passed, {} failed, {} skipped",
            count(Status::Passed),
            count(Status::Failed),
            count(Status::Skipped)
        );
        table
    }
}

/// Text from outside must not move the reader's cursor, recolour a verdict or turn its direction.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escape = c.is_control()
                || matches!(
                    c,
                    '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
                );
            let plain = (!escape).then_some(c);
            let escaped = escape.then(|| c.escape_default()).into_iter().flatten();
            plain.into_iter().chain(escaped)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Transcript {
        let mut transcript = Transcript::new();
        transcript.pass("quote.structure", "version 4, TDX", "");
        transcript.fail(&Denial::refused(
            "debug",
            "\u{1b}[2Jon",
            "off",
            "start the TD without it",
        ));
        transcript.skip("measurement.mr_owner", "00", "the policy names no value");
        transcript
    }

    #[test]
    fn shows_status_expectation_and_reason_and_counts_them() {
        assert_eq!(
            sample().to_table(false),
            "passed   quote.structure       version 4, TDX\n\
             FAILED   debug                 \\u{1b}[2Jon\n\
             \u{20}                              expected: off\n\
             \u{20}                              to do:    start the TD without it\n\
             skipped  measurement.mr_owner  00\n\
             \u{20}                              because:  the policy names no value\n\
             1 passed, 1 failed, 1 skipped\n"
        );
    }

    #[test]
    fn colours_only_when_asked_and_never_from_the_evidence() {
        assert!(!sample().to_table(false).contains('\u{1b}'));
        let coloured = sample().to_table(true);
        assert!(coloured.contains("\u{1b}[1;31mFAILED "));
        assert!(!coloured.contains("\u{1b}[2J"));
    }

    #[test]
    fn is_clean_only_with_checks_of_which_none_failed() {
        assert!(!Transcript::new().is_clean());
        assert!(!sample().is_clean());
        let mut transcript = Transcript::new();
        transcript.pass("a", "", "");
        transcript.skip("b", "", "why");
        assert!(transcript.is_clean());
    }
}
