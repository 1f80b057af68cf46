//! What is told of workers: events as they happen, and counts.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::admission::End;
use crate::link::Fault;

/// What happened to a worker. Without contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It holds all matrices; products go to it from now on.
    Admitted {
        /// Which.
        worker: usize,
    },
    /// It will be tried again.
    Failed {
        /// Which.
        worker: usize,
        /// Why.
        fault: Fault,
    },
    /// The engine lost too much time by waiting for it, and it is not asked for a while.
    SetAside {
        /// Which.
        worker: usize,
        /// Why its last connection ended.
        fault: Fault,
        /// For how long.
        wait: Duration,
    },
    /// It returned what no honest worker does, and is not asked for a while.
    Quarantined {
        /// Which.
        worker: usize,
        /// Why.
        fault: Fault,
        /// How often it will be admitted again.
        readmissions_left: u32,
    },
    /// As before, once too often: it is not asked any more in this run.
    GivenUp {
        /// Which.
        worker: usize,
        /// Why.
        fault: Fault,
    },
}

impl Event {
    /// Which worker it happened to.
    #[must_use]
    pub fn worker(&self) -> usize {
        match *self {
            Event::Admitted { worker }
            | Event::Failed { worker, .. }
            | Event::SetAside { worker, .. }
            | Event::Quarantined { worker, .. }
            | Event::GivenUp { worker, .. } => worker,
        }
    }
}

/// Who is told of events.
pub type Observer = Box<dyn Fn(Event) + Send + Sync>;

/// Counts since the start. Nothing in them depends on contents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Masks in stock, on the emptiest shelf.
    pub masks_level: u64,
    /// Masks on a full shelf.
    pub masks_depth: u64,
    /// Masks that lie sealed outside of memory, of all groups.
    pub masks_outside: u64,
    /// Masks that were not what was sealed when they came back, and were thrown away.
    pub masks_lost: u64,
    /// Masks made, of all groups.
    pub masks_made: u64,
    /// Masks used, of all groups.
    pub masks_used: u64,
    /// Rows of products that workers computed.
    pub rows_outside: u64,
    /// Rows that the enclave computed because there were no masks.
    pub rows_without_masks: u64,
    /// Rows that it computed because there was no worker.
    pub rows_without_worker: u64,
    /// Rows that it computed again because a worker failed.
    pub rows_recomputed: u64,
    /// Faults of workers that an honest one may have.
    pub failures: u64,
    /// How often a worker was set aside because too much time was lost by waiting for it.
    pub set_aside: u64,
    /// Faults that no honest one has.
    pub misconduct: u64,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Admitted { worker } => write!(f, "worker {worker} holds all matrices"),
            Event::Failed { worker, fault } => {
                write!(f, "worker {worker} will be tried again: {fault}")
            }
            Event::SetAside {
                worker,
                fault,
                wait,
            } => write!(f, "worker {worker} is set aside for {wait:?}: {fault}"),
            Event::Quarantined {
                worker,
                fault,
                readmissions_left,
            } => write!(
                f,
                "worker {worker} is in quarantine and will be admitted {readmissions_left} times more: {fault}"
            ),
            Event::GivenUp { worker, fault } => {
                write!(f, "worker {worker} is not asked any more: {fault}")
            }
        }
    }
}

/// What metrics are made of.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) outside: AtomicU64,
    pub(super) without_worker: AtomicU64,
    pub(super) recomputed: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) set_aside: AtomicU64,
    pub(super) misconduct: AtomicU64,
}

impl Counts {
    /// Counts how a connection ended, or why there was none.
    pub(super) fn note(&self, end: End) {
        match end.fault.is_misconduct() {
            true => self.misconduct.fetch_add(1, Relaxed),
            false => self.failures.fetch_add(1, Relaxed),
        };
        if end.sets_aside() {
            self.set_aside.fetch_add(1, Relaxed);
        }
    }
}
