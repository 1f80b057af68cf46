//! Prints what each kernel reaches of this machine's limits, measured in the same run.
//!
//! `cargo run --release -p casemate-kernels --example kernels_bench [-- ISA [THREADS]]`
//!
//! Shapes are TinyLlama-1.1B's. Products with few rows run over 1 GiB of different matrices, so
//! that no cache holds them; figures are medians. On a machine with other work the limits move too:
//! read the shares.

use std::time::{Duration, Instant};

use casemate_kernels::attention::{Attention, KvPool, KvShape, KvType, PAGE, Span};
use casemate_kernels::bandwidth::measure_read;
use casemate_kernels::cpu::Isa;
use casemate_kernels::elementwise::silu_mul;
use casemate_kernels::gemm::{F32Matrix, gemm_f32};
use casemate_kernels::norm::rmsnorm;
use casemate_kernels::peak::{measure_f32, measure_int8};
use casemate_kernels::q8::{Q8Matrix, Q8Rows, matmul_q8};
use casemate_kernels::softmax::softmax;
use casemate_kernels::team::Team;

/// Median and best time of a run.
fn measure(times: usize, mut run: impl FnMut()) -> (Duration, Duration) {
    run();
    let mut all: Vec<Duration> = (0..times)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    all.sort();
    (all[times / 2], all[0])
}

fn line(name: &str, (median, best): (Duration, Duration), work: f64, unit: &str, limit: f64) {
    let rate = |time: Duration| work / time.as_secs_f64() / 1e9;
    println!(
        "{name:44} {:>10.1} us {:>7.1} {unit:7} {:>4.0} %   best {:>7.1}",
        median.as_secs_f64() * 1e6,
        rate(median),
        rate(median) / limit * 100.0,
        rate(best)
    );
}

