//! An engine, the real worker program, and between them somebody who alters exactly one thing at a time. No token
//! ever changes, and each alteration is noticed, told, and costs the worker its connection.

#[path = "../../engine/tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use casemate_container::Silent;
use casemate_engine::outsource::Outsource;
use casemate_engine::{Compute, Engine};
use casemate_offload::layers::Layers;
use casemate_offload::plan::Preset;
use casemate_offload::{BootKey, Config, Event, Fault, Offload, Transport, Workers};
use casemate_testkit::deployment::{Deployment, Launch, Program};
use casemate_wire::{Address, Timed};

use support::tiny::{Random, Tiny, llama};
use support::{generate, greedy, load, open_with, options};

/// Far beyond what anything takes; only a failure waits so long.
const PATIENCE: Duration = Duration::from_secs(120);

const HEADER: usize = 16;
const PART: u8 = 5;
const LOADED: u8 = 6;
const MULTIPLY: u8 = 7;
const PRODUCT: u8 = 8;
/// Of the payload of MULTIPLY and PRODUCT, what comes before the elements.
const WHICH: usize = 8;

/// What is altered, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Alteration {
    /// One bit of one element of an answer.
    Bit,
    /// Two rows of an answer change places; of one row, two elements.
    Swap,
    /// All elements move on by one.
    Rotate,
    /// All elements are zero.
    Zero,
    /// An earlier answer for as many rows of the same matrix.
    Replay,
    /// An element that is none.
    NoElement,
    /// One element of the rows on their way to the worker.
    Row,
    /// Earlier rows on their way to the worker.
    OldRows,
    /// The number of the request.
    Id,
    /// The matrix that an answer names.
    Matrix,
    /// The number of rows that it names.
    Rows,
    /// Something where zero must be.
    Reserved,
    /// The type of the frame.
    Kind,
    /// The field.
    Field,
    /// A length beyond what is due.
    Oversize,
    /// A length below what is due.
    Short,
    /// The same answer twice.
    Twice,
    /// Random bytes.
    Garbage,
    /// A refusal.
    Refusal,
    /// The connection ends somewhere in an answer.
    Cut,
    /// A weight on its way to the worker, which then says the digest of the right ones.
    Weight,
    /// A digest.
    Digest,
    /// An answer comes too late.
    Delay,
    /// No answer comes.
    Hang,
}

use Alteration::*;

const OF_PRODUCTS: [Alteration; 20] = [
    Bit, Swap, Rotate, Zero, Replay, NoElement, Row, OldRows, Id, Matrix, Rows, Reserved, Kind,
    Field, Oversize, Short, Twice, Garbage, Refusal, Cut,
];

impl Alteration {
    /// As what it may be noticed.
    fn noticed(self) -> &'static [Fault] {
        match self {
            // What is no element any more is noticed before the product is checked.
            Bit => &[Fault::WrongProduct, Fault::Malformed],
            Swap | Rotate | Zero | Replay | Weight => &[Fault::WrongProduct],
            // The worker may refuse what is no element.
            Row => &[Fault::WrongProduct],
            OldRows => &[Fault::WrongProduct],
            NoElement | Id | Matrix | Rows | Reserved | Kind | Field | Oversize | Short | Twice => {
                &[Fault::Malformed]
            }
            // It may happen to look like a frame that was cut off.
            Garbage => &[Fault::Malformed, Fault::Unreachable],
            // Who has more to send may find the connection closed before it hears why.
            Refusal => &[Fault::Refused, Fault::Unreachable],
            Cut => &[Fault::Unreachable],
            Digest => &[Fault::OtherWeights],
            Delay | Hang => &[Fault::Late],
        }
    }
}

/// Who stands between.
#[derive(Clone)]
struct Between(Arc<Mutex<State>>);

struct State {
    random: Random,
    /// What to alter of a product, after so many chances.
    armed: Option<(Alteration, u32)>,
    /// What to alter while matrices are loaded, likewise.
    loading: Option<(Alteration, u32)>,
    /// How often something was altered.
    fired: u32,
    /// What the worker answered, and what it was asked, last, by matrix and number of rows.
    answers: HashMap<[u8; WHICH], Vec<u8>>,
    asked: HashMap<[u8; WHICH], Vec<u8>>,
    /// The right digests.
    digests: HashMap<u64, Vec<u8>>,
}

