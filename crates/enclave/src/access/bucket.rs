//! A token bucket: how much may be used now, and when more may be.
//!
//! A bucket of `n` per minute, or day, holds at most `n`, is full at first, and gains `n` per minute, or day, evenly. Time
//! is an argument; everything is integers, so nothing is lost or won by rounding.

use std::num::NonZeroU32;
use std::time::Duration;

/// Over which time a bucket of `n` gains `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Period {
    Minute,
    Day,
}

impl Period {
    /// Parts of one: a bucket of `n` gains `n` parts per millisecond.
    fn parts(self) -> i64 {
        match self {
            Self::Minute => 60_000,
            Self::Day => 86_400_000,
        }
    }
}

/// Why nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortage {
    /// There will be enough after this time, if nobody else takes any.
    Until(Duration),
    /// More was asked for than the bucket ever holds.
    Never,
}

/// One bucket.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    limit: NonZeroU32,
    period: Period,
    /// What it holds, in parts; below zero when more was charged than there was.
    level: i64,
    /// Up to when `level` counts.
    at: Duration,
}

impl Bucket {
    /// A full bucket; times are since any fixed moment.
    #[must_use]
    pub(super) fn new(limit: NonZeroU32, period: Period, now: Duration) -> Self {
        Self {
            limit,
            period,
            level: i64::from(limit.get()) * period.parts(),
            at: now,
        }
    }

    /// What it gains in a millisecond, in parts.
    fn rate(&self) -> i64 {
        i64::from(self.limit.get())
    }

    /// What it holds at most, in parts: less than 2^59.
    fn most(&self) -> i64 {
        self.rate() * self.period.parts()
    }

    fn refill(&mut self, now: Duration) {
        // A clock that goes back, or not on, brings nothing.
        let passed = now.saturating_sub(self.at).as_millis();
        let passed = i64::try_from(passed).unwrap_or(i64::MAX);
        self.at += Duration::from_millis(passed.unsigned_abs());
        let gained = passed.saturating_mul(self.rate());
        self.level = self.level.saturating_add(gained).min(self.most());
    }

    /// Takes `amount` if it is there.
    ///
    /// # Errors
    /// [`Shortage`]; nothing was taken.
    pub(super) fn take(&mut self, now: Duration, amount: u32) -> Result<(), Shortage> {
        self.refill(now);
        let wanted = i64::from(amount) * self.period.parts();
        if wanted > self.most() {
            return Err(Shortage::Never);
        }
        if self.level < wanted {
            return Err(Shortage::Until(
                self.time_for(wanted.saturating_sub(self.level)),
            ));
        }
        self.level -= wanted;
        Ok(())
    }

    /// Takes `amount` whether it is there or not: what has been used already is paid for before anything new.
    pub(super) fn charge(&mut self, now: Duration, amount: u32) {
        self.refill(now);
        let used = i64::from(amount) * self.period.parts();
        self.level = self.level.saturating_sub(used);
    }

    /// Puts back what was taken at `taken`, since it was not used, less what has flowed in since then: a bucket that was
    /// full would have gained none of that. So nobody has more than if nothing had been taken.
    pub(super) fn give_back(&mut self, taken: Duration, now: Duration, amount: u32) {
        self.refill(now);
        let held = now.saturating_sub(taken).as_nanos().div_ceil(1_000_000);
        let gained = i64::try_from(held)
            .unwrap_or(i64::MAX)
            .saturating_mul(self.rate());
        let back = (i64::from(amount) * self.period.parts()).saturating_sub(gained);
        self.level = self.level.saturating_add(back.max(0)).min(self.most());
    }

    /// What it gains in its period, and holds at most.
    #[must_use]
    pub(super) fn limit(&self) -> u32 {
        self.limit.get()
    }

    /// What is there, and how long until it is full.
    pub(super) fn state(&mut self, now: Duration) -> (u32, Duration) {
        self.refill(now);
        let there = u32::try_from(self.level.max(0) / self.period.parts()).unwrap_or(u32::MAX);
        (there, self.time_for(self.most().saturating_sub(self.level)))
    }

