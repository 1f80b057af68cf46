//! Between the callers' threads and the scheduler's: what callers leave, and what they may read.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::adapters::AdapterIndex;
use crate::error::SubmitError;
use crate::request::{RequestId, User};
use crate::sequence::Sequence;

/// What callers leave for the scheduler.
pub(crate) enum Command {
    Run(Box<Sequence>),
    Cancel(RequestId),
    Evaluate(Evaluation),
}

impl Command {
    /// Whose request it is, if it is one.
    fn requested_by(&self) -> Option<Option<User>> {
        match self {
            Self::Run(sequence) => Some(sequence.user),
            Self::Cancel(_) | Self::Evaluate(_) => None,
        }
    }
}

/// Logits for every position of a text, teacher-forced.
pub(crate) struct Evaluation {
    pub(crate) tokens: Vec<u32>,
    pub(crate) adapter: Option<AdapterIndex>,
    /// Receives one row of logits per position, in order.
    pub(crate) rows: SyncSender<Vec<f32>>,
}

/// What lies in the mailbox, and who waits, in it or with the scheduler.
#[derive(Default)]
struct Contents {
    commands: VecDeque<Command>,
    /// Users with requests that wait, and how many.
    waiting: Vec<(User, usize)>,
}

impl Contents {
    fn waiting(&self, user: User) -> usize {
        let found = self.waiting.iter().find(|(of, _)| *of == user);
        found.map_or(0, |&(_, count)| count)
    }

    fn add(&mut self, user: Option<User>) {
        let Some(user) = user else { return };
        match self.waiting.iter_mut().find(|(of, _)| *of == user) {
            Some((_, count)) => *count += 1,
            None => self.waiting.push((user, 1)),
        }
    }

    fn subtract(&mut self, user: Option<User>) {
        let found = self.waiting.iter().position(|(of, _)| Some(*of) == user);
        let Some(at) = found else { return };
        self.waiting[at].1 -= 1;
        if self.waiting[at].1 == 0 {
            self.waiting.swap_remove(at);
        }
    }
}

/// What waits for the scheduler.
///
/// **Nobody fills the line for others.** A user may have as many requests waiting as more could wait
/// after them: alone half of the line, two users a third of it each. What is left is for those who
/// come next. Requests without a user may take all of it.
pub(crate) struct Mailbox {
    contents: Mutex<Contents>,
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
    pub(crate) guessed_tokens: AtomicU64,
    pub(crate) accepted_tokens: AtomicU64,
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
            contents: Mutex::default(),
            wake: Condvar::new(),
            mail: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            maximum_waiting,
            counters: Counters::default(),
        }
    }

    /// Leaves a command. New requests are refused where too many wait already, of all or of their user.
    pub(crate) fn post(&self, command: Command) -> Result<(), SubmitError> {
        self.post_together([command])
    }

    /// Leaves several commands, which the scheduler finds together, or none of them.
    pub(crate) fn post_together<C>(&self, new: C) -> Result<(), SubmitError>
    where
        C: AsRef<[Command]> + IntoIterator<Item = Command>,
    {
        let users = || new.as_ref().iter().filter_map(Command::requested_by);
        let requests = users().count();
        let mut contents = self.lock();
        if self.stop.load(Ordering::Acquire) {
            return Err(SubmitError::Stopped);
        }
        if requests > 0 {
            // Callers raise it only under the lock, so the limit holds exactly for what they bring.
            let waiting = self.counters.waiting.load(Ordering::Acquire);
            let Some(left) = self
                .maximum_waiting
                .checked_sub(waiting.saturating_add(requests))
            else {
                return Err(SubmitError::Busy { waiting });
            };
            for user in users().flatten() {
                let theirs = users().filter(|of| *of == Some(user)).count();
                let before = contents.waiting(user);
                if before + theirs > left {
                    return Err(SubmitError::Busy { waiting: before });
                }
            }
            users().for_each(|user| contents.add(user));
            self.counters.waiting.fetch_add(requests, Ordering::AcqRel);
        }
        contents.commands.extend(new);
        self.mail.store(true, Ordering::Release);
        self.wake.notify_one();
        Ok(())
    }

    /// A request of `user` waits no more.
    pub(super) fn waits_no_more(&self, user: Option<User>) {
        self.lock().subtract(user);
        self.counters.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    /// A request of `user` that ran waits again. It is not refused, however many do.
    pub(super) fn waits_again(&self, user: Option<User>) {
        self.lock().add(user);
        self.counters.waiting.fetch_add(1, Ordering::AcqRel);
    }

    /// Tells the scheduler to end.
    pub(crate) fn stop(&self) {
        let _contents = self.lock();
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
        let mut contents = self.lock();
        if self.stop.load(Ordering::Acquire) {
            return Mail::Stop;
        }
        match contents.commands.pop_front() {
            Some(command) => Mail::Command(command),
            None => {
                self.mail.store(false, Ordering::Release);
                Mail::Empty
            }
        }
    }

    /// Sleeps until there is something, or for that long.
    pub(super) fn sleep(&self, most: Option<Duration>) {
        let contents = self.lock();
        if !contents.commands.is_empty() || self.stop.load(Ordering::Acquire) {
            return;
        }
        match most {
            None => drop(self.wake.wait(contents)),
            Some(most) => drop(self.wake.wait_timeout(contents, most)),
        }
    }

    /// Takes all that was left.
    pub(super) fn drain(&self) -> VecDeque<Command> {
        std::mem::take(&mut self.lock().commands)
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Nothing that can panic runs under this lock.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
