//! An NVIDIA GPU, with the kernels of `casemate-cuda`.

use std::collections::VecDeque;
use std::sync::Arc;

use casemate_cuda::{CudaError, Gpu, Lane, Loader, Matrix, plan};
use casemate_field::Field;
use casemate_wire::Shape;

use super::{Backend, BackendError, Device, Overlapping};

/// Products of a connection that are under way at once: while one is computed, the next one's elements go there and the last
/// one's results come back.
const LANES: usize = 2;

/// Memory of the GPU that a connection takes besides matrices, in bytes: for each lane elements and results, a payload each
/// at most, and digits, which are as long as elements and their padding, rounded up to a power of two.
const SCRATCH: u64 = LANES as u64 * 4 * crate::memory::MAX_PAYLOAD as u64;

/// A GPU.
pub struct Cuda {
    gpu: Arc<Gpu>,
}

impl Cuda {
    /// The first GPU that the driver shows.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn new() -> Result<Cuda, CudaError> {
        let gpu = Gpu::open()?;
        Ok(Cuda { gpu })
    }
}

impl Device for Cuda {
    fn name(&self) -> String {
        let words = self.gpu.name().chars();
        let short: String = words.filter(char::is_ascii_alphanumeric).take(24).collect();
        format!("cuda-{short}")
    }

    fn bytes(&self, shape: Shape) -> Option<u64> {
        plan::matrix_bytes(shape.rows, shape.columns)
    }

    fn memory(&self, connections: u64) -> Option<u64> {
        let each = self.gpu.memory() / connections.max(1);
        Some(each.saturating_sub(SCRATCH))
    }

    fn open(&self, field: Field) -> Result<Box<dyn Backend>, BackendError> {
        let lane = || Lane::new(&self.gpu);
        let lanes = [lane().map_err(device)?, lane().map_err(device)?];
        Ok(Box::new(CudaBackend {
            field,
            loader: Loader::new(&self.gpu).map_err(device)?,
            matrices: Vec::new(),
            idle: VecDeque::from(lanes),
            busy: VecDeque::new(),
        }))
    }
}

fn device(error: CudaError) -> BackendError {
    BackendError::Device(error.to_string())
}

struct CudaBackend {
    field: Field,
    loader: Loader,
    matrices: Vec<Matrix>,
    idle: VecDeque<Lane>,
    /// In the order in which their products were begun.
    busy: VecDeque<Lane>,
}

impl Backend for CudaBackend {
    fn load(&mut self, shape: Shape, weights: &[i8]) -> Result<(), BackendError> {
        let matrix = self.loader.load(shape.rows, shape.columns, weights);
        self.matrices.push(matrix.map_err(device)?);
        Ok(())
    }

    fn multiply(
        &mut self,
        matrix: u32,
        elements: &[u32],
        out: &mut Vec<u32>,
    ) -> Result<(), BackendError> {
        self.begin(matrix, elements)?;
        self.finish(out)
    }

    fn overlapping(&mut self) -> Option<&mut dyn Overlapping> {
        Some(self)
    }
}

impl Overlapping for CudaBackend {
    fn most(&self) -> usize {
        LANES
    }

    fn begin(&mut self, matrix: u32, elements: &[u32]) -> Result<(), BackendError> {
        let with = self.matrices.get(matrix as usize);
        let with = with.ok_or(BackendError::NoMatrix(matrix))?;
        let lane = self.idle.front_mut();
        let lane = lane.ok_or_else(|| device(CudaError::OutOfTurn))?;
        lane.begin(self.field, with, elements).map_err(device)?;
        self.busy.extend(self.idle.pop_front());
        Ok(())
    }

    fn finish(&mut self, out: &mut Vec<u32>) -> Result<(), BackendError> {
        let lane = self.busy.pop_front();
        let mut lane = lane.ok_or_else(|| device(CudaError::OutOfTurn))?;
        let finished = lane.finish(out).map_err(device);
        self.idle.push_back(lane);
        finished
    }
}
