//! A lane: a stream with memory of its own, which computes one product after the other. While one lane computes, another's
//! elements are on their way to the GPU and a third's results come back.

use std::sync::Arc;

use casemate_field::Field;
use cudarc::driver::{
    CudaSlice, CudaStream, HostSlice, LaunchConfig, PinnedHostSlice, PushKernelArg,
};

use crate::gpu::{Gpu, Matrix, on_device, page_locked};
use crate::{CudaError, failed, plan};

/// One product after the other.
pub struct Lane {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    sent: PinnedHostSlice<u32>,
    received: PinnedHostSlice<u32>,
    elements: CudaSlice<u32>,
    digits: CudaSlice<u32>,
    product: CudaSlice<u32>,
    /// Elements of the product that was begun.
    begun: Option<usize>,
}

impl Lane {
    /// A lane that has nothing to do. Its memory grows, in powers of two, with the largest product.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(gpu: &Arc<Gpu>) -> Result<Lane, CudaError> {
        let stream = gpu.stream()?;
        Ok(Lane {
            gpu: Arc::clone(gpu),
            sent: page_locked(gpu, 1)?,
            received: page_locked(gpu, 1)?,
            elements: on_device(&stream, 1)?,
            digits: on_device(&stream, 1)?,
            product: on_device(&stream, 1)?,
            stream,
            begun: None,
        })
    }

    /// Begins to multiply whole rows of elements with a matrix and returns at once, with a copy of them. What is not an
    /// element gives numbers that mean nothing.
    ///
    /// # Errors
    /// [`CudaError::Driver`], above all without memory; [`CudaError::Shape`]; [`CudaError::OutOfTurn`]. Nothing was begun then.
    pub fn begin(
        &mut self,
        field: Field,
        matrix: &Matrix,
        elements: &[u32],
    ) -> Result<(), CudaError> {
        if self.begun.is_some() {
            return Err(CudaError::OutOfTurn);
        }
        let (outputs, columns, width) = (matrix.outputs, matrix.columns, matrix.width);
        let whole = elements.len().is_multiple_of(columns as usize);
        let rows = u32::try_from(elements.len() / columns as usize);
        let rows = rows.ok().filter(|_| whole);
        let launch = rows.and_then(|rows| plan::launch(rows, outputs, self.gpu.processors));
        let (Some(rows), Some(launch)) = (rows, launch) else {
            return Err(CudaError::Shape {
                rows: elements.len() / columns as usize,
                columns,
                outputs,
            });
        };
        let (count, results) = (elements.len(), rows as usize * outputs as usize);
        self.make_room(count, plan::digit_words(rows, width), results)?;

        let sending = "receive elements";
        let sent = self.sent.as_mut_slice().map_err(failed(sending))?;
        sent[..count].copy_from_slice(elements);
        {
            // SAFETY: the slice is used with this lane's stream alone; dropping `_until` after the copy was queued makes
            // whoever writes there next wait for it.
            let (sent, _until) = unsafe { self.sent.stream_synced_slice(&self.stream) };
            self.stream
                .memcpy_htod(&sent[..count], &mut self.elements.slice_mut(..count))
                .map_err(failed(sending))?;
        }

        let ((x, y), threads) = plan::split(rows, width);
        let modulus = field.modulus();
        let mut split = self.stream.launch_builder(&self.gpu.split);
        split.arg(&self.elements).arg(&mut self.digits);
        split.arg(&rows).arg(&columns).arg(&width).arg(&modulus);
        // SAFETY: the arguments are those of `split`, in its order. It reads `rows * columns` elements and writes
        // `digit_words` words; `make_room` made the buffers that long.
        unsafe { split.launch(blocks((x, y), threads)) }.map_err(failed("split elements"))?;

        let bits = field.bits();
        let c = ((1u64 << bits) - u64::from(modulus)) as u32;
        let kernel = self.gpu.function(launch.kernel);
        let mut product = self.stream.launch_builder(kernel);
        product.arg(&matrix.weights).arg(&self.digits);
        product.arg(&mut self.product);
        product.arg(&rows).arg(&outputs).arg(&width);
        product.arg(&bits).arg(&c);
        // SAFETY: the arguments are those of every product kernel, in their order. They read `outputs` rows of `width` bytes
        // of weights, which is how `Loader` made them, `digit_words` words of digits, and write `rows * outputs` elements;
        // `make_room` made the buffers that long. The weights outlive the launch: dropping them waits for it.
        unsafe { product.launch(blocks((launch.blocks, 1), launch.threads)) }
            .map_err(failed("multiply"))?;

        // SAFETY: as above; whoever reads there next waits for the copy.
        let (received, _until) = unsafe { self.received.stream_synced_mut_slice(&self.stream) };
        self.stream
            .memcpy_dtoh(&self.product.slice(..results), &mut received[..results])
            .map_err(failed("send a product"))?;
        self.begun = Some(results);
        Ok(())
    }

    /// Waits for the product that was begun: `out` becomes it, row after row.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also for what went wrong while it was computed; [`CudaError::OutOfTurn`].
    pub fn finish(&mut self, out: &mut Vec<u32>) -> Result<(), CudaError> {
        let results = self.begun.take().ok_or(CudaError::OutOfTurn)?;
        let computing = "compute a product";
        // Does not sleep, unlike the wait that follows.
        self.stream.synchronize().map_err(failed(computing))?;
        let received = self.received.as_slice().map_err(failed(computing))?;
        out.clear();
        out.extend_from_slice(&received[..results]);
        Ok(())
    }

    /// Makes buffers at least so long. None is in use: a product was finished, or not begun.
    fn make_room(&mut self, count: usize, digits: usize, results: usize) -> Result<(), CudaError> {
        // Each by its own length: an allocation that fails leaves the others as they are.
        if self.sent.len() < count {
            self.sent = page_locked(&self.gpu, count.next_power_of_two())?;
        }
        if self.elements.len() < count {
            self.elements = on_device(&self.stream, count.next_power_of_two())?;
        }
        if self.digits.len() < digits {
            self.digits = on_device(&self.stream, digits.next_power_of_two())?;
        }
        if self.product.len() < results {
            self.product = on_device(&self.stream, results.next_power_of_two())?;
        }
        if self.received.len() < results {
            self.received = page_locked(&self.gpu, results.next_power_of_two())?;
        }
        Ok(())
    }
}

fn blocks((x, y): (u32, u32), threads: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x, y, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}
