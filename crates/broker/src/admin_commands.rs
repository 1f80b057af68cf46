//! `casemate-broker admin`: its arguments, its files, and what it prints.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::MAX_POLICY;
use casemate_broker::admin::{self, AdminClient, AdminError};
use casemate_broker::log::Anchor;
use casemate_broker::state::{database, issuer_public_key};
use casemate_broker::store::{self, MAX_RESOURCE_BYTES, NewResource};
use casemate_container::signing::VerifyingKey;
use casemate_release::credential::past_claims;
use casemate_release::grant::MAX_GRANT_BYTES;
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::MAX_ROLLBACK_BYTES;
use clap::{Args, Subcommand};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::exit::Fault;
use crate::show;

/// Most bytes of a file that holds a credential: a service sends it with its evidence.
const MAX_CREDENTIAL_FILE_BYTES: usize = 4 * 1024 * 1024;

#[derive(Args)]
#[command(
    override_usage = "casemate-broker admin --socket <PATH> [--json] <COMMAND>\n       \
                            casemate-broker admin log verify --offline <PATH>"
)]
pub(crate) struct Admin {
    /// The broker's administration socket, admin.sock in its state directory. Needed by everything but
    /// `log verify --offline`.
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Prints JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Subcommand)]
enum AdminCommand {
    /// Identity, policy, counts and the end of the log.
    Status,
    /// The policy under which evidence is appraised.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// The secrets that can be released.
    #[command(subcommand)]
    Resource(ResourceCommand),
    /// The decision log.
    #[command(subcommand)]
    Log(LogCommand),
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Puts a policy into force; its version must be higher than the present one.
    Set {
        /// The policy, TOML.
        file: PathBuf,
        /// The provider's permission to go back to exactly this policy, made by `casemate rollback policy`.
        #[arg(long, value_name = "FILE")]
        rollback: Option<PathBuf>,
    },
    /// Prints the policy in force.
    Show,
}

#[derive(Subcommand)]
enum ResourceCommand {
    /// Stores a resource, replacing one of the same path. A model's minimum version may not go down,
    /// and what asked for API keys stays closed.
    Put {
        /// repository/type/tag, for example default/model/smollm2.
        path: ResourcePath,
        #[command(flatten)]
        secret: Secret,
        /// Name under which the service may be credentialed [default: the tag].
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// The provider's permission to go back to exactly this grant, made by `casemate rollback model`.
        #[arg(long, value_name = "FILE", conflicts_with = "opaque")]
        rollback: Option<PathBuf>,
        /// The grant is open, made by `casemate grant --open`, and shall be, although the last one at this path asked for
        /// API keys: anybody who reaches the enclave may use the model then.
        #[arg(long, conflicts_with = "opaque")]
        open: bool,
    },
    /// Lists resources.
    List,
    /// Deletes a resource.
    Delete {
        /// repository/type/tag.
        path: ResourcePath,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Secret {
    /// A key grant made by `casemate grant`.
    #[arg(long, value_name = "FILE")]
    grant: Option<PathBuf>,
    /// Any other secret; it is released under the policy's measurements alone.
    #[arg(long, value_name = "FILE")]
    opaque: Option<PathBuf>,
}

#[derive(Subcommand)]
enum LogCommand {
    /// Prints entries, one a line: in words, or with --json as one JSON object. `casemate explain` tells why the denied
    /// ones were.
    Show {
        /// Position of the first entry.
        #[arg(long, value_name = "N", default_value_t = 0)]
        from: u64,
        /// Most entries to print.
        #[arg(long, value_name = "N", default_value_t = 1000)]
        limit: u64,
    },
    /// Checks the whole chain and the signature of its end.
    Verify {
        /// A database or state directory to check without a broker.
        #[arg(long, value_name = "PATH")]
        offline: Option<PathBuf>,
        /// The issuer's public key in hex, when --offline is not a state directory.
        #[arg(long, value_name = "HEX", requires = "offline")]
        issuer: Option<VerifyingKey>,
        /// A head that the log must contain, as a credential states it. May be given more than once.
        #[arg(long, value_name = "SIZE:HEX",
              value_parser = |text: &str| admin::parse_anchor(text).ok_or("expected SIZE:HEX"))]
        anchor: Vec<Anchor>,
        /// A deployment credential whose head the log must contain: the envelope, its base64, or the JSON in which a
        /// service or broker sent it. It may have expired. May be given more than once.
        #[arg(long, value_name = "FILE")]
        credential: Vec<PathBuf>,
    },
}

