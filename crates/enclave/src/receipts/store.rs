//! Receipts at rest: in memory, bounded in number, bytes and time, found by who asked.
//!
//! Room is shared by callers, of whom all without a key are one. Where there is not enough, whoever has most of it gives up
//! its oldest receipts, so nobody's are pushed out by others' before it has more than its share: the room divided by how
//! many have any.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use casemate_channel::receipt::{FetchedReceipt, RequestId};

use crate::access::Caller;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Receipts.
    pub receipts: usize,
    /// Bytes of all of them together, with what their allocations and queues take; without the table that finds them,
    /// whose size follows from the number of receipts.
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
    /// Who has any. As many as the grants of the last hour list API keys, so all are looked at where one is searched for.
    callers: HashMap<Caller, Own>,
    bytes: usize,
}

/// What one caller has: at least one receipt.
struct Own {
    /// Oldest first.
    order: VecDeque<RequestId>,
    /// Of these receipts, and of this.
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
                // entries have been replaced. So it never grows, and what it takes is known.
                entries: HashMap::with_capacity(2 * limits.receipts),
                callers: HashMap::new(),
                bytes: 0,
            }),
        }
    }

    /// Keeps a receipt for its owner. Where there is no room, whoever has most gives up its oldest; that may be this one.
    pub(super) fn keep(&self, id: RequestId, owner: Caller, fetched: FetchedReceipt, now: u64) {
        let entry = Box::new(Entry {
            owner,
            fetched,
            forgotten_at: now.saturating_add(self.limits.seconds),
        });
        if size(&id, &entry) + size_of_caller(&entry.owner) > self.limits.bytes {
            return;
        }
        let mut kept = self.kept();
        kept.forget(now);
        kept.add(id, entry);
        while kept.entries.len() > self.limits.receipts || kept.bytes > self.limits.bytes {
            let Some(most) = kept.who_has_most(&self.limits) else {
                return;
            };
            kept.forget_oldest(&most);
        }
    }

    /// The JSON of a receipt, for its owner. Callers without a key are one owner.
    pub(super) fn find(&self, id: &RequestId, owner: &Caller, now: u64) -> Option<String> {
        let mut kept = self.kept();
        kept.forget(now);
        let entry = kept.entries.get(id)?;
        (entry.owner == *owner).then(|| entry.fetched.to_json())
    }

    /// Forgets what is too old by `now`; returns how many are left.
    pub(super) fn forget(&self, now: u64) -> usize {
        let mut kept = self.kept();
        kept.forget(now);
        kept.entries.len()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn add(&mut self, id: RequestId, entry: Box<Entry>) {
        let bytes = size(&id, &entry);
        let own = self.callers.entry(entry.owner.clone()).or_insert_with(|| {
            let bytes = size_of_caller(&entry.owner);
            self.bytes += bytes;
            let order = VecDeque::new();
            Own { order, bytes }
        });
        own.order.push_back(id.clone());
        own.bytes += bytes;
        self.bytes += bytes;
        self.entries.insert(id, entry);
    }

    fn forget(&mut self, now: u64) {
        let due = |(caller, own): (&Caller, &Own)| {
            (self.when_forgotten(own)? <= now).then(|| caller.clone())
        };
        let due: Vec<Caller> = self.callers.iter().filter_map(due).collect();
        for caller in due {
            while let Some(own) = self.callers.get(&caller)
                && self.when_forgotten(own).is_some_and(|when| when <= now)
            {
                self.forget_oldest(&caller);
            }
        }
    }

    /// When the oldest receipt of a caller is forgotten.
    fn when_forgotten(&self, own: &Own) -> Option<u64> {
        let oldest = self.entries.get(own.order.front()?)?;
        Some(oldest.forgotten_at)
    }

    /// Who has the largest part of what there may be, of receipts or of bytes, whichever part is larger. Of two who have as
    /// much, the one whose oldest is older.
    fn who_has_most(&self, limits: &Limits) -> Option<Caller> {
        let part = |own: &Own| {
            let receipts = own.order.len() as u128 * limits.bytes as u128;
            receipts.max(own.bytes as u128 * limits.receipts as u128)
        };
        let most = self.callers.iter().max_by_key(|(_, own)| {
            let age = Reverse(self.when_forgotten(own));
            (part(own), age)
        });
        most.map(|(caller, _)| caller.clone())
    }

    fn forget_oldest(&mut self, caller: &Caller) {
        let Some(own) = self.callers.get_mut(caller) else {
            return;
        };
        if let Some(id) = own.order.pop_front()
            && let Some(entry) = self.entries.remove(&id)
        {
            let bytes = size(&id, &entry);
            own.bytes -= bytes;
            self.bytes -= bytes;
        }
        if own.order.is_empty() {
            self.bytes -= own.bytes;
            self.callers.remove(caller);
            if self.callers.capacity() >= PLACES * self.callers.len() {
                self.callers.shrink_to(self.callers.len() * PLACES / 2);
            }
        } else if own.order.capacity() >= PLACES * own.order.len() {
            own.order.shrink_to(own.order.len() * PLACES / 2);
        }
    }
}

