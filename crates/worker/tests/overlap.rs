//! Products of a device that can begin one before the last is finished.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use casemate_field::Field;
use casemate_wire::{Client, MIN_PAYLOAD, Shape, Timed};
use casemate_worker::backend::{Backend, BackendError, Device, Overlapping};
use casemate_worker::connection::{Limits, serve};

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Products that the device can have under way.
const MOST: usize = 2;

/// Its product is the first element, once for each output.
#[derive(Clone, Default)]
struct Lanes {
    begun: Arc<Mutex<VecDeque<(u32, u32)>>>,
    /// The most that were under way.
    together: Arc<AtomicUsize>,
    loads_between: Arc<AtomicUsize>,
}

impl Device for Lanes {
    fn name(&self) -> String {
        "lanes".into()
    }
    fn bytes(&self, shape: Shape) -> Option<u64> {
        Some(shape.weights())
    }
    fn open(&self, _: Field) -> Result<Box<dyn Backend>, BackendError> {
        Ok(Box::new(self.clone()))
    }
}

impl Backend for Lanes {
    fn load(&mut self, _: Shape, _: &[i8]) -> Result<(), BackendError> {
        let under_way = self.begun.lock().unwrap().len();
        self.loads_between.fetch_add(under_way, Ordering::Relaxed);
        Ok(())
    }
    fn multiply(&mut self, _: u32, _: &[u32], _: &mut Vec<u32>) -> Result<(), BackendError> {
        Err(BackendError::Device("nothing was to overlap".into()))
    }
    fn overlapping(&mut self) -> Option<&mut dyn Overlapping> {
        Some(self)
    }
}

impl Overlapping for Lanes {
    fn most(&self) -> usize {
        MOST
    }
    fn begin(&mut self, matrix: u32, elements: &[u32]) -> Result<(), BackendError> {
        let mut begun = self.begun.lock().unwrap();
        begun.push_back((matrix, elements[0]));
        self.together.fetch_max(begun.len(), Ordering::Relaxed);
        drop(begun);
        // So that the next has a chance to arrive.
        thread::sleep(Duration::from_millis(5));
        Ok(())
    }
    fn finish(&mut self, out: &mut Vec<u32>) -> Result<(), BackendError> {
        let (matrix, first) = self.begun.lock().unwrap().pop_front().unwrap();
        *out = vec![first + matrix, 7];
        Ok(())
    }
}

/// Answers are those of their requests, in their order, whatever overlapped; matrices are loaded between products.
#[test]
fn products_overlap_and_are_answered_in_order() {
    let lanes = Lanes::default();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = lanes.clone();
    let serving =
        thread::spawn(move || serve(Timed::unix(theirs), &device, 1 << 20, &Limits::default()));
    let mut stream = Timed::unix(ours);
    stream.within(Some(PATIENCE));
    let mut client = Client::open(stream, Field::P29, MIN_PAYLOAD).unwrap();
    let shape = Shape {
        rows: 2,
        columns: 1,
    };
    let window = u32::from(client.welcome().window);
    let deadline = Instant::now() + PATIENCE;
    let mut products = 0;
    let mut matrices = 0;
    while lanes.together.load(Ordering::Relaxed) < MOST {
        assert!(Instant::now() < deadline, "nothing overlaps");
        let matrix = client.load(shape, |_, out| out.fill(1), |_| ()).unwrap();
        matrices += 1;
        for i in 0..window {
            client.multiply(matrix, &[100 * i]).unwrap();
        }
        for i in 0..window {
            let mut found = [0; 2];
            client.product(&mut found).unwrap();
            assert_eq!(found, [100 * i + matrix, 7]);
            products += 1;
        }
    }
    drop(client);
    let served = serving.join().unwrap().unwrap();
    assert_eq!((served.matrices, served.products), (matrices, products));
    assert_eq!(lanes.together.load(Ordering::Relaxed), MOST);
    assert_eq!(lanes.loads_between.load(Ordering::Relaxed), 0);
}
