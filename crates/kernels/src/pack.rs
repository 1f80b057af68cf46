//! Why weights could not be packed, and which row's fault is told when members of a team find several.

use std::io;
use std::sync::{Mutex, PoisonError};

/// Why weights could not be packed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// Misuse: a matrix needs at least one row and one column.
    #[error("a matrix of {rows} by {columns} has no elements")]
    Empty {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
    },
    /// Misuse: the packed size does not fit the address space.
    #[error("a matrix of {rows} by {columns} is too large")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        columns: usize,
    },
    /// Misuse: rows are whole blocks.
    #[error("{columns} columns are not a multiple of {block}")]
    PartialBlock {
        /// Columns asked for.
        columns: usize,
        /// Columns of a block.
        block: usize,
    },
    /// Misuse: a row has the wrong number of bytes.
    #[error("row {row} has {found} bytes instead of {expected}")]
    RowLength {
        /// The row.
        row: usize,
        /// Bytes of `columns` weights in their encoding.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// Malformed: a weight or scale is NaN or infinite.
    #[error("row {row} holds a number that is not finite")]
    NotFinite {
        /// The first such row.
        row: usize,
    },
    /// Malformed: a weight is too large for a half-precision scale (beyond about 8.3 million).
    #[error("row {row} holds a weight too large for a half-precision scale")]
    ScaleOverflow {
        /// The first such row.
        row: usize,
    },
    /// Misuse: beyond so many columns a sum of products may not fit an i32.
    #[error(
        "{columns} columns are more than the {} whose products an i32 can sum",
        crate::panels::MAX_COLUMNS
    )]
    TooManyColumns {
        /// Columns asked for.
        columns: usize,
    },
    /// Malformed: -128, which has no counterpart in -127..=127.
    #[error("row {row} holds -128, but integers reach from -127 to 127")]
    Lopsided {
        /// The first such row.
        row: usize,
    },
    /// The operating system refused the memory.
    #[error("no memory for packed weights")]
    Memory(#[from] io::Error),
}

/// The fault of the first faulty row, whichever member finds one first.
#[derive(Default)]
pub(crate) struct FirstFault(Mutex<Option<(usize, PackError)>>);

impl FirstFault {
    /// Remembers `error` unless an earlier row is known to be at fault.
    pub(crate) fn note(&self, row: usize, error: PackError) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_none_or(|(earlier, _)| row < *earlier) {
            *first = Some((row, error));
        }
    }

    /// The error, if there was one.
    pub(crate) fn none(self) -> Result<(), PackError> {
        match self.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}
