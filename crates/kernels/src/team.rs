//! A persistent team of threads: scoped parallel runs without a lock, an allocation or a system
//! call while its members are awake.
//!
//! Members spin for a bounded time after each run and then park, so an idle engine uses no
//! processor and a busy one makes no system call. Nothing here knows what is computed.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use crate::cpu::Isa;

/// How many `pause` instructions a member waits before it parks, unless told otherwise: 3 to 10 ms
/// on today's x86 processors, longer than one sampling step between two tokens and than most of the
/// times for which a host takes a virtual core away, and shorter than anybody would notice on an
/// idle machine.
pub const PATIENCE: u32 = 200_000;

/// Most members a team may have.
pub const MAX_THREADS: usize = 1024;

/// A fixed set of threads that run one closure together. The calling thread is member 0.
pub struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    isa: Isa,
}

type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Shared {
    members: usize,
    /// The state of the current run, see [`gate`].
    gate: Line<AtomicU64>,
    /// One flag per member, set while it is parked or about to park.
    asleep: Vec<Line<AtomicBool>>,
    /// Set from the moment a caller owns the team until its run is over.
    busy: AtomicBool,
    stop: AtomicBool,
    /// How many `pause` instructions anybody waits before parking.
    patience: AtomicU32,
    /// Whom the last member wakes; set by a caller that is about to park.
    caller: Mutex<Option<Thread>>,
    job: UnsafeCell<Option<&'static Job<'static>>>,
    /// Set while `panic` holds something, so that a run without panics takes no lock.
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Keeps each contended word on cache lines of its own (two: the prefetcher fetches pairs).
#[repr(align(128))]
struct Line<T>(T);

// SAFETY: everything but `job` is Sync by itself. `job` is read only by members that are inside the
// gate. It is written only by the caller that owns `busy`, while the gate is closed and nobody is
// inside; members enter by an acquiring exchange of a gate that the caller opened (release) after
// writing, and are seen to have left (release, acquire) before it is written again.
unsafe impl Sync for Shared {}

/// One word says it all about a run: its number (bits 32 to 63), whether it is closed (31), how many
/// members have entered it (16 to 30) and how many are inside (0 to 15), the caller not counted.
///
/// A member enters each run at most once, and not after it was closed. So a caller that has found no
/// work left need not wait for a member that never came, because its core was busy with something
/// else: on a crowded machine that would cost a scheduler's time slice for every product.
mod gate {
    pub(super) const INSIDE: u64 = 1;
    pub(super) const ENTERED: u64 = 1 << 16;
    pub(super) const CLOSED: u64 = 1 << 31;

    pub(super) fn number(gate: u64) -> u32 {
        (gate >> 32) as u32
    }

    /// Nobody has entered the next run.
    pub(super) fn next(gate: u64) -> u64 {
        u64::from(number(gate).wrapping_add(1)) << 32
    }

    pub(super) fn inside(gate: u64) -> usize {
        (gate & (ENTERED - 1)) as usize
    }

    pub(super) fn entered(gate: u64) -> usize {
        ((gate & (CLOSED - 1)) / ENTERED) as usize
    }
}

impl Team {
    /// A team of `threads` members (at least 1, at most [`MAX_THREADS`]) with the best instruction
    /// set of this machine.
    ///
    /// # Errors
    /// The operating system's refusal to start a thread.
    pub fn new(threads: usize) -> io::Result<Team> {
        Team::with_isa(threads, Isa::detect())
    }

    /// As [`Team::new`] with a chosen instruction set.
    ///
    /// # Errors
    /// The operating system's refusal to start a thread.
    pub fn with_isa(threads: usize, isa: Isa) -> io::Result<Team> {
        let members = threads.clamp(1, MAX_THREADS);
        let shared = Arc::new(new_shared(members));
        let mut team = Team {
            shared,
            threads: Vec::with_capacity(members - 1),
            isa,
        };
        for member in 1..members {
            let shared = Arc::clone(&team.shared);
            // On failure the members already started are stopped by dropping `team`.
            let handle = thread::Builder::new()
                .name(format!("casemate-{member}"))
                .spawn(move || shared.serve(member))?;
            team.threads.push(handle);
        }
        Ok(team)
    }

    /// Sets how many `pause` instructions members wait for work, and callers for members, before
    /// they sleep. More saves system calls between runs that are further apart, at the price of
    /// processor time.
    pub fn set_patience(&self, pauses: u32) {
        self.shared.patience.store(pauses, Ordering::Relaxed);
    }

    /// Number of members, the caller included.
    pub fn members(&self) -> usize {
        self.shared.members
    }

    /// The instruction set that kernels run on this team use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `work(member, members)` once for each member, in parallel, and returns when all have
    /// returned.
    ///
    /// Members must not wait for each other inside `work`: when the team is already in use (a run
    /// inside a run, or from a second thread) the calls are made one after another on the calling
    /// thread.
    ///
    /// # Panics
    /// With the payload of the first panic of any member, after all have finished; the team stays
    /// usable.
    pub fn run(&self, work: impl Fn(usize, usize) + Sync) {
        let members = self.members();
        if !self.execute(&work, true) {
            (0..members).for_each(|member| work(member, members));
        }
    }

    /// Calls `share` on the calling thread and on members that come in time. When one call has
    /// returned, there must be nothing left to begin.
    fn share_out(&self, share: impl Fn() + Sync) {
        if !self.execute(&|_, _| share(), false) {
            share();
        }
    }

    /// Runs `job` on the calling thread and on `all` other members, or on those that come before it
    /// has returned here. False if the team is in use; then nothing was called.
    fn execute(&self, job: &Job<'_>, all: bool) -> bool {
        let shared = &*self.shared;
        if shared.busy.swap(true, Ordering::Acquire) {
            return false;
        }
        // SAFETY: the lifetime is extended only until `Shared::finish` returns. From then on the
        // gate is closed and nobody is inside, so nobody calls the job; it outlives that on all
        // paths, since a panic of our own share is caught first and nothing else between here and
        // there unwinds.
        let job: &'static Job<'static> =
            unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
        self.start(job);
        let own = catch_unwind(AssertUnwindSafe(|| job(0, shared.members)));
        shared.finish(all);
        let theirs = if shared.panicked.swap(false, Ordering::Relaxed) {
            let mut panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner);
            panic.take()
        } else {
            None
        };
        shared.busy.store(false, Ordering::Release);
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
        true
    }

    /// Calls `work(index)` for every index below `count`, sharing them out as members become free.
    ///
    /// # Panics
    /// As [`Team::run`].
    pub fn for_each(&self, count: usize, work: impl Fn(usize) + Sync) {
        if count <= 1 || self.members() == 1 {
            (0..count).for_each(work);
            return;
        }
        let next = AtomicUsize::new(0);
        self.share_out(|| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return;
                }
                work(index);
            }
        });
    }

    /// Calls `work(index, chunk)` for every chunk of `chunk_len` elements of `data` (the last may
    /// be shorter), sharing them out as members become free.
    ///
    /// # Panics
    /// If `chunk_len` is 0; otherwise as [`Team::run`].
    pub fn for_each_chunk_mut<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.for_each_chunk_mut_with(
            data,
            chunk_len,
            || (),
            |(), index, chunk| work(index, chunk),
        );
    }

    /// As [`Team::for_each_chunk_mut`], with scratch that each member makes once.
    ///
    /// # Panics
    /// If `chunk_len` is 0; otherwise as [`Team::run`].
    pub fn for_each_chunk_mut_with<T: Send, S>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        scratch: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "chunks need a length");
        let total = data.len();
        let count = total.div_ceil(chunk_len);
        let base = SharedMut::new(data);
        let next = AtomicUsize::new(0);
        let share = || {
            let mut index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            let mut scratch = scratch();
            while index < count {
                let start = index * chunk_len;
                // SAFETY: each index is handed out once by the counter, chunks of different indices
                // do not overlap, and `data` is mutably borrowed until the run is over.
                let chunk = unsafe { base.slice(start, chunk_len.min(total - start)) };
                work(&mut scratch, index, chunk);
                index = next.fetch_add(1, Ordering::Relaxed);
            }
        };
        if count <= 1 {
            share()
        } else {
            self.share_out(share);
        }
    }

    fn start(&self, job: &'static Job<'static>) {
        let shared = &*self.shared;
        // SAFETY: we own `busy`, the gate is closed and nobody is inside (so `finish` left it), hence
        // nobody reads the cell until the gate opens.
        unsafe { *shared.job.get() = Some(job) };
        let closed = shared.gate.0.load(Ordering::Relaxed);
        shared.gate.0.store(gate::next(closed), Ordering::Release);
        // Pairs with the fence in `wait_for_run`: either we see the flag, or the member sees the
        // new run and does not park.
        fence(Ordering::SeqCst);
        for (member, handle) in self.threads.iter().enumerate() {
            if shared.asleep[member + 1].0.load(Ordering::Relaxed) {
                handle.thread().unpark();
            }
        }
    }
}

