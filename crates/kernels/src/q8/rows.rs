//! Activations quantised to int8, one scale a group of 32.

use super::GROUP;
use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd, load_part};
use crate::team::Team;

/// 32 activations of one row, 40 bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RowGroup {
    /// Four i8 a word, the first in the lowest byte.
    pub(super) quants: [i32; GROUP / 4],
    pub(super) scale: f32,
    /// `-128 * sum(quants)`: what undoes the offset of the weights.
    pub(super) offset: i32,
}

/// A reusable buffer of quantised rows, all of one length.
///
/// scale = largest magnitude of the group / 127; quant = nearest integer to `x * (1 / scale)`, ties to even. A group whose
/// largest magnitude is below 1e-30 is zero; a group with a NaN or an infinity gets a NaN scale, so that it shows in the
/// product instead of vanishing.
pub struct Q8Rows {
    groups: Vec<RowGroup>,
    columns: usize,
    rows: usize,
}

impl Q8Rows {
    /// Room for `capacity` rows of `columns` elements; [`Q8Rows::quantise`] grows it if more come.
    pub fn with_capacity(capacity: usize, columns: usize) -> Q8Rows {
        let groups = vec![RowGroup::default(); capacity * columns.div_ceil(GROUP)];
        Q8Rows {
            groups,
            columns,
            rows: 0,
        }
    }

    /// Replaces the contents by `x`, row-major, `x.len() / columns` rows. Allocates only beyond the capacity.
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
        if self.groups.len() < needed {
            self.groups.resize(needed, RowGroup::default());
        }
        let isa = team.isa();
        let groups = &mut self.groups[..needed];
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
        &self.groups[row * per_row..(row + 1) * per_row]
    }
}

fn quantise_row(isa: Isa, x: &[f32], groups: &mut [RowGroup]) {
    struct Quantise<'a>(&'a [f32], &'a mut [RowGroup]);

    impl Kernel for Quantise<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Simd>(self, v: V) {
            for (x, group) in self.0.chunks(GROUP).zip(self.1.iter_mut()) {
                let (low, high) = match x.as_chunks::<LANES>() {
                    ([low, high], []) => (v.load(low), v.load(high)),
                    ([low], rest) => (v.load(low), load_part(v, rest)),
                    (_, rest) => (load_part(v, rest), v.splat(0.0)),
                };
                *group = quantise_group(v, low, high);
            }
        }
    }
    isa.dispatch(Quantise(x, groups));
}

#[inline(always)]
fn quantise_group<V: Simd>(v: V, low: V::F, high: V::F) -> RowGroup {
    // Magnitudes compared as integers order NaN above infinity above every number.
    let magnitude = v.splat_i(0x7FFF_FFFF);
    let mut lanes = [0i32; LANES];
    v.store_i(
        v.max_i(
            v.and_i(v.bits(low), magnitude),
            v.and_i(v.bits(high), magnitude),
        ),
        &mut lanes,
    );
    let largest = f32::from_bits(lanes.iter().fold(0, |a, b| a.max(*b)) as u32);
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
    let mut quants = [[0i32; LANES]; 2];
    v.store_i(v.round(v.mul(low, inverse)), &mut quants[0]);
    v.store_i(v.round(v.mul(high, inverse)), &mut quants[1]);
    let mut group = RowGroup {
        scale,
        ..RowGroup::default()
    };
    let mut sum = 0;
    for (word, four) in group
        .quants
        .iter_mut()
        .zip(quants.as_flattened().as_chunks::<4>().0)
    {
        // |x / scale| <= 127 up to rounding, so every quant fits an i8 and none is -128.
        *word = i32::from_le_bytes(four.map(|q| q as i8 as u8));
        sum += four[0] + four[1] + four[2] + four[3];
    }
    group.offset = -128 * sum;
    group
}
