//! Somebody between an enclave and its worker: passes on what each says, keeps what the worker was sent to multiply, and
//! falsifies products when told to. As an attacker would, it knows the worker's protocol and no key.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use casemate_field::Field;
use casemate_wire::{Address, MAX_PAYLOAD, Shape, Timed};

/// How long the worker may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Bytes of a header: type, field, 0 u16, length u32, id u64.
const HEADER: usize = 16;
/// Types of frames that mean something here.
const HELLO: u8 = 1;
const LOAD: u8 = 3;
const MULTIPLY: u8 = 7;
const PRODUCT: u8 = 8;
/// Most elements that are kept, 256 MiB of them, unless told otherwise.
const KEPT: usize = 1 << 26;

/// Rows that a worker was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Which connection, from 0.
    pub connection: usize,
    /// The number of the matrix there.
    pub matrix: u32,
    /// How many rows.
    pub rows: u16,
    /// All of them, one after the other. Empty if there was no room to keep them.
    pub elements: Vec<u32>,
}

/// What can be said of a connection without looking at elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its field.
    pub field: Field,
    /// Its matrices, by their numbers.
    pub matrices: Vec<Shape>,
}

/// What passed to the worker.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// By connection.
    pub connections: Vec<Opened>,
    /// In the order in which they were sent.
    pub messages: Vec<Message>,
}

impl Seen {
    /// All elements that were kept.
    pub fn elements(&self) -> impl Iterator<Item = u32> {
        self.messages
            .iter()
            .flat_map(|m| m.elements.iter().copied())
    }
}

