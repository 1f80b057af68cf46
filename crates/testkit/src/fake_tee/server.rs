//! The fake TEE as a service on a Unix socket. A peer is measured once, when its connection is accepted; each quote on
//! that connection carries that measurement. Peers do not affect one another: each has its own thread, a deadline
//! for every message, and a limited share of the connections.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use casemate_attest::ReportData;
use casemate_tee::wire::{self, MAX_REQUEST, Response, Timed, WireError};
use rustix::event::{PollFd, PollFlags, poll};

use super::peer::{self, Peer, PeerError};
use super::{FakeTee, FakeTeeError};

/// Where and how to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Path of the socket.
    pub socket: PathBuf,
    /// Its permission bits.
    pub mode: u32,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Most connections of one process at a time.
    pub max_per_process: usize,
    /// Longest time for one message, in either direction, once it has begun.
    pub message_timeout: Duration,
}

impl Options {
    /// A socket for its owner only.
    pub fn new(socket: PathBuf) -> Options {
        Options {
            socket,
            mode: 0o600,
            max_connections: 64,
            max_per_process: 8,
            message_timeout: Duration::from_secs(10),
        }
    }
}

/// What happened on the socket, for people and tests.
#[derive(Debug)]
pub enum Event {
    /// A peer was measured and may ask.
    Measured(Box<Peer>),
    /// A peer could not be measured and was turned away.
    NotMeasured(PeerError),
    /// A connection was turned away because there are too many.
    TooMany {
        /// The process that connected.
        pid: i32,
    },
    /// A peer was cut off for what it sent.
    CutOff(CutOff),
    /// A quote could not be made.
    Failed(FakeTeeError),
    /// A connection could not be accepted.
    Accept(io::Error),
}

/// Why a peer was cut off.
#[derive(Debug)]
pub enum CutOff {
    /// A message above the limit.
    TooLarge,
    /// A message that is not a request.
    Malformed,
    /// A message that did not arrive, or an answer that was not taken, in time or whole.
    Io(io::Error),
}

/// Time as the service sees it: seconds since the epoch.
pub type Clock = dyn Fn() -> u64 + Send + Sync;
/// Told what happens, from several threads.
pub type Observer = dyn Fn(&Event) + Send + Sync;

/// A running service; it ends when dropped.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Closed to end the acceptor.
    ending: Option<UnixStream>,
}

struct Shared {
    tee: FakeTee,
    options: Options,
    clock: Box<Clock>,
    observer: Box<Observer>,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, (i32, UnixStream)>,
}

impl Server {
    /// Starts to serve. When this returns, clients can connect.
    pub fn start(
        tee: FakeTee,
        options: Options,
        clock: Box<Clock>,
        observer: Box<Observer>,
    ) -> Result<Server, FakeTeeError> {
        let io = |source| FakeTeeError::Io {
            path: options.socket.clone(),
            source,
        };
        let listener = bind(&options.socket, options.mode).map_err(io)?;
        listener.set_nonblocking(true).map_err(io)?;
        let (ending, end) = UnixStream::pair().map_err(io)?;
        let shared = Arc::new(Shared {
            tee,
            options,
            clock,
            observer,
            connections: Mutex::default(),
        });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &end, &shared)
        });
        Ok(Server {
            shared,
            acceptor: Some(acceptor),
            ending: Some(ending),
        })
    }

    /// Serves until the process ends.
    pub fn wait(mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            // The acceptor's panic has been reported on its own thread.
            let _ = acceptor.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.ending.take());
        for (_, stream) in self.shared.connections().open.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let _ = fs::remove_file(&self.shared.options.socket);
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: &Event) {
        (self.observer)(event);
    }
}

/// Binds under a private name first, so that the socket never exists with wider permissions, and replaces a socket
/// that nobody serves any more.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    if fs::symlink_metadata(path)
        .is_ok_and(|status| !std::os::unix::fs::FileTypeExt::is_socket(&status.file_type()))
    {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let private = path.with_extension(format!("{}", std::process::id()));
    fs::create_dir(&private)?;
    let bound = (|| {
        fs::set_permissions(&private, Permissions::from_mode(0o700))?;
        let inside = private.join("s");
        let listener = UnixListener::bind(&inside)?;
        fs::set_permissions(&inside, Permissions::from_mode(mode))?;
        fs::rename(&inside, path)?;
        Ok(listener)
    })();
    let _ = fs::remove_dir_all(&private);
    bound
}