/// A frame: header and payload.
struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    fn read(from: &mut impl Read) -> io::Result<Frame> {
        let mut bytes = vec![0; HEADER];
        from.read_exact(&mut bytes)?;
        let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        bytes.resize(HEADER + length as usize, 0);
        from.read_exact(&mut bytes[HEADER..])?;
        Ok(Frame { bytes })
    }

    fn kind(&self) -> u8 {
        self.bytes[0]
    }

    fn id(&self) -> u64 {
        u64::from_le_bytes(self.bytes[8..16].try_into().unwrap())
    }

    fn which(&self) -> [u8; WHICH] {
        self.bytes[HEADER..HEADER + WHICH].try_into().unwrap()
    }

    fn rows(&self) -> usize {
        u16::from_le_bytes(self.bytes[HEADER + 4..HEADER + 6].try_into().unwrap()).into()
    }

    fn elements(&mut self) -> &mut [[u8; 4]] {
        self.bytes[HEADER + WHICH..].as_chunks_mut::<4>().0
    }
}

impl Between {
    fn new(seed: u64) -> Between {
        Between(Arc::new(Mutex::new(State {
            random: Random(seed),
            armed: None,
            loading: None,
            fired: 0,
            answers: HashMap::new(),
            asked: HashMap::new(),
            digests: HashMap::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn arm(&self, what: Alteration, chances: u32) {
        self.state().armed = Some((what, chances));
    }

    /// A connection to the worker through here.
    fn connect(&self, worker: &Address) -> io::Result<Box<dyn Transport>> {
        let Address::Unix(path) = worker else {
            panic!("a Unix socket");
        };
        let far = UnixStream::connect(path)?;
        let (near, ours) = UnixStream::pair()?;
        for up in [true, false] {
            let (from, to) = if up { (&ours, &far) } else { (&far, &ours) };
            let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
            let between = self.clone();
            // It ends with the connection.
            thread::spawn(move || {
                let _ = between.pass(up, &mut from, &mut to);
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
        Ok(Box::new(Timed::unix(near)))
    }

    fn pass(&self, up: bool, from: &mut UnixStream, to: &mut UnixStream) -> io::Result<()> {
        loop {
            let frame = Frame::read(from)?;
            let (bytes, then) = match up {
                true => (self.state().up(frame), Then::GoOn),
                false => self.state().down(frame),
            };
            match then {
                Then::Wait(time) => thread::sleep(time),
                Then::GoOn | Then::End => {}
            }
            to.write_all(&bytes)?;
            if let Then::End = then {
                return Ok(());
            }
        }
    }
}

enum Then {
    GoOn,
    Wait(Duration),
    End,
}

impl State {
    /// Whether it is time for one of these.
    fn fires(&mut self, may: impl Fn(Alteration) -> bool) -> Option<Alteration> {
        let armed = match self.loading.is_some_and(|(what, _)| may(what)) {
            true => &mut self.loading,
            false => &mut self.armed,
        };
        let (what, chances) = armed.as_mut()?;
        if !may(*what) {
            return None;
        }
        if *chances > 0 {
            *chances -= 1;
            return None;
        }
        let what = *what;
        *armed = None;
        self.fired += 1;
        Some(what)
    }

    fn up(&mut self, mut frame: Frame) -> Vec<u8> {
        match frame.kind() {
            PART if self.fires(|what| what == Weight).is_some() => {
                let at = HEADER + self.random.below(frame.bytes.len() - HEADER);
                let weight = frame.bytes[at] as i8;
                frame.bytes[at] = if weight > 0 { weight - 1 } else { weight + 1 } as u8;
            }
            MULTIPLY => {
                let which = frame.which();
                let old = self.asked.get(&which).cloned();
                self.asked.insert(which, frame.bytes[HEADER..].to_vec());
                let may = |what: Alteration| what == Row || what == OldRows && old.is_some();
                match self.fires(may) {
                    Some(Row) => {
                        let at = self.random.below(frame.elements().len());
                        let element = &mut frame.elements()[at];
                        // Another one below p, whichever p it is.
                        element[0] ^= 1;
                        element[3] &= 0x0f;
                    }
                    Some(_) => frame.bytes[HEADER..].copy_from_slice(&old.unwrap()),
                    None => {}
                }
            }
            _ => {}
        }
        frame.bytes
    }

    fn down(&mut self, mut frame: Frame) -> (Vec<u8>, Then) {
        match frame.kind() {
            LOADED => {
                let right = self.digests.entry(frame.id());
                // Whoever alters weights has seen the right ones before.
                let right = right.or_insert_with(|| frame.bytes[HEADER..].to_vec());
                frame.bytes[HEADER..].copy_from_slice(right);
                if self.fires(|what| what == Digest).is_some() {
                    let at = HEADER + self.random.below(32);
                    frame.bytes[at] ^= 1 << self.random.below(8);
                }
                (frame.bytes, Then::GoOn)
            }
            PRODUCT => {
                let which = frame.which();
                let old = self.answers.get(&which).cloned();
                self.answers.insert(which, frame.bytes[HEADER..].to_vec());
                let upstream = [Row, OldRows, Weight, Digest];
                let may = |what: Alteration| {
                    !upstream.contains(&what) && (what != Replay || old.is_some())
                };
                match self.fires(may) {
                    Some(what) => self.alter(what, frame, old),
                    None => (frame.bytes, Then::GoOn),
                }
            }
            _ => (frame.bytes, Then::GoOn),
        }
    }

    fn alter(
        &mut self,
        what: Alteration,
        mut frame: Frame,
        old: Option<Vec<u8>>,
    ) -> (Vec<u8>, Then) {
        let before = frame.bytes.clone();
        let length = frame.bytes.len() - HEADER;
        let set_length = |frame: &mut Frame, length: usize| {
            frame.bytes[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        };
        let count = frame.elements().len();
        let mut then = Then::GoOn;
        match what {
            Bit => {
                let (at, bit) = (self.random.below(count), self.random.below(32));
                frame.elements()[at][bit / 8] ^= 1 << (bit % 8);
            }
            Swap => match frame.rows() {
                1 => {
                    let other = frame.elements()[1..]
                        .iter()
                        .position(|x| *x != before[24..28]);
                    frame.elements().swap(0, 1 + other.unwrap());
                }
                rows => frame.elements().rotate_left(count / rows),
            },
            Rotate => frame.elements().rotate_left(1),
            Zero => frame.elements().fill([0; 4]),
            Replay => frame.bytes[HEADER..].copy_from_slice(&old.unwrap()),
            NoElement => frame.elements()[self.random.below(count)] = u32::MAX.to_le_bytes(),
            Id => frame.bytes[8] ^= 1 << self.random.below(8),
            Matrix => frame.bytes[HEADER] ^= 1,
            Rows => frame.bytes[HEADER + 4] ^= 1 << self.random.below(8),
            Reserved => {
                let places = [2, 3, HEADER + 6, HEADER + 7];
                frame.bytes[places[self.random.below(4)]] = 1;
            }
            Kind => frame.bytes[0] = [0, 2, 4, 6, 7, 10, 255][self.random.below(7)],
            Field => frame.bytes[1] = [0, 2, 3, 255][self.random.below(4)],
            Oversize => {
                let more = [1, 4, 1 << 20, u32::MAX as usize - length][self.random.below(4)];
                set_length(&mut frame, length + more);
            }
            Short => {
                frame.bytes.truncate(HEADER + length - 4);
                set_length(&mut frame, length - 4);
            }
            Twice => frame.bytes.extend_from_slice(&before),
            Garbage => {
                frame.bytes = (0..64).map(|_| self.random.next() as u8).collect();
                // One that asks for a wait is another alteration.
                frame.bytes[0] |= 0x10;
            }
            Refusal => {
                frame.bytes = vec![9, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0];
                then = Then::End;
            }
            Cut => {
                let at = self.random.below(before.len());
                frame.bytes.truncate(at);
                then = Then::End;
            }
            Delay => return (frame.bytes, Then::Wait(Duration::from_secs(4))),
            Hang => return (vec![], Then::Wait(Duration::from_secs(6))),
            Row | OldRows | Weight | Digest => unreachable!("not of an answer"),
        }
        assert!(frame.bytes != before, "{what:?} altered nothing");
        (frame.bytes, then)
    }
}

/// The worker program, and an engine that reaches it through somebody.
struct Stage {
    between: Between,
    here: Engine,
    there: Engine,
    offload: Arc<Offload>,
    events: Arc<Mutex<Vec<Event>>>,
    model: Tiny,
    _program: Program,
    _directory: tempfile::TempDir,
}

fn stage(config: Config) -> Stage {
    let programs = Deployment::programs_of_this_build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("worker.sock");
    let program = Launch::new("casemate-worker", programs.join("casemate-worker"))
        .option("--listen", format!("unix:{}", socket.display()))
        .option("--backend", "cpu")
        .option("--threads", "1")
        .option("--connections", "16")
        .option("--memory", "4GiB")
        .serve(directory.path(), PATIENCE)
        .expect(
            "casemate-worker is built; run `cargo build --workspace --bins` or `cargo xtask test`",
        );
    let address: Address = program.address().parse().unwrap();

    let model = Tiny::new(llama(), 3);
    let here = load(&model, &options(Compute::Int8Row));
    let between = Between::new(7);
    let events = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&events);
    let through = between.clone();
    let workers = Workers::One(Box::new(move || through.connect(&address)));
    let observer = Box::new(move |event| told.lock().unwrap().push(event));
    let boot = BootKey::new([5; 32].into());
    let offload = Arc::new(Offload::new(config, boot, workers, observer));
    let layers = Arc::new(Layers::new(Arc::clone(&offload), Preset::FullLinear));
    let container = open_with(&model, vec!["*".into()]);
    let outsource = Arc::clone(&layers) as Arc<dyn Outsource>;
    let engine = Engine::load_with(
        container,
        vec![],
        &options(Compute::Int8Row),
        Some(outsource),
        &Silent,
    );
    layers.start().unwrap();
    Stage {
        between,
        here,
        there: engine.unwrap(),
        offload,
        events,
        model,
        _program: program,
        _directory: directory,
    }
}

/// Admits whoever it is again at once, and waits for nobody longer than a failed test would.
fn forgiving() -> Config {
    Config {
        pool_bytes: 1 << 20,
        patience: PATIENCE,
        waiting: PATIENCE * 100,
        aside: Duration::ZERO,
        readmissions: u32::MAX,
        quarantine: Duration::ZERO,
        retry: Duration::ZERO,
        // Prompts are several messages, too.
        rows_at_once: 2,
        reserve: 0,
        ..Config::default()
    }
}

impl Stage {
    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(
                Instant::now() < end,
                "not in time: {what}; {:?}",
                self.faults()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The worker holds all matrices, and there are masks.
    fn ready(&self) {
        assert!(self.offload.wait(PATIENCE), "{:?}", self.faults());
        let enough = || self.offload.metrics().masks_level >= 24;
        // Idle time, which makes them, comes after requests.
        self.until("masks", enough);
    }

    /// What was told of faults.
    fn faults(&self) -> Vec<Event> {
        let events = self.events.lock().unwrap();
        let faults = events
            .iter()
            .filter(|event| !matches!(event, Event::Admitted { .. }));
        faults.copied().collect()
    }

    /// Alters one thing while an answer is generated, which stays what it is; what was told of it.
    fn round(&self, number: u64, what: Alteration, chances: u32) -> Fault {
        self.ready();
        let before = self.faults().len();
        self.between.arm(what, chances);
        let fired = self.between.state().fired;
        let prompt = self.model.prompt(2 + number as usize % 5, number % 16);
        let mut asked = 0;
        while self.between.state().fired == fired {
            assert!(asked < 20, "{what:?} never came about");
            asked += 1;
            self.same(&prompt);
        }
        // One that shows with the next answer only.
        while self.faults().len() == before {
            assert!(asked < 40, "{what:?} went unnoticed");
            asked += 1;
            self.ready();
            self.same(&prompt);
            thread::sleep(Duration::from_millis(1));
        }
        let (told, fault) = match self.faults()[before] {
            Event::Quarantined { fault, .. } => (true, fault),
            Event::Failed { fault, .. } | Event::SetAside { fault, .. } => (false, fault),
            other => panic!("{what:?}: {other:?}"),
        };
        assert_eq!(
            told,
            fault.is_misconduct(),
            "{what:?}: who cheats is quarantined"
        );
        assert!(what.noticed().contains(&fault), "{what:?}: {fault:?}");
        fault
    }

    /// Alters one thing while matrices are loaded, which is noticed at once or with a product.
    fn while_loading(&self, what: Alteration, chances: u32) {
        self.ready();
        let before = self.faults().len();
        self.between.state().loading = Some((what, chances));
        // The next connection is the one to be spoiled.
        self.between.arm(Cut, 0);
        for asked in 0.. {
            let faults = self.faults();
            let noticed = |event: &Event| match *event {
                Event::Quarantined { fault, .. } => what.noticed().contains(&fault),
                _ => false,
            };
            if faults[before..].iter().any(noticed) {
                break;
            }
            assert!(asked < 60, "{what:?} went unnoticed: {faults:?}");
            self.same(&self.model.prompt(3, asked));
            self.ready();
        }
        let state = self.between.state();
        assert!(state.loading.is_none() && state.armed.is_none());
    }

    /// The same tokens as without any worker.
    fn same(&self, prompt: &[u32]) {
        let expected = generate(&self.here, greedy(prompt, 3));
        assert_eq!(generate(&self.there, greedy(prompt, 3)), expected);
    }
}

/// More than a thousand, each alone.
#[test]
fn no_single_fault_of_a_thousand_changes_a_token_or_goes_unnoticed() {
    const TIMES: u64 = 52;
    let stage = stage(forgiving());
    let mut random = Random(11);
    let mut noticed: HashMap<(Alteration, Fault), u32> = HashMap::new();
    let mut faults = 0;
    // The worker has been asked everything once, so that there are answers to replay.
    stage.ready();
    stage.same(&stage.model.prompt(6, 1));
    for time in 0..TIMES {
        for what in OF_PRODUCTS {
            // Any product of the answer, but for those that come back to an earlier one.
            let chances = random.below(20) as u32;
            let fault = stage.round(faults, what, chances);
            *noticed.entry((what, fault)).or_default() += 1;
            faults += 1;
        }
        if time % 4 == 0 {
            for what in [Digest, Weight] {
                stage.while_loading(what, random.below(9) as u32);
                *noticed.entry((what, what.noticed()[0])).or_default() += 1;
                faults += 1;
            }
        }
    }
    let mut lines: Vec<String> = noticed
        .iter()
        .map(|(what, count)| format!("{what:?}: {count}"))
        .collect();
    lines.sort_unstable();
    eprintln!("{faults} faults, all noticed:\n{}", lines.join("\n"));
    assert!(faults >= 1000);
    for what in OF_PRODUCTS.into_iter().chain([Digest, Weight]) {
        assert!(noticed.keys().any(|(seen, _)| *seen == what), "{what:?}");
    }
    let metrics = stage.offload.metrics();
    assert!(metrics.misconduct >= faults * 3 / 4, "{metrics:?}");
    assert!(
        metrics.rows_outside > faults,
        "the worker was of use in between: {metrics:?}"
    );
}

/// They take their time, so there are few.
#[test]
fn answers_that_come_too_late_or_never_change_no_token() {
    let stage = stage(Config {
        patience: Duration::from_secs(2),
        ..forgiving()
    });
    for (number, what) in [Delay, Hang, Delay, Hang].into_iter().enumerate() {
        stage.round(number as u64, what, 3 * number as u32);
    }
    let metrics = stage.offload.metrics();
    assert!(metrics.set_aside >= 4, "{metrics:?}");
    assert_eq!(metrics.misconduct, 0);
}
