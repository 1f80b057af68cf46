//! Continuous batching: one thread owns the model, the KV cache and the thread team, and computes
//! the next tokens of all running requests together, prompts in chunks among them. What a request
//! does with its logits is [`crate::request`]'s.
//!
//! **Fairness.** Requests are admitted in the order they came, as soon as the KV cache can hold the
//! whole of what they may generate: an admitted request never has to give way. Each step computes
//! one row for every request that is generating, and shares a bounded number of further rows evenly
//! among those still reading their prompts.
//!
//! **Faults.** When a step panics, its requests are computed again one by one, and only those that
//! panic again fail.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{RequestError, SubmitError};
use crate::kv::KvCache;
use crate::model::{Batch, Model, Span, Wanted};
use crate::request::{Advance, FinishReason, RequestId, Sequence};
use crate::sampler::Scratch;

/// Most rows of prompts in a step that delays nobody's next token.
pub(crate) const PROMPT_ROWS: usize = 256;
/// Most rows of prompts in a step with requests that are generating.
const PROMPT_ROWS_BESIDE_DECODE: usize = 64;

/// What callers leave for the scheduler.
pub(crate) enum Command {
    Run(Box<Sequence>),
    Cancel(RequestId),
    Evaluate(Evaluation),
}

/// Logits for every position of a text, teacher-forced.
pub(crate) struct Evaluation {
    pub(crate) tokens: Vec<u32>,
    /// Receives one row of logits per position, in order.
    pub(crate) rows: SyncSender<Vec<f32>>,
}

/// Between the callers' threads and the scheduler's.
pub(crate) struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    wake: Condvar,
    /// Set while there may be commands, so that a step without mail takes no lock.
    mail: AtomicBool,
    stop: AtomicBool,
    maximum_waiting: usize,
    pub(crate) counters: Counters,
}

/// Written by the scheduler (and `waiting` by callers), read by anybody.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) running: AtomicUsize,
    pub(crate) waiting: AtomicUsize,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
    pub(crate) coarse_prompt_tokens: AtomicU64,
    pub(crate) coarse_completion_tokens: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) kv_bytes_used: AtomicU64,
}

impl Mailbox {
    pub(crate) fn new(maximum_waiting: usize) -> Self {
        Self {
            commands: Mutex::default(),
            wake: Condvar::new(),
            mail: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            maximum_waiting,
            counters: Counters::default(),
        }
    }

    /// Leaves a command. New requests are refused where too many wait already.
    pub(crate) fn post(&self, command: Command) -> Result<(), SubmitError> {
        self.post_together([command])
    }

    /// Leaves several commands, which the scheduler finds together, or none of them.
    pub(crate) fn post_together<C>(&self, new: C) -> Result<(), SubmitError>
    where
        C: AsRef<[Command]> + IntoIterator<Item = Command>,
    {
        let is_request = |command: &&Command| matches!(command, Command::Run(_));
        let requests = new.as_ref().iter().filter(is_request).count();
        let mut commands = self.lock();
        if self.stop.load(Ordering::Acquire) {
            return Err(SubmitError::Stopped);
        }
        if requests > 0 {
            // Only raised under the lock, so the limit holds exactly.
            let waiting = self.counters.waiting.load(Ordering::Acquire);
            if waiting.saturating_add(requests) > self.maximum_waiting {
                return Err(SubmitError::Busy { waiting });
            }
            self.counters.waiting.fetch_add(requests, Ordering::AcqRel);
        }
        commands.extend(new);
        self.mail.store(true, Ordering::Release);
        self.wake.notify_one();
        Ok(())
    }

