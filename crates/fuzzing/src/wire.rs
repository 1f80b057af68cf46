//! The protocol between enclaves and workers, both ends.

use std::io::{self, Cursor, Read, Write};

use casemate_field::Field;
use casemate_wire::{Client, MIN_PAYLOAD, Receiver, Request, Responder, Shape, Welcome, WireError};

const SHAPE: Shape = Shape {
    rows: 3,
    columns: 5,
};

fn offer() -> Welcome {
    Welcome {
        window: 2,
        max_payload: MIN_PAYLOAD,
        memory: 1 << 20,
        max_rows: 8,
        name: "fuzzed".into(),
    }
}

/// The first byte tells who speaks: a client, which a worker listens to, or a worker.
pub(crate) fn wire(data: &[u8]) {
    match data.split_first() {
        Some((b'c', bytes)) => client(bytes),
        Some((b'w', bytes)) => worker(bytes),
        _ => {}
    }
}

/// What a worker understands, an honest client says with the same bytes, and no others.
fn client(bytes: &[u8]) {
    let mut heard = Heard::default();
    // What was understood before a fault counts, too.
    let _ = listen(bytes, &mut heard);
    let Some((field, max_payload)) = heard.hello else {
        return;
    };
    let script = Script {
        says: Cursor::new(heard.answers),
        said: Vec::new(),
    };
    let mut client = Client::open(script, field, max_payload).expect("honest answers");
    for asked in &heard.asked {
        match asked {
            Asked::Load(shape, weights) => {
                let columns = shape.columns as usize;
                let row = |i: u32, out: &mut [i8]| {
                    out.copy_from_slice(&weights[i as usize * columns..][..columns]);
                };
                client.load(*shape, row, |_| ()).expect("it was understood");
            }
            Asked::Multiply(matrix, elements, outputs) => {
                let sent = client.multiply(*matrix, elements);
                sent.expect("it was understood");
                let product = client.product(&mut vec![0; *outputs]);
                product.expect("honest answers");
            }
        }
    }
    let said = &client.stream().said;
    assert!(bytes.starts_with(said), "said in two ways");
}

/// What a worker heard, and what it answered.
#[derive(Default)]
struct Heard {
    hello: Option<(Field, u32)>,
    asked: Vec<Asked>,
    answers: Vec<u8>,
}

enum Asked {
    Load(Shape, Vec<i8>),
    Multiply(u32, Vec<u32>, usize),
}

fn listen(bytes: &[u8], heard: &mut Heard) -> Result<(), WireError> {
    let offer = offer();
    let mut receiver = Receiver::open(bytes, offer.clone())?;
    let hello = receiver.hello();
    heard.hello = Some((hello.field, hello.max_payload));
    let mut responder = Responder::open(&mut heard.answers, hello, &offer)?;
    let mut rows = Vec::new();
    while receiver.wait()? {
        match receiver.request()? {
            Request::Load(load) => {
                let came = receiver.weights(|_| ())?;
                assert_eq!(came.weights.len() as u64, load.shape.weights());
                responder.ready(load.matrix)?;
                responder.loaded(load.matrix, &came.digest)?;
                rows.push(load.shape.rows);
                heard.asked.push(Asked::Load(load.shape, came.weights));
            }
            Request::Multiply(multiply) => {
                assert!(hello.field.contains(&multiply.elements));
                let outputs = rows[multiply.matrix as usize] as usize * usize::from(multiply.rows);
                responder.product(&multiply, &vec![0; outputs])?;
                let asked = Asked::Multiply(multiply.matrix, multiply.elements, outputs);
                heard.asked.push(asked);
            }
        }
    }
    Ok(())
}

/// Whatever a worker says, what comes of it are elements.
fn worker(bytes: &[u8]) {
    let script = Script {
        says: Cursor::new(bytes.to_vec()),
        said: Vec::new(),
    };
    let _ = ask(script);
}

fn ask<S: Read + Write>(stream: S) -> Result<(), WireError> {
    let mut client = Client::open(stream, Field::P29, MIN_PAYLOAD)?;
    let matrix = client.load(SHAPE, |_, out| out.fill(7), |_| ())?;
    let most = client.most_rows(matrix).expect("it is loaded");
    for rows in [1, most.min(2)] {
        client.multiply(matrix, &vec![9; 5 * usize::from(rows)])?;
        let mut product = vec![u32::MAX; 3 * usize::from(rows)];
        client.product(&mut product)?;
        assert!(Field::P29.contains(&product));
    }
    Ok(())
}

pub(crate) fn wire_seeds() -> Vec<Vec<u8>> {
    // A client that hears what it needs to go on says all it can say.
    let mut heard = Heard::default();
    let weights = [7i8; 15];
    let hello = {
        let mut script = Script::default();
        let _ = Client::open(&mut script, Field::P29, MIN_PAYLOAD);
        script.said
    };
    listen(&hello, &mut heard).expect("an honest client");
    let frame = |kind: u8, id: u8, payload: &[u8]| {
        let mut frame = vec![kind, 1, 0, 0, payload.len() as u8, 0, 0, 0, id];
        frame.extend([0; 7]);
        frame.extend(payload);
        frame
    };
    let bytes: Vec<u8> = weights.iter().map(|w| *w as u8).collect();
    let multiply = |rows: u8| {
        [
            &[0, 0, 0, 0, rows, 0, 0, 0][..],
            &[9, 0, 0, 0].repeat(5 * usize::from(rows)),
        ]
        .concat()
    };
    let client = [
        hello,
        frame(3, 0, &[3, 0, 0, 0, 5, 0, 0, 0]),
        frame(5, 0, &bytes),
        frame(7, 1, &multiply(1)),
        frame(7, 2, &multiply(2)),
    ]
    .concat();
    let mut heard = Heard::default();
    listen(&client, &mut heard).expect("an honest client");
    let mut refused = Vec::new();
    casemate_wire::refuse(&mut refused, casemate_wire::Refusal::Busy).expect("memory takes all");
    vec![
        [b"c", &client[..]].concat(),
        [b"w", &heard.answers[..]].concat(),
        [b"w", &refused[..]].concat(),
    ]
}

/// Says what was written down, whatever it hears.
#[derive(Default)]
struct Script {
    says: Cursor<Vec<u8>>,
    said: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.says.read(out)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.said.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
