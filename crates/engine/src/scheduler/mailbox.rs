//! Between the callers' threads and the scheduler's: what callers leave, and what they may read.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::SubmitError;
use crate::request::RequestId;
use crate::sequence::Sequence;

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

/// What waits for the scheduler.
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
    pub(crate) cached_tokens: AtomicU64,
    pub(crate) recomputed_tokens: AtomicU64,
    pub(crate) completion_tokens: AtomicU64,
    pub(crate) coarse_prompt_tokens: AtomicU64,
    pub(crate) coarse_completion_tokens: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) kv_bytes_used: AtomicU64,
    pub(crate) kv_bytes_kept: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, amount: usize) {
        counter.fetch_add(amount as u64, Ordering::Relaxed);
    }
}

/// What the scheduler finds in its mailbox.
pub(super) enum Mail {
    Command(Command),
    /// Nothing more.
    Empty,
    /// It is to end.
    Stop,
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
            // Callers raise it only under the lock, so the limit holds exactly for what they bring.
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

    /// Whether there may be something.
    pub(super) fn has_mail(&self) -> bool {
        self.mail.load(Ordering::Acquire)
    }

    /// The next command.
    pub(super) fn take(&self) -> Mail {
        let mut commands = self.lock();
        if self.stop.load(Ordering::Acquire) {
            return Mail::Stop;
        }
        match commands.pop_front() {
            Some(command) => Mail::Command(command),
            None => {
                self.mail.store(false, Ordering::Release);
                Mail::Empty
            }
        }
    }

    /// Sleeps until there is something, or for that long.
    pub(super) fn sleep(&self, most: Option<Duration>) {
        let commands = self.lock();
        if !commands.is_empty() || self.stop.load(Ordering::Acquire) {
            return;
        }
        match most {
            None => drop(self.wake.wait(commands)),
            Some(most) => drop(self.wake.wait_timeout(commands, most)),
        }
    }

    /// Takes all that was left.
    pub(super) fn drain(&self) -> VecDeque<Command> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Command>> {
        // Nothing that can panic runs under this lock.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
