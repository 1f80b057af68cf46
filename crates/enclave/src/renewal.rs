//! When keyset and credential are renewed, and when again after a failure.
//!
//! A renewal is due in the second half of the life of what is held, at a moment that chance picks within a tenth of that
//! life, so that replicas which started together do not stay together. After a failure it is tried again after
//! [`FIRST_PAUSE`], then after twice that and so on, up to [`LONGEST_PAUSE`], each time shortened by chance to between a
//! half and the whole. A broker that comes back is thus neither overrun, nor found too late: with a credential of the
//! usual 15 minutes there are more than six minutes, and ten attempts, until users would notice.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use casemate_container::one_line;
use tracing::{error, info};

use crate::clock::SteadyClock;

/// How often the time is looked at.
const TICK: Duration = Duration::from_secs(1);
/// Pause after the first failure, in seconds.
pub const FIRST_PAUSE: u64 = 5;
/// Longest pause between two attempts, in seconds.
pub const LONGEST_PAUSE: u64 = 60;

/// The time for which keyset and credential both hold, in seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// From when.
    pub from: u64,
    /// Until when, exclusively.
    pub until: u64,
}

/// A number from 0 up to and including the one given, as chance wants.
pub type Chance = Box<dyn FnMut(u64) -> u64 + Send>;

/// The system's chance.
#[must_use]
pub fn system_chance() -> Chance {
    Box::new(|most| {
        let mut bytes = [0; 8];
        // Without randomness there is no jitter; nothing secret depends on it.
        let _ = aws_lc_rs::rand::fill(&mut bytes);
        u64::from_le_bytes(bytes) % most.saturating_add(1).max(1)
    })
}

/// Decides when to renew.
pub struct Schedule {
    chance: Chance,
    next: u64,
    failures: u32,
}

impl Schedule {
    /// For an identity that has just been obtained.
    #[must_use]
    pub fn new(life: Life, chance: Chance) -> Self {
        let mut schedule = Self {
            chance,
            next: 0,
            failures: 0,
        };
        schedule.renewed(life);
        schedule
    }

    /// Whether to try at `now`; `urgent` when the identity is used up before its time.
    #[must_use]
    pub fn is_due(&self, now: u64, urgent: bool) -> bool {
        // Even what is urgent waits for a broker that has just failed.
        now >= self.next || (urgent && self.failures == 0)
    }

    /// It succeeded, and what was obtained has this life.
    pub fn renewed(&mut self, life: Life) {
        let seconds = life.until.saturating_sub(life.from);
        self.failures = 0;
        self.next = life.from + seconds / 2 + (self.chance)(seconds / 10);
    }

    /// It failed at `now`; returns the seconds until the next attempt.
    pub fn failed(&mut self, now: u64) -> u64 {
        let whole = FIRST_PAUSE
            .saturating_mul(1 << self.failures.min(16))
            .min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        let pause = whole - (self.chance)(whole / 2);
        self.next = now + pause;
        pause
    }
}

/// What is renewed.
pub trait Renewable: Send + Sync {
    /// Why it was not.
    type Error: Error + 'static;

