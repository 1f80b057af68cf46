//! Which requests run, and which give way.
//!
//! A request starts when the KV cache has room for what is known of it, prompt and answer so far,
//! beside what the running ones still have to read, and a page more for each sequence that may come
//! to need it. What answers need beyond that nobody knows; where pages run out, the least deserving request gives
//! its own back and waits for its turn again. It keeps its tokens, the state of its sampler and
//! of its grammar, and computes the positions that it lost anew, with the same bits: who reads the
//! answer sees nothing of it.
//!
//! **Who deserves least.** Of the users with requests running, the one that was served most; of its
//! requests, the one that came last. The others always go on, so the first of them reaches its end.
//!
//! **Free places.** A prompt is charged to its user when its request starts, so that several places that
//! are free at one time go to several users.
//!
//! **A place for everybody.** A user none of whose requests runs need not wait for the end of an
//! answer of a user who has several and was served more: the last of those gives way.

use std::time::Duration;

use casemate_kernels::attention::PAGE;

use super::fairness::PROMPT;
use super::mailbox::Counters;
use super::{AccountId, Scheduler};
use crate::kv::KvCache;
use crate::sequence::Sequence;

/// What the running requests leave.
#[derive(Clone, Copy)]
struct Room {
    places: usize,
    /// Pages that nobody uses and nobody running is about to need; below zero where those are not
    /// enough.
    pages: isize,
    /// Pages that running sequences may come to need next.
    reserve: usize,
    /// Nothing runs.
    alone: bool,
    /// When that is: pages are found until their time is over.
    now: Duration,
    /// One that shares its prompt with the next request runs.
    shared: bool,
}

impl Room {
    /// Whether `request` can start.
    fn fits(&self, kv: &KvCache, request: &Sequence) -> bool {
        let mut found = kv.find(request.user, request.adapter, request.text(), self.now);
        if self.shared {
            // What that one has found it uses, so nothing of it is idle; what this one left itself may be.
            found.pages = found.pages.max(request.shared() / PAGE);
        }
        // Alone it fits: that was checked when it came.
        let reserve = match self.alone {
            true => 0,
            false => self.reserve + request.pages_in_reserve(),
        };
        // Pages that it finds are not to be taken, but neither are they available any more.
        let needed = request.pages_known() - found.pages + found.idle + reserve;
        request.width() <= self.places && needed.cast_signed() <= self.pages
    }
}

impl Scheduler {
    /// Starts waiting requests in the order of their turns, while the batch and the KV cache have
    /// room. An evaluation waits for an empty batch, and all requests wait behind it.
    pub(super) fn admit(&mut self) {
        while self.evaluations.is_empty()
            && let Some(account) = self.queue.next()
        {
            self.sort();
            let Some(next) = self.queue.front(account) else {
                return;
            };
            let room = self.room(next);
            if !room.fits(&self.kv, next) && !self.make_way(account, room) {
                return;
            }
            let Some(mut sequence) = self.queue.take(account) else {
                return;
            };
            self.mailbox.waits_no_more(sequence.user);
            let first = sequence.start(&mut self.kv, room.now);
            sequence.waits = room.shared;
            if let Some(cached) = first {
                Counters::add(&self.mailbox.counters.requests, 1);
                Counters::add(&self.mailbox.counters.cached_tokens, cached);
                let computed = sequence.expect(room.shared) as u64;
                self.queue.charge(account, computed * PROMPT);
            }
            // There is one for each place, and beams take several places.
            if sequence.width() == 1
                && let Some(lookup) = self.lookups.pop()
            {
                sequence.guess_by(lookup);
            }
            self.running.push(sequence);
        }
    }

    /// What there is for `next`.
    fn room(&self, next: &Sequence) -> Room {
        let readers = next.readers;
        let mut room = Room {
            shared: readers.is_some() && self.running.iter().any(|s| s.readers == readers),
            places: self.maximum_batch,
            pages: self.kv.available().cast_signed(),
            reserve: 0,
            alone: self.running.is_empty(),
            now: (self.clock)(),
        };
        for sequence in &self.running {
            room.places -= sequence.width();
            room.pages -= sequence.pages_to_come(&self.kv).cast_signed();
            room.reserve += sequence.pages_in_reserve();
        }
        room
    }

    /// Lets requests of users who have several running give way to the first one of `account`, which
    /// has none; but only if that is enough.
    fn make_way(&mut self, account: AccountId, mut room: Room) -> bool {
        if self.running.iter().any(|s| s.account == Some(account)) {
            return false;
        }
        let Some(next) = self.queue.front(account) else {
            return false;
        };
        self.victims.clear();
        // The least deserving are the last.
        for at in (0..self.running.len()).rev() {
            let sequence = &self.running[at];
            let Some(owner) = sequence.account else {
                continue;
            };
            let left = (0..at)
                .filter(|&i| self.running[i].account == Some(owner))
                .count();
            if left == 0 || self.queue.served(owner) <= self.queue.served(account) {
                continue;
            }
            room.places += sequence.width();
            let pages = sequence.pages_to_give(&self.kv) + sequence.pages_to_come(&self.kv);
            room.pages += pages.cast_signed();
            room.reserve -= sequence.pages_in_reserve();
            self.victims.push(at);
            if room.fits(&self.kv, next) {
                // From the last to the first, so that indices stay what they are.
                for victim in 0..self.victims.len() {
                    self.preempt(self.victims[victim]);
                }
                return true;
            }
        }
        false
    }

    /// The most deserving first; requests of one user stand together.
    pub(super) fn sort(&mut self) {
        let queue = &self.queue;
        self.running.sort_unstable_by_key(|sequence| {
            let served = sequence.account.map(|account| queue.served(account));
            (served, sequence.account, sequence.id)
        });
    }

    /// Takes a running request's pages. It waits for its turn again.
    pub(super) fn preempt(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        self.put_away(&mut sequence);
        Counters::add(&self.mailbox.counters.preemptions, 1);
        self.mailbox.waits_again(sequence.user);
        if let Some(account) = sequence.account {
            self.queue.put(account, sequence.id.0, sequence);
        }
    }
}
