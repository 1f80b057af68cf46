//! BLAKE3 digests of all entries of a payload, computed from chunks that arrive in any order on any thread.
//!
//! The digest of an entry is plain BLAKE3 of its bytes, as `b3sum` prints it. BLAKE3 is a tree, so slices of a fixed
//! power of two can be hashed apart and merged; nothing of this shows in the format. A slice that lies inside one
//! chunk is hashed while the chunk is still in the cache. One that straddles two is put together first: at most one
//! slice per chunk boundary, and as chunks are handed out in order, as many at a time as there are threads.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};
use zeroize::Zeroizing;

use crate::manifest::Extent;

/// Long enough for the widest SIMD of BLAKE3 (16 × 1 KiB) several times over, short enough that straddling ones
/// (copied once) are few.
const SLICE_LEN: u64 = 64 << 10;

/// Bytes between two entries are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotZero {
    /// First byte of the gap.
    pub(crate) offset: u64,
}

/// Collects the hashes of a payload's slices.
pub(crate) struct DigestTree {
    extents: Vec<Extent>,
    /// Per extent, how many slices lie before it.
    first_slice: Vec<usize>,
    slice_len: u64,
    hashes: Mutex<Vec<Option<ChainingValue>>>,
    straddling: Mutex<HashMap<usize, Straddling>>,
}

/// A slice of which some bytes are still missing.
struct Straddling {
    bytes: Zeroizing<Vec<u8>>,
    filled: usize,
}

impl DigestTree {
    /// `extents` ascend and are disjoint, as a manifest guarantees. No slice is longer than a chunk.
    pub(crate) fn new(extents: impl Iterator<Item = Extent>, chunk_len: u64) -> Self {
        let slice_len = SLICE_LEN.min(chunk_len);
        let extents: Vec<_> = extents.collect();
        let mut slices = 0;
        let first_slice = extents
            .iter()
            .map(|e| {
                let first = slices;
                slices += e.size.div_ceil(slice_len) as usize;
                first
            })
            .collect();
        DigestTree {
            extents,
            first_slice,
            slice_len,
            hashes: Mutex::new(vec![None; slices]),
            straddling: Mutex::new(HashMap::new()),
        }
    }

    /// Takes the payload's bytes from `start` on. Every byte must be given exactly once.
    pub(crate) fn absorb(&self, start: u64, bytes: &[u8]) -> Result<(), NotZero> {
        let end = start + bytes.len() as u64;
        let within = |from: u64, to: u64| &bytes[(from - start) as usize..(to - start) as usize];
        let mut done = Vec::new();
        let first = self.extents.partition_point(|e| e.offset + e.size <= start);
        let mut gap = start;
        for (i, extent) in self.extents.iter().enumerate().skip(first) {
            let from = extent.offset.clamp(gap, end);
            if within(gap, from).iter().any(|&b| b != 0) {
                return Err(NotZero { offset: gap });
            }
            if extent.offset >= end {
                gap = end;
                break;
            }
            let to = (extent.offset + extent.size).min(end);
            let mut at = from;
            while at < to {
                let slice = (at - extent.offset) / self.slice_len;
                let range = self.slice_range(extent, slice);
                let stop = range.end.min(to);
                let index = self.first_slice[i] + slice as usize;
                let part = within(at, stop);
                if at == range.start && stop == range.end {
                    done.push((index, self.hash(extent, slice, part)));
                } else if let Some(whole) = self.put_together(index, &range, at, part) {
                    done.push((index, self.hash(extent, slice, &whole)));
                }
                at = stop;
            }
            gap = to;
        }
        if within(gap, end).iter().any(|&b| b != 0) {
            return Err(NotZero { offset: gap });
        }
        let mut hashes = lock(&self.hashes);
        for (index, hash) in done {
            hashes[index] = Some(hash);
        }
        Ok(())
    }

    /// The digest of every extent, in their order.
    ///
    /// # Panics
    /// When bytes were not absorbed: a bug of the caller.
    pub(crate) fn digests(&self) -> Vec<[u8; 32]> {
        let hashes: Vec<ChainingValue> = lock(&self.hashes)
            .iter()
            .map(|h| h.expect("every byte was absorbed"))
            .collect();
        self.extents
            .iter()
            .zip(&self.first_slice)
            .map(|(extent, &first)| {
                let count = extent.size.div_ceil(self.slice_len) as usize;
                match &hashes[first..first + count] {
                    [root] => *root,
                    slices => {
                        let (left, right) = slices.split_at(left_count(slices.len()));
                        let (left, right) = (merge(left), merge(right));
                        *hazmat::merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
                    }
                }
            })
            .collect()
    }

    /// The first extent whose bytes are not those that it names.
    pub(crate) fn first_mismatch(&self) -> Option<usize> {
        self.digests()
            .iter()
            .zip(&self.extents)
            .position(|(found, extent)| *found != extent.digest)
    }

