//! One product: rows go out, several messages ahead, and the sums of answers that passed come in.

use std::collections::VecDeque;
use std::sync::MutexGuard;
use std::time::Duration;

use casemate_field::Field;
use casemate_kernels::panels::Int8Rows;
use casemate_kernels::team::Team;

use super::admission::{End, State, Worker};
use super::{Config, Hiding, lock};
use crate::link::{Fault, Link, Sent};
use crate::memory::{Buffer, Spare};
use crate::pad::{Pad, Pads};

/// Most workers.
const WORKERS: usize = 2;

/// Most messages of one product that are under way at once.
const UNDER_WAY: usize = 4;

/// The connections of a product. Whoever drops them without giving them back ends them, since nobody
/// knows what is still to come over them.
pub(super) struct Borrowed<'a> {
    workers: &'a [Worker],
    links: [Option<Box<Link>>; WORKERS],
}

impl<'a> Borrowed<'a> {
    /// Those of all workers, if all are ready.
    pub(super) fn take(workers: &'a [Worker]) -> Option<Borrowed<'a>> {
        let mut states = [const { None }; WORKERS];
        for (state, worker) in states.iter_mut().zip(workers) {
            *state = Some(worker.state());
        }
        let mut ready = states.iter().flatten();
        if !ready.all(|state| state.is_ready()) {
            return None;
        }
        let lend = |state: Option<MutexGuard<'_, State>>| state.and_then(|mut state| state.lend());
        Some(Borrowed {
            workers,
            links: states.map(lend),
        })
    }

    /// All of them.
    fn links(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().flatten().map(|link| &**link)
    }

    /// Sets how long the whole product may take.
    pub(super) fn begin(&mut self, limit: Duration) {
        for link in self.links.iter_mut().flatten() {
            link.begin(limit);
        }
    }

    fn link(&mut self, who: usize) -> Result<&mut Link, (usize, Fault)> {
        let link = self.links.get_mut(who).and_then(Option::as_mut);
        link.map(|link| &mut **link)
            .ok_or((who, Fault::Unreachable))
    }

    /// Counts what the product took. Who has to be set aside for it, if somebody has: of two the one
    /// that was waited for longer.
    pub(super) fn lost(
        &self,
        took: Duration,
        tolerated: Duration,
        budget: Duration,
    ) -> Option<usize> {
        if took <= tolerated {
            for worker in self.workers {
                lock(&worker.lost).make_up(took, tolerated);
            }
            return None;
        }
        let who = self.slowest()?;
        self.lost_by(who, took, tolerated, budget).then_some(who)
    }

    /// Who was waited for longest.
    fn slowest(&self) -> Option<usize> {
        let waits = self.links().map(Link::waited).enumerate();
        waits.max_by_key(|(_, waited)| *waited).map(|(who, _)| who)
    }

    /// Counts what a product took that failed where the answer of `found` was read: of such a product
    /// nothing is tolerated. A limit that is over is found where the next answer is read, whoever took
    /// the time.
    pub(super) fn blame(
        &self,
        found: usize,
        fault: Fault,
        took: Duration,
        budget: Duration,
    ) -> Blame {
        let slowest = self.slowest().unwrap_or(found);
        let lost = self.lost_by(slowest, took, Duration::ZERO, budget);
        let late = fault == Fault::Late;
        let who = if late { slowest } else { found };
        Blame {
            who,
            end: match late || lost && who == slowest {
                true => End::too_slow(fault),
                false => End::of(fault),
            },
            slow: (lost && who != slowest).then_some(slowest),
        }
    }

    /// Adds up what a product took. Whether somebody has to be set aside for that.
    fn lost_by(&self, who: usize, took: Duration, tolerated: Duration, budget: Duration) -> bool {
        let worker = self.workers.get(who);
        worker.is_some_and(|worker| lock(&worker.lost).add(took, tolerated, budget))
    }

    /// Gives them back: the product is complete and nothing more will come.
    pub(super) fn give_back(mut self) {
        for (link, worker) in self.links.iter_mut().zip(self.workers) {
            if let Some(link) = link.take() {
                worker.put_back(link);
            }
        }
    }

    /// Ends the connection of one whose product is complete; the others are ready again.
    pub(super) fn set_aside(mut self, who: usize, end: End) {
        self.end(who, end);
        self.give_back();
    }

    /// Ends all connections: the others' answers are not waited for.
    pub(super) fn failed(mut self, blame: &Blame) {
        if let Some(slow) = blame.slow {
            self.end(slow, End::too_slow(Fault::Slow));
        }
        self.end(blame.who, blame.end);
    }

    fn end(&mut self, who: usize, end: End) {
        if let Some(link) = self.links.get_mut(who) {
            *link = None;
            self.workers[who].set(State::Ended(Some(end)));
        }
    }
}

/// Who has to go for a product that failed.
pub(super) struct Blame {
    who: usize,
    pub(super) end: End,
    /// Who besides was waited for too often.
    slow: Option<usize>,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        for (link, worker) in self.links.iter_mut().zip(self.workers) {
            if link.take().is_some() {
                worker.set(State::Ended(None));
            }
        }
    }
}

