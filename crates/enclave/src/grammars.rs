//! How many bytes are held of what schemas and functions of requests became: grammars, and names of functions, which
//! outlive the bodies they came in, until their answers are made and taken.
//!
//! Nobody waits for room: who finds none is refused at once and may come back. So that no caller takes what others need,
//! none may hold more than is left: one alone has at most half of the room, and whoever comes next at most half of the rest.
//! There is such room twice, for what is small and for what is not, so that neither stands in the other's way.
//!
//! So that nobody finds out the size of another's schema, by filling the room until somebody is refused or by the metrics,
//! each request's bytes count as the next power of two.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use casemate_engine::{Grammar, User};

/// What grammars above [`SMALL`] may take together, and again all others, in bytes.
pub const MOST: usize = 32 << 20;
/// Most schemas become less.
pub const SMALL: usize = 128 << 10;
/// What the smallest counts as.
const LEAST: usize = 1 << 10;

const _: () = assert!(
    4 * Grammar::MAX_BYTES <= MOST / 2,
    "the largest grammar, with names beside it, finds room if its caller has no other"
);

/// The bytes of all requests.
#[derive(Default)]
pub struct Grammars([Mutex<Held>; 2]);

#[derive(Default)]
struct Held {
    bytes: usize,
    /// Who holds any. Who needed no API key cannot be told from others, so all of those are one.
    callers: HashMap<Option<User>, usize>,
}

/// There is no room for more, or not for this caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too much is held already; ask again later")]
pub struct Full;

/// Of one request, given back when this is dropped.
pub struct Share {
    of: Arc<Grammars>,
    caller: Option<User>,
    bytes: usize,
}

/// What so many bytes count as.
fn padded(bytes: usize) -> usize {
    match bytes {
        0 => 0,
        bytes => bytes
            .max(LEAST)
            .checked_next_power_of_two()
            .unwrap_or(usize::MAX),
    }
}

impl Grammars {
    /// Takes room for that many bytes.
    ///
    /// # Errors
    /// [`Full`], if the caller would then hold more than is left.
    pub fn take(self: &Arc<Self>, caller: Option<User>, bytes: usize) -> Result<Share, Full> {
        let bytes = padded(bytes);
        // Who needs none is never refused.
        if bytes > 0 && !self.of(bytes).take(caller, bytes) {
            return Err(Full);
        }
        Ok(Share {
            of: Arc::clone(self),
            caller,
            bytes,
        })
    }

    /// Where so many bytes of one request count.
    fn of(&self, bytes: usize) -> MutexGuard<'_, Held> {
        lock(&self.0[usize::from(bytes > SMALL)])
    }

    /// Bytes held by all, each request's rounded up to a power of two.
    pub fn held(&self) -> usize {
        self.0.iter().map(|held| lock(held).bytes).sum()
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Held {
    /// Whether there is room, which is taken then.
    fn take(&mut self, caller: Option<User>, bytes: usize) -> bool {
        let own = self.callers.get(&caller).map_or(0, |own| *own);
        let own = own.saturating_add(bytes);
        let left = MOST.checked_sub(self.bytes.saturating_add(bytes));
        if left.is_none_or(|left| own > left) {
            return false;
        }
        self.callers.insert(caller, own);
        self.bytes += bytes;
        true
    }

    fn give_back(&mut self, caller: Option<User>, bytes: usize) {
        self.bytes -= bytes;
        if let Some(own) = self.callers.get_mut(&caller) {
            *own -= bytes;
            if *own == 0 {
                self.callers.remove(&caller);
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.of(self.bytes).give_back(self.caller, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(n: u8) -> Option<User> {
        Some(User::new([n; 32]))
    }

    /// As many shares of that many bytes as a caller gets.
    fn fill(grammars: &Arc<Grammars>, caller: Option<User>, each: usize) -> Vec<Share> {
        std::iter::from_fn(|| grammars.take(caller, each).ok()).collect()
    }

    #[test]
    fn no_caller_takes_the_room_that_others_need() {
        // Whether it is one who has a key, or all who need none.
        for greedy in [user(0), None] {
            for (each, other) in [(SMALL, SMALL + 1), (2 * SMALL, SMALL)] {
                let grammars = Arc::new(Grammars::default());
                let most = MOST / each;
                let first = fill(&grammars, greedy, each);
                assert_eq!(first.len(), most / 2);
                let second = fill(&grammars, user(1), each);
                assert_eq!(second.len(), most / 4);
                let third = fill(&grammars, user(2), each);
                assert_eq!(third.len(), most / 8);
                // Who has much gets no more of it back than others have, as long as they need theirs.
                drop(first);
                let again = fill(&grammars, greedy, each);
                assert_eq!(again.len(), (most - most / 4 - most / 8) / 2);
                // Of the other kind nothing is missing.
                let taken = fill(&grammars, greedy, other);
                assert_eq!(taken.len(), MOST / other.next_power_of_two() / 2);
                drop((again, second, third, taken));
                assert_eq!(grammars.held(), 0);
                assert!(grammars.0.iter().all(|held| lock(held).callers.is_empty()));
            }
        }
    }

    #[test]
    fn sizes_count_as_the_next_power_of_two() {
        let grammars = Arc::new(Grammars::default());
        for (bytes, counted) in [
            (0, 0),
            (1, 1024),
            (1024, 1024),
            (1025, 2048),
            (SMALL + 1, 2 * SMALL),
            (Grammar::MAX_BYTES, Grammar::MAX_BYTES),
        ] {
            let share = grammars.take(None, bytes).unwrap();
            assert_eq!(grammars.held(), counted);
            drop(share);
            assert_eq!(grammars.held(), 0);
        }
        assert!(grammars.take(None, usize::MAX).is_err());
        // Who needs none finds it even where others left nothing.
        let all: Vec<_> = (0..=255).map(|n| fill(&grammars, user(n), 1)).collect();
        assert!(grammars.take(None, 1).is_err());
        assert!(grammars.take(None, 0).is_ok());
        drop(all);
    }
}
