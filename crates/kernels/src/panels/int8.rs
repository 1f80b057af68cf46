//! Packed int8 weights with a scale a row, four to a word. The drawing of a panel is in the
//! [module above](super).
//!
//! Weights are stored as `w + 128` (unsigned), which is what `vpdpbusd` multiplies with signed
//! activations. Rows past the last and columns past the last are zeros. Scales lie apart.

use zeroize::Zeroizing;

use super::packed::{Lane, Panels};
use super::rows::{TINY, WORD, largest_magnitude};
use super::{MAX_COLUMNS, PANEL};
use crate::cpu::Kernel;
use crate::isa::{LANES, Simd, load_part};
use crate::mem::{PAGE, Purpose, Region};
use crate::pack::PackError;
use crate::team::{SharedMut, Team};

/// Of a weight that is zero.
const ZERO: u8 = 0x80;

/// An int8 weight matrix of `rows` (outputs) by `columns` (inputs) with one f32 scale a row, packed
/// for [`matmul_int8`](super::matmul_int8).
pub struct Int8Matrix {
    panels: Panels,
    /// One a row, and zeros to the end of the last panel.
    scales: Region,
}

impl Int8Matrix {
    /// Quantises f32 rows: `fill(row, out)` writes row `row` (`columns` long). It is called once
    /// per row, from all members of the team at once.
    ///
    /// scale = largest magnitude of the row / 127; weight = nearest integer to `w / scale`, ties to
    /// even. A row whose largest magnitude is below 1e-30 is zero. The memory is
    /// [taken](Region::take) from `arena` as long as it lasts.
    ///
    /// # Errors
    /// [`PackError::Empty`], [`PackError::TooLarge`], [`PackError::TooManyColumns`],
    /// [`PackError::NotFinite`], [`PackError::Memory`]; of several faulty rows the first is named.
    pub fn from_rows_in(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Int8Matrix, PackError> {
        let scratch = || {
            (
                Zeroizing::new(vec![0f32; columns]),
                Zeroizing::new(vec![0i8; columns]),
            )
        };
        let isa = team.isa();
        Int8Matrix::pack(
            arena,
            team,
            rows,
            columns,
            scratch,
            |(values, quants), row, lane| {
                fill(row, values);
                let scale = isa
                    .dispatch(QuantiseRow { values, quants })
                    .ok_or(PackError::NotFinite { row })?;
                put(lane, quants);
                Ok(scale)
            },
        )
    }

    /// Takes integers and scales as they are: `row(i)` is row `i`, `columns` long and none of it
    /// -128, with its scale.
    ///
    /// # Errors
    /// As [`Int8Matrix::from_rows_in`], and [`PackError::RowLength`], [`PackError::Lopsided`].
    pub fn from_int8_in<'a>(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        row: impl Fn(usize) -> (&'a [i8], f32) + Sync,
    ) -> Result<Int8Matrix, PackError> {
        Int8Matrix::pack(
            arena,
            team,
            rows,
            columns,
            || (),
            |(), i, lane| {
                let (quants, scale) = row(i);
                if quants.len() != columns {
                    return Err(PackError::RowLength {
                        row: i,
                        expected: columns,
                        found: quants.len(),
                    });
                }
                if quants.contains(&-128) {
                    return Err(PackError::Lopsided { row: i });
                }
                if !scale.is_finite() {
                    return Err(PackError::NotFinite { row: i });
                }
                put(lane, quants);
                Ok(scale)
            },
        )
    }

    /// Bytes that a packed matrix takes, in whole pages, or `None` if it is empty or does not fit
    /// the address space.
    pub fn packed_bytes(rows: usize, columns: usize) -> Option<usize> {
        let scales = Int8Matrix::scale_bytes(rows)?.checked_next_multiple_of(PAGE)?;
        Panels::packed_bytes(rows, columns, WORD)?.checked_add(scales)
    }

    fn scale_bytes(rows: usize) -> Option<usize> {
        rows.checked_next_multiple_of(PANEL)?
            .checked_mul(size_of::<f32>())
    }

    /// `pack_row(scratch, row, lane)` writes the row's integers and returns its scale.
    fn pack<S>(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        scratch: impl Fn() -> S + Sync,
        pack_row: impl Fn(&mut S, usize, Lane<'_>) -> Result<f32, PackError> + Sync,
    ) -> Result<Int8Matrix, PackError> {
        if columns > MAX_COLUMNS {
            return Err(PackError::TooManyColumns { columns });
        }
        let too_large = PackError::TooLarge { rows, columns };
        let bytes = Int8Matrix::scale_bytes(rows).ok_or(too_large)?;
        let mut scales = Region::default();
        if rows > 0 && columns > 0 {
            scales = arena.take_or_reserve(bytes, Purpose::Weights)?;
        }
        let shared = SharedMut::new(scales.as_f32_mut());
        let shape = (rows, columns);
        let panels = Panels::pack(
            arena,
            team,
            shape,
            (WORD, ZERO),
            scratch,
            |own, row, lane| {
                let scale = pack_row(own, row, lane)?;
                // SAFETY: each row is packed once, by one member.
                let slot = unsafe { shared.slice(row, 1) };
                slot[0] = scale;
                Ok(())
            },
        )?;
        Ok(Int8Matrix { panels, scales })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.panels.rows()
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.panels.columns()
    }

    /// Bytes that one product streams from memory.
    pub fn bytes(&self) -> usize {
        self.panels.bytes() + self.scales.len()
    }

    /// Writes row `row` as it is packed and returns its scale.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [i8]) -> f32 {
        let words = self.panels.row(row, out.len());
        for (out, word) in out.chunks_mut(WORD).zip(words) {
            for (out, w) in out.iter_mut().zip(word) {
                *out = (w ^ ZERO) as i8;
            }
        }
        self.scales.as_f32()[row]
    }

    pub(super) fn panels(&self) -> &Panels {
        &self.panels
    }

    /// Scales of a panel's rows.
    pub(super) fn scales(&self, panel: usize) -> &[f32; PANEL] {
        &self.scales.as_f32().as_chunks::<PANEL>().0[panel]
    }
}

fn put(lane: Lane<'_>, quants: &[i8]) {
    let (words, rest) = quants.as_chunks::<WORD>();
    let mut last = [ZERO; WORD];
    for (to, q) in last.iter_mut().zip(rest) {
        *to = *q as u8 ^ ZERO;
    }
    let words = words.iter().map(|word| word.map(|q| q as u8 ^ ZERO));
    lane.put(words.chain([last]));
}

/// Quantises a row and returns its scale, or `None` if a number is not finite.
struct QuantiseRow<'a> {
    values: &'a [f32],
    quants: &'a mut [i8],
}

impl Kernel for QuantiseRow<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn run<V: Simd>(self, v: V) -> Option<f32> {
        let largest = largest_magnitude(v, self.values);
        if !largest.is_finite() {
            return None;
        }
        if largest < TINY {
            self.quants.fill(0);
            return Some(0.0);
        }
        let scale = largest / 127.0;
        let divisor = v.splat(scale);
        for (values, quants) in self.values.chunks(LANES).zip(self.quants.chunks_mut(LANES)) {
            let x = match values.as_array() {
                Some(values) => v.load(values),
                None => load_part(v, values),
            };
            let mut rounded = [0; LANES];
            v.store_i(v.round(v.div(x, divisor)), &mut rounded);
            for (quant, rounded) in quants.iter_mut().zip(rounded) {
                *quant = rounded as i8;
            }
        }
        Some(scale)
    }
}
