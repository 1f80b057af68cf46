//! The same API over the same engine, without sealing, attestation and encryption: what the protection is compared with.

use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use casemate_enclave::api::{self, Api};
use casemate_engine::{EngineOptions, KvType};

use super::NAME;
use crate::load;
use crate::options;

/// The command that makes the program serve.
pub(super) const COMMAND: &str = "serve-plain";

/// Serve a model over plain HTTP, unprotected, on loopback, until killed: the other side of --protected.
#[derive(clap::Args)]
pub(crate) struct Args {
    model: PathBuf,
    compute: String,
    #[arg(value_parser = options::kv_types())]
    kv_type: KvType,
    threads: usize,
    max_context: usize,
}

/// Serves, and prints the address.
pub(crate) fn serve(args: &Args) -> Result<()> {
    // As the enclave is configured.
    let options = EngineOptions {
        threads: args.threads,
        max_context: args.max_context,
        max_batch: 1,
        ..options::engine(options::compute(&args.compute)?, Some(args.kv_type))
    };
    let folder = args.model.parent();
    let (engine, ..) = load::load(casemate_import::open(&args.model)?, folder, &options)?;
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
