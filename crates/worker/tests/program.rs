//! The real program, over both transports: products, hostile clients, several at once.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

use casemate_field::Field;
use casemate_testkit::deployment::{Launch, Program};
use casemate_wire::{Address, Client, MIN_PAYLOAD, Refusal, Shape, Timed, WireError};
use support::{Random, check_products};

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks.
const MOMENT: Duration = Duration::from_millis(20);

const BINARY: &str = env!("CARGO_BIN_EXE_casemate-worker");

struct Worker {
    program: Program,
    address: Address,
    directory: tempfile::TempDir,
}

/// A worker on a transport, with more options.
fn worker(transport: &str, options: &[&str]) -> Worker {
    let directory = tempfile::tempdir().unwrap();
    let listen = match transport {
        "unix" => format!("unix:{}", directory.path().join("socket").display()),
        _ => "tcp:127.0.0.1:0".to_owned(),
    };
    let mut launch = Launch::new("casemate-worker", BINARY.into())
        .option("--listen", listen)
        .option("--threads", "2")
        .option("--backend", "cpu");
    for option in options {
        launch = launch.arg(*option);
    }
    if !options.contains(&"--memory") {
        launch = launch.option("--memory", "1GiB");
    }
    let program = launch.serve(directory.path(), PATIENCE).unwrap();
    let address = program.address().parse().unwrap();
    Worker {
        program,
        address,
        directory,
    }
}

impl Worker {
    fn stream(&self) -> Timed {
        let mut stream = self.address.connect(PATIENCE).unwrap();
        stream.within(Some(PATIENCE));
        stream
    }

    /// A client, as soon as there is a place: one who leaves has it for a moment longer.
    fn client(&self, field: Field) -> Client<Timed> {
        loop {
            match Client::open(self.stream(), field, 16 << 20) {
                Err(WireError::Refused(Refusal::Busy)) => thread::sleep(MOMENT),
                opened => return opened.unwrap(),
            }
        }
    }

    /// What a client hears that says only this.
    fn hears(&self, bytes: &[u8]) -> Vec<u8> {
        loop {
            let mut stream = self.raw();
            stream.write_all(bytes).unwrap();
            let mut said = vec![];
            stream.read_to_end(&mut said).unwrap();
            if !said.ends_with(&Refusal::Busy.code().to_le_bytes()) {
                return said;
            }
            thread::sleep(MOMENT);
        }
    }

    /// A connection without the protocol.
    fn raw(&self) -> Box<dyn ReadWrite> {
        match &self.address {
            Address::Unix(path) => Box::new(UnixStream::connect(path).unwrap()),
            Address::Tcp(address) => Box::new(TcpStream::connect(address).unwrap()),
        }
    }

    /// It still serves, whatever was done to it.
    fn still_serves(&mut self) {
        self.program.check().unwrap();
        let mut client = self.client(Field::P29);
        check_products(
            &mut client,
            &mut Random(9),
            Shape {
                rows: 20,
                columns: 33,
            },
            &[2],
        );
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("casemate-worker.log")).unwrap()
    }
}

trait ReadWrite: Read + Write {}
impl<S: Read + Write> ReadWrite for S {}

/// Every width at which lanes, panels and pieces end, in both fields and over both transports.
#[test]
fn products_are_those_of_plain_arithmetic() {
    for transport in ["unix", "tcp"] {
        let worker = worker(transport, &[]);
        for field in Field::ALL {
            let mut client = worker.client(field);
            assert!(
                client.welcome().name.starts_with("cpu-"),
                "{:?}",
                client.welcome()
            );
            let mut random = Random(1);
            for columns in [1, 15, 16, 17, 64, 2048, 5632, 11_008] {
                for rows in [1, 33] {
                    let shape = Shape { rows, columns };
                    check_products(&mut client, &mut random, shape, &[1, 3, 6, 7, 40]);
                }
            }
        }
        // Only the larger field takes these.
        let mut client = worker.client(Field::P31);
        for columns in [16_644, 66_572] {
            check_products(
                &mut client,
                &mut Random(2),
                Shape { rows: 5, columns },
                &[2],
            );
        }
    }
}

