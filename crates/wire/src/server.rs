//! The worker's end of a connection: what it reads and what it writes, for two threads, since a worker
//! has to go on reading while it computes and sends.

use std::io::{Read, Write};

use casemate_field::Field;

use crate::error::{Refusal, WireError};
use crate::frame::{self, Header, Kind, take};
use crate::message::{Digest, Hello, Shape, Welcome, digest_of, payload_of, which};
use crate::{MAX_MATRICES, PART};

/// The reading half. After any error the connection is over.
pub struct Receiver<R> {
    stream: R,
    hello: Hello,
    offer: Welcome,
    /// The smaller of both sides'.
    max_payload: u32,
    /// What weights may come to.
    memory_left: u64,
    /// Of matrices whose weights have come.
    shapes: Vec<Shape>,
    /// A matrix whose weights are due.
    loading: Option<Shape>,
    /// Number that the next request must have.
    next: u64,
    /// The first byte of the next frame, if it was waited for.
    first: Option<u8>,
}

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// To load a matrix. The answer is READY or a refusal; then [`Receiver::weights`].
    Load(Load),
    /// To multiply.
    Multiply(Multiply),
}

/// A matrix to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Its number.
    pub matrix: u32,
    /// Its shape, which the protocol allows.
    pub shape: Shape,
}

/// A matrix that came.
pub struct Weights {
    /// Its number and shape.
    pub load: Load,
    /// Row after row, in -127..=127.
    pub weights: Vec<i8>,
    /// What LOADED has to say.
    pub digest: Digest,
}

/// Rows to be multiplied with a matrix.
#[derive(Debug, PartialEq, Eq)]
pub struct Multiply {
    /// Number of the request.
    pub request: u64,
    /// The matrix, which was loaded.
    pub matrix: u32,
    /// Rows, at least 1.
    pub rows: u16,
    /// As many rows of elements of the connection's field.
    pub elements: Vec<u32>,
}

impl<R: Read> Receiver<R> {
    /// Reads HELLO on a new connection to which `offer` will be made.
    ///
    /// # Errors
    /// What the client does wrong, or the stream's.
    ///
    /// # Panics
    /// If the offer is not what the [protocol allows](Welcome::check).
    pub fn open(mut stream: R, offer: Welcome) -> Result<Receiver<R>, WireError> {
        offer.check().expect("an offer that the protocol allows");
        let hello = Hello::read(&mut stream)?;
        Ok(Receiver {
            stream,
            hello,
            max_payload: hello.max_payload.min(offer.max_payload),
            memory_left: offer.memory,
            offer,
            shapes: Vec::new(),
            loading: None,
            next: 1,
            first: None,
        })
    }

    /// What the client opened with.
    pub fn hello(&self) -> Hello {
        self.hello
    }

    /// The stream, to give it another time limit.
    pub fn stream(&mut self) -> &mut R {
        &mut self.stream
    }

    /// Whether a matrix was loaded.
    pub fn holds_any(&self) -> bool {
        !self.shapes.is_empty()
    }

    /// Waits for the next frame to begin; false if the client closed the connection instead.
    ///
    /// # Errors
    /// The stream's.
    pub fn wait(&mut self) -> Result<bool, WireError> {
        if self.first.is_none() {
            self.first = frame::first_byte(&mut self.stream)?;
        }
        Ok(self.first.is_some())
    }

    fn header(&mut self) -> Result<Header, WireError> {
        if !self.wait()? {
            return Err(WireError::Closed);
        }
        let first = self.first.take().expect("a frame has begun");
        let header = Header::read_after(first, &mut self.stream)?;
        Ok(header)
    }

    /// Reads the next request.
    ///
    /// # Errors
    /// What the client does wrong, or the stream's; [`WireError::Misuse`] while weights are due.
    pub fn request(&mut self) -> Result<Request, WireError> {
        if self.loading.is_some() {
            return Err(WireError::Misuse("the weights of a matrix are due"));
        }
        let header = self.header()?;
        match header.kind {
            kind if kind == Kind::Load as u8 => self.load(&header).map(Request::Load),
            kind if kind == Kind::Multiply as u8 => self.multiply(&header).map(Request::Multiply),
            found => Err(WireError::Kind {
                found,
                expected: "LOAD or MULTIPLY",
            }),
        }
    }

    fn load(&mut self, header: &Header) -> Result<Load, WireError> {
        header.expect_field(self.hello.field)?;
        header.expect_length(8)?;
        let matrix = self.shapes.len() as u32;
        header.expect_id(matrix.into())?;
        if matrix >= MAX_MATRICES {
            return Err(WireError::TooLarge {
                what: "matrices",
                found: u64::from(matrix) + 1,
                limit: MAX_MATRICES.into(),
            });
        }
        let shape = Shape::decode(frame::read_array(&mut self.stream)?);
        shape.check(self.hello.field, self.max_payload)?;
        // However a matrix is kept, it takes a byte for each weight.
        let (needed, left) = (shape.weights(), self.memory_left);
        if needed > left {
            return Err(WireError::Memory { needed, left });
        }
        self.memory_left -= needed;
        self.loading = Some(shape);
        Ok(Load { matrix, shape })
    }

