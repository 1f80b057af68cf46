//! Pads: what is added to a row before it leaves, once.
//!
//! A [`Pad`] is a place in the stream of its group, and [`Sequence::next`] is where pads come from: the
//! places of a group are counted up and none is given out twice. A pad cannot be copied. Hiding
//! rows takes it away, so a second row under one pad is not a mistake that can be made: it does not
//! compile. A row that is asked for again (a retry, another beam, a recomputation) needs another pad.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::vec::Drain;

use casemate_field::Field;
use casemate_kernels::team::Team;

use crate::keys::{BootKey, Uniform};
use crate::memory::Buffer;

/// A pad that was not used: n uniform elements that nobody else knows, n being the width of its group.
/// They are regenerated from its place when they are needed.
///
/// ```compile_fail
/// fn twice(pad: casemate_offload::Pad) -> [casemate_offload::Pad; 2] {
///     [pad.clone(), pad]
/// }
/// ```
pub struct Pad {
    group: u32,
    index: u64,
}

impl Pad {
    /// What no other pad of this run has.
    pub(crate) fn place(&self) -> [u8; 12] {
        let mut place = [0; 12];
        place[..4].copy_from_slice(&self.group.to_be_bytes());
        place[4..].copy_from_slice(&self.index.to_be_bytes());
        place
    }
}

/// The pads of one group, in order.
pub(crate) struct Sequence {
    group: u32,
    next: u64,
}

impl Sequence {
    /// The next pad.
    pub(crate) fn next(&mut self) -> Pad {
        let index = self.next;
        // Reached after five hundred years of a billion pads a second.
        self.next = index.checked_add(1).expect("pads are counted in 64 bits");
        Pad {
            group: self.group,
            index,
        }
    }
}

/// The key of all pads of a run.
pub(crate) struct Pads {
    uniform: Uniform,
    groups: AtomicU32,
}

impl Pads {
    /// Pads for one purpose.
    pub(crate) fn new(boot: &BootKey, purpose: &[u8]) -> Pads {
        Pads {
            uniform: boot.uniform(purpose),
            groups: AtomicU32::new(0),
        }
    }

    /// The pads of a group that has none yet.
    pub(crate) fn sequence(&self) -> Sequence {
        let next = |groups: u32| groups.checked_add(1);
        let before = self.groups.fetch_update(Relaxed, Relaxed, next);
        let group = before.expect("groups are counted in 32 bits");
        Sequence { group, next: 0 }
    }

    /// Writes the elements of a pad that stays unused: for making W·r.
    pub(crate) fn elements(&self, field: Field, pad: &Pad, out: &mut [u32]) {
        self.uniform.row(field, pad.group, pad.index, out);
    }

    /// Adds a pad to each row of int8 activations, in `room`, and takes these pads away: the first of
    /// `pads`.
    ///
    /// # Panics
    /// If there is not one pad a row.
    pub(crate) fn hide(
        &self,
        team: &Team,
        field: Field,
        pads: &mut Vec<Pad>,
        x: &[i8],
        columns: usize,
        room: Buffer<u32>,
    ) -> Masked {
        let spent = spend(pads, x.len(), columns);
        let spent = spent.as_slice();
        let mut masked = Masked::new(field, columns, x.len(), room);
        team.for_each_chunk_mut(&mut masked.elements, columns, |row, out| {
            self.elements(field, &spent[row], out);
            field.mask_in_place(out, &x[row * columns..][..columns]);
        });
        masked
    }

    /// Divides each row of int8 activations into two that add up to it, each of which alone is uniform;
    /// otherwise as [`Pads::hide`].
    ///
    /// # Panics
    /// If there is not one pad a row.
    pub(crate) fn share(
        &self,
        team: &Team,
        field: Field,
        pads: &mut Vec<Pad>,
        x: &[i8],
        columns: usize,
        rooms: [Buffer<u32>; 2],
    ) -> [Masked; 2] {
        let spent = spend(pads, x.len(), columns);
        let spent = spent.as_slice();
        let [mut first, mut second] = rooms.map(|room| Masked::new(field, columns, x.len(), room));
        team.for_each_chunk_mut(&mut first.elements, columns, |row, out| {
            self.elements(field, &spent[row], out);
        });
        team.for_each_chunk_mut(&mut second.elements, columns, |row, out| {
            let at = row * columns;
            field.share_row(&x[at..][..columns], &first.elements[at..][..columns], out);
        });
        [first, second]
    }
}