/// The largest sums that there are: every digit, weight and column at its extreme.
#[test]
fn products_of_extremes_do_not_overflow() {
    let worker = worker("unix", &[]);
    for field in Field::ALL {
        let mut client = worker.client(field);
        let columns = field.max_width() as u32;
        let shape = Shape { rows: 2, columns };
        let fill = |row: u32, out: &mut [i8]| out.fill(if row == 0 { 127 } else { -127 });
        let matrix = client.load(shape, fill, |_| ()).unwrap();
        // The digits of these are 127 and -127 as far as elements reach.
        for x in [
            field.modulus() / 2,
            field.modulus() / 2 + 1,
            field.from_integer(127 * 256 * 255),
        ] {
            client.multiply(matrix, &vec![x; columns as usize]).unwrap();
            let mut product = [0; 2];
            client.product(&mut product).unwrap();
            let exact = i128::from(x) * 127 * i128::from(columns);
            let modulo = |x: i128| x.rem_euclid(i128::from(field.modulus())) as u32;
            assert_eq!(product, [modulo(exact), modulo(-exact)], "{x}");
        }
    }
}

#[test]
fn requests_are_pipelined_up_to_the_window() {
    let worker = worker("unix", &[]);
    let mut client = worker.client(Field::P29);
    // Requests and answers that do not fit the buffers of a socket: who waited for the other would wait for ever.
    let shape = Shape {
        rows: 4096,
        columns: 4096,
    };
    let fill = |row: u32, out: &mut [i8]| out.fill((row % 100) as i8);
    let matrix = client.load(shape, fill, |_| ()).unwrap();
    let rows = 64;
    let window = client.welcome().window;
    assert!(window > 1);
    for i in 0..window {
        client
            .multiply(matrix, &vec![u32::from(i) + 1; 4096 * rows])
            .unwrap();
    }
    for i in 0..window {
        let mut product = vec![0; 4096 * rows];
        let answer = client.product(&mut product).unwrap();
        assert_eq!(answer.request, u64::from(i) + 1);
        let expected = |j: usize| (j % 4096 % 100) as u32 * 4096 * (u32::from(i) + 1);
        assert!(product.iter().enumerate().all(|(j, y)| *y == expected(j)));
    }
}

/// Each has its own matrices and its own half of the memory.
#[test]
fn two_connections_are_served_at_once() {
    for transport in ["unix", "tcp"] {
        let worker = worker(transport, &[]);
        let mut one = worker.client(Field::P29);
        let mut other = worker.client(Field::P31);
        assert_eq!(one.welcome().memory, other.welcome().memory);
        assert!(one.welcome().memory < 512 << 20);
        let shape = Shape {
            rows: 3,
            columns: 4,
        };
        let ours = one.load(shape, |_, out| out.fill(1), |_| ()).unwrap();
        let theirs = other.load(shape, |_, out| out.fill(-2), |_| ()).unwrap();
        assert_eq!((ours, theirs), (0, 0));
        one.multiply(ours, &[5; 4]).unwrap();
        other.multiply(theirs, &[5; 4]).unwrap();
        let mut product = [0; 3];
        other.product(&mut product).unwrap();
        assert_eq!(product, [Field::P31.from_integer(-40); 3]);
        one.product(&mut product).unwrap();
        assert_eq!(product, [20; 3]);
    }
}

#[test]
fn a_client_too_many_is_told_so_and_a_place_that_is_left_is_free() {
    for transport in ["unix", "tcp"] {
        let worker = worker(transport, &["--connections", "1"]);
        let one = worker.client(Field::P29);
        let refused = Client::open(worker.stream(), Field::P29, MIN_PAYLOAD)
            .err()
            .unwrap();
        assert!(
            matches!(refused, WireError::Refused(Refusal::Busy)),
            "{refused:?}"
        );
        drop(one);
        let mut worker = worker;
        let address = worker.address.clone();
        let again = || {
            let mut stream = address.connect(PATIENCE).unwrap();
            stream.within(Some(PATIENCE));
            Client::open(stream, Field::P29, MIN_PAYLOAD).is_ok()
        };
        worker
            .program
            .wait_until("a free place", PATIENCE, again)
            .unwrap();
    }
}

