//! The bytes of all tokens as one tree, laid out in the order of a walk: a subtree is a range, and
//! skipping it is one jump.

use super::automaton::{Automaton, Undo};

/// The tokens of one vocabulary.
pub(crate) struct Trie {
    /// The byte of each node.
    bytes: Vec<u8>,
    /// The first node behind the subtree of each.
    ends: Vec<u32>,
    /// Node `i` completes `tokens[firsts[i]..firsts[i + 1]]`.
    firsts: Vec<u32>,
    tokens: Vec<u32>,
    vocab: usize,
}

impl Trie {
    /// A trie of `vocab` tokens with the bytes that `bytes` gives; those without bytes are in no
    /// mask.
    pub(crate) fn new<'a>(vocab: u32, bytes: impl Fn(u32) -> &'a [u8]) -> Self {
        let mut sorted: Vec<(&[u8], u32)> = (0..vocab)
            .map(|id| (bytes(id), id))
            .filter(|(bytes, _)| !bytes.is_empty())
            .collect();
        sorted.sort_unstable();
        let mut trie = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            firsts: Vec::new(),
            tokens: Vec::with_capacity(sorted.len()),
            vocab: vocab as usize,
        };
        let mut path: Vec<usize> = Vec::new();
        for (bytes, id) in sorted {
            let common = path
                .iter()
                .zip(bytes)
                .take_while(|&(&node, &byte)| trie.bytes[node] == byte)
                .count();
            trie.close(&mut path, common);
            for &byte in &bytes[common..] {
                path.push(trie.bytes.len());
                trie.bytes.push(byte);
                trie.ends.push(0);
                trie.firsts.push(trie.tokens.len() as u32);
            }
            trie.tokens.push(id);
        }
        trie.close(&mut path, 0);
        trie.firsts.push(trie.tokens.len() as u32);
        trie
    }

    /// Ends the subtrees of all but the first `keep` nodes of the path.
    fn close(&mut self, path: &mut Vec<usize>, keep: usize) {
        for node in path.drain(keep..) {
            self.ends[node] = self.bytes.len() as u32;
        }
    }

    /// Writes one bit per token id: whether the automaton takes all of its bytes. The automaton is
    /// left as it was.
    pub(super) fn mask(&self, automaton: &mut Automaton, mask: &mut Vec<u64>) {
        mask.clear();
        mask.resize(self.vocab.div_ceil(64), 0);
        let mut path: Vec<(u32, Undo)> = Vec::with_capacity(64);
        let mut node = 0;
        while node < self.bytes.len() {
            while path.last().is_some_and(|(end, _)| *end as usize <= node) {
                if let Some((_, undo)) = path.pop() {
                    automaton.undo(undo);
                }
            }
            let Some(undo) = automaton.step(self.bytes[node]) else {
                node = self.ends[node] as usize;
                continue;
            };
            path.push((self.ends[node], undo));
            let completed = self.firsts[node] as usize..self.firsts[node + 1] as usize;
            for &id in &self.tokens[completed] {
                mask[id as usize / 64] |= 1 << (id % 64);
            }
            node += 1;
        }
        while let Some((_, undo)) = path.pop() {
            automaton.undo(undo);
        }
    }
}