pub(crate) async fn administer(options: Admin) -> Result<()> {
    let json = options.json;
    if let AdminCommand::Log(LogCommand::Verify {
        offline: Some(path),
        issuer,
        anchor,
        credential,
    }) = options.command
    {
        return verify_offline(path, issuer, anchor, &credential, json);
    }
    let Some(socket) = options.socket else {
        let text = "--socket PATH is needed: the administration socket of a serving broker";
        return Err(Fault::Usage(text.into()).into());
    };
    let client = AdminClient::new(socket);
    match options.command {
        AdminCommand::Status => print(&client.status().await?, true),
        AdminCommand::Policy(PolicyCommand::Set { file, rollback }) => {
            let toml = read(&file, MAX_POLICY, "a policy")?;
            let toml = String::from_utf8(toml.to_vec())
                .map_err(|_| Fault::Malformed(format!("{} is not text", file.display())))?;
            let rollback = read_rollback(rollback.as_deref())?;
            let reply = client.set_policy(toml, rollback.as_deref()).await;
            let reply = reply.map_err(|error| about(&file, error))?;
            print(&reply, json);
        }
        AdminCommand::Policy(PolicyCommand::Show) => {
            let policy = client.policy().await?;
            match policy["toml"].as_str() {
                Some(toml) if !json => print!("{toml}"),
                _ => print(&policy, true),
            }
        }
        AdminCommand::Resource(ResourceCommand::Put {
            path,
            secret,
            service,
            rollback,
            open,
        }) => {
            let rollback = read_rollback(rollback.as_deref())?;
            let bytes;
            let (file, resource) = match (secret.grant, secret.opaque) {
                (Some(file), _) => {
                    let what = "a key grant, as `casemate grant --out` writes it,";
                    bytes = read(&file, MAX_GRANT_BYTES, what)?;
                    let grant = NewResource::Grant {
                        envelope: &bytes,
                        rollback: rollback.as_deref(),
                        open,
                    };
                    (file, grant)
                }
                (None, Some(file)) => {
                    bytes = read(&file, MAX_RESOURCE_BYTES, "a resource")?;
                    (file, NewResource::Opaque(&bytes))
                }
                (None, None) => {
                    return Err(Fault::Usage("--grant or --opaque is needed".into()).into());
                }
            };
            let reply = client.put_resource(&path, service, resource).await;
            let reply = reply.map_err(|error| about(&file, error))?;
            print(&reply, json);
        }
        AdminCommand::Resource(ResourceCommand::List) => {
            let reply = client.resources().await?;
            if json {
                print(&reply, true);
            } else {
                for resource in reply["resources"].as_array().into_iter().flatten() {
                    let text = |key: &str| resource[key].as_str().unwrap_or("-").to_owned();
                    let fields = ["path", "service", "model_digest", "access"].map(text);
                    println!("{}", fields.join("\t"));
                    if let Some(remedy) = resource["remedy"].as_str() {
                        eprintln!("{} is not released any more: {remedy}", text("path"));
                    }
                }
            }
        }
        AdminCommand::Resource(ResourceCommand::Delete { path }) => {
            client.delete_resource(&path).await?;
        }
        AdminCommand::Log(LogCommand::Show { from, limit }) => {
            let reply = client.log(from, limit).await?;
            for entry in reply["entries"].as_array().into_iter().flatten() {
                // One entry per line, so that the output can be cut and searched.
                match json {
                    true => println!("{entry}"),
                    false => println!("{}", show::line(entry)),
                }
            }
        }
        AdminCommand::Log(LogCommand::Verify {
            mut anchor,
            credential,
            ..
        }) => {
            if !credential.is_empty() {
                let status = client.status().await?;
                let issuer = status["issuer"].as_str().unwrap_or_default();
                let issuer = issuer.parse().context("the broker's issuer key")?;
                anchor.extend(anchors(&credential, &issuer)?);
            }
            print_head(&client.verify_log(&anchor).await?, json);
        }
    }
    Ok(())
}

fn verify_offline(
    path: PathBuf,
    issuer: Option<VerifyingKey>,
    mut anchor: Vec<Anchor>,
    credentials: &[PathBuf],
    json: bool,
) -> Result<()> {
    let (file, issuer) = if path.is_dir() {
        let issuer = match issuer {
            Some(issuer) => issuer,
            None => std::fs::read_to_string(issuer_public_key(&path))
                .with_context(|| format!("{}", issuer_public_key(&path).display()))?
                .trim()
                .parse()
                .context("issuer.pub")?,
        };
        (database(&path), issuer)
    } else {
        let text = "--issuer HEX is needed to check a database file";
        (path, issuer.ok_or_else(|| Fault::Usage(text.into()))?)
    };
    anchor.extend(anchors(credentials, &issuer)?);
    let head = store::verify_offline(&file, &issuer, &anchor)?;
    print_head(&serde_json::to_value(head)?, json);
    Ok(())
}

