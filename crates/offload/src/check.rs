//! Checks of products, after Freivalds, over the field.
//!
//! For a matrix W of m rows the enclave draws two secret vectors s1, s2, uniform in F_p^m, and computes
//! s1·W and s2·W from its own weights. Whoever returns y' for x̃ must have s·y' = (s·W)·x̃ for both. A y'
//! that is not W·x̃ fails unless a vector that is not zero is orthogonal to s1 and to s2, of which it
//! was made without knowing anything but that earlier products passed: Q wrong products pass with
//! probability at most Q·p^-2 (2^-58 each in the smaller field, 2^-62 in the larger). After the first
//! wrong product no more are asked for before there are new vectors.
//!
//! What passed is a [`Checked`], and only that can be restored.

use casemate_field::{Field, products::accumulate};
use casemate_kernels::panels::Int8Matrix;
use casemate_kernels::team::Team;
use subtle::ConstantTimeEq;

use crate::keys::{BootKey, Uniform};
use crate::memory::Buffer;
use crate::pad::Masked;

/// Vectors for each matrix.
const VECTORS: usize = 2;

/// Where secret vectors come from.
pub(crate) struct Challenges(Uniform);

impl Challenges {
    /// Those of a run.
    pub(crate) fn new(boot: &BootKey) -> Challenges {
        Challenges(boot.uniform(b"checks"))
    }

    /// Vectors for a matrix. Those of another `round` (counted up, shared by nobody) have nothing to do
    /// with them.
    pub(crate) fn draw(
        &self,
        field: Field,
        group: u32,
        round: u32,
        weights: &Int8Matrix,
    ) -> Challenge {
        let (rows, columns) = (weights.rows(), weights.columns());
        let mut row = vec![0; columns];
        let secrets = Buffer::zeros(VECTORS * (rows + columns));
        let mut secrets = secrets.expect("memory for secret vectors");
        let (vectors, projected) = secrets.split_at_mut(VECTORS * rows);
        for (which, s) in vectors.chunks_exact_mut(rows).enumerate() {
            let index = u64::from(round) * VECTORS as u64 + which as u64;
            self.0.row(field, group, index, s);
        }
        let sums = Buffer::<i64>::zeros(VECTORS * columns);
        let mut sums = sums.expect("memory for sums");
        for i in 0..rows {
            weights.row(i, &mut row);
            let vectors = vectors.chunks_exact(rows);
            for (sums, s) in sums.chunks_exact_mut(columns).zip(vectors) {
                accumulate(sums, s[i], &row);
            }
        }
        let projected = projected.chunks_exact_mut(columns);
        for (sums, projected) in sums.chunks_exact(columns).zip(projected) {
            field.settle_row(sums, projected);
        }
        Challenge {
            field,
            outputs: rows,
            secrets,
        }
    }
}

/// The secret vectors for one matrix, and what they make of it.
pub(crate) struct Challenge {
    field: Field,
    outputs: usize,
    /// s1 and s2, as long as the matrix has rows; s1·W and s2·W, as long as it has columns.
    secrets: Buffer<u32>,
}

/// What a product has to project to. Computed while the worker works.
pub(crate) struct Expected {
    rows: Buffer<u32>,
}

impl Expected {
    /// The memory, once nobody needs it any more.
    pub(crate) fn into_room(self) -> Buffer<u32> {
        self.rows
    }
}

/// A product that failed its check, or is no product. It says nothing else: not where, not by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wrong;

/// A worker's answer that is what it should be: W·x̃ for the rows that were sent.
pub(crate) struct Checked {
    field: Field,
    outputs: usize,
    elements: Buffer<u32>,
}

impl Challenge {
    /// Elements of a row of the product.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// s1 and s2.
    fn vectors(&self) -> [&[u32]; VECTORS] {
        let vectors = &self.secrets[..VECTORS * self.outputs];
        vectors.split_at(self.outputs).into()
    }

    /// s1·W and s2·W.
    fn projected(&self) -> [&[u32]; VECTORS] {
        let projected = &self.secrets[VECTORS * self.outputs..];
        projected.split_at(projected.len() / VECTORS).into()
    }

