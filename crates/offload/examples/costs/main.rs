//! What masks, checks and restoring cost at the shapes of Llama 2 7B, beside the same products in the
//! enclave, in one run: `cargo run --release -p casemate-offload --example costs [ROUNDS]`.
//!
//! One block and the head are in memory (235 MB of weights, so no cache holds them); the block's times
//! count 32 times. Medians over the rounds. Last, whole exchanges with a worker in this process.

mod protocol;

use std::time::Duration;

use casemate_kernels::mem::Region;
use casemate_kernels::panels::Int8Matrix;
use casemate_kernels::team::Team;
use casemate_offload::BootKey;
use casemate_offload::costs::{Bench, Online};

const SHAPES: [(&str, usize, usize, u32); 5] = [
    ("Q, K, V", 12_288, 4096, 32),
    ("attention output", 4096, 4096, 32),
    ("gate, up", 22_016, 4096, 32),
    ("down", 4096, 11_008, 32),
    ("head", 32_000, 4096, 1),
];

/// Masks made with one pass over a matrix, and rows of a prompt to compare with.
const BATCH: usize = 64;

/// What was measured of a matrix, round by round.
#[derive(Default)]
struct Times {
    inside: Vec<Duration>,
    hide: Vec<Duration>,
    check: Vec<Duration>,
    restore: Vec<Duration>,
    prefill: Vec<Duration>,
    masks: Vec<Duration>,
}

fn main() {
    let rounds = std::env::args()
        .nth(1)
        .map_or(9, |rounds| rounds.parse().expect("a number"));
    let one = Team::new(1).expect("no thread is started");
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let all = Team::new(cores).expect("threads");
    let boot = BootKey::new([7; 32].into());
    let mut benches: Vec<Bench> = SHAPES
        .iter()
        .map(|(_, rows, columns, _)| Bench::new(matrix(&all, *rows, *columns), &boot))
        .collect();
    for (name, team) in [("one core", &one), ("all cores", &all)] {
        measure(name, team, &mut benches, rounds);
        if cores == 1 {
            break;
        }
    }
    protocol::measure(benches.iter().map(Bench::weights), cores, rounds);
}

/// A matrix of weights of all magnitudes.
fn matrix(team: &Team, rows: usize, columns: usize) -> Int8Matrix {
    let fill = |row: usize, out: &mut [f32]| {
        let mut state = row as u32;
        for x in out {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
        }
    };
    Int8Matrix::from_rows_in(&mut Region::default(), team, rows, columns, fill).expect("memory")
}

fn measure(name: &str, team: &Team, benches: &mut [Bench], rounds: usize) {
    let mut times: Vec<Times> = benches.iter().map(|_| Times::default()).collect();
    for _ in 0..rounds {
        // All matrices in turn, so that none is close when it comes again.
        for (bench, times) in benches.iter_mut().zip(&mut times) {
            times.inside.push(bench.inside(team, 1));
        }
        for (bench, times) in benches.iter_mut().zip(&mut times) {
            let Online {
                hide,
                check,
                restore,
            } = bench.online(team, 1);
            times.hide.push(hide);
            times.check.push(check);
            times.restore.push(restore);
        }
        for (bench, times) in benches.iter_mut().zip(&mut times) {
            times.prefill.push(bench.inside(team, BATCH));
            times.masks.push(bench.masks(team, BATCH));
        }
    }
    println!(
        "\n{name} ({}), median of {rounds}, ms a token of Llama 2 7B\n",
        team.isa().name()
    );
    println!(
        "| matrices | enclave alone, 1 row | hide | check | restore | online | enclave alone, {BATCH} rows, each | mask, of {BATCH}, each |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut totals = [0.0; 7];
    for ((name, _, _, count), times) in SHAPES.iter().zip(&mut times) {
        let ms = |times: &mut Vec<Duration>, each: usize| {
            times.sort_unstable();
            times[times.len() / 2].as_secs_f64() * 1e3 * f64::from(*count) / each as f64
        };
        let (hide, check) = (ms(&mut times.hide, 1), ms(&mut times.check, 1));
        let restore = ms(&mut times.restore, 1);
        let line = [
            ms(&mut times.inside, 1),
            hide,
            check,
            restore,
            hide + check + restore,
            ms(&mut times.prefill, BATCH),
            ms(&mut times.masks, BATCH),
        ];
        print(&format!("{name} x {count}"), &line);
        totals
            .iter_mut()
            .zip(line)
            .for_each(|(total, ms)| *total += ms);
    }
    print("all", &totals);
    println!(
        "\nonline: {:.1} % of the enclave's own decode",
        100.0 * totals[4] / totals[0]
    );
    println!(
        "a mask: {:.2} times a row of a prompt",
        totals[6] / totals[5]
    );
}

fn print(name: &str, line: &[f64; 7]) {
    let cells: Vec<String> = line.iter().map(|ms| format!("{ms:.2}")).collect();
    println!("| {name} | {} |", cells.join(" | "));
}
