//! Two prime fields whose elements hide int8 activations, and the int8 digits that an accelerator
//! multiplies instead of elements.
//!
//! A product of int8 rows of width n is an integer of at most n * 127^2 in magnitude. In a field with
//! p > 2 * n * 127^2 it is its own centred residue, so whoever computes modulo p, on masked numbers,
//! computes it exactly. [`Field::for_width`] chooses the smaller field that is large enough.
//!
//! | module | holds |
//! |---|---|
//! | this | [`Field`]: the two primes, elements and rows of them |
//! | [`digits`] | four digits in -127..=127 of an element, and elements from sums of products of digits |
//! | [`products`] | sums of products of secret factors: dot products, combinations of int8 rows |
//!
//! Elements are `u32` below p, rows are slices of them. Functions require their arguments to be
//! elements ([`Field::contains`] tells) and return elements; for anything else results mean nothing, but
//! nothing panics or is undefined.
//!
//! **Constant time.** Elements are masked activations, pads and factors of checks. Nothing here branches
//! on, divides by or looks anything up at a value: reductions are shifts, masks, multiplications and
//! minima. Time depends on lengths alone. That is how the code is written, and the loops were looked at
//! as the compiler made them for x86-64; a compiler may undo it, and no test here could show that it
//! did not.

#![forbid(unsafe_code)]

pub mod digits;
pub mod products;

use prime::{P29, P31, Prime, with_prime};

mod prime;

/// A prime field, small enough that two elements add up in a `u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    /// p = 2^29 - 3.
    P29,
    /// p = 2^31 - 1.
    P31,
}

impl Field {
    /// Both, the smaller first.
    pub const ALL: [Field; 2] = [Field::P29, Field::P31];

    /// The smaller field in which products of int8 rows (-127..=127) of so many columns are exact, or
    /// `None` if there is none, also for no columns at all.
    #[must_use]
    pub fn for_width(columns: usize) -> Option<Field> {
        let fits = |field: &Field| (1..=field.max_width()).contains(&columns);
        Field::ALL.into_iter().find(fits)
    }

    /// The widest rows whose products this field holds: 16,643 or 66,572.
    #[must_use]
    pub const fn max_width(self) -> usize {
        (self.modulus() / 2 / (127 * 127)) as usize
    }

    /// p.
    #[must_use]
    pub const fn modulus(self) -> u32 {
        match self {
            Field::P29 => P29::P,
            Field::P31 => P31::P,
        }
    }

