//! Mixed clients for as long as one likes, honest and hostile, against one deployment; at the end everything must be as
//! it was: gauges at zero, memory flat, and whoever was honest has been served.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use casemate_testkit::deployment::Role;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::watch::{metric, quiet, resident_kib};
use crate::{Stage, TINY};

/// Longest time for any single step of a client; far more than any takes, so that only what hangs reaches it.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause of a client between two requests.
const PAUSE: Duration = Duration::from_millis(200);
/// How often memory is read.
const SAMPLE: Duration = Duration::from_secs(5);
/// What a program may have grown by between the first third of the time and its end. Freed memory is not returned to the
/// system at once, so some growth is no leak.
const FLAT: u64 = 16 << 10;

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Asks for a whole answer.
    Whole,
    /// Reads a stream to its end.
    Stream,
    /// Hangs up in the middle of a stream.
    HangUp,
    /// Has no key of the grant.
    WrongKey,
    /// Asks more than its key allows.
    Greedy,
    /// Sends prompts that are too long, and requests that are none.
    Malformed,
    /// Sends the gateway bytes that are no message.
    Garbage,
    /// Connects and does next to nothing.
    Idle,
    /// Asks for evidence.
    Verifier,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Whole,
        Kind::Stream,
        Kind::HangUp,
        Kind::WrongKey,
        Kind::Greedy,
        Kind::Malformed,
        Kind::Garbage,
        Kind::Idle,
        Kind::Verifier,
    ];

    /// How many clients of this kind there are.
    fn clients(self) -> usize {
        match self {
            Kind::Whole | Kind::Stream | Kind::HangUp | Kind::Greedy => 2,
            Kind::Idle => 20,
            _ => 1,
        }
    }
}

/// Resident memory in KiB of enclave, broker and proxy.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// `casemate-enclave`.
    pub enclave: u64,
    /// `casemate-broker`.
    pub broker: u64,
    /// `casemate proxy`.
    pub proxy: u64,
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |kib: u64| kib as f64 / 1024.0;
        let (enclave, broker, proxy) = (mib(self.enclave), mib(self.broker), mib(self.proxy));
        write!(
            f,
            "enclave {enclave:.1} MiB, broker {broker:.1} MiB, proxy {proxy:.1} MiB"
        )
    }
}

/// What came of a soak.
pub struct Report {
    /// How often each kind of client got which answer.
    pub outcomes: BTreeMap<(Kind, String), u64>,
    /// Memory over time.
    pub memory: Vec<(Duration, Memory)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((kind, outcome), count) in &self.outcomes {
            writeln!(f, "{:<10} {outcome:<12} {count}", format!("{kind:?}"))?;
        }
        let last = self.memory.last().map_or(Duration::ZERO, |(at, _)| *at);
        let mut next = Duration::ZERO;
        for (at, memory) in &self.memory {
            if *at >= next || *at == last {
                writeln!(f, "{:>5.1} min  {memory}", at.as_secs_f64() / 60.0)?;
                next = *at + last / 6;
            }
        }
        Ok(())
    }
}

struct World {
    proxy: String,
    enclave: String,
    address: SocketAddr,
    steady: String,
    greedy: String,
    client: Client,
    end: Instant,
    outcomes: Mutex<BTreeMap<(Kind, String), u64>>,
}

