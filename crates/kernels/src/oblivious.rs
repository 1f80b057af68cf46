//! Finding rows of a table and the largest of numbers without telling which: everything is touched, in one order, whatever is
//! looked for.
//!
//! ```text
//! for each item of the table, for each id:  found[id] += bytes of the item & (ones if the id is that of their row, else zeros)
//! ```
//! An id is nothing but a comparand: no address and no branch depends on it, only on the table's shape and the number of
//! ids. So whoever sees which memory is touched, and when, learns that number. That is how the code is written; a compiler
//! may undo it.
//!
//! Tables are packed in several ways, and each says which bytes of a line of 64 belong to which of an item's rows. What is
//! found is an item with one row left, and that is moved to where the first row has its bytes by adding up all places.

use std::io;

use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd};
use crate::mem::{Element, Purpose, Region};
use crate::team::{SharedMut, Team};

/// Most ids that one pass over a table looks for; more take several.
pub const AT_ONCE: usize = 32;

/// Items that are added up before the sum is stored.
const TOGETHER: usize = 4;

/// Fewest and most lines of an item that one member takes at a time: so much of what is found stays in the first-level
/// cache.
const LINES: (usize, usize) = (4, 64);

/// Which of an item's rows the bytes of a line belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lanes {
    /// All to the only one.
    Whole,
    /// Four bytes to each of the first sixteen.
    First,
    /// Four bytes to each of the next sixteen.
    Second,
    /// Two bytes to each of 32.
    Halves,
    /// A byte to each of 32, and once more.
    Bytes,
}

const KINDS: [Lanes; 5] = [
    Lanes::Whole,
    Lanes::First,
    Lanes::Second,
    Lanes::Halves,
    Lanes::Bytes,
];

/// 64 bytes of an item as words.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i32; LANES]);

// SAFETY: integers, 64 bytes without padding, alignment 64.
unsafe impl Element for Line {}

/// All ones if both are the same, otherwise zeros.
#[inline(always)]
pub fn equal(a: u32, b: u32) -> u32 {
    let difference = a ^ b;
    // Unless it is 0, it or its negative has the highest bit.
    ((difference | difference.wrapping_neg()) >> 31).wrapping_sub(1)
}

impl Lanes {
    /// Ones where the bytes of row `id` are, if it is one of an item whose first row is `first`.
    #[inline(always)]
    fn mask(self, first: u32, id: u32) -> [i32; LANES] {
        let mut mask = [0; LANES];
        for lane in 0..LANES {
            let row = first.wrapping_add(lane as u32);
            let bits = match self {
                Lanes::Whole => equal(first, id),
                Lanes::First => equal(row, id),
                Lanes::Second => equal(row.wrapping_add(16), id),
                Lanes::Halves => {
                    let row = first.wrapping_add(2 * lane as u32);
                    equal(row, id) & 0xFFFF | equal(row.wrapping_add(1), id) << 16
                }
                Lanes::Bytes => {
                    let row = first.wrapping_add(4 * (lane as u32 % 8));
                    let mut bits = 0;
                    for byte in 0..4 {
                        bits |= (equal(row.wrapping_add(byte), id) & 0xFF) << (8 * byte);
                    }
                    bits
                }
            };
            mask[lane] = bits as i32;
        }
        mask
    }
}

/// Moves the one row that is left of an item to where the first has its bytes.
fn collapse(pattern: &[Lanes], lines: &mut [Line]) {
    let total = |line: &[i32]| line.iter().fold(0, |sum: i32, x| sum.wrapping_add(*x)) as u32;
    for (at, lanes) in pattern.iter().enumerate() {
        let line = lines[at].0;
        let mut moved = [0; LANES];
        match lanes {
            Lanes::Whole => continue,
            Lanes::First => moved[0] = total(&line) as i32,
            Lanes::Second => {
                // The row is in the line before or in this one.
                let sum = lines[at - 1].0[0] as u32 + total(&line);
                lines[at - 1].0[0] = sum as i32;
            }
            Lanes::Halves => {
                let sum = total(&line);
                moved[0] = (sum & 0xFFFF | sum >> 16) as i32;
            }
            Lanes::Bytes => {
                for (to, half) in [(0, &line[..8]), (8, &line[8..])] {
                    let sum = total(half);
                    let byte = (sum | sum >> 8 | sum >> 16 | sum >> 24) & 0xFF;
                    moved[to] = byte as i32;
                }
            }
        }
        lines[at].0 = moved;
    }
}