    /// Bits of an element: p < 2^bits, and almost all numbers of so many bits are elements.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Field::P29 => P29::BITS,
            Field::P31 => P31::BITS,
        }
    }

    /// What the field is called in messages: 1 or 2.
    #[must_use]
    pub const fn id(self) -> u8 {
        match self {
            Field::P29 => 1,
            Field::P31 => 2,
        }
    }

    /// The field of that id.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Field> {
        Field::ALL.into_iter().find(|field| field.id() == id)
    }

    /// Whether all of `row` are elements. The answer is not secret; where the first other number
    /// stands is not told.
    #[must_use]
    pub fn contains(self, row: &[u32]) -> bool {
        let p = self.modulus();
        row.iter().fold(true, |all, x| all & (*x < p))
    }

    /// a + b.
    #[must_use]
    pub fn add(self, a: u32, b: u32) -> u32 {
        with_prime!(self, P => P::add(a, b))
    }

    /// a - b.
    #[must_use]
    pub fn sub(self, a: u32, b: u32) -> u32 {
        with_prime!(self, P => P::sub(a, b))
    }

    /// a * b.
    #[must_use]
    pub fn mul(self, a: u32, b: u32) -> u32 {
        with_prime!(self, P => P::reduce(u64::from(a) * u64::from(b)))
    }

    /// Any number modulo p.
    #[must_use]
    pub fn reduce(self, x: u64) -> u32 {
        with_prime!(self, P => P::reduce(x))
    }

    /// Any integer modulo p.
    #[must_use]
    pub fn from_integer(self, x: i64) -> u32 {
        with_prime!(self, P => P::from_integer(x))
    }

    /// The integer of least magnitude that is x modulo p: from -(p - 1) / 2 to (p - 1) / 2.
    #[must_use]
    pub fn centre(self, x: u32) -> i32 {
        with_prime!(self, P => P::centre(x))
    }

    /// `a[i] = a[i] + b[i]`.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn add_row(self, a: &mut [u32], b: &[u32]) {
        same_length(a.len(), b.len());
        with_prime!(self, P => a.iter_mut().zip(b).for_each(|(a, b)| *a = P::add(*a, *b)));
    }

    /// `a[i] = a[i] - b[i]`.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn sub_row(self, a: &mut [u32], b: &[u32]) {
        same_length(a.len(), b.len());
        with_prime!(self, P => a.iter_mut().zip(b).for_each(|(a, b)| *a = P::sub(*a, *b)));
    }

    /// `out[i] = pad[i] + x[i]`: int8 activations, masked.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn mask_row(self, x: &[i8], pad: &[u32], out: &mut [u32]) {
        same_length(x.len(), pad.len());
        same_length(x.len(), out.len());
        with_prime!(self, P => {
            for ((x, pad), out) in x.iter().zip(pad).zip(out) {
                *out = P::add(P::from_small(i32::from(*x)), *pad);
            }
        });
    }

    /// `row[i] = row[i] + x[i]`: int8 activations, masked by the pad that is there.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn mask_in_place(self, row: &mut [u32], x: &[i8]) {
        same_length(x.len(), row.len());
        with_prime!(self, P => {
            for (row, x) in row.iter_mut().zip(x) {
                *row = P::add(P::from_small(i32::from(*x)), *row);
            }
        });
    }

    /// `out[i] = x[i] - row[i]`: int8 activations without the share that is there.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn share_row(self, x: &[i8], row: &[u32], out: &mut [u32]) {
        same_length(x.len(), row.len());
        same_length(x.len(), out.len());
        with_prime!(self, P => {
            for ((x, row), out) in x.iter().zip(row).zip(out) {
                *out = P::sub(P::from_small(i32::from(*x)), *row);
            }
        });
    }

    /// `out[i]` is `a[i] - b[i]`, [centred](Field::centre): a product without its mask.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn difference_row(self, a: &[u32], b: &[u32], out: &mut [i32]) {
        same_length(a.len(), out.len());
        same_length(b.len(), out.len());
        with_prime!(self, P => {
            for ((a, b), out) in a.iter().zip(b).zip(out) {
                *out = P::centre(P::sub(*a, *b));
            }
        });
    }

    /// `out[i]` is `a[i] + b[i]`, [centred](Field::centre): a product from those of two shares.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn sum_row(self, a: &[u32], b: &[u32], out: &mut [i32]) {
        same_length(a.len(), out.len());
        same_length(b.len(), out.len());
        with_prime!(self, P => {
            for ((a, b), out) in a.iter().zip(b).zip(out) {
                *out = P::centre(P::add(*a, *b));
            }
        });
    }

    /// Integers modulo p, any.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn from_integers(self, x: &[i32], out: &mut [u32]) {
        same_length(x.len(), out.len());
        with_prime!(self, P => {
            for (x, out) in x.iter().zip(out) {
                *out = P::from_integer(i64::from(*x));
            }
        });
    }

    /// `out[i]` is the integer of least magnitude that is x\[i\] modulo p: where x is a product of int8
    /// rows, their exact sum.
    ///
    /// # Panics
    /// If the rows differ in length.
    pub fn centre_row(self, x: &[u32], out: &mut [i32]) {
        same_length(x.len(), out.len());
        with_prime!(self, P => x.iter().zip(out).for_each(|(x, out)| *out = P::centre(*x)));
    }
}

#[track_caller]
fn same_length(a: usize, b: usize) {
    assert_eq!(a, b, "rows differ in length");
}
