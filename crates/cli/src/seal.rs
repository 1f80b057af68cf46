//! `casemate seal`: a model in the clear becomes an encrypted, signed file.

use std::path::PathBuf;
use std::time::Instant;

use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, SealOptions};
use serde_json::json;

use crate::exit::{self, Failure, InJson};
use crate::progress::Bars;
use crate::sealed;

/// Encrypt and sign a model.
///
/// Reads a GGUF file or a Hugging Face directory (safetensors) and writes one sealed file, which appears whole or not
/// at all. The digest that is printed names the model however often it is sealed; put it into policies.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A GGUF file, or a directory with config.json, tokenizer and safetensors.
    model: PathBuf,
    /// Name of the model [default: what the model calls itself].
    #[arg(long)]
    name: Option<String>,
    /// Version of the model. Only ever raise it: keys are granted from a minimum version on.
    #[arg(long, value_name = "N")]
    version: u64,
    /// Data key file, as made by keygen.
    #[arg(long, value_name = "FILE")]
    data_key: PathBuf,
    /// The provider's secret signing key file, as made by keygen.
    #[arg(long, value_name = "FILE")]
    signing_key: PathBuf,
    /// Where to write the sealed model.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tensors that may leave the enclave, by name; * stands for any characters. May be repeated [default: none].
    #[arg(long, value_name = "PATTERN")]
    public: Vec<String>,
    /// Replace an existing file.
    #[arg(long)]
    force: bool,
    /// Threads [default: as many as the machine has].
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    seal(args).in_json(args.json)
}

fn seal(args: &Args) -> Result<(), Failure> {
    let data_key = DataKey::read_file(&args.data_key)?;
    let signing_key = SigningKey::read_file(&args.signing_key)?;
    sealed::refuse_sealed(&args.model)?;
    let source = casemate_import::open(&args.model)?;
    let options = SealOptions {
        name: args.name.clone(),
        version: args.version,
        public_tensors: args.public.clone(),
        overwrite: args.force,
        threads: args.threads,
    };
    let start = Instant::now();
    let bars = Bars::new();
    let made = casemate_container::seal(
        source.as_ref(),
        &options,
        &data_key,
        &signing_key,
        &args.out,
        &bars,
    )?;
    let name = args.name.as_deref().unwrap_or_else(|| source.name());
    let provider = signing_key.verifying_key();
    if args.json {
        return exit::print_json(&json!({
            "file": args.out,
            "name": name,
            "version": args.version,
            "model_digest": made.digest.to_string(),
            "provider": provider.to_string(),
            "bytes": made.file_len,
            "tensors": made.tensors,
            "public_tensors": made.public_tensors,
            "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    exit::print(&format!(
        "sealed        {}\nmodel         {} version {}\nmodel digest  {}\nprovider      {}\n\
         tensors       {} ({} public)\nsize          {} bytes\ntime          {:.2} s",
        args.out.display(),
        name,
        args.version,
        made.digest,
        provider,
        made.tensors,
        made.public_tensors,
        made.file_len,
        start.elapsed().as_secs_f64(),
    ))
}
