//! What can go wrong, by who is at fault.

use std::fmt;
use std::io;

use crate::{MAX_PAYLOAD, MIN_PAYLOAD, VERSION};

/// Why a connection is over, or why something was not sent.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The system: the connection broke.
    #[error("the connection to the other end failed")]
    Io(#[source] io::Error),
    /// The other end took too long.
    #[error("the other end did not send or take what it had to in time")]
    Late,
    /// The other end closed the connection between two frames.
    #[error("the other end closed the connection")]
    Closed,
    /// The other end closed the connection inside of a frame.
    #[error("the connection ended inside a frame")]
    Truncated,

    /// Malformed: HELLO does not begin as it should, so the other end speaks something else.
    #[error("this is another protocol: no CMWK at its beginning")]
    Magic,
    /// Malformed or refused: another version.
    #[error("version {found} of the protocol; this end speaks {VERSION}")]
    Version {
        /// What it asked for or answered with.
        found: u16,
    },
    /// Malformed: a frame that is not due.
    #[error("a frame of type {found} instead of {expected}")]
    Kind {
        /// Its type.
        found: u8,
        /// What was due.
        expected: &'static str,
    },
    /// Malformed: another field than the connection's, or none that is known.
    #[error("field {found} instead of {expected}")]
    Field {
        /// The id in the header.
        found: u8,
        /// What was due.
        expected: &'static str,
    },
    /// Malformed: something where zero must be.
    #[error("a frame of type {kind} has something where zero must be")]
    Reserved {
        /// Its type.
        kind: u8,
    },
    /// Malformed: a length that does not fit type and shapes.
    #[error("a frame of type {kind} with {found} bytes instead of {expected}")]
    Length {
        /// Its type.
        kind: u8,
        /// The length in the header.
        found: u32,
        /// What it has to be.
        expected: u64,
    },
    /// Malformed: a frame out of order, or again.
    #[error("a frame of type {kind} with id {found} instead of {expected}")]
    Id {
        /// Its type.
        kind: u8,
        /// The id in the header.
        found: u64,
        /// What was due.
        expected: u64,
    },
    /// Malformed: no such matrix, or another than was asked for.
    #[error("matrix {found} is not known or not the one that is due")]
    Matrix {
        /// Its number.
        found: u32,
    },
    /// Malformed: no rows, or others than were asked for.
    #[error("{found} rows instead of {expected}")]
    Rows {
        /// What the frame says.
        found: u16,
        /// What it had to say.
        expected: &'static str,
    },
    /// Malformed: a number that is not below p.
    #[error("element {index} of a frame is not below p")]
    Element {
        /// Which, in the order of the frame.
        index: usize,
    },
    /// Malformed: a weight of -128.
    #[error("weight {index} of a matrix is -128; weights reach from -127 to 127")]
    Weight {
        /// Which, in the order of the matrix.
        index: u64,
    },
    /// Malformed: a limit that no side may have.
    #[error("{found} as {what}, which the protocol does not allow")]
    Limit {
        /// Of what.
        what: &'static str,
        /// What it says.
        found: u64,
    },
    /// Malformed: the worker's name is not 1 to 32 visible ASCII characters.
    #[error("the name of the worker is not 1 to 32 visible ASCII characters")]
    Name,
    /// Malformed: the worker loaded another matrix than was sent.
    #[error("the worker's digest of matrix {matrix} is not that of what was sent")]
    Digest {
        /// Its number.
        matrix: u32,
    },

    /// Too large: a matrix without elements, too wide for the field, or of which no row fits a frame.
    #[error("a matrix of {rows} by {columns} cannot be multiplied over this connection")]
    Shape {
        /// Outputs.
        rows: u32,
        /// Inputs.
        columns: u32,
    },
    /// Too large: beyond what this end takes.
    #[error("{found} {what}, and the limit is {limit}")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How many.
        found: u64,
        /// How many are allowed.
        limit: u64,
    },

    /// Too large: a matrix beyond the memory of its connection.
    #[error("{needed} bytes for a matrix, and {left} are left")]
    Memory {
        /// What it takes.
        needed: u64,
        /// What there is.
        left: u64,
    },

    /// The worker ended the connection and says why.
    #[error("the worker refuses: {0}")]
    Refused(Refusal),

    /// Misuse: after a fault nothing more is sent or read.
    #[error("the connection is over; open another one")]
    Over,
    /// Misuse: as many products as the worker's window allows are on their way.
    #[error("the worker's window is full; take a product first")]
    WindowFull,
    /// Misuse of this end's own functions.
    #[error("misuse: {0}")]
    Misuse(&'static str),
}

impl WireError {
    /// What a worker tells its client about it, if the client can still be told.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        use WireError::*;
        match self {
            Io(_) | Closed | Truncated | Over => None,
            Late => Some(Refusal::Late),
            Version { .. } => Some(Refusal::Version),
            Shape { .. } | TooLarge { .. } => Some(Refusal::TooLarge),
            Memory { .. } => Some(Refusal::Memory),
            WindowFull | Misuse(_) | Refused(_) => Some(Refusal::Failed),
            Magic | Kind { .. } | Field { .. } | Reserved { .. } | Length { .. } | Id { .. } => {
                Some(Refusal::Malformed)
            }
            Matrix { .. } | Rows { .. } | Element { .. } | Weight { .. } => {
                Some(Refusal::Malformed)
            }
            Limit { .. } | Name | Digest { .. } => Some(Refusal::Malformed),
        }
    }
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> WireError {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => WireError::Late,
            io::ErrorKind::UnexpectedEof => WireError::Truncated,
            _ => WireError::Io(error),
        }
    }
}

/// Why a worker ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The client broke the protocol.
    Malformed,
    /// The client's version is not spoken.
    Version,
    /// A shape, a payload, or a number of matrices or rows is beyond what the worker takes.
    TooLarge,
    /// There is no memory for a matrix.
    Memory,
    /// There is no place for another connection.
    Busy,
    /// Something was not completed in time.
    Late,
    /// The worker failed, or says something else.
    Failed,
}

impl Refusal {
    /// All of them, in the order of their codes.
    pub const ALL: [Refusal; 7] = [
        Refusal::Malformed,
        Refusal::Version,
        Refusal::TooLarge,
        Refusal::Memory,
        Refusal::Busy,
        Refusal::Late,
        Refusal::Failed,
    ];

    /// The code in ERROR.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16 + 1
    }

    /// The meaning of a code; of an unknown one, that the worker failed.
    #[must_use]
    pub fn from_code(code: u16) -> Refusal {
        let known = Refusal::ALL
            .into_iter()
            .find(|refusal| refusal.code() == code);
        known.unwrap_or(Refusal::Failed)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Malformed => "the protocol was broken",
            Refusal::Version => "this version is not spoken",
            Refusal::TooLarge => "too large",
            Refusal::Memory => "no memory for this matrix",
            Refusal::Busy => "no place for another connection",
            Refusal::Late => "too late",
            Refusal::Failed => "it failed",
        })
    }
}

/// The largest payload that a side takes, as it says in HELLO or WELCOME.
pub(crate) fn check_payload(limit: u32) -> Result<u32, WireError> {
    if !(MIN_PAYLOAD..=MAX_PAYLOAD).contains(&limit) {
        return Err(WireError::Limit {
            what: "the largest payload",
            found: limit.into(),
        });
    }
    Ok(limit)
}
