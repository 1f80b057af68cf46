//! An honest worker in a thread, and what both sides said, frame by frame.

#![allow(dead_code, reason = "each test program uses its part")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use casemate_field::Field;
use casemate_wire::{Client, MIN_PAYLOAD, Receiver, Request, Responder, Shape, Welcome, WireError};

/// What the worker of these tests offers.
pub(crate) fn offer() -> Welcome {
    Welcome {
        window: 4,
        max_payload: MIN_PAYLOAD,
        memory: 64 << 20,
        max_rows: 100,
        name: "test-1.0".into(),
    }
}

/// Deterministic weights.
pub(crate) fn weight(row: u32, column: usize) -> i8 {
    (((row as usize * 31 + column * 17) % 255) as i16 - 127) as i8
}

/// Numbers that are elements of both fields.
pub(crate) fn elements(count: usize) -> Vec<u32> {
    let element = |i: u64| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 36) as u32;
    (1..=count as u64).map(element).collect()
}

/// `x * w^T` modulo p, one number at a time.
pub(crate) fn product(field: Field, shape: Shape, weights: &[i8], x: &[u32]) -> Vec<u32> {
    let columns = shape.columns as usize;
    let mut out = vec![];
    for x in x.chunks(columns) {
        for w in weights.chunks(columns) {
            let terms = x
                .iter()
                .zip(w)
                .map(|(x, w)| i128::from(*x) * i128::from(*w));
            let sum = terms.sum::<i128>();
            out.push(sum.rem_euclid(i128::from(field.modulus())) as u32);
        }
    }
    out
}

/// Serves one client honestly until it closes the connection.
pub(crate) fn serve(
    reader: impl Read,
    writer: impl Write,
    offer: &Welcome,
) -> Result<(), WireError> {
    let mut receiver = Receiver::open(reader, offer.clone())?;
    let field = receiver.hello().field;
    let mut responder = Responder::open(writer, receiver.hello(), offer)?;
    let mut matrices = vec![];
    while receiver.wait()? {
        match receiver.request()? {
            Request::Load(load) => {
                responder.ready(load.matrix)?;
                let came = receiver.weights(|_| ())?;
                responder.loaded(load.matrix, &came.digest)?;
                matrices.push((load.shape, came.weights));
            }
            Request::Multiply(multiply) => {
                let (shape, weights) = &matrices[multiply.matrix as usize];
                let y = product(field, *shape, weights, &multiply.elements);
                responder.product(&multiply, &y)?;
            }
        }
    }
    Ok(())
}

/// A stream that keeps what passes.
pub(crate) struct Recorded {
    stream: UnixStream,
    pub(crate) read: Arc<Mutex<Vec<u8>>>,
    pub(crate) written: Arc<Mutex<Vec<u8>>>,
}

impl Read for Recorded {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(out)?;
        self.read.lock().unwrap().extend_from_slice(&out[..n]);
        Ok(n)
    }
}

impl Write for Recorded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.stream.write(bytes)?;
        self.written.lock().unwrap().extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A client of an honest worker, and what will have passed.
pub(crate) struct Honest {
    pub(crate) client: Client<Recorded>,
    pub(crate) worker: thread::JoinHandle<Result<(), WireError>>,
    pub(crate) read: Arc<Mutex<Vec<u8>>>,
    pub(crate) written: Arc<Mutex<Vec<u8>>>,
}

pub(crate) fn honest(field: Field, offer: Welcome) -> Honest {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let reader = theirs.try_clone().unwrap();
    let worker = thread::spawn(move || serve(reader, theirs, &offer));
    let (read, written) = (Arc::default(), Arc::default());
    let stream = Recorded {
        stream: ours,
        read: Arc::clone(&read),
        written: Arc::clone(&written),
    };
    Honest {
        client: Client::open(stream, field, MIN_PAYLOAD).unwrap(),
        worker,
        read,
        written,
    }
}

/// The matrix of [`transcript`].
pub(crate) const SHAPE: Shape = Shape {
    rows: 3,
    columns: 5,
};

/// The rows of its two requests: two and one.
pub(crate) fn asked() -> [Vec<u32>; 2] {
    [elements(10), elements(15)[10..].to_vec()]
}

/// What an honest client and an honest worker say for one matrix and two products, as frames.
pub(crate) fn transcript() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let mut honest = honest(Field::P29, offer());
    run(&mut honest.client).unwrap();
    drop(honest.client);
    honest.worker.join().unwrap().unwrap();
    let (client, worker) = (honest.written.lock().unwrap(), honest.read.lock().unwrap());
    (frames(&client), frames(&worker))
}

/// What the client of [`transcript`] does once it is open.
pub(crate) fn run<S: Read + Write>(client: &mut Client<S>) -> Result<[Vec<u32>; 2], WireError> {
    let fill = |row: u32, out: &mut [i8]| {
        (0..out.len()).for_each(|column| out[column] = weight(row, column));
    };
    let matrix = client.load(SHAPE, fill, |_| ())?;
    for rows in asked() {
        client.multiply(matrix, &rows)?;
    }
    let mut products = [vec![0; 6], vec![0; 3]];
    for product in &mut products {
        client.product(product)?;
    }
    Ok(products)
}

/// Takes a stream of frames apart.
pub(crate) fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = vec![];
    while !bytes.is_empty() {
        let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
        let (frame, rest) = bytes.split_at(16 + length);
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}

/// A worker or client that says what was written down, whatever it hears.
pub(crate) struct Script {
    pub(crate) says: io::Cursor<Vec<u8>>,
    pub(crate) heard: Vec<u8>,
}

impl Script {
    pub(crate) fn new(says: Vec<u8>) -> Script {
        Script {
            says: io::Cursor::new(says),
            heard: vec![],
        }
    }
}

impl Read for Script {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.says.read(out)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a worker makes of a client's bytes.
pub(crate) fn receive(bytes: &[u8], offer: Welcome) -> Result<(), WireError> {
    serve(bytes, io::sink(), &offer)
}

/// What the client of [`transcript`] makes of a worker's bytes.
pub(crate) fn hear(bytes: Vec<u8>) -> Result<[Vec<u32>; 2], WireError> {
    run(&mut Client::open(
        Script::new(bytes),
        Field::P29,
        MIN_PAYLOAD,
    )?)
}
