//! What HELLO, WELCOME and LOAD say, and the digest of a matrix.

use std::io::{Read, Write};

use casemate_field::Field;

use crate::error::{WireError, check_payload};
use crate::frame::{self, Header, Kind, take};
use crate::{MAX_WINDOW, VERSION};

/// What HELLO begins with.
const MAGIC: [u8; 4] = *b"CMWK";

/// Bytes of HELLO's payload.
const HELLO: u64 = 12;

/// Bytes of WELCOME's payload before the name.
const WELCOME: usize = 20;

/// Most characters of a worker's name.
pub const MAX_NAME: usize = 32;

/// What a client opens with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The connection's field.
    pub field: Field,
    /// The largest payload that the client takes. A connection has the smaller of both sides'.
    pub max_payload: u32,
}

impl Hello {
    pub(crate) fn write(&self, stream: &mut impl Write) -> Result<(), WireError> {
        let mut payload = MAGIC.to_vec();
        payload.extend(VERSION.to_le_bytes());
        payload.extend([0, 0]);
        payload.extend(self.max_payload.to_le_bytes());
        let header = Header::new(Kind::Hello, Some(self.field), payload.len(), 0);
        frame::write(stream, &header, &payload)
    }

    pub(crate) fn read(stream: &mut impl Read) -> Result<Hello, WireError> {
        let header = Header::read(stream)?;
        header.expect_kind(Kind::Hello, "HELLO")?;
        header.expect_length(HELLO)?;
        header.expect_id(0)?;
        let payload: [u8; HELLO as usize] = frame::read_array(stream)?;
        if payload[..4] != MAGIC {
            return Err(WireError::Magic);
        }
        // Before anything whose meaning a version may change.
        let version = u16::from_le_bytes(take(&payload, 4));
        if version != VERSION {
            return Err(WireError::Version { found: version });
        }
        header.expect_zero(payload[6..8] == [0, 0])?;
        let field = Field::from_id(header.field).ok_or(WireError::Field {
            found: header.field,
            expected: "1 or 2",
        })?;
        let max_payload = check_payload(u32::from_le_bytes(take(&payload, 8)))?;
        Ok(Hello { field, max_payload })
    }
}

/// What a worker offers to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// MULTIPLYs that may be without an answer, 1 to [`MAX_WINDOW`].
    pub window: u16,
    /// The largest payload that the worker takes.
    pub max_payload: u32,
    /// Bytes that matrices may take.
    pub memory: u64,
    /// Most rows of one MULTIPLY, at least 1.
    pub max_rows: u16,
    /// What computes, 1 to [`MAX_NAME`] visible ASCII characters; not checked by anybody.
    pub name: String,
}

impl Welcome {
    /// Checks what the protocol demands of an offer.
    ///
    /// # Errors
    /// [`WireError::Limit`], [`WireError::Name`].
    pub fn check(&self) -> Result<(), WireError> {
        check_payload(self.max_payload)?;
        let limit = |what, found: u16| {
            let found = found.into();
            Err(WireError::Limit { what, found })
        };
        if !(1..=MAX_WINDOW).contains(&self.window) {
            return limit("the window", self.window);
        }
        if self.max_rows == 0 {
            return limit("the most rows", self.max_rows);
        }
        let visible = self.name.bytes().all(|b| b.is_ascii_graphic());
        if !visible || !(1..=MAX_NAME).contains(&self.name.len()) {
            return Err(WireError::Name);
        }
        Ok(())
    }

    pub(crate) fn write(&self, stream: &mut impl Write, field: Field) -> Result<(), WireError> {
        self.check()?;
        let mut payload = VERSION.to_le_bytes().to_vec();
        payload.extend(self.window.to_le_bytes());
        payload.extend(self.max_payload.to_le_bytes());
        payload.extend(self.memory.to_le_bytes());
        payload.extend(self.max_rows.to_le_bytes());
        payload.extend([0, self.name.len() as u8]);
        payload.extend(self.name.bytes());
        let header = Header::new(Kind::Welcome, Some(field), payload.len(), 0);
        frame::write(stream, &header, &payload)
    }

    /// After its header, whose type and field were checked.
    pub(crate) fn read(stream: &mut impl Read, header: &Header) -> Result<Welcome, WireError> {
        header.expect_id(0)?;
        let (least, most) = (WELCOME + 1, WELCOME + MAX_NAME);
        let length = header.length as usize;
        header.expect_length(length.clamp(least, most) as u64)?;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload)?;
        let version = u16::from_le_bytes(take(&payload, 0));
        if version != VERSION {
            return Err(WireError::Version { found: version });
        }
        header.expect_zero(payload[18] == 0)?;
        header.expect_length((WELCOME + usize::from(payload[19])) as u64)?;
        let name = std::str::from_utf8(&payload[WELCOME..]).map_err(|_| WireError::Name)?;
        let welcome = Welcome {
            window: u16::from_le_bytes(take(&payload, 2)),
            max_payload: u32::from_le_bytes(take(&payload, 4)),
            memory: u64::from_le_bytes(take(&payload, 8)),
            max_rows: u16::from_le_bytes(take(&payload, 16)),
            name: name.to_owned(),
        };
        welcome.check()?;
        Ok(welcome)
    }
}

/// Rows (outputs) and columns (inputs) of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Outputs.
    pub rows: u32,
    /// Inputs.
    pub columns: u32,
}

impl Shape {
    /// Weights, one byte each.
    #[must_use]
    pub fn weights(self) -> u64 {
        u64::from(self.rows) * u64::from(self.columns)
    }

    /// Whether a matrix of this shape can be multiplied in a field with payloads of such a size.
    pub(crate) fn check(self, field: Field, max_payload: u32) -> Result<(), WireError> {
        let fits = |elements: u32| elements > 0 && payload_of(1, elements) <= max_payload.into();
        let wide = self.columns as usize <= field.max_width();
        if !(wide && fits(self.columns) && fits(self.rows)) {
            let Shape { rows, columns } = self;
            return Err(WireError::Shape { rows, columns });
        }
        Ok(())
    }

    pub(crate) fn encode(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.rows.to_le_bytes());
        bytes[4..].copy_from_slice(&self.columns.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: [u8; 8]) -> Shape {
        Shape {
            rows: u32::from_le_bytes(take(&bytes, 0)),
            columns: u32::from_le_bytes(take(&bytes, 4)),
        }
    }
}

/// Bytes of a payload of so many rows of so many elements.
pub(crate) fn payload_of(rows: u16, elements: u32) -> u64 {
    8 + 4 * u64::from(rows) * u64::from(elements)
}

/// Of MULTIPLY and PRODUCT: matrix and rows.
pub(crate) fn which(matrix: u32, rows: u16) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&matrix.to_le_bytes());
    bytes[4..6].copy_from_slice(&rows.to_le_bytes());
    bytes
}

/// BLAKE3 of a matrix's shape and weights.
pub type Digest = [u8; 32];

/// Makes the digest of a matrix from pieces of its weights.
pub(crate) fn digest_of(shape: Shape) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"casemate worker matrix v1");
    hasher.update(&shape.encode());
    hasher
}
