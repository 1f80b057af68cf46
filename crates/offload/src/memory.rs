//! Memory for what must not be read elsewhere: locked, left out of core dumps, wiped before it goes
//! back. It is kept from one product to the next, so a product asks the system for nothing.

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use casemate_kernels::mem::{Element, PAGE, Purpose, Region};

/// Memory for buffers of so many numbers each, in one piece.
///
/// # Errors
/// The system's refusal of the memory.
pub(crate) fn arena<T>(lengths: impl Iterator<Item = usize>) -> io::Result<Region> {
    let bytes = |length: usize| {
        let bytes = length.checked_mul(size_of::<T>())?;
        bytes.checked_next_multiple_of(PAGE)
    };
    let sum = lengths
        .map(bytes)
        .try_fold(0usize, |sum, bytes| sum.checked_add(bytes?));
    Region::zeroed(sum.ok_or(io::ErrorKind::OutOfMemory)?, Purpose::State)
}

/// Numbers in memory of their own. What is in it after it was given another length is whatever was there.
pub(crate) struct Buffer<T> {
    region: Region,
    length: usize,
    kind: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    /// So many zeros and no room for more.
    ///
    /// # Errors
    /// The system's refusal of the memory.
    pub(crate) fn zeros(length: usize) -> io::Result<Buffer<T>> {
        let bytes = length.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Buffer {
            region: Region::zeroed(bytes, Purpose::State)?,
            length,
            kind: PhantomData,
        })
    }

    /// So many zeros in a part of `arena`, or in memory of their own if it has not so much left.
    ///
    /// # Errors
    /// The system's refusal of the memory.
    pub(crate) fn part(arena: &mut Region, length: usize) -> io::Result<Buffer<T>> {
        let part = arena.take(length.saturating_mul(size_of::<T>()));
        match part {
            Some(region) => Ok(Buffer {
                region,
                length,
                kind: PhantomData,
            }),
            None => Buffer::zeros(length),
        }
    }

    /// Gives it a length, and more memory if it needs some. The old memory is wiped, not copied.
    ///
    /// # Panics
    /// If the system refuses the memory, as any vector would.
    pub(crate) fn room(&mut self, length: usize) -> &mut [T] {
        if length > self.region.len() / size_of::<T>() {
            let most = length.next_power_of_two().max(PAGE / size_of::<T>());
            *self = Buffer::zeros(most).expect("memory for numbers");
        }
        self.length = length;
        self
    }
}

impl<T> Default for Buffer<T> {
    /// Nothing, without memory.
    fn default() -> Buffer<T> {
        Buffer {
            region: Region::default(),
            length: 0,
            kind: PhantomData,
        }
    }
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.region.view()[..self.length]
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.region.view_mut()[..self.length]
    }
}

/// Buffers that wait to be used again.
#[derive(Default)]
pub(crate) struct Spare(Vec<Buffer<u32>>);

impl Spare {
    /// One of them, or a new one.
    pub(crate) fn take(&mut self) -> Buffer<u32> {
        self.0.pop().unwrap_or_default()
    }

    /// One that is not needed any more.
    pub(crate) fn give(&mut self, buffer: Buffer<u32>) {
        self.0.push(buffer);
    }
}

#[cfg(test)]
impl Buffer<u32> {
    /// With these numbers.
    pub(crate) fn of(numbers: &[u32]) -> Buffer<u32> {
        let mut buffer = Buffer::zeros(numbers.len()).unwrap();
        buffer.copy_from_slice(numbers);
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_it_was_given_and_its_memory_is_protected() {
        let mut buffer = Buffer::<u32>::default();
        assert!(buffer.is_empty());
        for length in [5, 2000, 3, 0, 1 << 20] {
            assert_eq!(buffer.room(length).len(), length);
            buffer.fill(7);
            assert_eq!(
                (buffer.len(), buffer.iter().all(|x| *x == 7)),
                (length, true)
            );
        }
        assert!(buffer.region.report().dump_excluded);
        let small = Buffer::<i64>::zeros(3).unwrap();
        assert!(small.region.report().dump_excluded);
        assert_eq!(*small, [0; 3]);
        assert!(Buffer::<u32>::zeros(usize::MAX / 2).is_err());
    }

    #[test]
    fn parts_of_an_arena_are_apart_and_more_than_it_has_is_found_elsewhere() {
        let mut whole = arena::<u32>([5, 2000, 1].into_iter()).unwrap();
        assert_eq!(whole.len(), 4 * PAGE);
        let mut parts = [5, 2000, 1, 7].map(|n| Buffer::<u32>::part(&mut whole, n).unwrap());
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.iter().all(|x| *x == 0));
            part.fill(i as u32 + 1);
        }
        for (i, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|x| *x == i as u32 + 1));
        }
        assert!(whole.is_empty());
        assert!(arena::<u32>([usize::MAX, 1].into_iter()).is_err());
        assert!(arena::<u32>([usize::MAX / 8; 9].into_iter()).is_err());
    }

    #[test]
    fn memory_that_is_large_enough_is_kept() {
        let mut buffer = Buffer::<i8>::default();
        let first = buffer.room(100_000).as_ptr();
        assert_eq!(buffer.room(10).as_ptr(), first);
        assert_eq!(buffer.room(100_000).as_ptr(), first);
    }
}
