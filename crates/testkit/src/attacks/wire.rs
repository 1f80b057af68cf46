//! HTTP as bytes, for who stands in the middle: one exchange a connection, and a relay that can record and change what
//! passes. Under it can be attested TLS, which the relay then ends with a key of its own.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use casemate_channel::tls::rustls::{
    ClientConnection, ServerConfig, ServerConnection, StreamOwned,
};
use casemate_channel::tls::{self, ServerKey};

const TIMEOUT: Duration = Duration::from_secs(60);
const MAX_MESSAGE: u64 = 64 << 20;

/// A request or an answer.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// First line and fields, without the empty line.
    pub(super) head: String,
    /// The body, without any transfer coding.
    pub(super) body: Vec<u8>,
    /// Whether the body ended as its framing says. Written, one that did not breaks off.
    pub(super) complete: bool,
}

impl Message {
    /// A request with a body.
    pub(super) fn post(path: &str, media_type: &str, body: &[u8]) -> Message {
        Message {
            head: format!("POST {path} HTTP/1.1\r\ncontent-type: {media_type}"),
            body: body.to_vec(),
            complete: true,
        }
    }

    /// A request without one.
    pub(super) fn get(path: &str) -> Message {
        Message {
            head: format!("GET {path} HTTP/1.1"),
            body: Vec::new(),
            complete: true,
        }
    }

    /// The same with one more field.
    pub(super) fn with(mut self, name: &str, value: &str) -> Message {
        self.head.push_str(&format!("\r\n{name}: {value}"));
        self
    }

    /// The status of an answer; 0 if there is none.
    pub(super) fn status(&self) -> u16 {
        let status = self.head.split(' ').nth(1);
        status.and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// Path and query of a request.
    pub(super) fn path(&self) -> &str {
        self.head.split(' ').nth(1).unwrap_or("")
    }

    /// The values of a field.
    pub(super) fn fields<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.head.lines().skip(1).filter_map(move |line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// The body as text.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let framing = [
            "content-length",
            "transfer-encoding",
            "connection",
            "expect",
        ];
        let mut head = String::new();
        for line in self.head.lines() {
            let name = line.split(':').next().unwrap_or("").to_ascii_lowercase();
            if !framing.contains(&name.as_str()) {
                head.push_str(line);
                head.push_str("\r\n");
            }
        }
        head.push_str(&format!(
            "content-length: {}\r\nconnection: close\r\n\r\n",
            self.body.len() + usize::from(!self.complete)
        ));
        to.write_all(head.as_bytes())?;
        to.write_all(&self.body)
    }

    /// Reads one message. An answer without a length goes on to the end of the connection.
    fn read(from: &mut impl Read, answer: bool) -> io::Result<Message> {
        let mut limited = from.take(MAX_MESSAGE);
        let mut bytes = Vec::new();
        let mut buffer = [0; 16 * 1024];
        let head_end = loop {
            if let Some(at) = find(&bytes, b"\r\n\r\n") {
                break at;
            }
            match limited.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => bytes.extend_from_slice(&buffer[..n]),
            }
        };
        let mut message = Message {
            head: String::from_utf8_lossy(&bytes[..head_end]).into_owned(),
            body: bytes.split_off(head_end + 4),
            complete: false,
        };
        let length = message.fields("content-length").next();
        let length: Option<usize> = length.and_then(|length| length.parse().ok());
        let chunked = message.fields("transfer-encoding").next().is_some();
        loop {
            let body = &mut message.body;
            if chunked {
                if let Some(plain) = dechunk(body) {
                    *body = plain;
                    message.complete = true;
                    return Ok(message);
                }
            } else if let Some(length) = length.or((!answer).then_some(0))
                && body.len() >= length
            {
                body.truncate(length);
                message.complete = true;
                return Ok(message);
            }
            match limited.read(&mut buffer) {
                // A connection that breaks is the end of it, too.
                Ok(0) | Err(_) => {
                    message.complete = !chunked && length.is_none();
                    return Ok(message);
                }
                Ok(n) => message.body.extend_from_slice(&buffer[..n]),
            }
        }
    }
}

/// The body behind the chunked transfer coding, if its last chunk is there.
fn dechunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    loop {
        let end = find(bytes, b"\r\n")?;
        let size = std::str::from_utf8(&bytes[..end]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        let data = bytes.get(end + 2..end + 2 + size)?;
        bytes = bytes.get(end + 2 + size + 2..)?;
        if size == 0 {
            return Some(plain);
        }
        plain.extend_from_slice(data);
    }
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
}

/// Sends a request to `http://HOST:PORT` or `tls://HOST:PORT` and reads the answer.
pub(super) fn exchange(base: &str, request: &Message) -> io::Result<Message> {
    let (scheme, host) = base.split_once("://").unwrap_or(("http", base));
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let request = match request.fields("host").next() {
        Some(_) => request.clone(),
        None => request.clone().with("host", host),
    };
    if scheme != tls::URL_SCHEME {
        return ask(&mut stream, &request);
    }
    let config = tls::client_config().map_err(io::Error::other)?;
    let connection = ClientConnection::new(config, tls::server_name()).map_err(io::Error::other)?;
    ask(&mut StreamOwned::new(connection, stream), &request)
}

