//! The framing of encrypted chunks, the same in both directions:
//!
//! ```text
//! (length ‖ ciphertext)* ‖ 0 ‖ ciphertext until the end of the transport
//! ```
//!
//! Lengths are QUIC variable-length integers (RFC 9000, section 16) in their shortest form. A chunk
//! that is not the last carries at least a byte.

use super::suite::TAG_BYTES;

/// The most plaintext a chunk may carry.
pub(super) const MAX_CHUNK_PLAINTEXT: usize = 1 << 14;
const MAX_CHUNK: usize = MAX_CHUNK_PLAINTEXT + TAG_BYTES;

/// Why bytes are not a sequence of chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkFault {
    /// A length out of range or not in its shortest form, or a last chunk that is too long.
    Malformed,
    /// The transport ended before the last chunk, or too early for it.
    Truncated,
}

/// Appends a chunk that is not the last.
pub fn put(chunk: &[u8], out: &mut Vec<u8>) {
    put_varint(chunk.len() as u64, out);
    out.extend_from_slice(chunk);
}

/// Appends the last chunk.
pub fn put_last(chunk: &[u8], out: &mut Vec<u8>) {
    out.push(0);
    out.extend_from_slice(chunk);
}

/// Splits a transport into chunks, whatever pieces its bytes come in.
pub struct ChunkReader {
    state: State,
}

enum State {
    /// Collecting a length; at most eight bytes.
    Length(Vec<u8>),
    /// Collecting a chunk of the given length.
    Chunk(usize, Vec<u8>),
    /// Collecting the last chunk.
    Last(Vec<u8>),
}

impl Default for ChunkReader {
    fn default() -> ChunkReader {
        ChunkReader::new()
    }
}

impl ChunkReader {
    /// A reader before the first byte.
    pub fn new() -> ChunkReader {
        ChunkReader {
            state: State::Length(Vec::new()),
        }
    }

    /// Takes bytes and returns the chunks they complete, none of them the last.
    ///
    /// # Errors
    /// [`ChunkFault::Malformed`]; the reader is then not worth feeding.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Vec<Vec<u8>>, ChunkFault> {
        let mut chunks = Vec::new();
        while !bytes.is_empty() {
            match &mut self.state {
                State::Length(buffer) => {
                    buffer.push(bytes[0]);
                    bytes = &bytes[1..];
                    let Some((length, _)) = take_varint(buffer) else {
                        continue;
                    };
                    if varint_bytes(length) != buffer.len() {
                        return Err(ChunkFault::Malformed);
                    }
                    self.state = match usize::try_from(length) {
                        Ok(0) => State::Last(Vec::new()),
                        Ok(n) if (TAG_BYTES + 1..=MAX_CHUNK).contains(&n) => {
                            State::Chunk(n, Vec::new())
                        }
                        _ => return Err(ChunkFault::Malformed),
                    };
                }
                State::Chunk(length, buffer) => {
                    let take = (*length - buffer.len()).min(bytes.len());
                    let (part, rest) = bytes.split_at(take);
                    buffer.extend_from_slice(part);
                    bytes = rest;
                    if buffer.len() == *length {
                        chunks.push(std::mem::take(buffer));
                        self.state = State::Length(Vec::new());
                    }
                }
                State::Last(buffer) => {
                    if buffer.len() + bytes.len() > MAX_CHUNK {
                        return Err(ChunkFault::Malformed);
                    }
                    buffer.extend_from_slice(bytes);
                    bytes = &[];
                }
            }
        }
        Ok(chunks)
    }

    /// Says that the transport has ended, and returns the last chunk.
    ///
    /// # Errors
    /// [`ChunkFault::Truncated`].
    pub fn finish(self) -> Result<Vec<u8>, ChunkFault> {
        match self.state {
            State::Last(chunk) if chunk.len() >= TAG_BYTES => Ok(chunk),
            _ => Err(ChunkFault::Truncated),
        }
    }
}

