//! The detectors over what really passes: engines that send products out, through the wire, to workers that multiply; a tap
//! in front of each writes down every message. Boot keys and texts are fixed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use casemate_container::{ModelConfig, Silent};
use casemate_engine::outsource::Outsource;
use casemate_engine::{Compute, Engine};
use casemate_field::Field;
use casemate_testkit::tap::{Seen, Tap};
use casemate_testkit::uniform::{Bits, chi_square};
use casemate_wire::Address;
use casemate_worker::backend::cpu::Cpu;
use casemate_worker::connection::Limits;
use casemate_worker::listener::{Listener, Places, serve};
use tempfile::TempDir;

use crate::detectors::{ELEMENTS, FINDING, area_under_curve, pairs_with_one_pad};
use crate::keys::BootKey;
use crate::layers::Layers;
use crate::link::{Connect, Transport};
use crate::offload::{Config, Offload, Workers};
use crate::pad::Pads;
use crate::plan::Preset;
use crate::tls::Encrypted;

#[path = "../../engine/tests/support/mod.rs"]
mod support;

use support::tiny::{Tiny, llama};
use support::{open_with, options};

const PATIENCE: Duration = Duration::from_secs(120);

/// A sampler that is broken on purpose.
type Broken = fn(Field, &mut [u32]);

/// A model, the workers that help it, and who stands before them.
struct Setting {
    engine: Engine,
    offload: Arc<Offload>,
    taps: Vec<Tap>,
    model: Tiny,
    // After all who have sockets in it.
    _folder: TempDir,
}

/// Multiplies in this process for as long as it lives.
fn worker(path: &Path) -> Address {
    let address = Address::Unix(path.to_path_buf());
    let listener = Listener::bind(&address).unwrap();
    let places = Arc::new(Places {
        device: Arc::new(Cpu::new(1).unwrap()),
        count: 1,
        memory: 1 << 30,
        limits: Limits::default(),
        identity: None,
    });
    std::thread::spawn::<_, ()>(move || serve(&listener, &places));
    address
}

impl Setting {
    fn new(config: ModelConfig, workers: usize, broken: Option<Broken>) -> Setting {
        let folder = tempfile::tempdir().unwrap();
        let tap = |number: usize| {
            let path = |name: &str| folder.path().join(format!("{name}{number}"));
            Tap::start(&path("tap"), worker(&path("worker"))).unwrap()
        };
        let taps: Vec<Tap> = (0..workers).map(tap).collect();
        let connect = |tap: &Tap| -> Connect {
            let address = tap.address();
            Box::new(move || Ok(Box::new(address.connect(PATIENCE)?) as Box<dyn Transport>))
        };
        let to = match &taps[..] {
            [one] => Workers::One(connect(one)),
            [one, two] => Workers::Two([one, two].map(|tap| Encrypted::not_at_all(connect(tap)))),
            _ => unreachable!("one worker or two"),
        };
        let limits = Config {
            pool_bytes: 64 << 20,
            reserve: 0,
            patience: PATIENCE,
            waiting: PATIENCE,
            ..Config::default()
        };
        let boot = || BootKey::of(*b"a fixed key for fixed messages. ");
        let mut offload = Offload::new(limits, boot(), to, Box::new(|_| {}));
        if let Some(broken) = broken {
            offload = offload.with_pads(Pads::broken(&boot(), broken));
        }
        let offload = Arc::new(offload);
        let layers = Arc::new(Layers::new(Arc::clone(&offload), Preset::FullLinear));
        let model = Tiny::new(config, 3);
        let container = open_with(&model, vec!["*".into()]);
        let outsource = Arc::clone(&layers) as Arc<dyn Outsource>;
        let options = options(Compute::Int8Row);
        let engine = Engine::load_with(container, vec![], &options, Some(outsource), &Silent);
        let engine = engine.unwrap();
        layers.start().unwrap();
        assert!(offload.wait(PATIENCE), "no worker");
        Setting {
            engine,
            offload,
            taps,
            model,
            _folder: folder,
        }
    }