/// Takes pads away for rows of so many elements together: gone when the value is, however that ends.
fn spend(pads: &mut Vec<Pad>, elements: usize, columns: usize) -> Drain<'_, Pad> {
    let rows = elements / columns;
    assert!(
        rows * columns == elements && rows <= pads.len(),
        "one pad a row"
    );
    pads.drain(..rows)
}

/// Rows that may leave the enclave: each alone is uniform, whatever it hides. Only this module makes
/// them, only from pads, and they cannot be copied; a link takes them away as it sends them.
pub struct Masked {
    field: Field,
    columns: usize,
    elements: Buffer<u32>,
}

impl Masked {
    /// Room for rows.
    fn new(field: Field, columns: usize, elements: usize, mut room: Buffer<u32>) -> Masked {
        room.room(elements);
        Masked {
            field,
            columns,
            elements: room,
        }
    }

    /// The memory, once nobody needs the rows any more.
    pub(crate) fn into_room(self) -> Buffer<u32> {
        self.elements
    }

    /// The field of its elements.
    #[must_use]
    pub fn field(&self) -> Field {
        self.field
    }

    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.elements.len() / self.columns
    }

    /// Elements of a row.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What the worker will see: row after row.
    #[must_use]
    pub fn elements(&self) -> &[u32] {
        &self.elements
    }
}

#[cfg(test)]
impl Pads {
    /// Pads of a sampler that is broken on purpose.
    pub(crate) fn broken(boot: &BootKey, broken: fn(Field, &mut [u32])) -> Pads {
        let mut pads = Pads::new(boot, b"pads");
        pads.uniform.broken = Some(broken);
        pads
    }
}

#[cfg(test)]
impl Pad {
    /// The same pad once more: what the type forbids, so that detectors of reuse have something to
    /// find.
    pub(crate) fn again(&self) -> Pad {
        Pad {
            group: self.group,
            index: self.index,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pads() -> Pads {
        Pads::new(&BootKey::of([3; 32]), b"pads")
    }

    #[test]
    fn places_are_counted_up_and_groups_are_apart() {
        let pads = pads();
        let mut sequences = [pads.sequence(), pads.sequence(), pads.sequence()];
        let mut seen = std::collections::BTreeSet::new();
        for round in 0..100 {
            for (group, sequence) in sequences.iter_mut().enumerate() {
                let pad = sequence.next();
                assert_eq!((pad.group, pad.index), (group as u32, round));
                assert!(seen.insert((pad.group, pad.index)));
            }
        }
    }

    #[test]
    #[should_panic(expected = "pads are counted in 64 bits")]
    fn a_sequence_that_has_come_to_its_end_does_not_begin_again() {
        let mut sequence = Sequence {
            group: 0,
            next: u64::MAX,
        };
        sequence.next();
    }

    #[test]
    #[should_panic(expected = "one pad a row")]
    fn rows_without_a_pad_each_are_not_hidden() {
        let pads = pads();
        let mut one = vec![pads.sequence().next()];
        let (team, room) = (Team::new(1).unwrap(), Buffer::default());
        pads.hide(&team, Field::P29, &mut one, &[1; 8], 4, room);
    }

    #[test]
    fn what_is_hidden_is_the_row_and_its_pad() {
        let team = Team::new(2).unwrap();
        for field in Field::ALL {
            let pads = pads();
            let mut sequence = pads.sequence();
            let x: Vec<i8> = (0..3 * 255).map(|i| (i % 255 - 127) as i8).collect();
            let mut spent: Vec<Pad> = (0..4).map(|_| sequence.next()).collect();
            let left = spent[3].index;
            let mut r = vec![0; x.len()];
            for (pad, r) in spent.iter().zip(r.chunks_exact_mut(255)) {
                pads.elements(field, pad, r);
            }
            let mut again = spent.iter().map(Pad::again).collect();
            let room = Buffer::of(&[7; 2000]);
            let masked = pads.hide(&team, field, &mut spent, &x, 255, room);
            assert_eq!(
                (spent.len(), spent[0].index),
                (1, left),
                "the others are gone"
            );
            assert_eq!((masked.rows(), masked.columns()), (3, 255));
            assert!(field.contains(masked.elements()));
            let rooms = [Buffer::default(), Buffer::of(&[9; 5])];
            let [first, second] = pads.share(&team, field, &mut again, &x, 255, rooms);
            assert_eq!(again.len(), 1);
            for (i, x) in x.iter().enumerate() {
                let x = i32::from(*x);
                assert_eq!(field.centre(field.sub(masked.elements[i], r[i])), x);
                let sum = field.add(first.elements[i], second.elements[i]);
                assert_eq!(field.centre(sum), x);
                assert_eq!(first.elements[i], r[i]);
            }
        }
    }
}
