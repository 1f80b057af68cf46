//! Counters for operators, in Prometheus' text format; nothing per client.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::log::{Action, Verdict};

const ACTIONS: [(Action, &str); 3] = [
    (Action::Attest, "attest"),
    (Action::Release, "release"),
    (Action::Credential, "credential"),
];
const VERDICTS: [(Verdict, &str); 3] = [
    (Verdict::Genuine, "genuine"),
    (Verdict::Development, "development"),
    (Verdict::Denied, "denied"),
];

/// Decisions by action and verdict, and requests that never became decisions.
#[derive(Debug, Default)]
pub struct Metrics {
    decisions: [[AtomicU64; 3]; 3],
    rejected: AtomicU64,
    suppressed: AtomicU64,
}

impl Metrics {
    /// Counts a decision that was logged.
    pub fn count(&self, action: Action, verdict: Verdict) {
        let row = ACTIONS.iter().position(|(known, _)| *known == action);
        let column = VERDICTS.iter().position(|(known, _)| *known == verdict);
        if let (Some(row), Some(column)) = (row, column) {
            self.decisions[row][column].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a request that was malformed or had no session.
    pub fn count_rejected(&self) {
        self.rejected.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a denial that was left out of the log, where its number will stand.
    pub fn count_suppressed(&self) {
        self.suppressed.fetch_add(1, Ordering::Relaxed);
    }

    /// How often this was decided.
    pub fn decisions(&self, action: Action, verdict: Verdict) -> u64 {
        let row = ACTIONS.iter().position(|(known, _)| *known == action);
        let column = VERDICTS.iter().position(|(known, _)| *known == verdict);
        match (row, column) {
            (Some(row), Some(column)) => self.decisions[row][column].load(Ordering::Relaxed),
            _ => 0,
        }
    }

    /// The text that `/metrics` serves; sessions are counted where they are kept.
    pub fn render(&self, sessions: (usize, usize), log_size: u64) -> String {
        let mut text = String::from(
            "# HELP casemate_broker_decisions_total Logged decisions.\n\
             # TYPE casemate_broker_decisions_total counter\n",
        );
        for (row, (_, action)) in ACTIONS.iter().enumerate() {
            for (column, (_, verdict)) in VERDICTS.iter().enumerate() {
                let count = self.decisions[row][column].load(Ordering::Relaxed);
                let _ = writeln!(
                    text,
                    "casemate_broker_decisions_total{{action=\"{action}\",verdict=\"{verdict}\"}} {count}"
                );
            }
        }
        let _ = write!(
            text,
            "# HELP casemate_broker_rejected_total Requests refused before any decision.\n\
             # TYPE casemate_broker_rejected_total counter\n\
             casemate_broker_rejected_total {}\n\
             # HELP casemate_broker_denials_suppressed_total Denials that the log counts without an entry each.\n\
             # TYPE casemate_broker_denials_suppressed_total counter\n\
             casemate_broker_denials_suppressed_total {}\n\
             # HELP casemate_broker_sessions Open sessions.\n\
             # TYPE casemate_broker_sessions gauge\n\
             casemate_broker_sessions{{state=\"pending\"}} {}\n\
             casemate_broker_sessions{{state=\"attested\"}} {}\n\
             # HELP casemate_broker_log_entries Entries in the decision log.\n\
             # TYPE casemate_broker_log_entries gauge\n\
             casemate_broker_log_entries {log_size}\n",
            self.rejected.load(Ordering::Relaxed),
            self.suppressed.load(Ordering::Relaxed),
            sessions.0,
            sessions.1,
        );
        text
    }
}