/// What a product works on, kept for the next one.
#[derive(Default)]
pub(super) struct Scratch {
    /// Its rows in clear.
    x: Buffer<i8>,
    /// A pad for each, and W·r of them.
    pads: Vec<Pad>,
    products: Buffer<u32>,
    /// Messages that have no answer yet, the oldest first.
    under_way: VecDeque<UnderWay>,
    spare: Spare,
}

/// Rows that each worker has.
struct UnderWay {
    rows: usize,
    sent: [Option<Sent>; WORKERS],
}

impl Scratch {
    /// Takes a pad for each row, if there are so many.
    pub(super) fn take_pads(&mut self, hiding: &Hiding, rows: usize, reserve: usize) -> bool {
        // What a product left that failed.
        self.pads.clear();
        self.under_way.clear();
        match hiding {
            Hiding::Pads(shelf) => shelf.take(rows, reserve, &mut self.pads, &mut self.products),
            Hiding::Shares(sequence) => {
                let mut sequence = lock(sequence);
                self.pads.extend((0..rows).map(|_| sequence.next()));
                true
            }
        }
    }

    /// Copies the rows.
    pub(super) fn take_rows(&mut self, rows: &Int8Rows) {
        let columns = rows.columns();
        let x = self.x.room(rows.rows() * columns);
        for (i, x) in x.chunks_exact_mut(columns).enumerate() {
            rows.row(i, x);
        }
    }
}

/// One product.
pub(super) struct Task<'a> {
    pub(super) config: &'a Config,
    pub(super) pads: &'a Pads,
    pub(super) field: Field,
    pub(super) hiding: &'a Hiding,
    pub(super) team: &'a Team,
    pub(super) group: u32,
    pub(super) columns: usize,
    pub(super) outputs: usize,
}

