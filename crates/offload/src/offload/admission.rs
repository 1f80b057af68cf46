//! How a worker comes to hold the matrices, and what becomes of one that failed. One thread a worker.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::patience::Lost;
use super::{Event, Running, Shared, lock};
use crate::check::Challenge;
use crate::link::{Connect, Fault, Link};
use crate::public::PublicMatrix;

/// Longest wait before connecting again, in multiples of the first.
const LONGEST: u32 = 64;

/// A worker and what is known of it.
pub(super) struct Worker {
    connect: Connect,
    state: Mutex<State>,
    changed: Condvar,
    /// What was lost by waiting for it.
    pub(super) lost: Mutex<Lost>,
}

pub(super) enum State {
    /// Not admitted yet.
    Outside,
    /// It holds all matrices.
    Ready(Box<Link>),
    /// As before, and a product is under way.
    Lent,
    /// It was ready until this happened, or until its product ended for another reason.
    Ended(Option<End>),
    /// It is not asked any more.
    GivenUp,
}

/// How a worker's connection ended while it was ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) fault: Fault,
    /// Whether too much time was lost by waiting for it.
    too_slow: bool,
}

impl End {
    /// By a fault.
    pub(super) fn of(fault: Fault) -> End {
        let too_slow = false;
        End { fault, too_slow }
    }

    /// By a fault, and too much time was lost.
    pub(super) fn too_slow(fault: Fault) -> End {
        let too_slow = true;
        End { fault, too_slow }
    }

    /// Whether the worker is set aside for it.
    pub(super) fn sets_aside(&self) -> bool {
        self.too_slow && !self.fault.is_misconduct()
    }
}

impl State {
    pub(super) fn is_ready(&self) -> bool {
        matches!(self, State::Ready(_))
    }

    /// Takes the connection, if it is ready, for one product.
    pub(super) fn lend(&mut self) -> Option<Box<Link>> {
        match std::mem::replace(self, State::Lent) {
            State::Ready(link) => Some(link),
            other => {
                *self = other;
                None
            }
        }
    }

    /// Whether it holds all matrices.
    fn holds(&self) -> bool {
        matches!(self, State::Ready(_) | State::Lent)
    }
}

