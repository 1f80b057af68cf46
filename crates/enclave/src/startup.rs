//! The order in which an enclave comes to serve, and how it stops.
//!
//! ```text
//! listen ─► TEE ─► harden ─► find the model ─► attest, receive key ─► unlock model, recompute digests
//!        ─► pack for the engine ─► keyset ─► attest again, receive credential ─► ready
//! ```
//! The address is taken and the model's header read first, so that a port in use or a missing file ends the start before
//! a key is released.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use axum::serve::ListenerExt as _;
use casemate_attest::measure::FileDigest;
use casemate_container::{Adapter, SealedFile, Silent};
use casemate_engine::outsource::Outsource;
use casemate_engine::{Engine, EngineOptions};
use casemate_kernels::hardening;
use casemate_kernels::mem::Granted;
use casemate_listen::{Limits, Server, connections_within_descriptors};
use casemate_tee::{ConfigfsTsm, QuoteProvider, QuotingService};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::access::{self, Access};
use crate::adapters::Offered;
use crate::api::{self, Api};
use crate::arrival::{self, Arrivals};
use crate::attested_tls::AttestedTls;
use crate::bodies::Bodies;
use crate::clock::SteadyClock;
use crate::config::{self, MeasuredConfig, Tee};
use crate::gateway::{self, Gateway};
use crate::linger::Lingering;
use crate::metrics::Metrics;
use crate::offload;
use crate::provision::{Provisioner, Session};
use crate::receipts::{self, Receipts};
use crate::relay::{self, Peers};
use crate::renewal;
use crate::server::{self, Ready, Shared};
use crate::serving::{Served, Serving};
use crate::workers::Workers;

/// How long a quoting service may take to answer.
const QUOTE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often old receipts are looked for.
const FORGET_INTERVAL: Duration = Duration::from_secs(20);
/// How long running answers may take to finish after a request to stop.
const GRACE: Duration = Duration::from_secs(20);
/// Answers that may wait for a place in the batch.
const WAITING: usize = 1024;
/// Connections served at once, where the system grants as many descriptors.
const CONNECTIONS: usize = 4096;

/// Of those by attested TLS, each of which holds the library's buffers.
const ATTESTED_CONNECTIONS: usize = 1024;

/// The system's clocks.
static CLOCK: LazyLock<SteadyClock> = LazyLock::new(|| {
    let wall = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    };
    SteadyClock::new(wall, access::monotonic())
});

/// Seconds since the Unix epoch, by the system's clocks.
pub fn system_clock() -> u64 {
    CLOCK.now()
}

/// Runs the enclave until it is told to stop; `workers` prepare requests.
pub async fn run(measured: MeasuredConfig, workers: Workers) -> Result<()> {
    let address = measured.config.service.listen;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let bound = listener.local_addr()?;
    let attested = match measured.config.service.attested_tls {
        None => None,
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address}"))?,
        ),
    };

    let quoter = connect_tee(&measured.config.tee)?;
    info!("{}", hardening::before_secrets());

    let metrics = Arc::new(Metrics::default());
    let shared = Arc::new(Shared {
        ready: OnceLock::new(),
        stopping: AtomicBool::new(false),
        metrics: Arc::clone(&metrics),
        clock: system_clock,
    });
    let (stop, stopped) = tokio::sync::watch::channel(false);
    // A relay holds a connection to a peer, and may be closing one while it opens the next.
    let reserved = match measured.config.service.peers.as_slice() {
        [] => 0,
        _ => 2 * relay::RELAYS,
    };
    let budget = connections_within_descriptors(reserved);
    let (prompts, by_tls) = places(budget, attested.is_some());
    let limits = Limits {
        connections: prompts,
        grace: GRACE,
        ..Limits::default()
    };
    let connections = Server::new(limits.clone());
    metrics.connections(connections.counters());
    let routes = server::router(Arc::clone(&shared));
    let mut servers = JoinSet::new();
    servers.spawn(connections.serve(prompt(listener), routes, asked(stopped.clone())));
    if let Some(listener) = attested {
        println!("attested TLS on {}", listener.local_addr()?);
        let door = AttestedTls::new(Arc::clone(&shared));
        let limits = Limits {
            connections: by_tls,
            ..limits
        };
        servers.spawn(Server::new(limits).serve(prompt(listener), door, asked(stopped)));
    }
    println!("listening on {bound}");
    std::io::stdout().flush()?;

    let ready = tokio::select! {
        ready = prepare(measured, quoter, workers, metrics, arriving(prompts, by_tls)) => ready?,
        _ = termination() => return Ok(()),
    };
    let serving = Arc::clone(&ready.serving);
    let receipts = Arc::clone(&ready.receipts);
    let _ = shared.ready.set(ready);
    info!("ready");
    let fresh = renewal::keep_fresh(serving, &CLOCK, renewal::system_chance());
    let renewal = tokio::spawn(async { tokio::join!(fresh, forget_receipts(receipts)) });

    termination().await;
    info!(
        "stopping: running answers may finish for {} s",
        GRACE.as_secs()
    );
    renewal.abort();
    shared.stopping.store(true, Ordering::Relaxed);
    let _ = stop.send(true);
    let ended = servers.join_all().await;
    if ended.iter().any(|ended| ended.cut_off > 0) {
        warn!("answers were still running and are cut off");
    }
    Ok(())
}

