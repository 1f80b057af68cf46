//! A worker in this process, honest or not, at the other end of a socket; and matrices to give it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use casemate_container::Access;
use casemate_field::Field;
use casemate_kernels::panels::{Int8Matrix, Int8Rows, matmul_int8_sums};
use casemate_kernels::team::Team;
use casemate_offload::offload::Group;
use casemate_offload::tls::Pin;
use casemate_offload::{
    BootKey, Config, Connect, Encrypted, Event, Offload, PublicMatrix, Transport, Workers,
};
use casemate_wire::server::refuse;
use casemate_wire::{Multiply, Receiver, Refusal, Request, Responder, Timed, Weights, Welcome};

use crate::encrypted::Identity;
use crate::testing::Random;

/// What a worker does with a product that it has computed.
pub(crate) enum Act {
    /// Sends it, or something else of its length.
    Answer(Vec<u32>),
    /// Writes bytes as they are, and closes.
    Raw(Vec<u8>),
    /// Says nothing for so long, then answers.
    Delay(Duration, Vec<u32>),
    /// Writes bytes as they are, one by one with such pauses.
    Trickle(Duration, Vec<u8>),
    /// Closes.
    HangUp,
    /// Says nothing for so long, then closes.
    HangUpAfter(Duration),
    /// Refuses.
    Refuse,
}

/// What a worker saw, and what it did: `act(n, asked, product)` for its n-th product over all
/// connections.
pub(crate) type Conduct = Box<dyn FnMut(u64, &Multiply, Vec<u32>) -> Act + Send>;

/// A worker in this process.
#[derive(Clone)]
pub(crate) struct Fake(Arc<Mutex<Inner>>);

struct Inner {
    conduct: Conduct,
    products: u64,
    connections: u64,
    /// Matrices that were loaded.
    loaded: u64,
    /// Everything that came, of all connections.
    seen: Vec<u8>,
    /// Whether LOADED tells another digest.
    forgets: bool,
    /// Whether it computes with other weights than it was sent.
    stale: bool,
}

impl Fake {
    pub(crate) fn honest() -> Fake {
        Fake::new(Box::new(|_, _, product| Act::Answer(product)))
    }

    pub(crate) fn new(conduct: Conduct) -> Fake {
        Fake(Arc::new(Mutex::new(Inner {
            conduct,
            products: 0,
            connections: 0,
            loaded: 0,
            seen: Vec::new(),
            forgets: false,
            stale: false,
        })))
    }

    pub(crate) fn that_forgets(self) -> Fake {
        self.0.lock().unwrap().forgets = true;
        self
    }

    pub(crate) fn with_stale_weights(self) -> Fake {
        self.0.lock().unwrap().stale = true;
        self
    }

    pub(crate) fn connections(&self) -> u64 {
        self.0.lock().unwrap().connections
    }

    pub(crate) fn loaded(&self) -> u64 {
        self.0.lock().unwrap().loaded
    }

    pub(crate) fn products(&self) -> u64 {
        self.0.lock().unwrap().products
    }

    /// What came since this was asked last.
    pub(crate) fn seen(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap().seen)
    }

    pub(crate) fn connect(&self) -> Connect {
        let fake = self.clone();
        Box::new(move || Ok(Box::new(Timed::unix(fake.accept())) as Box<dyn Transport>))
    }

    /// Behind TLS with a key of its own.
    pub(crate) fn encrypted(&self) -> Encrypted {
        let identity = Identity::new();
        let pin = identity.pin;
        self.encrypted_by(identity, pin, &Arc::default())
    }

    /// Behind TLS, which shows `identity` to one who expects `pin`. What is on the line is noted.
    pub(crate) fn encrypted_by(
        &self,
        identity: Identity,
        pin: Pin,
        line: &Arc<Mutex<Vec<u8>>>,
    ) -> Encrypted {
        let (fake, line) = (self.clone(), Arc::clone(line));
        let socket = move || {
            let line = Arc::clone(&line);
            Ok(Timed::unix(
                fake.accept_through(|far| identity.shown_on(far, line)),
            ))
        };
        Encrypted::new(socket, pin, Duration::from_secs(30))
    }

    /// The client's end of a new connection.
    pub(crate) fn accept(&self) -> UnixStream {
        self.accept_through(Line::new)
    }

    fn accept_through(&self, through: impl FnOnce(UnixStream) -> Line) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        let (fake, line) = (self.clone(), through(far));
        fake.0.lock().unwrap().connections += 1;
        // It ends with the connection.
        thread::spawn(move || fake.serve(line));
        near
    }

    fn serve(&self, line: Line) -> Option<()> {
        let offer = offer();
        let mut writer = line.clone();
        let reader = Recorder(line, self.clone());
        let mut receiver = Receiver::open(reader, offer.clone()).ok()?;
        let hello = receiver.hello();
        let mut responder = Responder::open(writer.clone(), hello, &offer).ok()?;
        let mut matrices = Vec::new();
        loop {
            match receiver.request().ok()? {
                Request::Load(load) => {
                    responder.ready(load.matrix).ok()?;
                    let mut weights = receiver.weights(|_| {}).ok()?;
                    let mut inner = self.0.lock().unwrap();
                    inner.loaded += 1;
                    if inner.forgets {
                        weights.digest[31] ^= 1;
                    }
                    if inner.stale {
                        let last = weights.weights.last_mut().unwrap();
                        *last = if *last > 0 { *last - 1 } else { *last + 1 };
                    }
                    drop(inner);
                    responder.loaded(load.matrix, &weights.digest).ok()?;
                    matrices.push(weights);
                }
                Request::Multiply(asked) => {
                    let product = product(hello.field, &matrices[asked.matrix as usize], &asked);
                    let act = {
                        let inner = &mut *self.0.lock().unwrap();
                        inner.products += 1;
                        (inner.conduct)(inner.products - 1, &asked, product)
                    };
                    match act {
                        Act::Answer(product) => responder.product(&asked, &product).ok()?,
                        Act::Delay(time, product) => {
                            thread::sleep(time);
                            responder.product(&asked, &product).ok()?;
                        }
                        Act::Trickle(pause, bytes) => {
                            for byte in bytes {
                                writer.write_all(&[byte]).ok()?;
                                thread::sleep(pause);
                            }
                        }
                        Act::Raw(bytes) => {
                            writer.write_all(&bytes).ok()?;
                            return None;
                        }
                        Act::HangUp => return None,
                        Act::HangUpAfter(time) => {
                            thread::sleep(time);
                            return None;
                        }
                        Act::Refuse => return refuse(&mut writer, Refusal::Failed).ok(),
                    }
                }
            }
        }
    }
}

