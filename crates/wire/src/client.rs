//! The enclave's end of a connection.

use std::collections::VecDeque;
use std::io::{Read, Write};

use casemate_field::Field;

use crate::error::{Refusal, WireError, check_payload};
use crate::frame::{self, Header, Kind, take};
use crate::message::{Hello, Shape, Welcome, digest_of, payload_of, which};
use crate::{MAX_MATRICES, PART};

/// A connection to a worker.
///
/// Waiting is the stream's business: give it a time limit ([`Timed`](crate::Timed), through
/// [`Client::stream`]) before each call. After any error but [`WireError::WindowFull`] and
/// [`WireError::Misuse`] the connection is over and every call fails.
pub struct Client<S> {
    stream: S,
    field: Field,
    /// The smaller of both sides'.
    max_payload: u32,
    welcome: Welcome,
    shapes: Vec<Shape>,
    /// What was asked for and not answered, the oldest first.
    asked: VecDeque<Answer>,
    /// Number of the next request.
    next: u64,
    over: bool,
    /// Bytes of elements on their way.
    buffer: Vec<u8>,
}

/// Which product comes next, or has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Number of the request.
    pub request: u64,
    /// The matrix.
    pub matrix: u32,
    /// Rows asked for.
    pub rows: u16,
}

impl<S: Read + Write> Client<S> {
    /// Opens a connection in a field; `max_payload` is the largest payload that this end will take,
    /// from [`MIN_PAYLOAD`](crate::MIN_PAYLOAD) to [`MAX_PAYLOAD`](crate::MAX_PAYLOAD).
    ///
    /// # Errors
    /// What the worker does wrong, its refusal, or the stream's.
    pub fn open(mut stream: S, field: Field, max_payload: u32) -> Result<Client<S>, WireError> {
        check_payload(max_payload)?;
        Hello { field, max_payload }.write(&mut stream)?;
        let header = answer(&mut stream, field, Kind::Welcome, "WELCOME")?;
        let welcome = Welcome::read(&mut stream, &header)?;
        Ok(Client {
            stream,
            field,
            max_payload: max_payload.min(welcome.max_payload),
            welcome,
            shapes: Vec::new(),
            asked: VecDeque::new(),
            next: 1,
            over: false,
            buffer: Vec::new(),
        })
    }

    /// What the worker offered.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// The connection's field.
    pub fn field(&self) -> Field {
        self.field
    }

    /// The stream, to give it another time limit. Who reads or writes it breaks the connection.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The shape of a matrix that was loaded.
    pub fn shape(&self, matrix: u32) -> Option<Shape> {
        self.shapes.get(matrix as usize).copied()
    }

    /// Most rows of one MULTIPLY with a matrix, at least 1: what the worker computes at once and what
    /// fits payloads of both directions. `None` for a matrix that was not loaded.
    pub fn most_rows(&self, matrix: u32) -> Option<u16> {
        let shape = self.shape(matrix)?;
        let fit = |elements: u32| (self.max_payload - 8) / 4 / elements;
        let fits = fit(shape.columns).min(fit(shape.rows));
        let fits = fits.min(self.welcome.max_rows.into());
        Some(u16::try_from(fits).expect("no more than the worker's u16"))
    }

    /// The product that comes next; none if nothing was asked for.
    pub fn due(&self) -> Option<Answer> {
        self.asked.front().copied()
    }

    /// How many products are on their way.
    pub fn unanswered(&self) -> usize {
        self.asked.len()
    }

    /// Loads a matrix and returns its number: `row(i, out)` writes the weights of row `i`. `each` is
    /// called before each part and each wait, to prolong the stream's time limit.
    ///
    /// # Errors
    /// [`WireError::Shape`] and [`WireError::Misuse`] before anything is sent; [`WireError::Refused`]
    /// with [`Refusal::Memory`] if the worker has no room; [`WireError::Digest`]; the stream's.
    pub fn load(
        &mut self,
        shape: Shape,
        row: impl FnMut(u32, &mut [i8]),
        each: impl FnMut(&mut S),
    ) -> Result<u32, WireError> {
        self.not_over()?;
        if !self.asked.is_empty() {
            return Err(WireError::Misuse("products are on their way"));
        }
        if self.shapes.len() >= MAX_MATRICES as usize {
            return Err(WireError::Misuse("there are 65,536 matrices already"));
        }
        shape.check(self.field, self.max_payload)?;
        let matrix = self.shapes.len() as u32;
        self.over = true;
        self.send_matrix(matrix, shape, row, each)?;
        self.over = false;
        self.shapes.push(shape);
        Ok(matrix)
    }

