//! How many denials may have log entries of their own.
//!
//! Anybody who reaches the broker can be denied as often as they like, and an entry takes room on the disk. So entries
//! about denials are taken from a bucket that refills slowly; what finds it empty is counted, and the count is logged
//! with the next entry. What is *allowed* is always logged, and is not limited here.

use std::sync::Arc;
use std::time::Duration;

use casemate_attest::UnixTime;
use casemate_container::one_line;

use crate::broker::Broker;
use crate::log::Action;

/// Entries that a full bucket holds.
pub const BURST: u64 = 60;
/// Seconds in which one more entry becomes available.
pub const REFILL_SECONDS: u64 = 60;

/// How long a count may be in memory alone.
pub const COUNTED_WITHIN: Duration = Duration::from_secs(60);

/// Strangers and attested guests draw from buckets of their own: who floods `/attest` does not hide what an attested
/// guest was denied.
#[derive(Debug)]
pub struct DenialLimits {
    strangers: Bucket,
    guests: Bucket,
    uncounted: u64,
}

#[derive(Debug)]
struct Bucket {
    left: u64,
    refilled: UnixTime,
}

impl DenialLimits {
    /// Full buckets.
    pub fn new(now: UnixTime) -> Self {
        let full = || Bucket {
            left: BURST,
            refilled: now,
        };
        Self {
            strangers: full(),
            guests: full(),
            uncounted: 0,
        }
    }

    /// Whether a denial of `action` may have an entry now; if not, it is counted.
    pub fn admit(&mut self, action: Action, now: UnixTime) -> bool {
        let bucket = match action {
            Action::Attest => &mut self.strangers,
            _ => &mut self.guests,
        };
        let admitted = bucket.take(now);
        if !admitted {
            self.uncounted = self.uncounted.saturating_add(1);
        }
        admitted
    }

    /// How many were counted and are in no entry yet.
    pub fn uncounted(&self) -> u64 {
        self.uncounted
    }

    /// Says that an entry with this count is on disk.
    pub fn logged(&mut self, count: u64) {
        self.uncounted = self.uncounted.saturating_sub(count);
    }
}

impl Bucket {
    fn take(&mut self, now: UnixTime) -> bool {
        // A clock that is set back refills nothing until it has caught up.
        let refills = now.as_secs().saturating_sub(self.refilled.as_secs()) / REFILL_SECONDS;
        if refills > 0 {
            self.left = self.left.saturating_add(refills).min(BURST);
            let used = refills.saturating_mul(REFILL_SECONDS);
            self.refilled = UnixTime::from_secs(self.refilled.as_secs().saturating_add(used));
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// Logs, once in each `period`, how many denials were left out, until it is dropped: who kills the broker hides no more
/// than the last period's. An entry that cannot be written is tried again.
pub async fn keep_counted(broker: Arc<Broker>, period: Duration) {
    loop {
        tokio::time::sleep(period).await;
        let broker = broker.clone();
        let logged = tokio::task::spawn_blocking(move || broker.log_what_was_left_out()).await;
        if let Ok(Err(error)) = logged {
            let error = one_line(&error);
            tracing::error!(%error, "the count of denials that were left out is not logged");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_refills_slowly_and_never_overflows() {
        let at = UnixTime::from_secs;
        let mut limits = DenialLimits::new(at(1000));
        let burst = |limits: &mut DenialLimits, now: u64| {
            (0..BURST * 2)
                .filter(|_| limits.admit(Action::Attest, at(now)))
                .count() as u64
        };
        assert_eq!(burst(&mut limits, 1000), BURST);
        assert_eq!(burst(&mut limits, 1000 + REFILL_SECONDS - 1), 0);
        assert_eq!(burst(&mut limits, 1000 + REFILL_SECONDS), 1);
        assert_eq!(burst(&mut limits, 500), 0, "a clock that was set back");
        assert_eq!(burst(&mut limits, 1000 + 3 * REFILL_SECONDS), 2);
        assert_eq!(burst(&mut limits, u64::MAX), BURST);
        assert_eq!(limits.uncounted(), 6 * BURST * 2 - 2 * BURST - 3);
        // The other bucket was not touched.
        assert!(limits.admit(Action::Release, at(1000)));
    }
}