/// Accepts until the other end of `end` is closed.
fn accept(listener: &UnixListener, end: &UnixStream, shared: &Arc<Shared>) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        let polled = poll(&mut fds, None);
        if !fds[1].revents().is_empty() {
            return;
        }
        let accepted = match polled {
            Ok(_) => listener.accept(),
            Err(errno) => Err(errno.into()),
        };
        match accepted {
            Ok((stream, _)) => admit(stream, shared),
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                shared.tell(&Event::Accept(error));
                // Out of descriptors, most likely: give connections time to end.
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

fn admit(stream: UnixStream, shared: &Arc<Shared>) {
    let pid = match peer::peer_pid(&stream) {
        Ok(pid) => pid,
        Err(error) => return shared.tell(&Event::NotMeasured(error)),
    };
    let registered = match stream.try_clone() {
        Ok(registered) => registered,
        Err(error) => return shared.tell(&Event::Accept(error)),
    };
    let mut connections = shared.connections();
    let of_process = connections
        .open
        .values()
        .filter(|(other, _)| *other == pid)
        .count();
    if connections.open.len() >= shared.options.max_connections
        || of_process >= shared.options.max_per_process
    {
        drop(connections);
        return shared.tell(&Event::TooMany { pid });
    }
    let number = connections.next;
    connections.next += 1;
    connections.open.insert(number, (pid, registered));
    drop(connections);
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        let _registration = Registration {
            shared: &shared,
            number,
        };
        serve(&stream, &shared);
    });
}

/// Takes a connection off the list when its thread ends, however it ends.
struct Registration<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        if let Some((_, stream)) = self.shared.connections().open.remove(&self.number) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve(stream: &UnixStream, shared: &Shared) {
    let measured = match peer::measure_peer(stream) {
        Ok(measured) => measured,
        Err(error) => {
            let words = format!("cannot measure the peer: {error}");
            let _ = answer(stream, shared, &Response::Error(words));
            return shared.tell(&Event::NotMeasured(error));
        }
    };
    let measurement = measured.measurement;
    shared.tell(&Event::Measured(Box::new(measured)));
    loop {
        let report_data = match request(stream, shared) {
            Ok(Some(report_data)) => report_data,
            Ok(None) => return,
            Err(cut_off) => {
                let words = match &cut_off {
                    CutOff::TooLarge => format!("a request is at most {MAX_REQUEST} bytes"),
                    CutOff::Malformed => wire::MalformedRequest.to_string(),
                    CutOff::Io(_) => "the request did not arrive whole and in time".into(),
                };
                let _ = answer(stream, shared, &Response::Error(words));
                return shared.tell(&Event::CutOff(cut_off));
            }
        };
        let now = (shared.clock)();
        let response = match shared.tee.quote(&measurement, &report_data, now) {
            Ok(evidence) => Response::Evidence(Box::new(evidence)),
            Err(error) => {
                shared.tell(&Event::Failed(error));
                Response::Error("the quote could not be made".into())
            }
        };
        if let Err(error) = answer(stream, shared, &response) {
            return shared.tell(&Event::CutOff(CutOff::Io(error)));
        }
    }
}

/// The next request, or nothing when the peer has hung up. A peer may be silent for as long as it likes.
fn request(stream: &UnixStream, shared: &Shared) -> Result<Option<ReportData>, CutOff> {
    loop {
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(CutOff::Io(errno.into())),
        }
    }
    let mut timed = Timed::new(stream, shared.options.message_timeout);
    match wire::read_frame(&mut timed, MAX_REQUEST) {
        Ok(bytes) => wire::parse_request(&bytes)
            .map(Some)
            .map_err(|_| CutOff::Malformed),
        Err(WireError::Closed) => Ok(None),
        Err(WireError::TooLarge { .. }) => Err(CutOff::TooLarge),
        Err(WireError::Io(error)) => Err(CutOff::Io(error)),
    }
}

fn answer(stream: &UnixStream, shared: &Shared, response: &Response) -> io::Result<()> {
    let bytes = serde_json::to_vec(response)?;
    wire::write_frame(
        &mut Timed::new(stream, shared.options.message_timeout),
        &bytes,
    )
}
