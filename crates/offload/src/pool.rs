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
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use casemate_field::{Field, digits::DIGITS};
use casemate_kernels::mem::Region;
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;

use crate::memory::Buffer;
use crate::pad::{Pad, Pads, Sequence};
use crate::spill::Spill;

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
    /// The pads, the oldest first.
    pads: VecDeque<Pad>,
    /// W·r of them, in slots that are used in turn; what is in the others is wiped.
    products: Buffer<u32>,
    /// The slot of the oldest.
    first: usize,
    slots: usize,
    outputs: usize,
}

impl Stock {
    /// The product in the i-th slot after the first.
    fn slot(&mut self, i: usize) -> &mut [u32] {
        let slot = (self.first + i) % self.slots;
        &mut self.products[slot * self.outputs..][..self.outputs]
    }
}

impl Shelf {
    /// A shelf with pads of its own for so many products of so many outputs, in a part of `arena`.
    ///
    /// # Errors
    /// The system's refusal of the memory.
    pub(crate) fn new(
        field: Field,
        sequence: Sequence,
        slots: usize,
        outputs: usize,
        arena: &mut Region,
    ) -> io::Result<Shelf> {
        let elements = slots.checked_mul(outputs);
        let elements = elements.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Shelf {
            field,
            stock: Mutex::new(Stock {
                sequence,
                pads: VecDeque::with_capacity(slots),
                products: Buffer::part(arena, elements)?,
                first: 0,
                slots,
                outputs,
            }),
            made: AtomicU64::new(0),
            used: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    /// Pads in stock.
    pub(crate) fn level(&self) -> usize {
        self.stock().pads.len()
    }

    /// Takes pads for so many rows, and their products, row after row, if then at least `reserve` are
    /// left, else none. They are used from here on, whatever becomes of them.
    pub(crate) fn take(
        &self,
        rows: usize,
        reserve: usize,
        pads: &mut Vec<Pad>,
        products: &mut Buffer<u32>,
    ) -> bool {
        let stock = &mut *self.stock();
        if rows.saturating_add(reserve) > stock.pads.len() {
            self.refused.fetch_add(rows as u64, Relaxed);
            return false;
        }
        self.used.fetch_add(rows as u64, Relaxed);
        if rows == 0 {
            return true;
        }
        let products = products.room(rows * stock.outputs);
        for (i, out) in products.chunks_exact_mut(stock.outputs).enumerate() {
            let slot = stock.slot(i);
            out.copy_from_slice(slot);
            slot.fill(0);
        }
        stock.first = (stock.first + rows) % stock.slots;
        pads.extend(stock.pads.drain(..rows));
        true
    }

    /// Puts a mask that was made, or was made before and sealed. For which there is no room any more
    /// is dropped.
    fn put(&self, pad: Pad, product: &[u32]) {
        let stock = &mut *self.stock();
        let level = stock.pads.len();
        if level < stock.slots {
            stock.slot(level).copy_from_slice(product);
            stock.pads.push_back(pad);
        }
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

/// Where masks are made. What is on it is overwritten before the next use, and wiped at the end.
#[derive(Default)]
struct Bench {
    elements: Buffer<u32>,
    digits: Buffer<i8>,
    rows: Option<Int8Rows>,
    sums: Buffer<i32>,
    product: Buffer<u32>,
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
            bench: Mutex::default(),
        }
    }

    /// Divides `bytes` among matrices of these numbers of outputs: sets how many pads each shelf holds,
    /// and returns that.
    pub(crate) fn divide(&self, bytes: u64, outputs: impl Iterator<Item = usize>) -> usize {
        let each: u64 = outputs.map(|outputs| kept(outputs) as u64).sum();
        let depth = bytes.checked_div(each).unwrap_or(0);
        let depth = usize::try_from(depth).unwrap_or(usize::MAX);
        self.depth.store(depth, Relaxed);
        depth
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

    /// Makes masks for the emptiest shelf that lacks some which do not lie outside; once there is none,
    /// makes some to lie outside. False if there is nothing to do. Nothing is read or written here: that is
    /// [`Pool::carry`]'s.
    pub(crate) fn step<'a>(
        &self,
        team: &Team,
        pads: &Pads,
        shelves: impl Iterator<Item = (&'a Shelf, &'a Int8Matrix)> + Clone,
    ) -> bool {
        let mut bench = self.bench.lock().unwrap_or_else(PoisonError::into_inner);
        let outside = |group| self.spill.get().map_or(0, |spill| spill.level(group));
        let lacking = shelves
            .clone()
            .enumerate()
            .filter_map(|(group, (shelf, weights))| {
                let level = shelf.level();
                let missing = self.depth().checked_sub(level + outside(group))?;
                (missing > 0).then_some((level, missing, shelf, weights))
            });
        if let Some((_, missing, shelf, weights)) = lacking.min_by_key(|(level, ..)| *level) {
            let count = self.affordable(weights).min(missing);
            let put = |pad, product: &[u32]| shelf.put(pad, product);
            make(team, pads, shelf, weights, count, &mut bench, put);
            return true;
        }
        let Some(spill) = self.spill.get() else {
            return false;
        };
        if spill.is_busy() {
            return false;
        }
        let with_room = shelves
            .enumerate()
            .filter(|(group, _)| spill.room(*group) > 0);
        let Some((group, (shelf, weights))) =
            with_room.min_by_key(|(group, _)| spill.level(*group))
        else {
            return false;
        };
        let count = self.affordable(weights).min(spill.room(group));
        let put = |pad, product: &[u32]| spill.put(group, pad, product);
        make(team, pads, shelf, weights, count, &mut bench, put);
        true
    }

    /// Brings a mask that lies outside back to the emptiest shelf that lacks one, or else takes one that
    /// waits for it outside. False if there is nothing to do. It waits for the file, so it is for a
    /// thread of its own.
    pub(crate) fn carry<'a>(&self, shelves: impl Iterator<Item = &'a Shelf>) -> bool {
        let Some(spill) = self.spill.get() else {
            return false;
        };
        let lacking = shelves.enumerate().filter_map(|(group, shelf)| {
            let level = shelf.level();
            (level < self.depth() && spill.level(group) > 0).then_some((level, group, shelf))
        });
        match lacking.min_by_key(|(level, ..)| *level) {
            Some((_, group, shelf)) => {
                spill.take(group, |pad, product| shelf.put(pad, product));
                true
            }
            None => spill.write(),
        }
    }

    /// Masks of a matrix that are made in one step.
    fn affordable(&self, weights: &Int8Matrix) -> usize {
        let one = 2 * (DIGITS * weights.rows() * weights.columns()) as u64;
        let affordable = usize::try_from(self.step_operations / one).unwrap_or(usize::MAX);
        affordable.clamp(1, self.batch)
    }
}

/// Bytes that a mask takes: its product, and its pad.
fn kept(outputs: usize) -> usize {
    outputs * size_of::<u32>() + size_of::<Pad>()
}

/// Makes masks with one product.
fn make(
    team: &Team,
    pads: &Pads,
    shelf: &Shelf,
    weights: &Int8Matrix,
    count: usize,
    bench: &mut Bench,
    mut put: impl FnMut(Pad, &[u32]),
) {
    let (outputs, columns) = (weights.rows(), weights.columns());
    let fresh: Vec<Pad> = {
        let mut stock = shelf.stock();
        (0..count).map(|_| stock.sequence.next()).collect()
    };
    let elements = bench.elements.room(columns);
    let digits = bench.digits.room(count * DIGITS * columns);
    let sums = bench.sums.room(count * DIGITS * outputs);
    for (pad, digits) in fresh.iter().zip(digits.chunks_exact_mut(DIGITS * columns)) {
        pads.elements(shelf.field, pad, elements);
        shelf.field.split_row(elements, digits);
    }
    let rows = bench
        .rows
        .get_or_insert_with(|| Int8Rows::with_capacity(0, 1));
    rows.assign(team, digits, columns);
    matmul_int8_sums(team, rows, weights, sums);
    let product = bench.product.room(outputs);
    for (pad, sums) in fresh.into_iter().zip(sums.chunks_exact(DIGITS * outputs)) {
        shelf.field.recombine_row(sums, product);
        put(pad, product);
    }
    shelf.made.fetch_add(count as u64, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::BootKey;
    use crate::testing::{Random, product};

    /// No arena: each shelf has memory of its own.
    fn none() -> Region {
        Region::default()
    }

    fn stocked(
        random: &mut Random,
        shape: (usize, usize),
        field: Field,
        slots: usize,
    ) -> (Shelf, Int8Matrix, Pads) {
        let pads = Pads::new(&BootKey::of([9; 32]), b"pads");
        let weights = random.matrix(shape.0, shape.1);
        let shelf = Shelf::new(field, pads.sequence(), slots, shape.0, &mut none()).unwrap();
        (shelf, weights, pads)
    }

    /// Pads and their products.
    fn take(shelf: &Shelf, rows: usize, reserve: usize) -> Option<(Vec<Pad>, Buffer<u32>)> {
        let mut taken: (Vec<Pad>, Buffer<u32>) = Default::default();
        let (pads, products) = &mut taken;
        shelf.take(rows, reserve, pads, products).then_some(taken)
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
            let (shelf, weights, pads) = stocked(&mut random, shape, field, 7);
            let pool = Pool::new(u64::MAX, 5);
            pool.divide(7 * kept(shape.0) as u64, [shape.0].into_iter());
            assert_eq!(pool.depth(), 7);
            while pool.step(&team, &pads, [(&shelf, &weights)].into_iter()) {}
            assert_eq!((shelf.level(), shelf.made.load(Relaxed)), (7, 7));
            let (taken, products) = take(&shelf, 7, 0).unwrap();
            let mut r = vec![0; shape.1];
            for (pad, made) in taken.iter().zip(products.chunks(shape.0)) {
                pads.elements(field, pad, &mut r);
                assert!(made == product(field, &weights, &r), "{shape:?}");
            }
            assert!(shelf.stock().products.iter().all(|x| *x == 0), "wiped");
        }
    }

    #[test]
    fn what_is_taken_is_gone_and_nothing_is_taken_in_part() {
        let (team, mut random) = (Team::new(1).unwrap(), Random::new(2));
        let (shelf, weights, pads) = stocked(&mut random, (4, 8), Field::P29, 10);
        let pool = Pool::new(u64::MAX, 64);
        pool.divide(10 * kept(4) as u64, [4].into_iter());
        assert!(take(&shelf, 1, 0).is_none());
        assert!(pool.step(&team, &pads, [(&shelf, &weights)].into_iter()));
        assert!(take(&shelf, 11, 0).is_none());
        assert!(take(&shelf, 8, 3).is_none(), "the reserve");
        assert_eq!(take(&shelf, 8, 2).unwrap().0.len(), 8);
        assert!(take(&shelf, 3, 0).is_none());
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
                let shelf =
                    Shelf::new(Field::P29, pads.sequence(), 40, outputs, &mut none()).unwrap();
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
        assert!(depth > 4 && depth < 40);
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
        let (shelf, weights, pads) = stocked(&mut random, (4, 8), Field::P29, 10);
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
        let shelf = Shelf::new(Field::P29, pads.sequence(), 3, 6, &mut none()).unwrap();
        let pool = Pool::new(u64::MAX, 4);
        pool.divide(3 * kept(6) as u64, [6].into_iter());
        let file = tempfile::tempfile().unwrap();
        pool.spill_to(Spill::new(boot.seal(), file, 7 * (6 * 4 + 16), &[6]));
        let step = || pool.step(&team, &pads, [(&shelf, &weights)].into_iter());
        let carry = || pool.carry([&shelf].into_iter());
        let spilled = || pool.spill().unwrap().level(0);
        let seen = || (shelf.level(), spilled(), shelf.made.load(Relaxed));
        assert!(step(), "three for the shelf");
        assert!(step(), "four to lie outside");
        assert!(!step(), "these have to be carried first");
        assert_eq!(seen(), (3, 0, 7));
        let settle = || while step() || carry() {};
        settle();
        assert_eq!(seen(), (3, 7, 10));
        let mut places = std::collections::BTreeSet::new();
        let mut r = vec![0; 50];
        let mut take_all = || {
            let (taken, products) = take(&shelf, 3, 0).unwrap();
            for (pad, made) in taken.iter().zip(products.chunks(6)) {
                pads.elements(Field::P29, pad, &mut r);
                assert!(made == product(Field::P29, &weights, &r));
                assert!(places.insert(pad.place()), "a pad came twice");
            }
        };
        take_all();
        while carry() {}
        assert_eq!(seen(), (3, 4, 10));
        for _ in 0..5 {
            take_all();
            while carry() {}
            settle();
        }
        assert_eq!(seen(), (3, 7, 28));
    }
}
