//! `casemate proxy`: an OpenAI-compatible server on loopback that verifies a service and encrypts
//! every request to it.
//!
//! [`session`] holds the verified service and keeps it fresh, [`presence`] knows whether it is there and [`ready`] tells,
//! [`forward`] carries requests, [`receipts`] completes and saves receipts, [`refusal`] is how this proxy itself says no.

#[cfg(test)]
mod direct_tests;
mod forward;
mod presence;
mod ready;
mod receipts;
mod refusal;
mod session;
#[cfg(test)]
pub(crate) mod tests;

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use axum::serve::ListenerExt as _;
use casemate_kernels::hardening::Hardening;
use casemate_listen::{Limits, Server};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{Failure, print};
use crate::service::{NotVerified, Service};
use crate::verdict::Verdict;
use crate::verify::read_policy;
use receipts::Saver;
use session::Session;

/// Connections of clients at once, where the system grants as many descriptors.
const CONNECTIONS: usize = 2048;
/// Behind a refusal.
const MORE: &str = "likely cause and what to do: `casemate verify --json` of the same service and policy, piped into \
                    `casemate explain -`";

/// Serve an OpenAI-compatible API on loopback, and forward requests, encrypted, to a verified
/// service.
///
/// Nothing is served unless the service verifies; it is verified again before its keys, its
/// credential or its evidence get too old. GET /readyz tells whether a request would be served now, and what the service
/// proved last. Exit code when it does not start: as `casemate verify`. `casemate explain` reads what the proxy answers
/// when it refuses.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// URL of the service, as its provider gave it to you: https:// or http://, where anybody may stand
    /// in between, or tls://HOST:PORT for a connection that ends inside the enclave.
    #[arg(long, alias = "enclave", value_name = "URL")]
    service: String,
    /// The policy file that says what is accepted; docs/policy.md describes it.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// PEM file of the certificate authorities for https, instead of the system's. Trust in the service does not rest
    /// on them.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Address to listen on. Whoever reaches it can use the service in your name: keep it on loopback
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Save a receipt for each answer in this directory: ID.json, readable by you alone. See `casemate receipt`
    #[arg(long, value_name = "DIR")]
    receipts: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, granted: Hardening) -> Result<(), Failure> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("CASEMATE_LOG")
                .unwrap_or_else(|_| "casemate=info".into()),
        )
        .init();
    tracing::info!("{granted}");
    let service = Service::new(
        &args.service,
        read_policy(&args.policy)?,
        args.ca.as_deref(),
    )?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failure::io)?;
    let saver = args.receipts.as_deref().map(saver).transpose()?;
    runtime.block_on(serve(service, saver, args.listen))
}

/// Where receipts are saved; better to fail now than with the first answer.
fn saver(directory: &Path) -> Result<Saver, Failure> {
    std::fs::create_dir_all(directory)
        .with_context(|| directory.display().to_string())
        .map_err(Failure::io)?;
    Ok(Saver::new(directory.to_owned()))
}

async fn serve(service: Service, saver: Option<Saver>, listen: SocketAddr) -> Result<(), Failure> {
    let url = service.url().clone();
    let verification = service.verify().await.map_err(NotVerified::into_failure)?;
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    print(
        Verdict::of(&service, &verification)
            .to_text(colour)
            .trim_end(),
    )?;
    let denied = |denied: NotVerified| denied.into_failure().hint(MORE);
    let session = Session::new(service, verification).map_err(denied)?;
    let session = Arc::new(session);

    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen}"))
        .map_err(Failure::io)?;
    let address = listener.local_addr().map_err(Failure::io)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::io)?;
    print(&format!("forwarding to {url}\nlistening on {address}"))?;

    let renewal = tokio::spawn(session::keep_fresh(session.clone()));
    // A token must not wait for the next one to fill a packet.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let shutdown = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    let limits = Limits {
        connections: CONNECTIONS,
        ..Limits::default()
    };
    let server = Server::new(limits.within_descriptors());
    let ended = server
        .serve(
            listener,
            forward::router(session, saver.clone(), address),
            shutdown,
        )
        .await;
    renewal.abort();
    if let Some(saver) = saver {
        saver.finish().await;
    }
    if ended.cut_off > 0 {
        tracing::warn!("answers were cut off at shutdown");
    }
    Ok(())
}
