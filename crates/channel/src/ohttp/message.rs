//! Binary HTTP (RFC 9292) as the channel uses it: requests of known length with padding, answers of
//! indeterminate length that are decoded as their bytes arrive.
//!
//! The library `bhttp` writes and reads everything but answers under way: its stream reader loses the
//! waker when a length arrives in pieces, and accepts an answer cut off before its first length.

use std::io::Cursor;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};

use super::chunks::{put_varint, take_varint};

/// The smallest size of a padded request.
pub const MINIMUM_REQUEST_BYTES: usize = 1024;
/// The largest head of a request: all before the length of its content.
pub const MAX_REQUEST_HEAD: usize = 16 * 1024;
/// The largest head of an answer.
const MAX_ANSWER_HEAD: usize = 16 * 1024;
const MAX_FIELDS: usize = 64;
const MAX_PATH: usize = 2048;

/// The size a request of `bytes` is padded to: the next power of two, at least
/// [`MINIMUM_REQUEST_BYTES`].
pub fn padded_request_bytes(bytes: usize) -> usize {
    bytes.max(MINIMUM_REQUEST_BYTES).next_power_of_two()
}

/// What is wrong with a decrypted message. Its sender made it so: nobody else could.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageFault {
    /// The size is not one that padding yields, or bytes after the message are not zero.
    #[error("not padded as the specification asks")]
    Padding,
    /// Not binary HTTP, or of the wrong kind (request or answer, known length or not).
    #[error("not the binary HTTP message the specification asks for")]
    Encoding,
    /// A method, path, status or field that HTTP or this profile does not allow.
    #[error("{0} is not allowed")]
    Field(&'static str),
    /// More than the profile's limit.
    #[error("too many or too long: {0}")]
    Limit(&'static str),
    /// The answer ended before its last part.
    #[error("the message ends early")]
    Incomplete,
}

/// Encodes and pads a request.
///
/// # Errors
/// [`MessageFault`].
pub fn encode_request(request: &Request<Bytes>) -> Result<Vec<u8>, MessageFault> {
    let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
    let mut message = bhttp::Message::request(
        request.method().as_str().into(),
        b"https".to_vec(),
        Vec::new(),
        path.into(),
    );
    check_limits(request.headers(), path)?;
    for (name, value) in request.headers() {
        message.put_header(name.as_str(), value.as_bytes());
    }
    message.write_content(request.body());
    let mut out = Vec::with_capacity(padded_request_bytes(request.body().len() + 512));
    message
        .write_bhttp(bhttp::Mode::KnownLength, &mut out)
        .map_err(|_| MessageFault::Encoding)?;
    // What no service reads is not sent.
    decode_request_head(&out)?;
    out.resize(padded_request_bytes(out.len()), 0);
    Ok(out)
}

/// Decodes a padded request.
///
/// # Errors
/// [`MessageFault`].
pub fn decode_request(bytes: &[u8]) -> Result<Request<Bytes>, MessageFault> {
    if padded_request_bytes(bytes.len()) != bytes.len() {
        return Err(MessageFault::Padding);
    }
    let head = decode_request_head(bytes)?.ok_or(MessageFault::Encoding)?;
    let mut cursor = Cursor::new(bytes);
    let message = bhttp::Message::read_bhttp(&mut cursor).map_err(|_| MessageFault::Encoding)?;
    let end = usize::try_from(cursor.position()).map_err(|_| MessageFault::Encoding)?;
    let padding = bytes.get(end..).ok_or(MessageFault::Encoding)?;
    // More padding than the next power of two needs would be a second encoding of the same request.
    if padding.iter().any(|&b| b != 0) || padded_request_bytes(end) != bytes.len() {
        return Err(MessageFault::Padding);
    }
    if !message.trailer().is_empty() {
        return Err(MessageFault::Field("a trailer"));
    }
    let content = Bytes::copy_from_slice(message.content());
    Ok(head.map(|()| content))
}

/// Decodes the head of a request from its first bytes, or returns nothing if bytes are missing.
///
/// # Errors
/// [`MessageFault`], as soon as it is certain.
pub(super) fn decode_request_head(bytes: &[u8]) -> Result<Option<Request<()>>, MessageFault> {
    let Some(head) = take_request_head(bytes)? else {
        return match bytes.len() {
            ..=MAX_REQUEST_HEAD => Ok(None),
            _ => Err(MessageFault::Limit("head of the request")),
        };
    };
    if head.scheme != b"https" || !head.authority.is_empty() {
        return Err(MessageFault::Field("scheme or authority"));
    }
    let method = Method::from_bytes(head.method).map_err(|_| MessageFault::Field("the method"))?;
    let path = std::str::from_utf8(head.path).ok();
    let path = path
        .filter(|p| p.starts_with('/'))
        .ok_or(MessageFault::Field("the path"))?;
    let uri: Uri = path.parse().map_err(|_| MessageFault::Field("the path"))?;
    let mut fields = Vec::new();
    let mut rest = head.fields;
    while !rest.is_empty() {
        if fields.len() == MAX_FIELDS {
            return Err(MessageFault::Limit("fields"));
        }
        let (name, after) = take_bytes(rest).ok_or(MessageFault::Encoding)?;
        let (value, after) = take_bytes(after).ok_or(MessageFault::Encoding)?;
        fields.push((name, value));
        rest = after;
    }
    let headers = headers(fields.into_iter())?;
    check_limits(&headers, path)?;

    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    Ok(Some(request))
}

/// `0 ‖ method ‖ scheme ‖ authority ‖ path ‖ fields`, each with its length before it.
struct RequestHead<'a> {
    method: &'a [u8],
    scheme: &'a [u8],
    authority: &'a [u8],
    path: &'a [u8],
    fields: &'a [u8],
}

