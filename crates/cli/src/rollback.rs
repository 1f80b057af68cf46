//! `casemate rollback`: the provider's permission for one step back at one broker.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::grant::{self, MAX_GRANT_BYTES};
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::{MAX_LIFETIME_SECONDS, Rollback, Target, sha256};
use serde_json::json;

use crate::exit::{self, Class, Failure, InJson};
use crate::explain::kinds;
use crate::secret_file;
use crate::verify::{clock, read_limited, read_policy_or};

/// Permit a broker to go back to an older policy or model, once.
///
/// Versions of policies and models only go up at a broker. This signs an exception: for one broker, from one version to
/// another, to exactly the file that is named, until a deadline, and only once. Hand it to `casemate-broker admin policy
/// set --rollback` or `casemate-broker admin resource put --rollback`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Back to an older policy; the broker must know the provider (`casemate-broker init --provider`).
    Policy {
        /// The policy that may be put into force again.
        #[arg(long, value_name = "FILE")]
        policy: PathBuf,
        #[command(flatten)]
        step: Step,
    },
    /// Back to an older model, by its key grant.
    Model {
        /// The grant that may be stored again; its minimum version is where it goes back to.
        #[arg(long, value_name = "FILE")]
        grant: PathBuf,
        /// Where the broker stores it: repository/type/tag.
        #[arg(long, value_name = "PATH")]
        resource: ResourcePath,
        #[command(flatten)]
        step: Step,
    },
}

#[derive(clap::Args)]
struct Step {
    /// The version in force now, which it goes back from.
    #[arg(long, value_name = "N")]
    from: u64,
    /// The broker's issuer key in hex, as `casemate-broker init` prints it.
    #[arg(long, value_name = "HEX")]
    issuer: VerifyingKey,
    /// The provider's signing key, as made by keygen.
    #[arg(long, value_name = "FILE")]
    signing_key: PathBuf,
    /// Seconds for which it may be used, at most a week.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600,
          value_parser = clap::value_parser!(u64).range(1..=MAX_LIFETIME_SECONDS))]
    lifetime: u64,
    /// The rollback to write.
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
    match &args.what {
        What::Policy { policy, step } => {
            let done = read_policy_or(Class::Malformed, policy).and_then(|(policy, text)| {
                sign(step, Target::Policy, policy.version(), &text, None)
            });
            done.in_json(step.json)
        }
        What::Model {
            grant,
            resource,
            step,
        } => back_to_model(grant, resource, step).in_json(step.json),
    }
}

fn back_to_model(grant: &Path, resource: &ResourcePath, step: &Step) -> Result<(), Failure> {
    let envelope = zeroize::Zeroizing::new(read_limited(grant, MAX_GRANT_BYTES)?);
    let summary = grant::inspect(&envelope).map_err(|error| {
        let error = match kinds::instead_of("a key grant", &envelope) {
            Some(other) => anyhow::Error::from(error).context(other),
            None => error.into(),
        };
        let error = error.context(grant.display().to_string());
        Failure::new(Class::Malformed, "grant", error)
    })?;
    let target = Target::Model {
        path: resource.clone(),
        name: summary.model_name,
    };
    let to = summary.minimum_version;
    sign(step, target, to, &envelope, Some(summary.provider))
}

fn sign(
    step: &Step,
    target: Target,
    to_version: u64,
    content: &[u8],
    signer: Option<VerifyingKey>,
) -> Result<(), Failure> {
    let provider = SigningKey::read_file(&step.signing_key)?;
    if signer.is_some_and(|signer| signer != provider.verifying_key()) {
        let error = anyhow!("the grant is signed by another key than --signing-key");
        return Err(Failure::new(Class::NotAuthentic, "signer", error));
    }
    let from_version = step.from;
    if to_version >= from_version {
        let error = anyhow!(
            "the file has version {to_version}, which is not below --from {from_version}: going up needs no rollback"
        );
        return Err(Failure::new(Class::Usage, "not-back", error));
    }
    let rollback = Rollback {
        issuer: step.issuer,
        target,
        from_version,
        to_version,
        permitted: sha256(content),
        expires_at: clock()?.as_secs().saturating_add(step.lifetime),
    };
    let envelope = rollback
        .sign(&provider)
        .map_err(|error| Failure::new(Class::Malformed, "rollback", error))?;
    secret_file::write(&step.out, &envelope, step.force)?;
    let expires_at = casemate_attest::UnixTime::from_secs(rollback.expires_at);
    if step.json {
        return exit::print_json(&json!({
            "rollback": step.out,
            "issuer": rollback.issuer.to_string(),
            "target": rollback.target.to_string(),
            "from_version": from_version,
            "to_version": to_version,
            "sha256": hex::encode(rollback.permitted),
            "expires_at": expires_at.to_string(),
        }));
    }
    exit::print(&format!(
        "rollback  {}\nof        {}\nfrom      {from_version}\nto        {to_version}\nuntil     {expires_at}, once",
        step.out.display(),
        rollback.target,
    ))
}
