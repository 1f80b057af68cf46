//! One client, from HELLO to the end. One thread reads and judges, another computes and answers, so that
//! a client that sends while it is sent to never waits for itself.

use std::collections::VecDeque;
use std::io::Read;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver as Queue, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use casemate_wire::{
    Load, Multiply, Receiver, Refusal, Request, Responder, Weights, Welcome, WireError, refuse,
};

use crate::backend::{Backend, BackendError, Device};
use crate::memory::{MAX_PAYLOAD, MAX_ROWS, Share, Taken, WINDOW};
use crate::stream::Stream;

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From connecting to the end of HELLO.
    pub opening: Duration,
    /// From the first byte of a frame to its last, and for all of an answer to be taken.
    pub frame: Duration,
    /// Without a frame, as long as no matrix is loaded.
    pub idle: Duration,
    /// For hearing why it was refused.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            opening: Duration::from_secs(10),
            frame: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            farewell: Duration::from_secs(1),
        }
    }
}

/// How often a thread that waits for a client looks whether the other one has given up.
const LOOK: Duration = Duration::from_millis(500);

/// What a connection came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Matrices that were loaded.
    pub matrices: u32,
    /// Products that were sent.
    pub products: u64,
}

/// Why a connection ended before its client closed it.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The client, or the connection to it.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This worker.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The client, before it said anything: no handshake came about.
    #[error("no TLS handshake with the client: {0}")]
    Handshake(#[source] std::io::Error),
    /// A defect of this worker, which it survives.
    #[error("a thread of the connection panicked")]
    Panicked,
}

impl Ended {
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Ended::Wire(error) => error.refusal(),
            Ended::Backend(_) | Ended::Panicked => Some(Refusal::Failed),
            Ended::Handshake(_) => None,
        }
    }
}

/// Serves a client until it closes the connection, with `memory` bytes for its matrices.
///
/// # Errors
/// Why it ended otherwise. The client was told, if it could be.
pub fn serve(
    stream: impl Into<Stream>,
    device: &dyn Device,
    memory: u64,
    limits: &Limits,
) -> Result<Served, Ended> {
    let mut stream: Stream = stream.into();
    let mut writer = stream.another().map_err(WireError::from)?;
    stream.within(Some(limits.opening));
    writer.within(Some(limits.opening));
    let offer = Welcome {
        window: WINDOW,
        max_payload: MAX_PAYLOAD,
        memory,
        max_rows: MAX_ROWS,
        name: device.name(),
    };
    let mut rest = stream.another().map_err(WireError::from)?;
    let outcome = match Receiver::open(stream, offer.clone()) {
        Ok(receiver) => run(receiver, writer, &offer, device, limits),
        Err(error) => {
            let ended = Ended::from(error);
            dismiss(&mut writer, &ended, limits.farewell);
            Err(ended)
        }
    };
    if outcome.is_err() {
        farewell(&mut rest, limits.farewell);
    }
    rest.shutdown(Shutdown::Both);
    outcome
}

/// Says why and that nothing else will come.
fn dismiss(stream: &mut Stream, ended: &Ended, limit: Duration) {
    stream.within(Some(limit));
    if let Some(why) = ended.refusal() {
        // Whoever does not take it has gone already.
        let _ = refuse(stream, why);
    }
    stream.shutdown(Shutdown::Write);
}

/// Reads what a client still sends, for a moment: closing a connection with something unread in it would take
/// back what was said last.
pub(crate) fn farewell(stream: &mut Stream, limit: Duration) {
    stream.within(Some(limit));
    let mut scratch = [0; 16 << 10];
    while matches!(stream.read(&mut scratch), Ok(1..)) {}
}

/// What the reading thread leaves to the computing one, in this order.
enum Work {
    Ready(u32),
    Load(Weights, Counted),
    Multiply(Multiply),
    /// The last.
    Refuse(Ended),
}

/// Memory of a matrix: as it is kept, and of its weights as they came.
struct Counted {
    kept: Taken,
    came: Taken,
}

fn run(
    mut receiver: Receiver<Stream>,
    mut writer: Stream,
    offer: &Welcome,
    device: &dyn Device,
    limits: &Limits,
) -> Result<Served, Ended> {
    let backend = match device.open(receiver.hello().field) {
        Ok(backend) => backend,
        Err(error) => {
            let ended = Ended::from(error);
            dismiss(&mut writer, &ended, limits.farewell);
            return Err(ended);
        }
    };
    let responder = Responder::open(writer, receiver.hello(), offer)?;
    let gone = AtomicBool::new(false);
    let (work, queue) = mpsc::sync_channel(offer.window.into());
    thread::scope(|scope| {
        let answering = Answering {
            responder,
            backend,
            limits: *limits,
            kept: Vec::new(),
            served: Served::default(),
            torn: false,
        };
        let gone_now = &gone;
        let computing = scope.spawn(move || {
            let _flag = Raise(gone_now);
            answering.run(&queue)
        });
        let share = Share::new(offer.memory);
        let admit = |load: Load| admit(load, device, &share);
        let read = read(&mut receiver, admit, &work, &gone, limits);
        if let Err(ended) = read {
            // If the other thread has ended, it knows better why.
            let _ = work.send(Work::Refuse(ended));
        }
        drop(work);
        computing.join().unwrap_or(Err(Ended::Panicked))
    })
}

