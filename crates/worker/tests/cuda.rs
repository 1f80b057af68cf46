//! Products through CUDA. Most tests run the real program and its PTX with a driver that emulates a GPU
//! (`crates/cuda/emulator`); those that are ignored do the same on a real one, and `cargo xtask test --only cuda` runs
//! them where there is one.

#![cfg(feature = "cuda")]

mod support;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use casemate_field::Field;
use casemate_testkit::deployment::{Launch, Program};
use casemate_wire::{Address, Client, Refusal, Shape, Timed, WireError};
use casemate_worker::backend::Device;
use casemate_worker::backend::cpu::Cpu;
use support::Random;

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(300);

const BINARY: &str = env!("CARGO_BIN_EXE_casemate-worker");

/// Variables of the environment.
type Settings<'a> = &'a [(&'a str, &'a str)];

/// With one multiprocessor every product of more than four rows is made of wide tiles, with a thousand of narrow ones;
/// each with both orders of threads and of copies.
const MODES: [Settings; 4] = [
    &[
        ("EMULATED_PROCESSORS", "1"),
        ("EMULATED_ORDER", "forward"),
        ("EMULATED_COPIES", "early"),
    ],
    &[
        ("EMULATED_PROCESSORS", "1"),
        ("EMULATED_ORDER", "backward"),
        ("EMULATED_COPIES", "late"),
    ],
    &[
        ("EMULATED_PROCESSORS", "1000"),
        ("EMULATED_ORDER", "backward"),
        ("EMULATED_COPIES", "early"),
    ],
    &[
        ("EMULATED_PROCESSORS", "1000"),
        ("EMULATED_ORDER", "forward"),
        ("EMULATED_COPIES", "late"),
    ],
];

/// The folder of the emulating driver, which is compiled once for this program.
fn emulator() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated-cuda");
        fs::create_dir_all(&folder).unwrap();
        let built = folder.join(format!("built-{}", std::process::id()));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../cuda/emulator/driver.cpp");
        let mut compiler = Command::new("c++");
        compiler
            .args(["-std=c++17", "-O2", "-shared", "-fPIC"])
            .args(["-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&built)
            .arg(source);
        let status = compiler.status();
        let compiled = status.expect("a C++ compiler is needed: Debian's g++, or another `c++`");
        assert!(compiled.success(), "{source} does not compile");
        fs::rename(built, folder.join("libcuda.so")).unwrap();
        folder
    })
}

/// A running worker.
struct Worker {
    /// Ends it when dropped.
    _program: Program,
    address: Address,
    directory: tempfile::TempDir,
}

/// A worker with variables of the environment and more options.
fn worker(environment: Vec<(OsString, OsString)>, options: &[&str]) -> Worker {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", directory.path().join("socket").display());
    let mut launch = Launch::new("casemate-worker", BINARY.into()).option("--listen", socket);
    launch.environment = environment;
    if !options.contains(&"--backend") {
        launch = launch.option("--backend", "cuda");
    }
    if !options.contains(&"--memory") {
        launch = launch.option("--memory", "1GiB");
    }
    for option in options {
        launch = launch.arg(*option);
    }
    let program = launch.serve(directory.path(), PATIENCE).unwrap();
    let address = program.address().parse().unwrap();
    Worker {
        _program: program,
        address,
        directory,
    }
}

fn emulated_environment(settings: Settings) -> Vec<(OsString, OsString)> {
    let library = ("LD_LIBRARY_PATH".into(), emulator().into());
    let settings = settings.iter().map(|(name, to)| (name.into(), to.into()));
    settings.chain([library]).collect()
}

fn emulated(settings: Settings, options: &[&str]) -> Worker {
    worker(emulated_environment(settings), options)
}

/// On a real GPU, or not at all.
fn real() -> Worker {
    worker(std::env::vars_os().collect(), &[])
}

impl Worker {
    fn client(&self, field: Field) -> Client<Timed> {
        let mut stream = self.address.connect(PATIENCE).unwrap();
        stream.within(Some(PATIENCE));
        Client::open(stream, field, 16 << 20).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("casemate-worker.log")).unwrap()
    }
}

