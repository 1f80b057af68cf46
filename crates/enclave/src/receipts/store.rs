//! Receipts at rest: in memory, bounded in number, bytes and time, found by who asked.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use casemate_channel::receipt::{FetchedReceipt, RequestId};

use crate::access::Caller;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Receipts.
    pub receipts: usize,
    /// Bytes of all of them together, with what their allocations take; without the tables that find them, whose size
    /// follows from the number of receipts.
    pub bytes: usize,
    /// Seconds each.
    pub seconds: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            receipts: 16384,
            bytes: 16 << 20,
            seconds: 3600,
        }
    }
}

/// Signed receipts, until they are too old or too many. Dropping one erases its salts.
pub struct Store {
    limits: Limits,
    kept: Mutex<Kept>,
}

struct Kept {
    /// Boxed, so that an entry stays where it is: a table that moved salts about would leave copies behind.
    entries: HashMap<RequestId, Box<Entry>>,
    /// Oldest first.
    order: VecDeque<RequestId>,
    bytes: usize,
}

struct Entry {
    owner: Caller,
    fetched: FetchedReceipt,
    forgotten_at: u64,
}

impl Store {
    /// An empty store.
    pub fn new(limits: Limits) -> Store {
        Store {
            limits,
            kept: Mutex::new(Kept {
                // Twice, because a table of the standard library that is more than half full grows when enough of its
                // entries have been replaced. So neither ever grows, and what they take is known.
                entries: HashMap::with_capacity(2 * limits.receipts),
                order: VecDeque::with_capacity(limits.receipts),
                bytes: 0,
            }),
        }
    }

    /// Keeps a receipt for its owner; the oldest ones give way.
    pub(super) fn keep(&self, id: RequestId, owner: Caller, fetched: FetchedReceipt, now: u64) {
        let entry = Box::new(Entry {
            owner,
            fetched,
            forgotten_at: now.saturating_add(self.limits.seconds),
        });
        let more = size(&id, &entry);
        if more > self.limits.bytes {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.forget(now);
        while kept.order.len() >= self.limits.receipts || kept.bytes + more > self.limits.bytes {
            if !kept.forget_oldest() {
                break;
            }
        }
        kept.bytes += more;
        kept.order.push_back(id.clone());
        kept.entries.insert(id, entry);
    }

    /// The JSON of a receipt, for its owner. Callers without a key are one owner.
    pub(super) fn find(&self, id: &RequestId, owner: &Caller, now: u64) -> Option<String> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.forget(now);
        let entry = kept.entries.get(id)?;
        (entry.owner == *owner).then(|| entry.fetched.to_json())
    }

    /// Forgets what is too old by `now`; returns how many are left.
    pub(super) fn forget(&self, now: u64) -> usize {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.forget(now);
        kept.order.len()
    }
}

impl Kept {
    fn forget(&mut self, now: u64) {
        let is_due = |kept: &Kept| {
            let oldest = kept.order.front().and_then(|id| kept.entries.get(id));
            oldest.is_some_and(|entry| now >= entry.forgotten_at)
        };
        while is_due(self) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) -> bool {
        let Some(id) = self.order.pop_front() else {
            return false;
        };
        if let Some(entry) = self.entries.remove(&id) {
            self.bytes -= size(&id, &entry);
        }
        true
    }
}

/// The most that an allocator adds to an allocation: its own record, and rounding up.
const ALLOCATION: usize = 32;

/// What an entry takes at the most: the id twice, itself, its receipt, and its owner's name as if nobody else held it.
fn size(id: &RequestId, entry: &Entry) -> usize {
    let id = id.as_str().len();
    let name = entry.owner.name().map_or(0, str::len) + 2 * size_of::<usize>();
    let receipt = entry.fetched.receipt.capacity();
    let parts = [id, id, size_of::<Entry>(), receipt, name];
    parts.iter().map(|part| part + ALLOCATION).sum()
}

#[cfg(test)]
mod tests {
    use casemate_channel::receipt::Salt;
    use casemate_release::api_key::hash;

    use super::*;

    /// The holder of this key, or of none. All keys have the same name.
    fn owner(key: &str) -> Caller {
        match key {
            "" => Caller::anonymous(),
            key => Caller::holder("name", hash(key.as_bytes())),
        }
    }

    fn id(n: u8) -> RequestId {
        RequestId::new("chatcmpl", [n; 16])
    }

