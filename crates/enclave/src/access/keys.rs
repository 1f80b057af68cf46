//! The API keys of a grant, and what each has used.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use casemate_release::api_key::{self, Access, Limits};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::bucket::{Bucket, Period, Shortage};

/// One API key.
pub(super) struct Key {
    pub(super) name: Arc<str>,
    pub(super) hash: [u8; 32],
    limits: Limits,
    usage: Arc<Usage>,
}

struct Usage {
    requests: Limited,
    tokens: Limited,
    running: AtomicU32,
}

impl Usage {
    fn new(limits: &Limits, now: Duration) -> Self {
        let limited = |per_minute: Option<NonZeroU32>, per_day: Option<NonZeroU32>| Limited {
            minute: per_minute.map(|limit| Mutex::new(Bucket::new(limit, Period::Minute, now))),
            day: per_day.map(|limit| Mutex::new(Bucket::new(limit, Period::Day, now))),
        };
        Self {
            requests: limited(limits.requests_per_minute, limits.requests_per_day),
            tokens: limited(limits.tokens_per_minute, limits.tokens_per_day),
            running: AtomicU32::new(0),
        }
    }
}

/// What is limited by the minute, for the sake of load, and by the day, for the sake of what can be learned.
struct Limited {
    minute: Option<Mutex<Bucket>>,
    day: Option<Mutex<Bucket>>,
}

/// A limit that was reached, and when there is more.
pub(super) struct Reached {
    pub(super) limit: u32,
    pub(super) period: Period,
    pub(super) shortage: Shortage,
}

/// What is allowed, what is left of it, and how long until all of it is there again.
pub(super) type Left = (u32, u32, Duration);

impl Limited {
    /// Takes from both. Who is refused for the minute has used nothing of the day; the other way round it has used up
    /// something of a minute in which it can do nothing anyway.
    fn take(&self, now: Duration, amount: u32) -> Result<(), Reached> {
        for (bucket, period) in [(&self.minute, Period::Minute), (&self.day, Period::Day)] {
            let Some(bucket) = bucket else { continue };
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            let limit = bucket.limit();
            bucket.take(now, amount).map_err(|shortage| Reached {
                limit,
                period,
                shortage,
            })?;
        }
        Ok(())
    }

    fn charge(&self, now: Duration, amount: u32) {
        for bucket in [&self.minute, &self.day].into_iter().flatten() {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.charge(now, amount);
        }
    }

    fn give_back(&self, taken: Duration, now: Duration, amount: u32) {
        for bucket in [&self.minute, &self.day].into_iter().flatten() {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.give_back(taken, now, amount);
        }
    }

    fn left(&self, period: Period, now: Duration) -> Option<Left> {
        let bucket = match period {
            Period::Minute => &self.minute,
            Period::Day => &self.day,
        };
        let bucket = bucket.as_ref()?;
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, full_in) = bucket.state(now);
        Some((bucket.limit(), left, full_in))
    }
}

impl Key {
    pub(super) fn take_request(&self, now: Duration) -> Result<(), Reached> {
        self.usage.requests.take(now, 1)
    }

    pub(super) fn take_tokens(&self, now: Duration, tokens: u32) -> Result<(), Reached> {
        self.usage.tokens.take(now, tokens)
    }

    pub(super) fn charge_tokens(&self, now: Duration, tokens: u32) {
        self.usage.tokens.charge(now, tokens);
    }

    /// Puts back tokens that were taken then and not used.
    pub(super) fn give_tokens_back(&self, taken: Duration, now: Duration, tokens: u32) {
        self.usage.tokens.give_back(taken, now, tokens);
    }

    pub(super) fn requests(&self, period: Period, now: Duration) -> Option<Left> {
        self.usage.requests.left(period, now)
    }

    pub(super) fn tokens(&self, period: Period, now: Duration) -> Option<Left> {
        self.usage.tokens.left(period, now)
    }

    /// Counts a request until what is returned is dropped; the limit, if it is reached.
    pub(super) fn begin(&self) -> Result<Permit, u32> {
        let limit = self.limits.concurrency.map_or(u32::MAX, NonZeroU32::get);
        let running = &self.usage.running;
        running
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |running| {
                (running < limit).then(|| running + 1)
            })
            .map_err(|_| limit)?;
        Ok(Permit(Arc::clone(&self.usage)))
    }
}

/// A request that is being answered.
pub(super) struct Permit(Arc<Usage>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Who may ask.
pub(super) enum Table {
    /// Anybody.
    Open,
    /// Who has one of these keys.
    Keyed(Vec<Arc<Key>>),
}

impl Table {
    /// What a grant says; keys that `former` had with the same limits keep what they have used.
    pub(super) fn new(access: &Access, former: Option<&Table>, now: Duration) -> Self {
        let Some(keys) = access.api_keys() else {
            return Self::Open;
        };
        let former = match former {
            Some(Self::Keyed(keys)) => keys.as_slice(),
            Some(Self::Open) | None => &[],
        };
        let key = |key: &api_key::ApiKey| {
            let same = |had: &&Arc<Key>| had.hash == key.hash && had.limits == key.limits;
            let usage = match former.iter().find(same) {
                Some(kept) => Arc::clone(&kept.usage),
                None => Arc::new(Usage::new(&key.limits, now)),
            };
            Arc::new(Key {
                name: Arc::from(&*key.name),
                hash: key.hash,
                limits: key.limits,
                usage,
            })
        };
        Self::Keyed(keys.as_slice().iter().map(key).collect())
    }

    /// As it is, without whom a newer grant does not let in.
    pub(super) fn without(&self, newer: &Access, now: Duration) -> Self {
        match (self, newer.api_keys()) {
            (Self::Open, _) => Self::new(newer, None, now),
            (Self::Keyed(keys), None) => Self::Keyed(keys.clone()),
            (Self::Keyed(keys), Some(newer)) => {
                let newer = newer.as_slice();
                let stays = |key: &&Arc<Key>| newer.iter().any(|other| other.hash == key.hash);
                Self::Keyed(keys.iter().filter(stays).cloned().collect())
            }
        }
    }

    /// Whether both let in the same holders with the same keys, as often. A list is in the order of its names.
    pub(super) fn says_the_same_as(&self, other: &Table) -> bool {
        let same = |(a, b): (&Arc<Key>, &Arc<Key>)| {
            (&a.name, a.hash, a.limits) == (&b.name, b.hash, b.limits)
        };
        match (self, other) {
            (Self::Open, Self::Open) => true,
            (Self::Keyed(these), Self::Keyed(those)) => {
                these.len() == those.len() && these.iter().zip(those).all(same)
            }
            (Self::Open, Self::Keyed(_)) | (Self::Keyed(_), Self::Open) => false,
        }
    }
}

/// The entry of a key. Every entry is compared in full whatever the others said, so the time it takes depends on how many
/// there are and not on which of them fits, or how nearly.
pub(super) fn find(keys: &[Arc<Key>], presented: &[u8]) -> Option<Arc<Key>> {
    let hash = api_key::hash(presented);
    let mut found = u32::MAX;
    for (index, key) in (0u32..).zip(keys) {
        found.conditional_assign(&index, hash.ct_eq(&key.hash));
    }
    keys.get(found as usize).cloned()
}