    /// Reads the weights of the matrix that [`Receiver::request`] returned last. Memory is taken as they
    /// come. `each` is called before each part, to prolong the stream's time limit.
    ///
    /// # Errors
    /// What the client does wrong, or the stream's; [`WireError::Misuse`] if none are due.
    pub fn weights(&mut self, mut each: impl FnMut(&mut R)) -> Result<Weights, WireError> {
        let due = WireError::Misuse("no weights are due");
        let shape = self.loading.ok_or(due)?;
        let matrix = self.shapes.len() as u32;
        let mut digest = digest_of(shape);
        let mut weights: Vec<i8> = Vec::new();
        let mut part = Vec::new();
        let mut left = shape.weights();
        while left > 0 {
            each(&mut self.stream);
            let header = self.header()?;
            header.expect_kind(Kind::Part, "PART")?;
            header.expect_field(self.hello.field)?;
            header.expect_id(matrix.into())?;
            let length = left.min(PART.into());
            header.expect_length(length)?;
            part.resize(length as usize, 0);
            self.stream.read_exact(&mut part)?;
            if let Some(at) = part.iter().position(|w| *w == 0x80) {
                return Err(WireError::Weight {
                    index: shape.weights() - left + at as u64,
                });
            }
            digest.update(&part);
            if weights.is_empty() {
                // Only now that something has come.
                weights.reserve_exact(shape.weights() as usize);
            }
            weights.extend(part.iter().map(|w| *w as i8));
            left -= length;
        }
        self.loading = None;
        self.shapes.push(shape);
        Ok(Weights {
            load: Load { matrix, shape },
            weights,
            digest: *digest.finalize().as_bytes(),
        })
    }

    fn multiply(&mut self, header: &Header) -> Result<Multiply, WireError> {
        header.expect_field(self.hello.field)?;
        header.expect_id(self.next)?;
        let limit = self.max_payload;
        if header.length > limit {
            return Err(WireError::TooLarge {
                what: "bytes of a payload",
                found: header.length.into(),
                limit: limit.into(),
            });
        }
        header.expect_length(header.length.max(12).into())?;
        let which: [u8; 8] = frame::read_array(&mut self.stream)?;
        header.expect_zero(which[6..] == [0, 0])?;
        let matrix = u32::from_le_bytes(take(&which, 0));
        let shape = self.shapes.get(matrix as usize);
        let shape = shape.ok_or(WireError::Matrix { found: matrix })?;
        let rows = u16::from_le_bytes(take(&which, 4));
        if rows == 0 {
            return Err(WireError::Rows {
                found: rows,
                expected: "at least 1",
            });
        }
        // The answer has to fit, too.
        let product = payload_of(rows, shape.rows);
        for (what, found, limit) in [
            ("rows", rows.into(), self.offer.max_rows.into()),
            ("bytes of a product", product, limit.into()),
        ] {
            if found > limit {
                return Err(WireError::TooLarge { what, found, limit });
            }
        }
        header.expect_length(payload_of(rows, shape.columns))?;
        let count = usize::from(rows) * shape.columns as usize;
        let elements = frame::collect_elements(&mut self.stream, self.hello.field, count)?;
        self.next += 1;
        Ok(Multiply {
            request: header.id,
            matrix,
            rows,
            elements,
        })
    }
}

/// The writing half.
pub struct Responder<W> {
    stream: W,
    field: Field,
    /// Bytes of elements on their way.
    buffer: Vec<u8>,
}

impl<W: Write> Responder<W> {
    /// Answers HELLO.
    ///
    /// # Errors
    /// The stream's.
    pub fn open(mut stream: W, hello: Hello, offer: &Welcome) -> Result<Responder<W>, WireError> {
        offer.write(&mut stream, hello.field)?;
        let field = hello.field;
        Ok(Responder {
            stream,
            field,
            buffer: Vec::new(),
        })
    }

    /// The stream, to give it another time limit.
    pub fn stream(&mut self) -> &mut W {
        &mut self.stream
    }

    /// Says that there is room for a matrix.
    ///
    /// # Errors
    /// The stream's.
    pub fn ready(&mut self, matrix: u32) -> Result<(), WireError> {
        let header = Header::new(Kind::Ready, Some(self.field), 0, matrix.into());
        frame::write(&mut self.stream, &header, &[])
    }

    /// Says that a matrix is loaded.
    ///
    /// # Errors
    /// The stream's.
    pub fn loaded(&mut self, matrix: u32, digest: &Digest) -> Result<(), WireError> {
        let header = Header::new(Kind::Loaded, Some(self.field), digest.len(), matrix.into());
        frame::write(&mut self.stream, &header, digest)
    }

    /// Sends what a request came to: `elements` are its rows of outputs.
    ///
    /// # Errors
    /// The stream's.
    pub fn product(&mut self, to: &Multiply, elements: &[u32]) -> Result<(), WireError> {
        let which = which(to.matrix, to.rows);
        let stream = &mut self.stream;
        frame::write_elements(
            stream,
            Kind::Product,
            self.field,
            to.request,
            which,
            elements,
            &mut self.buffer,
        )
    }
}

/// Tells a client why its connection ends, also before it was opened.
///
/// # Errors
/// The stream's.
pub fn refuse(stream: &mut impl Write, why: Refusal) -> Result<(), WireError> {
    let header = Header::new(Kind::Error, None, 2, 0);
    frame::write(stream, &header, &why.code().to_le_bytes())
}