    /// Tells the scheduler to end.
    pub(crate) fn stop(&self) {
        let _commands = self.lock();
        self.stop.store(true, Ordering::Release);
        self.mail.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Command>> {
        // Nothing that can panic runs under this lock.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The scheduler's thread.
pub(crate) struct Scheduler {
    model: Model,
    kv: KvCache,
    mailbox: Arc<Mailbox>,
    maximum_batch: usize,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    evaluations: VecDeque<Evaluation>,
    batch: Batch,
    /// For each span of the batch, the index in `running`.
    members: Vec<usize>,
    scratch: Scratch,
    /// Whose prompt is served first in the next step.
    turn: usize,
}

impl Scheduler {
    pub(crate) fn new(
        model: Model,
        kv: KvCache,
        mailbox: Arc<Mailbox>,
        maximum_batch: usize,
    ) -> Self {
        Self {
            model,
            kv,
            mailbox,
            maximum_batch,
            running: Vec::with_capacity(maximum_batch),
            waiting: VecDeque::new(),
            evaluations: VecDeque::new(),
            batch: Batch::with_capacity(PROMPT_ROWS + maximum_batch, maximum_batch),
            members: Vec::with_capacity(maximum_batch),
            scratch: Scratch::default(),
            turn: 0,
        }
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
            self.publish();
        }
        for mut sequence in self.running.drain(..).chain(self.waiting.drain(..)) {
            guarded(|| sequence.finish(FinishReason::Cancelled));
        }
        for command in self.mailbox.lock().drain(..) {
            if let Command::Run(mut sequence) = command {
                guarded(|| sequence.finish(FinishReason::Cancelled));
            }
        }
    }

    /// Takes what callers left, sleeping while there is nothing to do. `false`: stop.
    fn collect_mail(&mut self) -> bool {
        let mailbox = Arc::clone(&self.mailbox);
        let idle =
            self.running.is_empty() && self.waiting.is_empty() && self.evaluations.is_empty();
        if !idle && !mailbox.mail.load(Ordering::Acquire) {
            return true;
        }
        loop {
            let mut commands = mailbox.lock();
            if idle {
                while commands.is_empty() && !mailbox.stop.load(Ordering::Acquire) {
                    commands = mailbox
                        .wake
                        .wait(commands)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
            if mailbox.stop.load(Ordering::Acquire) {
                return false;
            }
            let Some(command) = commands.pop_front() else {
                mailbox.mail.store(false, Ordering::Release);
                return true;
            };
            let last = commands.is_empty();
            if last {
                mailbox.mail.store(false, Ordering::Release);
            }
            drop(commands);
            match command {
                Command::Run(sequence) => self.waiting.push_back(*sequence),
                Command::Cancel(id) => self.cancel(id),
                Command::Evaluate(evaluation) => self.evaluations.push_back(evaluation),
            }
            if last {
                return true;
            }
        }
    }

    fn cancel(&mut self, id: RequestId) {
        if let Some(at) = self.waiting.iter().position(|s| s.id == id) {
            if let Some(mut sequence) = self.waiting.remove(at) {
                self.mailbox.counters.waiting.fetch_sub(1, Ordering::AcqRel);
                guarded(|| sequence.finish(FinishReason::Cancelled));
            }
        } else if let Some(at) = self.running.iter().position(|s| s.id == id) {
            guarded(|| self.running[at].finish(FinishReason::Cancelled));
            self.remove(at);
        }
    }

    /// Starts waiting requests, in order, while the batch and the KV cache have room. An evaluation
    /// waits for an empty batch, and later requests wait behind it.
    fn admit(&mut self) {
        while self.evaluations.is_empty() && self.running.len() < self.maximum_batch {
            let Some(next) = self.waiting.front() else {
                return;
            };
            let Some(slot) = self.kv.reserve(next.positions()) else {
                return;
            };
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
            self.mailbox.counters.waiting.fetch_sub(1, Ordering::AcqRel);
            self.mailbox
                .counters
                .requests
                .fetch_add(1, Ordering::Relaxed);
            sequence.slot = Some(slot);
            self.running.push(sequence);
        }
    }

    /// Computes one batch and hands each request its logits.
    fn step(&mut self) {
        self.plan();
        if guarded(|| self.model.forward(&mut self.kv, &self.batch)).is_some() {
            self.distribute();
        } else {
            self.step_one_by_one();
        }
    }

    /// Decides whose rows are computed: one for each generating request, then prompts by equal
    /// shares.
    fn plan(&mut self) {
        self.batch.clear();
        self.members.clear();
        let generating = self.running.iter().filter(|s| s.unfed().len() == 1).count();
        let mut reading = self.running.len() - generating;
        let mut rows = if generating > 0 {
            PROMPT_ROWS_BESIDE_DECODE
        } else {
            PROMPT_ROWS
        };
        self.turn = (self.turn + 1) % self.running.len();
        for i in 0..self.running.len() {
            let at = (self.turn + i) % self.running.len();
            let sequence = &self.running[at];
            let unfed = sequence.unfed();
            let count = if unfed.len() == 1 {
                1
            } else {
                let share = rows.div_ceil(reading).min(unfed.len());
                reading -= 1;
                rows -= share;
                share
            };
            if let (Some(slot), true) = (sequence.slot, count > 0) {
                let wanted = if count == unfed.len() {
                    Wanted::Last
                } else {
                    Wanted::None
                };
                self.batch
                    .push(slot, sequence.fed(), &unfed[..count], wanted);
                self.members.push(at);
            }
        }
    }

    /// Gives each request of the computed batch its row; removes those that ended.
    fn distribute(&mut self) {
        let mut row = 0;
        for (span, &at) in self.batch.spans().iter().zip(&self.members) {
            let logits = (span.wanted != Wanted::None).then(|| self.model.logits_mut(row));
            row += usize::from(logits.is_some());
            take_row(
                &mut self.running[at],
                span,
                logits,
                &mut self.scratch,
                &self.mailbox.counters,
            );
        }
        self.remove_ended();
    }

    /// After a panic: computes the same spans one at a time. What a failed step left in the cache
    /// is overwritten.
    fn step_one_by_one(&mut self) {
        let failed = std::mem::take(&mut self.batch);
        for (span, &at) in failed.spans().iter().zip(&self.members) {
            self.batch.clear();
            self.batch
                .push(span.slot, span.first, failed.tokens(span), span.wanted);
            let sequence = &mut self.running[at];
            if guarded(|| self.model.forward(&mut self.kv, &self.batch)).is_none() {
                sequence.over = true;
                self.mailbox.counters.failed.fetch_add(1, Ordering::Relaxed);
                guarded(|| sequence.finish(FinishReason::Error(RequestError::Internal)));
                continue;
            }
            let logits = (span.wanted != Wanted::None).then(|| self.model.logits_mut(0));
            take_row(
                sequence,
                span,
                logits,
                &mut self.scratch,
                &self.mailbox.counters,
            );
        }
        self.remove_ended();
    }

    fn remove_ended(&mut self) {
        for at in (0..self.running.len()).rev() {
            if self.running[at].over {
                self.remove(at);
            }
        }
    }

    fn remove(&mut self, at: usize) {
        let mut sequence = self.running.swap_remove(at);
        let counters = &self.mailbox.counters;
        let (prompt, completion) = sequence.lengths();
        for (counter, tokens) in [
            (&counters.coarse_prompt_tokens, prompt),
            (&counters.coarse_completion_tokens, completion),
        ] {
            counter.fetch_add(tokens.next_power_of_two() as u64, Ordering::Relaxed);
        }
        if let Some(slot) = sequence.slot.take() {
            self.kv.release(slot);
        }
    }

    fn evaluate(&mut self, evaluation: &Evaluation) {
        let Some(slot) = self.kv.reserve(evaluation.tokens.len()) else {
            return;
        };
        let mut first = 0;
        'text: for chunk in evaluation.tokens.chunks(self.model.maximum_wanted_rows()) {
            self.batch.clear();
            self.batch.push(slot, first, chunk, Wanted::All);
            if guarded(|| self.model.forward(&mut self.kv, &self.batch)).is_none() {
                break;
            }
            for row in 0..chunk.len() {
                if evaluation
                    .rows
                    .send(self.model.logits_mut(row).to_vec())
                    .is_err()
                {
                    // The caller has gone.
                    break 'text;
                }
            }
            first += chunk.len();
        }
        self.kv.release(slot);
    }

    fn publish(&self) {
        let counters = &self.mailbox.counters;
        counters
            .running
            .store(self.running.len(), Ordering::Relaxed);
        counters
            .kv_bytes_used
            .store(self.kv.bytes_used(), Ordering::Relaxed);
    }
}

/// Records a computed span of a request and, if it was the last of what is known, generates the
/// next token.
fn take_row(
    sequence: &mut Sequence,
    span: &Span,
    logits: Option<&mut [f32]>,
    scratch: &mut Scratch,
    counters: &Counters,
) {
    let of_prompt = sequence.feed(span.rows.len());
    counters
        .prompt_tokens
        .fetch_add(of_prompt as u64, Ordering::Relaxed);
    let Some(logits) = logits else { return };
    // A sink that panicked is not called again.
    let outcome = guarded(|| sequence.advance(logits, scratch)).unwrap_or(Advance::Failed);
    sequence.over = outcome != Advance::Continue;
    if outcome == Advance::Failed {
        counters.failed.fetch_add(1, Ordering::Relaxed);
    } else {
        counters.completion_tokens.fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs `work`; `None` if it panicked. What it touched is only used again after being overwritten.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{F32Linear, LinearLayer, LinearScratch};
    use crate::request::{Event, Limits, Request};
    use crate::tokenizer::Tokenizer;
    use crate::weights::{Embedding, Layer, Weights};
    use casemate_container::{Family, ModelConfig, RopeLayout, RopeScaling};
    use casemate_kernels::attention::KvType;
    use casemate_kernels::gemm::F32Matrix;
    use casemate_kernels::team::Team;
    use std::ops::ControlFlow;
    use std::sync::mpsc::{Receiver, channel};

    const HIDDEN: usize = 8;
    const VOCAB: usize = 16;
    /// Its embedding is all that makes [`Fragile`] panic.
    const POISON: u32 = 13;

    /// Passes its input on, and panics for rows whose elements are all alike.
    struct Fragile;

    impl LinearLayer for Fragile {
        fn inputs(&self) -> usize {
            HIDDEN
        }

        fn outputs(&self) -> usize {
            HIDDEN
        }

        fn forward(&self, team: &Team, _: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
            team.for_each_chunk_mut(y, HIDDEN, |i, row| {
                let x = &x[i * HIDDEN..][..HIDDEN];
                assert!(x.iter().any(|&v| (v - x[0]).abs() > 1e-6), "on purpose");
                row.fill(0.0);
            });
        }

        fn bytes(&self) -> u64 {
            0
        }
    }

    /// Gate and up are both the input itself: equal elements stay equal.
    struct Doubled;

    impl LinearLayer for Doubled {
        fn inputs(&self) -> usize {
            HIDDEN
        }

        fn outputs(&self) -> usize {
            2 * HIDDEN
        }

        fn forward(&self, _: &Team, _: &mut LinearScratch, x: &[f32], y: &mut [f32]) {
            for (x, y) in x.chunks(HIDDEN).zip(y.chunks_mut(2 * HIDDEN)) {
                y[..HIDDEN].copy_from_slice(x);
                y[HIDDEN..].copy_from_slice(x);
            }
        }

        fn bytes(&self) -> u64 {
            0
        }
    }

    fn config() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: HIDDEN as u32,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            ffn: HIDDEN as u32,
            vocab: VOCAB as u32,
            context: 64,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Half,
            sliding_window: None,
            tied_embeddings: true,
            qkv_bias: false,
            bos: None,
            eos: vec![],
            add_bos: false,
        }
    }

    /// A model of one layer whose feed-forward is [`Fragile`].
    fn fragile_model() -> (Model, KvCache) {
        let team = Team::new(2).unwrap();
        let table = F32Matrix::from_rows(&team, VOCAB, HIDDEN, |token, out| {
            for (column, x) in out.iter_mut().enumerate() {
                let other = ((token * 7 + column * 5) % 19) as f32 / 9.0 - 1.0;
                *x = if token == POISON as usize { 1.0 } else { other };
            }
        });
        let table = Arc::new(table.unwrap());
        let zero =
            Arc::new(F32Matrix::from_rows(&team, HIDDEN, HIDDEN, |_, out| out.fill(0.0)).unwrap());
        let qkv = F32Matrix::from_rows(&team, 16, HIDDEN, |row, out| out[row % HIDDEN] = 0.5);
        let qkv = Arc::new(qkv.unwrap());
        let layer = Layer {
            attention_norm: vec![1.0; HIDDEN],
            qkv: Box::new(F32Linear(qkv)),
            qkv_bias: None,
            // Attention adds nothing, so that a poisoned row stays recognisable.
            attention_output: Box::new(F32Linear(zero)),
            ffn_norm: vec![1.0; HIDDEN],
            gate_up: Box::new(Doubled),
            down: Box::new(Fragile),
        };
        let weights = Weights {
            embedding: Embedding::F32(Arc::clone(&table)),
            layers: vec![layer],
            output_norm: vec![1.0; HIDDEN],
            output: Box::new(F32Linear(table)),
            rope_factors: None,
            memory: None,
        };
        let kv = KvCache::new(&config(), KvType::F32, 64, 4, None).unwrap();
        (Model::new(weights, &config(), 64, 64, 4, team).unwrap(), kv)
    }

    fn tokenizer() -> Tokenizer {
        let json = r#"{"version":"1.0","added_tokens":[],"decoder":{"type":"Fuse"},
            "model":{"type":"BPE","vocab":{"a":0},"merges":[]}}"#;
        Tokenizer::from_json(json.as_bytes(), VOCAB as u32, None).unwrap()
    }

    fn request(id: u64, prompt: &[u32]) -> (Box<Sequence>, Receiver<Event<'static>>) {
        let (sender, receiver) = channel();
        let request = Request {
            prompt: prompt.to_vec(),
            max_tokens: 3,
            ..Request::default()
        };
        let limits = Limits {
            context: 64,
            vocab: VOCAB as u32,
            end_tokens: &[],
        };
        let sink = Box::new(move |event: Event<'_>| {
            sender.send(event.into_owned()).unwrap();
            ControlFlow::Continue(())
        });
        (
            Box::new(Sequence::new(RequestId(id), request, &limits, &tokenizer(), sink).unwrap()),
            receiver,
        )
    }

