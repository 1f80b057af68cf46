//! casemate-worker: multiplies matrices for enclaves that do not trust it.

#![forbid(unsafe_code)]

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use casemate_wire::Address;
use casemate_worker::backend::{Device, cpu::Cpu};
use casemate_worker::connection::Limits;
use casemate_worker::listener::{self, Listener, Places};
use casemate_worker::memory::{Share, TooLittle, parse_size};
use casemate_worker::tls::Identity;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use tracing_subscriber::EnvFilter;

/// What the codes mean, for `--help`: those of `casemate` that can happen here.
const CODES: &str = "\
Exit codes:
   0  stopped as it was told to
   2  wrong usage
  40  the system: address taken, no such device, no threads, no key";

const USAGE: u8 = 2;
const SYSTEM: u8 = 40;

/// Multiplies matrices for enclaves that do not trust it.
///
/// It is sent public weights and uniformly random numbers, holds no keys and learns no prompts. Nothing
/// authenticates its clients: whoever reaches its address can have one of its places, so let only enclaves reach it.
#[derive(Parser)]
#[command(name = "casemate-worker", version, after_help = CODES)]
struct Arguments {
    /// Where enclaves connect: unix:PATH or tcp:IP:PORT
    #[arg(long, value_name = "ADDRESS")]
    listen: Address,
    /// Memory for everything that connections take, such as 8GiB; divided evenly among them
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: u64,
    /// How many connections at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    connections: u16,
    /// Serve through TLS with the private key in this file, which is made if it is not there
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// What multiplies
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// Threads that multiply, if the processor does; as many as it has cores, unless told otherwise
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Which events are logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: tracing::Level,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backend {
    /// The fastest that is there
    Auto,
    /// The processor
    Cpu,
    /// An NVIDIA GPU through CUDA
    Cuda,
    /// A GPU through Vulkan, or Vulkan in software
    Wgpu,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!(
            "off,casemate_worker={}",
            arguments.log
        )))
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-worker: {error:#}");
            let usage = error.is::<TooLittle>();
            ExitCode::from(if usage { USAGE } else { SYSTEM })
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let memory = Share::of(arguments.memory, arguments.connections.into())?;
    let identity = arguments
        .identity
        .as_deref()
        .map(Identity::at)
        .transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot wait for signals")?;
    let device = runtime.block_on(device(arguments))?;
    let memory = of_device(memory, &*device, arguments.connections.into())?;
    // Before anything is accepted, so that no signal is missed.
    let mut ends = runtime.block_on(async {
        Ok::<_, std::io::Error>([
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        ])
    })?;
    let listen = || format!("cannot listen on {}", arguments.listen);
    let listener = Listener::bind(&arguments.listen).with_context(listen)?;
    let address = listener.address()?;
    info!(
        "{} multiplies for up to {} connections with {memory} bytes for the matrices of each",
        device.name(),
        arguments.connections
    );
    if let Some(identity) = &identity {
        println!("key {}", identity.fingerprint());
    }
    let places = Arc::new(Places {
        identity,
        device,
        count: arguments.connections.into(),
        memory,
        limits: Limits::default(),
    });
    let listener = Arc::new(listener);
    let accepting = Arc::clone(&listener);
    thread::Builder::new()
        .name("accepting".into())
        .spawn(move || listener::serve(&accepting, &places))?;
    println!("listening on {address}");
    let [terminate, interrupt] = &mut ends;
    runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    info!("ending");
    listener.clean_up();
    Ok(())
}

/// No more than the device has, if matrices are kept in memory of its own.
fn of_device(memory: u64, device: &dyn Device, connections: u64) -> anyhow::Result<u64> {
    match device.memory(connections) {
        Some(0) => anyhow::bail!(
            "{} has no memory left for {connections} connections: see what else uses it, or take fewer --connections",
            device.name()
        ),
        Some(most) if most < memory => {
            info!("{} has less memory than --memory allows", device.name());
            Ok(most)
        }
        _ => Ok(memory),
    }
}

async fn device(arguments: &Arguments) -> anyhow::Result<Arc<dyn Device>> {
    match arguments.backend {
        Backend::Cpu => cpu(arguments),
        Backend::Cuda => cuda(),
        Backend::Wgpu => gpu().await,
        Backend::Auto => match cuda() {
            Ok(cuda) => Ok(cuda),
            Err(_) => match gpu().await {
                Ok(gpu) if gpu.is_hardware() => Ok(gpu),
                _ => cpu(arguments),
            },
        },
    }
}

fn cpu(arguments: &Arguments) -> anyhow::Result<Arc<dyn Device>> {
    let cores = || thread::available_parallelism().ok();
    let threads = arguments.threads.or_else(cores);
    let threads = threads.map_or(1, NonZeroUsize::get);
    Ok(Arc::new(Cpu::new(threads).context("cannot start threads")?))
}

#[cfg(feature = "cuda")]
fn cuda() -> anyhow::Result<Arc<dyn Device>> {
    use casemate_worker::backend::cuda::Cuda;

    Ok(Arc::new(Cuda::new()?))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> anyhow::Result<Arc<dyn Device>> {
    anyhow::bail!("this worker was built without cuda; `--features cuda` builds one with it")
}

#[cfg(feature = "wgpu")]
async fn gpu() -> anyhow::Result<Arc<dyn Device>> {
    use casemate_worker::backend::wgpu::Wgpu;

    Ok(Arc::new(Wgpu::new().await?))
}

#[cfg(not(feature = "wgpu"))]
async fn gpu() -> anyhow::Result<Arc<dyn Device>> {
    anyhow::bail!("this worker was built without wgpu; `--features wgpu` builds one with it")
}