/// How many of the connections that descriptors allow each server gets: the one for encapsulated requests, and the one
/// for attested TLS.
fn places(budget: usize, attested: bool) -> (usize, usize) {
    let by_tls = match attested {
        true => (budget / 4).clamp(1, ATTESTED_CONNECTIONS),
        false => 0,
    };
    (budget.saturating_sub(by_tls).clamp(1, CONNECTIONS), by_tls)
}

/// How many requests may be arriving, at both doors together: of each door's connections half stay free of them even if
/// all come by that one.
fn arriving(prompts: usize, by_tls: usize) -> usize {
    let smaller = match by_tls {
        0 => prompts,
        by_tls => prompts.min(by_tls),
    };
    (smaller / 2).clamp(1, gateway::ARRIVING)
}

/// Connections on which a token does not wait for the next one to fill a packet.
fn prompt(listener: TcpListener) -> impl axum::serve::Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    })
}

async fn asked(mut stopped: tokio::sync::watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stop| *stop).await;
}

fn connect_tee(tee: &Tee) -> Result<Arc<dyn QuoteProvider>> {
    let quoter: Arc<dyn QuoteProvider> = match tee {
        Tee::ConfigfsTsm { collateral } => Arc::new(ConfigfsTsm::new(Some(collateral.clone()))),
        Tee::QuotingService { socket } => Arc::new(
            QuotingService::connect(socket, QUOTE_TIMEOUT).with_context(|| {
                format!("cannot reach the quoting service {}", socket.display())
            })?,
        ),
    };
    info!(source = quoter.name(), "evidence source");
    Ok(quoter)
}

async fn prepare(
    measured: MeasuredConfig,
    quoter: Arc<dyn QuoteProvider>,
    workers: Workers,
    metrics: Arc<Metrics>,
    arriving: usize,
) -> Result<Ready> {
    let MeasuredConfig { config, bytes } = measured;
    let provisioner = Provisioner::new(&config, FileDigest::of(&bytes), quoter)?;

    // Nobody is asked for the key of a file that is not there, or is no sealed model.
    let (model, adapters) = (config.model.clone(), config.adapters.clone());
    let files = tokio::task::spawn_blocking(move || Files::open(&model, &adapters))
        .await
        .context("opening the model was interrupted")??;

    let started = Instant::now();
    let session = provisioner.obtain_key().await?;
    metrics.key_released(started.elapsed());
    info!(
        model = %session.grant.model_digest(),
        minimum_version = session.grant.minimum_version(),
        "key received, and the provider's signature on it holds"
    );
    for (adapter, grant) in config.adapters.iter().zip(&session.adapters) {
        let digest = grant.model_digest();
        info!(name = adapter.name, adapter = %digest, "key of an adapter received");
        if session.grant.access().is_open() && !grant.access().is_open() {
            warn!(
                name = adapter.name,
                "the adapter is for API keys, but the model's grant asks for none: nobody can use it"
            );
        }
    }

    let started = Instant::now();
    let (model, adapters) = (config.model.clone(), config.adapters.clone());
    let offload = config.offload.clone();
    let counted = Arc::clone(&metrics);
    let (mut served, engine, session) = tokio::task::spawn_blocking(move || {
        unlock_and_pack(
            files,
            &model,
            &adapters,
            offload.as_ref(),
            &counted,
            session,
        )
    })
    .await
    .context("loading the model was interrupted")??;
    served.attested_tls = config.service.attested_tls.is_some();
    metrics.model_loaded(started.elapsed());

    let digest = served.digest.to_string();
    let adapters = Arc::clone(&served.adapters);
    let access = Arc::new(Access::new(
        session.grant.access(),
        access::monotonic(),
        Arc::clone(&metrics),
    ));
    let serving = Serving::start(
        provisioner,
        &session,
        served,
        Arc::clone(&access),
        system_clock(),
    )
    .await?;
    let serving = Arc::new(serving);
    info!("credential received, and the issuer's signature on it holds");

    let limits = relay::Limits {
        bytes: gateway::MAX_ENCAPSULATED,
        arrival: arrival::ARRIVAL,
    };
    let peers = Peers::new(config.service.peers, limits, Arc::clone(&metrics))
        .context("cannot prepare to relay requests")?;

    let fingerprint = format!("fp_{}", &digest[..12]);
    access::announce(session.grant.access());
    let perturbation =
        api::PerturbationKey::derive(session.grant.data_key(), session.grant.model_digest());
    let api = Api::new(engine, config.service.name, fingerprint, system_clock)
        .with_adapters(adapters)
        .with_extraction(config.extraction, perturbation)
        .with_metrics(Arc::clone(&metrics));
    let receipts = Arc::new(Receipts::new(receipts::Limits::default(), system_clock));
    let waiting = Arc::new(Bodies::default());
    metrics.bodies_waiting(Arc::clone(&waiting));
    let gateway = Gateway {
        serving: Arc::clone(&serving),
        access,
        api: receipts::wrap(api::router(api.clone()), Arc::clone(&receipts)),
        workers,
        arrivals: Arc::new(Arrivals::new(arriving)),
        arriving: Arc::default(),
        waiting,
        lingering: Lingering::default(),
        peers: Arc::new(peers),
        metrics,
        clock: system_clock,
    };
    Ok(Ready {
        serving,
        gateway,
        api,
        receipts,
    })
}

