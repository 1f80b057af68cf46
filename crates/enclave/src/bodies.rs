//! How many bytes of requests' bodies are held, in one of two places: while they arrive, and from then on until they are
//! parsed. What outlives that is counted by [`crate::grammars`].
//!
//! Places for requests that arrive, and threads that prepare them, are few; but a few large bodies are a lot of memory,
//! and any number of requests may wait for a thread. So bytes are counted. Nobody waits for room: whoever would need more
//! than there is, is refused at once and may come back. So nobody holds some while it waits for others' room, and
//! nobody's large body stands before small ones in a queue. Of each budget, what is large leaves a quarter to what is not.
//! Bodies that arrive may have the room of senders who have stopped sending ([`crate::arrival`]): for those, who leave
//! at once, they do wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Bytes;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// What bodies may hold while they arrive, in bytes, and again what those may hold that have arrived. A body is at most
/// 4 MiB, and 8 MiB padded and encrypted: five of those find room at once, beside 128 that are small. It is little beside
/// the weights of a model.
pub const MOST: usize = 64 << 20;
/// What only bodies that hold no more than [`SMALL`] may fill.
const RESERVED: usize = MOST / 4;
/// Most chats, padded to 64 KiB or less, are below that.
const SMALL: usize = 128 << 10;

const _: () = assert!(
    crate::gateway::MAX_ENCAPSULATED <= (MOST - RESERVED) as u64,
    "the largest request finds room if nobody else is there"
);

/// Bytes of one of these places.
#[derive(Default)]
pub struct Bodies {
    held: AtomicUsize,
    /// Told when somebody's room is given back.
    given_back: Notify,
}

/// There is no room for more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too much is held already: {missing} bytes must go first")]
pub struct Full {
    /// How many bytes others would have to give back.
    pub missing: usize,
}

impl Bodies {
    /// Room for a body of which nothing is there yet.
    #[must_use]
    pub fn room(self: &Arc<Self>) -> Room {
        Room {
            bodies: Arc::clone(self),
            bytes: AtomicUsize::new(0),
        }
    }

    /// Bytes held by all.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// Of one body, given back when this is dropped.
pub struct Room {
    bodies: Arc<Bodies>,
    bytes: AtomicUsize,
}

impl Room {
    /// Takes room for that many bytes more.
    ///
    /// # Errors
    /// [`Full`]; what was taken before stays.
    pub fn grow(&self, by: usize) -> Result<(), Full> {
        if by == 0 {
            return Ok(());
        }
        let own = self.bytes.load(Ordering::Relaxed).saturating_add(by);
        let most = match own {
            ..=SMALL => MOST,
            _ => MOST - RESERVED,
        };
        let add = |held: usize| held.checked_add(by).filter(|held| *held <= most);
        let held = &self.bodies.held;
        match held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => {
                self.bytes.fetch_add(by, Ordering::Relaxed);
                Ok(())
            }
            Err(held) => Err(Full {
                missing: held.saturating_add(by) - most,
            }),
        }
    }

    /// Completes when any body gives its room back after this was called.
    pub fn given_back(&self) -> Notified<'_> {
        self.bodies.given_back.notified()
    }

    /// The body, which keeps its room until the last reference to its bytes is dropped.
    #[must_use]
    pub fn keep(self, body: Bytes) -> Bytes {
        Bytes::from_owner(Kept { body, _room: self })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let bytes = self.bytes.load(Ordering::Relaxed);
        self.bodies.held.fetch_sub(bytes, Ordering::Relaxed);
        self.bodies.given_back.notify_waiters();
    }
}

/// Dropped in this order: the bytes before their room.
struct Kept {
    body: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Room for bodies of that many bytes each, until there is no more.
    fn fill(bodies: &Arc<Bodies>, each: usize) -> Vec<Room> {
        let mut rooms = Vec::new();
        loop {
            let room = bodies.room();
            match room.grow(each) {
                Ok(()) => rooms.push(room),
                Err(Full { .. }) => return rooms,
            }
        }
    }

    #[test]
    fn large_bodies_leave_room_for_small_ones() {
        let bodies = Arc::new(Bodies::default());
        let large = fill(&bodies, 8 << 20);
        assert_eq!(large.len(), 6);
        let small = fill(&bodies, SMALL);
        assert_eq!(small.len(), RESERVED / SMALL);
        assert_eq!(bodies.held(), MOST);
        // What is small grows no larger in there.
        drop(small);
        let growing = bodies.room();
        growing.grow(SMALL).unwrap();
        assert_eq!(growing.grow(1), Err(Full { missing: SMALL + 1 }));
        drop(large);
        growing.grow(1).unwrap();
        assert_eq!(bodies.held(), SMALL + 1);
        drop(growing);
        assert_eq!(bodies.held(), 0);
    }

    #[test]
    fn the_last_reference_to_a_body_gives_its_room_back() {
        let bodies = Arc::new(Bodies::default());
        let room = bodies.room();
        room.grow(8).unwrap();
        let mut body = room.keep(Bytes::from_static(b"{\"a\":1}"));
        assert_eq!(body, &b"{\"a\":1}"[..]);
        let part = body.split_to(1);
        drop(body);
        assert_eq!(bodies.held(), 8);
        drop(part);
        assert_eq!(bodies.held(), 0);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let bodies = Arc::new(Bodies::default());
        let room = bodies.room();
        room.grow(1).unwrap();
        let most = MOST - RESERVED;
        let missing = usize::MAX - most;
        assert_eq!(room.grow(usize::MAX), Err(Full { missing }));
        assert_eq!(bodies.held(), 1);
    }
}
