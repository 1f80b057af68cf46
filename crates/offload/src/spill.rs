//! Masks that the enclave's memory has no room for, in a file that the host may read, and may write.
//!
//! ```text
//! entry = AES-256-GCM(key of this run, nonce = place of the pad, AAD = "casemate/1 offload mask" ‖ place,
//!                     W·r as 4-byte little-endian elements)            place: group (4) ‖ index (8), big-endian
//! ```
//! Who changes W·r changes what is restored, which no check of a product would notice, so an entry that is
//! not what was sealed is thrown away, with its pad. Which pad lies where is known inside only: an entry that
//! was moved, or is an older one, does not open. The key is gone after a restart, and with it every entry.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce};

use crate::memory::Buffer;
use crate::pad::Pad;

const CONTEXT: &[u8; 23] = b"casemate/1 offload mask";

/// Sealed masks of all groups.
pub(crate) struct Spill {
    key: LessSafeKey,
    file: File,
    places: Vec<Place>,
    /// What is to be sealed, the oldest first.
    waiting: Mutex<VecDeque<Waiting>>,
    /// For those that will wait.
    spare: Mutex<Vec<Buffer<u32>>>,
    /// An entry on its way, in clear for a moment, and a mask that came back.
    entry: Mutex<Buffer<u8>>,
    opened: Mutex<Buffer<u32>>,
    /// Set once the file could not be written.
    full: AtomicBool,
    pub(crate) lost: AtomicU64,
}

/// A mask that has a slot and is not there yet.
struct Waiting {
    group: usize,
    slot: u32,
    pad: Pad,
    product: Buffer<u32>,
}

/// The part of the file that a group has: entries of one length.
struct Place {
    start: u64,
    outputs: usize,
    entries: Mutex<Entries>,
}

struct Entries {
    /// What lies in which slot, the oldest first.
    kept: VecDeque<(Pad, u32)>,
    free: Vec<u32>,
}

impl Spill {
    /// Divides `bytes` of a file evenly among groups of these numbers of outputs.
    pub(crate) fn new(key: LessSafeKey, file: File, bytes: u64, outputs: &[usize]) -> Spill {
        let each: u64 = outputs.iter().map(|outputs| entry_bytes(*outputs)).sum();
        let slots = bytes.checked_div(each).unwrap_or(0);
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        let mut start = 0;
        let places = outputs
            .iter()
            .map(|outputs| {
                let place = Place {
                    start,
                    outputs: *outputs,
                    entries: Mutex::new(Entries {
                        kept: VecDeque::new(),
                        free: (0..slots).rev().collect(),
                    }),
                };
                start += u64::from(slots) * entry_bytes(*outputs);
                place
            })
            .collect();
        Spill {
            key,
            file,
            places,
            waiting: Mutex::default(),
            spare: Mutex::default(),
            entry: Mutex::default(),
            opened: Mutex::default(),
            full: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        }
    }

    /// Masks of a group that lie outside.
    pub(crate) fn level(&self, group: usize) -> usize {
        self.places[group].entries().kept.len()
    }

    /// Masks of all groups that lie outside.
    pub(crate) fn levels(&self) -> usize {
        (0..self.places.len()).map(|group| self.level(group)).sum()
    }

    /// Masks that a group may still put there.
    pub(crate) fn room(&self, group: usize) -> usize {
        match self.full.load(Relaxed) {
            true => 0,
            false => self.places[group].entries().free.len(),
        }
    }

    /// Whether masks wait to be written.
    pub(crate) fn is_busy(&self) -> bool {
        !lock(&self.waiting).is_empty()
    }

    /// Has a mask wait until somebody [writes](Spill::write) it. One for which there is no room is dropped.
    pub(crate) fn put(&self, group: usize, pad: Pad, product: &[u32]) {
        if let Some(slot) = self.places[group].entries().free.pop() {
            let mut kept = lock(&self.spare).pop().unwrap_or_default();
            kept.room(product.len()).copy_from_slice(product);
            lock(&self.waiting).push_back(Waiting {
                group,
                slot,
                pad,
                product: kept,
            });
        }
    }

    /// Seals a mask that waits for it; false if there is none. It waits for the file.
    pub(crate) fn write(&self) -> bool {
        let Some(next) = lock(&self.waiting).pop_front() else {
            return false;
        };
        let Waiting {
            group,
            slot,
            pad,
            product,
        } = next;
        let place = &self.places[group];
        match self.seal(place, slot, &pad, &product) {
            Ok(()) => place.entries().kept.push_back((pad, slot)),
            Err(_) => {
                // Its disk is full, or gone. What lies there can still be read.
                self.full.store(true, Relaxed);
                place.entries().free.push(slot);
            }
        }
        lock(&self.spare).push(product);
        true
    }