    /// Waits until there are masks for so many rows; none are needed where there are two workers.
    fn wait_for_masks(&self, rows: usize) {
        for _ in 0..100_000 {
            if self.taps.len() == 2 || self.offload.metrics().masks_level >= rows as u64 {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no masks: {:?}", self.offload.metrics());
    }

    fn read(&self, text: &[u32]) {
        self.wait_for_masks(text.len());
        self.engine.evaluate(text, |_, _| ()).unwrap();
    }

    /// What passed, all of it and without a hole.
    fn seen(&self) -> Vec<Seen> {
        let metrics = self.offload.metrics();
        let faults = metrics.failures + metrics.misconduct + metrics.rows_recomputed;
        assert_eq!((faults, metrics.rows_without_masks), (0, 0), "{metrics:?}");
        let seen: Vec<Seen> = self.taps.iter().map(Tap::take).collect();
        let kept = |seen: &Seen| seen.messages.iter().all(|m| !m.elements.is_empty());
        assert!(seen.iter().all(kept));
        seen
    }

    /// Transcripts of texts of 256 tokens, of at least [`ELEMENTS`] numbers, by workers. Texts are as different as they get:
    /// one token for ever, and many.
    fn transcripts(&self, row: usize) -> Vec<Seen> {
        let rows = (ELEMENTS / row).next_multiple_of(256);
        for number in 0..rows / 256 {
            let text = match number % 2 {
                0 => self.model.prompt(256, number as u64 + 1),
                _ => vec![3 + number as u32; 256],
            };
            self.read(&text);
        }
        self.seen()
    }
}

/// Wide enough for 10^7 numbers in some thousand rows of 2560 and, with the head, 3072.
fn narrow() -> (ModelConfig, usize) {
    let config = ModelConfig {
        hidden: 512,
        layers: 1,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        ffn: 1024,
        ..llama()
    };
    (config, 3072)
}

/// Too wide for the smaller field.
fn wide() -> (ModelConfig, usize) {
    let config = ModelConfig {
        hidden: 64,
        layers: 1,
        ffn: 16_704,
        ..llama()
    };
    (config, 4 * 64 + 16_704)
}

/// Distances from uniform by high and by low bits.
fn distances(seen: &Seen) -> [f64; 2] {
    let field = seen.connections[0].field;
    [Bits::High, Bits::Low].map(|bits| chi_square(field, bits, 16, seen.elements()))
}

/// Rows of all matrices that were sent under one pad with another.
fn pairs(seen: &Seen) -> usize {
    let opened = &seen.connections[0];
    let of = |matrix: usize| {
        let columns = opened.matrices[matrix].columns as usize;
        let messages = seen.messages.iter().filter(|m| m.matrix as usize == matrix);
        let rows: Vec<&[u32]> = messages.flat_map(|m| m.elements.chunks(columns)).collect();
        pairs_with_one_pad(opened.field, &rows)
    };
    (0..opened.matrices.len()).map(of).sum()
}

#[test]
fn all_that_passes_to_workers_is_uniform_and_under_pads_of_its_own() {
    for (field, (config, row)) in [(Field::P29, narrow()), (Field::P31, wide())] {
        for workers in [1, 2] {
            let setting = Setting::new(config.clone(), workers, None);
            for (number, seen) in setting.transcripts(row).iter().enumerate() {
                let what = format!("{field:?}, {} of {workers} workers", number + 1);
                assert_eq!(seen.connections[0].field, field, "{what}");
                assert!(seen.elements().count() >= ELEMENTS, "{what}");
                let distances = distances(seen);
                assert!(
                    distances.iter().all(|d| d.abs() < FINDING),
                    "{what}: {distances:?}"
                );
                assert_eq!(pairs(seen), 0, "{what}");
            }
        }
    }
}

#[test]
fn broken_pads_show_in_what_passes() {
    let (config, row) = narrow();
    let seen = |broken: Broken| {
        let setting = Setting::new(config.clone(), 1, Some(broken));
        setting.transcripts(row).remove(0)
    };
    // One element in 32 is halved.
    let [high, _] = distances(&seen(|_, pad| {
        pad.iter_mut()
            .filter(|x| **x % 32 == 5)
            .for_each(|x| *x /= 2);
    }));
    assert!(high > 2.0 * FINDING, "{high}");
    // One in 64 has four of its lower bits cleared.
    let [_, low] = distances(&seen(|_, pad| {
        pad.iter_mut()
            .filter(|x| (**x >> 16) % 64 == 5)
            .for_each(|x| *x &= !0xF000);
    }));
    assert!(low > 2.0 * FINDING, "{low}");
    // One pad in some hundred is always the same.
    let again = seen(|_, pad| {
        if pad[0] % 128 == 5 {
            pad.iter_mut()
                .zip(1..)
                .for_each(|(x, i)| *x = i * 104_729 % (1 << 29));
        }
    });
    assert!(pairs(&again) > 0, "a pad that is used again is not found");
}

/// Tokens of each of two texts of one length, and rows of the first matrix of a transcript.
const STEPS: usize = 4;

/// What a classifier makes of transcripts of two texts that were told apart by nothing else: the area under its curve.
fn told_apart(broken: Option<Broken>, count: usize) -> f64 {
    let config = llama();
    let width = config.hidden as usize;
    let setting = Setting::new(config, 1, broken);
    let texts = [
        setting.model.prompt(STEPS, 21),
        setting.model.prompt(STEPS, 22),
    ];
    assert_ne!(texts[0], texts[1]);
    let sets = || {
        texts.each_ref().map(|text| {
            let mut features = Vec::with_capacity(count * 2 * STEPS * width);
            for _ in 0..count {
                setting.read(text);
            }
            let seen = setting.seen().remove(0);
            let field = seen.connections[0].field;
            let messages = seen.messages.iter().filter(|m| m.matrix == 0);
            for x in messages.flat_map(|m| &m.elements) {
                features.push(field.centre(*x) as f32);
                features.push((x & 0xFF) as f32);
            }
            assert_eq!(features.len(), count * 2 * STEPS * width);
            features
        })
    };
    let (train, held_out) = (sets(), sets());
    area_under_curve(&train, &held_out, 2 * STEPS * width)
}

#[test]
fn transcripts_of_two_texts_are_not_told_apart() {
    let area = told_apart(None, 5000);
    assert!((area - 0.5).abs() < 0.02, "{area}");
}

#[test]
fn transcripts_under_short_pads_are_told_apart() {
    let area = told_apart(
        Some(|_, pad| pad.iter_mut().for_each(|x| *x %= 1 << 10)),
        500,
    );
    assert!(area > 0.9, "{area}");
}