    /// Runs requests in one batch and returns what each heard.
    fn run(prompts: &[&[u32]]) -> (Vec<Vec<Event<'static>>>, usize) {
        let (model, kv) = fragile_model();
        let mailbox = Arc::new(Mailbox::new(8));
        let mut receivers = Vec::new();
        for (id, prompt) in prompts.iter().enumerate() {
            let (sequence, receiver) = request(id as u64, prompt);
            mailbox.post(Command::Run(sequence)).unwrap();
            receivers.push(receiver);
        }
        let mut scheduler = Scheduler::new(model, kv, Arc::clone(&mailbox), 4);
        assert!(scheduler.collect_mail());
        scheduler.admit();
        assert_eq!(scheduler.running.len(), prompts.len());
        let mut steps = 0;
        while !scheduler.running.is_empty() {
            scheduler.step();
            steps += 1;
            assert!(steps < 100);
        }
        assert_eq!(scheduler.kv.bytes_used(), 0);
        let failed = mailbox.counters.failed.load(Ordering::Relaxed) as usize;
        (
            receivers
                .into_iter()
                .map(|r| r.try_iter().collect())
                .collect(),
            failed,
        )
    }

    #[test]
    fn a_panic_in_the_model_fails_only_the_request_that_causes_it() {
        let (alone, failed) = run(&[&[3, 4, 5]]);
        assert_eq!((alone[0].len(), failed), (4, 0));
        let (heard, failed) = run(&[&[3, 4, 5], &[6, POISON], &[7]]);
        assert_eq!(failed, 1);
        assert_eq!(heard[0], alone[0]);
        let reason = FinishReason::Error(RequestError::Internal);
        let expected = Event::Finished {
            reason,
            prompt_tokens: 2,
            completion_tokens: 0,
        };
        assert_eq!(heard[1], [expected]);
        assert_eq!(heard[2].len(), 4);
    }
}
