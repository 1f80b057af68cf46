//! `casemate-broker serve`: files, sockets and signals around the library.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use casemate_broker::broker::{Broker, Settings};
use casemate_broker::clock::SystemClock;
use casemate_broker::denials;
use casemate_broker::sessions::SessionLimits;
use casemate_broker::state::State;
use casemate_broker::{admin, api};
use casemate_listen::{Limits, Server};
use casemate_release::credential::MAX_LIFETIME_SECONDS;
use casemate_release::random::SystemRandom;
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Args)]
pub(crate) struct Serve {
    /// State directory made by `init`.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Address to listen on; port 0 picks a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8070")]
    listen: SocketAddr,
    /// Administration socket [default: admin.sock in the state directory].
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<PathBuf>,
    /// Life of a nonce in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=3600))]
    nonce_lifetime: u64,
    /// Life of an attested session in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    session_lifetime: u64,
    /// Life of a deployment credential in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=MAX_LIFETIME_SECONDS))]
    credential_lifetime: u64,
}

pub(crate) async fn serve(options: Serve) -> Result<()> {
    let random = Arc::new(SystemRandom);
    let state = State::open(&options.state, random.clone())?;
    let settings = Settings {
        sessions: SessionLimits {
            nonce_life: Duration::from_secs(options.nonce_lifetime),
            session_life: Duration::from_secs(options.session_lifetime),
            ..SessionLimits::default()
        },
        credential_life: Duration::from_secs(options.credential_lifetime),
    };
    let broker = Arc::new(Broker::new(state, Arc::new(SystemClock), random, settings)?);
    match broker.policy() {
        None => tracing::warn!("no policy is in force: nothing will be released until one is set"),
        Some(policy) => {
            if let Some(root) = policy.dangerous_development_root() {
                admin::warn_development(root);
            }
        }
    }
    broker.warn_of_former_grants()?;
    let listener = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("cannot listen on {}", options.listen))?;
    let address = listener.local_addr()?;
    let socket = options
        .admin_socket
        .unwrap_or_else(|| options.state.join("admin.sock"));
    let admin_listener = admin::bind(&socket)
        .await
        .with_context(|| format!("cannot listen on {}", socket.display()))?;

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM handler")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT handler")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop.send(true);
    });
    let until_stopped = || {
        let mut stopped = stopped.clone();
        async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    };
    let limits = Limits::default().within_descriptors();
    let public =
        Server::new(limits.clone()).serve(listener, api::router(broker.clone()), until_stopped());
    let private = Server::new(limits).serve(
        admin_listener,
        admin::router(broker.clone()),
        until_stopped(),
    );
    println!("listening on {address}");
    std::io::stdout().flush().context("standard output")?;
    let counting = tokio::spawn(denials::keep_counted(
        broker.clone(),
        denials::COUNTED_WITHIN,
    ));
    let (public, private) = tokio::join!(public, private);
    counting.abort();
    if public.cut_off + private.cut_off > 0 {
        tracing::warn!("requests were cut off at shutdown");
    }
    broker.log_what_was_left_out()?;
    let _ = std::fs::remove_file(&socket);
    tracing::info!("stopped");
    Ok(())
}
