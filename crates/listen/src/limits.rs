//! How many connections, how long they may do nothing, how large a head may be.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors left to everything that is not a served connection: files, upstream connections, standard streams.
const OTHER_DESCRIPTORS: usize = 64;

/// Limits of a [`crate::Server`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections served at once. When there is one more, the one that has been idle longest is closed.
    pub connections: usize,
    /// From accepting a connection to the end of its first request's head, a TLS handshake included; and from the first
    /// byte of a later head to its end.
    pub head: Duration,
    /// Between the end of an answer and the first byte of the next request.
    pub idle: Duration,
    /// During which a peer must take 16 KiB, or everything, of what is being sent to it.
    pub stalled: Duration,
    /// Bytes of a request's head; at least 8192.
    pub head_bytes: usize,
    /// How long running requests may go on after the end was asked for.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            head: Duration::from_secs(15),
            idle: Duration::from_secs(60),
            stalled: Duration::from_secs(30),
            head_bytes: 32 * 1024,
            grace: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// Lowers `connections` to what this process's descriptors allow, where this is its only server.
    #[must_use]
    pub fn within_descriptors(mut self) -> Self {
        self.connections = self.connections.min(connections_within_descriptors(0));
        self
    }
}

/// How many connections all servers of this process may have together, when `reserved` descriptors are needed beside the
/// usual few. Raises the soft limit on descriptors to the hard one.
///
/// Without it a limit on connections above the usual 1024 descriptors would not be the one that acts: accepting would
/// fail, and idle connections would lock everybody out after all. A process with several servers divides the figure.
#[must_use]
pub fn connections_within_descriptors(reserved: usize) -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let most = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    };
    let most = most.map_or(usize::MAX, |most| {
        usize::try_from(most).unwrap_or(usize::MAX)
    });
    most.saturating_sub(OTHER_DESCRIPTORS)
        .saturating_sub(reserved)
        .max(1)
}
