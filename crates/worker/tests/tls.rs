//! The real program through TLS, as an enclave speaks to it that pinned its key.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use casemate_field::Field;
use casemate_offload::tls::{self, Pin};
use casemate_offload::{Fault, Transport};
use casemate_testkit::deployment::{Launch, Program};
use casemate_wire::{Address, Client, MIN_PAYLOAD, Shape, WireError};
use support::{Random, check_products};

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

const BINARY: &str = env!("CARGO_BIN_EXE_casemate-worker");

struct Worker {
    program: Program,
    address: Address,
    key: Pin,
}

/// A worker with a key in a directory.
fn worker(directory: &Path, listen: &str) -> Worker {
    let program = Launch::new("casemate-worker", BINARY.into())
        .option("--listen", listen)
        .option("--identity", directory.join("key.pem"))
        .option("--threads", "2")
        .option("--backend", "cpu")
        .option("--memory", "1GiB")
        .serve(directory, PATIENCE)
        .unwrap();
    let log = fs::read_to_string(program.log()).unwrap();
    let key = log.lines().rev().find_map(|line| line.strip_prefix("key "));
    Worker {
        address: program.address().parse().unwrap(),
        key: key.unwrap().parse().unwrap(),
        program,
    }
}

impl Worker {
    fn connect(&self, key: Pin) -> std::io::Result<Box<dyn Transport>> {
        let mut stream = tls::connect(self.address.connect(PATIENCE)?, key, PATIENCE)?;
        stream.within(PATIENCE);
        Ok(stream)
    }

    /// A client, as soon as there is a place: one who leaves has it for a moment longer.
    fn client(&self, field: Field) -> Client<Box<dyn Transport>> {
        loop {
            if let Ok(stream) = self.connect(self.key) {
                return Client::open(stream, field, 16 << 20).unwrap();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.program.log()).unwrap()
    }
}

#[test]
fn products_through_tls_are_those_of_plain_arithmetic() {
    let directory = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}", directory.path().join("socket").display());
    for listen in ["tcp:127.0.0.1:0", &unix] {
        let worker = worker(directory.path(), listen);
        for field in Field::ALL {
            let mut client = worker.client(field);
            let mut random = Random(1);
            for (rows, columns) in [(1, 1), (33, 64), (100, 5632)] {
                let shape = Shape { rows, columns };
                check_products(&mut client, &mut random, shape, &[1, 3, 40]);
            }
        }
    }
}

/// Requests and answers that do not fit the buffers of a socket: who waited for the other would wait for ever.
#[test]
fn requests_are_pipelined_through_tls() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker(directory.path(), "tcp:127.0.0.1:0");
    let mut client = worker.client(Field::P29);
    let shape = Shape {
        rows: 4096,
        columns: 4096,
    };
    let fill = |row: u32, out: &mut [i8]| out.fill((row % 100) as i8);
    let matrix = client.load(shape, fill, |_| ()).unwrap();
    let window = client.welcome().window;
    assert!(window > 1);
    let rows = 64;
    for round in 0..2 {
        for i in 0..window {
            let x = u32::from(i) + round + 1;
            client.multiply(matrix, &vec![x; 4096 * rows]).unwrap();
        }
        for i in 0..window {
            let mut product = vec![0; 4096 * rows];
            client.product(&mut product).unwrap();
            let x = u32::from(i) + round + 1;
            let right = |(j, y): (usize, &u32)| *y == (j % 4096 % 100) as u32 * 4096 * x;
            assert!(product.iter().enumerate().all(right));
        }
    }
}

#[test]
fn a_key_is_made_at_the_first_start_and_stays() {
    let directory = tempfile::tempdir().unwrap();
    let first = worker(directory.path(), "tcp:127.0.0.1:0").key;
    let mode = fs::metadata(directory.path().join("key.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = worker(directory.path(), "tcp:127.0.0.1:0");
    assert_eq!(again.key, first);
    let elsewhere = tempfile::tempdir().unwrap();
    let other = worker(elsewhere.path(), "tcp:127.0.0.1:0");
    assert_ne!(other.key, first);
    // Each is reached by its own.
    assert!(again.connect(first).is_ok());
    let refused = other.connect(first).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::InvalidData);
}

#[test]
fn who_speaks_no_tls_or_leaves_early_disturbs_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker(directory.path(), "tcp:127.0.0.1:0");
    let Address::Tcp(address) = worker.address.clone() else {
        panic!("TCP");
    };
    // In clear: nothing that WELCOME says comes back.
    let mut plain = worker.address.connect(PATIENCE).unwrap();
    plain.within(Some(PATIENCE));
    let refused = Client::open(plain, Field::P29, MIN_PAYLOAD).err().unwrap();
    assert!(!matches!(refused, WireError::Refused(_)), "{refused:?}");
    assert!(!matches!(
        Fault::from(refused),
        Fault::Refused | Fault::Late
    ));
    for bytes in [&b""[..], b"\x16\x03\x01", &[0; 400]] {
        TcpStream::connect(address)
            .unwrap()
            .write_all(bytes)
            .unwrap();
    }
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // An alert, or nothing; then the end.
    let _ = stream.read_to_end(&mut Vec::new());
    let mut client = worker.client(Field::P29);
    let shape = Shape {
        rows: 5,
        columns: 7,
    };
    check_products(&mut client, &mut Random(3), shape, &[2]);
    let log = worker.log();
    assert!(log.contains("no TLS handshake"), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

/// Who is refused inside of TLS hears why.
#[test]
fn a_refusal_comes_through() {
    let directory = tempfile::tempdir().unwrap();
    let worker = worker(directory.path(), "tcp:127.0.0.1:0");
    let mut client = worker.client(Field::P29);
    let shape = Shape {
        rows: 60_000,
        columns: 16_000,
    };
    let refused = client.load(shape, |_, _| (), |_| ());
    let Err(WireError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(why, casemate_wire::Refusal::Memory);
}

#[test]
fn what_is_no_key_ends_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("key.pem");
    fs::write(&key, "not one").unwrap();
    let output = Command::new(BINARY)
        .args([
            "--listen",
            "tcp:127.0.0.1:0",
            "--memory",
            "1GiB",
            "--identity",
        ])
        .arg(&key)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(40));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is no private key in PEM"), "{said}");
    assert_eq!(fs::read_to_string(&key).unwrap(), "not one");
}