    /// What the product of these rows has to project to, in `room`.
    pub(crate) fn expect(&self, team: &Team, masked: &Masked, mut room: Buffer<u32>) -> Expected {
        let (rows, width) = (masked.elements(), masked.columns());
        room.room(VECTORS * masked.rows());
        self.project(team, self.projected(), rows, width, &mut room);
        Expected { rows: room }
    }

    /// Accepts an answer if every row of it is what was expected. All rows are looked at in any case.
    /// What they project to is found in `room`.
    pub(crate) fn check(
        &self,
        team: &Team,
        expected: &Expected,
        answer: Buffer<u32>,
        room: &mut Buffer<u32>,
    ) -> Result<Checked, Wrong> {
        let rows = expected.rows.len() / VECTORS;
        if answer.len() != rows * self.outputs || !self.field.contains(&answer) {
            return Err(Wrong);
        }
        let found = room.room(VECTORS * rows);
        self.project(team, self.vectors(), &answer, self.outputs, found);
        match bool::from(found.ct_eq(&expected.rows)) {
            true => Ok(Checked {
                field: self.field,
                outputs: self.outputs,
                elements: answer,
            }),
            false => Err(Wrong),
        }
    }

    /// The products of rows with both vectors.
    fn project(
        &self,
        team: &Team,
        vectors: [&[u32]; VECTORS],
        rows: &[u32],
        width: usize,
        out: &mut [u32],
    ) {
        team.for_each_chunk_mut(out, VECTORS, |row, out| {
            let row = &rows[row * width..][..width];
            out.copy_from_slice(&self.field.dots(vectors, row));
        });
    }
}

impl Checked {
    /// The exact sums, from a product under pads and W·r of these pads.
    ///
    /// # Panics
    /// If there are not as many numbers of each.
    pub(crate) fn without(&self, team: &Team, products: &[u32], sums: &mut [i32]) {
        self.restore(team, products, sums, Field::difference_row);
    }

    /// The exact sums, from the products of two shares.
    ///
    /// # Panics
    /// If there are not as many numbers of each.
    pub(crate) fn with(&self, team: &Team, other: &Checked, sums: &mut [i32]) {
        self.restore(team, &other.elements, sums, Field::sum_row);
    }

    /// The memory, once nobody needs the answer any more.
    pub(crate) fn into_room(self) -> Buffer<u32> {
        self.elements
    }

