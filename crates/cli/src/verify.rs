//! `casemate verify`: judges a service, or a file of evidence, by a policy and shows the transcript. The exit code is
//! the verdict. How a verdict is shown is in [`crate::verdict`], how a service is asked in [`crate::service`].

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, anyhow};
use casemate_attest::{
    Denial, Evidence, MAX_EVIDENCE_JSON, MAX_POLICY, Policy, ReportData, Transcript, UnixTime,
    appraise,
};

use crate::exit::{self, Failure, InJson};
use crate::explain::kinds;
use crate::service::{NotVerified, Service};
use crate::verdict::{Trusted, Verdict};

/// Judge a service, or evidence, by a policy: is it a genuine TEE that runs what the policy names?
///
/// Asks a service for evidence over a fresh nonce, and judges that, the keys and the model it vouches for, and the
/// credential that says whose service it is. Or judges evidence from a file.
///
/// Prints every check that passed, failed or was skipped. Skipped never counts as passed. Exits 0 only if everything is
/// trusted, 10 if something is malformed, 20 if it is not genuine, 30 if the policy refuses it, 40 if something cannot be
/// read or reached, 2 if the policy or the arguments cannot be used. `casemate explain -` puts the output of --json into
/// plain words.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("subject").required(true))]
pub(crate) struct Args {
    /// The policy file; docs/policy.md describes it.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// URL of a service, as its provider gave it to you: https:// or http://, where anybody may stand
    /// in between, or tls://HOST:PORT for a connection that ends inside the enclave.
    #[arg(long, alias = "enclave", value_name = "URL", group = "subject")]
    service: Option<String>,
    /// PEM file of the certificate authorities for https, instead of the system's. Trust in the service does not rest
    /// on them.
    #[arg(long, value_name = "FILE", requires = "service")]
    ca: Option<PathBuf>,
    /// A file of evidence: {"tee": …, "quote": …, "collateral": …}.
    #[arg(long, value_name = "FILE", group = "subject", requires = "report_data")]
    evidence: Option<PathBuf>,
    /// What the evidence must sign: 128 hexadecimal digits, which you chose or computed yourself.
    #[arg(long, value_name = "HEX", requires = "evidence")]
    report_data: Option<ReportData>,
    /// Judge as of this time instead of now, for evidence captured in the past.
    #[arg(long, value_name = "RFC3339", requires = "evidence")]
    now: Option<UnixTime>,
    /// Print the verdict, the claims and the transcript as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match (&args.service, &args.evidence, args.report_data) {
        (Some(url), None, None) => run_service(args, url),
        (None, Some(path), Some(report_data)) => run_evidence(args, path, report_data),
        _ => {
            let error = anyhow!("give --service, or --evidence and --report-data");
            Err(Failure::new(exit::Class::Usage, "arguments", error)).in_json(args.json)
        }
    }
}

fn run_service(args: &Args, url: &str) -> Result<(), Failure> {
    let ask = || {
        let service = Service::new(url, read_policy(&args.policy)?, args.ca.as_deref())?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Failure::io)?;
        let verification = runtime
            .block_on(service.verify())
            .map_err(NotVerified::into_failure)?;
        Ok((service, verification))
    };
    let (service, verification) = ask().in_json(args.json)?;
    Verdict::of(&service, &verification).show(args.json)
}

fn run_evidence(args: &Args, path: &Path, report_data: ReportData) -> Result<(), Failure> {
    let read = || {
        let policy = read_policy(&args.policy)?;
        let bytes = read_limited(path, MAX_EVIDENCE_JSON)?;
        Ok((policy, bytes, args.now.map_or_else(clock, Ok)?))
    };
    let (policy, bytes, now) = read().in_json(args.json)?;
    let mut subject = path.display().to_string();
    let (transcript, outcome) = match Evidence::from_json(&bytes) {
        Ok(evidence) => {
            let _ = write!(subject, ", evidence {}", hex::encode(evidence.digest()));
            let appraisal = appraise(&evidence, &report_data, &policy, now);
            let outcome = appraisal
                .outcome
                .map(|appraised| Trusted::appraised(&appraised));
            (appraisal.transcript, outcome)
        }
        Err(error) => {
            let mut denial = Denial::from(error);
            if let Some(other) = kinds::instead_of("evidence", &bytes) {
                denial.found = format!("{other} ({})", denial.found);
            }
            let mut transcript = Transcript::new();
            transcript.fail(&denial);
            (transcript, Err(denial))
        }
    };
    let verdict = Verdict {
        subject,
        policy: &policy,
        now,
        by_hand: args.now.is_some(),
        transcript: &transcript,
        outcome,
    };
    verdict.show(args.json)
}

/// Reads a policy file. One that cannot be used is the user's mistake, not the evidence's.
pub(crate) fn read_policy(path: &Path) -> Result<Policy, Failure> {
    read_policy_or(exit::Class::Usage, path).map(|(policy, _)| policy)
}

/// Reads a policy file, and keeps its bytes; one that cannot be used is a failure of this class.
pub(crate) fn read_policy_or(
    class: exit::Class,
    path: &Path,
) -> Result<(Policy, Vec<u8>), Failure> {
    let bytes = read_limited(path, MAX_POLICY)?;
    let unusable = |error: anyhow::Error| {
        let error = match kinds::instead_of("a policy", &bytes) {
            Some(other) => error.context(other),
            None => error,
        };
        let error = error.context(path.display().to_string());
        Failure::new(class, "policy", error)
    };
    if bytes.len() > MAX_POLICY {
        return Err(unusable(anyhow!(
            "more than {MAX_POLICY} bytes, which no policy has"
        )));
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| unusable(error.into()))?;
    match Policy::from_toml(text) {
        Ok(policy) => Ok((policy, bytes)),
        Err(error) => Err(unusable(error.into())),
    }
}

/// The time now.
pub(crate) fn clock() -> Result<UnixTime, Failure> {
    UnixTime::try_from(SystemTime::now())
        .context("this machine's clock is before 1970")
        .map_err(Failure::io)
}

/// Reads a file, but never much more than the limit: what reads the bytes refuses the rest by size.
pub(crate) fn read_limited(path: &Path, limit: usize) -> Result<Vec<u8>, Failure> {
    let shown = || path.display().to_string();
    if path.is_dir() {
        let error = anyhow!("{}: {}", shown(), kinds::describe_directory(path));
        return Err(Failure::io(error));
    }
    let file = File::open(path).with_context(shown).map_err(Failure::io)?;
    let mut bytes = Vec::new();
    let end = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    file.take(end)
        .read_to_end(&mut bytes)
        .with_context(shown)
        .map_err(Failure::io)?;
    Ok(bytes)
}