    fn store(receipts: usize, bytes: usize) -> Store {
        Store::new(Limits {
            receipts,
            bytes,
            seconds: 10,
        })
    }

    fn keep(store: &Store, n: u8, key: &str, now: u64) {
        let fetched = FetchedReceipt {
            receipt: vec![n; 500],
            request_salt: Salt::random(),
            answer_salt: Salt::random(),
        };
        store.keep(id(n), owner(key), fetched, now);
    }

    fn has(store: &Store, n: u8, key: &str, now: u64) -> bool {
        store.find(&id(n), &owner(key), now).is_some()
    }

    #[test]
    fn only_who_asked_gets_a_receipt() {
        let store = store(10, 1 << 20);
        keep(&store, 1, "a", 0);
        keep(&store, 2, "", 0);
        assert!(has(&store, 1, "a", 0));
        for key in ["b", "A", "a ", ""] {
            assert!(!has(&store, 1, key, 0), "{key:?}");
        }
        assert!(has(&store, 2, "", 0));
        assert!(!has(&store, 2, "a", 0));
        assert!(!has(&store, 3, "", 0));
    }

    #[test]
    fn receipts_are_forgotten_in_time_and_the_oldest_when_there_are_too_many() {
        let store = store(2, 1 << 20);
        keep(&store, 1, "", 0);
        keep(&store, 2, "", 5);
        assert!(has(&store, 1, "", 9));
        assert!(!has(&store, 1, "", 10));
        assert!(has(&store, 2, "", 10));
        keep(&store, 3, "", 11);
        keep(&store, 4, "", 11);
        assert!(!has(&store, 2, "", 11), "the third was one too many");
        assert!(has(&store, 3, "", 11) && has(&store, 4, "", 11));
        assert_eq!(store.forget(21), 0);
        assert_eq!(store.kept.lock().unwrap().bytes, 0);
        assert!(store.kept.lock().unwrap().entries.is_empty());
    }

    #[test]
    fn the_bytes_of_all_receipts_are_bounded() {
        let store = store(1000, 3000);
        for n in 0..100 {
            keep(&store, n, "", 0);
            assert!(store.kept.lock().unwrap().bytes <= 3000);
        }
        assert!(has(&store, 99, "", 0));
        assert!(!has(&store, 90, "", 0));
        // What can never fit is not kept, and costs nobody else's.
        let fetched = FetchedReceipt {
            receipt: vec![0; 3000],
            request_salt: Salt::random(),
            answer_salt: Salt::random(),
        };
        store.keep(id(200), owner(""), fetched, 0);
        assert!(!has(&store, 200, "", 0) && has(&store, 99, "", 0));
    }

    #[test]
    fn tables_are_never_larger_than_at_first() {
        let store = store(100, 1 << 20);
        let capacities = |store: &Store| {
            let kept = store.kept.lock().unwrap();
            (kept.entries.capacity(), kept.order.capacity())
        };
        let at_first = capacities(&store);
        for n in 0..10_000_u128 {
            let fetched = FetchedReceipt {
                receipt: vec![0; 400],
                request_salt: Salt::random(),
                answer_salt: Salt::random(),
            };
            let id = RequestId::new("chatcmpl", n.to_be_bytes());
            store.keep(id, owner("a"), fetched, 0);
            // What was removed counts as taken until the table is put in order, so there may seem to be less room.
            let (entries, order) = capacities(&store);
            assert!(entries <= at_first.0 && order == at_first.1, "{n}");
        }
        assert_eq!(store.forget(0), 100);
    }

    #[test]
    fn the_documented_bound_is_that_of_the_limits() {
        // docs/enclave.md, "What grows, and until when": buckets of the table (a power of two, at most 7/8 full) with a
        // byte each, and places of the queue.
        let receipts = Limits::default().receipts;
        let buckets = (2 * receipts * 8 / 7).next_power_of_two();
        let tables = buckets * (size_of::<(RequestId, Box<Entry>)>() + 1)
            + receipts * size_of::<RequestId>();
        assert_eq!(tables, 2_555_904);
        let entry = |bytes| {
            let fetched = FetchedReceipt {
                receipt: vec![0; bytes],
                request_salt: Salt::random(),
                answer_salt: Salt::random(),
            };
            Entry {
                owner: owner("key"),
                fetched,
                forgotten_at: 0,
            }
        };
        assert_eq!(size(&id(0), &entry(400)), 806);
    }
}
