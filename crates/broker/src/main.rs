//! casemate-broker: appraises evidence, releases keys, signs credentials, logs decisions.

#![forbid(unsafe_code)]

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use casemate_broker::admin::{self, AdminClient};
use casemate_broker::broker::{Broker, Settings};
use casemate_broker::clock::{Clock, SystemClock};
use casemate_broker::log::Anchor;
use casemate_broker::sessions::SessionLimits;
use casemate_broker::state::{State, database, issuer_public_key};
use casemate_broker::{api, store};
use casemate_container::signing::VerifyingKey;
use casemate_listen::{Limits, Server};
use casemate_release::credential::MAX_LIFETIME_SECONDS;
use casemate_release::random::SystemRandom;
use casemate_release::rcar::ResourcePath;
use clap::{Args, Parser, Subcommand};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use zeroize::Zeroizing;

/// Releases model keys to attested enclaves and says whose deployment they are.
#[derive(Parser)]
#[command(name = "casemate-broker", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Creates a state directory with fresh keys and prints the issuer's public key.
    Init {
        /// Directory to create, mode 0700.
        #[arg(long)]
        state: PathBuf,
    },
    /// Serves the key-release protocol until SIGTERM or SIGINT.
    Serve(Serve),
    /// Administers a serving broker over its Unix socket.
    Admin(Admin),
}

#[derive(Args)]
struct Serve {
    /// State directory made by `init`.
    #[arg(long)]
    state: PathBuf,
    /// Address to listen on; port 0 picks a free one.
    #[arg(long, default_value = "127.0.0.1:8070")]
    listen: SocketAddr,
    /// Administration socket [default: admin.sock in the state directory].
    #[arg(long)]
    admin_socket: Option<PathBuf>,
    /// Life of a nonce in seconds.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=3600))]
    nonce_lifetime: u64,
    /// Life of an attested session in seconds.
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    session_lifetime: u64,
    /// Life of a deployment credential in seconds.
    #[arg(long, default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=MAX_LIFETIME_SECONDS))]
    credential_lifetime: u64,
}

