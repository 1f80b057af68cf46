//! Who computes which product, and the road back when a worker fails.
//!
//! [`Offload::outside`] gives the exact sums of a product or says that it did not: there is no worker,
//! there are no masks, or something went wrong. Then the caller multiplies itself and has the same
//! sums. What a worker returns is written nowhere before it passed its check.
//!
//! Each worker has a thread that connects, draws secret vectors and uploads matrices, and begins again
//! when the connection ended. Whoever returned something that no honest worker returns waits in
//! quarantine before it is admitted again, with new vectors, a bounded number of times.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use aws_lc_rs::aead::LessSafeKey;
use casemate_field::Field;
use casemate_kernels::panels::Int8Rows;
use casemate_kernels::team::Team;
use zeroize::Zeroizing;

use crate::check::Challenges;
use crate::keys::BootKey;
use crate::link::{Connect, Fault, Link, Sent};
use crate::pad::{Masked, Pad, Pads, Sequence};
use crate::pool::{Pool, Shelf};
use crate::public::PublicMatrix;
use crate::spill::Spill;

mod admission;

use admission::{State, Worker};

/// Most messages of one product that are under way at once.
const UNDER_WAY: usize = 4;

/// Most groups; that many matrices a worker takes.
const GROUPS: usize = casemate_wire::MAX_MATRICES as usize;

/// Limits and times. None of them changes a result.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of masks that wait to be used.
    pub pool_bytes: u64,
    /// Most masks made with one pass over a matrix.
    pub batch: usize,
    /// Operations (multiply-adds counted twice) of one step of making masks.
    pub step_operations: u64,
    /// Masks that are left for products of few rows, that is, for whoever is generating.
    pub reserve: usize,
    /// Rows of one message. More are sent in several, so that computing and sending overlap.
    pub rows_at_once: usize,
    /// How long one message and its answer may take, and one part of a matrix.
    pub patience: Duration,
    /// How often a worker that returned what no honest one does is admitted again, in one run.
    pub readmissions: u32,
    /// How long it waits for that.
    pub quarantine: Duration,
    /// How long to wait before connecting again, at first; twice as long after each failure, up to
    /// 64 times.
    pub retry: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            pool_bytes: 1 << 30,
            batch: 64,
            step_operations: 4_000_000_000,
            reserve: 16,
            rows_at_once: 32,
            patience: Duration::from_secs(5),
            readmissions: 3,
            quarantine: Duration::from_secs(60),
            retry: Duration::from_secs(1),
        }
    }
}

/// Who multiplies.
pub enum Workers {
    /// One worker, whose rows are hidden by pads.
    One(Connect),
    /// Two workers that are assumed not to tell each other what they receive. Each has one share of
    /// every row; no masks are made. The connections must keep what is sent from the enclave's own
    /// host, which carries both.
    Two([Connect; 2]),
}

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
    /// Faults that no honest one has.
    pub misconduct: u64,
}

/// Why a group cannot be computed outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsuited {
    /// No field holds its products.
    #[error(
        "rows of {0} elements are too wide for exact products outside: leave them in the enclave"
    )]
    TooWide(usize),
    /// Groups are named before workers are.
    #[error("matrices are added before the start")]
    Started,
    /// More than a worker takes.
    #[error("there are {GROUPS} groups already: leave some in the enclave")]
    TooMany,
}

/// A matrix, or several of one input stacked, that workers may multiply with.
pub struct Group {
    id: u32,
    matrix: PublicMatrix,
}

/// Products by workers that are trusted with nothing.
pub struct Offload {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    config: Config,
    pads: Pads,
    challenges: Challenges,
    workers: Vec<Worker>,
    observer: Observer,
    pool: Pool,
    /// What seals masks that lie outside, and where.
    seal: Mutex<Option<LessSafeKey>>,
    spill: Mutex<Option<(File, u64)>>,
    groups: Mutex<Vec<Arc<Group>>>,
    running: OnceLock<Running>,
    stop: AtomicBool,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    outside: AtomicU64,
    without_worker: AtomicU64,
    recomputed: AtomicU64,
    failures: AtomicU64,
    misconduct: AtomicU64,
}