/// One in the middle; whoever connects to it reaches the worker.
pub struct Tap {
    path: PathBuf,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    worker: Address,
    seen: Mutex<Seen>,
    /// Elements that may still be kept.
    room: Mutex<usize>,
    falsify: AtomicBool,
    falsified: AtomicU64,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tap {
    /// Listens on a Unix socket at `path`, in front of `worker`, which need not be there yet.
    pub fn start(path: &Path, worker: Address) -> io::Result<Tap> {
        Tap::keeping(path, worker, KEPT)
    }

    /// As [`Tap::start`], keeping at most so many elements at a time.
    pub fn keeping(path: &Path, worker: Address, elements: usize) -> io::Result<Tap> {
        let listener = UnixListener::bind(path)?;
        let shared = Arc::new(Shared {
            worker,
            seen: Mutex::default(),
            room: Mutex::new(elements),
            falsify: AtomicBool::new(false),
            falsified: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        let accepting = thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if accepting.stop.load(Ordering::Relaxed) {
                    break;
                }
                let shared = Arc::clone(&accepting);
                // A connection that fails is over for both ends.
                thread::spawn(move || shared.connect(Timed::unix(client)));
            }
        });
        Ok(Tap {
            path: path.to_path_buf(),
            shared,
            accepting: Some(accepting),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> Address {
        Address::Unix(self.path.clone())
    }

    /// What passed since this was asked last. Matrices stay known.
    pub fn take(&self) -> Seen {
        let mut seen = lock(&self.shared.seen);
        let connections = seen.connections.clone();
        let taken = std::mem::replace(
            &mut *seen,
            Seen {
                connections,
                messages: Vec::new(),
            },
        );
        *lock(&self.shared.room) += taken.elements().count();
        taken
    }

    /// Adds 1 to the first element of the next product that comes back: the least that a cheating worker can do.
    pub fn falsify_next_product(&self) {
        self.shared.falsify.store(true, Ordering::Relaxed);
    }

    /// How many products were falsified.
    pub fn falsified(&self) -> u64 {
        self.shared.falsified.load(Ordering::Relaxed)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the thread; if nobody can connect, nobody is accepting.
        if UnixStream::connect(&self.path).is_ok()
            && let Some(accepting) = self.accepting.take()
        {
            let _ = accepting.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Shared {
    fn connect(self: Arc<Self>, mut client: Timed) -> io::Result<()> {
        let mut worker = self.worker.connect(CONNECT)?;
        let (mut answers, mut to_client) = (worker.another()?, client.another()?);
        let shared = Arc::clone(&self);
        let back = thread::spawn(move || {
            let ended = pass(&mut answers, &mut to_client, |header, payload| {
                shared.answered(header, payload);
            });
            to_client.shutdown(Shutdown::Both);
            ended
        });
        let mut connection = None;
        let ended = pass(&mut client, &mut worker, |header, payload| {
            self.sent(&mut connection, header, payload);
        });
        worker.shutdown(Shutdown::Both);
        let _ = back.join();
        ended
    }

    /// Notes what goes to the worker.
    fn sent(&self, connection: &mut Option<usize>, header: &[u8; HEADER], payload: &[u8]) {
        let mut seen = lock(&self.seen);
        match (header[0], *connection) {
            (HELLO, None) => {
                let Some(field) = Field::from_id(header[1]) else {
                    return;
                };
                *connection = Some(seen.connections.len());
                seen.connections.push(Opened {
                    field,
                    matrices: Vec::new(),
                });
            }
            (LOAD, Some(connection)) if payload.len() >= 8 => {
                let (rows, columns) = (word(payload, 0), word(payload, 4));
                let opened = &mut seen.connections[connection];
                opened.matrices.push(Shape { rows, columns });
            }
            (MULTIPLY, Some(connection)) if payload.len() >= 8 => {
                let (words, _) = payload[8..].as_chunks::<4>();
                let mut room = lock(&self.room);
                let mut elements = Vec::new();
                if let Some(left) = room.checked_sub(words.len()) {
                    *room = left;
                    elements.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
                }
                seen.messages.push(Message {
                    connection,
                    matrix: word(payload, 0),
                    rows: u16::from_le_bytes([payload[4], payload[5]]),
                    elements,
                });
            }
            _ => {}
        }
    }

    fn answered(&self, header: &[u8; HEADER], payload: &mut [u8]) {
        let is_product = header[0] == PRODUCT && payload.len() >= 12;
        if !is_product || !self.falsify.swap(false, Ordering::Relaxed) {
            return;
        }
        if let Some(field) = Field::from_id(header[1]) {
            let falsified = field.add(word(payload, 8), 1);
            payload[8..12].copy_from_slice(&falsified.to_le_bytes());
            self.falsified.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Passes frames on, each after it was looked at, until one side is done.
fn pass(
    from: &mut Timed,
    to: &mut Timed,
    mut look: impl FnMut(&[u8; HEADER], &mut [u8]),
) -> io::Result<()> {
    let mut payload = Vec::new();
    loop {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        let length = word(&header, 4);
        if length > MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        payload.resize(length as usize, 0);
        from.read_exact(&mut payload)?;
        look(&header, &mut payload);
        to.write_all(&header)?;
        to.write_all(&payload)?;
    }
}

/// How many rows each product of a matrix had, as a worker can count: `3 × 1` stands for three products of one row.
#[must_use]
pub fn row_counts(seen: &Seen, matrix: u32) -> String {
    let messages = seen.messages.iter().filter(|m| m.matrix == matrix);
    let mut counts: VecDeque<(usize, u16)> = VecDeque::new();
    for message in messages {
        match counts.back_mut() {
            Some((times, rows)) if *rows == message.rows => *times += 1,
            _ => counts.push_back((1, message.rows)),
        }
    }
    let shown = counts.iter().map(|(times, rows)| match times {
        1 => rows.to_string(),
        _ => format!("{times} × {rows}"),
    });
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_wire::{Client, Receiver, Request, Responder, Welcome};

    /// A worker that multiplies by nothing but one matrix of a single row, and ends with its connection.
    fn worker(path: &Path) -> JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let offer = Welcome {
                window: 4,
                max_payload: 1 << 20,
                memory: 1 << 20,
                max_rows: 8,
                name: "here".into(),
            };
            let mut receiver = Receiver::open(socket.try_clone().unwrap(), offer.clone()).unwrap();
            let hello = receiver.hello();
            let mut responder = Responder::open(socket, hello, &offer).unwrap();
            let Ok(Request::Load(load)) = receiver.request() else {
                panic!("a matrix comes first");
            };
            responder.ready(load.matrix).unwrap();
            let weights = receiver.weights(|_| ()).unwrap();
            responder.loaded(load.matrix, &weights.digest).unwrap();
            while let Ok(Request::Multiply(asked)) = receiver.request() {
                // The row is (1, 0).
                let product: Vec<u32> = asked.elements.chunks(2).map(|x| x[0]).collect();
                responder.product(&asked, &product).unwrap();
            }
        })
    }

    #[test]
    fn frames_pass_are_kept_and_falsified_once_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let worker = worker(&path("worker"));
        let tap = Tap::keeping(&path("tap"), Address::Unix(path("worker")), 5).unwrap();
        let stream = tap.address().connect(CONNECT).unwrap();
        let mut client = Client::open(stream, Field::P29, 1 << 20).unwrap();
        let shape = Shape {
            rows: 1,
            columns: 2,
        };
        let matrix = client
            .load(shape, |_, row| row.copy_from_slice(&[1, 0]), |_| ())
            .unwrap();
        let mut product = |elements: &[u32]| {
            client.multiply(matrix, elements).unwrap();
            let mut out = vec![0; elements.len() / 2];
            client.product(&mut out).unwrap();
            out
        };
        assert_eq!(product(&[7, 8]), [7]);
        tap.falsify_next_product();
        let last = Field::P29.modulus() - 1;
        assert_eq!(product(&[last, 8]), [0]);
        assert_eq!(product(&[1, 2, 3, 4]), [1, 3]);
        assert_eq!(tap.falsified(), 1);
        let seen = tap.take();
        let field = Field::P29;
        let matrices = vec![shape];
        assert_eq!(seen.connections, [Opened { field, matrices }]);
        assert_eq!(seen.elements().collect::<Vec<_>>(), [7, 8, last, 8]);
        assert_eq!(row_counts(&seen, matrix), "2 × 1, 2");
        // There was no room for the last, and there is again.
        assert!(seen.messages[2].elements.is_empty());
        assert_eq!(product(&[1, 2, 3, 4]), [1, 3]);
        assert_eq!(tap.take().elements().count(), 4);
        drop(client);
        worker.join().unwrap();
    }
}