    /// How long it takes to gain so many parts.
    fn time_for(&self, parts: i64) -> Duration {
        let parts = parts.max(0).unsigned_abs();
        Duration::from_millis(parts.div_ceil(self.rate().unsigned_abs()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(per_minute: u32) -> Bucket {
        let limit = NonZeroU32::new(per_minute).unwrap();
        Bucket::new(limit, Period::Minute, Duration::ZERO)
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_minute_brings_what_a_minute_allows() {
        let mut bucket = bucket(3);
        for _ in 0..3 {
            bucket.take(ms(0), 1).unwrap();
        }
        assert_eq!(bucket.take(ms(0), 1), Err(Shortage::Until(ms(20_000))));
        assert_eq!(bucket.take(ms(19_999), 1), Err(Shortage::Until(ms(1))));
        bucket.take(ms(20_000), 1).unwrap();
        assert_eq!(bucket.state(ms(20_000)), (0, ms(60_000)));
        assert_eq!(bucket.state(ms(500_000)), (3, ms(0)));
    }

    #[test]
    fn more_than_it_holds_never_comes() {
        assert_eq!(bucket(3).take(ms(0), 4), Err(Shortage::Never));
    }

    #[test]
    fn what_was_used_beyond_the_limit_is_paid_first() {
        let mut bucket = bucket(60);
        bucket.charge(ms(0), 90);
        assert_eq!(bucket.state(ms(0)), (0, ms(90_000)));
        assert_eq!(bucket.take(ms(30_000), 1), Err(Shortage::Until(ms(1_000))));
        bucket.take(ms(31_000), 1).unwrap();
    }

    #[test]
    fn what_was_taken_in_vain_comes_back() {
        let mut bucket = bucket(60);
        bucket.take(ms(0), 50).unwrap();
        bucket.give_back(ms(0), ms(0), 50);
        assert_eq!(bucket.state(ms(0)), (60, ms(0)));
        // What others took meanwhile stays taken, and what flowed in meanwhile is not had twice.
        bucket.take(ms(0), 60).unwrap();
        bucket.take(ms(30_000), 30).unwrap();
        bucket.give_back(ms(0), ms(30_000), 60);
        assert_eq!(bucket.state(ms(30_000)).0, 30);
        bucket.give_back(ms(0), ms(90_000), 60);
        assert_eq!(bucket.state(ms(90_000)).0, 60, "never more than it holds");
    }

    #[test]
    fn a_day_brings_what_a_day_allows() {
        const DAY: u64 = 86_400_000;
        let mut bucket = Bucket::new(NonZeroU32::new(3).unwrap(), Period::Day, Duration::ZERO);
        bucket.take(ms(0), 3).unwrap();
        assert_eq!(bucket.take(ms(0), 1), Err(Shortage::Until(ms(DAY / 3))));
        bucket.take(ms(DAY / 3), 1).unwrap();
        assert_eq!(bucket.state(ms(DAY)), (2, ms(DAY / 3)));
        // Nothing overflows.
        let mut most = Bucket::new(NonZeroU32::MAX, Period::Day, Duration::ZERO);
        for charges in [20, 40] {
            (0..charges).for_each(|_| most.charge(ms(0), u32::MAX));
            assert!(matches!(
                most.take(ms(0), u32::MAX),
                Err(Shortage::Until(_))
            ));
        }
    }

    #[derive(Debug, Clone)]
    struct Step {
        wait: Duration,
        amount: u32,
        charge: bool,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step =
            (0u64..90_000_000, 0u32..500, any::<bool>()).prop_map(|(us, amount, charge)| Step {
                wait: Duration::from_micros(us),
                amount,
                charge,
            });
        proptest::collection::vec(step, 1..60)
    }

    proptest! {
        /// Whatever is asked and when: from any moment on, no more is granted than a full bucket and what flowed in.
        #[test]
        fn no_window_grants_more_than_its_share(per_minute in 1u32..300, steps in steps()) {
            let mut bucket = bucket(per_minute);
            let mut now = Duration::ZERO;
            let mut granted: Vec<(Duration, u64)> = Vec::new();
            for step in steps {
                now += step.wait;
                if !step.charge && bucket.take(now, step.amount).is_ok() {
                    granted.push((now, u64::from(step.amount)));
                }
                let mut sum = 0;
                for (since, amount) in granted.iter().rev() {
                    sum += amount;
                    let passed = (now - *since).as_micros();
                    let share = u128::from(per_minute) * (60_000_000 + passed);
                    prop_assert!(u128::from(sum) * 60_000_000 <= share, "{sum} in {passed} µs");
                }
            }
        }

        /// The time that is named is the earliest at which it is enough, charges and odd moments included.
        #[test]
        fn the_time_named_is_exact(per_minute in 1u32..300, steps in steps(), amount in 1u32..300) {
            let mut bucket = bucket(per_minute);
            let mut now = Duration::ZERO;
            for step in steps {
                now += Duration::from_millis(step.wait.as_millis() as u64);
                if step.charge {
                    bucket.charge(now, step.amount);
                } else {
                    let _ = bucket.take(now, step.amount);
                }
            }
            match bucket.take(now, amount) {
                Ok(()) => {}
                Err(Shortage::Never) => prop_assert!(amount > per_minute),
                Err(Shortage::Until(wait)) => {
                    prop_assert!(!wait.is_zero());
                    prop_assert!(bucket.clone().take(now + wait - ms(1), amount).is_err());
                    prop_assert_eq!(bucket.take(now + wait, amount), Ok(()));
                }
            }
        }

        /// Whatever is taken and given back besides: nobody has more for it than who never asked.
        #[test]
        fn giving_back_wins_nothing(per_minute in 1u32..300, steps in steps(), takes in proptest::collection::vec(0u32..300, 60)) {
            let [mut plain, mut bucket] = [bucket(per_minute), bucket(per_minute)];
            let mut now = Duration::ZERO;
            for (step, amount) in steps.into_iter().zip(takes) {
                let taken = bucket.take(now, amount).is_ok().then_some(now);
                now += step.wait;
                plain.charge(now, step.amount);
                bucket.charge(now, step.amount);
                if let Some(taken) = taken {
                    bucket.give_back(taken, now, amount);
                }
                prop_assert!(bucket.level <= plain.level, "{} {}", bucket.level, plain.level);
            }
        }

        /// A clock that jumps back, by any amount, neither brings nor takes anything.
        #[test]
        fn time_that_goes_back_brings_nothing(per_minute in 1u32..300, back in 0u64..1_000_000) {
            let mut bucket = bucket(per_minute);
            let now = ms(1_000_000);
            bucket.take(now, per_minute).unwrap();
            let empty = bucket.state(now);
            prop_assert_eq!(bucket.state(now - ms(back)), empty);
            prop_assert_eq!(bucket.state(now), empty);
        }
    }
}
