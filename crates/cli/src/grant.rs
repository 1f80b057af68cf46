//! `casemate grant`: the key of a sealed model, signed for its release.

use std::path::PathBuf;

use anyhow::anyhow;
use casemate_container::DataKey;
use casemate_container::signing::SigningKey;
use casemate_release::api_key::ApiKeys;
use casemate_release::grant::KeyGrant;
use serde_json::json;

use crate::apikey::file;
use crate::exit::{self, Class, Failure, InJson};
use crate::sealed;
use crate::secret_file;

/// Grant a sealed model's key to whichever enclave the broker's policy accepts.
///
/// Opens the model with the data key, verifies that the signing key signed it, and writes a key grant: the data key,
/// the model's digest, the lowest version that may be served and the hashes of the API keys, signed. The grant is a secret file; store it with
/// `casemate-broker admin resource put`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Data key file, as made by keygen.
    #[arg(long, value_name = "FILE")]
    data_key: PathBuf,
    /// The provider's signing key, as made by keygen.
    #[arg(long, value_name = "FILE")]
    signing_key: PathBuf,
    /// The sealed model.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// The lowest version of the model that may be served [default: this one's].
    #[arg(long, value_name = "N")]
    minimum_version: Option<u64>,
    /// API keys that the enclave shall ask for, as `casemate apikey new` lists them; without it, whoever reaches the
    /// enclave may use the model.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// The grant to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace an existing file.
    #[arg(long)]
    force: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    grant(args).in_json(args.json)
}

fn grant(args: &Args) -> Result<(), Failure> {
    let data_key = DataKey::read_file(&args.data_key)?;
    let provider = SigningKey::read_file(&args.signing_key)?;
    let model = sealed::open(&args.model)?
        .unlock(&data_key, &provider.verifying_key())
        .map_err(|error| sealed::of(&args.model, error))?;
    let (digest, manifest) = (model.digest(), model.manifest());
    let minimum_version = args.minimum_version.unwrap_or(manifest.version());
    if minimum_version > manifest.version() {
        let version = manifest.version();
        return Err(Failure::new(
            Class::Usage,
            "minimum-version",
            anyhow!("minimum version {minimum_version} is above the model's own version {version}"),
        ));
    }
    let api_keys = match &args.api_keys {
        None => ApiKeys::default(),
        Some(path) => {
            let keys = file::read(path)?;
            if keys.as_slice().is_empty() {
                return Err(Failure::new(
                    Class::Usage,
                    "no-api-keys",
                    anyhow!(
                        "{} lists no API key, and a grant without any lets everybody in; leave --api-keys away if that \
                         is meant",
                        path.display()
                    ),
                ));
            }
            keys
        }
    };
    let grant = KeyGrant {
        model_digest: digest,
        model_name: manifest.name().to_owned(),
        minimum_version,
        data_key,
        api_keys,
    };
    let envelope = grant
        .sign(&provider)
        .map_err(|error| Failure::new(Class::Malformed, "grant", error))?;
    secret_file::write(&args.out, &envelope, args.force)?;

    let provider = provider.verifying_key();
    if args.json {
        return exit::print_json(&json!({
            "grant": args.out,
            "provider": provider.to_string(),
            "model_digest": digest.to_string(),
            "model_name": grant.model_name,
            "minimum_version": minimum_version,
            "api_keys": grant.api_keys.as_slice().len(),
        }));
    }
    let access = match grant.api_keys.as_slice().len() {
        0 => "open: no API key is needed".to_owned(),
        count => format!("{count} API keys"),
    };
    exit::print(&format!(
        "grant            {} (secret)\nprovider         {provider}\nmodel            {} {digest}\nminimum version  \
         {minimum_version}\naccess           {access}",
        args.out.display(),
        grant.model_name,
    ))
}
