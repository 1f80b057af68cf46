//! Products modulo p on an NVIDIA GPU, for workers: x W^T of rows of elements with a matrix of int8, exactly as
//! `casemate-field` and the int8 product of `casemate-kernels` make them.
//!
//! | what | holds |
//! |---|---|
//! | `kernels/product.cu` | the kernels, in CUDA C |
//! | `kernels/product.ptx` | the same compiled for whatever GPU a driver makes of it; `tools/cuda/ptx.py` makes it |
//! | [`plan`] | sizes of tiles, launches and memory |
//! | [`Gpu`] | the driver, found when the program runs, and the GPU |
//! | [`Loader`], [`Matrix`] | weights, uploaded in pieces |
//! | [`Lane`] | one product after the other; several lanes overlap |
//! | `emulator/` | a driver without a GPU, which runs the PTX on a processor, for tests |
//!
//! Nothing is linked but what Rust's standard library links: the driver (`libcuda.so.1`) is opened by name, and there is
//! an error in words where it is absent. **This room may hold `unsafe`**: telling a driver what to run cannot be checked by
//! a compiler. All of it is in `gpu.rs` and `lane.rs`.

mod gpu;
mod lane;
pub mod plan;

pub use gpu::{Gpu, Loader, Matrix};
pub use lane::Lane;

use cudarc::driver::DriverError;

/// Why a GPU does not compute.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The system: no driver.
    #[error(
        "there is no NVIDIA driver here, libcuda.so.1 is not found: install the driver of your GPU, or let the container see \
         it (nvidia-container-toolkit); without a GPU take --backend cpu"
    )]
    NoDriver,
    /// The system: a driver, but no GPU.
    #[error(
        "the NVIDIA driver shows no GPU: compare with `nvidia-smi`, and see what CUDA_VISIBLE_DEVICES hides"
    )]
    NoGpu,
    /// The system: a driver from before CUDA 12.0.
    #[error(
        "the NVIDIA driver offers CUDA {}.{}, 12.0 is needed: install driver 525 or later",
        .0 / 1000,
        .0 % 1000 / 10
    )]
    OldDriver(i32),
    /// The system: a GPU without what the kernels use.
    #[error(
        "{name} has compute capability {}.{}, 8.0 (Ampere, 2020) is needed: take --backend wgpu or cpu",
        .capability.0,
        .capability.1
    )]
    OldGpu {
        /// As the driver calls it.
        name: String,
        /// Major and minor.
        capability: (i32, i32),
    },
    /// The system: the driver failed.
    #[error("the GPU fails to {doing}: {error}")]
    Driver {
        /// What it was to do.
        doing: &'static str,
        /// What it said.
        error: DriverError,
    },
    /// Misuse: rows or a matrix that have no place in a launch.
    #[error(
        "{rows} rows of {columns} columns and {outputs} outputs are more than one launch takes, or none"
    )]
    Shape {
        /// Of elements.
        rows: usize,
        /// Of the matrix.
        columns: u32,
        /// Rows of the matrix.
        outputs: u32,
    },
    /// Misuse: a lane was asked to begin before it had finished, or to finish what was not begun.
    #[error("a lane computes one product after the other")]
    OutOfTurn,
}

/// Says what failed.
fn failed(doing: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |error| CudaError::Driver { doing, error }
}
