//! A stream that reports what it does, and gives up on a peer which does not take what is sent to it.
//!
//! Taking a byte now and then is not enough: it would keep a connection, and an answer's memory, for as long as anybody
//! likes. While something waits to be sent, each window of time must see [`LEAST`] bytes go out, or all that waited.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::activity::Activity;

/// What a peer must take in each window of time, in bytes, unless it takes everything.
pub(crate) const LEAST: usize = 16 << 10;

/// A stream whose writes fail with `TimedOut` when a peer takes less than [`LEAST`] bytes during `limit`. A write that fails ends the
/// connection, and with it whatever was being computed for it.
pub(crate) struct Progress<I> {
    io: I,
    activity: Arc<Activity>,
    limit: Duration,
    /// Runs from the moment at which a write is blocked until nothing waits.
    window: Option<Window>,
}

struct Window {
    end: Pin<Box<Sleep>>,
    /// Bytes taken in it.
    taken: usize,
}

impl<I> Progress<I> {
    pub(crate) fn new(io: I, activity: Arc<Activity>, limit: Duration) -> Self {
        Self {
            io,
            activity,
            limit,
            window: None,
        }
    }

    /// Passes on the outcome of an attempt to write. That the stream took all of it says nothing: below TLS it may wait
    /// in a buffer.
    fn wrote(
        &mut self,
        context: &mut Context<'_>,
        outcome: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match outcome {
            Poll::Pending => self.blocked(context),
            Poll::Ready(Ok(bytes)) => {
                if let Some(window) = &mut self.window {
                    window.taken += bytes;
                    if window.taken >= LEAST {
                        window.taken = 0;
                        window.end.as_mut().reset(Instant::now() + self.limit);
                    }
                }
                outcome
            }
            Poll::Ready(Err(_)) => outcome,
        }
    }

    /// Passes on the outcome of an attempt to send all that waits.
    fn flushed(
        &mut self,
        context: &mut Context<'_>,
        outcome: Poll<io::Result<()>>,
    ) -> Poll<io::Result<()>> {
        if outcome.is_pending() {
            return self.blocked(context);
        }
        if self.window.take().is_some() {
            self.activity.blocked(false);
        }
        outcome
    }

    fn blocked<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        let limit = self.limit;
        let window = self.window.get_or_insert_with(|| {
            self.activity.blocked(true);
            Window {
                end: Box::pin(sleep(limit)),
                taken: 0,
            }
        });
        ready!(window.end.as_mut().poll(context));
        window.end.as_mut().reset(Instant::now() + limit);
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the peer does not read",
        )))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Progress<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.io).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.activity.received();
        }
        outcome
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Progress<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.io).poll_write(context, bytes);
        self.wrote(context, outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.io).poll_flush(context);
        self.flushed(context, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.io).poll_shutdown(context);
        self.flushed(context, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.io).poll_write_vectored(context, slices);
        self.wrote(context, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
