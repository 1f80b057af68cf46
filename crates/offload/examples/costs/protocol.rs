//! What the protocol adds to the worker's own work: whole exchanges over the loopback interface with a worker on the
//! processor, next to the time that this worker computes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use casemate_field::Field;
use casemate_kernels::panels::Int8Matrix;
use casemate_wire::{Address, Client, MAX_PAYLOAD, Shape, Timed};
use casemate_worker::backend::cpu::Cpu;
use casemate_worker::backend::{Backend, BackendError, Device};
use casemate_worker::connection::Limits;
use casemate_worker::listener::{self, Listener, Places};

use crate::SHAPES;

const WITHIN: Duration = Duration::from_secs(60);

/// A device that notes how long it computes.
struct Clocked {
    device: Cpu,
    nanoseconds: Arc<AtomicU64>,
}

impl Device for Clocked {
    fn name(&self) -> String {
        self.device.name()
    }

    fn bytes(&self, shape: Shape) -> Option<u64> {
        self.device.bytes(shape)
    }

    fn open(&self, field: Field) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(ClockedBackend {
            backend: self.device.open(field)?,
            nanoseconds: Arc::clone(&self.nanoseconds),
        }))
    }
}

struct ClockedBackend {
    backend: Box<dyn Backend>,
    nanoseconds: Arc<AtomicU64>,
}

impl Backend for ClockedBackend {
    fn load(&mut self, shape: Shape, weights: &[i8]) -> Result<(), BackendError> {
        self.backend.load(shape, weights)
    }

    fn multiply(
        &mut self,
        matrix: u32,
        elements: &[u32],
        out: &mut Vec<u32>,
    ) -> Result<(), BackendError> {
        let begin = Instant::now();
        let done = self.backend.multiply(matrix, elements, out);
        let took = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(took, Relaxed);
        done
    }
}

/// A worker on a thread of this process, which it ends with, and how long it has computed.
fn worker(threads: usize) -> (Address, Arc<AtomicU64>) {
    let nanoseconds = Arc::new(AtomicU64::new(0));
    let device = Clocked {
        device: Cpu::new(threads).expect("threads"),
        nanoseconds: Arc::clone(&nanoseconds),
    };
    let address = "tcp:127.0.0.1:0".parse().expect("an address");
    let listener = Listener::bind(&address).expect("a free port");
    let address = listener.address().expect("its port");
    let places = Arc::new(Places {
        device: Arc::new(device),
        count: 1,
        memory: 1 << 40,
        limits: Limits::default(),
        identity: None,
    });
    thread::spawn(move || listener::serve(&listener, &places));
    (address, nanoseconds)
}

/// Exchanges of one row with each matrix in turn.
pub(crate) fn measure<'a>(
    matrices: impl Iterator<Item = &'a Int8Matrix>,
    threads: usize,
    rounds: usize,
) {
    let (address, computed) = worker(threads);
    let stream = address.connect(WITHIN).expect("the worker is there");
    let mut client = open(stream);
    let mut each = Vec::new();
    for matrix in matrices {
        let shape = Shape {
            rows: matrix.rows() as u32,
            columns: matrix.columns() as u32,
        };
        let row = |i: u32, out: &mut [i8]| {
            matrix.row(i as usize, out);
        };
        let prolong = |stream: &mut Timed| stream.within(Some(WITHIN));
        let number = client.load(shape, row, prolong).expect("it has room");
        each.push((number, shape));
    }
    let mut times: Vec<Vec<(Duration, Duration)>> = each.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        for ((number, shape), times) in each.iter().zip(&mut times) {
            let x: Vec<u32> = (0..shape.columns).map(|i| i * 7919 % 1_000_003).collect();
            let mut y = vec![0; shape.rows as usize];
            client.stream().within(Some(WITHIN));
            let before = computed.load(Relaxed);
            let begin = Instant::now();
            client.multiply(*number, &x).expect("it is taken");
            client.product(&mut y).expect("it is answered");
            let whole = begin.elapsed();
            let computing = Duration::from_nanos(computed.load(Relaxed) - before);
            // The first warms up.
            if round > 0 {
                times.push((whole, computing));
            }
        }
    }
    println!(
        "\na worker with {threads} threads, over the loopback interface, 1 row, median of {rounds}, ms a token of \
         Llama 2 7B\n\n| matrices | whole exchange | of it the worker's computing | protocol |\n|---|---|---|---|"
    );
    let mut totals = (0.0, 0.0);
    for ((name, _, _, count), times) in SHAPES.iter().zip(&mut times) {
        times.sort_unstable();
        let (whole, computing) = times[times.len() / 2];
        let ms = |time: Duration| time.as_secs_f64() * 1e3 * f64::from(*count);
        let (whole, computing) = (ms(whole), ms(computing));
        println!(
            "| {name} x {count} | {whole:.2} | {computing:.2} | {:.1} % |",
            share(whole, computing)
        );
        totals = (totals.0 + whole, totals.1 + computing);
    }
    let (whole, computing) = totals;
    println!(
        "| all | {whole:.2} | {computing:.2} | {:.1} % |",
        share(whole, computing)
    );
}

/// What the whole is more than its part, in percent of that.
fn share(whole: f64, part: f64) -> f64 {
    100.0 * (whole / part - 1.0)
}

fn open(mut stream: Timed) -> Client<Timed> {
    stream.within(Some(WITHIN));
    Client::open(stream, Field::P29, MAX_PAYLOAD).expect("it speaks the protocol")
}