impl Task<'_> {
    /// Sends the rows, several messages ahead, and writes the sums of answers that pass. Who failed, and
    /// how, if not all do.
    pub(super) fn exchange(
        &self,
        links: &mut Borrowed<'_>,
        scratch: &mut Scratch,
        sums: &mut [i32],
    ) -> Result<(), (usize, Fault)> {
        let most = links.links().map(|link| link.most_rows(self.group)).min();
        let at_once = most.unwrap_or(1).min(self.config.rows_at_once).max(1);
        let window = links.links().map(Link::window).min();
        let window = window.unwrap_or(1).clamp(1, UNDER_WAY);
        let rows = scratch.x.len() / self.columns;
        let (mut sent, mut done) = (0, 0);
        while done < rows {
            if sent < rows && scratch.under_way.len() < window {
                let count = at_once.min(rows - sent);
                let message = self.send(links, scratch, sent, count)?;
                scratch.under_way.push_back(message);
                sent += count;
            } else if let Some(message) = scratch.under_way.pop_front() {
                done += self.receive(links, scratch, message, done, sums)?;
            }
        }
        Ok(())
    }

    /// Sends some rows, to each worker what it gets of them.
    fn send(
        &self,
        links: &mut Borrowed<'_>,
        scratch: &mut Scratch,
        first: usize,
        rows: usize,
    ) -> Result<UnderWay, (usize, Fault)> {
        let (ours, field, columns) = (self.pads, self.field, self.columns);
        let x = &scratch.x[first * columns..(first + rows) * columns];
        let (pads, spare) = (&mut scratch.pads, &mut scratch.spare);
        let masked = match self.hiding {
            Hiding::Pads(_) => {
                let masked = ours.hide(self.team, field, pads, x, columns, spare.take());
                [Some(masked), None]
            }
            Hiding::Shares(_) => {
                let rooms = [spare.take(), spare.take()];
                ours.share(self.team, field, pads, x, columns, rooms)
                    .map(Some)
            }
        };
        let mut sent = [const { None }; WORKERS];
        for (who, masked) in masked.into_iter().flatten().enumerate() {
            let link = links.link(who)?;
            let gone = link.send(self.team, self.group, masked, spare);
            sent[who] = Some(gone.map_err(|fault| (who, fault))?);
        }
        Ok(UnderWay { rows, sent })
    }

    /// Waits for the answers to the oldest message; how many rows it has.
    fn receive(
        &self,
        links: &mut Borrowed<'_>,
        scratch: &mut Scratch,
        message: UnderWay,
        first: usize,
        sums: &mut [i32],
    ) -> Result<usize, (usize, Fault)> {
        let spare = &mut scratch.spare;
        let mut checked = [const { None }; WORKERS];
        for (who, sent) in message.sent.into_iter().flatten().enumerate() {
            let answer = links.link(who)?.receive(self.team, sent, spare);
            checked[who] = Some(answer.map_err(|fault| (who, fault))?);
        }
        let at = first * self.outputs..(first + message.rows) * self.outputs;
        let sums = &mut sums[at.clone()];
        match &checked {
            [Some(one), Some(two)] => one.with(self.team, two, sums),
            [Some(one), None] => one.without(self.team, &scratch.products[at], sums),
            [None, _] => {}
        }
        for checked in checked.into_iter().flatten() {
            spare.give(checked.into_room());
        }
        Ok(message.rows)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    use casemate_wire::{Receiver, Responder, Timed, Welcome};

    use super::*;

    /// A worker with a connection that is ready, and the other end of it.
    fn ready() -> (Worker, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let answer = far.try_clone().unwrap();
        let other = std::thread::spawn(move || {
            let offer = Welcome {
                window: 1,
                max_payload: 1 << 20,
                memory: 1,
                max_rows: 1,
                name: "nobody".into(),
            };
            let receiver = Receiver::open(far.try_clone().unwrap(), offer.clone()).unwrap();
            Responder::open(far, receiver.hello(), &offer)
                .map(|_| ())
                .unwrap();
        });
        let limit = Duration::from_secs(60);
        let transport = Box::new(Timed::unix(near));
        let none: Arc<[_]> = Arc::new([]);
        let link = Link::open(transport, Field::P29, &[], none, limit, || true);
        other.join().unwrap();
        let worker = Worker::new(Box::new(|| Err(std::io::ErrorKind::NotFound.into())));
        worker.set(State::Ready(Box::new(link.ok().unwrap())));
        (worker, answer)
    }

    fn ended(worker: &Worker) -> bool {
        matches!(*worker.state(), State::Ended(None))
    }

    #[test]
    fn a_panic_in_the_middle_of_a_product_leaves_no_connection() {
        let workers = [ready(), ready()].map(|(worker, _)| worker);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let mut links = Borrowed::take(&workers).unwrap();
            assert!(workers.iter().all(|worker| worker.wait(Duration::ZERO)));
            assert!(links.link(1).is_ok());
            assert!(Borrowed::take(&workers).is_none(), "they are lent");
            panic!("in the middle");
        }));
        assert!(panicked.is_err());
        assert!(workers.iter().all(ended));
        assert!(Borrowed::take(&workers).is_none());
    }

    #[test]
    fn only_what_is_given_back_is_ready_again() {
        let workers = [ready(), ready()].map(|(worker, _)| worker);
        Borrowed::take(&workers).unwrap().give_back();
        Borrowed::take(&workers).unwrap().give_back();
        // One that was slow; nothing is to come from the other.
        let end = End::too_slow(Fault::Slow);
        Borrowed::take(&workers).unwrap().set_aside(1, end);
        assert!(workers[0].state().is_ready());
        let why = |worker: &Worker| match &*worker.state() {
            State::Ended(end) => *end,
            _ => None,
        };
        assert_eq!(why(&workers[1]), Some(end));
        // One without the other is of no use, and stays as it is.
        assert!(Borrowed::take(&workers).is_none());
        assert!(workers[0].state().is_ready());
        let workers = [ready(), ready()].map(|(worker, _)| worker);
        let end = End::of(Fault::WrongProduct);
        Borrowed::take(&workers).unwrap().end(0, end);
        assert_eq!(why(&workers[0]), Some(end));
        assert!(ended(&workers[1]), "its answer was not waited for");
    }

    #[test]
    fn of_two_the_one_that_was_waited_for_loses() {
        let [(one, _end), (two, _other)] = [ready(), ready()];
        let workers = [one, two];
        let mut links = Borrowed::take(&workers).unwrap();
        let ms = Duration::from_millis;
        // Nobody answers: the wait for the second ends by its limit.
        links.begin(ms(20));
        assert!(links.link(1).unwrap().wait_in_vain() > Duration::ZERO);
        assert_eq!(links.lost(ms(500), ms(1), ms(1000)), None);
        assert_eq!(links.lost(ms(1), ms(500), ms(1000)), None, "made up for");
        assert_eq!(links.lost(ms(1000), ms(1), ms(1000)), None);
        assert_eq!(links.lost(ms(10), ms(1), ms(1000)), Some(1));
    }

    #[test]
    fn of_a_product_that_failed_the_one_that_was_waited_for_pays() {
        let [(one, _end), (two, _other)] = [ready(), ready()];
        let workers = [one, two];
        let ms = Duration::from_millis;
        let waited = || {
            let mut links = Borrowed::take(&workers).unwrap();
            links.begin(ms(20));
            links.link(0).unwrap().wait_in_vain();
            links
        };
        let links = waited();
        // The first took the time, the second's answer is where that shows.
        let late = links.blame(1, Fault::Late, ms(400), ms(1000));
        assert_eq!((late.who, late.slow), (0, None));
        // Whoever hangs up is not who was waited for.
        let gone = links.blame(1, Fault::Unreachable, ms(500), ms(1000));
        assert_eq!((gone.who, gone.slow), (1, None));
        let gone = links.blame(1, Fault::Unreachable, ms(200), ms(1000));
        assert_eq!((gone.who, gone.slow), (1, Some(0)));
        links.failed(&gone);
        let set_aside = |worker: &Worker| match *worker.state() {
            State::Ended(Some(end)) => end.sets_aside(),
            _ => panic!("its connection goes on"),
        };
        assert!(set_aside(&workers[0]) && !set_aside(&workers[1]));
    }
}