/// Runs all clients for `duration`, and checks what must hold then.
///
/// # Errors
/// The first client that was not answered as it should have been, a gauge that did not return to zero, or a program that
/// has grown; with what had happened until then.
pub fn run(duration: Duration, mut tell: impl FnMut(&str)) -> Result<Report> {
    let mut stage = Stage::until_enclave()?;
    let steady = stage.deployment.api_key("steady", &[])?;
    let limits = [
        "--requests-per-minute",
        "60",
        "--tokens-per-minute",
        "4000",
        "--concurrency",
        "1",
    ];
    let greedy = stage.deployment.api_key("greedy", &limits)?;
    stage.deployment.admit_model()?;
    let enclave = stage.deployment.start_enclave()?.url;
    let proxy = stage.deployment.start_proxy()?.url;
    let mut pid = |role| {
        let program = stage.deployment.program(role).context("it runs")?;
        anyhow::Ok(program.pid())
    };
    let pids = [pid(Role::Enclave)?, pid(Role::Broker)?, pid(Role::Proxy)?];
    let memory = || -> Result<Memory> {
        Ok(Memory {
            enclave: resident_kib(pids[0])?,
            broker: resident_kib(pids[1])?,
            proxy: resident_kib(pids[2])?,
        })
    };

    let world = Arc::new(World {
        address: enclave.trim_start_matches("http://").parse()?,
        proxy,
        enclave: enclave.clone(),
        steady,
        greedy,
        client: Client::builder().no_proxy().build()?,
        end: Instant::now() + duration,
        outcomes: Mutex::default(),
    });
    let started = Instant::now();
    let mut samples = Vec::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut clients = JoinSet::new();
        for kind in Kind::ALL {
            for number in 0..kind.clients() {
                clients.spawn(client(Arc::clone(&world), kind, number));
            }
        }
        let mut minute = 1;
        let mut ended = pin!(async {
            while let Some(client) = clients.join_next().await {
                client.context("a client broke")??;
            }
            anyhow::Ok(())
        });
        loop {
            samples.push((started.elapsed(), memory()?));
            tokio::select! {
                ended = &mut ended => break ended,
                () = sleep(SAMPLE) => {}
            }
            if started.elapsed() >= Duration::from_secs(60 * minute) {
                let asked: u64 = world.counts().values().sum();
                tell(&format!("{minute:>3} min  {asked} requests  {}", memory()?));
                minute += 1;
            }
        }
    })?;
    samples.push((started.elapsed(), memory()?));

    let report = Report {
        outcomes: world.counts().clone(),
        memory: samples,
    };
    quiet(&enclave, Duration::from_secs(60)).with_context(|| report.to_string())?;
    // What the proxy and the clients keep open ends with them; then only this question's own connection is left.
    stage.deployment.stop(Role::Proxy);
    drop(world);
    runtime.shutdown_timeout(Duration::from_secs(5));
    let deadline = Instant::now() + Duration::from_secs(60);
    while metric(&enclave, "casemate_connections_open")? > 1.0 {
        ensure!(Instant::now() < deadline, "connections stay open\n{report}");
        std::thread::sleep(Duration::from_millis(50));
    }
    report.check(duration)?;
    Ok(report)
}

impl Report {
    fn check(&self, duration: Duration) -> Result<()> {
        for kind in Kind::ALL {
            let any = self.outcomes.keys().any(|(of, _)| *of == kind);
            ensure!(any, "{kind:?} did nothing\n{self}");
        }
        for outcome in ["200", "429"] {
            let some = self.outcomes.contains_key(&(Kind::Greedy, outcome.into()));
            ensure!(some, "no {outcome} for the greedy\n{self}");
        }
        let settled = self.memory.iter().find(|(at, _)| *at >= duration / 3);
        let (Some((_, then)), Some((_, now))) = (settled, self.memory.last()) else {
            return Ok(());
        };
        for (program, then, now) in [
            ("enclave", then.enclave, now.enclave),
            ("broker", then.broker, now.broker),
            ("proxy", then.proxy, now.proxy),
        ] {
            ensure!(
                now <= then + FLAT,
                "the {program} has grown from {then} to {now} KiB\n{self}"
            );
        }
        Ok(())
    }
}

impl World {
    fn counts(&self) -> std::sync::MutexGuard<'_, BTreeMap<(Kind, String), u64>> {
        self.outcomes.lock().expect("nobody panics while counting")
    }

    fn count(&self, kind: Kind, outcome: impl fmt::Display) {
        *self
            .counts()
            .entry((kind, outcome.to_string()))
            .or_default() += 1;
    }
}

async fn client(world: Arc<World>, kind: Kind, number: usize) -> Result<()> {
    let mut round = number;
    while Instant::now() < world.end {
        let outcome = timeout(PATIENCE, once(&world, kind, round))
            .await
            .with_context(|| format!("{kind:?} waits for more than {PATIENCE:?}"))?
            .with_context(|| format!("{kind:?}, round {round}"))?;
        world.count(kind, outcome);
        round += 1;
        sleep(PAUSE).await;
    }
    Ok(())
}