/// Loads a matrix and multiplies batches of elements with it; expects what the processor makes of them.
#[track_caller]
fn same_as_the_processor(
    client: &mut Client<Timed>,
    shape: Shape,
    weights: &[i8],
    batches: &[Vec<u32>],
) {
    let columns = shape.columns as usize;
    let row =
        |i: u32, out: &mut [i8]| out.copy_from_slice(&weights[i as usize * columns..][..columns]);
    let matrix = client.load(shape, row, |_| ()).unwrap();
    let mut cpu = Cpu::new(1).unwrap().open(client.field()).unwrap();
    cpu.load(shape, weights).unwrap();
    let mut expected = vec![];
    for elements in batches {
        client.multiply(matrix, elements).unwrap();
        cpu.multiply(0, elements, &mut expected).unwrap();
        let mut found = vec![u32::MAX; expected.len()];
        client.product(&mut found).unwrap();
        let rows = elements.len() / columns;
        assert!(
            found == expected,
            "{rows} rows with {shape:?} in {:?}",
            client.field()
        );
    }
}

fn random_weights(random: &mut Random, shape: Shape) -> Vec<i8> {
    (0..shape.weights()).map(|_| random.weight()).collect()
}

/// 1 to 33 rows in turn, with columns and outputs around every edge of a tile, a warp's step and a piece.
fn edges(worker: &Worker) {
    let mut clients = Field::ALL.map(|field| worker.client(field));
    assert!(clients[0].welcome().name.starts_with("cuda-"));
    let mut random = Random(5);
    let mut rows = (1..=33).cycle();
    let columns = [1, 15, 16, 17, 63, 64, 65, 127, 129, 511, 512, 513];
    let outputs = [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129];
    for (i, columns) in columns.into_iter().enumerate() {
        for (j, outputs) in outputs.into_iter().enumerate() {
            let client = &mut clients[(i + j) % 2];
            let shape = Shape {
                rows: outputs,
                columns,
            };
            let weights = random_weights(&mut random, shape);
            let batches: Vec<_> = rows
                .by_ref()
                .take(2)
                .map(|rows| random.elements(client.field(), rows * columns as usize))
                .collect();
            same_as_the_processor(client, shape, &weights, &batches);
        }
    }
    // More rows than one tile, and all counts with one shape.
    let shape = Shape {
        rows: 33,
        columns: 65,
    };
    let weights = random_weights(&mut random, shape);
    for client in &mut clients {
        let field = client.field();
        let batches: Vec<_> = (1..=33)
            .chain([47, 48, 49, 64, 65, 96, 97])
            .map(|rows| random.elements(field, rows * 65))
            .collect();
        same_as_the_processor(client, shape, &weights, &batches);
    }
}

/// The largest sums that there are: digits of 127 and -127 as far as elements reach, weights likewise, at the full width
/// of each field.
fn extremes(worker: &Worker) {
    for field in Field::ALL {
        let columns = field.max_width();
        let shape = Shape {
            rows: 3,
            columns: columns as u32,
        };
        let mut weights = vec![127i8; columns];
        weights.resize(2 * columns, -127);
        weights.extend((0..columns).map(|i| if i % 2 == 0 { 127 } else { -127 }));
        let low = 127 * (1 + 255 + 255 * 255);
        let values = [
            field.modulus() / 2,
            field.modulus() / 2 + 1,
            field.from_integer(low),
            field.from_integer(-low),
            field.modulus() - 1,
            field.from_integer(low - 2 * 127 * 255),
        ];
        let batches = [1, 2, 4, 17].map(|rows: usize| {
            let rows = values.iter().cycle().take(rows);
            rows.flat_map(|value| vec![*value; columns]).collect()
        });
        same_as_the_processor(&mut worker.client(field), shape, &weights, &batches);
    }
}

