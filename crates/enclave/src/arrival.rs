//! Places for requests whose body is arriving, and who loses one.
//!
//! Anybody may begin a request and send no more of it, so a place is kept only by arriving. A sender is *behind* by as
//! much time as its body has been coming for longer than [`RATE`] allows. Who is behind by more than [`ALLOWANCE`] is given
//! up; and when all places are taken, whoever is furthest behind gives way to a newcomer. Who holds places with bodies that
//! trickle in therefore loses them to people whose bodies come at an ordinary pace, and not the other way round.
//!
//! All times are `tokio::time`, so tests pause and advance them.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

/// The least rate at which a body must come, in bytes per second.
pub const RATE: u64 = 4 << 10;
/// How far behind that a sender may fall.
pub const ALLOWANCE: Duration = Duration::from_secs(5);
/// The longest time for a request to arrive, at whatever rate.
pub const ARRIVAL: Duration = Duration::from_secs(30);
/// Nobody who is less behind gives way to a newcomer, who rather waits as long.
const UNHURRIED: Duration = Duration::from_millis(250);
/// How often a newcomer asks for a place, that long each time, before it is told to come back.
const ATTEMPTS: u32 = 4;

/// The places.
pub struct Arrivals {
    places: Arc<Semaphore>,
    arriving: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    next: u64,
    senders: HashMap<u64, Arc<Sender>>,
}

/// One body.
struct Sender {
    since: Instant,
    bytes: AtomicU64,
    given_up: Notify,
}

impl Sender {
    /// Until when what has come is enough.
    fn on_time_until(&self) -> Instant {
        let bytes = self.bytes.load(Ordering::Relaxed);
        self.since + Duration::from_millis(bytes.saturating_mul(1000) / RATE)
    }
}

impl Arrivals {
    /// This many places.
    #[must_use]
    pub fn new(places: usize) -> Arrivals {
        Arrivals {
            places: Arc::new(Semaphore::new(places)),
            arriving: Arc::default(),
        }
    }

    /// A place: a free one, or that of the sender who is furthest behind. Nothing if all hurry.
    pub async fn enter(&self) -> Option<Arriving> {
        let place = self.place().await?;
        let sender = Arc::new(Sender {
            since: Instant::now(),
            bytes: AtomicU64::new(0),
            given_up: Notify::new(),
        });
        let mut table = lock(&self.arriving);
        let key = table.next;
        table.next += 1;
        table.senders.insert(key, Arc::clone(&sender));
        drop(table);
        let arriving = Arc::clone(&self.arriving);
        let entry = Entry { arriving, key };
        Some(Arriving {
            sender,
            entry,
            place,
        })
    }

    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return Some(place);
        }
        let mut free = pin!(Arc::clone(&self.places).acquire_owned());
        for _ in 0..ATTEMPTS {
            self.give_one_up();
            if let Ok(place) = timeout(UNHURRIED, &mut free).await {
                return place.ok();
            }
        }
        None
    }

    fn give_one_up(&self) {
        let mut table = lock(&self.arriving);
        let furthest = table
            .senders
            .iter()
            .map(|(key, sender)| (sender.on_time_until(), *key))
            .min();
        if let Some((until, key)) = furthest
            && until + UNHURRIED <= Instant::now()
            && let Some(sender) = table.senders.remove(&key)
        {
            sender.given_up.notify_one();
        }
    }

    /// Places that nobody holds.
    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.places.available_permits()
    }
}

fn lock(arriving: &Mutex<Table>) -> MutexGuard<'_, Table> {
    arriving.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A body that is arriving, in its place.
pub struct Arriving {
    sender: Arc<Sender>,
    entry: Entry,
    place: OwnedSemaphorePermit,
}

impl Arriving {
    /// The body's bytes, counted as they come.
    pub fn counted<S, E>(&self, transport: S) -> impl Stream<Item = Result<Bytes, E>> + use<S, E>
    where
        S: Stream<Item = Result<Bytes, E>>,
    {
        let sender = Arc::clone(&self.sender);
        transport.inspect(move |piece| {
            if let Ok(piece) = piece {
                sender
                    .bytes
                    .fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        })
    }

    /// Returns when there is no use in waiting for the rest: it comes too slowly, or the place is needed.
    pub async fn overdue(&self) {
        loop {
            let last = self.sender.since + ARRIVAL;
            let due = (self.sender.on_time_until() + ALLOWANCE).min(last);
            if due <= Instant::now() {
                return;
            }
            tokio::select! {
                () = self.sender.given_up.notified() => return,
                () = sleep_until(due) => {}
            }
        }
    }

    /// All has arrived: nobody can take the place any more, which is kept until what is returned is dropped.
    pub fn arrived(self) -> OwnedSemaphorePermit {
        drop(self.entry);
        self.place
    }
}

/// Of a sender who may have to give way.
struct Entry {
    arriving: Arc<Mutex<Table>>,
    key: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.arriving).senders.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::stream;
    use tokio::time::sleep;

    use super::*;

    async fn sends(arriving: &Arriving, bytes: usize) {
        let piece = Ok::<_, Infallible>(Bytes::from(vec![0; bytes]));
        let _ = arriving.counted(stream::iter([piece])).count().await;
    }

    #[tokio::test(start_paused = true)]
    async fn uploads_that_trickle_lock_nobody_out() {
        let arrivals = Arc::new(Arrivals::new(8));
        for _ in 0..8 {
            let hostile = arrivals.enter().await.unwrap();
            tokio::spawn(async move {
                let trickle = async {
                    loop {
                        sends(&hostile, 1).await;
                        sleep(Duration::from_millis(100)).await;
                    }
                };
                tokio::select! {
                    () = trickle => {}
                    () = hostile.overdue() => {}
                }
            });
        }
        sleep(Duration::from_secs(1)).await;
        // All places at once, without waiting for any limit, and no honest one is given up for another.
        let start = Instant::now();
        let mut honest = Vec::new();
        for _ in 0..8 {
            let arriving = arrivals.enter().await.unwrap();
            sends(&arriving, 64 << 10).await;
            honest.push(arriving);
        }
        assert!(start.elapsed() < UNHURRIED);
        sleep(Duration::from_secs(1)).await;
        assert!(arrivals.enter().await.is_none(), "all hurry");
        for arriving in honest {
            assert!(timeout(UNHURRIED, arriving.overdue()).await.is_err());
        }
        assert_eq!(arrivals.free(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_arrived_or_left_is_not_asked_to_give_way() {
        let arrivals = Arc::new(Arrivals::new(2));
        drop(arrivals.enter().await.unwrap());
        let _arrived = arrivals.enter().await.unwrap().arrived();
        sleep(Duration::from_secs(1)).await;
        let hostile = arrivals.enter().await.unwrap();
        tokio::spawn(async move { hostile.overdue().await });
        sleep(Duration::from_secs(1)).await;
        let start = Instant::now();
        assert!(arrivals.enter().await.is_some());
        assert!(start.elapsed() < UNHURRIED);
    }

    #[tokio::test(start_paused = true)]
    async fn who_sends_too_slowly_is_given_up() {
        let arrivals = Arrivals::new(1);
        let start = Instant::now();
        arrivals.enter().await.unwrap().overdue().await;
        assert_eq!(start.elapsed(), ALLOWANCE);

        // A second's worth for each second is enough, up to the longest time.
        let arriving = arrivals.enter().await.unwrap();
        let start = Instant::now();
        let steady = async {
            loop {
                sends(&arriving, RATE as usize).await;
                sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            () = steady => {}
            () = arriving.overdue() => {}
        }
        assert_eq!(start.elapsed(), ARRIVAL);
    }
}
