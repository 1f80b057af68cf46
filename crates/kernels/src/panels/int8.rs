//! Packed int8 weights with a scale a row. The drawing of a panel is in the [module above](super).
//!
//! Weights are stored as `w + 128` (unsigned), which is what `vpdpbusd` multiplies with signed
//! activations. Rows past the last and columns past the last are zeros. Scales lie apart.

use std::sync::{Mutex, PoisonError};

use zeroize::Zeroizing;

use super::rows::{TINY, largest_magnitude};
use super::{MAX_COLUMNS, PANEL};
use crate::cpu::Kernel;
use crate::isa::{LANES, Simd, load_part};
use crate::mem::{Element, PAGE, Purpose, Region};
use crate::q8::PackError;
use crate::team::{SharedMut, Team};

/// Sixteen rows by four columns.
pub(super) type Line = [u8; 64];

// SAFETY: bytes.
unsafe impl Element for Line {}

/// Of a weight that is zero.
const ZERO: u8 = 0x80;

/// An int8 weight matrix of `rows` (outputs) by `columns` (inputs) with one f32 scale a row, packed
/// for [`matmul_int8`](super::matmul_int8).
pub struct Int8Matrix {
    panels: Region,
    /// One a row, and zeros to the end of the last panel.
    scales: Region,
    rows: usize,
    columns: usize,
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
            |(values, quants), row, put| {
                fill(row, values);
                let scale = isa
                    .dispatch(QuantiseRow { values, quants })
                    .ok_or(PackError::NotFinite { row })?;
                put(quants, scale);
                Ok(())
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
            |(), i, put| {
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
                put(quants, scale);
                Ok(())
            },
        )
    }

    /// Bytes that a packed matrix takes, in whole pages, or `None` if it is empty or does not fit
    /// the address space.
    pub fn packed_bytes(rows: usize, columns: usize) -> Option<usize> {
        if rows == 0 || columns == 0 {
            return None;
        }
        let (panels, scales) = Int8Matrix::sizes(rows, columns)?;
        let panels = panels.checked_next_multiple_of(PAGE)?;
        panels.checked_add(scales.checked_next_multiple_of(PAGE)?)
    }

    /// Bytes of all panels and of the scales.
    fn sizes(rows: usize, columns: usize) -> Option<(usize, usize)> {
        let panels = rows.div_ceil(PANEL);
        let bytes = panels
            .checked_mul(columns.div_ceil(4))?
            .checked_mul(size_of::<Line>())?;
        Some((bytes, panels.checked_mul(PANEL * size_of::<f32>())?))
    }

    /// `pack_row(scratch, row, put)` calls `put` with the row's integers and scale, once.
    fn pack<S>(
        arena: &mut Region,
        team: &Team,
        rows: usize,
        columns: usize,
        scratch: impl Fn() -> S + Sync,
        pack_row: impl Fn(&mut S, usize, &mut dyn FnMut(&[i8], f32)) -> Result<(), PackError> + Sync,
    ) -> Result<Int8Matrix, PackError> {
        if rows == 0 || columns == 0 {
            return Err(PackError::Empty { rows, columns });
        }
        if columns > MAX_COLUMNS {
            return Err(PackError::TooManyColumns { columns });
        }
        let (panel_bytes, scale_bytes) =
            Int8Matrix::sizes(rows, columns).ok_or(PackError::TooLarge { rows, columns })?;
        let mut panels = arena.take_or_reserve(panel_bytes, Purpose::Weights)?;
        let mut scales = arena.take_or_reserve(scale_bytes, Purpose::Weights)?;
        let shared_scales = SharedMut::new(scales.as_f32_mut());
        let first_error: Mutex<Option<(usize, PackError)>> = Mutex::new(None);
        let packed = panels.view_mut::<Line>();
        let lines = columns.div_ceil(4);
        team.for_each_chunk_mut_with(packed, lines, scratch, |scratch, panel, packed| {
            packed.fill([ZERO; 64]);
            for lane in 0..PANEL.min(rows - panel * PANEL) {
                let row = panel * PANEL + lane;
                let mut put = |quants: &[i8], scale: f32| {
                    for (line, quants) in packed.iter_mut().zip(quants.chunks(4)) {
                        for (to, q) in line[lane * 4..].iter_mut().zip(quants) {
                            *to = *q as u8 ^ 0x80;
                        }
                    }
                    // SAFETY: each row is packed once, by one member.
                    let slot = unsafe { shared_scales.slice(row, 1) };
                    slot[0] = scale;
                };
                if let Err(error) = pack_row(scratch, row, &mut put) {
                    let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
                    if first.as_ref().is_none_or(|(earlier, _)| row < *earlier) {
                        *first = Some((row, error));
                    }
                    return;
                }
            }
        });
        match first_error
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
        {
            Some((_, error)) => Err(error),
            None => Ok(Int8Matrix {
                panels,
                scales,
                rows,
                columns,
            }),
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes that one product streams from memory.
    pub fn bytes(&self) -> usize {
        self.panels.len() + self.scales.len()
    }

    /// Writes row `row` as it is packed and returns its scale.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `columns` long.
    pub fn row(&self, row: usize, out: &mut [i8]) -> f32 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(
            out.len(),
            self.columns,
            "a row has as many elements as the matrix has columns"
        );
        let lane = row % PANEL * 4;
        for (line, out) in self.panel(row / PANEL).iter().zip(out.chunks_mut(4)) {
            for (out, w) in out.iter_mut().zip(&line[lane..]) {
                *out = (w ^ ZERO) as i8;
            }
        }
        self.scales.as_f32()[row]
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Lines of a panel.
    pub(super) fn lines(&self) -> usize {
        self.columns.div_ceil(4)
    }

    pub(super) fn panel(&self, panel: usize) -> &[Line] {
        let lines = self.lines();
        &self.panels.view::<Line>()[panel * lines..(panel + 1) * lines]
    }

    /// Scales of a panel's rows.
    pub(super) fn scales(&self, panel: usize) -> &[f32; PANEL] {
        &self.scales.as_f32().as_chunks::<PANEL>().0[panel]
    }
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
