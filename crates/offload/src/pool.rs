//! The pool of masks: for pads that wait to be used, what the worker's product will have too much.
//!
//! A product under a pad r is W·x + W·r, and only who has W·r can take it off. The enclave computes it
//! itself, but before anybody waits for it and for several pads with one pass over W: an element of r is
//! four int8 digits, so a pad is four rows of an exact int8 product. r is regenerated when it is used;
//! W·r is what is kept, 4 bytes an output.
//!
//! Each group of matrices has its own shelf, all of the same depth, because a token takes a pad from
//! each. The emptiest is filled first. What memory has no room for may lie sealed in a
//! file, and comes back before new ones are made.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use casemate_field::{Field, digits::DIGITS};
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;
use zeroize::Zeroizing;

use crate::pad::{Pad, Pads, Sequence};
use crate::spill::Spill;

/// A pad and W·r of it.
struct Prepared {
    pad: Pad,
    product: Zeroizing<Vec<u32>>,
}

/// Pads that were taken for rows, and their products, row after row.
pub(crate) struct Taken {
    pub(crate) pads: Vec<Pad>,
    pub(crate) products: Zeroizing<Vec<u32>>,
}

/// What a group has in stock.
pub(crate) struct Shelf {
    field: Field,
    stock: Mutex<Stock>,
    pub(crate) made: AtomicU64,
    pub(crate) used: AtomicU64,
    pub(crate) refused: AtomicU64,
}

struct Stock {
    sequence: Sequence,
    ready: VecDeque<Prepared>,
}

