//! The driver, the GPU, and weights in its memory.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, HostSlice,
    PinnedHostSlice, ValidAsZeroBits,
};
use cudarc::nvrtc::Ptx;

use crate::plan::{self, Kernel};
use crate::{CudaError, failed};

/// The kernels, compiled for compute capability 8.0; the driver makes of it what its GPU runs.
const PTX: &str = include_str!("../kernels/product.ptx");

/// The first version of CUDA whose drivers read `PTX`, as they count: 12.0.
const VERSION: i32 = 12_000;

/// The first compute capability that has the instructions of the kernels.
const CAPABILITY: (i32, i32) = (8, 0);

/// Of this memory that is free at the start, so much is left alone: what else runs there, and what allocating loses.
const LEFT_ALONE: u64 = 16;

/// Weights that are uploaded at once, in bytes. Two such pieces take turns.
const PIECE: usize = 4 << 20;

/// A GPU, ready to compute.
pub struct Gpu {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) split: CudaFunction,
    products: Vec<(Kernel, CudaFunction)>,
    name: String,
    pub(crate) processors: u32,
    memory: u64,
}

impl Gpu {
    /// The first GPU that the driver shows; CUDA_VISIBLE_DEVICES says which that is.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn open() -> Result<Arc<Gpu>, CudaError> {
        // SAFETY: this runs what the library does when it is loaded. It is the system's driver, found as the dynamic linker
        // finds every other library of this process.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let mut version = 0;
        // SAFETY: the library was found, so it can be called; this function may be the first, and writes one int.
        let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
        asked.map_err(failed("say which version it has"))?;
        if version < VERSION {
            return Err(CudaError::OldDriver(version));
        }
        let context = CudaContext::new(0).map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_INVALID_DEVICE) => {
                CudaError::NoGpu
            }
            error => failed("start")(error),
        })?;
        let name = context.name().map_err(failed("say what it is"))?;
        let capability = context
            .compute_capability()
            .map_err(failed("say what it can do"))?;
        if capability < CAPABILITY {
            return Err(CudaError::OldGpu { name, capability });
        }
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context
            .attribute(processors)
            .map_err(failed("say how many multiprocessors it has"))?;
        let loading = "load the kernels";
        let module = context
            .load_module(Ptx::from_src(PTX))
            .map_err(failed(loading))?;
        let function = |name| module.load_function(name).map_err(failed(loading));
        let split = function("split")?;
        let product = |kernel: Kernel| Ok((kernel, function(kernel.name())?));
        let products = Kernel::ALL.into_iter().map(product);
        let products = products.collect::<Result<Vec<_>, CudaError>>()?;
        let (free, _) = context
            .mem_get_info()
            .map_err(failed("say what memory it has"))?;
        let free = free as u64;
        Ok(Arc::new(Gpu {
            context,
            split,
            products,
            name,
            processors: processors.unsigned_abs(),
            memory: free - free / LEFT_ALONE,
        }))
    }

    /// As the driver calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of its memory that may be used, of those that were free when it was opened.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    pub(crate) fn function(&self, kernel: Kernel) -> &CudaFunction {
        let found = self.products.iter().find(|(of, _)| *of == kernel);
        &found.expect("all kernels are loaded").1
    }

    pub(crate) fn stream(&self) -> Result<Arc<CudaStream>, CudaError> {
        self.context.new_stream().map_err(failed("make a stream"))
    }
}

/// Page-locked memory of the host, zero. Not write-combined, since results are read from it.
pub(crate) fn page_locked<T: DeviceRepr + ValidAsZeroBits>(
    gpu: &Gpu,
    len: usize,
) -> Result<PinnedHostSlice<T>, CudaError> {
    let doing = failed("lock pages of the host's memory");
    // SAFETY: nobody reads it before it is written, below.
    let made = unsafe { gpu.context.alloc_pinned_with_flags::<T>(len, 0) };
    let mut made = made.map_err(doing)?;
    let at = made
        .as_mut_ptr()
        .map_err(failed("give the host's memory back"))?;
    // SAFETY: `at` points to `len` values that were just allocated and are nobody else's; all bits zero is a value of T.
    unsafe { at.write_bytes(0, len) };
    Ok(made)
}

/// Memory of the device, garbage.
pub(crate) fn on_device<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>, CudaError> {
    // SAFETY: kernels and copies write every part of it before they read that part: `Loader::load` whole rows with their
    // padding, `split` all digits with theirs, a product kernel each output of each row.
    let made = unsafe { stream.alloc::<T>(len) };
    made.map_err(failed("allocate its memory"))
}

/// Weights in the memory of a GPU.
pub struct Matrix {
    /// Rows of `width` bytes.
    pub(crate) weights: CudaSlice<i8>,
    pub(crate) outputs: u32,
    pub(crate) columns: u32,
    pub(crate) width: u32,
}

/// Uploads weights.
pub struct Loader {
    stream: Arc<CudaStream>,
    pieces: [PinnedHostSlice<i8>; 2],
}

impl Loader {
    /// With two pieces of page-locked memory.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(gpu: &Gpu) -> Result<Loader, CudaError> {
        Ok(Loader {
            stream: gpu.stream()?,
            pieces: [page_locked(gpu, PIECE)?, page_locked(gpu, PIECE)?],
        })
    }

    /// Keeps a matrix: `weights` are `outputs` rows of `columns` in -127..=127.
    ///
    /// # Errors
    /// [`CudaError::Driver`], above all without memory; [`CudaError::Shape`].
    pub fn load(
        &mut self,
        outputs: u32,
        columns: u32,
        weights: &[i8],
    ) -> Result<Matrix, CudaError> {
        let shape = || CudaError::Shape {
            rows: weights.len(),
            columns,
            outputs,
        };
        let padded = plan::width(columns).ok_or_else(shape)?;
        let (width, row) = (padded as usize, columns as usize);
        if outputs == 0 || weights.len() != outputs as usize * row {
            return Err(shape());
        }
        let uploading = "upload weights";
        let mut kept = on_device::<i8>(&self.stream, outputs as usize * width)?;
        let rows_at_once = PIECE / width;
        let pieces = weights.chunks(row * rows_at_once);
        for (i, rows) in pieces.enumerate() {
            let piece = &mut self.pieces[i % 2];
            // Waits until what it held is uploaded.
            let bytes = piece.as_mut_slice().map_err(failed(uploading))?;
            for (line, row) in bytes.chunks_mut(width).zip(rows.chunks(row)) {
                let (there, padding) = line.split_at_mut(row.len());
                there.copy_from_slice(row);
                padding.fill(0);
            }
            let from = i * rows_at_once * width;
            let len = rows.len() / row * width;
            // SAFETY: the slice is used with this stream alone; dropping `_until` after the copy was queued makes the
            // piece's next user wait for it.
            let (bytes, _until) = unsafe { piece.stream_synced_slice(&self.stream) };
            self.stream
                .memcpy_htod(&bytes[..len], &mut kept.slice_mut(from..from + len))
                .map_err(failed(uploading))?;
        }
        self.stream.synchronize().map_err(failed(uploading))?;
        Ok(Matrix {
            weights: kept,
            outputs,
            columns,
            width: padded,
        })
    }
}