    fn seal(&self, place: &Place, slot: u32, pad: &Pad, product: &[u32]) -> io::Result<()> {
        let mut entry = lock(&self.entry);
        let entry = entry.room(entry_bytes(place.outputs) as usize);
        let (words, tag) = entry.split_at_mut(place.outputs * size_of::<u32>());
        for (word, x) in words.as_chunks_mut::<4>().0.iter_mut().zip(product) {
            *word = x.to_le_bytes();
        }
        let (nonce, aad) = context(pad);
        let sealed = self.key.seal_in_place_separate_tag(nonce, aad, words);
        tag.copy_from_slice(sealed.map_err(io::Error::other)?.as_ref());
        self.file.write_all_at(entry, place.offset(slot))
    }

    /// Takes the oldest mask of a group back, if there is one. Those that are not what was sealed are
    /// lost. It waits for the file.
    pub(crate) fn take<T>(&self, group: usize, with: impl FnOnce(Pad, &[u32]) -> T) -> Option<T> {
        let place = &self.places[group];
        let mut entry = lock(&self.entry);
        let mut product = lock(&self.opened);
        loop {
            let (pad, slot) = place.entries().kept.pop_front()?;
            let product = product.room(place.outputs);
            let opened = self.open(place, slot, &pad, &mut entry, product);
            place.entries().free.push(slot);
            match opened {
                Some(()) => return Some(with(pad, product)),
                None => self.lost.fetch_add(1, Relaxed),
            };
        }
    }

    fn open(
        &self,
        place: &Place,
        slot: u32,
        pad: &Pad,
        entry: &mut Buffer<u8>,
        product: &mut [u32],
    ) -> Option<()> {
        let entry = entry.room(entry_bytes(place.outputs) as usize);
        self.file.read_exact_at(entry, place.offset(slot)).ok()?;
        let (nonce, aad) = context(pad);
        let opened = self.key.open_in_place(nonce, aad, entry).ok()?;
        for (x, word) in product.iter_mut().zip(opened.as_chunks::<4>().0) {
            *x = u32::from_le_bytes(*word);
        }
        Some(())
    }
}

