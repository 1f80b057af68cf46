//! The time, by a clock that its host sets and one that runs by itself, whichever is ahead.
//!
//! The host can stop the guest's wall clock, or set it back. Were that the only clock, no renewal would be due and nothing
//! would end. So once a credential has confirmed the time, the monotonic clock counts on from there, and the wall clock
//! can hurry it but not hold it up. Each credential confirms it anew: an issuer's time that is more than a minute ahead of
//! ours is refused, so what the monotonic clock starts from cannot lie far back.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::access::Clock;

/// Seconds since the Unix epoch that pass even if the wall clock does not move.
pub struct SteadyClock {
    wall: Box<dyn Fn() -> u64 + Send + Sync>,
    running: Clock,
    held: Mutex<Option<Held>>,
}

/// A confirmed time, and what the monotonic clock said then.
#[derive(Clone, Copy)]
struct Held {
    time: Duration,
    running: Duration,
}

impl SteadyClock {
    /// `wall` gives seconds since the Unix epoch, `running` the time since any fixed moment.
    pub fn new(wall: impl Fn() -> u64 + Send + Sync + 'static, running: Clock) -> SteadyClock {
        SteadyClock {
            wall: Box::new(wall),
            running,
            held: Mutex::new(None),
        }
    }

    /// Seconds since the Unix epoch.
    pub fn now(&self) -> u64 {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        self.time(held, (self.running)()).as_secs()
    }

    /// A credential was found valid now: from here on, the time is at least what passes.
    pub fn confirm(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let running = (self.running)();
        let time = self.time(*held, running);
        *held = Some(Held { time, running });
    }

    fn time(&self, held: Option<Held>, running: Duration) -> Duration {
        let least = held.map_or(Duration::ZERO, |held| {
            let passed = running.saturating_sub(held.running);
            held.time.saturating_add(passed)
        });
        least.max(Duration::from_secs((self.wall)()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_clock_that_is_stopped_or_set_back_holds_nothing_up() {
        let (wall, running) = (Arc::new(AtomicU64::new(1000)), Arc::new(AtomicU64::new(7)));
        let (read_wall, read_running) = (Arc::clone(&wall), Arc::clone(&running));
        let clock = SteadyClock::new(
            move || read_wall.load(Ordering::Relaxed),
            Arc::new(move || Duration::from_secs(read_running.load(Ordering::Relaxed))),
        );
        let at = |of_wall, of_running| {
            wall.store(of_wall, Ordering::Relaxed);
            running.store(of_running, Ordering::Relaxed);
            clock.now()
        };
        // Nothing is known before the first credential: the wall clock may be corrected.
        assert_eq!(at(5000, 8), 5000);
        assert_eq!(at(1000, 9), 1000);
        clock.confirm();
        assert_eq!(at(1000, 109), 1100, "stopped");
        assert_eq!(at(0, 209), 1200, "set back");
        assert_eq!(at(1300, 209), 1300, "ahead");
        assert_eq!(at(1200, 209), 1200, "and corrected");
        at(0, 309);
        clock.confirm();
        assert_eq!(at(0, 319), 1310, "confirmed anew while stopped");
    }
}
