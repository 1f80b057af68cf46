//! The same API over the same engine, without sealing, attestation and encryption: what the protection is compared with.

use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, SealOptions, SealedFile, Silent, seal};
use casemate_enclave::api::{self, Api};
use casemate_engine::{Engine, EngineOptions};

use crate::NAME;

/// First argument that makes the program serve.
pub(crate) const SERVE: &str = "--serve-plain";

/// Serves `model` with this many compute threads, 0 is one per core, until it is killed; prints its address.
pub(crate) fn serve(model: &Path, threads: usize) -> Result<()> {
    // An engine takes its weights from an opened container only; this one's key is thrown away.
    let folder = tempfile::tempdir()?;
    let sealed = folder.path().join("model.casemate");
    let (data_key, provider) = (DataKey::generate(), SigningKey::generate());
    let options = SealOptions {
        version: 1,
        ..SealOptions::default()
    };
    seal(
        &*casemate_import::open(model)?,
        &options,
        &data_key,
        &provider,
        &sealed,
        &Silent,
    )?;
    let threads = match threads {
        0 => std::thread::available_parallelism()?.get(),
        threads => threads,
    };
    let model = SealedFile::open(&sealed)?
        .unlock(&data_key, &provider.verifying_key())?
        .load(threads, &Silent)?;
    // As the enclave's configuration has it by default.
    let options = EngineOptions {
        threads,
        max_context: 2048,
        max_batch: 8,
        ..EngineOptions::default()
    };
    let engine = Engine::load(model, &options, &Silent)?;
    let clock = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    };
    let api = Api::new(engine, NAME.into(), "fp_plain".into(), clock);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        println!("http://{}", listener.local_addr()?);
        std::io::stdout().flush()?;
        axum::serve(listener, api::router(api)).await?;
        Ok(())
    })
}
