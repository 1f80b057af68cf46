//! `casemate receipt`: verifies a kept receipt offline, or shows what one says. What is accepted is decided in
//! `casemate_channel::receipt`; what a verdict means in words is in [`statement`], what steered an answer in [`steering`].

mod statement;
mod steering;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use casemate_attest::{Denial, Policy, Transcript, UnixTime};
use casemate_channel::receipt::{
    Bundle, Exchange, MAX_BUNDLE, RequestBytes, RequestId, SignedReceipt, verify_bundle,
};
use serde_json::{Value, json};

use crate::exit::{self, Class, Failure, InJson};
use crate::explain::kinds;
use crate::verdict::{Trusted, Verdict};
use crate::verify::{read_limited, read_policy};
use statement::Statement;

/// The largest request or answer that is read: an enclave accepts requests of 4 MiB, and answers are shorter.
const MAX_BODY: usize = 64 * 1024 * 1024;

/// Verify a receipt offline, or show what one says.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Verify(VerifyArgs),
    Show(ShowArgs),
}

/// Verify a receipt and the attestation it was kept with, and list what that proves and what not.
///
/// Needs no network. The attestation is judged by the policy as of the time at which your proxy verified it, by your own
/// machine's clock. Prints every check that passed, failed or was skipped; skipped never counts as passed. Exits 0 only if
/// nothing failed, 10 if something is malformed, 20 if it is not genuine, 30 if the policy refuses it or the answer is
/// incomplete, 40 if something cannot be read, 2 if the policy or the arguments cannot be used.
#[derive(clap::Args)]
struct VerifyArgs {
    /// The bundle: what `casemate proxy` saved, or answered to GET /v1/receipts/ID.
    bundle: PathBuf,
    /// The policy file; docs/policy.md describes it.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// The body of the request, byte for byte as the client sent it.
    #[arg(long, value_name = "FILE")]
    request: Option<PathBuf>,
    /// The body of the answer, byte for byte as the client received it.
    #[arg(long, value_name = "FILE")]
    answer: Option<PathBuf>,
    /// Path of the request, with its query [default: that of the API which made the id].
    #[arg(long, value_name = "PATH", requires = "request")]
    target: Option<String>,
    /// Judge the attestation as of this time instead of that of your proxy.
    #[arg(long, value_name = "RFC3339")]
    at: Option<UnixTime>,
    /// Print the verdict, the transcript and what is proven as JSON.
    #[arg(long)]
    json: bool,
}

/// Show what a receipt says. Nothing of it is verified.
#[derive(clap::Args)]
struct ShowArgs {
    /// The bundle.
    bundle: PathBuf,
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Command::Verify(args) => verify(args),
        Command::Show(args) => show(args).in_json(args.json),
    }
}

fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let read = || {
        let body = |path: &Option<PathBuf>| path.as_deref().map(read_body).transpose();
        Ok((
            read_policy(&args.policy)?,
            read_limited(&args.bundle, MAX_BUNDLE)?,
            body(&args.request)?,
            body(&args.answer)?,
        ))
    };
    let (policy, bundle, request, answer) = read().in_json(args.json)?;
    let subject = args.bundle.display().to_string();
    let bundle = match parse(&bundle) {
        Ok(bundle) => bundle,
        Err(error) => {
            let denial = Denial::malformed(
                "bundle.structure",
                error,
                "a bundle of format 1",
                "give the file that `casemate proxy` saved, unchanged",
            );
            let mut transcript = Transcript::new();
            transcript.fail(&denial);
            let now = args.at.map_or_else(crate::verify::clock, Ok)?;
            return verdict(args, subject, &policy, now, &transcript, Err(denial)).show(args.json);
        }
    };
    let target = match (&request, &args.target) {
        (None, _) => String::new(),
        (Some(_), Some(target)) => target.clone(),
        (Some(_), None) => usual_target(&bundle).in_json(args.json)?,
    };
    let exchange = Exchange {
        request: request.as_deref().map(|body| RequestBytes {
            method: "POST",
            target: &target,
            body,
        }),
        answer: answer.as_deref(),
    };
    let (transcript, outcome) = verify_bundle(&bundle, &exchange, &policy, args.at);
    let statement = outcome
        .as_ref()
        .ok()
        .map(|verified| Statement::of(verified, args.at.is_some()));
    let outcome = outcome.map(|verified| Trusted::receipt(&verified));
    let as_of = args.at.unwrap_or(bundle.attestation.verified_at);
    let verdict = verdict(args, subject, &policy, as_of, &transcript, outcome);
    match statement {
        Some(statement) if args.json => {
            let mut shown = verdict.to_json();
            shown["proven"] = json!(statement.proven);
            shown["not_proven"] = json!(statement.not_proven);
            exit::print_json(&shown)
        }
        Some(statement) => {
            let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            exit::print(verdict.to_text(colour).trim_end())?;
            exit::print(&statement.to_text())
        }
        None => verdict.show(args.json),
    }
}

