//! `casemate apikey`: who may use a model.

pub(crate) mod file;

use std::num::NonZeroU32;
use std::path::PathBuf;

use casemate_release::api_key::{self, ApiKey, Limits};
use casemate_release::random::SystemRandom;
use serde_json::json;

use crate::exit::{self, Class, Failure, InJson};

/// Make API keys, with which users ask an enclave for answers.
///
/// The keys' hashes go into the key grant (`casemate grant --api-keys`), so they are released together with the model's
/// key, and nobody but the provider can let anyone in.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    New(New),
}

/// Make a new API key, print it once, and append its hash and limits to the provider's list.
///
/// The list holds no secrets; take an entry out to revoke a key. A changed list takes effect with a new grant:
/// `casemate grant --api-keys`, then `casemate-broker admin resource put`. Running enclaves see it when they renew their
/// credential.
#[derive(clap::Args)]
pub(crate) struct New {
    /// Whose key it is: 1 to 32 letters, digits, '.', '_' or '-'
    name: String,
    /// The list (TOML); made if it is not there
    #[arg(long, value_name = "FILE", default_value = "api-keys.toml")]
    file: PathBuf,
    /// Requests for answers per minute [default: not limited]
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<NonZeroU32>,
    /// Tokens of prompts and answers per minute [default: not limited]
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<NonZeroU32>,
    /// Requests answered at the same time [default: not limited]
    #[arg(long, value_name = "N")]
    concurrency: Option<NonZeroU32>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::New(args) => new(args).in_json(args.json),
    }
}

fn new(args: &New) -> Result<(), Failure> {
    let key = api_key::generate(&SystemRandom)
        .map_err(|error| Failure::new(Class::Io, "randomness", error))?;
    let entry = ApiKey {
        name: args.name.clone(),
        hash: api_key::hash(key.as_bytes()),
        limits: Limits {
            requests_per_minute: args.requests_per_minute,
            tokens_per_minute: args.tokens_per_minute,
            concurrency: args.concurrency,
        },
    };
    file::append(&args.file, entry)?;
    if args.json {
        return exit::print_json(&json!({
            "name": args.name,
            "key": &*key,
            "file": args.file,
        }));
    }
    // The key alone, so that it can go into a file or a variable.
    exit::print(&key)?;
    eprintln!(
        "the key of '{}' is not kept anywhere; its hash is in {}",
        args.name,
        args.file.display()
    );
    Ok(())
}
