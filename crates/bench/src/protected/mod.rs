//! What the protection costs: the same requests to the same model, once through proxy, encrypted channel and an enclave
//! with a sealed model, attestation and receipts, once to the bare API over plain HTTP, in turns. The deployment is made of the
//! real programs, and its TEE is the fake one.
//!
//! Client, proxy and both services run on this machine: with an engine thread on every core each of their steps stops one,
//! and the others wait for it. Fewer threads leave them a core.

mod plain;
mod protection;

pub(crate) use plain::{Args as ServePlain, serve};

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use casemate_container::DType;
use casemate_engine::{Compute, KvType};
use casemate_testkit::deployment::{Deployment, EnclaveSettings, Role, http_get};
use casemate_testkit::gguf;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::exit::Usage;
use crate::load::{self, Origin};
use crate::machine::available_memory;
use crate::report;
use crate::run::note;
use crate::statistics::{self, Ratio, Summary};
use crate::synthetic::Synthetic;

/// Name of the model in both services.
const NAME: &str = "model";
/// Proxies started to time it.
const STARTS: usize = 5;
/// Fewest pairs that make an interval.
pub(crate) const LEAST_PAIRS: usize = 20;
/// Tokens that template and rounding may add to a prompt, or that the words take by which its length is found.
const SLACK: usize = 192;

/// What is put on both services.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pairs {
    pub(crate) compute: Compute,
    pub(crate) kv_type: KvType,
    /// Of the engine in both.
    pub(crate) threads: usize,
    pub(crate) prompt: usize,
    pub(crate) tokens: usize,
    pub(crate) pairs: usize,
}

/// What came of it. Times in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Protected {
    pub(crate) compute: String,
    #[serde(default = "report::not_recorded")]
    pub(crate) kv_type: String,
    /// As the service counted them.
    pub(crate) prompt_tokens: usize,
    pub(crate) tokens: usize,
    /// Server-sent events of an answer.
    pub(crate) events: usize,
    /// Wall clock, protected over plain.
    pub(crate) ratio: Ratio,
    /// The ratio of each pair.
    pub(crate) ratios: Vec<f64>,
    pub(crate) protected: Summary,
    pub(crate) plain: Summary,
    /// First token through the protection less first token without, pair by pair.
    pub(crate) first_token_added: Summary,
    /// CPU time of a request: the enclave's, the plain service's, the proxy's on the user's side.
    pub(crate) cpu_enclave: f64,
    pub(crate) cpu_plain: f64,
    pub(crate) cpu_proxy: f64,
    /// CPU time of the enclave's protection code by itself over exactly such a request. Measured alone, because it is far
    /// below what two runs of an engine differ by.
    pub(crate) cpu_protection: f64,
    /// Of the enclave's.
    pub(crate) cpu_share: f64,
    /// From starting a proxy to the first byte through the verified channel.
    pub(crate) first_verified_byte: Summary,
    /// From starting the enclave to ready: attested, key released, opened, converted, credential received.
    pub(crate) enclave_start: f64,
}