/// As many products as the window holds, of matrices and with rows that change, again and again: two are computed at once,
/// and every buffer is used by the next but one.
fn pipelined(worker: &Worker) {
    let field = Field::P29;
    let mut client = worker.client(field);
    let mut cpu = Cpu::new(1).unwrap().open(field).unwrap();
    let mut random = Random(6);
    let shapes = [(40, 70), (7, 300), (130, 64)].map(|(rows, columns)| Shape { rows, columns });
    for shape in shapes {
        let weights = random_weights(&mut random, shape);
        let columns = shape.columns as usize;
        let row = |i: u32, out: &mut [i8]| {
            out.copy_from_slice(&weights[i as usize * columns..][..columns]);
        };
        client.load(shape, row, |_| ()).unwrap();
        cpu.load(shape, &weights).unwrap();
    }
    let window = usize::from(client.welcome().window);
    assert!(window > 2);
    for round in 0..10 {
        let mut expected = vec![];
        for i in 0..window {
            let matrix = (round + i) % shapes.len();
            let rows = 1 + (7 * round + 3 * i) % 20;
            let x = random.elements(field, rows * shapes[matrix].columns as usize);
            client.multiply(matrix as u32, &x).unwrap();
            let mut y = vec![];
            cpu.multiply(matrix as u32, &x, &mut y).unwrap();
            expected.push(y);
        }
        for expected in expected {
            let mut found = vec![u32::MAX; expected.len()];
            client.product(&mut found).unwrap();
            assert!(found == expected, "round {round}");
        }
    }
}

#[test]
fn emulated_products_are_those_of_the_processor() {
    thread::scope(|scope| {
        for mode in MODES {
            scope.spawn(move || {
                let directory = tempfile::tempdir().unwrap();
                let log = directory.path().join("kernels");
                let log = log.to_str().unwrap();
                let settings = [mode, &[("EMULATED_LOG", log)]].concat();
                edges(&emulated(&settings, &[]));
                let ran = fs::read_to_string(log).unwrap();
                let ran: BTreeSet<_> = ran.lines().collect();
                let tiles = if mode[0].1 == "1" { "wide" } else { "narrow" };
                let expected = ["few_1", "few_2", "few_4", "split", tiles];
                assert_eq!(ran, BTreeSet::from(expected), "{mode:?}");
            });
        }
    });
}

#[test]
fn emulated_extremes_do_not_overflow() {
    thread::scope(|scope| {
        for mode in [MODES[1], MODES[3]] {
            scope.spawn(move || extremes(&emulated(mode, &[])));
        }
    });
}

#[test]
fn emulated_products_that_overlap_are_right_and_in_order() {
    for mode in [MODES[0], MODES[3]] {
        pipelined(&emulated(mode, &[]));
    }
}

/// More rows of weights than a piece that is uploaded at once, with and without padding.
#[test]
fn emulated_weights_are_uploaded_in_pieces() {
    let worker = emulated(MODES[0], &[]);
    let mut client = worker.client(Field::P31);
    let mut random = Random(7);
    // A piece is 4 MiB: 62 rows of the widest there are, 64 of the next, 4,096 of the last.
    for (rows, columns) in [(200, 66_572), (64, 65_536), (8195, 1024)] {
        let shape = Shape { rows, columns };
        let weights = random_weights(&mut random, shape);
        let batches = [random.elements(Field::P31, columns as usize)];
        same_as_the_processor(&mut client, shape, &weights, &batches);
    }
}

/// What WELCOME says is no more than the device has, and what does not fit is refused before it is sent.
#[test]
fn emulated_memory_is_reported_and_kept_to() {
    let settings = [("EMULATED_MEMORY", "335544320")];
    let worker = emulated(&settings, &["--connections", "2", "--memory", "16GiB"]);
    // 320 MiB: a sixteenth is left alone, half of the rest for each, of which 64 are for what is on its way.
    let most = (300 / 2 - 64) << 20;
    let mut clients = Field::ALL.map(|field| worker.client(field));
    let log = worker.log();
    assert!(
        log.contains("cuda-EmulatedGPU has less memory than --memory allows"),
        "{log}"
    );
    for client in &mut clients {
        assert_eq!(client.welcome().memory, most);
        // A matrix counts as it is kept and, while it comes, once more.
        let shape = Shape {
            rows: 4096,
            columns: 10_240,
        };
        client.load(shape, |_, out| out.fill(1), |_| ()).unwrap();
        let mut found = vec![0; 4096];
        client.multiply(0, &[1; 10_240]).unwrap();
        client.product(&mut found).unwrap();
        assert_eq!(found, [10_240; 4096]);
        let refused = client.load(shape, |_, out| out.fill(1), |_| ());
        assert!(
            matches!(refused, Err(WireError::Refused(Refusal::Memory))),
            "{:?}",
            refused.err()
        );
    }
}