fn take_request_head(bytes: &[u8]) -> Result<Option<RequestHead<'_>>, MessageFault> {
    let mut rest = match bytes.split_first() {
        None => return Ok(None),
        // The framing indicator of a request of known length.
        Some((0, rest)) => rest,
        Some(_) => return Err(MessageFault::Encoding),
    };
    let mut parts = [&[][..]; 5];
    for part in &mut parts {
        let Some((length, after)) = take_varint(rest) else {
            return Ok(None);
        };
        let end = (bytes.len() - after.len()) as u64;
        if end.saturating_add(length) > MAX_REQUEST_HEAD as u64 {
            return Err(MessageFault::Limit("head of the request"));
        }
        let Some((taken, after)) = after.split_at_checked(length as usize) else {
            return Ok(None);
        };
        (*part, rest) = (taken, after);
    }
    let [method, scheme, authority, path, fields] = parts;
    Ok(Some(RequestHead {
        method,
        scheme,
        authority,
        path,
        fields,
    }))
}

fn check_limits(headers: &HeaderMap, path: &str) -> Result<(), MessageFault> {
    if headers.len() > MAX_FIELDS {
        return Err(MessageFault::Limit("fields"));
    }
    if path.len() > MAX_PATH {
        return Err(MessageFault::Limit("path"));
    }
    Ok(())
}

