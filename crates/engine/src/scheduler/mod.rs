//! Continuous batching: one thread owns the model, the KV cache and the thread team, and computes
//! the next tokens of all running requests together, prompts in chunks among them. What a request
//! does with its logits is [`crate::sequence`]'s.
//!
//! | module | holds |
//! |---|---|
//! | `mailbox` | what callers leave, and the counters that they read |
//! | `fairness` | whose request is next |
//! | `admission` | which requests start, and which give their memory back |
//! | `plan` | whose rows a step computes |
//!
//! **Faults.** When a step panics, its requests are computed again one by one, and only those that
//! panic again fail.

mod admission;
mod fairness;
#[cfg(test)]
mod guess_tests;
mod mailbox;
mod plan;
#[cfg(test)]
mod share_tests;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::RequestError;
use crate::kv::KvCache;
use crate::model::{Batch, Model, Wanted};
use crate::outsource::Outsource;
use crate::request::{FinishReason, RequestId};
use crate::sampler::Scratch;
use crate::sequence::{Advance, Sequence};
use crate::speculation::Lookup;
use crate::tokenizer::PieceFinder;
use fairness::{GENERATED, PROMPT, Queue};
use mailbox::Mail;

pub(crate) use fairness::AccountId;
pub(crate) use mailbox::{Command, Counters, Evaluation, Mailbox};

/// Most rows of prompts in a step that delays nobody's next token.
pub(crate) const PROMPT_ROWS: usize = 256;
/// Most rows of prompts in a step with requests that are generating.
const PROMPT_ROWS_BESIDE_DECODE: usize = 64;
/// Most rows of sequences that are generating in a step with guesses among them. So many go through the
/// kernels' products in one block of rows, for which a weight is read once; more take time of their own.
const GENERATING_ROWS: usize = 6;
/// Most guesses in a step: rows of logits that are wanted besides one for each place.
pub(crate) const GUESSES: usize = GENERATING_ROWS - 1;

/// How often an idle scheduler looks whether there is work for idle times: who helps starts after the engine.
const LOOK_FOR_WORK: Duration = Duration::from_millis(100);

/// Time since any fixed moment.
pub(crate) type Clock = fn() -> Duration;

/// Whose rows a span of the batch holds: an index in `running`, and which of the request's sequences.
#[derive(Clone, Copy)]
struct Member {
    at: usize,
    lane: usize,
}

/// The scheduler's thread.
pub(crate) struct Scheduler {
    model: Model,
    kv: KvCache,
    mailbox: Arc<Mailbox>,
    maximum_batch: usize,
    clock: Clock,
    /// Who has work for idle times.
    outsource: Option<Arc<dyn Outsource>>,
    #[expect(clippy::vec_box, reason = "sorted in every step")]
    running: Vec<Box<Sequence>>,
    queue: Queue<Box<Sequence>>,
    evaluations: VecDeque<Evaluation>,
    batch: Batch,
    /// For each span of the batch. Spans of one request stand together.
    members: Vec<Member>,
    /// Requests that are about to give way; kept for its memory.
    victims: Vec<usize>,
    scratch: Scratch,
    /// For each place that is free, what guesses tokens; none where nothing is guessed.
    lookups: Vec<Lookup>,
    /// What a sequence is fed, with guesses; kept for its memory.
    draft: Vec<u32>,
}

impl Scheduler {
    pub(crate) fn new(
        model: Model,
        kv: KvCache,
        mailbox: Arc<Mailbox>,
        maximum_batch: usize,
        clock: Clock,
        outsource: Option<Arc<dyn Outsource>>,
    ) -> Self {
        Self {
            model,
            kv,
            mailbox,
            maximum_batch,
            clock,
            outsource,
            running: Vec::with_capacity(maximum_batch),
            queue: Queue::new(),
            evaluations: VecDeque::new(),
            batch: Batch::with_capacity(PROMPT_ROWS + maximum_batch, maximum_batch),
            members: Vec::with_capacity(maximum_batch),
            victims: Vec::with_capacity(maximum_batch),
            scratch: Scratch::default(),
            lookups: Vec::new(),
            draft: Vec::with_capacity(GENERATING_ROWS),
        }
    }