    fn restore(
        &self,
        team: &Team,
        others: &[u32],
        sums: &mut [i32],
        join: fn(Field, &[u32], &[u32], &mut [i32]),
    ) {
        let same = self.elements.len() == sums.len() && others.len() == sums.len();
        assert!(same, "as many sums as elements");
        team.for_each_chunk_mut(sums, self.outputs, |row, sums| {
            let at = row * self.outputs..(row + 1) * self.outputs;
            join(self.field, &self.elements[at.clone()], &others[at], sums);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pad::{Pad, Pads};
    use crate::testing::{Random, packed, product};

    struct Exchange {
        weights: Int8Matrix,
        challenge: Challenge,
        expected: Expected,
        masked: Masked,
        answer: Vec<u32>,
    }

    /// An honest exchange of so many rows.
    fn exchange(random: &mut Random, field: Field, rows: usize, shape: (usize, usize)) -> Exchange {
        let boot = BootKey::of(std::array::from_fn(|_| random.next() as u8));
        let weights = random.matrix(shape.0, shape.1);
        let pads = Pads::new(&boot, b"pads");
        let mut sequence = pads.sequence();
        let mut spent: Vec<Pad> = (0..rows).map(|_| sequence.next()).collect();
        let x = random.row(rows * shape.1);
        let masked = pads.hide(&team(), field, &mut spent, &x, shape.1, Buffer::default());
        let challenge = Challenges::new(&boot).draw(field, 3, 1, &weights);
        let expected = challenge.expect(&team(), &masked, Buffer::default());
        let answer = multiply(field, &weights, &masked);
        Exchange {
            weights,
            challenge,
            expected,
            masked,
            answer,
        }
    }

    impl Challenge {
        fn judge(&self, expected: &Expected, answer: &[u32]) -> Result<Checked, Wrong> {
            self.check(
                &team(),
                expected,
                Buffer::of(answer),
                &mut Buffer::default(),
            )
        }
    }

    /// No threads: it costs nothing to make one.
    fn team() -> Team {
        Team::new(1).unwrap()
    }

    fn multiply(field: Field, weights: &Int8Matrix, masked: &Masked) -> Vec<u32> {
        let rows = masked.elements().chunks(masked.columns());
        rows.flat_map(|row| product(field, weights, row)).collect()
    }

    #[test]
    fn honest_products_pass_whatever_their_shape() {
        let mut random = Random::new(5);
        for (field, rows, shape) in [
            (Field::P29, 1, (1, 1)),
            (Field::P29, 3, (17, 33)),
            (Field::P29, 2, (5, 16_643)),
            (Field::P31, 1, (9, 66_572)),
            (Field::P31, 4, (300, 2)),
        ] {
            let e = exchange(&mut random, field, rows, shape);
            let checked = e.challenge.judge(&e.expected, &e.answer);
            assert!(*checked.ok().unwrap().elements == *e.answer);
        }
    }

    /// Every bit of every element of the answer, one at a time, and every element replaced by others.
    #[test]
    fn no_product_with_a_single_fault_is_released() {
        let mut random = Random::new(6);
        let mut faults = 0;
        for round in 0..40 {
            let field = Field::ALL[round % 2];
            let shape = (8 + random.below(40) as usize, 1 + random.below(60) as usize);
            let e = exchange(&mut random, field, 1 + round % 4, shape);
            let mut refused = |answer: Vec<u32>| {
                if answer == e.answer {
                    return;
                }
                faults += 1;
                assert!(e.challenge.judge(&e.expected, &answer).is_err());
            };
            for at in 0..e.answer.len() {
                let right = e.answer[at];
                let flips = (0..32).map(|bit| right ^ 1 << bit);
                let near = [
                    field.add(right, 1),
                    field.sub(right, 1),
                    0,
                    field.modulus() - 1,
                ];
                let others = (0..8).map(|_| random.below(field.modulus().into()) as u32);
                for wrong in flips.chain(near).chain(others) {
                    let mut answer = e.answer.clone();
                    answer[at] = wrong;
                    refused(answer);
                }
            }
        }
        assert!(faults >= 100_000, "{faults} faults");
    }

    #[test]
    fn no_other_answer_is_released() {
        let mut random = Random::new(7);
        for round in 0..60 {
            let field = Field::ALL[round % 2];
            let shape = (2 + random.below(30) as usize, 2 + random.below(30) as usize);
            let e = exchange(&mut random, field, 3, shape);
            let outputs = shape.0;
            let with = |change: &dyn Fn(&mut Vec<u32>)| {
                let mut answer = e.answer.clone();
                change(&mut answer);
                answer
            };
            let (rest, last) = e.answer.split_at(2 * outputs);
            let mut replies = vec![
                with(&|a| a.swap(0, outputs)),
                with(&|a| a.rotate_left(outputs)),
                with(&|a| a.rotate_left(1)),
                with(&|a| a.reverse()),
                with(&|a| a.truncate(2 * outputs)),
                with(&|a| a.extend_from_slice(last)),
                with(&|a| a.copy_within(0..outputs, outputs)),
                with(&|a| a.clear()),
                with(&|a| a.iter_mut().for_each(|x| *x = field.add(*x, *x))),
                with(&|a| a.iter_mut().for_each(|x| *x = field.sub(0, *x))),
                [last, rest].concat(),
                vec![0; e.answer.len()],
                (0..e.answer.len())
                    .map(|_| random.below(field.modulus().into()) as u32)
                    .collect(),
            ];
            // With weights of which one differs by one, or whose rows are in another order.
            let mut weights = vec![0; shape.0 * shape.1];
            for (i, row) in weights.chunks_exact_mut(shape.1).enumerate() {
                e.weights.row(i, row);
            }
            let at = random.below(weights.len() as u64) as usize;
            let mut stale = weights.clone();
            stale[at] -= if stale[at] > -127 { 1 } else { -1 };
            replies.push(multiply(
                field,
                &packed(&stale, shape.0, shape.1),
                &e.masked,
            ));
            weights.rotate_left(shape.1);
            replies.push(multiply(
                field,
                &packed(&weights, shape.0, shape.1),
                &e.masked,
            ));
            // The right answer to other rows.
            replies.push(exchange(&mut random, field, 3, shape).answer);
            for (which, answer) in replies.into_iter().enumerate() {
                assert_ne!(answer, e.answer, "{which} changed nothing");
                assert!(e.challenge.judge(&e.expected, &answer).is_err(), "{which}");
            }
        }
    }

    #[test]
    fn numbers_that_are_no_elements_are_refused_even_where_they_are_equal_modulo_p() {
        let mut random = Random::new(8);
        for field in Field::ALL {
            let e = exchange(&mut random, field, 2, (20, 20));
            for at in 0..e.answer.len() {
                let mut answer = e.answer.clone();
                answer[at] += field.modulus();
                assert!(e.challenge.judge(&e.expected, &answer).is_err());
            }
        }
    }

    /// Whoever knows the vectors can cheat: so they must be new after a failure, and each matrix has its
    /// own.
    #[test]
    fn what_passes_one_pair_of_vectors_fails_the_next() {
        let mut random = Random::new(9);
        let (field, shape) = (Field::P29, (3, 10));
        let boot = BootKey::of([1; 32]);
        let challenges = Challenges::new(&boot);
        let e = exchange(&mut random, field, 1, shape);
        let known = challenges.draw(field, 0, 0, &e.weights);
        // Orthogonal to both vectors: their cross product.
        let [a, b] = known.vectors();
        let error: Vec<u32> = (0..3)
            .map(|i| {
                let (j, k) = ((i + 1) % 3, (i + 2) % 3);
                field.sub(field.mul(a[j], b[k]), field.mul(a[k], b[j]))
            })
            .collect();
        assert!(error.iter().any(|x| *x != 0));
        let mut wrong = e.answer.clone();
        field.add_row(&mut wrong, &error);
        let check = |challenge: &Challenge| {
            let expected = challenge.expect(&team(), &e.masked, Buffer::default());
            challenge.judge(&expected, &wrong)
        };
        assert!(
            check(&known).is_ok(),
            "the error was made for these vectors"
        );
        for (group, round) in [(0, 1), (0, 2), (1, 0)] {
            assert!(check(&challenges.draw(field, group, round, &e.weights)).is_err());
        }
    }

    #[test]
    fn restored_sums_are_the_exact_ones_at_the_limits_of_both_fields() {
        let mut random = Random::new(10);
        for (field, columns) in [(Field::P29, 16_643), (Field::P31, 66_572)] {
            let extreme: Vec<i8> = (0..2 * columns)
                .map(|i| if i < columns { 127 } else { -127 })
                .collect();
            let weights = packed(&extreme, 2, columns);
            let boot = BootKey::of([2; 32]);
            let pads = Pads::new(&boot, b"pads");
            let mut sequence = pads.sequence();
            for _ in 0..3 {
                let pad = sequence.next();
                let mut r = vec![0; columns];
                pads.elements(field, &pad, &mut r);
                let (mut pad, x) = (vec![pad], &extreme[..columns]);
                let masked = pads.hide(&team(), field, &mut pad, x, columns, Buffer::default());
                let challenge =
                    Challenges::new(&boot).draw(field, 0, random.next() as u32, &weights);
                let expected = challenge.expect(&team(), &masked, Buffer::default());
                let answer = multiply(field, &weights, &masked);
                let mut sums = [0; 2];
                let checked = challenge.judge(&expected, &answer).ok().unwrap();
                checked.without(&team(), &product(field, &weights, &r), &mut sums);
                let largest = 127 * 127 * columns as i32;
                assert_eq!(sums, [largest, -largest]);
                // In shares.
                let (mut pad, rooms) = (vec![sequence.next()], Default::default());
                let shares = pads.share(&team(), field, &mut pad, x, columns, rooms);
                let [one, two] = shares.map(|masked| {
                    let expected = challenge.expect(&team(), &masked, Buffer::default());
                    let answer = multiply(field, &weights, &masked);
                    challenge.judge(&expected, &answer).ok().unwrap()
                });
                one.with(&team(), &two, &mut sums);
                assert_eq!(sums, [largest, -largest]);
            }
        }
    }
}