/// The limit acts before anything is sent, let alone kept.
#[test]
fn a_matrix_beyond_the_limit_is_refused_before_its_weights() {
    let mut worker = worker("unix", &["--connections", "1", "--memory", "256MiB"]);
    let mut client = worker.client(Field::P29);
    let memory = client.welcome().memory;
    assert!((64 << 20..160 << 20).contains(&memory), "{memory}");
    let resident = || resident(worker.program.pid());
    let before = resident();
    // While it is loaded a matrix takes twice its weights: this does not fit, half of it does.
    let shape = |weights: u64| Shape {
        rows: (weights / 4096) as u32,
        columns: 4096,
    };
    let mut asked = 0;
    let refused = client.load(shape(memory / 2 + (1 << 20)), |_, _| asked += 1, |_| ());
    assert!(
        matches!(refused, Err(WireError::Refused(Refusal::Memory))),
        "{refused:?}"
    );
    assert_eq!(asked, 0, "no row was asked for");
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes more");
    let mut client = worker.client(Field::P29);
    let fill = |_: u32, out: &mut [i8]| out.fill(1);
    client
        .load(shape(memory / 2 - (1 << 20)), fill, |_| ())
        .unwrap();
    // What it holds counts against the next.
    let next = client.load(shape(memory / 3), fill, |_| ());
    assert!(
        matches!(next, Err(WireError::Refused(Refusal::Memory))),
        "{next:?}"
    );
    drop(client);
    worker.still_serves();
}

/// Bytes of memory that a process has.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