impl Counts {
    fn note(&self, fault: Fault) {
        match fault.is_misconduct() {
            true => self.misconduct.fetch_add(1, Relaxed),
            false => self.failures.fetch_add(1, Relaxed),
        };
    }
}

/// What is known once all groups are.
struct Running {
    field: Field,
    matrices: Vec<PublicMatrix>,
    hiding: Vec<Hiding>,
}

/// How the rows of a group are hidden.
enum Hiding {
    /// By pads, whose products were made before.
    Pads(Shelf),
    /// In two shares.
    Shares(Mutex<Sequence>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Offload {
    /// Nothing is connected before [`Offload::start`]. All secrets of this run come from `boot`.
    #[must_use]
    pub fn new(config: Config, boot: BootKey, workers: Workers, observer: Observer) -> Offload {
        let (purpose, connects): (&[u8], Vec<Connect>) = match workers {
            Workers::One(connect) => (b"pads", vec![connect]),
            Workers::Two(connects) => (b"shares", connects.into()),
        };
        Offload {
            shared: Arc::new(Shared {
                pads: Pads::new(&boot, purpose),
                challenges: Challenges::new(&boot),
                workers: connects.into_iter().map(Worker::new).collect(),
                observer,
                pool: Pool::new(config.step_operations, config.batch),
                seal: Mutex::new(Some(boot.seal())),
                spill: Mutex::default(),
                groups: Mutex::default(),
                running: OnceLock::new(),
                stop: AtomicBool::new(false),
                counts: Counts::default(),
                config,
            }),
            threads: Mutex::default(),
        }
    }

    /// Adds a matrix that workers may multiply with.
    ///
    /// # Errors
    /// [`Unsuited`]; it stays inside then.
    pub fn add(&self, matrix: PublicMatrix) -> Result<Arc<Group>, Unsuited> {
        let columns = matrix.matrix().columns();
        if Field::for_width(columns).is_none() {
            return Err(Unsuited::TooWide(columns));
        }
        let mut groups = lock(&self.shared.groups);
        if self.shared.running.get().is_some() {
            return Err(Unsuited::Started);
        }
        if groups.len() >= GROUPS {
            return Err(Unsuited::TooMany);
        }
        let id = groups.len() as u32;
        let group = Arc::new(Group { id, matrix });
        groups.push(Arc::clone(&group));
        Ok(group)
    }

    /// Divides the pool among the groups that were added and has workers connect and load them, on
    /// threads of their own.
    ///
    /// # Errors
    /// The operating system's refusal to start a thread.
    pub fn start(&self) -> std::io::Result<()> {
        {
            let groups = lock(&self.shared.groups);
            let widest = groups.iter().map(|group| group.matrix.matrix().columns());
            let Some(field) = widest.max().and_then(Field::for_width) else {
                return Ok(());
            };
            let hiding = |_: &Arc<Group>| {
                let sequence = self.shared.pads.sequence();
                match self.shared.workers.len() {
                    1 => Hiding::Pads(Shelf::new(field, sequence)),
                    _ => Hiding::Shares(Mutex::new(sequence)),
                }
            };
            let running = Running {
                field,
                matrices: groups.iter().map(|group| group.matrix.clone()).collect(),
                hiding: groups.iter().map(hiding).collect(),
            };
            if self.shared.running.set(running).is_err() {
                return Ok(());
            }
            let outputs = groups.iter().map(|group| group.matrix.matrix().rows());
            let outputs: Vec<usize> = outputs.collect();
            let pool = &self.shared.pool;
            pool.divide(self.shared.config.pool_bytes, outputs.iter().copied());
            let (seal, spill) = (
                lock(&self.shared.seal).take(),
                lock(&self.shared.spill).take(),
            );
            if let (Some(key), Some((file, bytes)), 1) = (seal, spill, self.shared.workers.len()) {
                pool.spill_to(Spill::new(key, file, bytes, &outputs));
            }
        }
        for worker in 0..self.shared.workers.len() {
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new()
                .name(format!("casemate-worker-{worker}"))
                .spawn(move || admission::admit(&shared, worker))?;
            lock(&self.threads).push(thread);
        }
        Ok(())
    }

    /// Lets masks for which `pool_bytes` have no room lie in a file that nobody else uses, up to so many
    /// bytes, sealed under a key of this run. To be called before [`Offload::start`]; later, or a
    /// second time, it does nothing.
    pub fn spill_to(&self, file: File, bytes: u64) {
        *lock(&self.shared.spill) = Some((file, bytes));
    }

    /// Waits until all workers hold all matrices, for as long as allowed; says whether they do.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        self.shared.workers.iter().all(|worker| worker.wait(limit))
    }

    /// Computes the exact sums of a group's product with the help of workers. If the answer is `false`,
    /// `sums` holds nothing of use, and the caller has to multiply.
    ///
    /// # Panics
    /// If `rows` and `sums` do not have the shape of the product.
    pub fn outside(&self, team: &Team, group: &Group, rows: &Int8Rows, sums: &mut [i32]) -> bool {
        let shared = &*self.shared;
        let count = rows.rows();
        let Some(running) = shared.running.get() else {
            return false;
        };
        let outputs = group.matrix.matrix().rows();
        assert_eq!(sums.len(), count * outputs, "one sum for each product");
        let mut states: Vec<_> = shared.workers.iter().map(Worker::state).collect();
        let links: Option<Vec<&mut Link>> = states.iter_mut().map(|state| state.link()).collect();
        let Some(mut links) = links else {
            shared
                .counts
                .without_worker
                .fetch_add(count as u64, Relaxed);
            return false;
        };
        // Few rows are somebody's next tokens; many are a prompt, which leaves some masks.
        let reserve = match count > shared.config.reserve {
            true => shared.config.reserve,
            false => 0,
        };
        let taken = match &running.hiding[group.id as usize] {
            Hiding::Pads(shelf) => match shelf.take(count, reserve) {
                Some(taken) => (taken.pads, taken.products),
                None => return false,
            },
            Hiding::Shares(sequence) => {
                let mut sequence = lock(sequence);
                let pads = (0..count).map(|_| sequence.next()).collect();
                (pads, Zeroizing::default())
            }
        };
        let columns = rows.columns();
        let mut x = Zeroizing::new(vec![0; count * columns]);
        for (i, x) in x.chunks_exact_mut(columns).enumerate() {
            rows.row(i, x);
        }
        let task = Task {
            shared,
            running,
            team,
            group: group.id,
            columns,
            outputs,
        };
        match task.exchange(&mut links, &x, taken, sums) {
            Ok(()) => {
                shared.counts.outside.fetch_add(count as u64, Relaxed);
                true
            }
            Err((who, fault)) => {
                shared.counts.note(fault);
                shared.counts.recomputed.fetch_add(count as u64, Relaxed);
                for (which, (state, worker)) in states.iter_mut().zip(&shared.workers).enumerate() {
                    // The others' answers are not waited for, so their connections end, too.
                    **state = State::Ended((which == who).then_some(fault));
                    worker.tell();
                }
                false
            }
        }
    }

    /// Makes some masks; false if there is nothing to do.
    pub fn step(&self, team: &Team) -> bool {
        let Some(running) = self.shared.running.get() else {
            return false;
        };
        let shelves = running.hiding.iter().zip(&running.matrices);
        let shelves = shelves.filter_map(|(hiding, matrix)| match hiding {
            Hiding::Pads(shelf) => Some((shelf, matrix.matrix())),
            Hiding::Shares(_) => None,
        });
        self.shared.pool.step(team, &self.shared.pads, shelves)
    }

    /// Counts since the start.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let counts = &self.shared.counts;
        let mut metrics = Metrics {
            rows_outside: counts.outside.load(Relaxed),
            rows_without_worker: counts.without_worker.load(Relaxed),
            rows_recomputed: counts.recomputed.load(Relaxed),
            failures: counts.failures.load(Relaxed),
            misconduct: counts.misconduct.load(Relaxed),
            ..Metrics::default()
        };
        let hiding = self.shared.running.get().map(|running| &running.hiding);
        let shelves = hiding
            .into_iter()
            .flatten()
            .filter_map(|hiding| match hiding {
                Hiding::Pads(shelf) => Some(shelf),
                Hiding::Shares(_) => None,
            });
        let mut level = None;
        for shelf in shelves {
            metrics.masks_made += shelf.made.load(Relaxed);
            metrics.masks_used += shelf.used.load(Relaxed);
            metrics.rows_without_masks += shelf.refused.load(Relaxed);
            level = Some(level.unwrap_or(usize::MAX).min(shelf.level()));
        }
        if let Some(level) = level {
            metrics.masks_level = level as u64;
            metrics.masks_depth = self.shared.pool.depth() as u64;
        }
        if let Some(spill) = self.shared.pool.spill() {
            metrics.masks_outside = spill.levels() as u64;
            metrics.masks_lost = spill.lost.load(Relaxed);
        }
        metrics
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.shared.workers.iter().for_each(Worker::wake);
        for thread in lock(&self.threads).drain(..) {
            // It panicked, and said so.
            let _ = thread.join();
        }
    }
}