    /// The time for which it holds.
    fn life(&self) -> Life;
    /// Whether it is used up before its time. Also the moment to forget what has expired.
    fn is_used_up(&self, now: u64) -> bool;
    /// Renews it.
    fn renew(&self, now: u64) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// Renews for as long as it is polled. Failing is not fatal at once: until the credential expires the service stays what
/// it was, and after that it serves nobody. What was obtained, at first just now, confirms the clock.
pub async fn keep_fresh<R: Renewable>(what: Arc<R>, clock: &SteadyClock, chance: Chance) {
    clock.confirm();
    let mut schedule = Schedule::new(what.life(), chance);
    loop {
        tokio::time::sleep(TICK).await;
        let now = clock.now();
        if !schedule.is_due(now, what.is_used_up(now)) {
            continue;
        }
        match what.renew(now).await {
            Ok(()) => {
                clock.confirm();
                schedule.renewed(what.life());
                info!("keyset and credential renewed");
            }
            Err(error) => {
                let again_in = schedule.failed(clock.now());
                let error = one_line(&error);
                error!(%error, again_in, "keyset and credential could not be renewed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::*;

    const START: u64 = 1_790_000_000;

    fn least() -> Chance {
        Box::new(|_| 0)
    }

    fn most() -> Chance {
        Box::new(|most| most)
    }

    fn life(seconds: u64) -> Life {
        Life {
            from: START,
            until: START + seconds,
        }
    }

    #[test]
    fn renewal_is_due_at_a_fraction_of_the_life() {
        for (chance, due) in [(least(), 450), (most(), 540)] {
            let schedule = Schedule::new(life(900), chance);
            assert!(!schedule.is_due(START + due - 1, false));
            assert!(schedule.is_due(START + due, false));
            assert!(schedule.is_due(START + 1, true), "used up early");
        }
        let schedule = Schedule::new(life(60), least());
        assert!(!schedule.is_due(START + 29, false), "short lives too");
        assert!(schedule.is_due(START + 30, false));
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_start_anew() {
        let mut schedule = Schedule::new(life(900), least());
        let now = START + 450;
        let pauses: Vec<_> = (0..6).map(|_| schedule.failed(now)).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60]);
        assert!(!schedule.is_due(now + 59, true), "urgency waits as well");
        assert!(schedule.is_due(now + 60, false));
        schedule.renewed(life(900));
        assert_eq!(schedule.failed(now), 5);
        let mut hasty = Schedule::new(life(900), most());
        assert_eq!([hasty.failed(now), hasty.failed(now)], [3, 5]);
    }

    proptest! {
        /// Whatever chance says, there is always a next attempt, within bounds.
        #[test]
        fn pauses_stay_within_bounds(numbers: Vec<u64>, seconds in 1u64..100_000) {
            let mut left = numbers.clone().into_iter();
            let chance = Box::new(move |most: u64| left.next().unwrap_or(0) % (most + 1));
            let mut schedule = Schedule::new(life(seconds), chance);
            let next = schedule.next - START;
            prop_assert!(next >= seconds / 2 && next <= seconds / 2 + seconds / 10);
            for _ in 0..numbers.len() {
                let pause = schedule.failed(START);
                prop_assert!((FIRST_PAUSE / 2..=LONGEST_PAUSE).contains(&pause), "{pause}");
                prop_assert!(schedule.is_due(START + pause, false));
                prop_assert!(!schedule.is_due(START + pause - 1, true));
            }
        }
    }

    /// Holds for 15 minutes; fails while the broker is away.
    struct Identity {
        start: Instant,
        state: Mutex<State>,
    }

    struct State {
        life: Life,
        away: std::ops::Range<u64>,
        used_up: bool,
        attempts: Vec<u64>,
    }

    impl Identity {
        fn new(away: std::ops::Range<u64>) -> Arc<Self> {
            let state = State {
                life: life(900),
                away,
                used_up: false,
                attempts: Vec::new(),
            };
            Arc::new(Self {
                start: Instant::now(),
                state: Mutex::new(state),
            })
        }

        fn now(&self) -> u64 {
            START + self.start.elapsed().as_secs()
        }
    }

    #[derive(Debug, thiserror::Error)]
    #[error("away")]
    struct Away(#[source] std::io::Error);

    impl Renewable for Identity {
        type Error = Away;

        fn life(&self) -> Life {
            self.state.lock().unwrap().life
        }

        fn is_used_up(&self, _: u64) -> bool {
            self.state.lock().unwrap().used_up
        }

        async fn renew(&self, now: u64) -> Result<(), Away> {
            let mut state = self.state.lock().unwrap();
            state.attempts.push(now - START);
            if state.away.contains(&(now - START)) {
                return Err(Away(std::io::Error::other("no route")));
            }
            state.used_up = false;
            state.life = Life {
                from: now,
                until: now + 900,
            };
            Ok(())
        }
    }

    async fn after(identity: &Arc<Identity>, seconds: u64) -> Vec<u64> {
        let clock = Arc::clone(identity);
        attempts(identity, move || clock.now(), seconds).await
    }

    async fn attempts(
        identity: &Arc<Identity>,
        wall: impl Fn() -> u64 + Send + Sync + 'static,
        seconds: u64,
    ) -> Vec<u64> {
        let start = identity.start;
        let clock = SteadyClock::new(wall, Arc::new(move || start.elapsed()));
        let fresh = keep_fresh(Arc::clone(identity), &clock, least());
        let _ = tokio::time::timeout(Duration::from_secs(seconds), fresh).await;
        identity.state.lock().unwrap().attempts.clone()
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_stops_the_clock_does_not_stop_renewal() {
        let identity = Identity::new(0..0);
        assert_eq!(attempts(&identity, || START, 1000).await, [450, 900]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_that_is_away_for_minutes_is_not_noticed_by_users() {
        let identity = Identity::new(400..800);
        let attempts = after(&identity, 1300).await;
        assert_eq!(
            attempts,
            [450, 455, 465, 485, 525, 585, 645, 705, 765, 825, 1275]
        );
        // It never expired: what was obtained at the start holds until 900.
        assert_eq!(identity.life().until, START + 1275 + 900);
    }

    #[tokio::test(start_paused = true)]
    async fn the_log_says_why_there_was_no_renewal() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(Arc::new(file.reopen().unwrap()))
            .finish();
        let _default = tracing::subscriber::set_default(subscriber);
        after(&Identity::new(400..800), 452).await;
        let log = std::fs::read_to_string(file.path()).unwrap();
        assert!(
            log.contains("could not be renewed error=away: no route again_in="),
            "{log}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_used_up_is_renewed_at_once() {
        let identity = Identity::new(0..0);
        identity.state.lock().unwrap().used_up = true;
        assert_eq!(after(&identity, 10).await, [1]);
    }

    #[test]
    fn chance_stays_in_range() {
        let mut chance = system_chance();
        assert_eq!(chance(0), 0);
        let drawn: std::collections::BTreeSet<_> = (0..200).map(|_| chance(9)).collect();
        assert!(drawn.len() > 5 && drawn.iter().all(|&number| number <= 9));
        chance(u64::MAX);
    }
}
