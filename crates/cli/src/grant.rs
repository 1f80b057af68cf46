//! `casemate grant`: the key of a sealed model, signed for its release.

use std::path::PathBuf;

use anyhow::anyhow;
use casemate_container::DataKey;
use casemate_container::signing::SigningKey;
use casemate_release::api_key::{Access, ApiKeys};
use casemate_release::grant::KeyGrant;
use serde_json::json;

use crate::apikey::file;
use crate::exit::{self, Class, Failure, InJson};
use crate::sealed;
use crate::secret_file;

/// Grant a sealed model's key to whichever enclave the broker's policy accepts.
///
/// Opens the model with the data key, verifies that the signing key signed it, and writes a key grant: the data key,
/// the model's digest, the lowest version that may be served, and who may use it, signed: either those who have one of
/// the keys of --api-keys, or, with --open, anybody. The grant is a secret file; store it with `casemate-broker admin
/// resource put`.
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
    #[command(flatten)]
    access: Users,
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

/// Who may use the model; there is no default.
#[derive(clap::Args)]
#[group(multiple = false)]
struct Users {
    /// Who has one of these API keys may use the model: a list as `casemate apikey new` makes it.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Anybody who reaches the enclave may use the model; no API key is asked for.
    #[arg(long)]
    open: bool,
}

impl Users {
    fn access(&self) -> Result<Access, Failure> {
        let Some(path) = &self.api_keys else {
            return match self.open {
                true => Ok(Access::Open),
                false => Err(Failure::new(
                    Class::Usage,
                    "access",
                    anyhow!(
                        "say who may use the model: --api-keys FILE for those who have one of its keys, or --open for \
                         anybody who reaches the enclave"
                    ),
                )),
            };
        };
        let keys = file::read(path)?;
        if keys.is_empty() {
            let error = anyhow!(
                "{} lists no API key, so nobody could use the model; `casemate apikey new` makes one, --open in its place \
                 lets anybody in",
                path.display()
            );
            return Err(Failure::new(Class::Usage, "no-api-keys", error));
        }
        let keys = ApiKeys::new(keys).map_err(|error| file::malformed(path, error))?;
        Ok(Access::Keyed(keys))
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    grant(args).in_json(args.json)
}

fn grant(args: &Args) -> Result<(), Failure> {
    let access = args.access.access()?;
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
    let grant = KeyGrant {
        model_digest: digest,
        model_name: manifest.name().to_owned(),
        minimum_version,
        data_key,
        access,
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
            "open": grant.access.is_open(),
            "api_keys": grant.access.api_keys().map(|keys| keys.as_slice().len()),
        }));
    }
    exit::print(&format!(
        "grant            {} (secret)\nprovider         {provider}\nmodel            {} {digest}\nminimum version  \
         {minimum_version}\naccess           {}",
        args.out.display(),
        grant.model_name,
        grant.access,
    ))
}
