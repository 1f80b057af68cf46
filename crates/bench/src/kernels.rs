//! `casemate bench kernels`: what each kernel reaches of this machine's limits, measured in the same run.
//!
//! Shapes are TinyLlama-1.1B's. Products with few rows run over many different matrices, so that no cache holds them;
//! figures are medians. On a machine with other work the limits move too: read the shares.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use casemate_kernels::attention::{
    Attention, AttentionScratch, KvPool, KvShape, KvType, PAGE, Span, Spans,
};
use casemate_kernels::bandwidth::measure_read;
use casemate_kernels::cpu::Isa;
use casemate_kernels::elementwise::silu_mul;
use casemate_kernels::gemm::{F32Matrix, gemm_f32};
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::norm::rmsnorm;
use casemate_kernels::oblivious::{AT_ONCE, Found};
use casemate_kernels::panels::{
    Bf16Matrix, Bf16Rows, Int8Matrix, Int8Rows, matmul_bf16, matmul_int8,
};
use casemate_kernels::peak::{measure_bf16, measure_f32, measure_int8};
use casemate_kernels::q4::{Encoding, Q4Matrix, matmul_q4};
use casemate_kernels::q8::{Q8Matrix, Q8Rows, matmul_q8};
use casemate_kernels::rotate::Rotation;
use casemate_kernels::softmax::softmax;
use casemate_kernels::team::{MAX_THREADS, Team};
use casemate_report::table;
use serde::Serialize;

use crate::exit::Usage;
use crate::machine::{self, Machine};
use crate::print;
use crate::report::table::percent;

/// Measure each kernel's share of the machine's limits.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Instruction set, by name [default: the best of this machine].
    #[arg(long)]
    isa: Option<String>,
    /// Threads [default: as many as the machine runs at once].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// A sixteenth of the memory and one repetition: to see that it works.
    #[arg(long)]
    quick: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// One kernel's figures.
#[derive(Serialize)]
struct Line {
    kernel: String,
    median_us: f64,
    /// 10^9 of the unit a second, in the median and in the fastest repetition.
    rate: f64,
    best_rate: f64,
    unit: &'static str,
    /// Of the limit with the same unit.
    share: f64,
}

/// Repeats and records.
struct Bench {
    lines: Vec<Line>,
    quick: bool,
}

impl Bench {
    fn times(&self, times: usize) -> usize {
        if self.quick { 1 } else { times }
    }

