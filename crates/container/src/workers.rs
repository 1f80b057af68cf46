//! Work over the chunks of a payload on several threads, handed out in ascending order.

use std::sync::{Mutex, PoisonError};
use std::thread;

/// Scratch per thread times threads stays below this, whatever the chunk size: most of the 64 MiB that opening may take
/// beyond the weights.
const MOST_SCRATCH: u64 = 40 << 20;

/// How many threads may work when each holds `scratch` bytes.
pub(crate) fn threads_for(wanted: usize, scratch: u64) -> usize {
    wanted.clamp(1, (MOST_SCRATCH / scratch.max(1)).max(1) as usize)
}

/// Gives each of `items` to `work` on some thread, with a state that the thread keeps. After a failure no further item
/// is begun; of several failures the one with the earliest item is returned, so that the answer does not depend on
/// timing.
pub(crate) fn for_each<I, S, E>(
    threads: usize,
    items: I,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I::Item) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: Iterator + Send,
    E: Send,
{
    let queue = Mutex::new((Some(items.enumerate()), None::<(usize, E)>));
    let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    let run = || {
        let mut state = state();
        loop {
            let Some((index, item)) = lock().0.as_mut().and_then(Iterator::next) else {
                return;
            };
            if let Err(error) = work(&mut state, item) {
                let mut queue = lock();
                queue.0 = None;
                if queue
                    .1
                    .as_ref()
                    .is_none_or(|(earliest, _)| index < *earliest)
                {
                    queue.1 = Some((index, error));
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    match queue.into_inner().unwrap_or_else(PoisonError::into_inner).1 {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        let sum = AtomicUsize::new(0);
        for_each(
            4,
            0..1000,
            || (),
            |(), i| {
                sum.fetch_add(i, Ordering::Relaxed);
                Ok::<_, ()>(())
            },
        )
        .unwrap();
        assert_eq!(sum.into_inner(), 499_500);
    }

    #[test]
    fn the_earliest_failure_wins_and_stops_the_rest() {
        let begun = AtomicUsize::new(0);
        let failed = for_each(
            4,
            0..100_000,
            || (),
            |(), i| {
                begun.fetch_add(1, Ordering::Relaxed);
                if i == 10 {
                    thread::sleep(std::time::Duration::from_millis(20));
                }
                if i >= 10 { Err(i) } else { Ok(()) }
            },
        );
        assert_eq!(failed, Err(10));
        assert!(begun.into_inner() < 100);
    }

    #[test]
    fn scratch_bounds_the_threads() {
        assert_eq!(threads_for(0, 1 << 18), 1);
        assert_eq!(threads_for(64, 1 << 18), 64);
        assert_eq!(threads_for(1000, 1 << 20), 40);
        assert_eq!(threads_for(64, 1 << 22), 10);
        assert_eq!(threads_for(64, 1 << 40), 1);
    }
}
