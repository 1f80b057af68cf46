//! Where a worker is, and sockets whose reads and writes end in time.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_keepalive, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Where a worker listens: `unix:PATH` or `tcp:IP:PORT`. Names are not resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// An address and a port.
    Tcp(SocketAddr),
}

/// It is neither `unix:PATH` nor `tcp:IP:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an address is unix:PATH or tcp:IP:PORT")]
pub struct NoAddress;

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Address, NoAddress> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
            Some(("tcp", address)) => address.parse().map(Address::Tcp).map_err(|_| NoAddress),
            _ => Err(NoAddress),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl Address {
    /// Connects within a time.
    ///
    /// # Errors
    /// The system's; `TimedOut` or `WouldBlock` if nobody answered in time.
    pub fn connect(&self, within: Duration) -> io::Result<Timed> {
        match self {
            Address::Tcp(address) => Timed::tcp(TcpStream::connect_timeout(address, within)?),
            Address::Unix(path) => {
                let address = SocketAddrUnix::new(path)?;
                let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
                let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
                // Connecting waits while the other's queue is full, for as long as sending may.
                set_socket_timeout(&socket, Timeout::Send, Some(within))?;
                connect(&socket, &address)?;
                set_socket_timeout(&socket, Timeout::Send, None)?;
                Ok(Timed::unix(UnixStream::from(socket)))
            }
        }
    }
}

/// A socket whose reads and writes fail with `TimedOut` once a time has come, however little or
/// much moved before.
#[derive(Debug)]
pub struct Timed {
    socket: Socket,
    deadline: Option<Instant>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// What both kinds of sockets do.
macro_rules! either {
    ($socket:expr, $s:ident => $body:expr) => {
        match $socket {
            Socket::Tcp($s) => $body,
            Socket::Unix($s) => $body,
        }
    };
}

impl Timed {
    /// A TCP connection, which then sends at once and notices that its peer is gone.
    ///
    /// # Errors
    /// The system's.
    pub fn tcp(socket: TcpStream) -> io::Result<Timed> {
        socket.set_nodelay(true)?;
        set_socket_keepalive(&socket, true)?;
        Ok(Timed::new(Socket::Tcp(socket)))
    }

    /// A connection over a Unix socket.
    #[must_use]
    pub fn unix(socket: UnixStream) -> Timed {
        Timed::new(Socket::Unix(socket))
    }

    fn new(socket: Socket) -> Timed {
        let deadline = None;
        Timed { socket, deadline }
    }

    /// From now on everything must be done within this time; without one, nothing must.
    pub fn within(&mut self, limit: Option<Duration>) {
        self.deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    }

    /// The same connection for another thread, with a time of its own. Reads and writes have separate
    /// limits, so one thread may read and the other write.
    ///
    /// # Errors
    /// The system's.
    pub fn another(&self) -> io::Result<Timed> {
        Ok(Timed::new(match &self.socket {
            Socket::Tcp(socket) => Socket::Tcp(socket.try_clone()?),
            Socket::Unix(socket) => Socket::Unix(socket.try_clone()?),
        }))
    }

    /// Ends one direction or both, for all who hold the connection.
    pub fn shutdown(&self, how: Shutdown) {
        // It may be gone already.
        let _ = either!(&self.socket, socket => socket.shutdown(how));
    }

    /// What is left of the time.
    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(deadline) = self.deadline else {
            return Ok(None);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(Some(left)),
        }
    }
}

/// A socket's own limit shows as `WouldBlock`.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Timed {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.left()?;
        either!(&mut self.socket, socket => {
            socket.set_read_timeout(left)?;
            socket.read(out).map_err(timed_out)
        })
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        either!(&mut self.socket, socket => {
            socket.set_write_timeout(left)?;
            socket.write(bytes).map_err(timed_out)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