/// Containers whose headers are in order.
struct Files {
    model: SealedFile,
    /// In the order of the configuration.
    adapters: Vec<SealedFile>,
}

impl Files {
    fn open(model: &config::Model, adapters: &[config::Adapter]) -> Result<Files> {
        let opened = adapters.iter().map(|adapter| {
            SealedFile::open(&adapter.path).with_context(|| cannot_open_adapter(adapter))
        });
        Ok(Files {
            model: SealedFile::open(&model.path)
                .with_context(|| format!("cannot open the model {}", model.path.display()))?,
            adapters: opened.collect::<Result<_>>()?,
        })
    }
}

fn cannot_open_adapter(adapter: &config::Adapter) -> String {
    let path = adapter.path.display();
    format!("cannot open the adapter {:?}, {path}", adapter.name)
}

/// Unlocks adapters with their granted keys and compares each with its grant.
fn unlock_adapters(
    files: Vec<SealedFile>,
    adapters: &[config::Adapter],
    session: &Session,
    threads: usize,
) -> Result<(Vec<Adapter>, Vec<Arc<Offered>>)> {
    let (mut containers, mut offered) = (Vec::new(), Vec::new());
    for ((file, adapter), grant) in files.into_iter().zip(adapters).zip(&session.adapters) {
        let context = || cannot_open_adapter(adapter);
        let unlocked = file
            .unlock(grant.data_key(), grant.provider())
            .with_context(context)?;
        let version = unlocked.manifest().version();
        grant.check_model(&unlocked.digest(), version)?;
        let container = unlocked
            .load_adapter(threads, &Silent)
            .with_context(context)?;
        let digest = container.digest();
        info!(
            name = adapter.name,
            adapter = %digest,
            version,
            rank = container.config().rank,
            "adapter opened, every digest recomputed"
        );
        let users = grant.access().clone();
        offered.push(Arc::new(Offered::new(
            adapter.name.clone(),
            digest,
            version,
            users,
            api::PerturbationKey::derive(grant.data_key(), &digest),
        )));
        containers.push(container);
    }
    Ok((containers, offered))
}