/// Writes a variable-length integer in its shortest form.
pub(super) fn put_varint(value: u64, out: &mut Vec<u8>) {
    match varint_bytes(value) {
        1 => out.push(value as u8),
        2 => out.extend_from_slice(&(value as u16 | 0x4000).to_be_bytes()),
        4 => out.extend_from_slice(&(value as u32 | 0x8000_0000).to_be_bytes()),
        _ => out.extend_from_slice(&(value | 0xc000_0000_0000_0000).to_be_bytes()),
    }
}

/// Reads a variable-length integer and returns it with the rest; nothing if bytes are missing.
pub(super) fn take_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = *bytes.first()?;
    let length = 1usize << (first >> 6);
    let (head, rest) = bytes.split_at_checked(length)?;
    let value = head[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |v, &b| v << 8 | u64::from(b));
    Some((value, rest))
}

fn varint_bytes(value: u64) -> usize {
    match value {
        0..0x40 => 1,
        0x40..0x4000 => 2,
        0x4000..0x4000_0000 => 4,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_are_those_of_rfc_9000() {
        let samples: [(u64, &[u8]); 5] = [
            (37, &[0x25]),
            (15_293, &[0x7b, 0xbd]),
            (494_878_333, &[0x9d, 0x7f, 0x3e, 0x7d]),
            (
                151_288_809_941_952_652,
                &[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c],
            ),
            (0, &[0]),
        ];
        for (value, bytes) in samples {
            let mut out = Vec::new();
            put_varint(value, &mut out);
            assert_eq!(out, bytes);
            assert_eq!(take_varint(bytes), Some((value, &[][..])));
            assert_eq!(take_varint(&bytes[..bytes.len() - 1]), None);
        }
    }

    fn read(bytes: &[u8], piece: usize) -> Result<Vec<Vec<u8>>, ChunkFault> {
        let mut reader = ChunkReader::new();
        let mut chunks = Vec::new();
        for piece in bytes.chunks(piece) {
            chunks.extend(reader.push(piece)?);
        }
        chunks.push(reader.finish()?);
        Ok(chunks)
    }

    #[test]
    fn chunks_come_out_as_they_went_in_whatever_the_pieces() {
        // Around the sizes at which a length takes another byte, and the largest.
        let chunks = [17, 63, 64, 530, MAX_CHUNK - 1, MAX_CHUNK].map(|n| vec![n as u8; n]);
        let mut bytes = Vec::new();
        chunks.iter().for_each(|chunk| put(chunk, &mut bytes));
        put_last(&[9; 16], &mut bytes);
        let expected = [&chunks[..], &[vec![9; 16]]].concat();
        for piece in [1, 2, 3, 64, 1000, bytes.len()] {
            assert_eq!(read(&bytes, piece).unwrap(), expected, "pieces of {piece}");
        }
        for cut in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            assert_eq!(
                read(&bytes[..cut], 4096),
                Err(ChunkFault::Truncated),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn refuses_lengths_out_of_range_and_long_forms() {
        let too_long = MAX_CHUNK as u32 + 1;
        let malformed: [&[u8]; 6] = [
            &[1],                                    // shorter than a tag
            &[16],                                   // a tag and nothing else
            &(0x8000_0000 | too_long).to_be_bytes(), // over the limit
            &[0xff; 8],                              // far over the limit
            &[0x40, 20],                             // 20 in two bytes
            &[0x40, 0],                              // 0 in two bytes
        ];
        for bytes in malformed {
            assert_eq!(
                ChunkReader::new().push(bytes),
                Err(ChunkFault::Malformed),
                "{bytes:?}"
            );
        }
        let mut endless = ChunkReader::new();
        assert_eq!(endless.push(&[0]), Ok(vec![]));
        assert_eq!(endless.push(&[1; MAX_CHUNK]), Ok(vec![]));
        assert_eq!(endless.push(&[1]), Err(ChunkFault::Malformed));
    }
}
