//! The accept loop.
//!
//! # When all places are taken
//! One more connection takes the place of the one that has been idle longest: connected and silent, in the middle of a
//! request's head, or kept open after an answer. Letting newcomers wait instead would let anybody lock everybody out
//! with as many idle connections as there are places. As it is, an attacker who opens connections as fast as it can
//! ends its own oldest ones first; a newcomer has the time in which the whole list turns over to send its request, and
//! a kept connection that is closed costs its client one reconnection. A connection whose peer does not take the end of a
//! finished answer counts as idle here. A connection with a request under way is never closed for this. If all of them have one, newcomers wait in the listener's queue: then the places are used for what
//! they are for, and what a request may hold is its handler's to limit.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::serve::Listener;
use hyper::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use tower::ServiceExt;

use crate::activity::{Entry, Registry, Running};
use crate::limits::Limits;
use crate::progress::Progress;

/// Makes an accepted stream into one that HTTP is spoken on, and says what serves it.
///
/// A [`Router`] does nothing to the stream. A TLS listener makes its handshake here; it is part of the connection's own
/// task and of [`Limits::head`], so a peer that does not finish it holds nobody up. What it learns of the connection, it
/// may add to the router it returns as an extension, for every request on that connection.
pub trait Establish<S>: Send + Sync + 'static {
    /// The stream that HTTP is spoken on.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Prepares one connection; an error ends it.
    fn establish(&self, stream: S) -> impl Future<Output = io::Result<(Self::Io, Router)>> + Send;
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Establish<S> for Router {
    type Io = S;

    async fn establish(&self, stream: S) -> io::Result<(S, Router)> {
        Ok((stream, self.clone()))
    }
}

/// Figures for operators.
#[derive(Debug, Default)]
pub struct Counters {
    open: AtomicUsize,
    evicted: AtomicU64,
}

impl Counters {
    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Connections that were closed because their place was needed.
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}

/// How serving ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// Connections whose requests were still running when the grace was over.
    pub cut_off: usize,
}

/// Serves HTTP on the connections of a listener.
pub struct Server {
    limits: Limits,
    counters: Arc<Counters>,
}

impl Server {
    /// A server with these limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            counters: Arc::default(),
        }
    }

    /// The figures of this server, to keep.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Serves until `shutdown` is complete; then accepts no more, closes idle connections, and lets running requests end
    /// within the grace.
    pub async fn serve<L, E>(
        self,
        mut listener: L,
        establish: E,
        shutdown: impl Future<Output = ()>,
    ) -> Ended
    where
        L: Listener,
        L::Io: Send + 'static,
        E: Establish<L::Io>,
    {
        let limits = Arc::new(self.limits);
        let establish = Arc::new(establish);
        let (closing, closed) = watch::channel(false);
        let places = Arc::new(Semaphore::new(limits.connections));
        let registry = Arc::new(Registry::default());
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let next = async {
                let (stream, _) = listener.accept().await;
                (stream, place(&places, &registry).await)
            };
            let (stream, place) = tokio::select! {
                () = &mut shutdown => break,
                next = next => next,
            };
            while connections.try_join_next().is_some() {}
            let connection = Connection {
                entry: registry.enter(),
                limits: Arc::clone(&limits),
                counted: Counted::new(&self.counters),
                closed: closed.clone(),
                _place: place,
            };
            connections.spawn(connection.run(stream, Arc::clone(&establish)));
        }
        drop(listener);
        let _ = closing.send(true);
        let all = async { while connections.join_next().await.is_some() {} };
        let cut_off = match timeout(limits.grace, all).await {
            Ok(()) => 0,
            Err(_) => connections.len(),
        };
        Ended { cut_off }
    }
}

/// A place for one more connection: a free one, or that of the connection which has been idle longest.
async fn place(places: &Arc<Semaphore>, registry: &Registry) -> OwnedSemaphorePermit {
    loop {
        if let Ok(place) = Arc::clone(places).try_acquire_owned() {
            return place;
        }
        registry.evict();
        tokio::select! {
            place = Arc::clone(places).acquire_owned() => {
                return place.expect("the semaphore is never closed");
            }
            () = registry.became_idle.notified() => {}
        }
    }
}

/// Counts a connection while it is open.
struct Counted(Arc<Counters>);

impl Counted {
    fn new(counters: &Arc<Counters>) -> Self {
        counters.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counters))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Connection {
    entry: Entry,
    limits: Arc<Limits>,
    counted: Counted,
    closed: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run<S, E: Establish<S>>(self, stream: S, establish: Arc<E>) {
        let activity = Arc::clone(&self.entry.activity);
        let limits = Arc::clone(&self.limits);
        let mut closed = self.closed.clone();
        // What a client does to its own connection is its own business: errors end it and are not logged.
        let (io, router) = tokio::select! {
            established = establish.establish(stream) => match established {
                Ok(established) => established,
                Err(_) => return,
            },
            () = self.overdue() => return,
            _ = closed.wait_for(|closed| *closed) => return,
        };
        let io = Progress::new(io, Arc::clone(&activity), limits.stalled);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // Kept here, where a head can be told from an idle connection.
            .header_read_timeout(None)
            .max_buf_size(limits.head_bytes)
            .serve_connection(
                TokioIo::new(io),
                service_fn(|request| answer(activity.begin(), router.clone(), request)),
            );
        let mut connection = pin!(connection);
        tokio::select! {
            _ = connection.as_mut() => return,
            () = self.overdue() => return,
            _ = closed.wait_for(|closed| *closed) => {}
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            _ = connection => {}
            () = self.overdue() => {}
        }
    }

    /// Returns when the connection is to be closed for what it does not do.
    async fn overdue(&self) {
        let activity = &self.entry.activity;
        loop {
            let changed = activity.changed.notified();
            match activity.deadline(&self.limits) {
                None => changed.await,
                Some(deadline) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(deadline) => break,
                },
            }
        }
        if activity.is_evicted() {
            self.counted.0.evicted.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn answer(
    running: Running,
    router: Router,
    request: Request<Incoming>,
) -> Result<hyper::Response<Answer>, Infallible> {
    let response = router.oneshot(request.map(Body::new)).await?;
    Ok(response.map(|body| Answer {
        body,
        _running: running,
    }))
}

/// An answer's body, during which its request runs.
struct Answer {
    body: Body,
    _running: Running,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
