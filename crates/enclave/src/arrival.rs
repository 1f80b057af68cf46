//! Places for requests whose body is arriving, and who loses one.
//!
//! Anybody may begin a request and send no more of it, so a place, and the room for what came, are kept only by arriving.
//! Two things are asked of a sender:
//!
//! - On the whole a body comes at [`RATE`]. Who is behind that by more than [`ALLOWANCE`], or is not done after
//!   [`ARRIVAL`], is given up, whether anybody needs the place or not.
//! - At every moment it keeps its *pace*: [`RATE`], or a [`ARRIVAL`]th of what has come for each second, whichever is
//!   more. Who came early is on time for `AHEAD` at most, so a burst buys no rest. Only when places, or bytes, are short
//!   does it matter: then whoever is furthest behind its pace gives way.
//!
//! A body that comes evenly and within the time is never behind its pace. Who holds places or bytes with bodies that
//! trickle in, or have stopped, loses them to people whose bodies come at an ordinary pace, and not the other way round.
//!
//! All times are `tokio::time`, so tests pause and advance them.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::bodies::{Full, Room};

/// The least rate at which a body must come, in bytes per second.
pub const RATE: u64 = 4 << 10;
/// How far behind that rate a sender may fall on the whole.
pub const ALLOWANCE: Duration = Duration::from_secs(5);
/// The longest time for a request to arrive, at whatever rate.
pub const ARRIVAL: Duration = Duration::from_secs(30);
/// How long what came early keeps a sender on time. With [`UNHURRIED`] it is less than a newcomer waits, so no burst, of
/// whatever size, turns anybody away by itself: to hold a place is to send all the time.
const AHEAD: Duration = Duration::from_millis(500);
/// Nobody who is less behind gives way to a newcomer, who rather waits as long.
const UNHURRIED: Duration = Duration::from_millis(250);
/// How often a newcomer asks for a place, that long each time, before it is told to come back.
const ATTEMPTS: u32 = 4;

const _: () = assert!(
    AHEAD.as_millis() + UNHURRIED.as_millis() < ATTEMPTS as u128 * UNHURRIED.as_millis(),
    "a newcomer waits for longer than a burst lasts"
);

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

impl Table {
    /// Gives up whoever is furthest behind.
    fn give_one_up(&self) {
        let now = Instant::now();
        let late = self.senders.values().filter_map(|sender| {
            let late = sender.progress().late(now)?;
            Some((late, sender))
        });
        if let Some((_, sender)) = late.max_by_key(|(late, _)| *late) {
            sender.give_up();
        }
    }

    /// Gives up those who have held most for longest beyond their time, until that many bytes will be free. Nobody, and
    /// false, if all who are behind do not hold as much.
    fn give_up_bytes(&self, wanted: usize) -> bool {
        let now = Instant::now();
        let wanted = wanted as u64;
        let (mut leaving, mut behind) = (0_u64, 0_u64);
        let mut late_ones = Vec::new();
        for sender in self.senders.values() {
            let progress = sender.progress();
            if progress.given_up {
                leaving += progress.bytes;
            } else if let Some(late) = progress.late(now) {
                behind += progress.bytes;
                let weight = late.as_millis() * u128::from(progress.bytes);
                late_ones.push((weight, progress.bytes, sender));
            }
        }
        if leaving + behind < wanted {
            return false;
        }
        late_ones.sort_unstable_by_key(|(weight, ..)| std::cmp::Reverse(*weight));
        for (_, bytes, sender) in late_ones {
            if leaving >= wanted {
                break;
            }
            sender.give_up();
            leaving += bytes;
        }
        true
    }
}

/// One body.
struct Sender {
    since: Instant,
    progress: Mutex<Progress>,
    told: Notify,
}

/// What has come of it.
struct Progress {
    bytes: u64,
    /// Until when it keeps its pace if nothing more comes.
    on_time_until: Instant,
    /// It is leaving.
    given_up: bool,
}

impl Progress {
    /// How far behind its pace it is, if so far that it gives way and does not already.
    fn late(&self, now: Instant) -> Option<Duration> {
        let late = now.saturating_duration_since(self.on_time_until);
        (late >= UNHURRIED && !self.given_up).then_some(late)
    }
}

impl Sender {
    fn new() -> Sender {
        let since = Instant::now();
        Sender {
            since,
            progress: Mutex::new(Progress {
                bytes: 0,
                on_time_until: since,
                given_up: false,
            }),
            told: Notify::new(),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    fn came(&self, bytes: usize) {
        let bytes = bytes as u64;
        let mut progress = self.progress();
        progress.bytes += bytes;
        let pace = RATE.max(progress.bytes / ARRIVAL.as_secs());
        let earned = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / pace);
        let most = Instant::now() + AHEAD;
        progress.on_time_until = (progress.on_time_until + earned).min(most);
    }

    /// When it is given up if nothing more comes, whether anybody needs the place or not.
    fn due(&self) -> Instant {
        let enough = Duration::from_millis(self.progress().bytes.saturating_mul(1000) / RATE);
        self.since + (enough + ALLOWANCE).min(ARRIVAL)
    }

    fn give_up(&self) {
        self.progress().given_up = true;
        self.told.notify_one();
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
        let sender = Arc::new(Sender::new());
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
            lock(&self.arriving).give_one_up();
            if let Ok(place) = timeout(UNHURRIED, &mut free).await {
                return place.ok();
            }
        }
        None
    }

    /// Places that nobody holds.
    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.places.available_permits()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
                sender.came(piece.len());
            }
        })
    }

    /// The body's bytes, counted as they come and kept in `room`; others who are behind give way to them if there is none.
    pub fn kept<S, E>(
        &self,
        room: &Arc<Room>,
        transport: S,
    ) -> impl Stream<Item = Result<Bytes, E>> + use<S, E>
    where
        S: Stream<Item = Result<Bytes, E>>,
        E: From<Full>,
    {
        let (table, room) = (Arc::clone(&self.entry.arriving), Arc::clone(room));
        self.counted(transport).then(move |piece| {
            let (table, room) = (Arc::clone(&table), Arc::clone(&room));
            async move {
                let piece = piece?;
                grow(&table, &room, piece.len()).await?;
                Ok(piece)
            }
        })
    }

    /// Returns when there is no use in waiting for the rest: it comes too slowly, or what it holds is needed.
    pub async fn overdue(&self) {
        loop {
            let due = self.sender.due();
            if due <= Instant::now() {
                return;
            }
            tokio::select! {
                () = self.sender.told.notified() => return,
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

/// Takes room for that many bytes more. Waits only for those who leave for it, and refuses at once if nobody does.
async fn grow(table: &Mutex<Table>, room: &Room, by: usize) -> Result<(), Full> {
    let patience = Instant::now() + ATTEMPTS * UNHURRIED;
    loop {
        // Made before it is asked, so that nothing that is given back in between is missed.
        let given_back = room.given_back();
        let Err(full) = room.grow(by) else {
            return Ok(());
        };
        if !lock(table).give_up_bytes(full.missing)
            || timeout_at(patience, given_back).await.is_err()
        {
            return Err(full);
        }
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
mod tests;