/// A product that fails ends its connection with a reason, and no other.
#[test]
fn an_emulated_launch_that_fails_ends_one_connection() {
    // Two launches a product: the second of the second product.
    let worker = emulated(&[("EMULATED_FAIL_LAUNCH", "4")], &[]);
    let shape = Shape {
        rows: 5,
        columns: 20,
    };
    let mut other = worker.client(Field::P31);
    let mut client = worker.client(Field::P29);
    let mut random = Random(8);
    let weights = random_weights(&mut random, shape);
    let x = random.elements(Field::P29, 20);
    same_as_the_processor(&mut client, shape, &weights, std::slice::from_ref(&x));
    client.multiply(0, &x).unwrap();
    let failed = client.product(&mut [0; 5]);
    assert!(
        matches!(failed, Err(WireError::Refused(Refusal::Failed))),
        "{:?}",
        failed.err()
    );
    let x = random.elements(Field::P31, 3 * 20);
    same_as_the_processor(&mut other, shape, &weights, &[x]);
    // The connection ends a moment after its client.
    let deadline = Instant::now() + PATIENCE;
    while !worker.log().contains("the GPU fails to multiply") {
        assert!(Instant::now() < deadline, "{}", worker.log());
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a worker says that cannot start, without a place to listen.
fn refused(environment: Vec<(OsString, OsString)>, options: &[&str]) -> String {
    let mut command = Command::new(BINARY);
    command.args(["--listen", "unix:/nonexistent/socket", "--log", "error"]);
    command.args(options);
    let output = command.env_clear().envs(environment).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(40), "{stderr}");
    stderr
}

/// Said in words, with the exit code of a missing device. Nothing that is found by the driver's name can be loaded.
#[test]
fn without_a_driver_cuda_is_refused_and_auto_takes_the_processor() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs::write(directory.path().join(name), "").unwrap();
    }
    let no_driver = || vec![("LD_LIBRARY_PATH".into(), directory.path().into())];
    assert_eq!(
        refused(no_driver(), &["--memory", "1GiB", "--backend", "cuda"]),
        "casemate-worker: there is no NVIDIA driver here, libcuda.so.1 is not found: install the driver of your GPU, or \
         let the container see it (nvidia-container-toolkit); without a GPU take --backend cpu\n"
    );
    // Past the choice of a backend, it fails at the address.
    let auto = refused(no_driver(), &["--memory", "1GiB", "--backend", "auto"]);
    assert!(
        auto.contains("cannot listen on unix:/nonexistent"),
        "{auto}"
    );
}

#[test]
fn what_a_driver_lacks_is_said() {
    let with = |setting, value| {
        let environment = emulated_environment(&[(setting, value)]);
        refused(environment, &["--memory", "1GiB", "--backend", "cuda"])
    };
    assert_eq!(
        with("EMULATED_INIT", "100"),
        "casemate-worker: the NVIDIA driver shows no GPU: compare with `nvidia-smi`, and see what CUDA_VISIBLE_DEVICES \
         hides\n"
    );
    assert_eq!(
        with("EMULATED_VERSION", "11080"),
        "casemate-worker: the NVIDIA driver offers CUDA 11.8, 12.0 is needed: install driver 525 or later\n"
    );
    assert_eq!(
        with("EMULATED_CAPABILITY", "75"),
        "casemate-worker: Emulated GPU has compute capability 7.5, 8.0 (Ampere, 2020) is needed: take --backend wgpu or cpu\n"
    );
    assert_eq!(
        with("EMULATED_MEMORY", "134217728"),
        "casemate-worker: cuda-EmulatedGPU has no memory left for 2 connections: see what else uses it, or take fewer \
         --connections\n"
    );
}

#[test]
fn auto_takes_cuda_where_there_is_a_gpu() {
    let worker = emulated(&[], &["--backend", "auto"]);
    let client = worker.client(Field::P29);
    assert_eq!(client.welcome().name, "cuda-EmulatedGPU");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_on_a_gpu_are_those_of_the_processor() {
    edges(&real());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn extremes_on_a_gpu_do_not_overflow() {
    extremes(&real());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_that_overlap_on_a_gpu_are_right_and_in_order() {
    pipelined(&real());
}