async fn once(world: &World, kind: Kind, round: usize) -> Result<String> {
    match kind {
        Kind::Whole => {
            let (status, answer) = ask(world, &world.steady, &chat(round, 16, false)).await?;
            ensure!(status == StatusCode::OK, "{status} {answer}");
            let used = &answer["usage"]["completion_tokens"];
            ensure!(used.as_u64().is_some_and(|used| used > 0), "{answer}");
            Ok(status.as_str().to_owned())
        }
        Kind::Stream => {
            let mut response = send(world, &world.steady, &chat(round, 32, true)).await?;
            let mut text = Vec::new();
            while let Some(piece) = response.chunk().await? {
                text.extend_from_slice(&piece);
            }
            ensure!(text.ends_with(b"data: [DONE]\n\n"), "a stream was cut");
            Ok("200".into())
        }
        Kind::HangUp => {
            let mut response = send(world, &world.steady, &chat(round, 400, true)).await?;
            for _ in 0..=round % 4 {
                response.chunk().await?;
            }
            Ok("200".into())
        }
        Kind::WrongKey => {
            let key = match round % 3 {
                0 => format!("cm-{}", "0".repeat(64)),
                1 => world.steady[..66].to_owned(),
                _ => "x".repeat(1000),
            };
            let (status, answer) =
                ask(world, &key, &chat(round, 16, round.is_multiple_of(2))).await?;
            ensure!(status == StatusCode::UNAUTHORIZED, "{status} {answer}");
            ensure!(answer["error"]["code"] == "invalid_api_key", "{answer}");
            Ok("401".into())
        }
        Kind::Greedy => {
            let (status, answer) = ask(world, &world.greedy, &chat(round, 16, false)).await?;
            if status != StatusCode::OK {
                ensure!(status == StatusCode::TOO_MANY_REQUESTS, "{status} {answer}");
                ensure!(answer["error"]["code"] == "rate_limit_exceeded", "{answer}");
            }
            Ok(status.as_str().to_owned())
        }
        Kind::Malformed => {
            let body = match round % 4 {
                0 => {
                    json!({"model": TINY, "messages": [{"role": "user", "content": "long ".repeat(2000)}]})
                }
                1 => json!({"model": TINY, "messages": "none"}),
                2 => json!({"model": TINY, "frobnicate": 1}),
                _ => json!("x".repeat(100_000)),
            };
            let (status, answer) = ask(world, &world.steady, &body).await?;
            ensure!(status == StatusCode::BAD_REQUEST, "{status} {answer}");
            Ok("400".into())
        }
        Kind::Garbage => garbage(world, round).await,
        Kind::Idle => idle(world, round).await,
        Kind::Verifier => {
            let nonce = format!("{round:064x}");
            let url = format!("{}/v1/attestation?nonce={nonce}", world.enclave);
            let response = world.client.get(url).send().await?;
            ensure!(response.status() == StatusCode::OK, "{}", response.status());
            response.bytes().await?;
            Ok("200".into())
        }
    }
}

fn chat(round: usize, max_tokens: u32, stream: bool) -> Value {
    json!({
        "model": TINY, "stream": stream, "max_tokens": max_tokens, "seed": round, "n": 1 + round % 3,
        "messages": [{"role": "user", "content": format!("round {round}")}],
    })
}

async fn send(world: &World, key: &str, body: &Value) -> Result<reqwest::Response> {
    let url = format!("{}/v1/chat/completions", world.proxy);
    let response = world.client.post(url).bearer_auth(key).json(body).send();
    Ok(response.await?)
}

async fn ask(world: &World, key: &str, body: &Value) -> Result<(StatusCode, Value)> {
    let response = send(world, key, body).await?;
    let status = response.status();
    if status.is_server_error() {
        return Ok((status, response.text().await?.into()));
    }
    // A refused stream is one object, as any refusal.
    Ok((status, response.json().await?))
}

/// Bytes that are no encrypted request, at the gateway's own address.
async fn garbage(world: &World, round: usize) -> Result<String> {
    let bytes: Vec<u8> = (0..1 + round * 37 % 5000)
        .map(|at| (at * round * 31 % 251) as u8)
        .collect();
    let url = format!("{}{}", world.enclave, casemate_channel::ohttp::GATEWAY_PATH);
    let media_type = match round % 4 {
        0 => "text/plain",
        _ => casemate_channel::ohttp::REQUEST_MEDIA_TYPE,
    };
    let request = world.client.post(url).header("content-type", media_type);
    let status = request.body(bytes).send().await?.status();
    ensure!(status.is_client_error(), "{status} for garbage");
    Ok(status.as_str().to_owned())
}

/// A connection that sends a part of a request, or nothing, and waits, or closes its half.
async fn idle(world: &World, round: usize) -> Result<String> {
    let mut stream = TcpStream::connect(world.address).await?;
    let part: &[u8] = match round % 4 {
        0 => b"",
        1 => b"POST /.well-known/ohttp-gateway HT",
        2 => b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n",
        _ => b"POST /.well-known/ohttp-gateway HTTP/1.1\r\nhost: x\r\ncontent-type: message/ohttp-chunked-req\r\n\
               content-length: 100000\r\n\r\nxxx",
    };
    stream.write_all(part).await?;
    if round.is_multiple_of(3) {
        stream.shutdown().await?;
    }
    // Whether the server closes it by then or not: nobody else may notice.
    let mut answer = Vec::new();
    match timeout(Duration::from_secs(3), stream.read_to_end(&mut answer)).await {
        Ok(_) => Ok("closed".into()),
        Err(_) => Ok("left".into()),
    }
}
