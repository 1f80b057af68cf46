//! Who may have a quote made, and when: making one takes a while, and anybody may ask.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Quotes made at the same time for users; more wait.
const CONCURRENT: usize = 4;
/// How many wait; more are turned away.
const WAITING: usize = 64;

/// As many quotes wait to be made as are bearable.
#[derive(Debug, thiserror::Error)]
#[error("too many wait for evidence")]
pub struct TooManyWait;

/// Gives turns.
pub struct Quotes {
    making: Arc<Semaphore>,
    waiting: Semaphore,
}

impl Default for Quotes {
    fn default() -> Quotes {
        Quotes {
            making: Arc::new(Semaphore::new(CONCURRENT)),
            waiting: Semaphore::new(WAITING),
        }
    }
}

impl Quotes {
    /// Waits for a turn, which lasts as long as the permit. Who stops waiting leaves the place to others.
    ///
    /// # Errors
    /// [`TooManyWait`], at once.
    pub async fn turn(&self) -> Result<OwnedSemaphorePermit, TooManyWait> {
        let _place = self.waiting.try_acquire().map_err(|_| TooManyWait)?;
        let turn = Arc::clone(&self.making).acquire_owned().await;
        Ok(turn.expect("the semaphore is never closed"))
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, future::join_all};

    use super::*;

    #[tokio::test]
    async fn only_so_many_wait_for_evidence() {
        let quotes = Quotes::default();
        let turns = join_all((0..CONCURRENT).map(|_| quotes.turn())).await;
        assert!(turns.iter().all(Result::is_ok));
        let mut waiting: Vec<_> = (0..WAITING).map(|_| Box::pin(quotes.turn())).collect();
        assert!(waiting.iter_mut().all(|turn| turn.now_or_never().is_none()));
        assert!(matches!(
            quotes.turn().now_or_never(),
            Some(Err(TooManyWait))
        ));
        // Who hangs up makes room for another.
        waiting.pop();
        assert!(quotes.turn().now_or_never().is_none());
        // And whose turn has ended, for one who waited.
        drop(turns);
        assert!(waiting.remove(0).await.is_ok());
    }
}
