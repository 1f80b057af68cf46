//! The primitives of GGUF, read in order from the front of a file under two limits: the file's own length and a
//! budget for the whole header. Lengths are checked against both before anything is allocated.

use std::io::Read;

use crate::error::{Fault, Problem};

/// The most bytes that metadata and tensor table together may occupy. Llama 3's take 8 MiB.
pub(super) const MAX_HEADER: u64 = 64 << 20;
/// The longest single string: a chat template, not a key.
const MAX_STRING: u64 = 1 << 20;

/// Reads little-endian values and counts.
pub(super) struct Reader<R> {
    inner: R,
    offset: u64,
    file_length: u64,
}

impl<R: Read> Reader<R> {
    /// Reads from `inner`, which is at the beginning of a file of `file_length` bytes.
    pub(super) fn new(inner: R, file_length: u64) -> Self {
        Self {
            inner,
            offset: 0,
            file_length,
        }
    }

    /// How many bytes have been read.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes can still come.
    pub(super) fn remaining(&self) -> u64 {
        self.file_length - self.offset
    }

    /// Refuses `wanted` bytes that the file or the header's budget does not have.
    pub(super) fn expect(&self, what: &'static str, wanted: u64) -> Result<(), Problem> {
        let available = self.remaining();
        if wanted > available {
            return Err(Fault::Truncated {
                what,
                offset: self.offset,
                wanted,
                available,
            }
            .into());
        }
        match self.offset.checked_add(wanted) {
            Some(end) if end <= MAX_HEADER => Ok(()),
            end => Err(Fault::TooLong {
                what: "a header",
                length: end.unwrap_or(u64::MAX),
                limit: MAX_HEADER,
            }
            .into()),
        }
    }

    pub(super) fn bytes<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Problem> {
        self.expect(what, N as u64)?;
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.offset += N as u64;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Problem> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Problem> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// A string: its length in 64 bits, then UTF-8.
    pub(super) fn string(&mut self, what: &'static str, limit: u64) -> Result<String, Problem> {
        let start = self.offset;
        let length = self.u64(what)?;
        let limit = limit.min(MAX_STRING);
        if length > limit {
            return Err(Fault::TooLong {
                what,
                length,
                limit,
            }
            .into());
        }
        self.expect(what, length)?;
        // At most MAX_STRING, so the cast is exact.
        let mut bytes = vec![0; length as usize];
        self.inner.read_exact(&mut bytes)?;
        self.offset += length;
        String::from_utf8(bytes).map_err(|_| {
            Fault::NotUtf8 {
                what,
                offset: start,
            }
            .into()
        })
    }
}