    fn send_matrix(
        &mut self,
        matrix: u32,
        shape: Shape,
        mut row: impl FnMut(u32, &mut [i8]),
        mut each: impl FnMut(&mut S),
    ) -> Result<(), WireError> {
        let id = u64::from(matrix);
        let header = |kind, length| Header::new(kind, Some(self.field), length, id);
        each(&mut self.stream);
        frame::write(&mut self.stream, &header(Kind::Load, 8), &shape.encode())?;
        let ready = answer(&mut self.stream, self.field, Kind::Ready, "READY")?;
        ready.expect_id(id)?;
        ready.expect_length(0)?;
        let mut digest = digest_of(shape);
        let mut weights = vec![0i8; shape.columns as usize];
        let mut part = Vec::with_capacity(PART as usize);
        let mut send = |stream: &mut S, part: &mut Vec<u8>| {
            each(stream);
            digest.update(part);
            stream.write_all(&header(Kind::Part, part.len()).encode())?;
            stream.write_all(part)?;
            part.clear();
            Ok::<_, WireError>(())
        };
        for i in 0..shape.rows {
            row(i, &mut weights);
            if weights.contains(&-128) {
                return Err(WireError::Misuse("a weight is -128"));
            }
            let mut left = &weights[..];
            while !left.is_empty() {
                let now = left.len().min(PART as usize - part.len());
                part.extend(left[..now].iter().map(|w| *w as u8));
                left = &left[now..];
                if part.len() == PART as usize {
                    send(&mut self.stream, &mut part)?;
                }
            }
        }
        if !part.is_empty() {
            send(&mut self.stream, &mut part)?;
        }
        each(&mut self.stream);
        self.stream.flush()?;
        let loaded = answer(&mut self.stream, self.field, Kind::Loaded, "LOADED")?;
        loaded.expect_id(id)?;
        loaded.expect_length(32)?;
        let found: [u8; 32] = frame::read_array(&mut self.stream)?;
        if digest.finalize().as_bytes() != &found {
            return Err(WireError::Digest { matrix });
        }
        Ok(())
    }

    /// Asks for the product of rows with a matrix and returns the request's number: `elements` are
    /// whole rows of as many elements as the matrix has columns, at most [`Client::most_rows`].
    ///
    /// # Errors
    /// [`WireError::WindowFull`]; [`WireError::Misuse`] for anything that the worker would refuse; the
    /// stream's. Of these only the stream's leave the elements sent, perhaps in part.
    pub fn multiply(&mut self, matrix: u32, elements: &[u32]) -> Result<u64, WireError> {
        self.not_over()?;
        let (Some(shape), Some(most)) = (self.shape(matrix), self.most_rows(matrix)) else {
            return Err(WireError::Misuse("no such matrix"));
        };
        if self.asked.len() >= self.welcome.window.into() {
            return Err(WireError::WindowFull);
        }
        let columns = shape.columns as usize;
        let rows = elements.len() / columns;
        if rows == 0 || rows > most.into() || rows * columns != elements.len() {
            return Err(WireError::Misuse("not whole rows, none, or too many"));
        }
        if !self.field.contains(elements) {
            return Err(WireError::Misuse("something is not an element"));
        }
        let answer = Answer {
            request: self.next,
            matrix,
            rows: rows as u16,
        };
        self.over = true;
        frame::write_elements(
            &mut self.stream,
            Kind::Multiply,
            self.field,
            answer.request,
            which(matrix, answer.rows),
            elements,
            &mut self.buffer,
        )?;
        self.over = false;
        self.next += 1;
        self.asked.push_back(answer);
        Ok(answer.request)
    }

    /// Takes the product that is [due](Client::due): `out` is whole rows, as many as were asked for, of
    /// as many elements as the matrix has rows. They are elements; nothing else is known of them.
    ///
    /// # Errors
    /// [`WireError::Misuse`] if nothing is due or `out` has another length; what the worker does
    /// wrong, its refusal, or the stream's.
    pub fn product(&mut self, out: &mut [u32]) -> Result<Answer, WireError> {
        self.not_over()?;
        let due = self.due().ok_or(WireError::Misuse("nothing is due"))?;
        let outputs = self.shapes[due.matrix as usize].rows;
        if out.len() != usize::from(due.rows) * outputs as usize {
            return Err(WireError::Misuse("the product has another length"));
        }
        self.over = true;
        let header = answer(&mut self.stream, self.field, Kind::Product, "PRODUCT")?;
        header.expect_id(due.request)?;
        header.expect_length(payload_of(due.rows, outputs))?;
        let which: [u8; 8] = frame::read_array(&mut self.stream)?;
        let matrix = u32::from_le_bytes(take(&which, 0));
        if matrix != due.matrix {
            return Err(WireError::Matrix { found: matrix });
        }
        let rows = u16::from_le_bytes(take(&which, 4));
        if rows != due.rows {
            return Err(WireError::Rows {
                found: rows,
                expected: "as many as were asked for",
            });
        }
        header.expect_zero(which[6..] == [0, 0])?;
        frame::read_elements(&mut self.stream, self.field, out, &mut self.buffer)?;
        self.over = false;
        self.asked.pop_front();
        Ok(due)
    }

    fn not_over(&self) -> Result<(), WireError> {
        match self.over {
            true => Err(WireError::Over),
            false => Ok(()),
        }
    }
}

/// The header of the answer that is due, or the worker's refusal.
fn answer(
    stream: &mut impl Read,
    field: Field,
    kind: Kind,
    expected: &'static str,
) -> Result<Header, WireError> {
    let header = Header::read(stream)?;
    if header.kind == Kind::Error as u8 {
        header.expect_length(2)?;
        header.expect_id(0)?;
        if header.field != 0 {
            return Err(WireError::Field {
                found: header.field,
                expected: "0, as in every ERROR",
            });
        }
        let code = u16::from_le_bytes(frame::read_array(stream)?);
        return Err(WireError::Refused(Refusal::from_code(code)));
    }
    header.expect_kind(kind, expected)?;
    header.expect_field(field)?;
    Ok(header)
}
