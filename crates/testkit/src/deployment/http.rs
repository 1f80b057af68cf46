//! The least HTTP that readiness and plain questions need: one GET, the connection closed after the answer. Tests of
//! streaming bring a client of their own.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REPLY: u64 = 16 * 1024 * 1024;

/// An answer.
#[derive(Debug)]
pub struct HttpReply {
    /// Its status.
    pub status: u16,
    /// Its body, as text.
    pub body: String,
}

/// Asks `http://HOST:PORT` for a path.
pub fn http_get(base: &str, path: &str) -> io::Result<HttpReply> {
    let host = base
        .strip_prefix("http://")
        .unwrap_or(base)
        .trim_end_matches('/');
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // HTTP/1.0, so that the answer comes in one piece.
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reply = Vec::new();
    stream.take(MAX_REPLY).read_to_end(&mut reply)?;
    parse(&reply).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse(reply: &[u8]) -> Option<HttpReply> {
    let end = reply.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&reply[..end]).ok()?;
    let status = head
        .strip_prefix("HTTP/1.")?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    Some(HttpReply {
        status,
        body: String::from_utf8_lossy(&reply[end + 4..]).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_status_and_body_and_refuses_other_protocols() {
        let reply = parse(b"HTTP/1.0 503 Service Unavailable\r\na: b\r\n\r\nnot yet").unwrap();
        assert_eq!((reply.status, reply.body.as_str()), (503, "not yet"));
        assert!(parse(b"HTTP/1.1 200 OK\r\n").is_none());
        assert!(parse(b"SSH-2.0-x\r\n\r\n").is_none());
    }
}