/// A table: items one after the other, each some rows.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) items: usize,
    /// Bytes of an item. If that is no whole number of lines, the next item's bytes are read along.
    pub(crate) stride: usize,
    /// Rows of an item.
    pub(crate) rows: usize,
    /// Of the item's lines, over and over.
    pub(crate) pattern: &'a [Lanes],
}

impl Table<'_> {
    fn lines(&self) -> usize {
        self.stride.div_ceil(size_of::<Line>())
    }
}

/// Adds some lines of all items to what is found.
struct Scan<'a> {
    table: Table<'a>,
    first: usize,
    count: usize,
    ids: &'a [u32],
    /// For each id a whole item.
    found: &'a SharedMut<'a, Line>,
}

impl Kernel for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let mut used = [false; KINDS.len()];
        for kind in self.table.pattern {
            used[*kind as usize] = true;
        }
        let whole = self.table.items / TOGETHER * TOGETHER;
        let mut item = 0;
        while item < whole {
            self.add::<V, TOGETHER>(v, item, used);
            item += TOGETHER;
        }
        while item < self.table.items {
            self.add::<V, 1>(v, item, used);
            item += 1;
        }
    }
}

impl Scan<'_> {
    #[inline(always)]
    fn add<V: Simd, const N: usize>(&self, v: V, item: usize, used: [bool; KINDS.len()]) {
        let Table { rows, pattern, .. } = self.table;
        let width = self.table.lines();
        for (at, id) in self.ids.iter().enumerate() {
            let mut masks = [[v.splat_i(0); KINDS.len()]; N];
            for n in 0..N {
                let first = ((item + n) * rows) as u32;
                for kind in KINDS {
                    if used[kind as usize] {
                        masks[n][kind as usize] = v.load_i(&kind.mask(first, *id));
                    }
                }
            }
            // SAFETY: each id has lines of its own, and each member other ones of them.
            let found = unsafe { self.found.slice(at * width + self.first, self.count) };
            let mut kind = self.first % pattern.len();
            for i in 0..self.count {
                let mut sum = v.load_i(&found[i].0);
                for n in 0..N {
                    let line = self.line(v, item + n, self.first + i);
                    sum = v.add_i(sum, v.and_i(line, masks[n][pattern[kind] as usize]));
                }
                v.store_i(sum, &mut found[i].0);
                kind += 1;
                if kind == pattern.len() {
                    kind = 0;
                }
            }
        }
    }

    #[inline(always)]
    fn line<V: Simd>(&self, v: V, item: usize, line: usize) -> V::I {
        let rest = &self.table.bytes[item * self.table.stride + line * size_of::<Line>()..];
        match rest.first_chunk() {
            Some(bytes) => v.load_bytes(bytes),
            None => {
                let mut bytes = [0; size_of::<Line>()];
                bytes[..rest.len()].copy_from_slice(rest);
                v.load_bytes(&bytes)
            }
        }
    }
}

/// Working memory for finding rows.
pub struct Found {
    lines: Region,
}

