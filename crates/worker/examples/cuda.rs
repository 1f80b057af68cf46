//! Measures products on an NVIDIA GPU at the shapes of Llama 2 7B, from memory of the host to memory of the host, and checks
//! each against the processor: `cargo run --release -p casemate-worker --features cuda --example cuda`.

#![allow(clippy::cast_precision_loss, reason = "figures for people")]

use std::time::{Duration, Instant};

use anyhow::Context;
use casemate_field::Field;
use casemate_field::digits::DIGITS;
use casemate_wire::Shape;
use casemate_worker::backend::cpu::Cpu;
use casemate_worker::backend::cuda::Cuda;
use casemate_worker::backend::{Backend, Device};
use casemate_worker::memory::MAX_PAYLOAD;

/// What is multiplied with one input, outputs and inputs.
const STACKS: [(&str, u32, u32); 5] = [
    ("Q, K, V", 12_288, 4096),
    ("attention output", 4096, 4096),
    ("gate, up", 22_016, 4096),
    ("down", 4096, 11_008),
    ("head", 32_000, 4096),
];

const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 512];

/// Of each, the fastest is told.
const TRIES: usize = 20;

const FIELD: Field = Field::P29;

fn main() -> anyhow::Result<()> {
    let gpu = Cuda::new()?;
    let cores = std::thread::available_parallelism()?.get();
    let cpu = Cpu::new(cores)?;
    println!(
        "{} and {}, fastest of {TRIES}; overlapped: {TRIES} products, two at once",
        gpu.name(),
        cpu.name()
    );
    println!(
        "| stack | rows | ms | GB/s of weights | TOP/s of digits | ms overlapped | ms on the processor |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut random = 1u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for (name, outputs, columns) in STACKS {
        let shape = Shape {
            rows: outputs,
            columns,
        };
        let weights: Vec<i8> = (0..shape.weights())
            .map(|_| ((next() % 255) as i16 - 127) as i8)
            .collect();
        let mut on_gpu = gpu.open(FIELD)?;
        let mut on_cpu = cpu.open(FIELD)?;
        on_gpu.load(shape, &weights)?;
        on_cpu.load(shape, &weights)?;
        for rows in ROWS {
            if rows * outputs.max(columns) as usize * 4 > MAX_PAYLOAD as usize {
                continue;
            }
            let elements: Vec<u32> = (0..rows * columns as usize)
                .map(|_| FIELD.reduce(next()))
                .collect();
            let (mut found, mut expected) = (vec![], vec![]);
            let alone = fastest(TRIES, || on_gpu.multiply(0, &elements, &mut found))?;
            let beside = fastest(2, || on_cpu.multiply(0, &elements, &mut expected))?;
            anyhow::ensure!(found == expected, "{name}, {rows} rows: a wrong product");
            let overlapped = overlapped(&mut *on_gpu, &elements, &mut found)?;
            let (bytes, products) = (
                shape.weights() as f64,
                (shape.weights() * (rows * DIGITS) as u64) as f64,
            );
            println!(
                "| {name} | {rows} | {:.3} | {:.0} | {:.1} | {:.3} | {:.3} |",
                alone.as_secs_f64() * 1e3,
                bytes / alone.as_secs_f64() / 1e9,
                2.0 * products / alone.as_secs_f64() / 1e12,
                overlapped.as_secs_f64() * 1e3,
                beside.as_secs_f64() * 1e3,
            );
        }
    }
    Ok(())
}

fn fastest<E>(tries: usize, mut what: impl FnMut() -> Result<(), E>) -> Result<Duration, E> {
    let mut least = Duration::MAX;
    for _ in 0..tries {
        let started = Instant::now();
        what()?;
        least = least.min(started.elapsed());
    }
    Ok(least)
}

/// The time of each product, where the next is begun before the last is finished.
fn overlapped(
    backend: &mut dyn Backend,
    elements: &[u32],
    out: &mut Vec<u32>,
) -> anyhow::Result<Duration> {
    let backend = backend.overlapping().context("products overlap")?;
    let started = Instant::now();
    backend.begin(0, elements)?;
    for _ in 1..TRIES {
        backend.begin(0, elements)?;
        backend.finish(out)?;
    }
    backend.finish(out)?;
    Ok(started.elapsed() / TRIES as u32)
}
