//! What multiplies.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "wgpu")]
pub mod wgpu;

use casemate_field::Field;
use casemate_wire::Shape;

/// Something that multiplies, for any number of connections.
pub trait Device: Send + Sync {
    /// What it is, for WELCOME and logs: 1 to 32 visible ASCII characters.
    fn name(&self) -> String;

    /// Whether it is more than a processor in disguise.
    fn is_hardware(&self) -> bool {
        true
    }

    /// Bytes that a matrix takes, as it is kept; none if it cannot be kept.
    fn bytes(&self, shape: Shape) -> Option<u64>;

    /// Bytes that matrices of each of so many connections may take, if they are kept in memory of the device's own.
    fn memory(&self, _connections: u64) -> Option<u64> {
        None
    }

    /// For one connection.
    ///
    /// # Errors
    /// The device's.
    fn open(&self, field: Field) -> Result<Box<dyn Backend>, BackendError>;
}

/// The matrices of one connection, in one field.
pub trait Backend: Send {
    /// Takes the next matrix: `weights` row after row, none -128. Matrices are numbered from 0.
    ///
    /// # Errors
    /// The device's.
    fn load(&mut self, shape: Shape, weights: &[i8]) -> Result<(), BackendError>;

    /// The product modulo p of rows of elements with a matrix: `elements` are whole rows of as many as the
    /// matrix has columns, `out` becomes as many rows of as many as it has rows.
    ///
    /// # Errors
    /// The device's, and [`BackendError::NoMatrix`].
    fn multiply(
        &mut self,
        matrix: u32,
        elements: &[u32],
        out: &mut Vec<u32>,
    ) -> Result<(), BackendError>;

    /// The same in two steps, if it can do something else between them.
    fn overlapping(&mut self) -> Option<&mut dyn Overlapping> {
        None
    }
}

/// Products that are begun before the last one is finished.
pub trait Overlapping {
    /// How many may be begun and not finished; 1 or more.
    fn most(&self) -> usize;

    /// Begins a product, as [`Backend::multiply`], and copies what it needs.
    ///
    /// # Errors
    /// The device's, and [`BackendError::NoMatrix`].
    fn begin(&mut self, matrix: u32, elements: &[u32]) -> Result<(), BackendError>;

    /// Waits for the product that was begun first of those that are not finished.
    ///
    /// # Errors
    /// The device's.
    fn finish(&mut self, out: &mut Vec<u32>) -> Result<(), BackendError>;
}

/// Why something was not computed.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Misuse: no matrix of this number was loaded.
    #[error("matrix {0} was not loaded")]
    NoMatrix(u32),
    /// The system: memory, or weights that cannot be packed.
    #[error("a matrix cannot be kept")]
    Pack(#[from] casemate_kernels::q8::PackError),
    /// The system: what computes does not.
    #[error("{0}")]
    Device(String),
}
