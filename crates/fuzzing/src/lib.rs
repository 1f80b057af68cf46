//! What the fuzzers of `fuzz/` run: one function for each parser of bytes that strangers send, with the seeds it starts
//! from. A function returns normally whatever the bytes are, and panics where a promise is broken: accepted bytes that
//! do not encode to themselves, damage that goes unnoticed, two ways of reading that disagree.
//!
//! The functions are ordinary code, so `cargo test` runs each over its seeds, over damaged seeds, and over the inputs
//! that once broke something (`fuzz/regressions`). Nothing in here is part of a product.

#![forbid(unsafe_code)]

mod adapter;
mod attest;
mod broker;
mod channel;
mod cli;
mod container;
mod damage;
mod enclave;
mod engine;
mod import;
mod receipt;
mod release;
mod scratch;
mod tee;
mod wire;

use std::fs;
use std::path::Path;

/// One parser, or a few that belong together.
pub struct Target {
    /// Name, as in `fuzz/fuzz_targets/NAME.rs`.
    pub name: &'static str,
    /// The function; panics on a finding.
    pub run: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The longest input that is worth trying, in bytes.
    pub max_len: usize,
}

/// An honest sample that a target damages as its input says.
pub struct Walk {
    /// Name of the target.
    pub target: &'static str,
    /// What the sample is.
    pub what: &'static str,
    /// What stands in front of the edits.
    pub prefix: &'static [u8],
    /// Bytes of the sample.
    pub len: usize,
}

impl Walk {
    /// Runs the target with one bit pattern of one byte changed.
    ///
    /// # Panics
    /// On a finding.
    pub fn flip(&self, at: usize, mask: u8) {
        let [low, high] = u16::try_from(at).expect("samples are short").to_le_bytes();
        run(self.target, &[self.prefix, &[0, low, high, mask]].concat());
    }
}

/// Every honest sample that a target damages.
pub fn walks() -> Vec<Walk> {
    [
        container::walks(),
        attest::walks(),
        release::walks(),
        channel::walks(),
        broker::walks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

macro_rules! targets {
    ($($name:ident: $run:path, $seeds:path, $max_len:expr;)*) => {
        /// Every target, in the order of the rooms.
        pub const TARGETS: &[Target] = &[$(
            Target { name: stringify!($name), run: $run, seeds: $seeds, max_len: $max_len }
        ),*];
    };
}

targets! {
    container_file: container::file, container::file_seeds, 8 << 10;
    container_damage: container::damage, container::damage_seeds, 64;
    manifest: container::manifest, container::manifest_seeds, 8 << 10;
    key_files: container::key_files, container::key_file_seeds, 2 << 10;
    gguf: import::gguf, import::gguf_seeds, 16 << 10;
    safetensors: import::safetensors, import::safetensors_seeds, 8 << 10;
    model_settings: import::settings, import::settings_seeds, 4 << 10;
    adapter: adapter::adapter, adapter::adapter_seeds, 8 << 10;
    tokenizer_model: import::tokenizer_model, import::tokenizer_model_seeds, 8 << 10;
    tokenizer_json: engine::tokenizer, engine::tokenizer_seeds, 16 << 10;
    tokenizer_text: engine::text, engine::text_seeds, 2 << 10;
    chat_template: engine::chat_template, engine::chat_template_seeds, 4 << 10;
    quote: attest::quote, attest::quote_seeds, 12 << 10;
    evidence: attest::evidence, attest::evidence_seeds, 48 << 10;
    appraisal: attest::appraisal, attest::appraisal_seeds, 64;
    policy: attest::policy, attest::policy_seeds, 8 << 10;
    rcar: release::rcar, release::rcar_seeds, 16 << 10;
    jwe: release::jwe, release::jwe_seeds, 4 << 10;
    grant: release::grant, release::grant_seeds, 2 << 10;
    credential: release::credential, release::credential_seeds, 4 << 10;
    rollback: release::rollback, release::rollback_seeds, 2 << 10;
    issuance: release::issuance, release::issuance_seeds, 16 << 10;
    keyset: channel::keyset, channel::keyset_seeds, 4 << 10;
    attestation_response: channel::response, channel::response_seeds, 48 << 10;
    service_damage: channel::service_damage, channel::service_damage_seeds, 64;
    ohttp_request: channel::request, channel::request_seeds, 4 << 10;
    ohttp_answer: channel::answer, channel::answer_seeds, 64;
    ohttp_message: channel::message, channel::message_seeds, 8 << 10;
    receipt: receipt::receipt, receipt::receipt_seeds, 4 << 10;
    receipt_bundle: receipt::bundle, receipt::bundle_seeds, 48 << 10;
    relay_peers: enclave::peers, enclave::peers_seeds, 24 << 10;
    api_body: enclave::api, enclave::api_seeds, 4 << 10;
    enclave_config: enclave::config, enclave::config_seeds, 4 << 10;
    broker_log: broker::log, broker::log_seeds, 2 << 10;
    broker_requests: broker::requests, broker::requests_seeds, 16 << 10;
    quoting_service: tee::wire, tee::wire_seeds, 16 << 10;
    worker_wire: wire::wire, wire::wire_seeds, 4 << 10;
    explain: cli::explain, cli::explain_seeds, 8 << 10;
}

/// The inputs in `fuzz/regressions/TARGET` that once broke something, by file name.
///
/// # Errors
/// When the directory is there but cannot be read.
pub fn regressions(target: &str) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/regressions");
    let directory = all.join(target);
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        found.push((name, fs::read(&path)?));
    }
    found.sort();
    Ok(found)
}

/// Runs the target of that name: what a binary of `fuzz/` calls for each input.
///
/// # Panics
/// On a finding, and for a name that is not in [`TARGETS`].
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("the name of a target").run)(data);
}
