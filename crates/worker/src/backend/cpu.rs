//! The processor, with the int8 product of `casemate-kernels`.
//!
//! An element is four digits, so a row of elements is four int8 rows, and all of them are multiplied in
//! one product: weights are read once, as for plain activations.

use std::sync::Arc;

use casemate_field::Field;
use casemate_field::digits::DIGITS;
use casemate_kernels::mem::Region;
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;
use casemate_wire::Shape;

use super::{Backend, BackendError, Device};

/// The processor.
pub struct Cpu {
    team: Arc<Team>,
}

impl Cpu {
    /// So many threads, with the best instructions of this machine. Connections share them: while one computes, others do so
    /// on a thread of their own.
    ///
    /// # Errors
    /// The system's refusal to start a thread.
    pub fn new(threads: usize) -> std::io::Result<Cpu> {
        let team = Arc::new(Team::new(threads)?);
        Ok(Cpu { team })
    }
}

impl Device for Cpu {
    fn name(&self) -> String {
        let isa = self.team.isa().to_string();
        let short: String = isa
            .chars()
            .filter(char::is_ascii_graphic)
            .take(24)
            .collect();
        format!("cpu-{short}-x{}", self.team.members())
    }

    fn bytes(&self, shape: Shape) -> Option<u64> {
        let bytes = Int8Matrix::packed_bytes(shape.rows as usize, shape.columns as usize)?;
        u64::try_from(bytes).ok()
    }

    fn open(&self, field: Field) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(CpuBackend {
            team: Arc::clone(&self.team),
            field,
            matrices: Vec::new(),
            digits: Vec::new(),
            rows: Int8Rows::with_capacity(0, 1),
            sums: Vec::new(),
        }))
    }
}

struct CpuBackend {
    team: Arc<Team>,
    field: Field,
    matrices: Vec<Int8Matrix>,
    /// For each row of elements its four rows of digits.
    digits: Vec<i8>,
    rows: Int8Rows,
    /// For each row of elements its four rows of sums.
    sums: Vec<i32>,
}

impl Backend for CpuBackend {
    fn load(&mut self, shape: Shape, weights: &[i8]) -> Result<(), BackendError> {
        let (rows, columns) = (shape.rows as usize, shape.columns as usize);
        // Scales are the enclave's business.
        let row = |i: usize| (&weights[i * columns..(i + 1) * columns], 1.0);
        let team = &self.team;
        let matrix = Int8Matrix::from_int8_in(&mut Region::default(), team, rows, columns, row)?;
        self.matrices.push(matrix);
        Ok(())
    }

    fn multiply(
        &mut self,
        matrix: u32,
        elements: &[u32],
        out: &mut Vec<u32>,
    ) -> Result<(), BackendError> {
        let w = self.matrices.get(matrix as usize);
        let w = w.ok_or(BackendError::NoMatrix(matrix))?;
        let (columns, outputs) = (w.columns(), w.rows());
        let rows = elements.len() / columns;
        self.digits.resize(elements.len() * DIGITS, 0);
        let digits = self.digits.chunks_mut(columns * DIGITS);
        for (row, digits) in elements.chunks(columns).zip(digits) {
            self.field.split_row(row, digits);
        }
        self.rows.assign(&self.team, &self.digits, columns);
        self.sums.resize(rows * outputs * DIGITS, 0);
        matmul_int8_sums(&self.team, &self.rows, w, &mut self.sums);
        out.resize(rows * outputs, 0);
        let sums = self.sums.chunks(outputs * DIGITS);
        for (out, sums) in out.chunks_mut(outputs).zip(sums) {
            self.field.recombine_row(sums, out);
        }
        Ok(())
    }
}
