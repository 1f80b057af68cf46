//! BLAKE3 digests of all entries of a payload, computed from chunks that arrive in any order on any thread.
//!
//! The digest of an entry is plain BLAKE3 of its bytes, as `b3sum` prints it. BLAKE3 is a binary tree over blocks of
//! 1 KiB, so that subtrees can be hashed apart and merged; nothing of this shows in the format. Each chunk is cut into
//! the largest subtrees that lie inside it and hashed while it is still in the cache. Only a block of 1 KiB that
//! straddles two chunks has to be put together first, which is one copy of at most 1 KiB per chunk.
//!
//! ```text
//! chunks   ├───────────────┼───────────────┼────
//! entry       ├──────────────────────────────…
//! subtrees    └──8──┴4┴2┴1┘x└1┴2┴4┴──8──┴…          x: the block that is put together
//! ```

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use blake3::hazmat::{self, ChainingValue, HasherExt, Mode};
use zeroize::Zeroizing;

use crate::manifest::Extent;

/// Largest subtree that is hashed in one go: several times what BLAKE3's widest SIMD takes (16 blocks).
const LARGEST_SUBTREE: u64 = 64 << 10;
const BLOCK: u64 = blake3::CHUNK_LEN as u64;

/// Bytes between two entries are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotZero {
    /// First byte of the gap.
    pub(crate) offset: u64,
}

/// Collects the hashes of a payload's subtrees.
pub(crate) struct DigestTree {
    extents: Vec<Extent>,
    subtrees: Mutex<Vec<Subtree>>,
    /// By extent and start: blocks of which some bytes are still missing.
    straddling: Mutex<HashMap<(usize, u64), Straddling>>,
}

/// A node of an extent's BLAKE3 tree: `length` bytes from `start` on, both within the extent. One that covers the whole
/// extent holds the root hash instead of a chaining value.
#[derive(Clone, Copy)]
struct Subtree {
    extent: usize,
    start: u64,
    length: u64,
    hash: ChainingValue,
}

struct Straddling {
    bytes: Zeroizing<Vec<u8>>,
    filled: usize,
}

impl DigestTree {
    /// `extents` ascend and are disjoint, as a manifest guarantees.
    pub(crate) fn new(extents: impl Iterator<Item = Extent>) -> Self {
        DigestTree {
            extents: extents.collect(),
            subtrees: Mutex::new(Vec::new()),
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
        for (index, extent) in self.extents.iter().enumerate().skip(first) {
            let from = extent.offset.clamp(gap, end);
            if within(gap, from).iter().any(|&b| b != 0) {
                return Err(NotZero { offset: gap });
            }
            let to = (extent.offset + extent.size).clamp(from, end);
            self.absorb_part(
                index,
                from - extent.offset.min(from),
                within(from, to),
                &mut done,
            );
            gap = to;
            if gap == end {
                break;
            }
        }
        if within(gap, end).iter().any(|&b| b != 0) {
            return Err(NotZero { offset: gap });
        }
        lock(&self.subtrees).append(&mut done);
        Ok(())
    }

    /// Takes bytes of one extent, from its byte `at` on, and hashes the largest subtrees in them.
    fn absorb_part(&self, extent: usize, mut at: u64, mut part: &[u8], done: &mut Vec<Subtree>) {
        let size = self.extents[extent].size;
        while !part.is_empty() {
            let available = part.len() as u64;
            let block_end = (at - at % BLOCK + BLOCK).min(size);
            if !at.is_multiple_of(BLOCK) || at + available < block_end {
                let (piece, rest) = part.split_at(available.min(block_end - at) as usize);
                let start = at - at % BLOCK;
                if let Some(block) =
                    self.put_together((extent, start), block_end - start, at, piece)
                {
                    done.push(self.hash(extent, start, &block));
                }
                (at, part) = (at + piece.len() as u64, rest);
                continue;
            }
            // A node starts at a multiple of its size, and only the last one of a tree may be shorter than a power of two.
            let aligned = match at {
                0 => LARGEST_SUBTREE,
                _ => LARGEST_SUBTREE.min(1 << at.trailing_zeros()),
            };
            let length = match at + available == size && available <= aligned {
                true => available,
                false => aligned.min(1 << available.ilog2()),
            };
            let (subtree, rest) = part.split_at(length as usize);
            done.push(self.hash(extent, at, subtree));
            (at, part) = (at + length, rest);
        }
    }

    /// The digest of every extent, in their order.
    ///
    /// # Panics
    /// When bytes were not absorbed: a bug of the caller.
    pub(crate) fn digests(&self) -> Vec<[u8; 32]> {
        let mut subtrees = lock(&self.subtrees);
        subtrees.sort_unstable_by_key(|s| (s.extent, s.start));
        let mut rest = subtrees.as_slice();
        let digest = |(index, extent): (usize, &Extent)| {
            let (mut own, others) = rest.split_at(rest.partition_point(|s| s.extent == index));
            rest = others;
            match own {
                [whole] if whole.length == extent.size => whole.hash,
                _ => {
                    let (left, right) = children(&mut own, 0, extent.size);
                    *hazmat::merge_subtrees_root(&left, &right, Mode::Hash).as_bytes()
                }
            }
        };
        self.extents.iter().enumerate().map(digest).collect()
    }

    /// The first extent whose bytes are not those that it names.
    pub(crate) fn first_mismatch(&self) -> Option<usize> {
        self.digests()
            .iter()
            .zip(&self.extents)
            .position(|(found, extent)| *found != extent.digest)
    }

    fn hash(&self, extent: usize, start: u64, bytes: &[u8]) -> Subtree {
        let length = bytes.len() as u64;
        let hash = if length == self.extents[extent].size {
            *blake3::hash(bytes).as_bytes()
        } else {
            blake3::Hasher::new()
                .set_input_offset(start)
                .update(bytes)
                .finalize_non_root()
        };
        Subtree {
            extent,
            start,
            length,
            hash,
        }
    }

    /// Adds a piece of a straddling block; returns the block once it is whole.
    fn put_together(
        &self,
        block: (usize, u64),
        length: u64,
        at: u64,
        piece: &[u8],
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut straddling = lock(&self.straddling);
        let entry = straddling.entry(block).or_insert_with(|| Straddling {
            bytes: Zeroizing::new(vec![0; length as usize]),
            filled: 0,
        });
        let position = (at - block.1) as usize;
        entry.bytes[position..position + piece.len()].copy_from_slice(piece);
        entry.filled += piece.len();
        if entry.filled < entry.bytes.len() {
            return None;
        }
        straddling.remove(&block).map(|s| s.bytes)
    }
}

/// Chaining values of the two children of the node that covers `length` bytes from `start` on, taken from the front of
/// `subtrees`.
fn children(subtrees: &mut &[Subtree], start: u64, length: u64) -> (ChainingValue, ChainingValue) {
    let left = hazmat::left_subtree_len(length);
    let first = node(subtrees, start, left);
    let second = node(subtrees, start + left, length - left);
    (first, second)
}

fn node(subtrees: &mut &[Subtree], start: u64, length: u64) -> ChainingValue {
    match subtrees.split_first() {
        Some((whole, rest)) if (whole.start, whole.length) == (start, length) => {
            *subtrees = rest;
            whole.hash
        }
        _ => {
            assert!(length > BLOCK, "every byte was absorbed once");
            let (left, right) = children(subtrees, start, length);
            hazmat::merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
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
            let tree = DigestTree::new(extents.iter().copied());
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
        let tree = DigestTree::new(extents.into_iter());
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
            let tree = DigestTree::new(extents.iter().copied());
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
