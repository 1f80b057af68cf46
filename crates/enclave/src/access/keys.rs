//! The API keys of a grant, and what each has used.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use casemate_release::api_key::{self, Access, Limits};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::bucket::{Bucket, Shortage};

/// One API key.
pub(super) struct Key {
    pub(super) name: Arc<str>,
    pub(super) hash: [u8; 32],
    limits: Limits,
    usage: Arc<Usage>,
}

struct Usage {
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
    running: AtomicU32,
}

impl Usage {
    fn new(limits: &Limits, now: Duration) -> Self {
        let bucket =
            |limit: Option<NonZeroU32>| limit.map(|limit| Mutex::new(Bucket::new(limit, now)));
        Self {
            requests: bucket(limits.requests_per_minute),
            tokens: bucket(limits.tokens_per_minute),
            running: AtomicU32::new(0),
        }
    }
}

/// A limit that was reached, and when there is more.
pub(super) type Reached = (u32, Shortage);

/// What is allowed, what is left of it, and how long until all of it is there again.
pub(super) type Left = (u32, u32, Duration);

fn take(bucket: &Option<Mutex<Bucket>>, now: Duration, amount: u32) -> Result<(), Reached> {
    let Some(bucket) = bucket else {
        return Ok(());
    };
    let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = bucket.limit();
    bucket
        .take(now, amount)
        .map_err(|shortage| (limit, shortage))
}

fn left(bucket: &Option<Mutex<Bucket>>, now: Duration) -> Option<Left> {
    let mut bucket = bucket
        .as_ref()?
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let (left, full_in) = bucket.state(now);
    Some((bucket.limit(), left, full_in))
}

impl Key {
    pub(super) fn take_request(&self, now: Duration) -> Result<(), Reached> {
        take(&self.usage.requests, now, 1)
    }

    pub(super) fn take_tokens(&self, now: Duration, tokens: u32) -> Result<(), Reached> {
        take(&self.usage.tokens, now, tokens)
    }

    pub(super) fn charge_tokens(&self, now: Duration, tokens: u32) {
        if let Some(bucket) = &self.usage.tokens {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.charge(now, tokens);
        }
    }

    pub(super) fn requests(&self, now: Duration) -> Option<Left> {
        left(&self.usage.requests, now)
    }

    pub(super) fn tokens(&self, now: Duration) -> Option<Left> {
        left(&self.usage.tokens, now)
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