    /// With something that guesses tokens for each place.
    pub(crate) fn guessing_by(mut self, lookups: Vec<Lookup>) -> Self {
        self.lookups = lookups;
        self
    }

    /// With what finds the texts of tokens where nobody may see of which.
    pub(crate) fn finding_pieces_by(mut self, pieces: Option<PieceFinder>) -> Self {
        self.scratch.pieces = pieces;
        self
    }

    /// Serves until told to stop; then every unfinished request hears that it was cancelled.
    pub(crate) fn serve(mut self) {
        while self.collect_mail() {
            self.admit();
            if self.running.is_empty() {
                if let Some(evaluation) = self.evaluations.pop_front() {
                    self.evaluate(&evaluation);
                }
            } else {
                self.step();
            }
            self.kv.expire((self.clock)());
            self.publish();
        }
        for mut sequence in self.running.drain(..).chain(self.queue.drain()) {
            guarded(|| sequence.finish(FinishReason::Cancelled));
        }
        for command in self.mailbox.drain() {
            if let Command::Run(mut sequence) = command {
                guarded(|| sequence.finish(FinishReason::Cancelled));
            }
        }
    }

    /// Takes what callers left, sleeping while there is nothing to do. `false`: stop.
    fn collect_mail(&mut self) -> bool {
        let mailbox = Arc::clone(&self.mailbox);
        let idle = self.running.is_empty() && self.queue.is_empty() && self.evaluations.is_empty();
        if !idle && !mailbox.has_mail() {
            return true;
        }
        let mut came = false;
        loop {
            match mailbox.take() {
                Mail::Stop => return false,
                Mail::Command(command) => {
                    came = true;
                    self.follow(command);
                }
                Mail::Empty if came || !idle => return true,
                Mail::Empty => {
                    let now = (self.clock)();
                    self.kv.expire(now);
                    self.publish();
                    if self.work_while_idle() {
                        continue;
                    }
                    let mut until = self.kv.until_next_expires(now);
                    if self.outsource.is_some() {
                        until = Some(until.map_or(LOOK_FOR_WORK, |until| until.min(LOOK_FOR_WORK)));
                    }
                    mailbox.sleep(until);
                }
            }
        }
    }

    /// Gives an idle moment to whoever has use for it. False if nobody has.
    fn work_while_idle(&self) -> bool {
        let Some(outsource) = &self.outsource else {
            return false;
        };
        // Whoever panics has no work.
        guarded(|| outsource.idle(self.model.team())).unwrap_or(false)
    }

    fn follow(&mut self, command: Command) {
        match command {
            Command::Run(mut sequence) => {
                let account = self.queue.enter(sequence.user);
                sequence.account = Some(account);
                self.queue.put(account, sequence.id.0, sequence);
            }
            Command::Cancel(id) => self.cancel(id),
            Command::Evaluate(evaluation) => self.evaluations.push_back(evaluation),
        }
    }

    fn cancel(&mut self, id: RequestId) {
        if let Some(mut sequence) = self.queue.take_arrival(id.0) {
            self.mailbox.waits_no_more(sequence.user);
            guarded(|| sequence.finish(FinishReason::Cancelled));
            if sequence.started() {
                self.count(&sequence);
            }
            if let Some(account) = sequence.account {
                self.queue.leave(account);
            }
        } else if let Some(at) = self.running.iter().position(|s| s.id == id) {
            guarded(|| self.running[at].finish(FinishReason::Cancelled));
            self.remove(at);
        }
    }