impl Place {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        lock(&self.entries)
    }

    fn offset(&self, slot: u32) -> u64 {
        self.start + u64::from(slot) * entry_bytes(self.outputs)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn entry_bytes(outputs: usize) -> u64 {
    (outputs * size_of::<u32>() + AES_256_GCM.tag_len()) as u64
}

/// A place is used once, so it is a nonce.
fn context(pad: &Pad) -> (Nonce, Aad<[u8; 35]>) {
    let place = pad.place();
    let mut aad = [0; 35];
    aad[..23].copy_from_slice(CONTEXT);
    aad[23..].copy_from_slice(&place);
    (Nonce::assume_unique_for_key(place), Aad::from(aad))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::BootKey;
    use crate::pad::Pads;
    use crate::testing::Random;

    const OUTPUTS: [usize; 2] = [10, 3];

    fn spill(boot: &BootKey, bytes: u64) -> (Spill, File) {
        let file = tempfile::tempfile().unwrap();
        let seen = file.try_clone().unwrap();
        (Spill::new(boot.seal(), file, bytes, &OUTPUTS), seen)
    }

    impl Spill {
        fn put_now(&self, group: usize, pad: Pad, product: &[u32]) {
            self.put(group, pad, product);
            while self.write() {}
            assert!(!self.is_busy());
        }

        fn take_now(&self, group: usize) -> Option<(Pad, Vec<u32>)> {
            self.take(group, |pad, product| (pad, product.to_vec()))
        }
    }

    fn product(random: &mut Random, outputs: usize) -> Vec<u32> {
        (0..outputs).map(|_| random.below(1 << 29) as u32).collect()
    }

    #[test]
    fn masks_come_back_in_order_and_take_no_more_than_their_bytes() {
        let boot = BootKey::of([1; 32]);
        let pads = Pads::new(&boot, b"pads");
        let mut sequences = [pads.sequence(), pads.sequence()];
        let (spill, file) = spill(&boot, 5 * (10 * 4 + 16 + 3 * 4 + 16) + 40);
        let mut random = Random::new(1);
        for round in 0..3 {
            let mut put = [vec![], vec![]];
            for (group, sequence) in sequences.iter_mut().enumerate() {
                assert_eq!((spill.room(group), spill.level(group)), (5, 0), "{round}");
                for _ in 0..7 {
                    let product = product(&mut random, OUTPUTS[group]);
                    let pad = sequence.next();
                    put[group].push((pad.place(), product.clone()));
                    spill.put_now(group, pad, &product);
                }
                assert_eq!((spill.room(group), spill.level(group)), (0, 5));
            }
            assert!(file.metadata().unwrap().len() <= 5 * 84 + 40);
            for (group, put) in put.iter().enumerate() {
                for (place, product) in &put[..5] {
                    let (pad, found) = spill.take_now(group).unwrap();
                    assert_eq!((pad.place(), &found), (*place, product));
                }
                assert!(spill.take_now(group).is_none());
            }
        }
        assert_eq!(spill.lost.load(Relaxed), 0);
    }

    #[test]
    fn what_waits_has_its_slot_and_is_not_there_yet() {
        let boot = BootKey::of([1; 32]);
        let mut sequence = Pads::new(&boot, b"pads").sequence();
        let (spill, file) = spill(&boot, 3 * 84);
        let product = product(&mut Random::new(6), 10);
        for _ in 0..5 {
            spill.put(0, sequence.next(), &product);
        }
        assert_eq!(
            (spill.room(0), spill.level(0), spill.is_busy()),
            (0, 0, true)
        );
        assert_eq!(file.metadata().unwrap().len(), 0, "nothing was written");
        assert!(spill.take_now(0).is_none());
        for written in 1..=3 {
            assert!(spill.write());
            assert_eq!(spill.level(0), written);
        }
        assert!(!spill.write() && !spill.is_busy());
        assert_eq!(spill.take_now(0).unwrap().1, product);
    }

    #[test]
    fn nothing_of_a_mask_is_readable_in_the_file() {
        let boot = BootKey::of([1; 32]);
        let mut sequence = Pads::new(&boot, b"pads").sequence();
        let (spill, file) = spill(&boot, 1000);
        let product = product(&mut Random::new(2), 10);
        spill.put_now(0, sequence.next(), &product);
        let mut bytes = vec![0; 56];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for x in &product {
            assert!(!bytes.windows(4).any(|at| at == x.to_le_bytes()));
        }
    }

    #[test]
    fn entries_that_were_changed_moved_or_brought_back_are_thrown_away() {
        let boot = BootKey::of([1; 32]);
        let pads = Pads::new(&boot, b"pads");
        let mut sequence = pads.sequence();
        let mut random = Random::new(3);
        // Every bit of an entry.
        for bit in 0..56 * 8 {
            let (spill, file) = spill(&boot, 1000);
            spill.put_now(0, sequence.next(), &product(&mut random, 10));
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit / 8).unwrap();
            byte[0] ^= 1 << (bit % 8);
            file.write_all_at(&byte, bit / 8).unwrap();
            assert!(spill.take_now(0).is_none(), "bit {bit}");
            assert_eq!(spill.lost.load(Relaxed), 1);
        }
        // Two in each other's place, and one that lay there before.
        let (spill, file) = spill(&boot, 1000);
        let entry = |at: u64| {
            let mut bytes = vec![0; 56];
            file.read_exact_at(&mut bytes, at * 56).unwrap();
            bytes
        };
        spill.put_now(0, sequence.next(), &product(&mut random, 10));
        spill.put_now(0, sequence.next(), &product(&mut random, 10));
        let (first, second) = (entry(0), entry(1));
        file.write_all_at(&second, 0).unwrap();
        file.write_all_at(&first, 56).unwrap();
        assert!(spill.take_now(0).is_none());
        assert_eq!((spill.lost.load(Relaxed), spill.level(0)), (2, 0));
        spill.put_now(0, sequence.next(), &product(&mut random, 10));
        let slot = u64::from(entry(0) == second);
        file.write_all_at(&first, slot * 56).unwrap();
        assert!(spill.take_now(0).is_none());
    }

    #[test]
    fn a_file_that_ends_or_refuses_loses_masks_and_nothing_else() {
        let boot = BootKey::of([1; 32]);
        let mut sequence = Pads::new(&boot, b"pads").sequence();
        let (spill, file) = spill(&boot, 1000);
        let product = product(&mut Random::new(4), 10);
        spill.put_now(0, sequence.next(), &product);
        file.set_len(20).unwrap();
        assert!(spill.take_now(0).is_none());
        // A file that cannot be written.
        let read_only = File::open("/dev/null").unwrap();
        let refusing = Spill::new(boot.seal(), read_only, 1000, &OUTPUTS);
        assert!(refusing.room(0) > 0);
        refusing.put_now(0, sequence.next(), &product);
        assert_eq!(
            (refusing.level(0), refusing.room(0), refusing.room(1)),
            (0, 0, 0)
        );
    }

    #[test]
    fn masks_of_another_run_do_not_open() {
        let (one, two) = (BootKey::of([1; 32]), BootKey::of([2; 32]));
        let pads = Pads::new(&one, b"pads");
        let (spill, file) = spill(&one, 1000);
        let pad = pads.sequence().next();
        let again = pad.again();
        spill.put_now(0, pad, &product(&mut Random::new(5), 10));
        let next = Spill::new(two.seal(), file, 1000, &OUTPUTS);
        let slot = spill.places[0].entries().kept[0].1;
        next.places[0].entries().kept.push_back((again, slot));
        assert!(next.take_now(0).is_none());
    }
}
