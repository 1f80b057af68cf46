//! The memory of requests already served under a key.

use std::collections::HashSet;

use aws_lc_rs::digest;

/// What a key remembers of the requests it has opened: a digest of each `enc`, for as long as the
/// key lives. It never forgets one to make room, so a full cache means a spent key.
pub(super) struct ReplayCache {
    seen: HashSet<[u8; 32]>,
    capacity: usize,
}

/// Why a request may not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The same `enc` was served before.
    Seen,
    /// Whether it was cannot be remembered any more.
    Full,
}

impl ReplayCache {
    pub(super) fn new(capacity: usize) -> ReplayCache {
        ReplayCache {
            seen: HashSet::new(),
            capacity,
        }
    }

    /// Whether [`ReplayCache::admit`] would refuse, without remembering anything.
    pub(super) fn check(&self, enc: &[u8]) -> Result<(), Refusal> {
        self.lookup(&Self::entry(enc))
    }

    /// Remembers `enc`, or says why it must not be served.
    pub(super) fn admit(&mut self, enc: &[u8]) -> Result<(), Refusal> {
        let entry = Self::entry(enc);
        self.lookup(&entry)?;
        self.seen.insert(entry);
        Ok(())
    }

    /// Whether three quarters of the room are used.
    pub(super) fn is_filling(&self) -> bool {
        self.seen.len().saturating_mul(4) >= self.capacity.saturating_mul(3)
    }

    fn lookup(&self, entry: &[u8; 32]) -> Result<(), Refusal> {
        if self.seen.contains(entry) {
            Err(Refusal::Seen)
        } else if self.seen.len() >= self.capacity {
            Err(Refusal::Full)
        } else {
            Ok(())
        }
    }

    fn entry(enc: &[u8]) -> [u8; 32] {
        let mut entry = [0; 32];
        entry.copy_from_slice(digest::digest(&digest::SHA256, enc).as_ref());
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_until_full_and_then_admits_nothing() {
        let mut cache = ReplayCache::new(4);
        assert_eq!(cache.check(b"a"), Ok(()));
        assert_eq!(cache.admit(b"a"), Ok(()));
        assert_eq!(cache.check(b"a"), Err(Refusal::Seen));
        assert_eq!(cache.admit(b"a"), Err(Refusal::Seen));
        assert_eq!(cache.admit(b"b"), Ok(()));
        assert!(!cache.is_filling());
        assert_eq!(cache.admit(b"c"), Ok(()));
        assert!(cache.is_filling());
        assert_eq!(cache.admit(b"d"), Ok(()));
        assert_eq!(cache.admit(b"e"), Err(Refusal::Full));
        assert_eq!(cache.admit(b"a"), Err(Refusal::Seen));
    }
}