impl Found {
    /// For tables of rows of so many bytes, which stand one after the other.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn of_bytes(row: usize) -> io::Result<Found> {
        let bytes = row.next_multiple_of(size_of::<Line>()) * AT_ONCE;
        Ok(Found {
            lines: Region::zeroed(bytes, Purpose::State)?,
        })
    }

    /// Bytes that were reserved.
    pub fn bytes(&self) -> usize {
        self.lines.len()
    }

    /// Finds rows of `row` bytes, which are the whole `table`, for at most [`AT_ONCE`] ids. What is no row's id gives zeros.
    ///
    /// # Panics
    /// If there are more ids, the working memory is for shorter rows, or the table is no whole number of rows.
    pub fn rows_of_bytes(
        &mut self,
        team: &Team,
        table: &[u8],
        row: usize,
        ids: &[u32],
    ) -> FoundRows<'_> {
        let table = Table::of_rows(table, row);
        let width = table.lines() * size_of::<Line>();
        let bytes = self.scan(team, table, ids).view();
        FoundRows { bytes, width, row }
    }

    /// As [`Found::rows_of_bytes`], of one row, by whoever calls.
    ///
    /// # Panics
    /// As [`Found::rows_of_bytes`].
    pub fn row_of_bytes(&mut self, isa: Isa, table: &[u8], row: usize, id: u32) -> &[u8] {
        let table = Table::of_rows(table, row);
        let lines = self.prepare(table, 1);
        isa.dispatch(Scan {
            table,
            first: 0,
            count: table.lines(),
            ids: &[id],
            found: &SharedMut::new(lines),
        });
        &self.lines.view::<u8>()[..row]
    }

    /// Finds rows of a packed table: `decode(item, out)` reads the first row of an item of blocks.
    pub(crate) fn rows<T: Element>(
        &mut self,
        team: &Team,
        table: Table<'_>,
        ids: &[u32],
        columns: usize,
        out: &mut [f32],
        decode: impl Fn(&[T], &mut [f32]) + Sync,
    ) {
        assert_eq!(out.len(), ids.len() * columns, "a row for each id");
        let width = table.lines();
        let blocks = table.stride / size_of::<T>();
        for (ids, out) in ids.chunks(AT_ONCE).zip(out.chunks_mut(AT_ONCE * columns)) {
            let found = self.scan(team, table, ids);
            let lines = &mut found.view_mut::<Line>()[..ids.len() * width];
            team.for_each_chunk_mut(lines, width, |_, lines| {
                for lines in lines.chunks_mut(table.pattern.len()) {
                    collapse(table.pattern, lines);
                }
            });
            let items = found.view::<T>();
            team.for_each_chunk_mut(out, columns, |i, out| {
                decode(&items[i * blocks..(i + 1) * blocks], out);
            });
        }
    }

    /// Lines for what is found, zeros.
    fn prepare(&mut self, table: Table<'_>, ids: usize) -> &mut [Line] {
        let lines = &mut self.lines.view_mut::<Line>()[..ids * table.lines()];
        lines.fill(Line([0; LANES]));
        lines
    }

    fn scan(&mut self, team: &Team, table: Table<'_>, ids: &[u32]) -> &mut Region {
        let width = table.lines();
        let lines = self.prepare(table, ids.len());
        let found = &SharedMut::new(lines);
        // Lines that follow each other in memory, and as many parts as there are members.
        let part = width.div_ceil(team.members()).clamp(LINES.0, LINES.1);
        team.for_each(width.div_ceil(part), |index| {
            let first = index * part;
            team.isa().dispatch(Scan {
                table,
                first,
                count: part.min(width - first),
                ids,
                found,
            });
        });
        &mut self.lines
    }
}

/// Rows that were found, by the places of their ids.
pub struct FoundRows<'a> {
    bytes: &'a [u8],
    width: usize,
    row: usize,
}

impl FoundRows<'_> {
    /// The row of the `i`-th id.
    pub fn row(&self, i: usize) -> &[u8] {
        &self.bytes[i * self.width..][..self.row]
    }
}

impl<'a> Table<'a> {
    fn of_rows(bytes: &'a [u8], row: usize) -> Table<'a> {
        assert!(
            row > 0 && bytes.len().is_multiple_of(row),
            "the table is whole rows"
        );
        Table {
            bytes,
            items: bytes.len() / row,
            stride: row,
            rows: 1,
            pattern: &[Lanes::Whole],
        }
    }
}

/// Index of the largest element, the first of several equal ones. NaN is never the largest; 0 if there is no number.
pub fn argmax(isa: Isa, x: &[f32]) -> u32 {
    struct ArgMax<'a>(&'a [f32]);

    impl Kernel for ArgMax<'_> {
        type Output = u32;

        #[inline(always)]
        fn run<V: Simd>(self, v: V) -> u32 {
            let (blocks, rest) = self.0.as_chunks::<LANES>();
            let mut lanes = v.splat(f32::NEG_INFINITY);
            for x in blocks {
                // Where the new number is a NaN the second argument stays.
                lanes = v.max(v.load(x), lanes);
            }
            let mut last = [f32::NEG_INFINITY; LANES];
            last[..rest.len()].copy_from_slice(rest);
            let largest = v.largest(v.max(v.load(&last), lanes));
            let mut first = u32::MAX;
            for (i, x) in self.0.iter().enumerate() {
                let other = u32::from(*x == largest).wrapping_sub(1);
                first = first.min(i as u32 | other);
            }
            // If there was none: 0.
            first & !equal(first, u32::MAX)
        }
    }
    isa.dispatch(ArgMax(x))
}

/// How many of `bits` are at least `limit`.
pub fn count_at_least(isa: Isa, bits: &[u32], limit: u32) -> u64 {
    struct Count<'a>(&'a [u32], u32);

    impl Kernel for Count<'_> {
        type Output = u64;

        #[inline(always)]
        fn run<V: Simd>(self, _: V) -> u64 {
            let mut total = 0;
            // Short enough for 32 bits.
            for bits in self.0.chunks(1 << 16) {
                let mut count = 0u32;
                for x in bits {
                    count += u32::from(*x >= self.1);
                }
                total += u64::from(count);
            }
            total
        }
    }
    isa.dispatch(Count(bits, limit))
}