fn fill(seed: usize) -> impl Fn(usize, &mut [f32]) + Sync {
    move |row, out| {
        for (i, x) in out.iter_mut().enumerate() {
            let z = (row * 7919 + i * 104_729 + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            *x = (z >> 40) as f32 / (1 << 23) as f32 - 1.0;
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let isa = arguments.next().map_or(Isa::detect(), |name| {
        Isa::named(&name).expect("an instruction set of this machine")
    });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments
        .next()
        .map_or(cores, |n| n.parse().expect("a number of threads"));
    let team = Team::with_isa(threads, isa).expect("threads");
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or(": unknown")
        .trim_start_matches(['\t', ':', ' ']);
    println!("{model}, {cores} cores; {isa}, {threads} threads");

    let (k, n) = (2048, 5632);
    let packing = Instant::now();
    let int8: Vec<Q8Matrix> = (0..88)
        .map(|s| Q8Matrix::from_rows(&team, n, k, fill(s)).expect("memory"))
        .collect();
    let int8_bytes: usize = int8.iter().map(Q8Matrix::bytes).sum();
    println!(
        "packing {:.2} GiB of int8 from f32 rows: {:.1?}; {:?}",
        int8_bytes as f64 / f64::from(1 << 30),
        packing.elapsed(),
        int8[0].memory()
    );
    let f32s: Vec<F32Matrix> = (0..22)
        .map(|s| F32Matrix::from_rows(&team, n, k, fill(s)).expect("memory"))
        .collect();
    let f32_bytes: usize = f32s.iter().map(F32Matrix::bytes).sum();

    let read = |what: &str| {
        let r = measure_read(&team, 1 << 30, 9).expect("memory");
        println!(
            "memory read, 1 GiB ({what}): {:.1} GB/s median, {:.1} best",
            r.gigabytes_per_second(),
            r.best_gigabytes_per_second()
        );
        r.gigabytes_per_second()
    };
    let bandwidth = read("before");
    let (peak_f32, peak_int8) = (measure_f32(&team), measure_int8(&team));
    println!("peak from registers: {peak_f32:.0} GFLOP/s f32, {peak_int8:.0} Gop/s int8");
    let time = measure(1000, || team.run(|_, _| {}));
    println!(
        "an empty run of the team: {:.1?} median, {:.1?} best",
        time.0, time.1
    );

    let x: Vec<f32> = (0..512 * n)
        .map(|i| (i % 255) as f32 / 128.0 - 1.0)
        .collect();
    let mut y = vec![0.0; 512 * n];
    let mut rows = Q8Rows::with_capacity(512, n);
    println!(
        "\nkernel                                         median time      rate        of limit"
    );
    for m in [1, 2, 4, 6] {
        rows.quantise(&team, &x[..m * k], k);
        let time = measure(5, || {
            int8.iter()
                .for_each(|w| matmul_q8(&team, &rows, w, &mut y[..m * n]))
        });
        line(
            &format!("int8 m={m}, 88 x {n}x{k} (memory)"),
            time,
            int8_bytes as f64,
            "GB/s",
            bandwidth,
        );
    }
    for m in [1, 6] {
        let time = measure(5, || {
            f32s.iter()
                .for_each(|w| gemm_f32(&team, &x[..m * k], w, &mut y[..m * n]))
        });
        line(
            &format!("f32 m={m}, 22 x {n}x{k} (memory)"),
            time,
            f32_bytes as f64,
            "GB/s",
            bandwidth,
        );
    }
    for m in [16, 64, 512] {
        rows.quantise(&team, &x[..m * k], k);
        let time = measure(7, || matmul_q8(&team, &rows, &int8[0], &mut y[..m * n]));
        line(
            &format!("int8 m={m}, {n}x{k}"),
            time,
            (2 * m * n * k) as f64,
            "Gop/s",
            peak_int8,
        );
    }
    for m in [16, 64, 512] {
        let time = measure(7, || {
            gemm_f32(&team, &x[..m * k], &f32s[0], &mut y[..m * n])
        });
        line(
            &format!("f32 m={m}, {n}x{k}"),
            time,
            (2 * m * n * k) as f64,
            "GFLOP/s",
            peak_f32,
        );
    }
    let time = measure(21, || rows.quantise(&team, &x[..512 * k], k));
    line(
        "quantise 512x2048",
        time,
        (512 * k * 4) as f64,
        "GB/s",
        bandwidth,
    );
    let time = measure(101, || rows.quantise(&team, &x[..k], k));
    line("quantise 1x2048", time, (k * 4) as f64, "GB/s", bandwidth);

    for (kv_type, size) in [(KvType::F32, 4), (KvType::F16, 2)] {
        let (heads, kv_heads, dim, layers) = (32, 4, 64, 22);
        let shape = KvShape {
            layers,
            kv_heads,
            head_dim: dim,
            kv_type,
        };
        let pages: Vec<u32> = (0..16).collect();
        let mut pool = KvPool::new(shape, 16).expect("memory");
        for layer in 0..layers {
            let span = [Span {
                rows: 0..1024,
                position: 0,
                pages: &pages,
            }];
            pool.write(&team, layer, &span, &x[..1024 * 256], &x[..1024 * 256]);
        }
        let attend = |layer: usize, rows: usize, y: &mut [f32]| {
            let span = [Span {
                rows: 0..rows,
                position: 1024 - rows,
                pages: &pages,
            }];
            Attention {
                layer,
                heads,
                scale: 0.125,
                window: None,
            }
            .run(&team, &pool, &span, &x[..rows * 2048], y);
        };
        let time = measure(11, || {
            (0..layers).for_each(|l| attend(l, 1, &mut y[..2048]))
        });
        let bytes = layers * kv_heads * 1024 / PAGE * PAGE * dim * 2 * size;
        line(
            &format!("attention {kv_type:?}, 1 token at 1024, 22 layers"),
            time,
            bytes as f64,
            "GB/s",
            bandwidth,
        );
        let time = measure(5, || attend(0, 512, &mut y[..512 * 2048]));
        let flops = 4.0 * 768.0 * 512.0 * (heads * dim) as f64;
        line(
            &format!("attention {kv_type:?}, 512 tokens after 512"),
            time,
            flops,
            "GFLOP/s",
            peak_f32,
        );
    }
    let single = isa;
    let time = measure(101, || {
        rmsnorm(single, &x[..2048], &x[..2048], 1e-5, &mut y[..2048])
    });
    line(
        "rmsnorm 2048 (1 thread)",
        time,
        2048.0 * 12.0,
        "GB/s",
        bandwidth,
    );
    let time = measure(101, || {
        y[..n].copy_from_slice(&x[..n]);
        silu_mul(single, &mut y[..n], &x[n..2 * n]);
    });
    line(
        "copy, silu * up 5632 (1 thread)",
        time,
        (n * 20) as f64,
        "GB/s",
        bandwidth,
    );
    let time = measure(101, || softmax(single, &mut y[..32000]));
    line(
        "softmax 32000 (1 thread)",
        time,
        32000.0 * 8.0,
        "GB/s",
        bandwidth,
    );
    read("after");
}
