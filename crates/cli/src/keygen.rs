//! `casemate keygen`: the provider's keys.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, KeyFileError};
use clap::ValueEnum;
use serde_json::json;

use crate::exit::{self, Failure, InJson};

/// Make a provider's keys: an Ed25519 signing key and a data key.
///
/// Writes signing-key.pem (secret, PKCS#8), signing-key.pub.pem (public) and data-key.pem (secret). Secret files can be
/// read by their owner only. The data key opens every model sealed with it: use one per model (--only data-key). Keep
/// both secrets off the machines that serve.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A directory (made if it ends in "/"), or a prefix: "acme" makes acme-signing-key.pem and so on.
    #[arg(long, value_name = "DIR|PREFIX")]
    out: PathBuf,
    /// Make only one of the two.
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// Replace existing files. What was sealed with a replaced data key can no longer be opened.
    #[arg(long)]
    force: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    SigningKey,
    DataKey,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    generate(args).in_json(args.json)
}

fn generate(args: &Args) -> Result<(), Failure> {
    let signing = args.only != Some(Only::DataKey);
    let data = args.only != Some(Only::SigningKey);
    let path = |name: &str| place(&args.out, name);
    let (secret, public, data_key) = (
        path("signing-key.pem"),
        path("signing-key.pub.pem"),
        path("data-key.pem"),
    );

    if args.out.as_os_str().as_encoded_bytes().ends_with(b"/") {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&args.out);
        made.map_err(|error| KeyFileError::Io {
            path: args.out.clone(),
            error,
        })?;
    }
    // All or nothing: nobody wants half of a new key beside half of an old one.
    if !args.force {
        let wanted = [(signing, &secret), (signing, &public), (data, &data_key)];
        let taken = wanted
            .into_iter()
            .find(|(wanted, path)| *wanted && path.exists());
        if let Some((_, path)) = taken {
            return Err(KeyFileError::Exists { path: path.clone() }.into());
        }
    }
    let mut made = serde_json::Map::new();
    let mut lines = Vec::new();
    if signing {
        let key = SigningKey::generate();
        key.write_file(&secret, args.force)?;
        key.verifying_key().write_file(&public, args.force)?;
        made.insert("signing_key".into(), json!(secret));
        made.insert("public_key".into(), json!(public));
        made.insert("provider".into(), json!(key.verifying_key().to_string()));
        lines.push(format!("signing key  {} (secret)", secret.display()));
        lines.push(format!("public key   {}", public.display()));
        lines.push(format!("provider     {}", key.verifying_key()));
    }
    if data {
        DataKey::generate().write_file(&data_key, args.force)?;
        made.insert("data_key".into(), json!(data_key));
        lines.push(format!("data key     {} (secret)", data_key.display()));
    }
    match args.json {
        true => exit::print_json(&made.into()),
        false => exit::print(&lines.join("\n")),
    }
}

/// `name` inside a directory, or behind a prefix.
fn place(out: &Path, name: &str) -> PathBuf {
    if out.is_dir() || out.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return out.join(name);
    }
    let mut file = out.file_name().map_or_else(OsString::new, |prefix| {
        let mut file = prefix.to_owned();
        file.push("-");
        file
    });
    file.push(name);
    out.with_file_name(file)
}
