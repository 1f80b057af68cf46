//! How much memory connections may take.
//!
//! The limit of the whole worker is divided evenly among its places, so no client can take what another one was offered. Of
//! a share, what messages on their way can take at most is set aside; the rest is for matrices and is what
//! WELCOME says. A matrix is counted as it is kept, and while it is loaded its weights as they come are counted too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The largest payload of a frame, in bytes.
pub const MAX_PAYLOAD: u32 = 8 << 20;

/// Products that a client may have on their way.
pub const WINDOW: u16 = 4;

/// Most rows of one product.
pub const MAX_ROWS: u16 = 1024;

/// What messages of a connection can take at most, in payloads: those that wait, one that is read and
/// one that is computed with; of the latter its digits, in two forms, and of its product the sums of
/// four digits, elements, and a copy.
const PAYLOADS: u64 = WINDOW as u64 + 2 + 2 + 4 + 2;

/// What a share needs besides matrices, in bytes.
pub const OVERHEAD: u64 = PAYLOADS * MAX_PAYLOAD as u64;

/// The least that a share may leave to matrices.
const LEAST: u64 = 16 << 20;

/// The memory of one place, for matrices.
#[derive(Debug)]
pub struct Share {
    limit: u64,
    taken: Arc<AtomicU64>,
}

/// Memory that counts until this is dropped.
#[derive(Debug)]
pub struct Taken {
    from: Arc<AtomicU64>,
    bytes: u64,
}

/// A limit under which no place has room for anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{places} connections need at least {least} bytes of memory, {limit} are too little")]
pub struct TooLittle {
    places: u64,
    least: u64,
    limit: u64,
}

impl Share {
    /// What each of so many places gets of a limit for all.
    ///
    /// # Errors
    /// [`TooLittle`].
    pub fn of(limit: u64, places: u64) -> Result<u64, TooLittle> {
        let each = limit / places.max(1);
        match each.checked_sub(OVERHEAD) {
            Some(rest) if rest >= LEAST => Ok(rest),
            _ => {
                let least = (OVERHEAD + LEAST) * places;
                Err(TooLittle {
                    places,
                    least,
                    limit,
                })
            }
        }
    }

    /// A share of so many bytes.
    #[must_use]
    pub fn new(limit: u64) -> Share {
        let taken = Arc::default();
        Share { limit, taken }
    }

    /// All of it.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What is left of it.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.limit
            .saturating_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Takes so many bytes, or none if they are not left.
    #[must_use]
    pub fn take(&self, bytes: u64) -> Option<Taken> {
        let add = |taken: u64| {
            let sum = taken.checked_add(bytes)?;
            (sum <= self.limit).then_some(sum)
        };
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.taken.fetch_update(set, fetch, add).ok()?;
        let from = Arc::clone(&self.taken);
        Some(Taken { from, bytes })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.from.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A number of bytes as people write it: `512MiB`, `4GiB`.
///
/// # Errors
/// What is wrong with it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(split.unwrap_or(text.len()));
    let shift = match unit {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return Err(format!("`{unit}` is not KiB, MiB or GiB")),
    };
    let bytes = number
        .parse()
        .ok()
        .and_then(|n: u64| n.checked_mul(1 << shift));
    let sensible = bytes.filter(|n| (1..=1 << 50).contains(n));
    sensible.ok_or_else(|| format!("`{text}` is not a size such as 512MiB or 4GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_counts_until_it_is_given_back() {
        let share = Share::new(100);
        let first = share.take(60).expect("there is room");
        assert!(share.take(41).is_none());
        assert!(share.take(u64::MAX).is_none());
        let second = share.take(40).expect("there is room");
        assert_eq!(share.left(), 0);
        drop(first);
        assert_eq!(share.left(), 60);
        drop(second);
        assert_eq!(share.left(), 100);
    }

    #[test]
    fn places_have_equal_shares_with_room_for_something() {
        assert_eq!(Share::of(2 * (OVERHEAD + LEAST), 2), Ok(LEAST));
        assert_eq!(Share::of(4 << 30, 1), Ok((4 << 30) - OVERHEAD));
        assert!(Share::of(2 * (OVERHEAD + LEAST) - 2, 2).is_err());
        assert!(Share::of(0, 1).is_err());
    }

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        for wrong in [
            "",
            "0",
            "GiB",
            "1GB",
            "-1",
            "99999999999GiB",
            "1.5GiB",
            "18446744073709551615GiB",
        ] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
