//! What this machine can do at most, measured in the run that it is compared with: multiply-adds from registers, the best
//! packed product of matrices, reading from memory.

use std::time::Instant;

use anyhow::{Context, Result};
use casemate_kernels::bandwidth::measure_read;
use casemate_kernels::gemm::{F32Matrix, gemm_f32};
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::panels::{
    Bf16Matrix, Bf16Rows, Int8Matrix, Int8Rows, matmul_bf16, matmul_int8,
};
use casemate_kernels::peak;
use casemate_kernels::q8::{Q8Matrix, Q8Rows, matmul_q8};
use casemate_kernels::team::Team;
use serde::{Deserialize, Serialize};

use crate::statistics;

/// Bytes read for a bandwidth: several times any last-level cache that a tenant gets.
const READ: usize = 512 << 20;
/// The product whose rate counts as the best: rows, outputs and inputs of TinyLlama's gate.
const PRODUCT: (usize, usize, usize) = (512, 5632, 2048);

/// Arithmetic with a limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Arithmetic {
    F32,
    Bf16,
    Int8,
}

impl Arithmetic {
    /// What the linear layers of a format (by its name) multiply in.
    pub(crate) fn of(compute: &str) -> Arithmetic {
        // Behind a `+` stands how keys and values are stored.
        match compute.split('+').next().unwrap_or(compute) {
            "f32" => Arithmetic::F32,
            "bf16" | "bf16-tiles" => Arithmetic::Bf16,
            // int8-g32, int8-row, q4-g32: integers, whatever the weights are stored in.
            _ => Arithmetic::Int8,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Arithmetic::F32 => "f32",
            Arithmetic::Bf16 => "bf16",
            Arithmetic::Int8 => "int8",
        }
    }
}

/// One arithmetic's limits, in 10^9 operations a second; a multiply-add is two.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ComputeLimit {
    pub(crate) arithmetic: Arithmetic,
    /// From registers; nothing where the kernels have no such instruction.
    pub(crate) registers: Option<f64>,
    /// The best packed product of our kernels.
    pub(crate) product: Option<f64>,
}

/// All limits of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Limits {
    pub(crate) compute: Vec<ComputeLimit>,
    /// 10^9 bytes read a second from huge pages (where the system grants them), each time it was measured.
    pub(crate) read: Vec<f64>,
}

impl Limits {
    /// Measures what arithmetic can do.
    pub(crate) fn measure(threads: usize) -> Result<Limits> {
        let team = Team::new(threads)?;
        let (rows, outputs, inputs) = PRODUCT;
        let fill = |row: usize, out: &mut [f32]| {
            for (i, x) in out.iter_mut().enumerate() {
                *x = ((row * 31 + i * 7) % 255) as f32 / 128.0 - 1.0;
            }
        };
        let x: Vec<f32> = (0..rows * inputs)
            .map(|i| (i % 251) as f32 / 128.0 - 1.0)
            .collect();
        let mut y = vec![0.0; rows * outputs];
        let operations = (2 * rows * outputs * inputs) as f64;
        let f32_weights = F32Matrix::from_rows(&team, outputs, inputs, fill)?;
        let f32_product = best_rate(operations, 3, || gemm_f32(&team, &x, &f32_weights, &mut y));
        let weights = Q8Matrix::from_rows(&team, outputs, inputs, fill)?;
        let mut quants = Q8Rows::with_capacity(rows, inputs);
        quants.quantise(&team, &x, inputs);
        let by_groups = best_rate(operations, 5, || {
            matmul_q8(&team, &quants, &weights, &mut y)
        });
        let bytes = Int8Matrix::packed_bytes(outputs, inputs).context("the product fits memory")?;
        let mut arena = Region::zeroed(bytes, Purpose::Public)?;
        let weights = Int8Matrix::from_rows_in(&mut arena, &team, outputs, inputs, fill)?;
        let mut quants = Int8Rows::with_capacity(rows, inputs);
        quants.quantise(&team, &x, inputs, None);
        let by_rows = best_rate(operations, 5, || {
            matmul_int8(&team, &quants, &weights, &mut y)
        });
        let bytes = Bf16Matrix::packed_bytes(outputs, inputs).context("the product fits memory")?;
        let mut arena = Region::zeroed(bytes, Purpose::Public)?;
        let weights = Bf16Matrix::from_rows_in(&mut arena, &team, outputs, inputs, fill)?;
        let mut rounded = Bf16Rows::with_capacity(rows, inputs);
        rounded.round(&team, &x, inputs);
        let bf16_product = best_rate(operations, 5, || {
            matmul_bf16(&team, &rounded, &weights, &mut y)
        });
        Ok(Limits {
            compute: vec![
                ComputeLimit {
                    arithmetic: Arithmetic::Int8,
                    registers: Some(peak::measure_int8(&team)),
                    product: Some(by_groups.max(by_rows)),
                },
                ComputeLimit {
                    arithmetic: Arithmetic::Bf16,
                    registers: Some(peak::measure_bf16(&team)),
                    product: Some(bf16_product),
                },
                ComputeLimit {
                    arithmetic: Arithmetic::F32,
                    registers: Some(peak::measure_f32(&team)),
                    product: Some(f32_product),
                },
            ],
            read: Vec::new(),
        })
    }

    /// Measures reading once more, and keeps and returns it. Beside the thing it is the limit of, because it drifts.
    pub(crate) fn read_now(&mut self, threads: usize) -> Result<f64> {
        let rate = measure_read(&Team::new(threads)?, READ, 5)?.gigabytes_per_second();
        self.read.push(rate);
        Ok(rate)
    }

    /// Median of all times reading was measured.
    pub(crate) fn read_median(&self) -> f64 {
        statistics::median(&self.read)
    }

    /// The limits of an arithmetic.
    pub(crate) fn of(&self, arithmetic: Arithmetic) -> Option<&ComputeLimit> {
        self.compute
            .iter()
            .find(|limit| limit.arithmetic == arithmetic)
    }
}

/// 10^9 operations a second in the fastest of some runs.
fn best_rate(operations: f64, times: usize, mut run: impl FnMut()) -> f64 {
    run();
    let seconds = (0..times).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    operations / seconds.fold(f64::MAX, f64::min) / 1e9
}
