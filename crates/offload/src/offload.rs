//! Who computes which product, and the road back when a worker fails.
//!
//! [`Offload::outside`] gives the exact sums of a product or says that it did not: there is no worker,
//! there are no masks, or something went wrong. Then the caller multiplies itself and has the same
//! sums. What a worker returns is written nowhere before it passed its check.
//!
//! While a product is under way its connections belong to it. Only a product that has ended well gives them
//! back; an error, or a panic, ends them.
//!
//! Each worker has a thread that connects, draws secret vectors and uploads matrices, and begins again
//! when the connection ended. Whoever returned something that no honest worker returns waits in
//! quarantine before it is admitted again, with new vectors, a bounded number of times. Whoever keeps the
//! engine waiting for too long is set aside, each time for longer.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use aws_lc_rs::aead::LessSafeKey;
use casemate_field::Field;
use casemate_kernels::mem::{Extent, Granted};
use casemate_kernels::panels::Int8Rows;
use casemate_kernels::team::Team;

use crate::check::Challenges;
use crate::keys::BootKey;
use crate::link::{Connect, Fault};
use crate::memory;
use crate::pad::{Pads, Sequence};
use crate::pool::{Pool, Shelf};
use crate::public::PublicMatrix;
use crate::spill::Spill;
use crate::tls::Encrypted;

mod admission;
mod exchange;
mod patience;
mod report;

use admission::{End, Worker};
use exchange::{Borrowed, Scratch, Task};
use patience::Inside;
use report::Counts;
pub use report::{Event, Metrics, Observer};

/// How often the thread that carries masks looks for work, unless it is woken.
const CARRY: Duration = Duration::from_millis(200);

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
    /// How long one product may take, all its messages and their answers together; also one part of a
    /// matrix.
    pub patience: Duration,
    /// How many times as long as inside products may take in the long run.
    pub slowness: u32,
    /// What a product may take beyond that, because it has a way to go.
    pub round_trip: Duration,
    /// What products may take beyond that in sum, before the worker is set aside.
    pub waiting: Duration,
    /// How long it is set aside, at first; twice as long each time, up to 64 times.
    pub aside: Duration,
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
            slowness: 2,
            round_trip: Duration::from_millis(1),
            waiting: Duration::from_secs(2),
            aside: Duration::from_secs(30),
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
    /// every row; no masks are made. The enclave's own host carries both connections, so they are
    /// encrypted to one key each, and that is a type.
    Two([Encrypted; 2]),
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
    /// What the product under way works on.
    scratch: Mutex<Scratch>,
    /// Who carries masks to and from where they lie outside.
    carrier: OnceLock<Thread>,
}

impl Shared {
    /// Tells who carries masks that there is something to do.
    fn wake_carrier(&self) {
        if let Some(carrier) = self.carrier.get() {
            carrier.unpark();
        }
    }
}

/// What is known once all groups are.
struct Running {
    field: Field,
    matrices: Vec<PublicMatrix>,
    hiding: Vec<Hiding>,
    /// How long products take here.
    inside: Vec<Inside>,
    /// Where masks lie, if there are any.
    extent: Option<Extent>,
}