/// The most that an allocator adds to an allocation: its own record, and rounding up.
const ALLOCATION: usize = 32;
/// Most places of a queue, or of the table of callers, for each one that is taken.
const PLACES: usize = 4;

/// What an entry takes at the most: the id twice, its places in a queue, itself and its receipt.
fn size(id: &RequestId, entry: &Entry) -> usize {
    let id = id.as_str().len();
    let places = PLACES * size_of::<RequestId>();
    let receipt = entry.fetched.receipt.capacity();
    let parts = [id, id, size_of::<Entry>(), receipt];
    places + parts.iter().map(|part| part + ALLOCATION).sum::<usize>()
}

/// What a caller who has any takes beside them at the most: its name as if nobody else held it, the allocation of its
/// queue, and places in the table, which has some that are never taken.
fn size_of_caller(caller: &Caller) -> usize {
    let name = caller.name().map_or(0, str::len) + 2 * size_of::<usize>();
    let places = 2 * PLACES * (size_of::<(Caller, Own)>() + 1);
    name + places + 2 * ALLOCATION
}

#[cfg(test)]
mod tests {
    use casemate_channel::receipt::Salt;
    use casemate_release::api_key::hash;
    use proptest::prelude::*;

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
        assert_eq!(store.kept().bytes, 0);
        assert!(store.kept().entries.is_empty() && store.kept().callers.is_empty());
    }

    #[test]
    fn the_bytes_of_all_receipts_are_bounded() {
        let store = store(1000, 4000);
        for n in 0..100 {
            keep(&store, n, "", 0);
            assert!(store.kept().bytes <= 4000);
        }
        assert!(has(&store, 99, "", 0));
        assert!(!has(&store, 90, "", 0));
        // What can never fit is not kept, and costs nobody else's.
        let fetched = FetchedReceipt {
            receipt: vec![0; 4000],
            request_salt: Salt::random(),
            answer_salt: Salt::random(),
        };
        store.keep(id(200), owner(""), fetched, 0);
        assert!(!has(&store, 200, "", 0) && has(&store, 99, "", 0));
    }

    #[test]
    fn tables_are_never_larger_than_they_may_be() {
        let store = store(100, 1 << 20);
        let at_first = store.kept().entries.capacity();
        // One caller has all of it, then many have a little each, then one again.
        let who = |n: u128| match n / 2500 {
            1 => format!("{}", n % 70),
            _ => "busy".to_owned(),
        };
        for n in 0..7500_u128 {
            let fetched = FetchedReceipt {
                receipt: vec![0; 400],
                request_salt: Salt::random(),
                answer_salt: Salt::random(),
            };
            let id = RequestId::new("chatcmpl", n.to_be_bytes());
            store.keep(id, owner(&who(n)), fetched, 0);
            let kept = store.kept();
            // What was removed counts as taken until the table is put in order, so there may seem to be less room.
            assert!(kept.entries.capacity() <= at_first, "{n}");
            for own in kept.callers.values() {
                let (places, taken) = (own.order.capacity(), own.order.len());
                assert!(places <= PLACES * taken, "{n}: {places} for {taken}");
            }
            let (places, callers) = (kept.callers.capacity(), kept.callers.len());
            assert!(places <= PLACES * callers, "{n}: {places} for {callers}");
        }
        assert_eq!(store.forget(0), 100);
        assert_eq!(store.kept().callers.len(), 1 + 70);
    }

    #[test]
    fn the_documented_bound_is_that_of_the_limits() {
        // docs/enclave.md, "What grows, and until when": buckets of the table (a power of two, at most 7/8 full) with a
        // byte each.
        let receipts = Limits::default().receipts;
        let buckets = (2 * receipts * 8 / 7).next_power_of_two();
        let table = buckets * (size_of::<(RequestId, Box<Entry>)>() + 1);
        assert_eq!(table, 2_162_688);
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
        assert_eq!(size(&id(0), &entry(400)), 850);
        assert_eq!(size_of_caller(&owner("key")), 796);
    }

    #[test]
    fn a_busy_caller_pushes_out_its_own_receipts() {
        let store = store(20, 1 << 20);
        for n in 0..5 {
            keep(&store, n, "quiet", 0);
        }
        // Nobody else is there: all of the room may be used.
        for n in 5..100 {
            keep(&store, n, "busy", 0);
        }
        assert!((0..5).all(|n| has(&store, n, "quiet", 0)));
        assert_eq!((5..100).filter(|&n| has(&store, n, "busy", 0)).count(), 15);
        assert!((85..100).all(|n| has(&store, n, "busy", 0)), "the youngest");
        // Who comes later takes from who has most.
        for n in 100..104 {
            keep(&store, n, "", 0);
        }
        assert!((0..5).all(|n| has(&store, n, "quiet", 0)));
        assert!((100..104).all(|n| has(&store, n, "", 0)));
        assert_eq!((85..100).filter(|&n| has(&store, n, "busy", 0)).count(), 11);
        assert!(!has(&store, 88, "busy", 0) && has(&store, 89, "busy", 0));
    }

    /// A receipt as the test remembers it.
    #[derive(Clone)]
    struct Given {
        n: u8,
        who: &'static str,
        bytes: usize,
        at: u64,
    }

    proptest! {
        #[test]
        fn nobody_loses_a_receipt_to_others_before_it_has_more_than_its_share(
            receipts in 1usize..12,
            bytes in 1usize..12_000,
            steps in prop::collection::vec(
                (prop::sample::select(vec!["", "a", "b", "c"]), 0usize..2000, 0u64..4), 0..80),
        ) {
            let store = store(receipts, bytes);
            let (mut there, mut now): (Vec<Given>, u64) = (Vec::new(), 0);
            for (n, (who, length, later)) in (0..).zip(steps) {
                now += later;
                there.retain(|given| now < given.at + 10);
                let fetched = FetchedReceipt {
                    receipt: vec![n; length],
                    request_salt: Salt::random(),
                    answer_salt: Salt::random(),
                };
                store.keep(id(n), owner(who), fetched, now);
                // By the sizes that the documented bound is tested with.
                let given = Given { n, who, bytes: 450 + length, at: now };
                let fits = given.bytes + size_of_caller(&owner(who)) <= bytes;
                if fits {
                    there.push(given);
                }
                let callers = ["", "a", "b", "c"].map(|who| {
                    let own = there.iter().filter(|given| given.who == who);
                    let (count, taken) = own.fold((0, 0), |(count, taken), g| (count + 1, taken + g.bytes));
                    let own = if count > 0 { size_of_caller(&owner(who)) } else { 0 };
                    (who, count, taken + own)
                });
                let sharing = callers.iter().filter(|(_, count, _)| *count > 0).count();
                let kept: Vec<bool> = there.iter().map(|given| has(&store, given.n, given.who, now)).collect();
                for (who, count, taken) in callers {
                    let own = || there.iter().zip(&kept).filter(|(given, _)| given.who == who);
                    if count * sharing <= receipts && taken * sharing <= bytes {
                        prop_assert!(own().all(|(_, kept)| *kept), "{who:?} lost some within its share");
                    }
                    // The oldest go.
                    let stay = own().skip_while(|(_, kept)| !**kept);
                    prop_assert!(stay.into_iter().all(|(_, kept)| *kept));
                }
                let mut kept = kept.into_iter();
                there.retain(|_| kept.next() == Some(true));
                store.forget(now);
                let state = store.kept();
                prop_assert_eq!(state.entries.len(), there.len());
                prop_assert!(there.len() <= receipts && state.bytes <= bytes);
                let own: usize = state.callers.values().map(|own| own.bytes).sum();
                prop_assert_eq!(state.bytes, own);
                // And no more of them than had to.
                if fits && callers.iter().map(|(_, count, _)| count).sum::<usize>() <= receipts
                    && callers.iter().map(|(.., taken)| taken).sum::<usize>() <= bytes
                {
                    let everything: usize = callers.iter().map(|(_, count, _)| count).sum();
                    prop_assert_eq!(there.len(), everything);
                }
            }
        }
    }
}