    /// Runs once for nothing, then `times` times. `work` is what a run does, in 10^0 of the unit.
    fn measure(
        &mut self,
        kernel: &str,
        times: usize,
        work: f64,
        (unit, limit): (&'static str, f64),
        run: impl FnMut(),
    ) {
        let (median, best) = repeat(self.times(times), run);
        let rate = |time: Duration| work / time.as_secs_f64() / 1e9;
        self.lines.push(Line {
            kernel: kernel.into(),
            median_us: median.as_secs_f64() * 1e6,
            rate: rate(median),
            best_rate: rate(best),
            unit,
            share: rate(median) / limit,
        });
    }
}

/// Median and best time of a run.
fn repeat(times: usize, mut run: impl FnMut()) -> (Duration, Duration) {
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

fn fill(seed: usize) -> impl Fn(usize, &mut [f32]) + Sync {
    move |row, out| {
        for (i, x) in out.iter_mut().enumerate() {
            let z = (row * 7919 + i * 104_729 + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            *x = (z >> 40) as f32 / (1 << 23) as f32 - 1.0;
        }
    }
}

/// So many matrices of random nibbles, in one region.
fn four_bits(
    team: &Team,
    encoding: Encoding,
    (n, k): (usize, usize),
    count: usize,
) -> Result<Vec<Q4Matrix>> {
    let row = k / encoding.block_columns() * encoding.block_bytes();
    let mut bytes: Vec<u8> = (0..n * row)
        .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8)
        .collect();
    for block in bytes.chunks_mut(encoding.block_bytes()) {
        // Scale and, where there is one, minimum: about 2^-8.
        (block[1], block[3]) = (0x1C, 0x1C);
    }
    let one = Q4Matrix::packed_bytes(encoding, n, k).context("the matrix fits memory")?;
    let mut arena = Region::zeroed(one * count, Purpose::Public)?;
    let row = |i: usize| &bytes[i * row..][..row];
    (0..count)
        .map(|_| {
            Ok(Q4Matrix::from_blocks_in(
                &mut arena,
                team,
                encoding,
                (n, k),
                row,
            )?)
        })
        .collect()
}

/// Finding rows by reading all: a table as TinyLlama's embeddings in Q8_0, as it is sealed and as the output layer has it, for
/// one token and for as many as are looked for at once.
fn oblivious(
    bench: &mut Bench,
    team: &Team,
    rows: usize,
    bandwidth: (&'static str, f64),
) -> Result<()> {
    let columns = 2048;
    let row = columns / 32 * 34;
    let table: Vec<u8> = (0..rows * row).map(|i| (i % 251) as u8).collect();
    let packed = Q8Matrix::from_rows(team, rows, columns, fill(3))?;
    let (mut found, mut of_packed) = (Found::of_bytes(row)?, packed.found()?);
    let mut out = vec![0.0; AT_ONCE * columns];
    for count in [1, AT_ONCE] {
        let ids: Vec<u32> = (0..count).map(|i| (i * 997 % rows) as u32).collect();
        let name = format!("find {count} of {rows} rows of {row} bytes (memory)");
        bench.measure(&name, 5, table.len() as f64, bandwidth, || {
            found.rows_of_bytes(team, &table, row, &ids);
        });
        let name = format!("find {count} of {rows} rows of {columns} int8-g32 (memory)");
        bench.measure(&name, 5, packed.bytes() as f64, bandwidth, || {
            packed.find_rows(team, &mut of_packed, &ids, &mut out[..count * columns]);
        });
    }
    Ok(())
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let names = || {
        Isa::available()
            .map(Isa::name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let isa = match &args.isa {
        None => Isa::detect(),
        Some(name) => Isa::named(name)
            .ok_or_else(|| Usage(format!("--isa {name}: this machine has {}", names())))?,
    };
    let threads = args.threads.unwrap_or_else(machine::cores);
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(Usage(format!(
            "--threads {threads}: it must be from 1 to {MAX_THREADS}"
        ))
        .into());
    }
    let team = Team::with_isa(threads, isa)?;
    let share = if args.quick { 16 } else { 1 };
    let mut bench = Bench {
        lines: Vec::new(),
        quick: args.quick,
    };

    let (k, n) = (2048, 5632);
    let packing = Instant::now();
    let int8: Vec<Q8Matrix> = (0..88usize.div_ceil(share))
        .map(|s| Q8Matrix::from_rows(&team, n, k, fill(s)))
        .collect::<Result<_, _>>()
        .context("memory for int8 matrices")?;
    let packing = packing.elapsed();
    let int8_bytes: usize = int8.iter().map(Q8Matrix::bytes).sum();
    let rotation = Rotation::new(k);
    let one = Int8Matrix::packed_bytes(n, k).context("the matrix fits memory")?;
    let mut arena = Region::zeroed(one * int8.len(), Purpose::Public)?;
    let by_rows: Vec<Int8Matrix> = (0..int8.len())
        .map(|s| Int8Matrix::from_rows_in(&mut arena, &team, n, k, fill(s)))
        .collect::<Result<_, _>>()
        .context("memory for int8 matrices by rows")?;
    let by_rows_bytes: usize = by_rows.iter().map(Int8Matrix::bytes).sum();
    let one = Bf16Matrix::packed_bytes(n, k).context("the matrix fits memory")?;
    let mut arena = Region::zeroed(one * 44usize.div_ceil(share), Purpose::Public)?;
    let bf16s: Vec<Bf16Matrix> = (0..44usize.div_ceil(share))
        .map(|s| Bf16Matrix::from_rows_in(&mut arena, &team, n, k, fill(s)))
        .collect::<Result<_, _>>()
        .context("memory for bf16 matrices")?;
    let bf16_bytes: usize = bf16s.iter().map(Bf16Matrix::bytes).sum();
    let q4s = [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q4K]
        .map(|encoding| four_bits(&team, encoding, (n, k), 88usize.div_ceil(share)))
        .into_iter()
        .collect::<Result<Vec<_>>>()
        .context("4-bit matrices")?;
    let f32s: Vec<F32Matrix> = (0..22usize.div_ceil(share))
        .map(|s| F32Matrix::from_rows(&team, n, k, fill(s)))
        .collect::<Result<_, _>>()
        .context("memory for f32 matrices")?;
    let f32_bytes: usize = f32s.iter().map(F32Matrix::bytes).sum();

    let read = || measure_read(&team, (1 << 30) / share, 9);
    let before = read()?;
    let (peak_f32, peak_int8) = (measure_f32(&team), measure_int8(&team));
    let peak_bf16 = measure_bf16(&team);
    let empty = repeat(1000, || team.run(|_, _| {}));
    let bandwidth = ("GB/s", before.gigabytes_per_second());
    let (flops, ops) = (("GFLOP/s", peak_f32), ("Gop/s", peak_int8));
    let bf16_flops = ("GFLOP/s", peak_bf16);

    let x: Vec<f32> = (0..512 * n)
        .map(|i| (i % 255) as f32 / 128.0 - 1.0)
        .collect();
    let mut y = vec![0.0; 512 * n];
    let mut rows = Q8Rows::with_capacity(512, n);
    let mut whole_rows = Int8Rows::with_capacity(512, n);
    let mut rounded = Bf16Rows::with_capacity(512, n);
    for m in [1, 2, 4, 6] {
        rows.quantise(&team, &x[..m * k], k);
        let name = format!("int8-g32 m={m}, {} x {n}x{k} (memory)", int8.len());
        bench.measure(&name, 5, int8_bytes as f64, bandwidth, || {
            int8.iter()
                .for_each(|w| matmul_q8(&team, &rows, w, &mut y[..m * n]))
        });
    }
    for q4s in &q4s {
        let (encoding, bytes) = (
            q4s[0].encoding(),
            q4s.iter().map(Q4Matrix::bytes).sum::<usize>(),
        );
        for m in [1, 2, 4, 6, 24] {
            rows.quantise(&team, &x[..m * k], k);
            let name = format!(
                "q4-g32 {encoding:?} m={m}, {} x {n}x{k} (memory)",
                q4s.len()
            );
            bench.measure(&name, 5, bytes as f64, bandwidth, || {
                q4s.iter()
                    .for_each(|w| matmul_q4(&team, &rows, w, &mut y[..m * n]))
            });
        }
        for m in [16, 64, 512] {
            rows.quantise(&team, &x[..m * k], k);
            let name = format!("q4-g32 {encoding:?} m={m}, {n}x{k}");
            bench.measure(&name, 7, (2 * m * n * k) as f64, ops, || {
                matmul_q4(&team, &rows, &q4s[0], &mut y[..m * n])
            });
        }
    }
    for m in [1, 2, 4, 6, 24] {
        whole_rows.quantise(&team, &x[..m * k], k, Some(&rotation));
        let name = format!("int8-row m={m}, {} x {n}x{k} (memory)", by_rows.len());
        bench.measure(&name, 5, by_rows_bytes as f64, bandwidth, || {
            by_rows
                .iter()
                .for_each(|w| matmul_int8(&team, &whole_rows, w, &mut y[..m * n]))
        });
    }
    for m in [1, 2, 4, 6, 24] {
        rounded.round(&team, &x[..m * k], k);
        let name = format!("bf16 m={m}, {} x {n}x{k} (memory)", bf16s.len());
        bench.measure(&name, 5, bf16_bytes as f64, bandwidth, || {
            bf16s
                .iter()
                .for_each(|w| matmul_bf16(&team, &rounded, w, &mut y[..m * n]))
        });
    }
    for m in [1, 6] {
        let name = format!("f32 m={m}, {} x {n}x{k} (memory)", f32s.len());
        bench.measure(&name, 5, f32_bytes as f64, bandwidth, || {
            f32s.iter()
                .for_each(|w| gemm_f32(&team, &x[..m * k], w, &mut y[..m * n]))
        });
    }
    for m in [16, 64, 512] {
        rows.quantise(&team, &x[..m * k], k);
        bench.measure(
            &format!("int8-g32 m={m}, {n}x{k}"),
            7,
            (2 * m * n * k) as f64,
            ops,
            || matmul_q8(&team, &rows, &int8[0], &mut y[..m * n]),
        );
    }
    // 480 KiB of weights stay in L2: what the arithmetic reaches by itself.
    let close = Int8Matrix::from_rows_in(&mut Region::default(), &team, 240, k, fill(0))
        .context("memory for a small matrix")?;
    whole_rows.quantise(&team, &x[..64 * k], k, Some(&rotation));
    bench.measure(
        &format!("int8-row m=64, 240x{k} (L2)"),
        101,
        (2 * 64 * 240 * k) as f64,
        ops,
        || matmul_int8(&team, &whole_rows, &close, &mut y[..64 * 240]),
    );
    for m in [16, 64, 512] {
        whole_rows.quantise(&team, &x[..m * k], k, Some(&rotation));
        bench.measure(
            &format!("int8-row m={m}, {n}x{k}"),
            7,
            (2 * m * n * k) as f64,
            ops,
            || matmul_int8(&team, &whole_rows, &by_rows[0], &mut y[..m * n]),
        );
    }
    for m in [16, 64, 512] {
        rounded.round(&team, &x[..m * k], k);
        bench.measure(
            &format!("bf16 m={m}, {n}x{k}"),
            7,
            (2 * m * n * k) as f64,
            bf16_flops,
            || matmul_bf16(&team, &rounded, &bf16s[0], &mut y[..m * n]),
        );
    }
    for m in [16, 64, 512] {
        bench.measure(
            &format!("f32 m={m}, {n}x{k}"),
            7,
            (2 * m * n * k) as f64,
            flops,
            || gemm_f32(&team, &x[..m * k], &f32s[0], &mut y[..m * n]),
        );
    }
    bench.measure(
        "quantise 512x2048",
        21,
        (512 * k * 4) as f64,
        bandwidth,
        || rows.quantise(&team, &x[..512 * k], k),
    );
    bench.measure("quantise 1x2048", 101, (k * 4) as f64, bandwidth, || {
        rows.quantise(&team, &x[..k], k)
    });
    for rows in [1, 512] {
        let name = format!("rotate and quantise {rows}x2048");
        bench.measure(&name, 21, (rows * k * 4) as f64, bandwidth, || {
            whole_rows.quantise(&team, &x[..rows * k], k, Some(&rotation))
        });
    }
    for rows in [1, 512] {
        let name = format!("round to bf16 {rows}x2048");
        bench.measure(&name, 21, (rows * k * 4) as f64, bandwidth, || {
            rounded.round(&team, &x[..rows * k], k)
        });
    }
    oblivious(&mut bench, &team, 32000usize.div_ceil(share), bandwidth)?;
    for kv_type in KvType::ALL {
        attention(&mut bench, &team, kv_type, &x, &mut y, (bandwidth, flops))?;
    }
    bench.measure(
        "rmsnorm 2048 (1 thread)",
        101,
        2048.0 * 12.0,
        bandwidth,
        || rmsnorm(isa, &x[..2048], &x[..2048], 1e-5, &mut y[..2048]),
    );
    bench.measure(
        "copy, silu * up 5632 (1 thread)",
        101,
        (n * 20) as f64,
        bandwidth,
        || {
            y[..n].copy_from_slice(&x[..n]);
            silu_mul(isa, &mut y[..n], &x[n..2 * n]);
        },
    );
    bench.measure(
        "softmax 32000 (1 thread)",
        101,
        32000.0 * 8.0,
        bandwidth,
        || softmax(isa, &mut y[..32000]),
    );
    let after = read()?;

    if args.json {
        let report = serde_json::json!({
            "machine": Machine::describe(), "isa": isa.name(), "threads": threads, "quick": args.quick,
            "commit": env!("CASEMATE_COMMIT"),
            "read_gb_s": [before.gigabytes_per_second(), after.gigabytes_per_second()],
            "peak_f32_gflop_s": peak_f32, "peak_bf16_gflop_s": peak_bf16,
            "peak_int8_gop_s": peak_int8,
            "empty_run_us": empty.0.as_secs_f64() * 1e6, "kernels": bench.lines,
        });
        return print(&serde_json::to_string_pretty(&report)?);
    }
    let mut text = format!(
        "{}, {} cores; {isa}, {threads} threads; commit {}\n\
         packing {:.2} GiB of int8 from f32 rows: {packing:.1?}; {:?}\n\
         memory read: {:.1} GB/s before, {:.1} after ({:.1} best)\n\
         from registers: {peak_f32:.0} GFLOP/s f32, {peak_bf16:.0} bf16, {peak_int8:.0} Gop/s int8\n\
         an empty run of the team: {:.1?} median, {:.1?} best\n",
        Machine::describe().processor,
        machine::cores(),
        env!("CASEMATE_COMMIT"),
        int8_bytes as f64 / f64::from(1 << 30),
        int8[0].memory(),
        before.gigabytes_per_second(),
        after.gigabytes_per_second(),
        before
            .best_gigabytes_per_second()
            .max(after.best_gigabytes_per_second()),
        empty.0,
        empty.1,
    );
    let cells = bench.lines.iter().map(|line| {
        vec![
            line.kernel.clone(),
            format!("{:.1}", line.median_us),
            format!("{:.1} {:<7}", line.rate, line.unit),
            percent(line.share),
            format!("{:.1}", line.best_rate),
        ]
    });
    let header = ["kernel", "median us", "rate", "of limit", "best rate"];
    table::text(&mut text, &table::section("kernels", &header, cells));
    print(&text)
}

/// Attention of TinyLlama's shape: one token at 1024 over all layers, and 512 tokens after 512.
fn attention(
    bench: &mut Bench,
    team: &Team,
    kv_type: KvType,
    x: &[f32],
    y: &mut [f32],
    (bandwidth, flops): ((&'static str, f64), (&'static str, f64)),
) -> Result<()> {
    let (heads, kv_heads, dim, layers) = (32, 4, 64, 22);
    let shape = KvShape {
        layers,
        kv_heads,
        head_dim: dim,
        kv_type,
    };
    let pages: Vec<u32> = (0..16).collect();
    let last = |rows: usize| -> Spans {
        let span = Span {
            rows: 0..rows,
            position: 1024 - rows,
            pages: &pages,
        };
        std::iter::once(span).collect()
    };
    let mut pool = KvPool::new(shape, 16)?;
    let mut scratch = AttentionScratch::new(1, heads, dim, 1024)?;
    for layer in 0..layers {
        pool.write(team, layer, &last(1024), &x[..1024 * 256], &x[..1024 * 256]);
    }
    let mut attend = |layer: usize, spans: &Spans, y: &mut [f32]| {
        Attention {
            layer,
            heads,
            scale: 0.125,
            window: None,
        }
        .run(team, &pool, &mut scratch, spans, &x[..y.len()], y);
    };
    let bytes = shape.page_bytes().unwrap_or(0) * 1024 / PAGE;
    let (one, many) = (last(1), last(512));
    let name = format!("attention {kv_type:?}, 1 token at 1024, 22 layers");
    bench.measure(&name, 11, bytes as f64, bandwidth, || {
        (0..layers).for_each(|l| attend(l, &one, &mut y[..2048]))
    });
    let work = 4.0 * 768.0 * 512.0 * (heads * dim) as f64;
    let name = format!("attention {kv_type:?}, 512 tokens after 512");
    bench.measure(&name, 5, work, flops, || {
        attend(0, &many, &mut y[..512 * 2048])
    });
    Ok(())
}