impl Running {
    /// Groups that have masks.
    fn shelves(&self) -> impl Iterator<Item = (&Shelf, &PublicMatrix)> + Clone {
        let groups = self.hiding.iter().zip(&self.matrices);
        groups.filter_map(|(hiding, matrix)| match hiding {
            Hiding::Pads(shelf) => Some((shelf, matrix)),
            Hiding::Shares(_) => None,
        })
    }
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
            Workers::Two(workers) => (b"shares", workers.map(Encrypted::into_connect).into()),
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
                scratch: Mutex::default(),
                carrier: OnceLock::new(),
                config,
            }),
            threads: Mutex::default(),
        }
    }

    /// With other pads, before anything uses them.
    #[cfg(test)]
    pub(crate) fn with_pads(mut self, pads: Pads) -> Offload {
        let shared = Arc::get_mut(&mut self.shared).expect("nobody has it yet");
        shared.pads = pads;
        self
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
    /// The operating system's refusal of memory, or to start a thread.
    pub fn start(&self) -> std::io::Result<()> {
        {
            let groups = lock(&self.shared.groups);
            let widest = groups.iter().map(|group| group.matrix.matrix().columns());
            let Some(field) = widest.max().and_then(Field::for_width) else {
                return Ok(());
            };
            let outputs = groups.iter().map(|group| group.matrix.matrix().rows());
            let outputs: Vec<usize> = outputs.collect();
            let pool = &self.shared.pool;
            let one = self.shared.workers.len() == 1;
            let slots = pool.divide(self.shared.config.pool_bytes, outputs.iter().copied());
            let shelves = outputs.iter().filter(|_| one);
            let elements = shelves.map(|outputs| slots.saturating_mul(*outputs));
            let mut arena = memory::arena::<u32>(elements)?;
            let extent = arena.extent();
            let hiding = |outputs: &usize| -> std::io::Result<Hiding> {
                let sequence = self.shared.pads.sequence();
                if !one {
                    return Ok(Hiding::Shares(Mutex::new(sequence)));
                }
                let shelf = Shelf::new(field, sequence, slots, *outputs, &mut arena)?;
                Ok(Hiding::Pads(shelf))
            };
            let running = Running {
                field,
                matrices: groups.iter().map(|group| group.matrix.clone()).collect(),
                hiding: outputs.iter().map(hiding).collect::<std::io::Result<_>>()?,
                inside: groups.iter().map(|_| Inside::default()).collect(),
                extent: one.then_some(extent),
            };
            if self.shared.running.set(running).is_err() {
                return Ok(());
            }
            let seal = lock(&self.shared.seal).take();
            let spill = lock(&self.shared.spill).take();
            if let (Some(key), Some((file, bytes)), true) = (seal, spill, one) {
                pool.spill_to(Spill::new(key, file, bytes, &outputs));
                self.carry()?;
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

    /// Starts a thread that carries masks to and from where they lie outside, since that waits for a file.
    fn carry(&self) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let carry = move || {
            while !shared.stop.load(Relaxed) {
                let shelves = || shared.running.get().into_iter().flat_map(Running::shelves);
                if !shared.pool.carry(shelves().map(|(shelf, _)| shelf)) {
                    thread::park_timeout(CARRY);
                }
            }
        };
        let thread = thread::Builder::new().name("casemate-masks".into());
        let thread = thread.spawn(carry)?;
        let _ = self.shared.carrier.set(thread.thread().clone());
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Lets masks for which `pool_bytes` have no room lie in a file that nobody else uses, up to so many
    /// bytes, sealed under a key of this run. To be called before [`Offload::start`]; later it does
    /// nothing.
    pub fn spill_to(&self, file: File, bytes: u64) {
        *lock(&self.shared.spill) = Some((file, bytes));
    }

    /// Waits until all workers hold all matrices, for as long as allowed; says whether they do.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        self.shared.workers.iter().all(|worker| worker.wait(limit))
    }

    /// What the system made of the memory for masks, if there are masks and it says so. Little of it is
    /// there before they are.
    #[must_use]
    pub fn mask_memory(&self) -> Option<Granted> {
        self.shared.running.get()?.extent?.granted().ok()
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
        let matrix = group.matrix.matrix();
        let (columns, outputs) = (matrix.columns(), matrix.rows());
        assert_eq!(sums.len(), count * outputs, "one sum for each product");
        let Some(mut links) = Borrowed::take(&shared.workers) else {
            let counts = &shared.counts;
            counts.without_worker.fetch_add(count as u64, Relaxed);
            return false;
        };
        let scratch = &mut *lock(&shared.scratch);
        // Few rows are somebody's next tokens; many are a prompt, which leaves some masks.
        let reserve = match count > shared.config.reserve {
            true => shared.config.reserve,
            false => 0,
        };
        let hiding = &running.hiding[group.id as usize];
        if !scratch.take_pads(hiding, count, reserve) {
            links.give_back();
            return false;
        }
        shared.wake_carrier();
        scratch.take_rows(rows);
        let inside = running.inside[group.id as usize].time(team, matrix);
        let tolerated = inside.tolerated(&shared.config, count);
        let task = Task {
            config: &shared.config,
            pads: &shared.pads,
            field: running.field,
            hiding,
            team,
            group: group.id,
            columns,
            outputs,
        };
        let begun = Instant::now();
        links.begin(shared.config.patience);
        let outcome = task.exchange(&mut links, scratch, sums);
        let took = begun.elapsed();
        match outcome {
            Ok(()) => {
                shared.counts.outside.fetch_add(count as u64, Relaxed);
                match links.lost(took, tolerated, shared.config.waiting) {
                    None => links.give_back(),
                    Some(slow) => {
                        let end = End::too_slow(Fault::Slow);
                        shared.counts.note(end);
                        links.set_aside(slow, end);
                    }
                }
                true
            }
            Err((who, fault)) => {
                shared.counts.recomputed.fetch_add(count as u64, Relaxed);
                let blame = links.blame(who, fault, took, shared.config.waiting);
                shared.counts.note(blame.end);
                links.failed(&blame);
                false
            }
        }
    }

    /// Makes some masks; false if there is nothing to do.
    pub fn step(&self, team: &Team) -> bool {
        let Some(running) = self.shared.running.get() else {
            return false;
        };
        let mut untimed = running.inside.iter().zip(&running.matrices);
        if let Some((inside, matrix)) = untimed.find(|(inside, _)| inside.is_unknown()) {
            inside.time(team, matrix.matrix());
            return true;
        }
        let shelves = running
            .shelves()
            .map(|(shelf, matrix)| (shelf, matrix.matrix()));
        let made = self.shared.pool.step(team, &self.shared.pads, shelves);
        self.shared.wake_carrier();
        made
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
            set_aside: counts.set_aside.load(Relaxed),
            misconduct: counts.misconduct.load(Relaxed),
            ..Metrics::default()
        };
        let running = self.shared.running.get().into_iter();
        let mut level = None;
        for (shelf, _) in running.flat_map(Running::shelves) {
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
        self.shared.wake_carrier();
        for thread in lock(&self.threads).drain(..) {
            // It panicked, and said so.
            let _ = thread.join();
        }
    }
}