/// One product.
struct Task<'a> {
    shared: &'a Shared,
    running: &'a Running,
    team: &'a Team,
    group: u32,
    columns: usize,
    outputs: usize,
}

/// Rows that each worker has, and where their sums go.
struct UnderWay<'a> {
    sent: Vec<Sent>,
    products: &'a [u32],
    sums: &'a mut [i32],
}

impl Task<'_> {
    /// Sends rows, several messages ahead, and writes the sums of answers that pass. Who failed, and
    /// how, if not all do.
    fn exchange(
        &self,
        links: &mut [&mut Link],
        x: &[i8],
        (pads, products): (Vec<Pad>, Zeroizing<Vec<u32>>),
        sums: &mut [i32],
    ) -> Result<(), (usize, Fault)> {
        let most = links.iter().map(|link| link.most_rows(self.group)).min();
        let at_once = most
            .unwrap_or(1)
            .min(self.shared.config.rows_at_once)
            .max(1);
        let window = links.iter().map(|link| link.window()).min();
        let window = window.unwrap_or(1).clamp(1, UNDER_WAY);
        let mut pads = pads.into_iter();
        let mut products = products.chunks(at_once * self.outputs);
        let mut under_way = VecDeque::with_capacity(window);
        let messages = x.chunks(at_once * self.columns);
        for (x, sums) in messages.zip(sums.chunks_mut(at_once * self.outputs)) {
            if under_way.len() == window {
                self.receive(links, under_way.pop_front())?;
            }
            let pads = pads.by_ref().take(x.len() / self.columns).collect();
            let mut sent = Vec::with_capacity(links.len());
            for (who, masked) in self.hide(pads, x).into_iter().enumerate() {
                let link = &mut links[who];
                sent.push(
                    link.send(self.team, self.group, masked)
                        .map_err(|fault| (who, fault))?,
                );
            }
            under_way.push_back(UnderWay {
                sent,
                products: products.next().unwrap_or_default(),
                sums,
            });
        }
        while !under_way.is_empty() {
            self.receive(links, under_way.pop_front())?;
        }
        Ok(())
    }

    /// What each worker gets of these rows.
    fn hide(&self, pads: Vec<Pad>, x: &[i8]) -> Vec<Masked> {
        let (ours, field, columns) = (&self.shared.pads, self.running.field, self.columns);
        match &self.running.hiding[self.group as usize] {
            Hiding::Pads(_) => vec![ours.hide(self.team, field, pads, x, columns)],
            Hiding::Shares(_) => ours.share(self.team, field, pads, x, columns).into(),
        }
    }

    fn receive(
        &self,
        links: &mut [&mut Link],
        under_way: Option<UnderWay<'_>>,
    ) -> Result<(), (usize, Fault)> {
        let Some(under_way) = under_way else {
            return Ok(());
        };
        let mut checked = Vec::with_capacity(links.len());
        for (who, (link, sent)) in links.iter_mut().zip(&under_way.sent).enumerate() {
            checked.push(
                link.receive(self.team, sent)
                    .map_err(|fault| (who, fault))?,
            );
        }
        let mut checked = checked.into_iter();
        match (checked.next(), checked.next()) {
            (Some(one), None) => one.without(self.team, under_way.products, under_way.sums),
            (Some(one), Some(two)) => one.with(self.team, &two, under_way.sums),
            (None, _) => {}
        }
        Ok(())
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Admitted { worker } => write!(f, "worker {worker} holds all matrices"),
            Event::Failed { worker, fault } => {
                write!(f, "worker {worker} will be tried again: {fault}")
            }
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