/// The heads that credentials of this issuer state.
fn anchors(files: &[PathBuf], issuer: &VerifyingKey) -> Result<Vec<Anchor>> {
    let anchor = |file: &PathBuf| {
        let bytes = read(file, MAX_CREDENTIAL_FILE_BYTES, "a deployment credential")?;
        let shown = file.display();
        let envelope = envelope_in(&bytes)
            .ok_or_else(|| Fault::Malformed(format!("{shown} holds no deployment credential")))?;
        let claims = past_claims(&envelope, issuer)
            .map_err(|error| Fault::NotAuthentic(format!("{shown}: {error}")))?;
        Ok(Anchor {
            size: claims.log_size,
            hash: claims.log_head.into(),
        })
    };
    files.iter().map(anchor).collect()
}

/// Finds a credential's envelope: as it is, in base64, or as the member `credential` of a JSON object.
fn envelope_in(bytes: &[u8]) -> Option<Vec<u8>> {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return Some(bytes.to_vec());
    };
    let text = text.trim();
    if !text.starts_with('{') {
        return STANDARD.decode(text).ok();
    }
    let value: Value = serde_json::from_str(text).ok()?;
    STANDARD.decode(value["credential"].as_str()?).ok()
}

/// A refusal, with the name of the file where the broker says that it is not what it should be.
fn about(file: &Path, error: AdminError) -> anyhow::Error {
    let malformed = matches!(&error, AdminError::Refused { kind, .. } if kind == "malformed");
    let error = anyhow::Error::from(error);
    match malformed {
        true => error.context(file.display().to_string()),
        false => error,
    }
}

fn read_rollback(file: Option<&Path>) -> Result<Option<Vec<u8>>> {
    let what = "a rollback, as `casemate rollback --out` writes it,";
    file.map(|file| Ok(read(file, MAX_ROLLBACK_BYTES, what)?.to_vec()))
        .transpose()
}

/// Reads a file of bounded size; a larger one is some other file, and its name says which.
fn read(file: &Path, limit: usize, what: &str) -> Result<Zeroizing<Vec<u8>>> {
    let shown = || file.display().to_string();
    let about = std::fs::metadata(file).with_context(shown)?;
    if about.is_dir() {
        let error = std::io::Error::from(std::io::ErrorKind::IsADirectory);
        return Err(error).with_context(|| format!("{}: give one file", shown()));
    }
    let length = about.len();
    let too_large = || {
        let text = format!(
            "{} is too large: {what} has at most {limit} bytes; is it the right file?",
            shown()
        );
        anyhow::Error::from(Fault::Malformed(text))
    };
    let limit_u64 = u64::try_from(limit).unwrap_or(u64::MAX);
    if length > limit_u64 {
        return Err(too_large());
    }
    // Never grows while it is read: growing would leave copies of a secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    let opened = File::open(file).with_context(shown)?;
    opened
        .take(limit_u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(shown)?;
    match bytes.len() > limit {
        true => Err(too_large()),
        false => Ok(bytes),
    }
}

fn print_head(head: &Value, json: bool) {
    if json {
        print(head, true);
    } else {
        println!(
            "the log is whole: {} entries, head {}",
            head["size"],
            head["hash"].as_str().unwrap_or("-")
        );
    }
}

fn print(value: &Value, json: bool) {
    if json {
        println!("{value:#}");
        return;
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            Value::String(text) => println!("{name}: {text}"),
            other => println!("{name}: {other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_in_every_form_that_is_sent() {
        let envelope = [0xa2, 0x00, 0x58, 0xff];
        let base64 = STANDARD.encode(envelope);
        for form in [
            envelope.to_vec(),
            format!("{base64}\n").into_bytes(),
            format!("{{\"credential\": \"{base64}\", \"expires_at\": 1}}").into_bytes(),
        ] {
            assert_eq!(envelope_in(&form).unwrap(), envelope);
        }
        for wrong in [&b"{}"[..], b"not base64!", b"{\"credential\": 1}"] {
            assert_eq!(envelope_in(wrong), None);
        }
    }
}