/// What a worker in this process offers.
pub(crate) fn offer() -> Welcome {
    Welcome {
        window: 4,
        max_payload: 8 << 20,
        memory: 1 << 30,
        max_rows: 1024,
        name: "fake".to_owned(),
    }
}

/// A connection, for who reads and who writes.
#[derive(Clone)]
pub(crate) struct Line(Arc<Mutex<dyn Stream>>);

pub(crate) trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

impl Line {
    pub(crate) fn new(stream: impl Stream + 'static) -> Line {
        Line(Arc::new(Mutex::new(stream)))
    }
}

impl Read for Line {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap().read(out)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().flush()
    }
}

/// Notes what is read.
struct Recorder(Line, Fake);

impl Read for Recorder {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(out)?;
        let mut inner = (self.1).0.lock().unwrap();
        inner.seen.extend_from_slice(&out[..read]);
        Ok(read)
    }
}

/// W·x modulo p, as it is defined.
fn product(field: Field, weights: &Weights, asked: &Multiply) -> Vec<u32> {
    let columns = weights.load.shape.columns as usize;
    let rows = asked.elements.chunks_exact(columns);
    rows.flat_map(|x| {
        weights.weights.chunks_exact(columns).map(move |w| {
            let terms = w.iter().zip(x).map(|(w, x)| i64::from(*w) * i64::from(*x));
            // At most 66,572 terms below 2^38.
            field.from_integer(terms.sum())
        })
    })
    .collect()
}

/// An enclave's end: matrices, and products that are compared with those computed here.
pub(crate) struct Enclave {
    pub(crate) offload: Offload,
    pub(crate) team: Team,
    pub(crate) groups: Vec<(Arc<Group>, Arc<Int8Matrix>)>,
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
}

/// Short waits and a pool for a few masks, so that tests are quick.
pub(crate) fn config() -> Config {
    Config {
        pool_bytes: 4 << 20,
        reserve: 0,
        patience: Duration::from_secs(30),
        // Whatever else this machine is doing.
        waiting: Duration::from_secs(3600),
        aside: Duration::ZERO,
        quarantine: Duration::ZERO,
        retry: Duration::ZERO,
        ..Config::default()
    }
}

impl Enclave {
    /// With all matrices added and started.
    pub(crate) fn new(
        config: Config,
        seed: u64,
        workers: Workers,
        matrices: Vec<Int8Matrix>,
    ) -> Enclave {
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&events);
        let mut random = Random::new(seed);
        let boot = BootKey::new(std::array::from_fn(|_| random.next() as u8).into());
        let observer = Box::new(move |event| told.lock().unwrap().push(event));
        let offload = Offload::new(config, boot, workers, observer);
        let add = |matrix| {
            let matrix = Arc::new(matrix);
            let public = PublicMatrix::new(Access::Public, Arc::clone(&matrix) as _).unwrap();
            (offload.add(public).unwrap(), matrix)
        };
        let groups = matrices.into_iter().map(add).collect();
        offload.start().unwrap();
        Enclave {
            offload,
            team: Team::new(2).unwrap(),
            groups,
            events,
        }
    }

    /// Makes masks for what a test may ask next.
    pub(crate) fn fill(&self) {
        const ENOUGH: u64 = 150;
        while self.offload.metrics().masks_level < ENOUGH && self.offload.step(&self.team) {}
    }

    pub(crate) fn wait(&self) {
        assert!(
            self.offload.wait(Duration::from_secs(60)),
            "no worker: {:?}",
            self.events()
        );
    }

    /// Multiplies rows with a group's matrix. Whether a worker did, which must have had the right
    /// sums then.
    pub(crate) fn product(&self, group: usize, x: &[i8]) -> bool {
        let (group, matrix) = &self.groups[group];
        let mut rows = Int8Rows::with_capacity(0, matrix.columns());
        rows.assign(&self.team, x, matrix.columns());
        let mut expected = vec![0; rows.rows() * matrix.rows()];
        matmul_int8_sums(&self.team, &rows, matrix, &mut expected);
        let mut sums = vec![i32::MIN; expected.len()];
        let outside = self.offload.outside(&self.team, group, &rows, &mut sums);
        assert!(!outside || sums == expected, "a wrong sum was released");
        outside
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}