/// Measures it.
pub(crate) fn run(origin: &Origin, scratch: Option<&Path>, pairs: Pairs) -> Result<Protected> {
    let programs = Deployment::programs_of_this_build()?;
    for program in [
        "casemate",
        "casemate-broker",
        "casemate-enclave",
        "casemate-fake-tee",
    ] {
        let path = programs.join(program);
        ensure!(
            path.is_file(),
            Usage(format!(
                "--protected runs a whole deployment, and {} is not there; build it with `cargo build --release --bins -p \
                 casemate-cli -p casemate-broker -p casemate-enclave -p casemate-testkit -p casemate-bench`",
                path.display()
            ))
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let source = origin.source(pairs.compute)?;
    let bytes: u64 = source.tensors().iter().map(|t| t.size).sum();
    check_memory(bytes, scratch.is_none())?;
    drop(source);
    // The model as a file, where it is none yet, and its sealed copies.
    let work = load::scratch_folder(scratch, 3 * bytes)?;
    let model = model_file(origin, work.path())?;

    note("protection: starting both services");
    let mut deployment = Deployment::new(&programs, &work.path().join("deployment"))?;
    let settings = EnclaveSettings {
        compute: enclave_name(pairs.compute),
        kv_type: Some(pairs.kv_type.name()),
        threads: pairs.threads,
        max_context: pairs.prompt + pairs.tokens + SLACK,
        max_batch: 1,
        ..EnclaveSettings::default()
    };
    let through_proxy = deployment.start_all(&model, NAME, &settings)?;
    let enclave_start = deployment.enclave_started_in()?;
    let plain = Plain::start(&model, &settings, pairs)?;
    let mut pid = |role| {
        let program = deployment.program(role).context("the program runs")?;
        anyhow::Ok(program.pid())
    };
    let processes = [pid(Role::Enclave)?, pid(Role::Proxy)?, plain.child.id()];

    let client = reqwest::Client::builder().no_proxy().build()?;
    let ask =
        |url: &str, words: usize, tokens: usize| runtime.block_on(ask(&client, url, words, tokens));
    let words = words_for(pairs.prompt, |words| {
        Ok(ask(&plain.url, words, 1)?.prompt_tokens)
    })?;
    // Once each, so that pages are touched and connections made.
    let answer = ask(&through_proxy.url, words, pairs.tokens)?;
    ensure!(
        answer.text == ask(&plain.url, words, pairs.tokens)?.text,
        "the two services do not answer alike"
    );
    let starts = (0..STARTS).map(|_| first_verified_byte(&mut deployment));
    let starts = starts.collect::<Result<Vec<_>>>()?;

    let before = cpu_times(&processes)?;
    let (mut walls, mut firsts) = (Vec::new(), Vec::new());
    for pair in 0..pairs.pairs {
        note(&format!("protection: pair {} of {}", pair + 1, pairs.pairs));
        // Who goes first alternates, so that drift of the machine hits both alike.
        let (ours, theirs) = if pair % 2 == 0 {
            let ours = ask(&through_proxy.url, words, pairs.tokens)?;
            (ours, ask(&plain.url, words, pairs.tokens)?)
        } else {
            let theirs = ask(&plain.url, words, pairs.tokens)?;
            (ask(&through_proxy.url, words, pairs.tokens)?, theirs)
        };
        walls.push((milliseconds(ours.took), milliseconds(theirs.took)));
        firsts.push(milliseconds(ours.first) - milliseconds(theirs.first));
    }
    let after = cpu_times(&processes)?;
    let [cpu_enclave, cpu_proxy, cpu_plain] =
        [0, 1, 2].map(|i| milliseconds(after[i] - before[i]) / pairs.pairs as f64);
    let request = request_body(words, pairs.tokens);
    let cost = runtime.block_on(protection::cost(&request, &answer.pieces))?;
    let column = |which: fn(&(f64, f64)) -> f64| walls.iter().map(which).collect::<Vec<_>>();
    let summary = |samples: &[f64]| Summary::of(samples).context("there are samples");
    Ok(Protected {
        compute: pairs.compute.name().into(),
        kv_type: pairs.kv_type.name().into(),
        prompt_tokens: answer.prompt_tokens,
        tokens: pairs.tokens,
        events: answer.pieces.len(),
        ratio: statistics::paired_ratio(&walls).context("there are pairs")?,
        ratios: walls.iter().map(|(ours, theirs)| ours / theirs).collect(),
        protected: summary(&column(|pair| pair.0))?,
        plain: summary(&column(|pair| pair.1))?,
        first_token_added: summary(&firsts)?,
        cpu_enclave,
        cpu_plain,
        cpu_proxy,
        cpu_protection: milliseconds(cost),
        cpu_share: milliseconds(cost) / cpu_enclave,
        first_verified_byte: summary(&starts)?,
        enclave_start: milliseconds(enclave_start),
    })
}

/// What the enclave's configuration calls an arithmetic.
fn enclave_name(compute: Compute) -> &'static str {
    match compute.name() {
        "int8-g32" => "int8",
        name => name,
    }
}

/// Two engines hold the model, each opens a sealed copy.
fn check_memory(bytes: u64, in_memory: bool) -> Result<(), Usage> {
    let needed = bytes * if in_memory { 5 } else { 3 } + (1 << 30);
    match available_memory() {
        Some(available) if available < needed => Err(Usage(format!(
            "--protected runs two services with the model: about {:.1} GB of memory are needed, but {:.1} GB are \
             available{}",
            needed as f64 / 1e9,
            available as f64 / 1e9,
            if in_memory {
                "; --scratch DIR puts its files on a disk"
            } else {
                ""
            }
        ))),
        _ => Ok(()),
    }
}

/// The model as a file or directory that can be sealed.
fn model_file(origin: &Origin, folder: &Path) -> Result<PathBuf> {
    match origin {
        Origin::File(path) => Ok(path.canonicalize()?),
        Origin::Synthetic(shape) => {
            let path = folder.join("model.gguf");
            let model = Synthetic::new(*shape, DType::Q8_0);
            gguf::write_source(&model, model.vocabulary(), &path)?;
            Ok(path)
        }
    }
}

/// How many words make a prompt of about so many tokens, found by asking how many some words made.
fn words_for(tokens: usize, mut count: impl FnMut(usize) -> Result<usize>) -> Result<usize> {
    let (few, more) = (count(4)?, count(20)?);
    ensure!(
        more > few,
        "{} words more are {} tokens more",
        16,
        more - few
    );
    let each = (more - few) as f64 / 16.0;
    let words = 20.0 + (tokens as f64 - more as f64) / each;
    Ok(words.max(1.0) as usize)
}

/// The service without any protection, in a process of its own.
struct Plain {
    url: String,
    child: Child,
}

impl Plain {
    fn start(model: &Path, settings: &EnclaveSettings, pairs: Pairs) -> Result<Plain> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(plain::COMMAND)
            .arg(model)
            .args([
                pairs.compute.name(),
                pairs.kv_type.name(),
                &pairs.threads.to_string(),
                &settings.max_context.to_string(),
            ])
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("the output is piped")?;
        let mut plain = Plain {
            url: String::new(),
            child,
        };
        BufReader::new(output).read_line(&mut plain.url)?;
        plain.url.truncate(plain.url.trim_end().len());
        ensure!(
            plain.url.starts_with("http://"),
            "the plain service did not start"
        );
        Ok(plain)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answered {
    /// To the first piece of text.
    first: Duration,
    took: Duration,
    /// As they arrived.
    pieces: Vec<bytes::Bytes>,
    text: String,
    prompt_tokens: usize,
}

fn request_body(words: usize, tokens: usize) -> Vec<u8> {
    const WORDS: [&str; 7] = [
        "lighthouse",
        "keeper",
        "storm",
        "of",
        "the",
        "long",
        "night",
    ];
    let question: Vec<&str> = WORDS.iter().copied().cycle().take(words).collect();
    let body = json!({
        "model": NAME, "stream": true, "temperature": 0, "max_tokens": tokens, "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": question.join(" ")}],
    });
    body.to_string().into_bytes()
}

