//! How long the engine's thread may be kept waiting: for one product, and over time.
//!
//! A worker that answers rightly but late harms nobody's numbers, only everybody's time. One product has
//! one time limit, whatever moves meanwhile. Over time, products may take `slowness` times as long as they
//! take inside, and a round trip each; what they take beyond that is added up, what they stay below it
//! is taken off, and where the sum passes a budget the worker is set aside. So between two times
//! that it is set aside the engine loses no more than the budget, one product's limit and what is
//! allowed anyway.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;

use super::Config;
use crate::memory::Buffer;

/// Rows of the larger product that is timed.
const SOME: u32 = 8;

/// How long products with one matrix take inside, once they were timed.
#[derive(Default)]
pub(super) struct Inside(OnceLock<Times>);

#[derive(Clone, Copy)]
struct Times {
    one: Duration,
    each_more: Duration,
}

impl Inside {
    /// Whether nothing was timed yet.
    pub(super) fn is_unknown(&self) -> bool {
        self.0.get().is_none()
    }

    /// Times products, unless that was done before. Their rows are zeros, which takes as long.
    pub(super) fn time(&self, team: &Team, matrix: &Int8Matrix) -> &Inside {
        self.0.get_or_init(|| {
            let mut sums = Buffer::default();
            let mut take = |count: u32| {
                let zeros = vec![0; count as usize * matrix.columns()];
                let mut rows = Int8Rows::with_capacity(count as usize, matrix.columns());
                rows.assign(team, &zeros, matrix.columns());
                let sums = sums.room(count as usize * matrix.rows());
                let begun = Instant::now();
                matmul_int8_sums(team, &rows, matrix, sums);
                begun.elapsed()
            };
            let some = take(SOME);
            let one = take(1);
            Times {
                one,
                each_more: some.saturating_sub(one) / (SOME - 1),
            }
        });
        self
    }

    /// How long a product of so many rows takes.
    fn of(&self, rows: usize) -> Duration {
        let more = u32::try_from(rows.saturating_sub(1)).unwrap_or(u32::MAX);
        let times = |times: &Times| {
            times
                .one
                .saturating_add(times.each_more.saturating_mul(more))
        };
        self.0.get().map(times).unwrap_or_default()
    }

    /// How long one of so many rows may take in the long run, wherever it is computed.
    pub(super) fn tolerated(&self, config: &Config, rows: usize) -> Duration {
        let inside = self.of(rows).saturating_mul(config.slowness);
        inside.saturating_add(config.round_trip)
    }
}

/// What was lost by waiting for a worker.
#[derive(Default)]
pub(super) struct Lost(Duration);

impl Lost {
    /// Adds what a product took beyond what is tolerated. Whether it is too much by now; then the
    /// next sum begins.
    pub(super) fn add(&mut self, took: Duration, tolerated: Duration, budget: Duration) -> bool {
        self.0 = self.0.saturating_add(took.saturating_sub(tolerated));
        let too_much = self.0 > budget;
        if too_much {
            self.0 = Duration::ZERO;
        }
        too_much
    }

    /// Takes off what a product stayed below what is tolerated.
    pub(super) fn make_up(&mut self, took: Duration, tolerated: Duration) {
        let below = tolerated.saturating_sub(took);
        self.0 = self.0.saturating_sub(below);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_lost_adds_up_and_is_made_up_for() {
        let mut lost = Lost::default();
        for _ in 0..10 {
            assert!(!lost.add(11 * MS, MS, 100 * MS), "ten too long each");
        }
        assert!(lost.add(2 * MS, MS, 100 * MS), "one too much");
        assert!(!lost.add(100 * MS, MS, 100 * MS), "counted from there");
        lost.make_up(MS, 50 * MS);
        assert!(!lost.add(50 * MS, MS, 100 * MS), "99 - 49 + 49");
        assert!(!lost.add(2 * MS, MS, 100 * MS));
        lost.make_up(MS, 1000 * MS);
        assert!(!lost.add(101 * MS, MS, 100 * MS), "nobody saves for later");
        assert!(lost.add(2 * MS, MS, 100 * MS));
        // One that is always just within what is tolerated goes on for ever.
        for _ in 0..1000 {
            assert!(!lost.add(MS, MS, Duration::ZERO));
        }
    }

    #[test]
    fn what_is_tolerated_grows_with_rows_and_slowness() {
        let (team, matrix) = (Team::new(1).unwrap(), Random::new(1).matrix(300, 500));
        let inside = Inside::default();
        assert!(inside.is_unknown());
        let config = |slowness, round_trip| Config {
            slowness,
            round_trip,
            ..Config::default()
        };
        assert_eq!(inside.tolerated(&config(2, MS), 5), MS);
        inside.time(&team, &matrix);
        assert!(!inside.is_unknown());
        let one = inside.of(1);
        assert!(one > Duration::ZERO);
        assert_eq!(inside.time(&team, &matrix).of(1), one, "timed once");
        assert!(inside.of(64) >= one);
        assert_eq!(inside.tolerated(&config(3, MS), 1), one * 3 + MS);
        assert_eq!(inside.tolerated(&config(1, Duration::ZERO), 1), one);
    }
}