impl Worker {
    pub(super) fn new(connect: Connect) -> Worker {
        Worker {
            connect,
            state: Mutex::new(State::Outside),
            changed: Condvar::new(),
            lost: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Has its thread look at what was changed beside the state.
    pub(super) fn wake(&self) {
        // Whoever looked before has begun to wait when the lock is ours.
        drop(self.state());
        self.changed.notify_all();
    }

    pub(super) fn set(&self, state: State) {
        *self.state() = state;
        self.changed.notify_all();
    }

    /// Makes it ready again after a product. Nobody waits for that.
    pub(super) fn put_back(&self, link: Box<Link>) {
        *self.state() = State::Ready(link);
    }

    /// Waits until it is ready, unless it never will be or the time is over.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let waits = |state: &mut State| !state.holds() && !matches!(state, State::GivenUp);
        let waited = self.changed.wait_timeout_while(self.state(), limit, waits);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.holds()
    }
}

/// Admits a worker, again and again, until the end or until it is given up.
pub(super) fn admit(shared: &Shared, which: usize) {
    let worker = &shared.workers[which];
    let config = &shared.config;
    let mut misconduct = 0;
    let mut drawn = None;
    let mut wait = Duration::ZERO;
    let mut retry = config.retry;
    let mut aside = config.aside;
    while pause(shared, worker, wait) {
        let end = match open(shared, which, misconduct, &mut drawn) {
            Ok(link) => {
                worker.set(State::Ready(Box::new(link)));
                (shared.observer)(Event::Admitted { worker: which });
                let since = Instant::now();
                let end = until_it_ends(shared, worker);
                // Only who did well for a while is connected to again as soon as at first.
                if since.elapsed() > config.retry * LONGEST {
                    retry = config.retry;
                }
                if since.elapsed() > config.aside * LONGEST {
                    aside = config.aside;
                }
                wait = Duration::ZERO;
                let Some(end) = end else { continue };
                end
            }
            Err(fault) => {
                let end = End::of(fault);
                shared.counts.note(end);
                end
            }
        };
        let fault = end.fault;
        if shared.stop.load(Relaxed) {
            return;
        }
        if fault.is_misconduct() {
            misconduct += 1;
            let Some(readmissions_left) = config.readmissions.checked_sub(misconduct) else {
                worker.set(State::GivenUp);
                (shared.observer)(Event::GivenUp {
                    worker: which,
                    fault,
                });
                return;
            };
            (shared.observer)(Event::Quarantined {
                worker: which,
                fault,
                readmissions_left,
            });
            wait = config.quarantine;
        } else if end.sets_aside() {
            wait = aside;
            aside = (aside * 2).min(config.aside * LONGEST);
            (shared.observer)(Event::SetAside {
                worker: which,
                fault,
                wait,
            });
        } else {
            (shared.observer)(Event::Failed {
                worker: which,
                fault,
            });
            wait = retry;
            retry = (retry * 2).min(config.retry * LONGEST);
        }
    }
}

/// Secret vectors for all matrices, and after how many cases of misconduct they were drawn.
struct Drawn {
    round: u32,
    challenges: Arc<[Challenge]>,
}

/// Draws secret vectors unless there are some, connects, and uploads.
fn open(
    shared: &Shared,
    which: usize,
    round: u32,
    drawn: &mut Option<Drawn>,
) -> Result<Link, Fault> {
    let running = shared.running.get().ok_or(Fault::Unreachable)?;
    // Before there is a connection, which would wait for seconds with large matrices.
    let challenges = match drawn.take() {
        Some(drawn) if drawn.round == round => drawn.challenges,
        // What was tried against other vectors is of no use against these.
        _ => draw(shared, running, which, round).ok_or(Fault::Unreachable)?,
    };
    *drawn = Some(Drawn {
        round,
        challenges: Arc::clone(&challenges),
    });
    let transport = (shared.workers[which].connect)().map_err(Fault::of_connecting)?;
    Link::open(
        transport,
        running.field,
        &running.matrices,
        challenges,
        shared.config.patience,
        || !shared.stop.load(Relaxed),
    )
}

/// Draws secret vectors for all matrices, unless everything ends meanwhile.
fn draw(shared: &Shared, running: &Running, which: usize, round: u32) -> Option<Arc<[Challenge]>> {
    let draw = |(group, matrix): (usize, &PublicMatrix)| {
        // Groups are fewer than 2^16.
        let place = (which << 16 | group) as u32;
        let goes_on = !shared.stop.load(Relaxed);
        let (challenges, weights) = (&shared.challenges, matrix.matrix());
        goes_on.then(|| challenges.draw(running.field, place, round, weights))
    };
    running.matrices.iter().enumerate().map(draw).collect()
}

/// Waits; false if everything ends instead.
fn pause(shared: &Shared, worker: &Worker, wait: Duration) -> bool {
    let end = Instant::now() + wait;
    let mut state = worker.state();
    loop {
        if shared.stop.load(Relaxed) {
            return false;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        let waited = worker.changed.wait_timeout(state, left);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Waits until the worker's connection ends; why, if it is its own fault.
fn until_it_ends(shared: &Shared, worker: &Worker) -> Option<End> {
    let goes_on = |state: &mut State| state.holds() && !shared.stop.load(Relaxed);
    let waited = worker.changed.wait_while(worker.state(), goes_on);
    let state = waited.unwrap_or_else(PoisonError::into_inner);
    match *state {
        State::Ended(end) => end,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use casemate_container::Access;

    use super::*;
    use crate::keys::BootKey;
    use crate::offload::{Config, Offload, Workers};
    use crate::testing::Random;

    #[test]
    fn vectors_are_drawn_before_connecting_and_anew_for_each_round() {
        let nobody: Connect = Box::new(|| Err(ErrorKind::ConnectionRefused.into()));
        let config = Config {
            retry: Duration::from_secs(3600),
            ..Config::default()
        };
        let boot = BootKey::of([4; 32]);
        let offload = Offload::new(config, boot, Workers::One(nobody), Box::new(|_| {}));
        let weights = Arc::new(Random::new(1).matrix(3, 5));
        offload
            .add(PublicMatrix::new(Access::Public, weights).unwrap())
            .unwrap();
        offload.start().unwrap();
        let mut drawn = None;
        let mut open = |round| {
            let fault = open(&offload.shared, 0, round, &mut drawn).err();
            assert_eq!(fault, Some(Fault::Unreachable));
            let drawn = drawn.as_ref().expect("though nobody was there");
            assert_eq!(drawn.round, round);
            Arc::clone(&drawn.challenges)
        };
        let (first, again, next) = (open(0), open(0), open(1));
        assert!(
            Arc::ptr_eq(&first, &again),
            "nothing was tried against them"
        );
        assert!(!Arc::ptr_eq(&first, &next));
    }
}