fn new_shared(members: usize) -> Shared {
    Shared {
        members,
        gate: Line(AtomicU64::new(gate::CLOSED)),
        asleep: (0..members).map(|_| Line(AtomicBool::new(false))).collect(),
        busy: AtomicBool::new(false),
        stop: AtomicBool::new(false),
        patience: AtomicU32::new(PATIENCE),
        caller: Mutex::new(None),
        job: UnsafeCell::new(None),
        panicked: AtomicBool::new(false),
        panic: Mutex::new(None),
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let last = self.shared.gate.0.load(Ordering::Relaxed);
        self.shared
            .gate
            .0
            .store(gate::next(last) | gate::CLOSED, Ordering::Release);
        for handle in self.threads.drain(..) {
            handle.thread().unpark();
            // A member only ends by returning from `serve`, which catches every panic of a job.
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// The life of a member other than the caller.
    fn serve(&self, member: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_run(member, seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            if !self.enter(seen) {
                continue;
            }
            // SAFETY: we are inside: the caller wrote the cell before it opened the gate and does
            // not touch it before we have left.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job
                && let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(member, self.members)))
            {
                self.panic
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(payload);
                // The caller sees it, as it sees that we have left.
                self.panicked.store(true, Ordering::Relaxed);
            }
            let before = self.gate.0.fetch_sub(gate::INSIDE, Ordering::AcqRel);
            if gate::inside(before) == 1 {
                // Pairs with the fence in `finish`: either we see the flag, or the caller sees that
                // nobody is inside.
                fence(Ordering::SeqCst);
                if self.asleep[0].0.load(Ordering::Relaxed)
                    && let Some(caller) =
                        &*self.caller.lock().unwrap_or_else(PoisonError::into_inner)
                {
                    caller.unpark();
                }
            }
        }
    }

    /// Enters the run of this number, unless it is closed or over.
    fn enter(&self, number: u32) -> bool {
        let open = |gate: u64| {
            let enters = gate::number(gate) == number && gate & gate::CLOSED == 0;
            enters.then_some(gate + gate::ENTERED + gate::INSIDE)
        };
        self.gate
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, open)
            .is_ok()
    }

    /// Spins, then parks, until the number of the run differs from `seen`; returns the new one.
    fn wait_for_run(&self, member: usize, seen: u32) -> u32 {
        let changed = || {
            let number = gate::number(self.gate.0.load(Ordering::Acquire));
            Some(number).filter(|number| *number != seen)
        };
        if let Some(number) = self.spin(changed) {
            return number;
        }
        let asleep = &self.asleep[member].0;
        asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        loop {
            if let Some(number) = changed() {
                asleep.store(false, Ordering::Relaxed);
                return number;
            }
            thread::park();
        }
    }

    /// Waits until every other member has entered (if `all` must) and all that have entered have
    /// left; then the gate is closed.
    fn finish(&self, all: bool) {
        if !all {
            self.gate.0.fetch_or(gate::CLOSED, Ordering::AcqRel);
        }
        let finished = || {
            let gate = self.gate.0.load(Ordering::Acquire);
            let over = gate::inside(gate) == 0 && (!all || gate::entered(gate) == self.members - 1);
            over.then_some(())
        };
        if self.spin(finished).is_none() {
            *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
            let asleep = &self.asleep[0].0;
            asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            while finished().is_none() {
                thread::park();
            }
            asleep.store(false, Ordering::Relaxed);
        }
        self.gate.0.fetch_or(gate::CLOSED, Ordering::AcqRel);
    }

    fn spin<T>(&self, ready: impl Fn() -> Option<T>) -> Option<T> {
        for _ in 0..self.patience.load(Ordering::Relaxed) {
            if let Some(value) = ready() {
                return Some(value);
            }
            std::hint::spin_loop();
        }
        ready()
    }
}