async fn ask(client: &reqwest::Client, url: &str, words: usize, tokens: usize) -> Result<Answered> {
    let started = Instant::now();
    let request = client
        .post(format!("{url}/v1/chat/completions"))
        .header("content-type", "application/json")
        .body(request_body(words, tokens));
    let mut response = request.send().await?;
    let status = response.status();
    let (mut pieces, mut first) = (Vec::new(), None);
    while let Some(piece) = response.chunk().await? {
        // A first event names the role; what follows it is text.
        if pieces.len() == 1 {
            first = Some(started.elapsed());
        }
        pieces.push(piece);
    }
    let took = started.elapsed();
    let whole = String::from_utf8(pieces.concat())?;
    ensure!(status.is_success(), "{url} answers {status}: {whole}");
    ensure!(
        whole.ends_with("data: [DONE]\n\n"),
        "the answer is not whole: {whole}"
    );
    let events: Vec<Value> = whole
        .lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
        .collect();
    let texts = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    let usage = |name: &str| {
        events
            .iter()
            .rev()
            .find_map(|event| event["usage"][name].as_u64())
    };
    let generated = usage("completion_tokens").context("the answer tells its length")?;
    // Random weights say anything, also that they are done.
    ensure!(
        generated as usize == tokens,
        "the answer ended after {generated} of {tokens} tokens; choose fewer --tokens"
    );
    Ok(Answered {
        first: first.unwrap_or(took),
        took,
        text: texts.collect(),
        prompt_tokens: usage("prompt_tokens").context("the answer tells its prompt's length")?
            as usize,
        pieces,
    })
}

/// Milliseconds from starting a user's proxy to its first answer. It listens once it has verified the service.
fn first_verified_byte(deployment: &mut Deployment) -> Result<f64> {
    let started = Instant::now();
    let proxy = deployment.start_proxy()?;
    let reply = http_get(&proxy.url, "/v1/models")?;
    let took = started.elapsed();
    ensure!(reply.status == 200, "the proxy answers {}", reply.status);
    deployment.stop(Role::Proxy);
    Ok(milliseconds(took))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// CPU time that each process has used, all its threads together.
fn cpu_times(processes: &[u32]) -> Result<Vec<Duration>> {
    processes.iter().map(|pid| cpu_time(*pid)).collect()
}

fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; what follows it is numbers, user and system time the 12th and 13th.
    let (_, rest) = stat.rsplit_once(')').context("/proc has a stat file")?;
    let mut ticks = 0;
    for field in rest.split_whitespace().skip(11).take(2) {
        ticks += field.parse::<u64>()?;
    }
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_gets_about_the_length_that_was_asked_for() {
        // A template of 11 tokens, and 2.4 for each word.
        let count = |words: usize| 11 + (2.4 * words as f64) as usize;
        for tokens in [40, 64, 1024, 4000] {
            let words = words_for(tokens, |words| Ok(count(words))).unwrap();
            let got = count(words);
            assert!(got.abs_diff(tokens) <= tokens / 20 + 3, "{tokens}: {got}");
        }
        assert_eq!(words_for(1, |words| Ok(count(words))).unwrap(), 1);
        assert!(
            words_for(64, |_| Ok(7)).is_err(),
            "words that make no tokens"
        );
    }

    #[test]
    fn cpu_time_grows_with_work() {
        let pid = std::process::id();
        let before = cpu_time(pid).unwrap();
        let start = Instant::now();
        while cpu_time(pid).unwrap() == before {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "busy for a minute without CPU time"
            );
        }
    }
}