#[derive(Args)]
struct Admin {
    /// The broker's administration socket.
    #[arg(long, global = true)]
    socket: Option<PathBuf>,
    /// Prints JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Subcommand)]
enum AdminCommand {
    /// Identity, policy, counts and the end of the log.
    Status,
    /// The policy under which evidence is appraised.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// The secrets that can be released.
    #[command(subcommand)]
    Resource(ResourceCommand),
    /// The decision log.
    #[command(subcommand)]
    Log(LogCommand),
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Puts a policy into force; its version must be higher than the present one.
    Set {
        /// The policy, TOML.
        file: PathBuf,
    },
    /// Prints the policy in force.
    Show,
}

#[derive(Subcommand)]
enum ResourceCommand {
    /// Stores a resource, replacing one of the same path.
    Put {
        /// repository/type/tag, for example default/model/smollm2.
        path: ResourcePath,
        /// A key grant made by `casemate grant`.
        #[arg(long, required_unless_present = "opaque", conflicts_with = "opaque")]
        grant: Option<PathBuf>,
        /// Any other secret; it is released under the policy's measurements alone.
        #[arg(long)]
        opaque: Option<PathBuf>,
        /// Name under which the service may be credentialed [default: the tag].
        #[arg(long)]
        service: Option<String>,
    },
    /// Lists resources.
    List,
    /// Deletes a resource.
    Delete {
        /// repository/type/tag.
        path: ResourcePath,
    },
}

#[derive(Subcommand)]
enum LogCommand {
    /// Prints entries.
    Show {
        /// Position of the first entry.
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// Most entries to print.
        #[arg(long, default_value_t = 1000)]
        limit: u64,
    },
    /// Checks the whole chain and the signature of its end.
    Verify {
        /// A database or state directory to check without a broker.
        #[arg(long, value_name = "PATH")]
        offline: Option<PathBuf>,
        /// The issuer's public key in hex, when --offline is not a state directory.
        #[arg(long, requires = "offline")]
        issuer: Option<VerifyingKey>,
        /// SIZE:HEX as a credential states it; the log must contain this head.
        #[arg(long, value_parser = |text: &str| admin::parse_anchor(text).ok_or("expected SIZE:HEX"))]
        anchor: Option<Anchor>,
    },
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .init();
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Init { state } => init(&state),
        Command::Serve(options) => runtime().and_then(|runtime| runtime.block_on(serve(options))),
        Command::Admin(options) => {
            runtime().and_then(|runtime| runtime.block_on(administer(options)))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-broker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting threads")
}

fn init(directory: &std::path::Path) -> Result<()> {
    let state = State::init(directory, Arc::new(SystemRandom), SystemClock.now())?;
    println!("{}", state.issuer.verifying_key());
    Ok(())
}

async fn serve(options: Serve) -> Result<()> {
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
    let (public, private) = tokio::join!(public, private);
    if public.cut_off + private.cut_off > 0 {
        tracing::warn!("requests were cut off at shutdown");
    }
    let _ = std::fs::remove_file(&socket);
    tracing::info!("stopped");
    Ok(())
}

async fn administer(options: Admin) -> Result<()> {
    let json = options.json;
    if let AdminCommand::Log(LogCommand::Verify {
        offline: Some(path),
        issuer,
        anchor,
    }) = options.command
    {
        return verify_offline(path, issuer, anchor, json);
    }
    let Some(socket) = options.socket else {
        bail!("--socket PATH is needed: the administration socket of a serving broker");
    };
    let client = AdminClient::new(socket);
    match options.command {
        AdminCommand::Status => print(&client.status().await?, true),
        AdminCommand::Policy(PolicyCommand::Set { file }) => {
            let toml = std::fs::read_to_string(&file)
                .with_context(|| format!("policy {}", file.display()))?;
            print(&client.set_policy(toml).await?, json);
        }
        AdminCommand::Policy(PolicyCommand::Show) => {
            let policy = client.policy().await?;
            match policy["toml"].as_str() {
                Some(toml) if !json => print!("{toml}"),
                _ => print(&policy, true),
            }
        }
        AdminCommand::Resource(ResourceCommand::Put {
            path,
            grant,
            opaque,
            service,
        }) => {
            let is_grant = grant.is_some();
            let Some(file) = grant.or(opaque) else {
                bail!("--grant or --opaque is needed")
            };
            let bytes = Zeroizing::new(
                std::fs::read(&file).with_context(|| format!("resource {}", file.display()))?,
            );
            print(
                &client
                    .put_resource(&path, &bytes, is_grant, service)
                    .await?,
                json,
            );
        }
        AdminCommand::Resource(ResourceCommand::List) => {
            let reply = client.resources().await?;
            if json {
                print(&reply, true);
            } else {
                for resource in reply["resources"].as_array().into_iter().flatten() {
                    let text = |key: &str| resource[key].as_str().unwrap_or("-").to_owned();
                    println!(
                        "{}\t{}\t{}",
                        text("path"),
                        text("service"),
                        text("model_digest")
                    );
                }
            }
        }
        AdminCommand::Resource(ResourceCommand::Delete { path }) => {
            client.delete_resource(&path).await?;
        }
        AdminCommand::Log(LogCommand::Show { from, limit }) => {
            let reply = client.log(from, limit).await?;
            for entry in reply["entries"].as_array().into_iter().flatten() {
                // One entry per line, so that the output can be cut and searched.
                println!("{entry}");
            }
        }
        AdminCommand::Log(LogCommand::Verify { anchor, .. }) => {
            print_head(&client.verify_log(anchor.as_ref()).await?, json);
        }
    }
    Ok(())
}

fn verify_offline(
    path: PathBuf,
    issuer: Option<VerifyingKey>,
    anchor: Option<Anchor>,
    json: bool,
) -> Result<()> {
    let (file, issuer) = if path.is_dir() {
        let issuer = match issuer {
            Some(issuer) => issuer,
            None => std::fs::read_to_string(issuer_public_key(&path))
                .with_context(|| format!("{}", issuer_public_key(&path).display()))?
                .trim()
                .parse()
                .context("issuer.pub")?,
        };
        (database(&path), issuer)
    } else {
        (
            path,
            issuer.context("--issuer HEX is needed to check a database file")?,
        )
    };
    let head = store::verify_offline(&file, &issuer, anchor)?;
    print_head(&serde_json::to_value(head)?, json);
    Ok(())
}

fn print_head(head: &Value, json: bool) {
    if json {
        print(head, true);
    } else {
        println!(
            "the log is whole: {} entries, head {}",
            head["size"],
            text(&head["hash"])
        );
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn print(value: &Value, json: bool) {
    if json {
        println!("{value:#}");
        return;
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            Value::String(text) => println!("{name}: {text}"),
            other => println!("{name}: {other}"),
        }
    }
}
