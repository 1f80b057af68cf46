//! Activations quantised to int8, one scale a group of 32.

use super::GROUP;
use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd, load_part};
use crate::mem::{Element, Purpose, Region};
use crate::team::Team;

// SAFETY: eight i32, an f32 and an i32: 40 bytes without padding, any bits, alignment 4.
unsafe impl Element for RowGroup {}

/// 32 activations of one row, 40 bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct RowGroup {
    /// Four i8 a word, the first in the lowest byte.
    pub(crate) quants: [i32; GROUP / 4],
    pub(crate) scale: f32,
    /// `-128 * sum(quants)`: what undoes the offset of the weights.
    pub(crate) offset: i32,
}

impl RowGroup {
    /// What the quants stand for, added up: `scale * sum(quants)`.
    #[inline(always)]
    pub(crate) fn total(&self) -> f32 {
        self.scale * -(self.offset >> 7) as f32
    }
}

/// A reusable buffer of quantised rows, all of one length.
///
/// scale = largest magnitude of the group / 127; quant = nearest integer to `x * (1 / scale)`, ties
/// to even. A group whose largest magnitude is below 1e-30 is zero; a group with a NaN or an
/// infinity gets a NaN scale, so that it shows in the product instead of vanishing.
pub struct Q8Rows {
    groups: Region,
    columns: usize,
    rows: usize,
}

impl Q8Rows {
    /// Room for `capacity` rows of `columns` elements; [`Q8Rows::quantise`] grows it if more come.
    ///
    /// # Panics
    /// If the operating system refuses the memory, as any vector would.
    pub fn with_capacity(capacity: usize, columns: usize) -> Q8Rows {
        let groups = reserve(capacity.saturating_mul(columns.div_ceil(GROUP)));
        Q8Rows {
            groups,
            columns,
            rows: 0,
        }
    }

    /// Replaces the contents by `x`, row-major, `x.len() / columns` rows. Allocates only beyond the
    /// capacity.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `columns` elements.
    pub fn quantise(&mut self, team: &Team, x: &[f32], columns: usize) {
        assert!(
            columns > 0 && x.len().is_multiple_of(columns),
            "{} is not a number of rows of {columns}",
            x.len()
        );
        self.columns = columns;
        self.rows = x.len() / columns;
        let per_row = columns.div_ceil(GROUP);
        let needed = self.rows * per_row;
        if self.groups.view::<RowGroup>().len() < needed {
            self.groups = reserve(needed);
        }
        let isa = team.isa();
        let groups = &mut self.groups.view_mut::<RowGroup>()[..needed];
        // Waking the team costs more than quantising a handful of rows.
        const WORTH_SHARING: usize = 1 << 15;
        if x.len() < WORTH_SHARING {
            for (row, groups) in x
                .chunks_exact(columns)
                .zip(groups.chunks_exact_mut(per_row))
            {
                quantise_row(isa, row, groups);
            }
        } else {
            team.for_each_chunk_mut(groups, per_row, |i, groups| {
                quantise_row(isa, &x[i * columns..(i + 1) * columns], groups);
            });
        }
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Writes row `row` back as f32 (`quant * scale`).
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn dequantise(&self, row: usize, out: &mut [f32]) {
        assert_eq!(
            out.len(),
            self.columns,
            "a row has as many elements as there are columns"
        );
        for (group, out) in self.row(row).iter().zip(out.chunks_mut(GROUP)) {
            let quants = group.quants.iter().flat_map(|q| q.to_le_bytes());
            for (out, q) in out.iter_mut().zip(quants) {
                *out = f32::from(q as i8) * group.scale;
            }
        }
    }

    pub(super) fn row(&self, row: usize) -> &[RowGroup] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let per_row = self.columns.div_ceil(GROUP);
        &self.groups.view::<RowGroup>()[row * per_row..(row + 1) * per_row]
    }
}

/// Activations are prompts in another form, so they lie where dumps and swap do not reach.
fn reserve(groups: usize) -> Region {
    let bytes = groups.saturating_mul(size_of::<RowGroup>());
    Region::zeroed(bytes, Purpose::State).expect("memory for activations")
}

fn quantise_row(isa: Isa, x: &[f32], groups: &mut [RowGroup]) {
    struct Quantise<'a>(&'a [f32], &'a mut [RowGroup]);

    impl Kernel for Quantise<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Simd>(self, v: V) {
            for (x, group) in self.0.chunks(GROUP).zip(self.1.iter_mut()) {
                let (low, high) = load_group(v, x);
                *group = quantise_group(v, low, high);
            }
        }
    }
    isa.dispatch(Quantise(x, groups));
}

#[inline(always)]
fn quantise_group<V: Simd>(v: V, low: V::F, high: V::F) -> RowGroup {
    let largest = largest_magnitude(v, low, high);
    if !largest.is_finite() {
        return RowGroup {
            quants: [0; GROUP / 4],
            scale: f32::NAN,
            offset: 0,
        };
    }
    if largest < 1e-30 {
        return RowGroup::default();
    }
    let scale = largest / 127.0;
    let inverse = v.splat(1.0 / scale);
    // |x / scale| <= 127 up to rounding, so every quant fits an i8 and none is -128.
    let quants = round(v, v.mul(low, inverse), v.mul(high, inverse));
    let sum: i32 = quants.iter().sum();
    let mut group = RowGroup {
        scale,
        offset: -128 * sum,
        ..RowGroup::default()
    };
    for (word, four) in group.quants.iter_mut().zip(quants.as_chunks::<4>().0) {
        *word = i32::from_le_bytes(four.map(|q| q as i8 as u8));
    }
    group
}

/// Largest magnitude of a group. Compared as integers, NaN comes above infinity and infinity above
/// every number.
#[inline(always)]
pub(super) fn largest_magnitude<V: Simd>(v: V, low: V::F, high: V::F) -> f32 {
    let magnitude = v.splat_i(0x7FFF_FFFF);
    let mut lanes = [0i32; LANES];
    v.store_i(
        v.max_i(
            v.and_i(v.bits(low), magnitude),
            v.and_i(v.bits(high), magnitude),
        ),
        &mut lanes,
    );
    f32::from_bits(lanes.iter().fold(0, |a, b| a.max(*b)) as u32)
}

#[inline(always)]
pub(super) fn round<V: Simd>(v: V, low: V::F, high: V::F) -> [i32; GROUP] {
    let mut quants = [0i32; GROUP];
    let (first, second) = quants.split_at_mut(LANES);
    v.store_i(v.round(low), first.try_into().expect("half a group"));
    v.store_i(v.round(high), second.try_into().expect("half a group"));
    quants
}

/// The two vectors of a group, zeros after its end.
#[inline(always)]
pub(super) fn load_group<V: Simd>(v: V, x: &[f32]) -> (V::F, V::F) {
    match x.as_chunks::<LANES>() {
        ([low, high], []) => (v.load(low), v.load(high)),
        ([low], rest) => (v.load(low), load_part(v, rest)),
        (_, rest) => (load_part(v, rest), v.splat(0.0)),
    }
}
