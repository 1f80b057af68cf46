//! Clients that take their time, against limits that are short enough for a test.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use casemate_field::Field;
use casemate_wire::{Client, MIN_PAYLOAD, Refusal, Shape, Timed, WireError};
use casemate_worker::backend::cpu::Cpu;
use casemate_worker::backend::{Backend, BackendError, Device};
use casemate_worker::connection::{Ended, Limits, Served, serve};

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

const LONG: Limits = Limits {
    opening: PATIENCE,
    frame: PATIENCE,
    idle: PATIENCE,
    farewell: Duration::from_millis(100),
};

const SHORT: Duration = Duration::from_millis(200);

/// A connection that is served on a thread, and its other end.
fn serving(limits: Limits) -> (UnixStream, JoinHandle<Result<Served, Ended>>) {
    serving_with(limits, Cpu::new(1).unwrap())
}

fn serving_with(
    limits: Limits,
    device: impl Device + 'static,
) -> (UnixStream, JoinHandle<Result<Served, Ended>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let serving = thread::spawn(move || serve(Timed::unix(theirs), &device, 64 << 20, &limits));
    (ours, serving)
}

fn client(stream: &UnixStream) -> Client<UnixStream> {
    Client::open(stream.try_clone().unwrap(), Field::P29, MIN_PAYLOAD).unwrap()
}

const SHAPE: Shape = Shape {
    rows: 2,
    columns: 3,
};

/// The connection ends because its client is late, and the client is told.
fn is_late(mut stream: UnixStream, serving: JoinHandle<Result<Served, Ended>>) {
    let ended = serving.join().unwrap();
    assert!(
        matches!(ended, Err(Ended::Wire(WireError::Late))),
        "{ended:?}"
    );
    let mut said = vec![];
    stream.read_to_end(&mut said).unwrap();
    assert_eq!(said[said.len() - 18], 9);
    assert_eq!(said[said.len() - 2..], Refusal::Late.code().to_le_bytes());
}

/// Sends all but the last byte, one by one, each well within the limit.
fn trickle(stream: &UnixStream, bytes: &[u8]) {
    let mut stream = stream.try_clone().unwrap();
    for byte in &bytes[..bytes.len() - 1] {
        // Ends when the worker has had enough.
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(25));
    }
}

#[test]
fn a_client_that_never_opens_is_late() {
    let (stream, serving) = serving(Limits {
        opening: SHORT,
        ..LONG
    });
    is_late(stream, serving);
}

#[test]
fn a_client_that_opens_byte_by_byte_is_late() {
    let (stream, serving) = serving(Limits {
        opening: SHORT,
        ..LONG
    });
    trickle(
        &stream,
        &[
            1, 1, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'C', b'M', b'W', b'K', 1, 0,
        ],
    );
    is_late(stream, serving);
}

#[test]
fn a_client_that_opens_and_loads_nothing_is_late() {
    let (stream, serving) = serving(Limits {
        idle: SHORT,
        ..LONG
    });
    let _client = client(&stream);
    is_late(stream, serving);
}

#[test]
fn a_request_that_comes_byte_by_byte_is_late() {
    let (stream, serving) = serving(Limits {
        frame: SHORT,
        ..LONG
    });
    let mut client = client(&stream);
    client.load(SHAPE, |_, out| out.fill(1), |_| ()).unwrap();
    trickle(
        &stream,
        &[
            7, 1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0,
        ],
    );
    is_late(stream, serving);
}

#[test]
fn weights_that_do_not_come_are_late() {
    let (mut stream, serving) = serving(Limits {
        frame: SHORT,
        ..LONG
    });
    let _client = client(&stream);
    let load = [
        3, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0,
    ];
    stream.write_all(&load).unwrap();
    is_late(stream, serving);
}

/// It asks and asks and takes no answer; nobody waits for it for ever.
#[test]
fn a_client_that_takes_no_answers_is_late() {
    let (stream, serving) = serving(Limits {
        frame: SHORT,
        ..LONG
    });
    let mut client = client(&stream);
    let shape = Shape {
        rows: 100_000,
        columns: 1,
    };
    let matrix = client.load(shape, |_, out| out.fill(1), |_| ()).unwrap();
    for _ in 0..client.welcome().window {
        client.multiply(matrix, &[1, 2]).unwrap();
    }
    let ended = serving.join().unwrap();
    assert!(
        matches!(ended, Err(Ended::Wire(WireError::Late))),
        "{ended:?}"
    );
}

/// An enclave may have nothing to ask for hours.
#[test]
fn a_client_with_a_matrix_may_rest() {
    let (stream, serving) = serving(Limits {
        idle: SHORT,
        frame: PATIENCE,
        ..LONG
    });
    let mut client = client(&stream);
    let matrix = client.load(SHAPE, |_, out| out.fill(1), |_| ()).unwrap();
    thread::sleep(4 * SHORT);
    client.multiply(matrix, &[1, 2, 3]).unwrap();
    let mut product = [0; 2];
    client.product(&mut product).unwrap();
    assert_eq!(product, [6, 6]);
    drop(client);
    drop(stream);
    let served = serving.join().unwrap().unwrap();
    assert_eq!(
        served,
        Served {
            matrices: 1,
            products: 1
        }
    );
}

/// A device that fails, or whose code panics.
struct Broken(bool);

impl Device for Broken {
    fn name(&self) -> String {
        "broken".into()
    }
    fn bytes(&self, shape: Shape) -> Option<u64> {
        Some(shape.weights())
    }
    fn open(&self, _: Field) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(Broken(self.0)))
    }
}

impl Backend for Broken {
    fn load(&mut self, _: Shape, _: &[i8]) -> Result<(), BackendError> {
        Ok(())
    }
    fn multiply(&mut self, _: u32, _: &[u32], _: &mut Vec<u32>) -> Result<(), BackendError> {
        assert!(!self.0, "a defect");
        Err(BackendError::Device("the cable is out".into()))
    }
}

#[test]
fn a_device_that_fails_ends_the_connection_with_a_reason() {
    for panics in [false, true] {
        let (stream, serving) = serving_with(LONG, Broken(panics));
        let mut client = client(&stream);
        let matrix = client.load(SHAPE, |_, _| (), |_| ()).unwrap();
        client.multiply(matrix, &[1, 2, 3]).unwrap();
        let heard = client.product(&mut [0; 2]);
        let ended = serving.join().unwrap();
        if panics {
            assert!(matches!(heard, Err(WireError::Closed)), "{heard:?}");
            assert!(matches!(ended, Err(Ended::Panicked)), "{ended:?}");
        } else {
            assert!(
                matches!(heard, Err(WireError::Refused(Refusal::Failed))),
                "{heard:?}"
            );
            assert!(matches!(ended, Err(Ended::Backend(_))), "{ended:?}");
        }
    }
}
