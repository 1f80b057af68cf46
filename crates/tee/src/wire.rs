//! The protocol between a program and a quoting service on a Unix socket. Each message is its length (u32, big-endian)
//! followed by that much JSON:
//!
//! ```text
//! → {"report_data": "<base64 of 64 bytes>"}
//! ← {"evidence": {"tee": "tdx", "quote": "<base64>", "collateral": {…}}}   or   {"error": "<words>"}
//! ```
//!
//! The asker has no field to say who it is: the service finds that out by itself. Unknown fields are refused.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::{Evidence, MAX_EVIDENCE_JSON, ReportData};
use serde::{Deserialize, Serialize};

/// Largest request.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Largest answer.
pub const MAX_RESPONSE: usize = MAX_EVIDENCE_JSON;

/// Why a message could not be received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed or ended within a message.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The connection ended between messages.
    #[error("the other end closed the connection")]
    Closed,
    /// The announced length is above the limit.
    #[error("a message of {length} bytes, the limit is {limit}")]
    TooLarge {
        /// The announced length.
        length: usize,
        /// The limit.
        limit: usize,
    },
}

/// A request is not of the agreed form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request must be {{\"report_data\": <base64 of 64 bytes>}} and nothing else")]
pub struct MalformedRequest;

/// The service's answer.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// What was asked for. Boxed, because a refusal is small.
    Evidence(Box<Evidence>),
    /// Why there is none.
    Error(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    report_data: String,
}

/// Writes a request.
pub fn encode_request(report_data: &ReportData) -> Vec<u8> {
    let request = Request {
        report_data: STANDARD.encode(report_data.as_bytes()),
    };
    serde_json::to_vec(&request).expect("a struct of one string is always JSON")
}

/// Reads a request.
pub fn parse_request(bytes: &[u8]) -> Result<ReportData, MalformedRequest> {
    let request: Request = serde_json::from_slice(bytes).map_err(|_| MalformedRequest)?;
    let data = STANDARD
        .decode(&request.report_data)
        .map_err(|_| MalformedRequest)?;
    let data: [u8; 64] = data.try_into().map_err(|_| MalformedRequest)?;
    Ok(ReportData::new(data))
}

/// Sends one message.
pub fn write_frame(to: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    to.write_all(&length.to_be_bytes())?;
    to.write_all(message)?;
    to.flush()
}

/// Receives one message of at most `limit` bytes.
pub fn read_frame(from: &mut impl Read, limit: usize) -> Result<Vec<u8>, WireError> {
    let mut length = [0; 4];
    let mut have = 0;
    while have < length.len() {
        match from.read(&mut length[have..]) {
            Ok(0) if have == 0 => return Err(WireError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        return Err(WireError::TooLarge { length, limit });
    }
    let mut message = vec![0; length];
    from.read_exact(&mut message)?;
    Ok(message)
}

/// A stream whose reads and writes together end by a deadline, however the other end trickles.
pub struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    /// Allows `limit` for everything done through this value.
    pub fn new(stream: &'a UnixStream, limit: Duration) -> Timed<'a> {
        Timed {
            stream,
            deadline: Instant::now() + limit,
        }
    }

    fn remaining(&self) -> io::Result<Duration> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            Err(io::ErrorKind::TimedOut.into())
        } else {
            Ok(remaining)
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.remaining()?))?;
        let mut stream = self.stream;
        stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        let mut stream = self.stream;
        stream.write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket reports its own time limit as "would block".
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_specification_shows() {
        let report_data = ReportData::new([0; 64]);
        let expected = format!("{{\"report_data\":\"{}==\"}}", "A".repeat(86));
        assert_eq!(encode_request(&report_data), expected.as_bytes());
        assert_eq!(parse_request(expected.as_bytes()), Ok(report_data));
    }

    #[test]
    fn a_request_cannot_say_anything_else() {
        let data = STANDARD.encode([1; 64]);
        assert!(parse_request(format!("{{\"report_data\":\"{data}\"}}").as_bytes()).is_ok());
        for bad in [
            format!("{{\"report_data\":\"{data}\",\"mr_td\":\"00\"}}"),
            format!("{{\"report_data\":\"{data}\",\"report_data\":\"{data}\"}}"),
            format!("{{\"report_data\":\"{data}\"}} {{}}"),
            format!("{{\"report_data\":\"{}\"}}", STANDARD.encode([1; 63])),
            format!("{{\"report_data\":\"{}\"}}", STANDARD.encode([1; 65])),
            format!("{{\"report_data\":\"{}\"}}", hex_of([1; 64])),
            "{}".to_owned(),
            "[]".to_owned(),
            String::new(),
        ] {
            assert_eq!(
                parse_request(bad.as_bytes()),
                Err(MalformedRequest),
                "{bad}"
            );
        }
    }

    fn hex_of(bytes: [u8; 64]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn an_answer_is_evidence_or_an_error_never_both() {
        let error: Response = serde_json::from_str("{\"error\":\"no\"}").unwrap();
        assert!(matches!(error, Response::Error(words) if words == "no"));
        let evidence = "{\"evidence\":{\"tee\":\"tdx\",\"quote\":\"AQID\"}}";
        assert!(matches!(
            serde_json::from_str(evidence),
            Ok(Response::Evidence(evidence)) if evidence.quote == [1, 2, 3]
        ));
        for bad in [
            "{}",
            "{\"other\":1}",
            "{\"error\":\"no\",\"evidence\":{\"tee\":\"tdx\",\"quote\":\"AQID\"}}",
            "{\"evidence\":{\"tee\":\"tdx\",\"quote\":\"AQID\",\"status\":\"fine\"}}",
        ] {
            assert!(serde_json::from_str::<Response>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn frames_keep_their_bounds() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, b"abc").unwrap();
        assert_eq!(bytes, b"\0\0\0\x03abc");
        assert_eq!(read_frame(&mut &bytes[..], 3).unwrap(), b"abc");
        assert!(matches!(
            read_frame(&mut &bytes[..], 2),
            Err(WireError::TooLarge {
                length: 3,
                limit: 2
            })
        ));
        assert!(matches!(
            read_frame(&mut &b""[..], 3),
            Err(WireError::Closed)
        ));
        for cut in 1..bytes.len() {
            assert!(matches!(
                read_frame(&mut &bytes[..cut], 3),
                Err(WireError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof
            ));
        }
    }

    #[test]
    fn a_trickling_peer_meets_the_deadline() {
        let (near, far) = UnixStream::pair().unwrap();
        let trickle = std::thread::spawn(move || {
            let mut far = far;
            while far.write_all(b"\0").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        let mut buffer = [0; 1 << 16];
        let error = Timed::new(&near, Duration::from_millis(200))
            .read_exact(&mut buffer)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= Duration::from_millis(190));
        drop(near);
        trickle.join().unwrap();
    }
}