/// Unlocks the containers with the granted keys, compares them with the grants, and packs them for computing.
fn unlock_and_pack(
    files: Files,
    config: &config::Model,
    adapters: &[config::Adapter],
    offload: Option<&config::Offload>,
    metrics: &Metrics,
    session: Session,
) -> Result<(Served, Engine, Session)> {
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let context = || format!("cannot open the model {}", config.path.display());
    let unlocked = files
        .model
        .unlock(session.grant.data_key(), session.grant.provider())
        .with_context(context)?;
    let manifest = unlocked.manifest();
    session
        .grant
        .check_model(&unlocked.digest(), manifest.version())?;
    let (name, version) = (manifest.name().to_owned(), manifest.version());

    let started = Instant::now();
    let model = unlocked.load(threads, &Silent).with_context(context)?;
    info!(
        model = %model.digest(),
        name,
        version,
        seconds = started.elapsed().as_secs_f64(),
        "model opened, every digest recomputed"
    );
    let digest = model.digest();
    let options = EngineOptions {
        compute: config.compute.into(),
        kv_type: config.kv_type.map(Into::into),
        threads,
        max_context: config.max_context,
        max_batch: config.max_batch,
        max_waiting: WAITING,
        reuse: Duration::from_secs(config.reuse_seconds.into()),
        speculation: config.speculation.into(),
        oblivious: config.oblivious,
        ..EngineOptions::default()
    };
    let (adapters, offered) = unlock_adapters(files.adapters, adapters, &session, threads)?;
    let offload = offload
        .map(|config| offload::prepare(config, model.manifest()))
        .transpose()?;
    let layers = offload.as_ref().map(|(_, layers)| Arc::clone(layers));
    let outsource = layers.map(|layers| layers as Arc<dyn Outsource>);
    let engine = Engine::load_with(model, adapters, &options, outsource, &Silent)?;
    if let Some((offload, layers)) = offload {
        layers.start().context("cannot start the offload")?;
        if let Some(granted) = offload.mask_memory() {
            report_memory("masks, which come as there is time", Some(granted));
        }
        metrics.offload(offload);
    }
    info!(
        compute = engine.compute_name(),
        threads,
        context = engine.context(),
        weight_bytes = engine.weight_bytes(),
        adapter_bytes = engine.adapter_bytes(),
        kv_bytes = engine.stats().kv_bytes,
        "engine ready"
    );
    if let Some((embeddings, texts)) = engine.oblivious_bytes() {
        info!(
            embeddings,
            texts,
            "oblivious: so many bytes are read for each 32 rows of a step, and for each token"
        );
    }
    report_memory("weights", engine.weight_memory());
    report_memory("KV cache, which grows as it is used", engine.kv_memory());
    let served = Served {
        digest,
        name,
        version,
        adapters: offered.into(),
        compute: engine.compute_name().to_owned(),
        attested_tls: false,
    };
    Ok((served, engine, session))
}

/// Says what the kernel made of memory, not what it was asked for.
fn report_memory(of: &str, granted: Option<Granted>) {
    match granted {
        Some(granted) => info!(
            bytes = granted.bytes,
            resident = granted.resident,
            in_huge_pages = granted.huge,
            locked = granted.locked,
            excluded_from_dumps = granted.dump_excluded,
            "memory of the {of}"
        ),
        None => warn!("the system does not say what it made of the memory of the {of}"),
    }
}

/// Lets old receipts go.
async fn forget_receipts(receipts: Arc<Receipts>) {
    loop {
        tokio::time::sleep(FORGET_INTERVAL).await;
        receipts.forget_old();
    }
}

async fn termination() {
    let mut terminate = signal(SignalKind::terminate()).expect("signals can be watched");
    let mut interrupt = signal(SignalKind::interrupt()).expect("signals can be watched");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_share_the_descriptors() {
        for budget in [2, 5, 448, 960, 3000, 4096] {
            let (prompts, by_tls) = places(budget, true);
            assert_eq!(prompts + by_tls, budget);
            assert!(by_tls >= 1 && by_tls <= prompts, "{budget}");
            assert_eq!(places(budget, false), (budget, 0));
        }
        assert_eq!(
            places(usize::MAX, true),
            (CONNECTIONS, ATTESTED_CONNECTIONS)
        );
    }

    #[test]
    fn requests_that_arrive_leave_connections_to_newcomers() {
        for budget in [8, 448, 960, 3000, 4096, usize::MAX] {
            let (prompts, by_tls) = places(budget, true);
            let most = arriving(prompts, by_tls);
            assert!(2 * most <= by_tls && by_tls <= prompts, "{budget}");
        }
        assert_eq!(
            arriving(CONNECTIONS, ATTESTED_CONNECTIONS),
            gateway::ARRIVING
        );
        assert_eq!(arriving(960, 0), 480);
        assert_eq!(arriving(1, 1), 1);
    }
}
