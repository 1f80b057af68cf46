//! `casemate seal`: a model or an adapter in the clear becomes an encrypted, signed file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::anyhow;
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, Kind, ModelConfig, ModelDigest, SealOptions};
use serde_json::json;

use crate::exit::{self, Class, Failure, InJson};
use crate::progress::Bars;
use crate::sealed;

/// Encrypt and sign a model, or a LoRA adapter to one.
///
/// Reads a GGUF file or a Hugging Face directory (safetensors) and writes one sealed file, which appears whole or not
/// at all. With --adapter it reads a LoRA adapter as PEFT saves it, and binds it to the one model of --base: no enclave
/// applies it to another. The digest that is printed names model or adapter however often it is sealed; put it into
/// policies.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A GGUF file, or a directory with config.json, tokenizer and safetensors.
    #[arg(required_unless_present = "adapter", conflicts_with = "adapter")]
    model: Option<PathBuf>,
    /// A directory with adapter_config.json and adapter_model.safetensors.
    #[arg(long, value_name = "DIR", requires = "base", conflicts_with = "public")]
    adapter: Option<PathBuf>,
    /// The model that the adapter is for: sealed, which lets its shapes be compared, or only its digest.
    #[arg(long, value_name = "FILE|HEX", requires = "adapter")]
    base: Option<String>,
    /// Data key file of a sealed --base.
    #[arg(long, value_name = "FILE", requires = "base")]
    base_key: Option<PathBuf>,
    /// Name of model or adapter [default: what it calls itself].
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
    let options = SealOptions {
        name: args.name.clone(),
        version: args.version,
        public_tensors: args.public.clone(),
        overwrite: args.force,
        threads: args.threads,
    };
    let start = Instant::now();
    let bars = Bars::new();
    let out = &args.out;
    let (made, own_name, base) = match (&args.model, &args.adapter, &args.base) {
        (Some(model), _, _) => {
            sealed::refuse_sealed(model)?;
            let source = casemate_import::open(model)?;
            let source = source.as_ref();
            let made =
                casemate_container::seal(source, &options, &data_key, &signing_key, out, &bars)?;
            (made, source.name().to_owned(), None)
        }
        (None, Some(adapter), Some(base)) => {
            let (base, architecture) = base_of(base, args.base_key.as_deref(), &signing_key)?;
            let source = casemate_import::open_adapter(adapter, base, architecture.as_ref())?;
            let source = source.as_ref();
            let made = casemate_container::seal_adapter(
                source,
                &options,
                &data_key,
                &signing_key,
                out,
                &bars,
            )?;
            (made, source.name().to_owned(), Some(base))
        }
        _ => {
            let error = anyhow!("name a model, or an adapter with --adapter DIR --base MODEL");
            return Err(Failure::new(Class::Usage, "nothing-to-seal", error));
        }
    };
    let name = args.name.as_deref().unwrap_or(&own_name);
    let provider = signing_key.verifying_key();
    if args.json {
        return exit::print_json(&json!({
            "file": args.out,
            "name": name,
            "version": args.version,
            "model_digest": made.digest.to_string(),
            "base": base.map(|base| base.to_string()),
            "provider": provider.to_string(),
            "bytes": made.file_len,
            "tensors": made.tensors,
            "public_tensors": made.public_tensors,
            "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    let (what, digest, to_base) = match base {
        None => ("model  ", "model digest ", String::new()),
        Some(base) => (
            "adapter",
            "adapter digest",
            format!("\nbase          {base}"),
        ),
    };
    exit::print(&format!(
        "sealed        {}\n{what}       {} version {}\n{digest} {}{to_base}\nprovider      {}\n\
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

/// The digest of the model that an adapter is for and, where the sealed model itself is named, its architecture. The
/// same provider must have signed both, as an enclave asks for.
fn base_of(
    base: &str,
    key: Option<&Path>,
    signing_key: &SigningKey,
) -> Result<(ModelDigest, Option<ModelConfig>), Failure> {
    if let Ok(digest) = base.parse() {
        return match key {
            None => Ok((digest, None)),
            Some(_) => Err(Failure::new(
                Class::Usage,
                "base-key",
                anyhow!("--base-key opens a sealed model, but --base gives only a digest"),
            )),
        };
    }
    let path = Path::new(base);
    let file = sealed::open(path)?;
    let Some(key) = key else {
        let error = anyhow!(
            "{base} is sealed: open it with --base-key FILE, or give its digest as `casemate seal` printed it"
        );
        return Err(Failure::new(Class::Usage, "base-key", error));
    };
    let key = DataKey::read_file(key)?;
    let unlocked = file
        .unlock(&key, &signing_key.verifying_key())
        .map_err(|error| sealed::of(path, error))?;
    match unlocked.manifest().kind() {
        Kind::Model(config) => Ok((unlocked.digest(), Some(config.clone()))),
        Kind::Adapter(_) => {
            let error = anyhow!("{base} is an adapter itself; name the model that it is for");
            Err(Failure::new(Class::Usage, "base-kind", error))
        }
    }
}
