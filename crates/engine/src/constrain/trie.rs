//! The bytes of all tokens as one tree, laid out in the order of a walk: a subtree is a range, and
//! skipping it is one jump.

use super::calls::OPEN;

/// What a walk asks about bytes.
pub(super) trait Machine {
    /// What a step changed.
    type Undo;

    /// Takes one byte, or leaves everything as it is.
    fn step(&mut self, byte: u8) -> Option<Self::Undo>;
    /// Takes back the latest step that was not taken back yet.
    fn undo(&mut self, undo: Self::Undo);
}

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
    /// Whether the mark that begins a call stands in a token that goes on.
    runs_on: bool,
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
            runs_on: sorted.iter().any(|(bytes, _)| {
                let mut windows = bytes.windows(OPEN.len() + 1);
                windows.any(|window| window.starts_with(OPEN))
            }),
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

    /// Whether the mark that begins a call stands in a token that goes on.
    pub(super) fn runs_on(&self) -> bool {
        self.runs_on
    }

    /// Ends the subtrees of all but the first `keep` nodes of the path.
    fn close(&mut self, path: &mut Vec<usize>, keep: usize) {
        for node in path.drain(keep..) {
            self.ends[node] = self.bytes.len() as u32;
        }
    }

    /// Writes one bit per token id: whether the machine takes all of its bytes. The machine is left as
    /// it was.
    pub(super) fn mask(&self, machine: &mut impl Machine, mask: &mut Vec<u64>) {
        mask.clear();
        mask.resize(self.vocab.div_ceil(64), 0);
        self.walk(
            machine,
            |_| false,
            |tokens, taken| {
                if taken {
                    for &id in tokens {
                        mask[id as usize / 64] |= 1 << (id % 64);
                    }
                }
            },
        );
    }

    /// As [`Self::mask`], but tokens without bytes are allowed, too. Where the machine is `idle`, it
    /// takes any rest of a token. Returns whether any token is not allowed.
    pub(super) fn mask_of_refused<M: Machine>(
        &self,
        machine: &mut M,
        idle: impl Fn(&M) -> bool,
        mask: &mut Vec<u64>,
    ) -> bool {
        mask.clear();
        mask.resize(self.vocab.div_ceil(64), u64::MAX);
        let mut any = false;
        self.walk(machine, idle, |tokens, taken| {
            if !taken {
                for &id in tokens {
                    mask[id as usize / 64] &= !(1 << (id % 64));
                    any = true;
                }
            }
        });
        any
    }

    /// Calls `judged` with tokens and whether the machine takes all of their bytes, except for tokens
    /// that go on where the machine is `idle`.
    fn walk<M: Machine>(
        &self,
        machine: &mut M,
        idle: impl Fn(&M) -> bool,
        mut judged: impl FnMut(&[u32], bool),
    ) {
        let tokens = |from: usize, to: usize| {
            &self.tokens[self.firsts[from] as usize..self.firsts[to] as usize]
        };
        let mut path: Vec<(u32, M::Undo)> = Vec::with_capacity(64);
        let mut node = 0;
        while node < self.bytes.len() {
            while path.last().is_some_and(|(end, _)| *end as usize <= node) {
                if let Some((_, undo)) = path.pop() {
                    machine.undo(undo);
                }
            }
            let end = self.ends[node] as usize;
            let Some(undo) = machine.step(self.bytes[node]) else {
                judged(tokens(node, end), false);
                node = end;
                continue;
            };
            path.push((self.ends[node], undo));
            judged(tokens(node, node + 1), true);
            node = if idle(machine) { end } else { node + 1 };
        }
        while let Some((_, undo)) = path.pop() {
            machine.undo(undo);
        }
    }
}