    /// Computes one batch and hands each request its logits.
    fn step(&mut self) {
        self.plan();
        if self.members.is_empty() {
            return;
        }
        if guarded(|| self.model.forward(&mut self.kv, &self.batch)).is_some() {
            self.distribute();
        } else {
            self.step_one_by_one();
        }
        // Before whoever read a prompt is gone, and its pages with it.
        self.share_prompts();
        self.remove_ended();
    }

    /// Gives each request of the computed batch its rows.
    fn distribute(&mut self) {
        let mut row = 0;
        let mut from = 0;
        while from < self.members.len() {
            let to = self.end_of_request(from);
            let spans = &self.batch.spans()[from..to];
            if spans[0].wanted == Wanted::All {
                let count = spans[0].rows.len();
                self.verify(from, row);
                row += count;
                from = to;
                continue;
            }
            let at = self.members[from].at;
            let wanted = spans.iter().filter(|s| s.wanted != Wanted::None).count();
            let sequence = &mut self.running[at];
            for (span, member) in spans.iter().zip(&self.members[from..to]) {
                account(
                    sequence,
                    member.lane,
                    span.rows.len(),
                    &mut self.kv,
                    &mut self.queue,
                    &self.mailbox,
                );
            }
            if wanted > 0 {
                let logits = self.model.logits_mut(row, wanted);
                advance(
                    sequence,
                    logits,
                    &mut self.scratch,
                    &mut self.kv,
                    &self.mailbox.counters,
                );
            }
            row += wanted;
            from = to;
        }
    }

    /// Gives a request its rows from `row` on, those of its next token and of the guesses behind it, one
    /// after the other while each guess is what it chose. The others were never there: they are not
    /// served tokens, their positions are not fed, and nobody finds a page by them.
    fn verify(&mut self, span: usize, row: usize) {
        let sequence = &mut self.running[self.members[span].at];
        let counters = &self.mailbox.counters;
        let tokens = self.batch.tokens(&self.batch.spans()[span]);
        Counters::add(&counters.guessed_tokens, tokens.len() - 1);
        for (row, guess) in (row..).zip(tokens[1..].iter().map(Some).chain([None])) {
            account(sequence, 0, 1, &mut self.kv, &mut self.queue, &self.mailbox);
            let logits = self.model.logits_mut(row, 1);
            advance(sequence, logits, &mut self.scratch, &mut self.kv, counters);
            if sequence.over || guess.is_none() || sequence.text().last() != guess {
                break;
            }
            Counters::add(&counters.accepted_tokens, 1);
        }
    }

    /// Where the spans of the request end whose first is `from`.
    fn end_of_request(&self, from: usize) -> usize {
        let at = self.members[from].at;
        let same = self.members[from..].iter().take_while(|m| m.at == at);
        from + same.count()
    }

    /// After a panic: computes the same spans one request at a time. What a failed step left in the
    /// cache is overwritten.
    fn step_one_by_one(&mut self) {
        let failed = std::mem::take(&mut self.batch);
        let members = std::mem::take(&mut self.members);
        let mut from = 0;
        while from < members.len() {
            let at = members[from].at;
            self.batch.clear();
            self.members.clear();
            for (span, member) in failed.spans().iter().zip(&members).skip(from) {
                if member.at != at {
                    break;
                }
                let (tokens, wanted) = match (failed.tokens(span), span.wanted) {
                    // A guess fails nobody.
                    (tokens, Wanted::All) => (&tokens[..1], Wanted::Last),
                    of_span => of_span,
                };
                self.batch.push(span.slot, span.first, tokens, wanted);
                self.members.push(*member);
            }
            from += self.members.len();
            if guarded(|| self.model.forward(&mut self.kv, &self.batch)).is_some() {
                self.distribute();
                continue;
            }
            let sequence = &mut self.running[at];
            sequence.over = true;
            Counters::add(&self.mailbox.counters.failed, 1);
            guarded(|| sequence.finish(FinishReason::Error(RequestError::Internal)));
        }
    }

