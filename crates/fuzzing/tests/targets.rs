//! What fuzzers find stays found: every target runs over its seeds, over seeds with damage, and over the inputs that
//! once broke it; and `fuzz/` wires every target.

use std::fs;
use std::path::Path;

use casemate_fuzzing::{TARGETS, Target, regressions};

const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");

/// Damaged variants tried per seed. The fuzzers try millions; these show that targets and seeds fit each other.
const VARIANTS: usize = 12;

fn target(name: &str) -> &'static Target {
    let found = TARGETS.iter().find(|target| target.name == name);
    found.expect("the name of a target")
}

fn survive(name: &str) {
    let target = target(name);
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty());
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize
    };
    for seed in &seeds {
        assert!(
            seed.len() <= target.max_len,
            "a seed of {} bytes",
            seed.len()
        );
        (target.run)(seed);
        for _ in 0..VARIANTS.min(seed.len()) {
            let mut bytes = seed.clone();
            match next() % 3 {
                0 => bytes.truncate(next() % seed.len()),
                1 => bytes[next() % seed.len()] ^= 1 << (next() % 8),
                _ => bytes[next() % seed.len()] = next() as u8,
            }
            (target.run)(&bytes);
        }
    }
    (target.run)(&[]);
    for (input, bytes) in regressions(name).unwrap() {
        eprintln!("{name}: {input}");
        (target.run)(&bytes);
    }
}

macro_rules! survives {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            survive(stringify!($name));
        }
    )*

    /// A target that nobody runs here would be one that only fuzzers compile.
    #[test]
    fn every_target_is_tested_and_wired() {
        let tested = [$(stringify!($name)),*];
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        assert_eq!(names, tested);
        let manifest = fs::read_to_string(Path::new(FUZZ).join("Cargo.toml")).unwrap();
        for name in names {
            assert!(manifest.contains(&format!("name = \"{name}\"\n")), "{name}");
            let wire = fs::read_to_string(Path::new(FUZZ).join(format!("fuzz_targets/{name}.rs")));
            assert!(wire.unwrap().contains(&format!("casemate_fuzzing::run(\"{name}\", data)")));
        }
        assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    }};
}

survives! {
    container_file
    container_damage
    manifest
    key_files
    gguf
    safetensors
    model_settings
    adapter
    tokenizer_model
    tokenizer_json
    tokenizer_text
    chat_template
    quote
    evidence
    appraisal
    policy
    rcar
    jwe
    grant
    credential
    rollback
    issuance
    keyset
    attestation_response
    service_damage
    ohttp_request
    ohttp_answer
    ohttp_message
    receipt
    receipt_bundle
    relay_peers
    api_body
    enclave_config
    broker_log
    broker_requests
    quoting_service
    worker_wire
    explain
}
