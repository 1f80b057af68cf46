//! Threads for what requests cost before and after they are computed: parsing, rendering, tokenizing.
//!
//! A prompt of some megabytes takes a thread for a good while. Were it one of those that accept connections, decrypt and
//! pass tokens on, everybody would wait for it. Here only as many requests as there are threads are being prepared at
//! once, and others wait behind them while running answers go on; how many bytes may wait is told in [`crate::bodies`].

use std::future::Future;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// A runtime of its own.
#[derive(Clone)]
pub struct Workers(Handle);

impl Workers {
    /// Work goes to the threads of this runtime, which must not be the caller's.
    #[must_use]
    pub fn new(handle: Handle) -> Self {
        Self(handle)
    }

    /// Runs `work` there; dropping what is returned ends it at its next pause. `None` when it panicked or the program is
    /// stopping.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let mut task = Abandoned(self.0.spawn(work));
        (&mut task.0).await.ok()
    }
}

/// Ends a task that nobody waits for.
struct Abandoned<T>(JoinHandle<T>);

impl<T> Drop for Abandoned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::runtime::Builder;
    use tokio::sync::oneshot;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap()
    }

    #[test]
    fn a_long_prompt_does_not_hold_up_those_who_pass_tokens_on() {
        let other = runtime();
        let workers = Workers::new(other.handle().clone());
        let serving = Builder::new_current_thread().build().unwrap();
        let (done, work) = mpsc::channel();
        let tokenized = serving.block_on(async {
            // Takes its thread until the serving one, which it would block, lets it go on.
            let prepared = workers.run(async move { work.recv_timeout(Duration::from_secs(60)) });
            let others = async { done.send(7).unwrap() };
            tokio::join!(prepared, others).0
        });
        assert_eq!(tokenized, Some(Ok(7)));
    }

    #[test]
    fn work_that_nobody_waits_for_ends() {
        let other = runtime();
        let workers = Workers::new(other.handle().clone());
        let serving = Builder::new_current_thread().build().unwrap();
        serving.block_on(async {
            let (held, dropped) = oneshot::channel::<()>();
            let (begun, begins) = oneshot::channel();
            let endless = workers.run(async move {
                let _held = held;
                begun.send(()).unwrap();
                std::future::pending::<()>().await;
            });
            tokio::select! {
                _ = endless => unreachable!("it has no end"),
                begins = begins => begins.unwrap(),
            }
            assert!(dropped.await.is_err(), "it is gone");
        });
    }

    #[test]
    fn a_panic_is_nobody_elses() {
        let other = runtime();
        let workers = Workers::new(other.handle().clone());
        let serving = Builder::new_current_thread().build().unwrap();
        serving.block_on(async {
            assert_eq!(
                workers.run(async { panic!("on purpose") }).await,
                None::<()>
            );
            assert_eq!(workers.run(async { 1 }).await, Some(1));
        });
    }
}