fn verdict<'a>(
    args: &VerifyArgs,
    subject: String,
    policy: &'a Policy,
    now: UnixTime,
    transcript: &'a Transcript,
    outcome: Result<Trusted, Denial>,
) -> Verdict<'a> {
    Verdict {
        subject,
        policy,
        now,
        by_hand: args.at.is_some(),
        transcript,
        outcome,
    }
}

/// Reads a bundle, of which at most one byte over the limit was read, or says what the file is instead.
fn parse(bytes: &[u8]) -> Result<Bundle, String> {
    let error = match Bundle::from_json(bytes) {
        Ok(bundle) => return Ok(bundle),
        Err(_) if bytes.len() > MAX_BUNDLE => format!("more than {MAX_BUNDLE} bytes"),
        Err(error) => error.to_string(),
    };
    Err(match kinds::instead_of("a receipt", bytes) {
        Some(other) => format!("{error}; {other}"),
        None => error,
    })
}

fn read_body(path: &Path) -> Result<Vec<u8>, Failure> {
    let bytes = read_limited(path, MAX_BODY)?;
    if bytes.len() > MAX_BODY {
        let error = anyhow::anyhow!("{} is larger than {MAX_BODY} bytes", path.display());
        return Err(Failure::new(Class::Usage, "arguments", error));
    }
    Ok(bytes)
}

/// Where a request goes whose answer has an id with this prefix.
fn usual_target(bundle: &Bundle) -> Result<String, Failure> {
    // What is no receipt is refused by the verification, with a better word for it.
    let id = SignedReceipt::parse(&bundle.fetched.receipt)
        .ok()
        .map(|signed| signed.unverified().id.clone());
    match id.as_ref().map(RequestId::prefix) {
        Some("chatcmpl") | None => Ok("/v1/chat/completions".to_owned()),
        Some("cmpl") => Ok("/v1/completions".to_owned()),
        Some(other) => {
            let error = anyhow::anyhow!("give --target: no usual path is known for ids of {other}");
            Err(Failure::new(Class::Usage, "arguments", error))
        }
    }
}

fn show(args: &ShowArgs) -> Result<(), Failure> {
    let malformed = |error: String| {
        let error = anyhow::anyhow!("{}: {error}", args.bundle.display());
        Failure::new(Class::Malformed, "bundle", error)
    };
    let bytes = read_limited(&args.bundle, MAX_BUNDLE)?;
    let bundle = parse(&bytes).map_err(malformed)?;
    let signed = SignedReceipt::parse(&bundle.fetched.receipt)
        .map_err(|error| malformed(error.to_string()))?;
    let claims = statement::claims(signed.unverified());
    let attestation = &bundle.attestation;
    if args.json {
        let mut shown = json!({ "verified": false });
        shown["receipt"] = claims;
        shown["attestation"] = json!({
            "nonce_made_at": attestation.challenge.issued_at(),
            "verified_at": attestation.verified_at,
        });
        return exit::print_json(&shown);
    }
    exit::print("NOT VERIFIED; `casemate receipt verify` does that\n")?;
    for (name, value) in claims.as_object().into_iter().flatten() {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        exit::print(&format!("{name:17}{value}"))?;
    }
    let means = steering::means(&signed.unverified().parameters.steering);
    let steered = match means.as_slice() {
        [] => "by its prompt alone".to_owned(),
        means => format!("by its prompt, and by {}", means.join("; ")),
    };
    exit::print(&format!("{:17}{steered}", "steered"))?;
    exit::print(&format!(
        "{:17}{} by the clock of the proxy's machine",
        "attested", attestation.verified_at
    ))
}