    fn remove_ended(&mut self) {
        for at in (0..self.running.len()).rev() {
            if self.running[at].over {
                self.remove(at);
            }
        }
    }

    fn remove(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        self.count(&sequence);
        self.put_away(&mut sequence);
        if let Some(account) = sequence.account {
            self.queue.leave(account);
        }
    }

    /// Takes back what a request has while it runs.
    fn put_away(&mut self, sequence: &mut Sequence) {
        sequence.give_back(&mut self.kv, (self.clock)());
        self.lookups.extend(sequence.guess_no_more());
    }

    /// Counts a request that was started and is over.
    fn count(&self, sequence: &Sequence) {
        let counters = &self.mailbox.counters;
        let (prompt, completion) = sequence.lengths();
        for (counter, tokens) in [
            (&counters.coarse_prompt_tokens, prompt),
            (&counters.coarse_completion_tokens, completion),
        ] {
            Counters::add(counter, tokens.next_power_of_two());
        }
    }

    fn evaluate(&mut self, evaluation: &Evaluation) {
        let Some((slot, _)) = self.kv.open(None, evaluation.adapter, &[], (self.clock)()) else {
            return;
        };
        let mut first = 0;
        'text: for chunk in evaluation.tokens.chunks(self.model.maximum_wanted_rows()) {
            if !self.kv.ensure(slot, first, first + chunk.len()) {
                break;
            }
            self.batch.clear();
            self.batch.push(slot, first, chunk, Wanted::All);
            if guarded(|| self.model.forward(&mut self.kv, &self.batch)).is_none() {
                break;
            }
            for row in 0..chunk.len() {
                let logits = self.model.logits_mut(row, 1).to_vec();
                if evaluation.rows.send(logits).is_err() {
                    // The caller has gone.
                    break 'text;
                }
            }
            first += chunk.len();
        }
        self.kv.release(slot, (self.clock)());
    }

    fn publish(&self) {
        let counters = &self.mailbox.counters;
        counters
            .running
            .store(self.running.len(), Ordering::Relaxed);
        counters
            .kv_bytes_used
            .store(self.kv.bytes_used(), Ordering::Relaxed);
        counters
            .kv_bytes_kept
            .store(self.kv.bytes_kept(), Ordering::Relaxed);
    }
}

/// Records the next `count` tokens of a request, which were computed.
fn account(
    sequence: &mut Sequence,
    lane: usize,
    count: usize,
    kv: &mut KvCache,
    queue: &mut Queue<Box<Sequence>>,
    mailbox: &Mailbox,
) {
    let fed = sequence.feed(kv, lane, count);
    Counters::add(&mailbox.counters.prompt_tokens, fed.of_prompt);
    Counters::add(&mailbox.counters.recomputed_tokens, fed.again);
    if let Some(account) = sequence.account {
        // The prompt was charged when the request started, but for what others were to compute.
        let of_prompt = fed.unexpected as u64 * PROMPT;
        queue.charge(account, of_prompt + fed.generated as u64 * GENERATED);
    }
}

/// Generates a request's next token.
fn advance(
    sequence: &mut Sequence,
    logits: &mut [f32],
    scratch: &mut Scratch,
    kv: &mut KvCache,
    counters: &Counters,
) {
    let before = sequence.lengths().1;
    // A sink that panicked is not called again.
    let outcome = guarded(|| sequence.advance(logits, scratch)).unwrap_or(Advance::Failed);
    match outcome {
        Advance::Continue => {}
        Advance::Fork => sequence.fork(kv),
        Advance::Over | Advance::Failed => sequence.over = true,
    }
    if outcome == Advance::Failed {
        Counters::add(&counters.failed, 1);
    } else {
        Counters::add(&counters.completion_tokens, sequence.lengths().1 - before);
    }
}

/// Runs `work`; `None` if it panicked. What it touched is only used again after being overwritten.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}
