//! Headers, and payloads in pieces, so that memory is taken as bytes come.

use std::io::{self, Read, Write};

use casemate_field::Field;

use crate::error::WireError;

/// Bytes of a header.
pub(crate) const HEADER: usize = 16;

/// Bytes of elements that are read or written at once.
const PIECE: usize = 64 << 10;

/// Types of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Hello = 1,
    Welcome,
    Load,
    Ready,
    Part,
    Loaded,
    Multiply,
    Product,
    Error,
}

/// A header whose fixed parts are as they must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Type of the frame, perhaps none that is known.
    pub(crate) kind: u8,
    /// Id of the field, perhaps none that is known.
    pub(crate) field: u8,
    /// Bytes of the payload.
    pub(crate) length: u32,
    pub(crate) id: u64,
}

impl Header {
    pub(crate) fn new(kind: Kind, field: Option<Field>, length: usize, id: u64) -> Header {
        Header {
            kind: kind as u8,
            field: field.map_or(0, Field::id),
            length: u32::try_from(length).expect("payloads are at most 64 MiB"),
            id,
        }
    }

    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind;
        bytes[1] = self.field;
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.id.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; HEADER]) -> Result<Header, WireError> {
        let header = Header {
            kind: bytes[0],
            field: bytes[1],
            length: u32::from_le_bytes(take(&bytes, 4)),
            id: u64::from_le_bytes(take(&bytes, 8)),
        };
        if bytes[2..4] != [0, 0] {
            return Err(WireError::Reserved { kind: header.kind });
        }
        Ok(header)
    }

    /// The header after its first byte.
    pub(crate) fn read_after(first: u8, stream: &mut impl Read) -> Result<Header, WireError> {
        let mut bytes = [first; HEADER];
        stream.read_exact(&mut bytes[1..])?;
        Header::decode(bytes)
    }

    pub(crate) fn read(stream: &mut impl Read) -> Result<Header, WireError> {
        let first = first_byte(stream)?.ok_or(WireError::Closed)?;
        Header::read_after(first, stream)
    }

    pub(crate) fn expect_kind(&self, kind: Kind, expected: &'static str) -> Result<(), WireError> {
        if self.kind != kind as u8 {
            let found = self.kind;
            return Err(WireError::Kind { found, expected });
        }
        Ok(())
    }

    pub(crate) fn expect_field(&self, field: Field) -> Result<(), WireError> {
        if self.field != field.id() {
            return Err(WireError::Field {
                found: self.field,
                expected: "the connection's",
            });
        }
        Ok(())
    }

    pub(crate) fn expect_id(&self, expected: u64) -> Result<(), WireError> {
        if self.id != expected {
            return Err(WireError::Id {
                kind: self.kind,
                found: self.id,
                expected,
            });
        }
        Ok(())
    }

    pub(crate) fn expect_length(&self, expected: u64) -> Result<(), WireError> {
        if u64::from(self.length) != expected {
            return Err(WireError::Length {
                kind: self.kind,
                found: self.length,
                expected,
            });
        }
        Ok(())
    }

    /// For zeros inside of the payload.
    pub(crate) fn expect_zero(&self, zero: bool) -> Result<(), WireError> {
        match zero {
            true => Ok(()),
            false => Err(WireError::Reserved { kind: self.kind }),
        }
    }
}

/// The first byte of the next frame, or none if the stream ends here.
pub(crate) fn first_byte(stream: &mut impl Read) -> Result<Option<u8>, WireError> {
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(byte[0])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// `N` bytes of a payload from `at` on.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes")
}

/// A payload of a length that is known.
pub(crate) fn read_array<const N: usize>(stream: &mut impl Read) -> Result<[u8; N], WireError> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Elements into a row of their number, through a buffer that is kept.
pub(crate) fn read_elements(
    stream: &mut impl Read,
    field: Field,
    out: &mut [u32],
    buffer: &mut Vec<u8>,
) -> Result<(), WireError> {
    read_elements_from(stream, field, out, 0, buffer)
}

/// Elements in memory that grows as they come.
pub(crate) fn collect_elements(
    stream: &mut impl Read,
    field: Field,
    count: usize,
) -> Result<Vec<u32>, WireError> {
    let mut elements = Vec::new();
    let mut buffer = Vec::new();
    while elements.len() < count {
        let first = elements.len();
        // Twice as much as has come, at least a piece.
        let next = (first * 2).max(PIECE / 4).min(count);
        elements.reserve_exact(next - first);
        elements.resize(next, 0);
        read_elements_from(stream, field, &mut elements[first..], first, &mut buffer)?;
    }
    Ok(elements)
}

fn read_elements_from(
    stream: &mut impl Read,
    field: Field,
    out: &mut [u32],
    before: usize,
    buffer: &mut Vec<u8>,
) -> Result<(), WireError> {
    if buffer.len() < PIECE.min(out.len() * 4) {
        buffer.resize(PIECE.min(out.len() * 4), 0);
    }
    for (piece, out) in out.chunks_mut(PIECE / 4).enumerate() {
        let bytes = &mut buffer[..out.len() * 4];
        stream.read_exact(bytes)?;
        for (out, word) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = u32::from_le_bytes(*word);
        }
        if !field.contains(out) {
            let index = out.iter().position(|x| *x >= field.modulus());
            return Err(WireError::Element {
                index: before + piece * (PIECE / 4) + index.unwrap_or(0),
            });
        }
    }
    Ok(())
}

/// A whole frame that is short.
pub(crate) fn write(
    stream: &mut impl Write,
    header: &Header,
    payload: &[u8],
) -> Result<(), WireError> {
    stream.write_all(&[&header.encode()[..], payload].concat())?;
    stream.flush()?;
    Ok(())
}

/// A frame of elements, after what says which they are, through a buffer that is kept.
pub(crate) fn write_elements(
    stream: &mut impl Write,
    kind: Kind,
    field: Field,
    id: u64,
    which: [u8; 8],
    elements: &[u32],
    buffer: &mut Vec<u8>,
) -> Result<(), WireError> {
    let header = Header::new(kind, Some(field), which.len() + elements.len() * 4, id);
    buffer.clear();
    buffer.reserve(HEADER + which.len() + PIECE.min(elements.len() * 4));
    buffer.extend_from_slice(&header.encode());
    buffer.extend_from_slice(&which);
    for piece in elements.chunks(PIECE / 4) {
        buffer.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
        stream.write_all(buffer)?;
        buffer.clear();
    }
    stream.flush()?;
    Ok(())
}