fn ask(stream: &mut (impl Read + Write), request: &Message) -> io::Result<Message> {
    request.write(stream)?;
    stream.flush()?;
    Message::read(stream, true)
}

type Change = dyn Fn(&Message, Message) -> Message + Send + Sync;

/// A relay on loopback, ended when dropped.
pub(super) struct Middle {
    address: SocketAddr,
    scheme: &'static str,
    ended: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<u8>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Middle {
    /// Relays to `upstream`; each answer passes through `change`, together with its request.
    pub(super) fn start(
        upstream: &str,
        change: impl Fn(&Message, Message) -> Message + Send + Sync + 'static,
    ) -> io::Result<Middle> {
        Middle::listen(upstream, None, Arc::new(change))
    }

    /// As [`Middle::start`], ending TLS with `key` before that.
    pub(super) fn start_tls(
        upstream: &str,
        key: &ServerKey,
        change: impl Fn(&Message, Message) -> Message + Send + Sync + 'static,
    ) -> io::Result<Middle> {
        Middle::listen(upstream, Some(key.config()), Arc::new(change))
    }

    fn listen(
        upstream: &str,
        ends: Option<Arc<ServerConfig>>,
        change: Arc<Change>,
    ) -> io::Result<Middle> {
        let scheme = ends.as_ref().map_or("http", |_| tls::URL_SCHEME);
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop, record, upstream) = (ended.clone(), seen.clone(), upstream.to_owned());
        let acceptor = thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                let (change, record, upstream) = (change.clone(), record.clone(), upstream.clone());
                let ends = ends.clone();
                thread::spawn(move || {
                    // A client that leaves, or an enclave that does: the exchange is over either way.
                    let _ = connected(stream, ends, &upstream, &*change, &record);
                });
            }
        });
        Ok(Middle {
            address,
            scheme,
            ended,
            seen,
            acceptor: Some(acceptor),
        })
    }

    /// Its base address.
    pub(super) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Everything that passed, in both directions.
    pub(super) fn seen(&self) -> Vec<u8> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn connected(
    client: TcpStream,
    ends: Option<Arc<ServerConfig>>,
    upstream: &str,
    change: &Change,
    seen: &Mutex<Vec<u8>>,
) -> io::Result<()> {
    client.set_read_timeout(Some(TIMEOUT))?;
    match ends {
        None => relay(client, upstream, change, seen),
        Some(config) => {
            let connection = ServerConnection::new(config).map_err(io::Error::other)?;
            relay(StreamOwned::new(connection, client), upstream, change, seen)
        }
    }
}

fn relay(
    mut client: impl Read + Write,
    upstream: &str,
    change: &Change,
    seen: &Mutex<Vec<u8>>,
) -> io::Result<()> {
    let request = Message::read(&mut client, false)?;
    let answer = exchange(upstream, &request)?;
    {
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        for message in [&request, &answer] {
            seen.extend_from_slice(message.head.as_bytes());
            seen.extend_from_slice(&message.body);
        }
    }
    let answer = change(&request, answer);
    answer.write(&mut client)?;
    client.flush()?;
    if !answer.complete {
        // What was promised does not come; the client gets to see what did before it learns that.
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_body_is_whole_only_with_its_last_chunk() {
        assert_eq!(
            dechunk(b"3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\n").unwrap(),
            b"abcde"
        );
        assert_eq!(dechunk(b"3\r\nabc\r\n"), None);
        assert_eq!(dechunk(b"3\r\nab"), None);
        assert_eq!(dechunk(b"x\r\n"), None);
    }

    #[test]
    fn relays_records_and_changes() {
        let echo = TcpListener::bind("127.0.0.1:0").unwrap();
        let upstream = format!("http://{}", echo.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (mut stream, _) = echo.accept().unwrap();
            let request = Message::read(&mut stream, false).unwrap();
            assert_eq!(
                (request.path(), &request.body[..]),
                ("/a?b", &b"secret"[..])
            );
            stream
                .write_all(
                    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nreply\r\n0\r\n\r\n",
                )
                .unwrap();
        });
        let middle = Middle::start(&upstream, |request, mut answer| {
            assert_eq!(request.path(), "/a?b");
            answer.body.truncate(4);
            answer
        })
        .unwrap();
        let answer = exchange(&middle.url(), &Message::post("/a?b", "x/y", b"secret")).unwrap();
        assert_eq!((answer.status(), &answer.body[..]), (200, &b"repl"[..]));
        assert!(answer.complete);
        let seen = String::from_utf8(middle.seen()).unwrap();
        assert!(seen.contains("secret") && seen.contains("reply"), "{seen}");
        server.join().unwrap();
    }

    #[test]
    fn an_answer_that_breaks_off_is_not_complete() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", server.local_addr().unwrap());
        thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            Message::read(&mut stream, false).unwrap();
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nreply\r\n")
                .unwrap();
        });
        let answer = exchange(&base, &Message::get("/")).unwrap();
        assert!(!answer.complete);
    }
}
