//! What the protection costs: the same requests to the same model, once through proxy, encrypted channel and an enclave
//! with a sealed model, once to the bare API over plain HTTP, in turns.
//!
//! ```sh
//! cargo build --release --workspace --bins
//! cargo run --release -p casemate-e2e --example overhead -- MODEL.gguf [--pairs N] [--tokens N] [--threads N]
//! ```
//! `--threads` are the engine's in both services, one per core unless given. Client and proxy run on the same machine: with an
//! engine thread on every core each of their steps stops one, and the others wait for it. Fewer threads leave them a core.
//!
//! It prints the ratio of the wall-clock times with its 95 % interval, the CPU time of each process per request, and the CPU
//! time of the enclave's protection code by itself over exactly the bytes of such a request, which is measured
//! alone because it is far below what two runs of an engine differ by.

mod plain;
mod protection;
mod statistics;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use casemate_testkit::deployment::{Deployment, EnclaveSettings, Role, http_get};
use serde_json::{Value, json};

/// Name of the model in both services.
const NAME: &str = "model";
/// Proxies started to time it.
const STARTS: usize = 11;

struct Options {
    model: PathBuf,
    pairs: usize,
    tokens: usize,
    /// Of the engine; 0 is one per core.
    threads: usize,
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [first, model, threads] = &arguments[..]
        && first == plain::SERVE
    {
        return plain::serve(Path::new(model), threads.parse()?);
    }
    let options = options(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;

    let work = tempfile::tempdir()?;
    let mut deployment = Deployment::new(&Deployment::programs_of_this_build()?, work.path())?;
    let settings = EnclaveSettings {
        threads: options.threads,
        ..EnclaveSettings::default()
    };
    let protected = deployment.start_all(&options.model, NAME, &settings)?;
    let plain = Plain::start(&options.model, options.threads)?;
    let mut pid = |role| {
        let program = deployment.program(role).context("the program runs")?;
        anyhow::Ok(program.pid())
    };
    let processes = [pid(Role::Enclave)?, pid(Role::Proxy)?, plain.child.id()];

    let client = reqwest::Client::builder().no_proxy().build()?;
    let ask = |url: &str| runtime.block_on(ask(&client, url, options.tokens));
    // Once each, so that pages are touched and connections made.
    let answer = ask(&protected.url)?;
    ensure!(
        answer.text == ask(&plain.url)?.text,
        "the two services do not answer alike"
    );

    let starts = (0..STARTS).map(|_| first_verified_byte(&mut deployment));
    let starts = starts.collect::<Result<Vec<_>>>()?;

    let before = cpu_times(&processes)?;
    let mut walls = Vec::new();
    for pair in 0..options.pairs {
        // Who goes first alternates, so that drift of the machine hits both alike.
        walls.push(if pair % 2 == 0 {
            let ours = ask(&protected.url)?.took;
            (ours, ask(&plain.url)?.took)
        } else {
            let theirs = ask(&plain.url)?.took;
            (ask(&protected.url)?.took, theirs)
        });
    }
    let after = cpu_times(&processes)?;
    let [enclave, proxy, plain] =
        [0, 1, 2].map(|i| (after[i] - before[i]).as_secs_f64() * 1e3 / options.pairs as f64);

    let request = request_body(options.tokens);
    let cost = runtime.block_on(protection::cost(&request, &answer.pieces))?;
    let cost = cost.as_secs_f64() * 1e3;
    let ratio = statistics::paired_ratio(&walls);
    println!(
        "{} pairs of {} tokens, streamed as {} events",
        options.pairs,
        options.tokens,
        answer.pieces.len()
    );
    println!(
        "from starting a proxy to the first byte through the verified channel, median of {STARTS}: {:.1} ms",
        statistics::median_ms(starts.into_iter())
    );
    println!(
        "wall clock, median: protected {:.1} ms, plain {:.1} ms",
        statistics::median_ms(walls.iter().map(|pair| pair.0)),
        statistics::median_ms(walls.iter().map(|pair| pair.1)),
    );
    println!(
        "wall clock, protected / plain: {:.4} (95 % interval {:.4} to {:.4})",
        ratio.mean, ratio.low, ratio.high
    );
    println!(
        "CPU time per request: enclave {enclave:.1} ms, plain {plain:.1} ms, proxy on the user's side {proxy:.2} ms"
    );
    println!(
        "protection code in the enclave by itself: {cost:.3} ms per request, {:.2} % of the enclave's CPU time",
        cost / enclave * 100.0
    );
    Ok(())
}

fn options(arguments: Vec<String>) -> Result<Options> {
    let (mut model, mut pairs, mut tokens, mut threads) = (None, 40, 128, 0);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<usize> {
            let value = arguments.next().with_context(|| format!("{argument} N"))?;
            Ok(value.parse()?)
        };
        match argument.as_str() {
            "--pairs" => pairs = number()?,
            "--tokens" => tokens = number()?,
            "--threads" => threads = number()?,
            _ if argument.starts_with('-') => bail!("no such option: {argument}"),
            _ => model = Some(PathBuf::from(argument)),
        }
    }
    ensure!(pairs >= 20, "an interval needs at least 20 pairs");
    let model = model.context("give a GGUF file")?;
    Ok(Options {
        model,
        pairs,
        tokens,
        threads,
    })
}

/// The service without any protection, in a process of its own.
struct Plain {
    url: String,
    child: Child,
}

impl Plain {
    fn start(model: &Path, threads: usize) -> Result<Plain> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(plain::SERVE)
            .arg(model)
            .arg(threads.to_string())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("the output is piped")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let url = line.trim().to_owned();
        ensure!(
            url.starts_with("http://"),
            "the plain service did not start"
        );
        Ok(Plain { url, child })
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answered {
    took: Duration,
    /// As they arrived.
    pieces: Vec<Bytes>,
    text: String,
}

fn request_body(tokens: usize) -> Vec<u8> {
    let question = "Tell a long story about a lighthouse, its keeper and a storm. ".repeat(4);
    let body = json!({
        "model": NAME, "stream": true, "temperature": 0, "max_tokens": tokens,
        "messages": [{"role": "user", "content": question}],
    });
    body.to_string().into_bytes()
}

async fn ask(client: &reqwest::Client, url: &str, tokens: usize) -> Result<Answered> {
    let started = Instant::now();
    let request = client
        .post(format!("{url}/v1/chat/completions"))
        .header("content-type", "application/json")
        .body(request_body(tokens));
    let mut response = request.send().await?.error_for_status()?;
    let mut pieces = Vec::new();
    while let Some(piece) = response.chunk().await? {
        pieces.push(piece);
    }
    let took = started.elapsed();
    let whole = String::from_utf8(pieces.concat())?;
    ensure!(
        whole.ends_with("data: [DONE]\n\n"),
        "the answer is not whole: {whole}"
    );
    let events = whole.lines().filter_map(|line| {
        let event: Value = serde_json::from_str(line.strip_prefix("data: ")?).ok()?;
        Some(event["choices"][0]["delta"]["content"].as_str()?.to_owned())
    });
    let text = events.collect();
    Ok(Answered { took, pieces, text })
}

/// Starts a user's proxy, asks it for the models, ends it. The proxy listens once it has verified the service.
fn first_verified_byte(deployment: &mut Deployment) -> Result<Duration> {
    let started = Instant::now();
    let proxy = deployment.start_proxy()?;
    let reply = http_get(&proxy.url, "/v1/models")?;
    let took = started.elapsed();
    ensure!(reply.status == 200, "the proxy answers {}", reply.status);
    deployment.stop(Role::Proxy);
    Ok(took)
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