/// Sum of those of `values` whose number in `bits` is at least `limit`, modulo 2^64.
///
/// # Panics
/// If the lengths differ.
pub fn sum_at_least(isa: Isa, bits: &[u32], values: &[u64], limit: u32) -> u64 {
    struct Sum<'a>(&'a [u32], &'a [u64], u32);

    impl Kernel for Sum<'_> {
        type Output = u64;

        #[inline(always)]
        fn run<V: Simd>(self, _: V) -> u64 {
            let mut sum = 0u64;
            for i in 0..self.0.len() {
                let mask = u64::from(self.0[i] >= self.2).wrapping_neg();
                sum = sum.wrapping_add(self.1[i] & mask);
            }
            sum
        }
    }
    assert_eq!(bits.len(), values.len(), "a number for each value");
    isa.dispatch(Sum(bits, values, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_is_all_or_nothing() {
        let numbers = [0, 1, 2, 31, 1 << 31, u32::MAX - 1, u32::MAX];
        for a in numbers {
            for b in numbers {
                assert_eq!(equal(a, b), if a == b { u32::MAX } else { 0 }, "{a} {b}");
            }
        }
    }

    /// Every load and store of a scan, of tables of each kind, for other ids: the same addresses in the same order. Masks lie on
    /// the stack, whose depth may differ between calls, so they are compared by what lies in the table and in what is found.
    #[test]
    fn addresses_do_not_depend_on_ids() {
        use crate::isa::Scalar;
        use crate::isa::traced::{Traced, accesses};
        let bytes: Vec<u8> = (0..64 * 100).map(|i| (i * 7) as u8).collect();
        let tables: [(usize, usize, usize, &[Lanes]); 4] = [
            (100, 64, 1, &[Lanes::Whole]),
            (73, 85, 1, &[Lanes::Whole]),
            (7, 64 * 6, 32, &[Lanes::Halves, Lanes::First, Lanes::Second]),
            (9, 64 * 8, 32, &[Lanes::Bytes, Lanes::Halves]),
        ];
        for (items, stride, rows, pattern) in tables {
            let table = Table {
                bytes: &bytes[..items * stride],
                items,
                stride,
                rows,
                pattern,
            };
            let mut lines = vec![Line([0; LANES]); 3 * table.lines()];
            let found = lines.as_ptr_range();
            let found = found.start.addr()..found.end.addr();
            let inside = table.bytes.as_ptr_range();
            let inside = inside.start.addr()..inside.end.addr();
            let mut trace = |ids: &[u32; 3]| {
                accesses();
                Scan {
                    table,
                    first: 0,
                    count: table.lines(),
                    ids,
                    found: &SharedMut::new(&mut lines),
                }
                .run(Traced(Scalar::new()));
                let of_data = |a: &crate::isa::traced::Access| {
                    inside.contains(&a.address) || found.contains(&a.address)
                };
                accesses().into_iter().filter(of_data).collect::<Vec<_>>()
            };
            let expected = trace(&[0, 1, 2]);
            let of_table = expected.iter().filter(|a| inside.contains(&a.address));
            assert!(
                of_table.count() >= 3 * items,
                "the whole table is read for each id"
            );
            for ids in [
                [2, 1, 0],
                [5, 5, 5],
                [items as u32, 0, u32::MAX],
                [31, 32, 33],
            ] {
                assert_eq!(trace(&ids), expected, "{ids:?}");
            }
        }
    }

    /// Each byte of a line belongs to one row, and to no other.
    #[test]
    fn masks_of_all_rows_cover_a_line_once() {
        for (kind, rows) in [
            (Lanes::Whole, 1),
            (Lanes::First, 32),
            (Lanes::Second, 32),
            (Lanes::Halves, 32),
            (Lanes::Bytes, 32),
        ] {
            let mut sum = [0i64; LANES];
            for id in 0..rows {
                let mask = kind.mask(96, 96 + id);
                for (sum, lane) in sum.iter_mut().zip(mask) {
                    assert_eq!(*sum & i64::from(lane as u32), 0, "{kind:?}: twice");
                    *sum |= i64::from(lane as u32);
                }
            }
            assert_eq!(sum, [i64::from(u32::MAX); LANES], "{kind:?}");
            for id in [0, 95, 96 + rows, u32::MAX] {
                assert_eq!(kind.mask(96, id), [0; LANES], "{kind:?}: {id}");
            }
        }
    }
}
