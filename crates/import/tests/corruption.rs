//! Damaged files: whatever bytes change, an import ends with a model or an error, never with a panic, and never
//! takes memory out of proportion. One test only, because it watches the memory of the whole process.

mod support;

use std::cell::Cell;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use support::directory::Model;
use support::gguf::Gguf;
use support::sentencepiece;

/// How much more address space the damaged files may take than the most that was taken before them. That is some 64 MiB
/// more than is in use, because of how the allocator starts threads; an array of the most elements has 96 MiB.
const ALLOWED_KIB: u64 = 16 << 10;

/// One damage to a file.
#[derive(Debug, Clone)]
enum Damage {
    Flip {
        at: usize,
        bit: u8,
    },
    /// Eight bytes become a number that hurts: huge, negative, just beyond.
    Number {
        at: usize,
        value: u64,
    },
    Cut {
        at: usize,
    },
    Insert {
        at: usize,
        bytes: Vec<u8>,
    },
    Repeat {
        at: usize,
        length: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<usize>;
    let number = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 63),
        Just((1 << 63) - 1),
        Just(1 << 40),
        Just(1 << 31),
        Just(u64::from(u32::MAX)),
        0..100_000u64,
    ];
    prop_oneof![
        4 => (at(), 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        4 => (at(), number).prop_map(|(at, value)| Damage::Number { at, value }),
        1 => at().prop_map(|at| Damage::Cut { at }),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
        1 => (at(), 1..64usize).prop_map(|(at, length)| Damage::Repeat { at, length }),
    ]
}

impl Damage {
    /// `head` is the part where damage tells: what is behind it is only data.
    fn apply(&self, file: &mut Vec<u8>, head: usize) {
        let place = |at: usize| at % head.min(file.len()).max(1);
        match self {
            Self::Flip { at, bit } => {
                let at = place(*at);
                if let Some(byte) = file.get_mut(at) {
                    *byte ^= 1 << bit;
                }
            }
            Self::Number { at, value } => {
                let at = place(*at);
                for (byte, new) in file.iter_mut().skip(at).zip(value.to_le_bytes()) {
                    *byte = new;
                }
            }
            Self::Cut { at } => {
                let at = place(*at);
                file.truncate(at);
            }
            Self::Insert { at, bytes } => {
                let at = place(*at).min(file.len());
                file.splice(at..at, bytes.iter().copied());
            }
            Self::Repeat { at, length } => {
                let at = place(*at).min(file.len());
                let end = (at + length).min(file.len());
                let again = file[at..end].to_vec();
                file.splice(at..at, again);
            }
        }
    }
}

/// The largest address space that this process has had, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmPeak:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Imports `model` with `target` damaged in `cases` ways; returns how many were refused.
fn damaged(model: &Path, target: &Path, head: usize, cases: u32) -> u32 {
    let sound = fs::read(target).unwrap();
    let refused = Cell::new(0);
    let mut runner = TestRunner::new_with_rng(
        Config {
            cases,
            failure_persistence: None,
            ..Config::default()
        },
        TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]),
    );
    let outcome = runner.run(&prop::collection::vec(damage(), 1..4), |damages| {
        let mut file = sound.clone();
        for damage in damages {
            damage.apply(&mut file, head);
        }
        fs::write(target, &file).unwrap();
        match casemate_import::open(model) {
            Err(error) => {
                // The words are made without a panic, too.
                assert!(!error.to_string().is_empty());
                refused.set(refused.get() + 1);
            }
            Ok(model) => {
                // What is accepted can be read.
                for (index, tensor) in model.tensors().iter().enumerate() {
                    let mut bytes = vec![0; tensor.size as usize];
                    model.read_tensor(index, 0, &mut bytes).unwrap();
                }
            }
        }
        Ok(())
    });
    fs::write(target, sound).unwrap();
    outcome.unwrap();
    refused.get()
}

/// Writes numbers near the limits over every place of the front of `file`, among them the lengths of strings and arrays.
fn lies(file: &Path, front: usize) -> u32 {
    let sound = fs::read(file).unwrap();
    let mut refused = 0;
    for at in 0..front {
        for value in [4 << 20, 1u64 << 40] {
            let mut lying = sound.clone();
            lying[at..at + 8].copy_from_slice(&value.to_le_bytes());
            fs::write(file, lying).unwrap();
            refused += u32::from(casemate_import::open(file).is_err());
        }
    }
    fs::write(file, sound).unwrap();
    refused
}

#[test]
fn damage_never_panics_and_never_takes_much_memory() {
    let (_gguf, gguf) = Gguf::tiny().write();
    let (_byte_level, byte_level) = Gguf::tiny_byte_level().write();
    let (_directory, directory) = Model::tiny().write();
    let mut with_model = Model::tiny();
    with_model.files.clear();
    with_model.file("tokenizer.model", sentencepiece::Model::tiny().write());
    let (_with_model, with_model) = with_model.write();
    for path in [&gguf, &byte_level, &directory, &with_model] {
        support::open(path);
    }
    let before = peak_kib();

    let header = |path: &Path| {
        let weights = fs::read(path).unwrap();
        8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize
    };
    let weights = directory.join("model.safetensors");
    let runs = [
        // The header of the tiny GGUF is 8 KiB.
        ("gguf", damaged(&gguf, &gguf, 9000, 1500), 1000),
        // Up to the length of the array of tokens and somewhat beyond.
        ("gguf lengths", lies(&gguf, 700), 1000),
        ("gguf counts", damaged(&gguf, &gguf, 64, 300), 250),
        (
            "byte-level gguf",
            damaged(&byte_level, &byte_level, 9000, 1000),
            500,
        ),
        (
            "safetensors",
            damaged(&directory, &weights, header(&weights), 1000),
            800,
        ),
        (
            "config.json",
            damaged(&directory, &directory.join("config.json"), usize::MAX, 500),
            300,
        ),
        (
            "tokenizer.json",
            damaged(
                &directory,
                &directory.join("tokenizer.json"),
                usize::MAX,
                800,
            ),
            500,
        ),
        (
            "tokenizer.model",
            damaged(
                &with_model,
                &with_model.join("tokenizer.model"),
                usize::MAX,
                800,
            ),
            500,
        ),
    ];
    for (name, refused, at_least) in runs {
        eprintln!("{name}: {refused} refused");
        assert!(refused >= at_least, "{name}: the damage hardly tells");
    }
    let grown = peak_kib() - before;
    eprintln!("address space grew by {grown} KiB");
    assert!(grown < ALLOWED_KIB, "address space grew by {grown} KiB");
}
