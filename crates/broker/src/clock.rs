//! The time as an argument of the broker, so that tests can set it.

use std::time::{SystemTime, UNIX_EPOCH};

use casemate_attest::UnixTime;

/// Says what time it is.
pub trait Clock: Send + Sync {
    /// Seconds since 1970.
    fn now(&self) -> UnixTime;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixTime {
        // A clock before 1970 reads as 1970: every credential and collateral is then not yet valid.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        UnixTime::from_secs(since.as_secs())
    }
}
