//! A client's connection, in clear or encrypted.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use casemate_wire::Timed;

use crate::tls::Session;

/// Bytes from and to a client.
pub enum Stream {
    /// As they are.
    Plain(Timed),
    /// Through TLS.
    Encrypted(Session),
}

impl Stream {
    /// From now on everything must be done within this time; without one, nothing must.
    pub fn within(&mut self, limit: Option<Duration>) {
        match self {
            Stream::Plain(socket) => socket.within(limit),
            Stream::Encrypted(session) => session.within(limit),
        }
    }

    /// The same connection for another thread, with a time of its own: one may read and the other write.
    ///
    /// # Errors
    /// The system's.
    pub fn another(&self) -> io::Result<Stream> {
        Ok(match self {
            Stream::Plain(socket) => Stream::Plain(socket.another()?),
            Stream::Encrypted(session) => Stream::Encrypted(session.another()?),
        })
    }

    /// Ends one direction or both, for all who hold the connection.
    pub fn shutdown(&mut self, how: Shutdown) {
        match self {
            Stream::Plain(socket) => socket.shutdown(how),
            Stream::Encrypted(session) => session.shutdown(how),
        }
    }
}

impl From<Timed> for Stream {
    fn from(socket: Timed) -> Stream {
        Stream::Plain(socket)
    }
}

impl From<Session> for Stream {
    fn from(session: Session) -> Stream {
        Stream::Encrypted(session)
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.read(out),
            Stream::Encrypted(session) => session.read(out),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.write(bytes),
            Stream::Encrypted(session) => session.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // Both write at once.
        Ok(())
    }
}