impl Shelf {
    /// An empty shelf with pads of its own.
    pub(crate) fn new(field: Field, sequence: Sequence) -> Shelf {
        Shelf {
            field,
            stock: Mutex::new(Stock {
                sequence,
                ready: VecDeque::new(),
            }),
            made: AtomicU64::new(0),
            used: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Pads in stock.
    pub(crate) fn level(&self) -> usize {
        self.stock().ready.len()
    }

    /// Takes pads for so many rows if then at least `reserve` are left, else none. They are used from
    /// here on, whatever becomes of them.
    pub(crate) fn take(&self, rows: usize, reserve: usize) -> Option<Taken> {
        let mut stock = self.stock();
        if rows.saturating_add(reserve) > stock.ready.len() {
            self.refused.fetch_add(rows as u64, Relaxed);
            return None;
        }
        self.used.fetch_add(rows as u64, Relaxed);
        let outputs = stock.ready.front().map_or(0, |one| one.product.len());
        let mut products = Zeroizing::new(Vec::with_capacity(rows * outputs));
        let mut pads = Vec::with_capacity(rows);
        for prepared in stock.ready.drain(..rows) {
            products.extend_from_slice(&prepared.product);
            pads.push(prepared.pad);
        }
        Some(Taken { pads, products })
    }

    /// Puts masks that were made, or made before and sealed.
    fn put(&self, masks: impl Iterator<Item = Prepared>) {
        self.stock().ready.extend(masks);
    }

    fn stock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills shelves.
pub(crate) struct Pool {
    /// Pads that each shelf holds when it is full.
    depth: AtomicUsize,
    /// Multiply-adds, counted twice, of one step.
    step_operations: u64,
    /// Most pads made in one step.
    batch: usize,
    /// Where masks go for which memory has no room, by the number of the shelf.
    spill: OnceLock<Spill>,
    bench: Mutex<Bench>,
}

/// Where masks are made. What is on it is overwritten before the next use and at the end.
struct Bench {
    elements: Zeroizing<Vec<u32>>,
    digits: Zeroizing<Vec<i8>>,
    rows: Int8Rows,
    sums: Zeroizing<Vec<i32>>,
}

impl Pool {
    /// A pool that makes up to `batch` masks in a step of about `step_operations` operations, one mask
    /// at least.
    pub(crate) fn new(step_operations: u64, batch: usize) -> Pool {
        Pool {
            depth: AtomicUsize::new(0),
            step_operations,
            batch: batch.max(1),
            spill: OnceLock::new(),
            bench: Mutex::new(Bench {
                elements: Zeroizing::default(),
                digits: Zeroizing::default(),
                rows: Int8Rows::with_capacity(0, 1),
                sums: Zeroizing::default(),
            }),
        }
    }

    /// Divides `bytes` among matrices of these numbers of outputs: sets how many pads each shelf holds.
    pub(crate) fn divide(&self, bytes: u64, outputs: impl Iterator<Item = usize>) {
        let each: u64 = outputs.map(|outputs| kept(outputs) as u64).sum();
        let depth = bytes.checked_div(each).unwrap_or(0);
        self.depth
            .store(usize::try_from(depth).unwrap_or(usize::MAX), Relaxed);
    }

    /// Where masks go from now on for which memory has no room. What was set first stays.
    pub(crate) fn spill_to(&self, spill: Spill) {
        let _ = self.spill.set(spill);
    }

    /// Where masks lie for which memory has no room.
    pub(crate) fn spill(&self) -> Option<&Spill> {
        self.spill.get()
    }

    /// Pads that each shelf holds when it is full.
    pub(crate) fn depth(&self) -> usize {
        self.depth.load(Relaxed)
    }

    /// Makes masks for the emptiest shelf, or fetches some that lie outside; once all are full, makes some
    /// to lie outside. False if there is nothing to do.
    pub(crate) fn step<'a>(
        &self,
        team: &Team,
        pads: &Pads,
        shelves: impl Iterator<Item = (&'a Shelf, &'a Int8Matrix)>,
    ) -> bool {
        let mut bench = self.bench.lock().unwrap_or_else(PoisonError::into_inner);
        let shelves: Vec<_> = shelves.enumerate().collect();
        let emptiest = shelves.iter().min_by_key(|(_, (shelf, _))| shelf.level());
        let Some(&(group, (shelf, weights))) = emptiest else {
            return false;
        };
        let missing = self.depth().saturating_sub(shelf.level());
        if missing > 0 {
            let outside = || self.spill.get()?.take(group);
            let count = missing.min(self.batch);
            let fetched: Vec<_> = std::iter::from_fn(outside).take(count).collect();
            if fetched.is_empty() {
                let count = self.affordable(weights).min(missing);
                shelf.put(make(team, pads, shelf, weights, count, &mut bench));
            } else {
                shelf.put(
                    fetched
                        .into_iter()
                        .map(|(pad, product)| Prepared { pad, product }),
                );
            }
            return true;
        }
        let Some(spill) = self.spill.get() else {
            return false;
        };
        let with_room = shelves.iter().filter(|(group, _)| spill.room(*group) > 0);
        let Some(&(group, (shelf, weights))) =
            with_room.min_by_key(|(group, _)| spill.level(*group))
        else {
            return false;
        };
        let count = self.affordable(weights).min(spill.room(group));
        for mask in make(team, pads, shelf, weights, count, &mut bench) {
            spill.put(group, mask.pad, &mask.product);
        }
        true
    }

    /// Masks of a matrix that are made in one step.
    fn affordable(&self, weights: &Int8Matrix) -> usize {
        let one = 2 * (DIGITS * weights.rows() * weights.columns()) as u64;
        let affordable = usize::try_from(self.step_operations / one).unwrap_or(usize::MAX);
        affordable.clamp(1, self.batch)
    }
}

/// Bytes that a mask takes: its product, and what is kept beside it.
fn kept(outputs: usize) -> usize {
    outputs * size_of::<u32>() + size_of::<Prepared>()
}

/// Makes masks with one product.
fn make(
    team: &Team,
    pads: &Pads,
    shelf: &Shelf,
    weights: &Int8Matrix,
    count: usize,
    bench: &mut Bench,
) -> impl Iterator<Item = Prepared> {
    let (outputs, columns) = (weights.rows(), weights.columns());
    let fresh: Vec<Pad> = {
        let mut stock = shelf.stock();
        (0..count).map(|_| stock.sequence.next()).collect()
    };
    bench.elements.resize(columns, 0);
    bench.digits.resize(count * DIGITS * columns, 0);
    bench.sums.resize(count * DIGITS * outputs, 0);
    for (pad, digits) in fresh
        .iter()
        .zip(bench.digits.chunks_exact_mut(DIGITS * columns))
    {
        pads.elements(shelf.field, pad, &mut bench.elements);
        shelf.field.split_row(&bench.elements, digits);
    }
    bench.rows.assign(team, &bench.digits, columns);
    matmul_int8_sums(team, &bench.rows, weights, &mut bench.sums);
    let sums = bench.sums.chunks_exact(DIGITS * outputs);
    let mut ready = Vec::with_capacity(count);
    for (pad, sums) in fresh.into_iter().zip(sums) {
        let mut product = Zeroizing::new(vec![0; outputs]);
        shelf.field.recombine_row(sums, &mut product);
        ready.push(Prepared { pad, product });
    }
    shelf.made.fetch_add(count as u64, Relaxed);
    ready.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::BootKey;
    use crate::testing::{Random, product};

    fn stocked(
        random: &mut Random,
        shape: (usize, usize),
        field: Field,
    ) -> (Shelf, Int8Matrix, Pads) {
        let pads = Pads::new(&BootKey::of([9; 32]), b"pads");
        let weights = random.matrix(shape.0, shape.1);
        (Shelf::new(field, pads.sequence()), weights, pads)
    }

    #[test]
    fn masks_are_the_products_of_their_pads() {
        let (team, mut random) = (Team::new(2).unwrap(), Random::new(1));
        for (shape, field) in [
            ((1, 1), Field::P29),
            ((33, 67), Field::P29),
            ((5, 16_643), Field::P29),
            ((7, 16_644), Field::P31),
        ] {
            let (shelf, weights, pads) = stocked(&mut random, shape, field);
            let pool = Pool::new(u64::MAX, 5);
            pool.divide(7 * kept(shape.0) as u64, [shape.0].into_iter());
            assert_eq!(pool.depth(), 7);
            while pool.step(&team, &pads, [(&shelf, &weights)].into_iter()) {}
            assert_eq!((shelf.level(), shelf.made.load(Relaxed)), (7, 7));
            let taken = shelf.take(7, 0).unwrap();
            let mut r = vec![0; shape.1];
            for (pad, made) in taken.pads.iter().zip(taken.products.chunks(shape.0)) {
                pads.elements(field, pad, &mut r);
                assert!(made == product(field, &weights, &r), "{shape:?}");
            }
        }
    }

    #[test]
    fn what_is_taken_is_gone_and_nothing_is_taken_in_part() {
        let (team, mut random) = (Team::new(1).unwrap(), Random::new(2));
        let (shelf, weights, pads) = stocked(&mut random, (4, 8), Field::P29);
        let pool = Pool::new(u64::MAX, 64);
        pool.divide(10 * kept(4) as u64, [4].into_iter());
        assert!(shelf.take(1, 0).is_none());
        assert!(pool.step(&team, &pads, [(&shelf, &weights)].into_iter()));
        assert!(shelf.take(11, 0).is_none());
        assert!(shelf.take(8, 3).is_none(), "the reserve");
        assert_eq!(shelf.take(8, 2).unwrap().pads.len(), 8);
        assert!(shelf.take(3, 0).is_none());
        assert_eq!(shelf.level(), 2);
        assert_eq!(shelf.used.load(Relaxed), 8);
        assert_eq!(shelf.refused.load(Relaxed), 1 + 11 + 8 + 3);
        // Filled again, with pads that were never there.
        while pool.step(&team, &pads, [(&shelf, &weights)].into_iter()) {}
        assert_eq!((shelf.level(), shelf.made.load(Relaxed)), (10, 18));
    }

    #[test]
    fn shelves_are_filled_evenly_within_the_bytes_and_the_operations_allowed() {
        let (team, mut random) = (Team::new(1).unwrap(), Random::new(3));
        let pads = Pads::new(&BootKey::of([9; 32]), b"pads");
        let groups: Vec<_> = [(16, 32), (160, 32), (1, 4)]
            .into_iter()
            .map(|(outputs, inputs)| {
                let shelf = Shelf::new(Field::P29, pads.sequence());
                (shelf, random.matrix(outputs, inputs))
            })
            .collect();
        let shelves = || groups.iter().map(|(shelf, weights)| (shelf, weights));
        let bytes = 20_000;
        // Three masks of the first, one of the second (less than one), all that are missing of the third.
        let pool = Pool::new(3 * 2 * 4 * 16 * 32, 64);
        pool.divide(bytes, groups.iter().map(|(_, weights)| weights.rows()));
        let depth = pool.depth();
        let each: usize = groups.iter().map(|(_, weights)| kept(weights.rows())).sum();
        assert!(depth * each <= bytes as usize && (depth + 1) * each > bytes as usize);
        assert!(depth > 4);
        let levels = || {
            groups
                .iter()
                .map(|(shelf, _)| shelf.level())
                .collect::<Vec<_>>()
        };
        assert!(pool.step(&team, &pads, shelves()));
        assert_eq!(levels(), [3, 0, 0]);
        assert!(pool.step(&team, &pads, shelves()));
        assert_eq!(levels(), [3, 1, 0]);
        assert!(pool.step(&team, &pads, shelves()));
        assert_eq!(levels(), [3, 1, depth]);
        while pool.step(&team, &pads, shelves()) {}
        assert_eq!(levels(), [depth; 3]);
    }

    #[test]
    fn a_pool_without_memory_makes_nothing() {
        let (team, mut random) = (Team::new(1).unwrap(), Random::new(4));
        let (shelf, weights, pads) = stocked(&mut random, (4, 8), Field::P29);
        let pool = Pool::new(u64::MAX, 64);
        for bytes in [0, 1, kept(4) as u64 - 1] {
            pool.divide(bytes, [4].into_iter());
            assert!(!pool.step(&team, &pads, [(&shelf, &weights)].into_iter()));
        }
        assert!(!pool.step(&team, &pads, std::iter::empty()));
    }

    #[test]
    fn masks_beyond_the_memory_lie_outside_and_come_back_before_new_ones_are_made() {
        let (team, mut random) = (Team::new(1).unwrap(), Random::new(5));
        let boot = BootKey::of([9; 32]);
        let pads = Pads::new(&boot, b"pads");
        let weights = random.matrix(6, 50);
        let shelf = Shelf::new(Field::P29, pads.sequence());
        let pool = Pool::new(u64::MAX, 4);
        pool.divide(3 * kept(6) as u64, [6].into_iter());
        let file = tempfile::tempfile().unwrap();
        pool.spill_to(Spill::new(boot.seal(), file, 7 * (6 * 4 + 16), &[6]));
        let step = || pool.step(&team, &pads, [(&shelf, &weights)].into_iter());
        let spilled = || pool.spill().unwrap().level(0);
        while step() {}
        assert_eq!(
            (shelf.level(), spilled(), shelf.made.load(Relaxed)),
            (3, 7, 10)
        );
        let mut places = std::collections::BTreeSet::new();
        let mut r = vec![0; 50];
        let mut take = || {
            let taken = shelf.take(3, 0).unwrap();
            for (pad, made) in taken.pads.iter().zip(taken.products.chunks(6)) {
                pads.elements(Field::P29, pad, &mut r);
                assert!(made == product(Field::P29, &weights, &r));
                assert!(places.insert(pad.place()), "a pad came twice");
            }
        };
        take();
        assert!(step());
        assert_eq!(
            (shelf.level(), spilled(), shelf.made.load(Relaxed)),
            (3, 4, 10)
        );
        for _ in 0..5 {
            take();
            while step() {}
        }
        assert_eq!(
            (shelf.level(), spilled(), shelf.made.load(Relaxed)),
            (3, 7, 28)
        );
    }
}
