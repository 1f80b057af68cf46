//! The GPU's arithmetic, on whatever Vulkan there is; in continuous integration that is Mesa's in software.

#![cfg(feature = "wgpu")]

mod support;

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use casemate_field::Field;
use casemate_wire::{Client, Shape, Timed};
use casemate_worker::backend::wgpu::Wgpu;
use casemate_worker::backend::{BackendError, Device};
use casemate_worker::connection::{Limits, serve};
use support::{Random, check_products, product};

const PATIENCE: Duration = Duration::from_secs(120);

/// A GPU, or nothing where no driver is installed; then the error must be the plain one.
fn gpu() -> Option<Arc<Wgpu>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    match runtime.block_on(Wgpu::new()) {
        Ok(gpu) => Some(Arc::new(gpu)),
        Err(BackendError::Device(why)) if why.contains("there is no Vulkan driver") => {
            println!("skipped: products on a GPU: {why}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Everything a client sees, over a connection: the same as of a processor.
#[test]
fn products_on_wgpu_are_those_of_plain_arithmetic() {
    let Some(gpu) = gpu() else { return };
    for field in Field::ALL {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let device = Arc::clone(&gpu);
        let serving = thread::spawn(move || {
            serve(Timed::unix(theirs), &*device, 1 << 30, &Limits::default())
        });
        let mut stream = Timed::unix(ours);
        stream.within(Some(PATIENCE));
        let mut client = Client::open(stream, field, 16 << 20).unwrap();
        assert!(client.welcome().name.starts_with("wgpu-"));
        let mut random = Random(3);
        for columns in [1, 3, 4, 5, 15, 16, 17, 64, 255, 257, 2048, 5632, 11_008] {
            let shape = Shape { rows: 19, columns };
            check_products(&mut client, &mut random, shape, &[1, 3, 4, 5, 9]);
        }
        drop(client);
        serving.join().unwrap().unwrap();
    }
}

/// More outputs than workgroups in one direction, and rows that end inside of a workgroup.
#[test]
fn shapes_beyond_one_direction_on_wgpu_are_whole() {
    let Some(gpu) = gpu() else { return };
    let mut backend = gpu.open(Field::P31).unwrap();
    let mut random = Random(4);
    for (number, rows) in [32_767, 32_768, 32_769, 70_001].into_iter().enumerate() {
        let shape = Shape { rows, columns: 3 };
        let weights: Vec<i8> = (0..shape.weights()).map(|_| random.weight()).collect();
        backend.load(shape, &weights).unwrap();
        let x = random.elements(Field::P31, 2 * 3);
        let mut y = vec![];
        backend.multiply(number as u32, &x, &mut y).unwrap();
        assert!(y == product(Field::P31, shape, &weights, &x), "{rows}");
    }
    assert!(matches!(
        backend.multiply(9, &[1; 3], &mut vec![]),
        Err(BackendError::NoMatrix(9))
    ));
}

/// Every column at its extreme, at the full width of each field.
#[test]
fn extremes_on_wgpu_do_not_overflow() {
    let Some(gpu) = gpu() else { return };
    for field in Field::ALL {
        let mut backend = gpu.open(field).unwrap();
        let columns = field.max_width() as u32;
        let shape = Shape { rows: 2, columns };
        let weights = [vec![127i8; columns as usize], vec![-127; columns as usize]].concat();
        backend.load(shape, &weights).unwrap();
        for x in [
            0,
            1,
            field.modulus() / 2,
            field.modulus() / 2 + 1,
            field.modulus() - 1,
        ] {
            let x = vec![x; columns as usize];
            let mut y = vec![];
            backend.multiply(0, &x, &mut y).unwrap();
            assert_eq!(y, product(field, shape, &weights, &x), "{}", x[0]);
        }
    }
}

/// Said in words, with the exit code of a missing device; the loader is told of no driver.
#[test]
fn without_a_driver_wgpu_is_refused_and_auto_takes_the_processor() {
    let worker = |backend: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_casemate-worker"));
        command.args(["--listen", "unix:/nonexistent/socket", "--memory", "1GiB"]);
        command.args(["--backend", backend]);
        command
            .env("VK_DRIVER_FILES", "/nonexistent")
            .env("VK_ICD_FILENAMES", "/nonexistent");
        let output = command.output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, stderr) = worker("wgpu");
    assert_eq!(code, Some(40), "{stderr}");
    assert!(
        stderr.contains("casemate-worker: there is no Vulkan driver here"),
        "{stderr}"
    );
    // Past the choice of a backend, it fails at the address.
    let (code, stderr) = worker("auto");
    assert_eq!(code, Some(40), "{stderr}");
    assert!(
        stderr.contains("cannot listen on unix:/nonexistent"),
        "{stderr}"
    );
}