/// A header that announces much costs nothing until it comes.
#[test]
fn announced_bytes_take_no_memory() {
    let mut worker = worker("unix", &[]);
    let before = resident(worker.program.pid());
    let mut client = worker.client(Field::P29);
    let shape = Shape {
        rows: 16,
        columns: 1,
    };
    client.load(shape, |_, out| out.fill(1), |_| ()).unwrap();
    // MULTIPLY of 1000 rows of the matrix's one column would be small, so: LOAD of a large one.
    let stream = client.stream();
    let header = [3u8, 1, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let shape = [8192u32.to_le_bytes(), 16_000u32.to_le_bytes()].concat();
    stream.write_all(&[&header[..], &shape].concat()).unwrap();
    let mut ready = [0; 16];
    stream.read_exact(&mut ready).unwrap();
    assert_eq!(ready[0], 4);
    // The beginning of its first part.
    let part = [5u8, 1, 0, 0, 0, 0, 16, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1];
    stream.write_all(&part).unwrap();
    let grown = resident(worker.program.pid()).saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    drop(client);
    worker.still_serves();
}

/// Clients that break the protocol are told so, lose their connection, and hurt nobody else.
#[test]
fn hostile_clients_lose_their_connection_and_nothing_else() {
    for transport in ["unix", "tcp"] {
        let mut worker = worker(transport, &[]);
        // Somebody honest, all the while.
        let mut honest = worker.client(Field::P29);
        let shape = Shape {
            rows: 2,
            columns: 3,
        };
        let matrix = honest.load(shape, |_, out| out.fill(4), |_| ()).unwrap();
        let hello = [
            &[1u8, 1, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
            b"CMWK",
            &[1, 0, 0, 0, 0, 0, 16, 0],
        ]
        .concat();
        let after = |frame: &[u8]| [&hello[..], frame].concat();
        let load = |rows: u32, columns: u32| {
            let header = [3u8, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            after(&[&header[..], &rows.to_le_bytes(), &columns.to_le_bytes()].concat())
        };
        let version = [&hello[..20], &[9, 0][..], &hello[22..]].concat();
        let cases = [
            (
                "another protocol",
                b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
                Refusal::Malformed,
            ),
            ("another version", version, Refusal::Version),
            ("a frame of no type", after(&[200; 16]), Refusal::Malformed),
            ("no rows", load(0, 5), Refusal::TooLarge),
            ("too many rows", load(u32::MAX, 5), Refusal::TooLarge),
            ("too many columns", load(5, u32::MAX), Refusal::TooLarge),
            ("too large a matrix", load(262_000, 16_000), Refusal::Memory),
            (
                "no such matrix",
                after(&[
                    7, 1, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0,
                ]),
                Refusal::Malformed,
            ),
            (
                "too large a payload",
                after(&[7, 1, 0, 0, 255, 255, 255, 255, 1, 0, 0, 0, 0, 0, 0, 0]),
                Refusal::TooLarge,
            ),
        ];
        for (what, bytes, why) in cases {
            let said = worker.hears(&bytes);
            let error = &said[said.len() - 18..];
            assert_eq!(error[0], 9, "{what}");
            assert_eq!(error[16..], why.code().to_le_bytes(), "{what}");
            honest.multiply(matrix, &[1; 3]).unwrap();
            let mut product = [0; 2];
            honest.product(&mut product).unwrap();
            assert_eq!(product, [12; 2], "after {what}");
        }
        // Some just go, in the middle of whatever they said.
        for cut in [0, 1, 15, 16, 27, 28, 40] {
            let bytes = load(8, 8);
            worker.raw().write_all(&bytes[..cut]).unwrap();
        }
        drop(honest);
        let mut stream = worker.raw();
        let noise: Vec<u8> = (0..100_000u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8)
            .collect();
        // The worker may have had enough before all of it was sent.
        let _ = stream.write_all(&noise);
        drop(stream);
        worker.still_serves();
        let log = worker.log();
        assert!(log.contains("a frame of type 71"), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

#[test]
fn it_ends_when_it_is_told_to_and_leaves_no_socket() {
    let mut worker = worker("unix", &[]);
    let Address::Unix(path) = worker.address.clone() else {
        panic!("a Unix socket");
    };
    assert!(path.exists());
    worker.program.stop();
    assert!(!path.exists());
    assert!(worker.log().contains("ending"), "{}", worker.log());
}

/// After a crash the file is still there; a second worker is not to take a living one's place.
#[test]
fn a_socket_that_was_left_behind_is_replaced_and_a_living_one_is_not() {
    let mut first = worker("unix", &[]);
    let listen = first.address.to_string();
    let second = |listen: &str| {
        let mut command = Command::new(BINARY);
        command.args(["--listen", listen, "--memory", "1GiB"]);
        command.output().unwrap()
    };
    let taken = second(&listen);
    assert_eq!(taken.status.code(), Some(40), "{taken:?}");
    first.still_serves();
    first.program.kill();
    let directory = tempfile::tempdir().unwrap();
    let launch = Launch::new("casemate-worker", BINARY.into());
    let launch = launch
        .option("--listen", &listen)
        .option("--memory", "1GiB");
    assert_eq!(
        launch.serve(directory.path(), PATIENCE).unwrap().address(),
        listen
    );
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    let run = |arguments: &[&str]| {
        let output = Command::new(BINARY).args(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for (wrong, said) in [
        (&["--memory", "1GiB"][..], "--listen"),
        (&["--listen", "tcp:127.0.0.1:0"], "--memory"),
        (
            &["--listen", "127.0.0.1:0", "--memory", "1GiB"],
            "unix:PATH or tcp:IP:PORT",
        ),
        (
            &["--listen", "tcp:127.0.0.1:0", "--memory", "1GB"],
            "KiB, MiB or GiB",
        ),
        (
            &["--listen", "tcp:127.0.0.1:0", "--memory", "1MiB"],
            "too little",
        ),
        (
            &[
                "--listen",
                "tcp:127.0.0.1:0",
                "--memory",
                "1GiB",
                "--connections",
                "17",
            ],
            "17",
        ),
        (
            &[
                "--listen",
                "tcp:127.0.0.1:0",
                "--memory",
                "1GiB",
                "--backend",
                "abacus",
            ],
            "abacus",
        ),
    ] {
        let (code, stderr) = run(wrong);
        assert_eq!(code, Some(2), "{wrong:?}: {stderr}");
        assert!(stderr.contains(said), "{wrong:?}: {stderr}");
    }
    let nowhere = ["--listen", "unix:/nonexistent/socket", "--memory", "1GiB"];
    let (code, stderr) = run(&nowhere);
    assert_eq!(code, Some(40), "{stderr}");
    assert!(
        stderr.starts_with("casemate-worker: cannot listen on unix:/nonexistent"),
        "{stderr}"
    );
}
