//! `casemate grant`: the key of a sealed model, signed for its release.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, SealedFile};
use casemate_release::grant::KeyGrant;
use serde_json::json;

use crate::exit::{self, Class, Failure, InJson};

/// Grant a sealed model's key to whichever enclave the broker's policy accepts.
///
/// Opens the model with the data key, verifies that the signing key signed it, and writes a key grant: the data key,
/// the model's digest and the lowest version that may be served, signed. The grant is a secret file; store it with
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
    let model = SealedFile::open(&args.model)?.unlock(&data_key, &provider.verifying_key())?;
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
    };
    let envelope = grant
        .sign(&provider)
        .map_err(|error| Failure::new(Class::Malformed, "grant", error))?;
    write_secret(&args.out, &envelope, args.force)?;

    let provider = provider.verifying_key();
    if args.json {
        return exit::print_json(&json!({
            "grant": args.out,
            "provider": provider.to_string(),
            "model_digest": digest.to_string(),
            "model_name": grant.model_name,
            "minimum_version": minimum_version,
        }));
    }
    exit::print(&format!(
        "grant            {} (secret)\nprovider         {provider}\nmodel            {} {digest}\nminimum version  \
         {minimum_version}",
        args.out.display(),
        grant.model_name,
    ))
}

/// Writes a file that only its owner may read, whole or not at all.
fn write_secret(path: &Path, bytes: &[u8], force: bool) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        let exists = error.kind() == io::ErrorKind::AlreadyExists;
        let error = anyhow::Error::from(error).context(path.display().to_string());
        match exists {
            true => Failure::new(Class::Io, "exists", error.context("--force replaces it")),
            false => Failure::io(error),
        }
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        match force {
            true => fs::rename(&part, path),
            // A link fails where a rename would replace.
            false => fs::hard_link(&part, path).and_then(|()| fs::remove_file(&part)),
        }?;
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written.map_err(failed)
}
