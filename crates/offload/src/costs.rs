//! What a product costs the enclave, part by part, with and without a worker: for measurements.

use std::time::{Duration, Instant};

use casemate_field::{Field, digits::DIGITS};
use casemate_kernels::mem::Region;
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8, matmul_int8_sums};
use casemate_kernels::team::Team;

use crate::check::{Challenge, Challenges};
use crate::keys::BootKey;
use crate::memory::Buffer;
use crate::pad::{Pad, Pads};
use crate::pool::{Pool, Shelf};

/// Times of the enclave's parts of a product that a worker computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Online {
    /// Pads made again and added.
    pub hide: Duration,
    /// What the product has to project to, and what it projects to.
    pub check: Duration,
    /// The mask taken off.
    pub restore: Duration,
}

impl Online {
    /// All of it.
    #[must_use]
    pub fn total(self) -> Duration {
        self.hide + self.check + self.restore
    }
}

/// One matrix and everything that products with it need.
pub struct Bench {
    weights: Int8Matrix,
    field: Field,
    pads: Pads,
    shelf: Shelf,
    challenge: Challenge,
    rows: Int8Rows,
}

impl Bench {
    /// Draws vectors for a matrix.
    ///
    /// # Panics
    /// If no field is large enough for it.
    #[must_use]
    pub fn new(weights: Int8Matrix, boot: &BootKey) -> Bench {
        let field = Field::for_width(weights.columns()).expect("a width that a field holds");
        let pads = Pads::new(boot, b"pads");
        Bench {
            field,
            shelf: shelf(field, &pads, 1, weights.rows()),
            pads,
            challenge: Challenges::new(boot).draw(field, 0, 0, &weights),
            rows: Int8Rows::with_capacity(0, weights.columns()),
            weights,
        }
    }

    /// The matrix.
    #[must_use]
    pub fn weights(&self) -> &Int8Matrix {
        &self.weights
    }

    /// The product of so many rows in the enclave alone.
    pub fn inside(&mut self, team: &Team, count: usize) -> Duration {
        let x = activations(count, self.weights.columns());
        self.rows.assign(team, &x, self.weights.columns());
        let mut y = vec![0.0; count * self.weights.rows()];
        let begin = Instant::now();
        matmul_int8(team, &self.rows, &self.weights, &mut y);
        begin.elapsed()
    }

    /// Making so many masks at once.
    pub fn masks(&mut self, team: &Team, count: usize) -> Duration {
        self.shelf = shelf(self.field, &self.pads, count, self.weights.rows());
        let pool = Pool::new(u64::MAX, count);
        // Of masks of which each takes a little more than its numbers.
        let bytes = (count * (self.weights.rows() * 4 + 64)) as u64;
        pool.divide(bytes, [self.weights.rows()].into_iter());
        let begin = Instant::now();
        pool.step(team, &self.pads, [(&self.shelf, &self.weights)].into_iter());
        begin.elapsed()
    }

    /// The enclave's parts of a product of so many rows. The worker's is computed in between and not
    /// counted.
    ///
    /// # Panics
    /// If something is not exact, which a measurement is worth nothing without.
    pub fn online(&mut self, team: &Team, count: usize) -> Online {
        let (outputs, columns) = (self.weights.rows(), self.weights.columns());
        self.masks(team, count);
        let mut pads: Vec<Pad> = Vec::new();
        let mut products = Buffer::default();
        let taken = self.shelf.take(count, 0, &mut pads, &mut products);
        assert!(taken, "as many masks as were made");
        let x = activations(count, columns);
        // All memory is there, as it is from the second product on.
        let (mut room, mut other) = (Buffer::default(), Buffer::default());
        room.room(x.len()).fill(0);
        other.room(2 * count).fill(0);
        let begin = Instant::now();
        let masked = self
            .pads
            .hide(team, self.field, &mut pads, &x, columns, room);
        let hide = begin.elapsed();
        let mut answer = Buffer::default();
        self.product(team, masked.elements(), answer.room(count * outputs));
        let mut found = Buffer::default();
        found.room(2 * count).fill(0);
        let begin = Instant::now();
        let expected = self.challenge.expect(team, &masked, other);
        let checked = self.challenge.check(team, &expected, answer, &mut found);
        let check = begin.elapsed();
        let Ok(checked) = checked else {
            panic!("an honest product passes");
        };
        let mut sums = vec![0; count * outputs];
        let begin = Instant::now();
        checked.without(team, &products, &mut sums);
        let restore = begin.elapsed();
        self.rows.assign(team, &x, columns);
        let mut exact = vec![0; count * outputs];
        matmul_int8_sums(team, &self.rows, &self.weights, &mut exact);
        assert!(sums == exact, "restored sums are exact");
        Online {
            hide,
            check,
            restore,
        }
    }

    /// What an honest worker returns.
    fn product(&mut self, team: &Team, elements: &[u32], answer: &mut [u32]) {
        let (outputs, columns) = (self.weights.rows(), self.weights.columns());
        let count = elements.len() / columns;
        let mut digits = vec![0; count * DIGITS * columns];
        let rows = elements.chunks_exact(columns);
        for (row, digits) in rows.zip(digits.chunks_exact_mut(DIGITS * columns)) {
            self.field.split_row(row, digits);
        }
        self.rows.assign(team, &digits, columns);
        let mut sums = vec![0; count * DIGITS * outputs];
        matmul_int8_sums(team, &self.rows, &self.weights, &mut sums);
        let sums = sums.chunks_exact(DIGITS * outputs);
        for (sums, answer) in sums.zip(answer.chunks_exact_mut(outputs)) {
            self.field.recombine_row(sums, answer);
        }
    }
}

/// Room for so many masks.
fn shelf(field: Field, pads: &Pads, count: usize, outputs: usize) -> Shelf {
    Shelf::new(
        field,
        pads.sequence(),
        count,
        outputs,
        &mut Region::default(),
    )
    .expect("memory for masks")
}

/// Some rows. What they hold changes no time.
fn activations(count: usize, columns: usize) -> Vec<i8> {
    (0..count * columns)
        .map(|i| (i % 255) as i8)
        .map(|x| x.max(-127))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn what_is_measured_is_exact() {
        let team = Team::new(2).unwrap();
        let weights = Random::new(1).matrix(40, 300);
        let mut bench = Bench::new(weights, &BootKey::of([1; 32]));
        for count in [1, 5, 2] {
            // It panics if sums are not what they are inside.
            assert!(bench.online(&team, count).total() > Duration::ZERO);
            assert_eq!(bench.shelf.level(), 0, "all that were made were used");
            assert!(bench.masks(&team, count) > Duration::ZERO);
            assert_eq!(bench.shelf.level(), count);
            assert!(bench.inside(&team, count) > Duration::ZERO);
        }
    }
}
