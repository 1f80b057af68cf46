//! `casemate check`: full verification of a sealed model without loading it.

use std::path::PathBuf;
use std::time::Instant;

use casemate_container::{DataKey, Kind};
use serde_json::json;

use crate::exit::{self, Failure, InJson};
use crate::keys;
use crate::progress::Bars;
use crate::sealed;

/// Behind a refusal.
const MORE: &str =
    "likely cause and what to do: the same with --json, piped into `casemate explain -`";

/// Verify a sealed model or adapter completely: key, provider's signature, every chunk, every digest.
///
/// Does what an enclave does before it serves, in the memory of a few chunks. Exits 0 only if all of it holds; 10 for a
/// malformed file, 20 if something in it is not authentic, 40 if it cannot be read. `casemate explain -` puts the output
/// of --json into plain words.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The sealed model.
    model: PathBuf,
    /// Data key file, as made by keygen.
    #[arg(long, value_name = "FILE")]
    data_key: PathBuf,
    /// The provider's public key: a PEM file, or 64 hexadecimal digits.
    #[arg(long, value_name = "FILE|HEX")]
    provider: String,
    /// Threads [default: as many as the machine has].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    check(args).in_json(args.json)
}

fn check(args: &Args) -> Result<(), Failure> {
    let data_key = DataKey::read_file(&args.data_key)?;
    let provider = keys::public_key(&args.provider)?;
    let start = Instant::now();
    let refused = |error| sealed::of(&args.model, error).hint(MORE);
    let unlocked = sealed::open(&args.model)?
        .unlock(&data_key, &provider)
        .map_err(refused)?;
    unlocked
        .check(args.threads, &Bars::new())
        .map_err(refused)?;
    let seconds = start.elapsed().as_secs_f64();
    let manifest = unlocked.manifest();
    let base = match manifest.kind() {
        Kind::Model(_) => None,
        Kind::Adapter(adapter) => Some(adapter.base.to_string()),
    };
    if args.json {
        return exit::print_json(&json!({
            "verified": true,
            "name": manifest.name(),
            "version": manifest.version(),
            "model_digest": unlocked.digest().to_string(),
            "base": base,
            "provider": provider.to_string(),
            "tensors": manifest.tensors().len(),
            "assets": manifest.assets().len(),
            "bytes": manifest.payload_len(),
            "seconds": seconds,
        }));
    }
    let (what, to_base) = match base {
        None => ("model  ", String::new()),
        Some(base) => ("adapter", format!("\nbase    {base}")),
    };
    exit::print(&format!(
        "passed  the file has the length and layout that its header states\n\
         passed  the data key is the one that the file commits to\n\
         passed  the manifest is authentic, canonical and within limits\n\
         passed  provider {provider} signed it\n\
         passed  every chunk is authentic, in its place, and the last one is the last\n\
         passed  {} tensors and {} assets have the digests that the manifest states\n\
         {what} {} version {}, {} bytes, in {seconds:.2} s\n\
         digest  {}{to_base}",
        manifest.tensors().len(),
        manifest.assets().len(),
        manifest.name(),
        manifest.version(),
        manifest.payload_len(),
        unlocked.digest(),
    ))
}