fn headers<'a>(
    fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Result<HeaderMap, MessageFault> {
    let mut headers = HeaderMap::new();
    for (i, (name, value)) in fields.enumerate() {
        if i == MAX_FIELDS {
            return Err(MessageFault::Limit("fields"));
        }
        if name.iter().any(u8::is_ascii_uppercase) {
            return Err(MessageFault::Field("an upper-case field name"));
        }
        let name = HeaderName::from_bytes(name).map_err(|_| MessageFault::Field("a field name"))?;
        let value =
            HeaderValue::from_bytes(value).map_err(|_| MessageFault::Field("a field value"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// Encodes the head of an answer: framing indicator, status, fields, end of fields.
pub(super) fn encode_answer_head(
    status: StatusCode,
    headers: &HeaderMap,
) -> Result<Vec<u8>, MessageFault> {
    let code = bhttp::StatusCode::try_from(status.as_u16())
        .ok()
        .filter(|code| !code.informational())
        .ok_or(MessageFault::Field("the status"))?;
    let mut message = bhttp::Message::response(code);
    for (name, value) in headers {
        message.put_header(name.as_str(), value.as_bytes());
    }
    let mut out = Vec::with_capacity(256);
    message
        .write_bhttp(bhttp::Mode::IndeterminateLength, &mut out)
        .map_err(|_| MessageFault::Encoding)?;
    // The library wrote a whole message, whose empty content and empty trailer are one zero each.
    out.truncate(out.len() - ANSWER_END.len());
    if out.len() > MAX_ANSWER_HEAD || headers.len() > MAX_FIELDS {
        return Err(MessageFault::Limit("head of the answer"));
    }
    Ok(out)
}

/// Appends one piece of an answer's body. A piece must not be empty: that would end the body.
pub(super) fn encode_answer_piece(piece: &[u8], out: &mut Vec<u8>) {
    debug_assert!(!piece.is_empty());
    put_varint(piece.len() as u64, out);
    out.extend_from_slice(piece);
}

/// End of content and end of trailers.
pub(super) const ANSWER_END: [u8; 2] = [0, 0];

fn take_bytes(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = take_varint(bytes)?;
    rest.split_at_checked(usize::try_from(length).ok()?)
}

/// The head of an answer.
#[derive(Debug)]
pub struct AnswerHead {
    /// Its status, 200 to 599.
    pub status: StatusCode,
    /// Its fields.
    pub headers: HeaderMap,
}

/// Decodes an answer from its bytes in any pieces.
pub struct AnswerDecoder {
    state: State,
}

enum State {
    /// Collecting the head.
    Head(Vec<u8>),
    /// Collecting the length of a piece of the body; at most eight bytes.
    Length(Vec<u8>),
    /// Inside a piece.
    Piece { remaining: u64 },
    /// Before the end of the trailers.
    Trailer,
    /// After the end of the message.
    Done,
}

impl Default for AnswerDecoder {
    fn default() -> AnswerDecoder {
        AnswerDecoder::new()
    }
}

impl AnswerDecoder {
    /// A decoder before the first byte.
    pub fn new() -> AnswerDecoder {
        AnswerDecoder {
            state: State::Head(Vec::new()),
        }
    }

    /// Whether the whole message has been seen.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Takes bytes until the head is complete and returns it with what follows it.
    ///
    /// # Errors
    /// [`MessageFault`].
    pub fn head(&mut self, bytes: &[u8]) -> Result<Option<(AnswerHead, Vec<u8>)>, MessageFault> {
        let State::Head(buffer) = &mut self.state else {
            return Err(MessageFault::Encoding);
        };
        buffer.extend_from_slice(bytes);
        let Some((head, rest)) = parse_head(buffer)? else {
            if buffer.len() > MAX_ANSWER_HEAD {
                return Err(MessageFault::Limit("head of the answer"));
            }
            return Ok(None);
        };
        let rest = rest.to_vec();
        self.state = State::Length(Vec::with_capacity(8));
        Ok(Some((head, rest)))
    }

    /// Takes bytes after the head and returns the part of the body among them.
    ///
    /// # Errors
    /// [`MessageFault`].
    pub fn body(&mut self, mut bytes: &[u8]) -> Result<Vec<u8>, MessageFault> {
        let mut body = Vec::new();
        while !bytes.is_empty() {
            match &mut self.state {
                State::Head(_) => return Err(MessageFault::Encoding),
                State::Length(buffer) => {
                    buffer.push(bytes[0]);
                    bytes = &bytes[1..];
                    self.state = match take_varint(buffer) {
                        None => continue,
                        Some((0, _)) => State::Trailer,
                        Some((remaining, _)) => State::Piece { remaining },
                    };
                }
                State::Piece { remaining } => {
                    let take =
                        usize::try_from(*remaining).map_or(bytes.len(), |r| r.min(bytes.len()));
                    let (piece, rest) = bytes.split_at(take);
                    body.extend_from_slice(piece);
                    bytes = rest;
                    *remaining -= take as u64;
                    if *remaining == 0 {
                        self.state = State::Length(Vec::with_capacity(8));
                    }
                }
                State::Trailer => {
                    if bytes[0] != 0 {
                        return Err(MessageFault::Field("a trailer"));
                    }
                    bytes = &bytes[1..];
                    self.state = State::Done;
                }
                State::Done => return Err(MessageFault::Encoding),
            }
        }
        Ok(body)
    }
}

/// Parses `3 ‖ status ‖ (name, value)* ‖ 0`, or returns nothing if bytes are missing.
fn parse_head(bytes: &[u8]) -> Result<Option<(AnswerHead, &[u8])>, MessageFault> {
    let Some((&indicator, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    if indicator != 3 {
        return Err(MessageFault::Encoding);
    }
    let Some((status, mut rest)) = take_varint(rest) else {
        return Ok(None);
    };
    let status = u16::try_from(status)
        .ok()
        .and_then(|s| StatusCode::from_u16(s).ok());
    let status = status
        .filter(|s| (200..600).contains(&s.as_u16()))
        .ok_or(MessageFault::Field("the status"))?;
    let mut fields = Vec::new();
    loop {
        let Some((name, after)) = take_bytes(rest) else {
            return Ok(None);
        };
        if name.is_empty() {
            let headers = headers(fields.into_iter())?;
            return Ok(Some((AnswerHead { status, headers }, after)));
        }
        let Some((value, after)) = take_bytes(after) else {
            return Ok(None);
        };
        if fields.len() == MAX_FIELDS {
            return Err(MessageFault::Limit("fields"));
        }
        fields.push((name, value));
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: &[u8]) -> Request<Bytes> {
        Request::post("/v1/completions?x=1")
            .header("content-type", "application/json")
            .header("authorization", "Bearer k")
            .body(Bytes::copy_from_slice(body))
            .unwrap()
    }

    #[test]
    fn requests_round_trip_at_every_padded_size() {
        for length in [0, 1, 900, 1024, 2000, 70_000] {
            let sent = request(&vec![7; length]);
            let bytes = encode_request(&sent).unwrap();
            assert!(bytes.len().is_power_of_two() && bytes.len() >= 1024);
            let received = decode_request(&bytes).unwrap();
            assert_eq!(received.method(), sent.method());
            assert_eq!(received.uri(), sent.uri());
            assert_eq!(received.headers(), sent.headers());
            assert_eq!(received.body(), sent.body());
        }
    }

    #[test]
    fn a_request_grows_to_the_next_power_of_two_at_the_exact_byte() {
        let overhead = {
            let bytes = encode_request(&request(&[1; 800])).unwrap();
            bytes.iter().rposition(|&b| b != 0).unwrap() + 2 - 800
        };
        assert_eq!(
            encode_request(&request(&vec![1; 1024 - overhead]))
                .unwrap()
                .len(),
            1024
        );
        assert_eq!(
            encode_request(&request(&vec![1; 1025 - overhead]))
                .unwrap()
                .len(),
            2048
        );
    }

    #[test]
    fn refuses_requests_that_are_not_padded_exactly() {
        let good = encode_request(&request(b"body")).unwrap();
        assert_eq!(
            decode_request(&good[..1023]).unwrap_err(),
            MessageFault::Padding
        );
        assert_eq!(
            decode_request(&good[..512]).unwrap_err(),
            MessageFault::Padding
        );
        assert_eq!(decode_request(&[]).unwrap_err(), MessageFault::Padding);

        let mut doubled = good.clone();
        doubled.resize(2048, 0);
        assert_eq!(decode_request(&doubled).unwrap_err(), MessageFault::Padding);

        let mut dirty = good;
        dirty[1023] = 1;
        assert_eq!(decode_request(&dirty).unwrap_err(), MessageFault::Padding);
    }

    #[test]
    fn refuses_other_kinds_of_messages() {
        for indicator in [1, 2, 3, 4] {
            let mut bytes = encode_request(&request(b"body")).unwrap();
            bytes[0] = indicator;
            assert_eq!(decode_request(&bytes).unwrap_err(), MessageFault::Encoding);
        }
        let write = |message: bhttp::Message| {
            let mut out = Vec::new();
            message
                .write_bhttp(bhttp::Mode::KnownLength, &mut out)
                .unwrap();
            out.resize(padded_request_bytes(out.len()), 0);
            decode_request(&out).unwrap_err()
        };
        let message = |scheme: &str, authority: &str, path: &str| {
            bhttp::Message::request(b"GET".into(), scheme.into(), authority.into(), path.into())
        };
        let control = MessageFault::Field("scheme or authority");
        assert_eq!(write(message("http", "", "/")), control);
        assert_eq!(write(message("https", "elsewhere", "/")), control);
        assert_eq!(
            write(message("https", "", "v1")),
            MessageFault::Field("the path")
        );
        assert_eq!(
            write(message("https", "", "")),
            MessageFault::Field("the path")
        );

        let mut upper = message("https", "", "/");
        upper.put_header("Accept", "x");
        assert_eq!(
            write(upper),
            MessageFault::Field("an upper-case field name")
        );
        let mut split = message("https", "", "/");
        split.put_header("accept", "x\r\ny: z");
        assert_eq!(write(split), MessageFault::Field("a field value"));
        let mut trailer = message("https", "", "/");
        trailer.put_trailer("a", "b");
        assert_eq!(write(trailer), MessageFault::Field("a trailer"));
        let mut many = message("https", "", "/");
        (0..65).for_each(|_| many.put_header("a", "b"));
        assert_eq!(write(many), MessageFault::Limit("fields"));
    }

    fn answer(pieces: &[&[u8]]) -> Vec<u8> {
        let mut headers = HeaderMap::new();
        headers.insert(
            "content-type",
            HeaderValue::from_static("text/event-stream"),
        );
        let mut bytes = encode_answer_head(StatusCode::OK, &headers).unwrap();
        for piece in pieces {
            encode_answer_piece(piece, &mut bytes);
        }
        bytes.extend(ANSWER_END);
        bytes
    }

    fn decode(chunks: &[&[u8]]) -> Result<(StatusCode, Vec<u8>, bool), MessageFault> {
        let mut decoder = AnswerDecoder::new();
        let (mut status, mut body) = (None, Vec::new());
        for chunk in chunks {
            if status.is_none() {
                if let Some((head, rest)) = decoder.head(chunk)? {
                    status = Some(head.status);
                    body.extend(decoder.body(&rest)?);
                }
            } else {
                body.extend(decoder.body(chunk)?);
            }
        }
        Ok((
            status.ok_or(MessageFault::Incomplete)?,
            body,
            decoder.is_done(),
        ))
    }

    #[test]
    fn answers_decode_alike_whole_and_byte_by_byte() {
        let long = vec![9; 20_000];
        let bytes = answer(&[b"one", &long, b"three"]);
        let expected = (StatusCode::OK, [b"one", &long[..], b"three"].concat(), true);
        assert_eq!(decode(&[&bytes]).unwrap(), expected);
        assert_eq!(
            decode(&bytes.chunks(1).collect::<Vec<_>>()).unwrap(),
            expected
        );
    }

    #[test]
    fn the_library_reads_what_we_write() {
        let bytes = answer(&[b"one", &[9; 70], b"three"]);
        let message = bhttp::Message::read_bhttp(&mut Cursor::new(&bytes[..])).unwrap();
        assert_eq!(
            message.content(),
            [&b"one"[..], &[9; 70], b"three"].concat()
        );
        assert_eq!(
            message.header().get(b"content-type"),
            Some(&b"text/event-stream"[..])
        );
    }

    #[test]
    fn a_cut_answer_is_never_done() {
        let bytes = answer(&[b"one", b"two"]);
        for n in 0..bytes.len() {
            assert!(
                !decode(&[&bytes[..n]]).is_ok_and(|(_, _, done)| done),
                "{n} bytes"
            );
        }
    }

    #[test]
    fn refuses_bytes_after_the_end_trailers_and_informational_answers() {
        let mut extra = answer(&[b"one"]);
        extra.push(0);
        assert_eq!(decode(&[&extra]), Err(MessageFault::Encoding));

        let mut trailer = answer(&[b"one"]);
        *trailer.last_mut().unwrap() = 1;
        assert_eq!(decode(&[&trailer]), Err(MessageFault::Field("a trailer")));

        assert_eq!(
            decode(&[&[3, 0x40, 0x67, 0]]),
            Err(MessageFault::Field("the status"))
        );
        assert_eq!(decode(&[&[1, 0x40, 0xc8, 0]]), Err(MessageFault::Encoding));
        let huge = [&[3, 0x40, 0xc8, 0x80, 1, 0, 0][..], &vec![b'a'; 20_000]].concat();
        assert_eq!(
            decode(&[&huge]),
            Err(MessageFault::Limit("head of the answer"))
        );
    }
}