/// A slice whose disjoint parts several members write at once.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: a SharedMut hands out `&mut [T]` under the caller's promise that they do not overlap,
// which is what sending parts of a `&mut [T]` to other threads is.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        SharedMut {
            start: data.as_mut_ptr(),
            len: data.len(),
            borrow: std::marker::PhantomData,
        }
    }

    /// The part of `len` elements from `start`.
    ///
    /// # Safety
    /// No two live parts overlap.
    ///
    /// # Panics
    /// If the part does not lie in the slice.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that parts do not overlap"
    )]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "part {start}+{len} of {}",
            self.len
        );
        // SAFETY: in bounds as just checked, exclusive by the caller's promise, borrowed for 'a.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_member_runs_exactly_once_per_run() {
        for threads in 1..=4 {
            let team = Team::new(threads).unwrap();
            let calls: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..300 {
                team.run(|member, members| {
                    assert_eq!(members, threads);
                    calls[member].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(
                calls.iter().all(|c| c.load(Ordering::Relaxed) == 300),
                "{threads} threads"
            );
        }
    }

    #[test]
    fn parked_members_wake_and_a_parked_caller_is_woken() {
        let team = Team::new(3).unwrap();
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(20)); // members have parked
            let sum = AtomicUsize::new(0);
            team.run(|member, _| {
                if member == 2 {
                    thread::sleep(Duration::from_millis(30)); // the caller parks
                }
                sum.fetch_add(member, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 3);
        }
    }

    #[test]
    fn a_panic_in_any_member_reaches_the_caller_and_the_team_survives() {
        let team = Team::new(4).unwrap();
        for culprit in 0..4 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.run(|member, _| {
                    if member == culprit {
                        std::panic::panic_any(culprit);
                    }
                });
            }));
            assert_eq!(caught.unwrap_err().downcast_ref::<usize>(), Some(&culprit));
            let alive = AtomicUsize::new(0);
            team.run(|_, _| {
                alive.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(alive.into_inner(), 4);
        }
    }

    #[test]
    fn nested_and_concurrent_runs_complete() {
        let team = Team::new(3).unwrap();
        let calls = AtomicUsize::new(0);
        let count = || {
            calls.fetch_add(1, Ordering::Relaxed);
        };
        team.run(|_, _| team.run(|_, _| count()));
        assert_eq!(calls.swap(0, Ordering::Relaxed), 9);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| team.run(|_, _| count())));
            }
        });
        assert_eq!(calls.into_inner(), 4 * 200 * 3);
    }

    #[test]
    fn chunks_cover_the_slice_once_with_their_index() {
        for threads in 1..=4 {
            let team = Team::new(threads).unwrap();
            for len in [0usize, 1, 6, 7, 8, 1000] {
                let mut data = vec![usize::MAX; len];
                team.for_each_chunk_mut(&mut data, 7, |index, chunk| chunk.fill(index));
                assert!(
                    data.iter().enumerate().all(|(i, v)| *v == i / 7),
                    "{threads} threads, {len} elements"
                );
            }
            let seen: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            team.for_each(100, |i| {
                seen[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn scratch_is_made_at_most_once_per_member() {
        let team = Team::new(3).unwrap();
        let made = AtomicUsize::new(0);
        let mut data = vec![0u8; 500];
        team.for_each_chunk_mut_with(
            &mut data,
            1,
            || made.fetch_add(1, Ordering::Relaxed),
            |_, _, chunk| chunk[0] += 1,
        );
        assert!(data.iter().all(|d| *d == 1));
        assert!((1..=3).contains(&made.into_inner()));
    }

    #[test]
    fn work_is_finished_without_members_that_never_come() {
        // A team whose second thread was never started: like one whose core is always busy.
        let team = Team {
            shared: Arc::new(new_shared(2)),
            threads: vec![],
            isa: Isa::SCALAR,
        };
        for _ in 0..3 {
            let mut data = vec![0; 100];
            team.for_each_chunk_mut(&mut data, 7, |i, chunk| chunk.fill(i + 1));
            assert!(data.iter().enumerate().all(|(at, x)| *x == at / 7 + 1));
        }
    }

    #[test]
    fn a_latecomer_does_not_enter_a_closed_run() {
        let shared = new_shared(3);
        let run = gate::next(gate::CLOSED);
        shared.gate.0.store(run, Ordering::Release);
        assert!(!shared.enter(gate::number(run) + 1), "another run");
        assert!(shared.enter(gate::number(run)));
        shared.gate.0.fetch_or(gate::CLOSED, Ordering::AcqRel);
        assert!(!shared.enter(gate::number(run)), "closed");
        let state = shared.gate.0.load(Ordering::Relaxed);
        assert_eq!((gate::entered(state), gate::inside(state)), (1, 1));
        assert_eq!(gate::number(gate::next(u64::MAX)), 0, "numbers wrap");
    }

    #[test]
    fn members_share_small_and_large_work_many_times() {
        let team = Team::new(4).unwrap();
        for round in 0..1000 {
            let done: Vec<AtomicUsize> = (0..round % 9).map(|_| AtomicUsize::new(0)).collect();
            team.for_each(done.len(), |i| {
                done[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                done.iter().all(|d| d.load(Ordering::Relaxed) == 1),
                "round {round}"
            );
        }
    }

    #[test]
    fn dropping_a_team_ends_its_threads() {
        let team = Team::new(4).unwrap();
        let shared = Arc::clone(&team.shared);
        drop(team);
        assert_eq!(Arc::strong_count(&shared), 1);
    }
}
