//! Where clients arrive, and how many at once.

use std::fs;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use casemate_wire::{Address, Refusal, Timed, refuse};
use tracing::{info, warn};

use crate::backend::Device;
use crate::connection::{self, Ended, Limits, Served};
use crate::stream::Stream;
use crate::tls::{Identity, Session};

/// How long one who finds no place is listened to, so that it can read why.
const TURNED_AWAY: Duration = Duration::from_millis(50);

/// A socket on which clients arrive.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, and its file.
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens. A socket file at which nobody listens any more is replaced.
    ///
    /// # Errors
    /// The system's.
    pub fn bind(address: &Address) -> io::Result<Listener> {
        match address {
            Address::Tcp(address) => Ok(Listener::Tcp(TcpListener::bind(address)?)),
            Address::Unix(path) => {
                remove_left_over(path)?;
                let listener = UnixListener::bind(path)?;
                Ok(Listener::Unix(listener, path.clone()))
            }
        }
    }

    /// Where it listens, with the port that the system chose.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Listener::Tcp(listener) => Address::Tcp(listener.local_addr()?),
            Listener::Unix(_, path) => Address::Unix(path.clone()),
        })
    }

    /// Removes the file of a Unix socket.
    pub fn clean_up(&self) {
        if let Listener::Unix(_, path) = self {
            // What cannot be removed is replaced at the next start.
            let _ = fs::remove_file(path);
        }
    }

    fn accept(&self) -> io::Result<(Timed, Option<SocketAddr>)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                Ok((Timed::tcp(stream)?, Some(peer)))
            }
            Listener::Unix(listener, _) => Ok((Timed::unix(listener.accept()?.0), None)),
        }
    }
}

/// Removes a socket that a worker left behind which could not clean up.
fn remove_left_over(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?
            }
            _ => {}
        }
    }
    Ok(())
}

/// What all connections share.
pub struct Places {
    /// What multiplies.
    pub device: Arc<dyn Device>,
    /// How many clients at once.
    pub count: usize,
    /// Bytes that each may have for matrices.
    pub memory: u64,
    /// How long clients may take.
    pub limits: Limits,
    /// What clients are shown through TLS; without one, they are served in clear.
    pub identity: Option<Identity>,
}

impl Places {
    /// Serves a client until it leaves.
    fn serve(&self, mut socket: Timed) -> Result<Served, Ended> {
        socket.within(Some(self.limits.opening));
        let stream = match &self.identity {
            Some(identity) => Session::accept(socket, identity)
                .map_err(Ended::Handshake)?
                .into(),
            None => Stream::from(socket),
        };
        connection::serve(stream, &*self.device, self.memory, &self.limits)
    }
}

/// Serves whoever comes, for ever.
pub fn serve(listener: &Listener, places: &Arc<Places>) -> ! {
    let taken = Arc::new(AtomicUsize::new(0));
    let number = AtomicU64::new(0);
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!("cannot accept a connection: {error}");
                // Out of descriptors, most likely; they come back when connections end.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let number = number.fetch_add(1, Ordering::Relaxed) + 1;
        let from = peer.map_or_else(|| "the Unix socket".to_owned(), |peer| peer.to_string());
        let Some(place) = Place::take(&taken, places.count) else {
            info!(
                "connection {number} from {from}: all {} places are taken",
                places.count
            );
            // Through TLS it would take a handshake to be told so.
            if places.identity.is_none() {
                turn_away(stream.into());
            }
            continue;
        };
        info!("connection {number} from {from}");
        let places = Arc::clone(places);
        let serve = move || {
            let _place = place;
            match places.serve(stream) {
                Ok(served) => info!(
                    "connection {number}: closed by its client after {} matrices, {} products",
                    served.matrices, served.products
                ),
                Err(error) => warn!("connection {number}: ended: {error}"),
            }
        };
        if let Err(error) = thread::Builder::new()
            .name("connection".into())
            .spawn(serve)
        {
            warn!("connection {number}: no thread for it: {error}");
        }
    }
}

fn turn_away(mut stream: Stream) {
    stream.within(Some(TURNED_AWAY));
    if refuse(&mut stream, Refusal::Busy).is_ok() {
        stream.shutdown(Shutdown::Write);
        connection::farewell(&mut stream, TURNED_AWAY);
    }
}

/// One of the places, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>, count: usize) -> Option<Place> {
        let one_more = |taken| (taken < count).then_some(taken + 1);
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        taken.fetch_update(set, fetch, one_more).ok()?;
        Some(Place(Arc::clone(taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
