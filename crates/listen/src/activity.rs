//! What a connection is doing, as far as deciding about its end goes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::limits::Limits;

/// One connection.
pub(crate) struct Activity {
    state: Mutex<State>,
    /// Told when the deadline may have changed, or the connection is to be closed.
    pub(crate) changed: Notify,
    /// Told when this connection, which was busy, may give way.
    became_idle: Arc<Notify>,
}

struct State {
    /// Requests whose answer is not complete.
    requests: usize,
    /// The peer does not take what is being sent.
    blocked: bool,
    /// Since when there is no request.
    idle_since: Instant,
    /// When the head that is arriving began.
    head_since: Option<Instant>,
    /// Its place is needed.
    evicted: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.requests == 0 && !self.blocked
    }

    /// Whether it gives way to a newcomer: nothing is being made for it, even if its peer does not take the rest of what
    /// was.
    fn gives_way(&self) -> bool {
        self.requests == 0
    }
}

impl Activity {
    fn new(became_idle: Arc<Notify>) -> Self {
        let now = Instant::now();
        let state = State {
            requests: 0,
            blocked: false,
            idle_since: now,
            // The first request is due from the beginning; there is nothing to keep a connection for before it.
            head_since: Some(now),
            evicted: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Notify::new(),
            became_idle,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// Bytes arrived. Between requests they are the beginning of the next.
    pub(crate) fn received(&self) {
        let mut state = self.state();
        if state.is_idle() && state.head_since.is_none() {
            state.head_since = Some(Instant::now());
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Sending is blocked, or no longer.
    pub(crate) fn blocked(&self, blocked: bool) {
        let mut state = self.state();
        if state.blocked != blocked {
            state.blocked = blocked;
            self.settle(state);
        }
    }

    /// A request's head is complete. It runs until what is returned is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> Running {
        let mut state = self.state();
        state.requests += 1;
        state.head_since = None;
        drop(state);
        self.changed.notify_one();
        Running(Arc::clone(self))
    }

    /// After a change that may have made it idle, or one that may give way.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        if state.gives_way() {
            state.idle_since = Instant::now();
            self.became_idle.notify_one();
        }
        drop(state);
        self.changed.notify_one();
    }

    /// When the connection is to be closed if nothing changes; `None` while it is in use.
    pub(crate) fn deadline(&self, limits: &Limits) -> Option<Instant> {
        let state = self.state();
        if state.evicted {
            return Some(Instant::now());
        }
        if !state.is_idle() {
            return None;
        }
        Some(match state.head_since {
            Some(since) => since + limits.head,
            None => state.idle_since + limits.idle,
        })
    }

    /// Whether its place was needed.
    pub(crate) fn is_evicted(&self) -> bool {
        self.state().evicted
    }
}

/// A request whose answer is not complete.
pub(crate) struct Running(Arc<Activity>);

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.requests -= 1;
        self.0.settle(state);
    }
}

/// All connections.
#[derive(Default)]
pub(crate) struct Registry {
    connections: Mutex<Connections>,
    /// Told when a connection became one that may give way.
    pub(crate) became_idle: Arc<Notify>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    /// In the order in which they came, so that of several that have been idle equally long the oldest goes.
    open: BTreeMap<u64, Arc<Activity>>,
}

impl Registry {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// Enters a connection, until what is returned is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Entry {
        let activity = Arc::new(Activity::new(Arc::clone(&self.became_idle)));
        let mut connections = self.connections();
        let key = connections.next;
        connections.next += 1;
        connections.open.insert(key, Arc::clone(&activity));
        Entry {
            registry: Arc::clone(self),
            key,
            activity,
        }
    }

    /// Closes the connection that has been idle longest; returns whether there is one, or one is being closed already.
    pub(crate) fn evict(&self) -> bool {
        let connections = self.connections();
        let mut longest: Option<(Instant, &Arc<Activity>)> = None;
        for activity in connections.open.values() {
            let state = activity.state();
            if state.evicted {
                return true;
            }
            if state.gives_way() && longest.is_none_or(|(since, _)| state.idle_since < since) {
                longest = Some((state.idle_since, activity));
            }
        }
        let Some((_, activity)) = longest else {
            return false;
        };
        let mut state = activity.state();
        // A request may have come meanwhile; then another one has to go.
        if !state.gives_way() {
            drop(state);
            drop(connections);
            return self.evict();
        }
        state.evicted = true;
        drop(state);
        activity.changed.notify_one();
        true
    }
}

/// A connection's place in the registry.
pub(crate) struct Entry {
    registry: Arc<Registry>,
    key: u64,
    pub(crate) activity: Arc<Activity>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.registry.connections().open.remove(&self.key);
    }
}