/// Raises a flag when dropped, also by a panic.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Reads requests until the client closes the connection or nobody answers any more.
fn read(
    receiver: &mut Receiver<Stream>,
    admit: impl Fn(Load) -> Result<Counted, WireError>,
    work: &SyncSender<Work>,
    gone: &AtomicBool,
    limits: &Limits,
) -> Result<(), Ended> {
    loop {
        if !wait(receiver, gone, limits)? {
            return Ok(());
        }
        receiver.stream().within(Some(limits.frame));
        let next = match receiver.request()? {
            Request::Multiply(multiply) => Work::Multiply(multiply),
            Request::Load(load) => {
                let counted = admit(load)?;
                if work.send(Work::Ready(load.matrix)).is_err() {
                    return Ok(());
                }
                let weights = receiver.weights(|stream| stream.within(Some(limits.frame)))?;
                Work::Load(weights, counted)
            }
        };
        if work.send(next).is_err() {
            return Ok(());
        }
    }
}

/// Waits for a frame to begin; false if none will.
fn wait(
    receiver: &mut Receiver<Stream>,
    gone: &AtomicBool,
    limits: &Limits,
) -> Result<bool, WireError> {
    let since = Instant::now();
    loop {
        receiver.stream().within(Some(LOOK.min(limits.idle)));
        match receiver.wait() {
            Err(WireError::Late) if gone.load(Ordering::Acquire) => return Ok(false),
            Err(WireError::Late) if receiver.holds_any() || since.elapsed() < limits.idle => {}
            other => return other,
        }
    }
}

/// Sets memory aside for a matrix.
fn admit(load: Load, device: &dyn Device, share: &Share) -> Result<Counted, WireError> {
    let came = load.shape.weights();
    let kept = device.bytes(load.shape).unwrap_or(u64::MAX);
    let none = WireError::Memory {
        needed: came.saturating_add(kept),
        left: share.left(),
    };
    match (share.take(kept), share.take(came)) {
        (Some(kept), Some(came)) => Ok(Counted { kept, came }),
        _ => Err(none),
    }
}

/// The thread that computes and answers.
struct Answering {
    responder: Responder<Stream>,
    backend: Box<dyn Backend>,
    limits: Limits,
    /// Memory of matrices.
    kept: Vec<Taken>,
    served: Served,
    /// A frame was sent in part, so that nothing may follow it.
    torn: bool,
}

impl Answering {
    fn run(mut self, queue: &Queue<Work>) -> Result<Served, Ended> {
        let answered = self.answer_all(queue);
        let stream = self.responder.stream();
        match &answered {
            Err(_) if self.torn => stream.shutdown(Shutdown::Write),
            Err(ended) => dismiss(stream, ended, self.limits.farewell),
            Ok(()) => {}
        }
        answered.map(|()| self.served)
    }

    fn answer_all(&mut self, queue: &Queue<Work>) -> Result<(), Ended> {
        let mut product = Vec::new();
        let mut next = None;
        while let Some(work) = next.take().or_else(|| queue.recv().ok()) {
            match work {
                Work::Ready(matrix) => self.send(|to| to.ready(matrix))?,
                Work::Load(came, counted) => {
                    self.backend.load(came.load.shape, &came.weights)?;
                    drop(came.weights);
                    drop(counted.came);
                    self.kept.push(counted.kept);
                    self.send(|to| to.loaded(came.load.matrix, &came.digest))?;
                    self.served.matrices += 1;
                }
                Work::Multiply(multiply) if self.backend.overlapping().is_some() => {
                    next = self.overlap(multiply, queue, &mut product)?;
                }
                Work::Multiply(multiply) => {
                    let elements = &multiply.elements;
                    self.backend
                        .multiply(multiply.matrix, elements, &mut product)?;
                    self.send_product(&multiply, &product)?;
                }
                Work::Refuse(ended) => return Err(ended),
            }
        }
        Ok(())
    }

    /// Answers a product and those that arrive meanwhile, each begun before the last is finished. Returns what arrived and
    /// is no product.
    fn overlap(
        &mut self,
        first: Multiply,
        queue: &Queue<Work>,
        product: &mut Vec<u32>,
    ) -> Result<Option<Work>, Ended> {
        let mut next = Some(Work::Multiply(first));
        let mut begun = VecDeque::new();
        loop {
            let Some(backend) = self.backend.overlapping() else {
                return Ok(next);
            };
            while begun.len() < backend.most() {
                match next.take().or_else(|| queue.try_recv().ok()) {
                    Some(Work::Multiply(multiply)) => {
                        backend.begin(multiply.matrix, &multiply.elements)?;
                        begun.push_back(multiply);
                    }
                    other => {
                        next = other;
                        break;
                    }
                }
            }
            let Some(multiply) = begun.pop_front() else {
                return Ok(next);
            };
            backend.finish(product)?;
            self.send_product(&multiply, product)?;
        }
    }

    fn send_product(&mut self, multiply: &Multiply, product: &[u32]) -> Result<(), Ended> {
        self.send(|to| to.product(multiply, product))?;
        self.served.products += 1;
        Ok(())
    }

    /// Sends an answer, which has its time to be taken.
    fn send(
        &mut self,
        answer: impl FnOnce(&mut Responder<Stream>) -> Result<(), WireError>,
    ) -> Result<(), Ended> {
        self.responder.stream().within(Some(self.limits.frame));
        let sent = answer(&mut self.responder);
        self.torn = sent.is_err();
        Ok(sent?)
    }
}
