//! What attested TLS costs: the time from connecting to a finished handshake, and to a verified connection, in
//! interleaved pairs. `cargo run --release -p casemate-e2e --example handshake`, after the programs were built.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, anyhow, ensure};
use casemate_attest::{Policy, UnixTime};
use casemate_channel::tls::{Handshake, client_config, server_name};
use casemate_channel::verify::{AttestationResponse, Challenge, MAX_RESPONSE, verify_connection};
use casemate_e2e::Stage;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const PAIRS: usize = 100;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut stage = Stage::until_replicas(1)?;
    stage.deployment.start_replica(0)?;
    let address = stage.deployment.replicas()[0].attested_tls;
    let policy = std::fs::read_to_string(stage.path("user-policy.toml"))?;
    let policy = Policy::from_toml(&policy)?;
    let (mut plain, mut attested) = (Vec::new(), Vec::new());
    // The first of each pays for what is only done once.
    for round in 0..=PAIRS {
        let started = Instant::now();
        connect(address).await?;
        let handshake = started.elapsed();
        let started = Instant::now();
        verify(connect(address).await?, &policy).await?;
        let verified = started.elapsed();
        if round > 0 {
            plain.push(handshake);
            attested.push(verified);
        }
    }
    println!("{PAIRS} interleaved pairs on loopback, milliseconds: median, p95");
    show("connected, handshake finished", plain);
    show("connected, handshake finished, verified", attested);
    Ok(())
}

async fn connect(address: SocketAddr) -> Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let connector = TlsConnector::from(client_config()?);
    Ok(connector.connect(server_name(), stream).await?)
}

async fn verify(mut stream: TlsStream<TcpStream>, policy: &Policy) -> Result<()> {
    let handshake = Handshake::of(stream.get_ref().1)?;
    let challenge = Challenge::new(now()?)?;
    let path = challenge.path_and_query();
    let request = format!("GET {path} HTTP/1.1\r\nhost: enclave\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    let limit = MAX_RESPONSE as u64 + 4096;
    stream.take(limit).read_to_end(&mut answer).await?;
    ensure!(answer.starts_with(b"HTTP/1.1 200 "), "no evidence");
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let body = &answer[head.context("no head")? + 4..];
    let response = AttestationResponse::from_json(body).map_err(|denial| anyhow!("{denial}"))?;
    let (_, outcome) = verify_connection(&response, &challenge, &handshake, policy, now()?);
    outcome.map_err(|denial| anyhow!("{denial}"))?;
    Ok(())
}

fn now() -> Result<UnixTime> {
    UnixTime::try_from(SystemTime::now()).context("the clock is before 1970")
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e3;
    println!("{what:40} {:.2}  {:.2}", at(50), at(95));
}
