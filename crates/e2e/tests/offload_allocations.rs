//! A product by a worker takes nothing from the heap, once there was one like it. A program of its own with a single
//! test, because the heap is counted for the whole process; the worker is another one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_container::Access;
use casemate_kernels::heap::CountingHeap;
use casemate_kernels::mem::Region;
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;
use casemate_offload::{BootKey, Config, Offload, PublicMatrix, Transport, Workers};
use casemate_testkit::deployment::{Deployment, Launch};
use casemate_wire::Address;

#[global_allocator]
static HEAP: CountingHeap = CountingHeap::new();

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

const OUTPUTS: usize = 96;
const COLUMNS: usize = 200;

#[test]
fn a_product_by_a_worker_allocates_nothing() {
    let programs = Deployment::programs_of_this_build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("worker.sock");
    let program = Launch::new("casemate-worker", programs.join("casemate-worker"))
        .option("--listen", format!("unix:{}", socket.display()))
        .option("--backend", "cpu")
        .option("--threads", "1")
        .option("--memory", "512MiB")
        .serve(directory.path(), PATIENCE)
        .expect(
            "casemate-worker is built; run `cargo build --workspace --bins` or `cargo xtask test`",
        );
    let address: Address = program.address().parse().unwrap();
    let connect = move || Ok(Box::new(address.connect(PATIENCE)?) as Box<dyn Transport>);
    let config = Config {
        pool_bytes: 8 << 20,
        reserve: 0,
        patience: PATIENCE,
        waiting: PATIENCE * 100,
        ..Config::default()
    };
    let boot = BootKey::new([7; 32].into());
    let offload = Offload::new(
        config,
        boot,
        Workers::One(Box::new(connect)),
        Box::new(|_| {}),
    );
    let team = Team::new(2).unwrap();
    let matrix = |seed: usize| {
        let fill = |row: usize, out: &mut [f32]| {
            for (i, x) in out.iter_mut().enumerate() {
                *x = ((row * 31 + i * 17 + seed) % 255) as f32 - 127.0;
            }
        };
        let matrix =
            Int8Matrix::from_rows_in(&mut Region::default(), &team, OUTPUTS, COLUMNS, fill);
        Arc::new(matrix.unwrap())
    };
    let matrices = [matrix(1), matrix(2)];
    let groups = matrices.each_ref().map(|matrix| {
        let public = PublicMatrix::new(Access::Public, Arc::clone(matrix) as _).unwrap();
        offload.add(public).unwrap()
    });
    offload.start().unwrap();
    assert!(offload.wait(PATIENCE));
    let end = Instant::now() + PATIENCE;
    while offload.metrics().masks_level < 2000 {
        assert!(offload.step(&team) && Instant::now() < end, "no masks");
    }
    // A token's row, and a prompt's in several messages.
    let inputs = [1, 3, 70].map(|count| {
        let x: Vec<i8> = (0..count * COLUMNS)
            .map(|i| (i * 7 % 255) as u8 as i8)
            .map(|x| x.max(-127))
            .collect();
        let mut rows = Int8Rows::with_capacity(count, COLUMNS);
        rows.assign(&team, &x, COLUMNS);
        let expected = matrices.each_ref().map(|matrix| {
            let mut sums = vec![0; count * OUTPUTS];
            matmul_int8_sums(&team, &rows, matrix, &mut sums);
            sums
        });
        (rows, expected)
    });
    let mut sums = vec![0; 70 * OUTPUTS];
    let mut products = |rounds: usize| {
        for _ in 0..rounds {
            for (rows, expected) in &inputs {
                for (group, expected) in groups.iter().zip(expected) {
                    let sums = &mut sums[..expected.len()];
                    sums.fill(i32::MIN);
                    assert!(offload.outside(&team, group, rows, sums));
                    assert!(sums == expected);
                }
            }
        }
    };
    products(5);
    let before = HEAP.calls();
    products(10);
    let calls = HEAP.calls() - before;
    assert_eq!(calls, 0, "calls of the heap in 60 products");
}
