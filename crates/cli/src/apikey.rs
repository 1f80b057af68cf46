//! `casemate apikey`: the provider's list of who may use a model.

pub(crate) mod file;

use std::num::NonZeroU32;
use std::path::PathBuf;

use anyhow::anyhow;
use casemate_release::api_key::{self, ApiKey, Limits};
use casemate_release::random::SystemRandom;
use serde_json::json;

use crate::exit::{self, Class, Failure, InJson};

/// Make, list and remove API keys, with which users ask an enclave for answers.
///
/// The keys' hashes go into the key grant (`casemate grant --api-keys`), so they are released together with the model's
/// key, and nobody but the provider can let anyone in.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    New(New),
    List(List),
    Remove(Remove),
}

/// Make a new API key, print it once, and append its hash and limits to the provider's list.
///
/// The list holds no secrets. A changed list takes effect with a new grant: `casemate grant --api-keys`, then
/// `casemate-broker admin resource put`. Running enclaves see it when they renew their credential.
#[derive(clap::Args)]
pub(crate) struct New {
    /// Whose key it is: 1 to 32 letters, digits, '.', '_' or '-'
    name: String,
    /// The list (TOML); made if it is not there
    #[arg(long, value_name = "FILE", default_value = "api-keys.toml")]
    file: PathBuf,
    /// Requests for answers per minute [default: not limited]
    #[arg(long, value_name = "N", value_parser = limit)]
    requests_per_minute: Option<NonZeroU32>,
    /// Tokens of prompts and answers per minute [default: not limited]
    #[arg(long, value_name = "N", value_parser = limit)]
    tokens_per_minute: Option<NonZeroU32>,
    /// Requests answered at the same time [default: not limited]
    #[arg(long, value_name = "N", value_parser = limit)]
    concurrency: Option<NonZeroU32>,
    /// Requests for answers per day [default: not limited]
    #[arg(long, value_name = "N", value_parser = limit)]
    requests_per_day: Option<NonZeroU32>,
    /// Tokens of prompts and answers per day [default: not limited]
    #[arg(long, value_name = "N", value_parser = limit)]
    tokens_per_day: Option<NonZeroU32>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Show the names and limits of the API keys in a list.
#[derive(clap::Args)]
pub(crate) struct List {
    /// The list (TOML)
    #[arg(long, value_name = "FILE", default_value = "api-keys.toml")]
    file: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Take an API key out of the list.
///
/// This changes the list and nothing else: the key works on until a new grant was made (`casemate grant --api-keys`) and
/// put (`casemate-broker admin resource put`), and the enclave took it up. It does so when it renews its credential,
/// about half a credential's life after the last time (7 to 9 minutes by default), and serves nobody from a minute
/// after the credential's end (16 minutes by default) if it cannot.
#[derive(clap::Args)]
pub(crate) struct Remove {
    /// Whose key it is
    name: String,
    /// The list (TOML)
    #[arg(long, value_name = "FILE", default_value = "api-keys.toml")]
    file: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn limit(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| {
        format!(
            "a limit is a whole number from 1 to {}; without this option there is none",
            u32::MAX
        )
    })
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::New(args) => new(args).in_json(args.json),
        Command::List(args) => list(args).in_json(args.json),
        Command::Remove(args) => remove(args).in_json(args.json),
    }
}

fn new(args: &New) -> Result<(), Failure> {
    if !api_key::is_name(&args.name) {
        let error = anyhow!("the name of an API key is {}", api_key::NAME_RULE);
        return Err(Failure::new(Class::Usage, "name", error));
    }
    let key = api_key::generate(&SystemRandom)
        .map_err(|error| Failure::new(Class::Io, "randomness", error))?;
    let entry = ApiKey {
        name: args.name.clone(),
        hash: api_key::hash(key.as_bytes()),
        limits: Limits {
            requests_per_minute: args.requests_per_minute,
            tokens_per_minute: args.tokens_per_minute,
            concurrency: args.concurrency,
            requests_per_day: args.requests_per_day,
            tokens_per_day: args.tokens_per_day,
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

fn list(args: &List) -> Result<(), Failure> {
    let keys = file::read(&args.file)?;
    if args.json {
        let entry = |key: &ApiKey| {
            json!({
                "name": key.name,
                "requests_per_minute": key.limits.requests_per_minute,
                "tokens_per_minute": key.limits.tokens_per_minute,
                "concurrency": key.limits.concurrency,
                "requests_per_day": key.limits.requests_per_day,
                "tokens_per_day": key.limits.tokens_per_day,
            })
        };
        let keys: Vec<_> = keys.iter().map(entry).collect();
        return exit::print_json(&json!({ "file": args.file, "keys": keys }));
    }
    if keys.is_empty() {
        eprintln!("{} lists no API key", args.file.display());
        return Ok(());
    }
    let width = keys.iter().map(|key| key.name.len()).max().unwrap_or(0);
    let lines: Vec<_> = keys
        .iter()
        .map(|key| format!("{:width$}  {}", key.name, limits(&key.limits)))
        .collect();
    exit::print(&lines.join("\n"))
}

fn limits(limits: &Limits) -> String {
    let named = [
        (limits.requests_per_minute, "requests per minute"),
        (limits.tokens_per_minute, "tokens per minute"),
        (limits.concurrency, "at the same time"),
        (limits.requests_per_day, "requests per day"),
        (limits.tokens_per_day, "tokens per day"),
    ];
    let parts: Vec<_> = named
        .iter()
        .filter_map(|(limit, unit)| Some(format!("{} {unit}", (*limit)?)))
        .collect();
    match parts.is_empty() {
        true => "not limited".to_owned(),
        false => parts.join(", "),
    }
}

fn remove(args: &Remove) -> Result<(), Failure> {
    if api_key::is_in(&args.name) {
        let error =
            anyhow!("this is an API key; name whose it is: `casemate apikey list` shows the names");
        return Err(Failure::new(Class::Usage, "no-such-key", error));
    }
    let left = file::remove(&args.file, &args.name)?.ok_or_else(|| {
        let error = anyhow!(
            "{} lists no API key of the name {:?}; `casemate apikey list` shows those it has",
            args.file.display(),
            args.name
        );
        Failure::new(Class::Usage, "no-such-key", error)
    })?;
    if args.json {
        return exit::print_json(&json!({
            "name": args.name,
            "file": args.file,
            "keys_left": left,
        }));
    }
    let next = match left {
        0 => "no key is left, and a list without any cannot be granted",
        _ => {
            "it works on until a grant of this list was put and the enclave renewed its credential"
        }
    };
    eprintln!(
        "the key of '{}' is out of {}; {next}",
        args.name,
        args.file.display()
    );
    Ok(())
}
