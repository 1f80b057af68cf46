//! What a run found, as it is kept in JSON; the forms for people are made of nothing else. `casemate bench report` reads it
//! again.

pub(crate) mod csv;
pub(crate) mod html;
#[cfg(test)]
pub(crate) mod sample;
pub(crate) mod table;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::drive::Load;
use crate::exit::Malformed;
use crate::limits::Limits;
use crate::load::Loaded;
use crate::machine::Machine;
use crate::protected::Protected;
use crate::statistics::Summary;
use crate::syscalls::SystemCalls;

/// Version of this form.
pub(crate) const FORM: u32 = 1;

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) form: u32,
    pub(crate) program: Program,
    pub(crate) machine: Machine,
    pub(crate) protocol: Protocol,
    pub(crate) model: ModelFacts,
    pub(crate) limits: Limits,
    pub(crate) formats: Vec<FormatResult>,
    /// Formats that were not measured, and why.
    pub(crate) skipped: Vec<Skipped>,
    /// What the protection costs, if that was asked for.
    pub(crate) protected: Option<Protected>,
}

/// What was run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    pub(crate) version: String,
    pub(crate) commit: String,
    /// `release` or `debug`.
    pub(crate) profile: String,
    /// The command that repeats it.
    pub(crate) command: String,
    /// When it began, RFC 3339 in UTC.
    pub(crate) started: String,
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Protocol {
    pub(crate) threads: usize,
    /// The load behind throughput; latency has the same prompt and tokens, alone.
    pub(crate) throughput: Load,
    pub(crate) latency_tokens: usize,
    pub(crate) contexts: Vec<usize>,
    pub(crate) batches: Vec<usize>,
    /// Prompt and tokens of each request of the batch curve.
    pub(crate) curve_prompt: usize,
    pub(crate) curve_tokens: usize,
    pub(crate) traced_tokens: usize,
    /// A smoke run, whose figures mean little.
    pub(crate) quick: bool,
}

/// The model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ModelFacts {
    pub(crate) name: String,
    pub(crate) origin: String,
    pub(crate) parameters: u64,
    pub(crate) hidden: u32,
    pub(crate) layers: u32,
    pub(crate) heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) ffn: u32,
    pub(crate) vocab: u32,
    pub(crate) context: u32,
    /// Operations of the linear layers for each token of a prompt.
    pub(crate) operations_per_token: u64,
}

/// One arithmetic's figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FormatResult {
    /// As in receipts.
    pub(crate) compute: String,
    /// How keys and values are stored; reports of earlier programs do not tell.
    #[serde(default = "not_recorded")]
    pub(crate) kv_type: String,
    pub(crate) load: Loaded,
    pub(crate) memory: Memory,
    pub(crate) latency: Latency,
    pub(crate) throughput: Throughput,
    pub(crate) contexts: Vec<ContextPoint>,
    /// Contexts that were asked for and are longer than the model's.
    pub(crate) beyond: Vec<usize>,
    pub(crate) curve: Vec<BatchPoint>,
    pub(crate) system_calls: SystemCalls,
}

/// Bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// Weights as the kernels read them, and the embedding table.
    pub(crate) weights: u64,
    /// Keys and values set aside.
    pub(crate) kv: u64,
    /// Most that was resident from opening to the last measurement, limits left out.
    pub(crate) peak: u64,
    /// How much of the packed matrices lies in huge pages, if the system tells.
    pub(crate) huge: Option<u64>,
    /// Weights that each step reads.
    pub(crate) per_pass: u64,
    /// Keys and values of one position.
    pub(crate) kv_per_position: u64,
}

/// The next token of a single request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    /// Milliseconds from token to token.
    pub(crate) next_token: Summary,
    /// The samples behind it, outliers among them.
    pub(crate) samples: Vec<f64>,
    /// Milliseconds to the first token.
    pub(crate) first_token: Summary,
    /// Tokens of the prompt per second until the first token came.
    pub(crate) prefill: f64,
    pub(crate) prefill_shares: ComputeShares,
    /// Of reading weights, keys and values as fast as memory allows.
    pub(crate) decode_share: f64,
}

/// What of the machine's arithmetic a prefill used.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct ComputeShares {
    pub(crate) of_registers: Option<f64>,
    /// Of the best packed product.
    pub(crate) of_product: Option<f64>,
}

/// Requests that begin together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Throughput {
    pub(crate) runs: usize,
    /// Tokens generated per second from submission to the last token, prompts included in the time. Median of the runs.
    pub(crate) tokens_per_second: f64,
    /// Tokens generated per second while all were generating.
    pub(crate) decode: Option<f64>,
    pub(crate) decode_share: Option<f64>,
    /// Seconds of each run.
    pub(crate) seconds: Vec<f64>,
}

/// A single request after a prompt of some length.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContextPoint {
    pub(crate) context: usize,
    /// Milliseconds from token to token.
    pub(crate) next_token: Summary,
    pub(crate) decode: f64,
    pub(crate) decode_share: f64,
    /// Tokens of the prompt per second.
    pub(crate) prefill: f64,
    pub(crate) prefill_shares: ComputeShares,
    /// 10^9 bytes a second, read beside it.
    pub(crate) read: f64,
}

/// Requests that generate together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BatchPoint {
    pub(crate) batch: usize,
    /// Tokens per second of all of them.
    pub(crate) decode: f64,
    pub(crate) decode_share: f64,
    /// Tokens per second if nothing but reading took time.
    pub(crate) roofline: f64,
    pub(crate) read: f64,
}

/// A format that was left out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Skipped {
    pub(crate) compute: String,
    pub(crate) why: String,
}

/// Stands for what earlier programs left out of a report.
pub(crate) fn not_recorded() -> String {
    "not recorded".into()
}

impl Report {
    /// Reads what [`Report::to_json`] wrote.
    pub(crate) fn from_json(path: &Path, text: &str) -> Result<Report, Malformed> {
        let report: Report = serde_json::from_str(text).map_err(|error| {
            Malformed(format!(
                "{} is no report of casemate bench: {error}",
                path.display()
            ))
        })?;
        match report.form {
            FORM => Ok(report),
            other => Err(Malformed(format!(
                "{} has form {other}; this program reads form {FORM}",
                path.display()
            ))),
        }
    }

    /// The whole report.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has a text")
    }
}

/// Bytes that a step of `batch` requests at `context` positions reads.
pub(crate) fn bytes_per_step(memory: &Memory, batch: usize, context: f64) -> f64 {
    memory.per_pass as f64 + batch as f64 * context * memory.kv_per_position as f64
}

/// Tokens per second of a batch if reading at `read` (10^9 bytes a second) were all that takes time.
pub(crate) fn roofline(memory: &Memory, batch: usize, context: f64, read: f64) -> f64 {
    batch as f64 * read * 1e9 / bytes_per_step(memory, batch, context)
}