    fn slice_range(&self, extent: &Extent, slice: u64) -> Range<u64> {
        let start = extent.offset + slice * self.slice_len;
        start..(start + self.slice_len).min(extent.offset + extent.size)
    }

    /// Root hash of an extent that is one slice; otherwise the chaining value of the slice's subtree.
    fn hash(&self, extent: &Extent, slice: u64, bytes: &[u8]) -> ChainingValue {
        if extent.size <= self.slice_len {
            return *blake3::hash(bytes).as_bytes();
        }
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(slice * self.slice_len);
        hasher.update(bytes).finalize_non_root()
    }

    /// Adds a part of a straddling slice; returns the slice once it is whole.
    fn put_together(
        &self,
        index: usize,
        range: &Range<u64>,
        at: u64,
        part: &[u8],
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut straddling = lock(&self.straddling);
        let entry = straddling.entry(index).or_insert_with(|| Straddling {
            bytes: Zeroizing::new(vec![0; (range.end - range.start) as usize]),
            filled: 0,
        });
        let position = (at - range.start) as usize;
        entry.bytes[position..position + part.len()].copy_from_slice(part);
        entry.filled += part.len();
        let whole = entry.filled == entry.bytes.len();
        whole.then(|| straddling.remove(&index).map(|s| s.bytes))?
    }
}

fn merge(slices: &[ChainingValue]) -> ChainingValue {
    match slices {
        [one] => *one,
        _ => {
            let (left, right) = slices.split_at(left_count(slices.len()));
            hazmat::merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
        }
    }
}

/// Slices of the left subtree: the largest power of two below `count`, which is at least 2.
fn left_count(count: usize) -> usize {
    count.next_power_of_two() / 2
}

/// A panic elsewhere ends the whole computation; the data behind the lock are not used after it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payload(sizes: &[u64]) -> (Vec<Extent>, Vec<u8>) {
        let mut extents = Vec::new();
        let mut bytes = Vec::new();
        for (i, &size) in sizes.iter().enumerate() {
            bytes.resize(bytes.len().next_multiple_of(64), 0);
            let offset = bytes.len() as u64;
            bytes.extend((0..size).map(|j| (j * 31 + i as u64 * 7 + j / 251) as u8 | 1));
            extents.push(Extent {
                offset,
                size,
                digest: *blake3::hash(&bytes[offset as usize..]).as_bytes(),
            });
        }
        (extents, bytes)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The reference is `blake3::hash` over each entry's bytes.
        #[test]
        fn digests_are_plain_blake3_whatever_the_chunks(
            sizes in proptest::collection::vec(
                prop_oneof![1u64..200, 900u64..1200, 60_000u64..70_000, 1u64..400_000], 1..8),
            chunk_log2 in 10u32..19,
            seed in any::<u64>(),
        ) {
            let (extents, bytes) = payload(&sizes);
            let chunk = 1usize << chunk_log2;
            let tree = DigestTree::new(extents.iter().copied(), chunk as u64);
            let mut order: Vec<usize> = (0..bytes.len().div_ceil(chunk)).collect();
            order.sort_by_key(|&i| (i as u64).wrapping_add(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            for i in order {
                let end = bytes.len().min((i + 1) * chunk);
                tree.absorb((i * chunk) as u64, &bytes[i * chunk..end]).unwrap();
            }
            let expected: Vec<_> = extents.iter().map(|e| e.digest).collect();
            prop_assert_eq!(tree.digests(), expected);
            prop_assert_eq!(tree.first_mismatch(), None);
            prop_assert!(lock(&tree.straddling).is_empty());
        }
    }

    #[test]
    fn one_changed_byte_is_found_and_named() {
        let (extents, mut bytes) = payload(&[100, 200_000, 70]);
        bytes[128 + 150_000] ^= 4;
        let tree = DigestTree::new(extents.into_iter(), 4096);
        for (i, chunk) in bytes.chunks(4096).enumerate() {
            tree.absorb(i as u64 * 4096, chunk).unwrap();
        }
        assert_eq!(tree.first_mismatch(), Some(1));
    }

    #[test]
    fn anything_hidden_between_entries_is_found() {
        let (extents, bytes) = payload(&[100, 2000, 70]);
        let gaps: Vec<usize> = (100..128).chain(2128..2176).collect();
        for &at in &gaps {
            let mut bytes = bytes.clone();
            bytes[at] = 1;
            let tree = DigestTree::new(extents.iter().copied(), 1024);
            let refused = bytes
                .chunks(1024)
                .enumerate()
                .find_map(|(i, chunk)| tree.absorb(i as u64 * 1024, chunk).err());
            assert!(
                refused.is_some_and(|r| r.offset <= at as u64),
                "byte {at}: {refused:?}"
            );
        }
    }
}
