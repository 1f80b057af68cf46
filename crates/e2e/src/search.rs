//! Looking for words in recorded bytes, and taking recorded HTTP apart.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

/// The forms in which a secret may stand in bytes: as it is, in hexadecimal, and inside base64, wherever it begins there.
pub fn forms(word: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = vec![
        word.to_vec(),
        hex::encode(word).into_bytes(),
        hex::encode_upper(word).into_bytes(),
    ];
    for before in 0..3 {
        let mut bytes = vec![0; before];
        bytes.extend_from_slice(word);
        // Characters that also depend on what stands before or after the word are left out.
        let from = (before * 8).div_ceil(6);
        let to = bytes.len() * 8 / 6;
        for text in [
            STANDARD_NO_PAD.encode(&bytes),
            URL_SAFE_NO_PAD.encode(&bytes),
        ] {
            forms.push(text.as_bytes()[from..to].to_vec());
        }
    }
    forms
}

/// Whether `bytes` hold the word in any of its forms.
pub fn holds(bytes: &[u8], word: &str) -> bool {
    forms(word.as_bytes())
        .iter()
        .any(|form| bytes.windows(form.len()).any(|window| window == form))
}

/// One HTTP/1.1 message as it was recorded.
#[derive(Clone, Debug)]
pub struct Message {
    /// First line and fields.
    pub head: String,
    /// The body, without the framing of chunks.
    pub body: Vec<u8>,
    /// Bytes of the whole message as it travelled.
    pub recorded: usize,
}

/// The messages of one direction of a connection, in order. A message that was cut off is left out.
pub fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while let Some((message, rest)) = message(bytes) {
        messages.push(message);
        bytes = rest;
    }
    messages
}

fn message(bytes: &[u8]) -> Option<(Message, &[u8])> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let field = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name))?;
        line.strip_prefix(':').map(str::trim)
    };
    let mut rest = &bytes[end..];
    let mut body = Vec::new();
    if field("transfer-encoding") == Some("chunked") {
        loop {
            let line = rest.windows(2).position(|window| window == b"\r\n")?;
            let length = std::str::from_utf8(&rest[..line]).ok()?;
            let length = usize::from_str_radix(length, 16).ok()?;
            rest = &rest[line + 2..];
            body.extend_from_slice(rest.get(..length)?);
            rest = rest.get(length + 2..)?;
            if length == 0 {
                break;
            }
        }
    } else {
        let length = field("content-length").map_or(Some(0), |text| text.parse().ok())?;
        body.extend_from_slice(rest.get(..length)?);
        rest = &rest[length..];
    }
    let recorded = bytes.len() - rest.len();
    let message = Message {
        head,
        body,
        recorded,
    };
    Some((message, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_in_every_form_and_place() {
        let word = "canary-5d1c0a";
        assert!(!holds(b"something else entirely", word));
        for before in 0..7 {
            let text = format!("{}{word} and more", "x".repeat(before));
            assert!(holds(text.as_bytes(), word));
            assert!(holds(hex::encode(&text).as_bytes(), word));
            assert!(holds(hex::encode_upper(&text).as_bytes(), word));
            assert!(
                holds(STANDARD_NO_PAD.encode(&text).as_bytes(), word),
                "{before}"
            );
            assert!(holds(URL_SAFE_NO_PAD.encode(&text).as_bytes(), word));
        }
        assert!(!holds(hex::encode("canary-5d1c0b").as_bytes(), word));
    }

    #[test]
    fn recorded_messages_are_taken_apart() {
        let bytes = b"POST /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\
            \r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\nPOST /cut HTTP/1.1\r\ncontent-length: 9\r\n\r\nx";
        let found = messages(bytes);
        let bodies: Vec<_> = found.iter().map(|m| m.body.as_slice()).collect();
        assert_eq!(bodies, [&b"abc"[..], b"def", b""]);
        assert!(found[0].head.starts_with("post /a "));
        let recorded: usize = found.iter().map(|message| message.recorded).sum();
        assert!(bytes[recorded..].starts_with(b"POST /cut"));
    }
}
