//! Whose rows the next step computes: one for each sequence that is generating, then prompts. The
//! rows of prompts are bounded, so that they hold up nobody's next token for longer than those rows
//! take; they are shared evenly among users, and a user's among its requests.
//!
//! **Guesses.** Where few sequences are generating, what is probably next in them takes rows that cost
//! little ([`crate::speculation`]). They come out of those of prompts, so a step is no longer for them.

use super::{GENERATING_ROWS, Member, PROMPT_ROWS, PROMPT_ROWS_BESIDE_DECODE, Scheduler};
use crate::error::RequestError;
use crate::model::Wanted;
use crate::request::FinishReason;

impl Scheduler {
    /// Fills the batch, and takes the pages that it writes. Where there are too few, the least
    /// deserving requests give way. The batch is empty only if no request is left.
    pub(super) fn plan(&mut self) {
        loop {
            self.batch.clear();
            self.members.clear();
            self.sort();
            let guesses = self.plan_generating();
            self.share_prompts();
            self.plan_prompts(guesses);
            if !self.members.is_empty() || !self.give_way() {
                return;
            }
        }
    }

    /// The least deserving request gives its pages back. `false`: none is left.
    fn give_way(&mut self) -> bool {
        match self.running.len() {
            0 => false,
            1 => {
                // A request alone has all pages, and it was checked that they are enough.
                self.fail(0);
                false
            }
            last => {
                self.preempt(last - 1);
                true
            }
        }
    }

    /// Ends a request by an error of ours.
    pub(super) fn fail(&mut self, at: usize) {
        let sequence = &mut self.running[at];
        super::guarded(|| sequence.finish(FinishReason::Error(RequestError::Internal)));
        super::Counters::add(&self.mailbox.counters.failed, 1);
        self.remove(at);
    }

    /// Returns how many rows are guesses.
    fn plan_generating(&mut self) -> usize {
        let mut at = 0;
        // The most deserving take pages first.
        while at < self.running.len() {
            let sequence = &self.running[at];
            let lanes = sequence.active();
            let took = !sequence.generating()
                || (0..lanes).all(|lane| {
                    let fed = sequence.fed(lane);
                    self.kv.ensure(sequence.slot(lane), fed, fed + 1)
                });
            if took {
                at += 1;
            } else if !self.give_way() {
                return 0;
            }
        }
        let generating = self.running.iter().filter(|s| s.generating());
        let rows: usize = generating.clone().map(|s| s.active()).sum();
        let mut spare = GENERATING_ROWS.saturating_sub(rows);
        let mut guessing = generating.filter(|s| s.guesses()).count();
        let mut guesses = 0;
        for (at, sequence) in self.running.iter_mut().enumerate() {
            if !sequence.generating() {
                continue;
            }
            if spare > 0 && sequence.guesses() {
                // What the more deserving leave is for the others.
                let most = spare.div_ceil(guessing);
                guessing -= 1;
                sequence.draft(&self.kv, most, &mut self.draft);
                if let more @ 1.. = self.draft.len() - 1 {
                    spare -= more;
                    guesses += more;
                    let (slot, fed) = (sequence.slot(0), sequence.fed(0));
                    self.batch.push(slot, fed, &self.draft, Wanted::All);
                    self.members.push(Member { at, lane: 0 });
                    continue;
                }
            }
            for lane in 0..sequence.active() {
                let (slot, fed) = (sequence.slot(lane), sequence.fed(lane));
                self.batch
                    .push(slot, fed, sequence.unfed(lane), Wanted::Last);
                self.members.push(Member { at, lane });
            }
        }
        guesses
    }

    /// Of requests with one prompt, which came together, one reads it: whoever is furthest. The others
    /// wait, and then have its pages.
    pub(super) fn share_prompts(&mut self) {
        for at in 0..self.running.len() {
            let sequence = &self.running[at];
            let shared = sequence.shared();
            let first = match sequence.readers {
                Some(_) if sequence.fed(0) < shared => self.furthest_reader(at),
                _ => at,
            };
            let from = &self.running[first];
            let (there, slot) = (from.fed(0) >= shared, from.slot(0));
            let sequence = &mut self.running[at];
            sequence.waits = first != at && !there;
            if first != at && there {
                sequence.take_prompt(&mut self.kv, slot);
            }
        }
    }

    /// Which of those that share a prompt has read most of it.
    fn furthest_reader(&self, of: usize) -> usize {
        let readers = self.running[of].readers;
        let all = (0..self.running.len()).filter(|&at| self.running[at].readers == readers);
        let furthest = all.max_by_key(|&at| {
            let sequence = &self.running[at];
            let read = sequence.fed(0).min(sequence.shared());
            (read, std::cmp::Reverse(sequence.id))
        });
        furthest.unwrap_or(of)
    }

    fn plan_prompts(&mut self, guesses: usize) {
        let mut rows = match self.members.is_empty() {
            true => PROMPT_ROWS,
            false => PROMPT_ROWS_BESIDE_DECODE - guesses,
        };
        let reads = |at: usize| !self.running[at].generating() && !self.running[at].waits;
        let user = |at: usize| self.running[at].account;
        // Requests of one user stand together.
        let begins = |at: usize| {
            let before = (0..at).rev().find(|&before| reads(before));
            reads(at) && before.is_none_or(|before| user(before) != user(at))
        };
        let all = 0..self.running.len();
        let mut users = all.clone().filter(|&at| begins(at)).count();
        let (mut of_user, mut requests) = (0, 0);
        for at in all.clone() {
            if !reads(at) {
                continue;
            }
            if begins(at) {
                of_user = rows.div_ceil(users);
                users -= 1;
                requests = (at..all.end)
                    .filter(|&other| reads(other) && user(other) == user(at))
                    .count();
            }
            let sequence = &self.running[at];
            let chunk = sequence.chunk();
            let (slot, fed) = (sequence.slot(chunk.lane), sequence.fed(chunk.lane));
            let count = of_user
                .div_ceil(requests)
                .min(chunk.tokens.len())
                .min(self.kv.writable(slot, fed));
            requests -= 1;
            of_user -= count;
            rows -= count;
            if count == 0 || !self.kv.ensure(slot, fed, fed + count) {
                continue;
            }
            let wanted = match chunk.last && count == chunk.tokens.len() {
                true => Wanted::Last,
                false => Wanted::None,
            };
            self.batch.push(slot, fed, &chunk.tokens[..count], wanted);
            self.members.push(Member {
                at,
                lane: chunk.lane,
            });
        }
    }
}
