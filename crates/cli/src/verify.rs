//! `casemate verify`: judges evidence by a policy and shows the transcript. The exit code is the verdict.
//!
//! [`Verdict`] is how any command shows a verdict; this file makes one from a file of evidence.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, anyhow};
use casemate_attest::{
    Appraised, Class, Denial, Evidence, MAX_EVIDENCE_JSON, MAX_POLICY, Policy, ReportData,
    RootOfTrust, Transcript, UnixTime, appraise,
};
use serde_json::{Value, json};

use crate::exit::{self, Failure, InJson};

/// Judge evidence by a policy: is it from a genuine TEE that runs what the policy names?
///
/// Prints every check that passed, failed or was skipped. Skipped never counts as passed. Exits 0 only if the evidence is
/// trusted, 10 if it is malformed, 20 if it is not genuine, 30 if the policy refuses it, 40 if something cannot be read or
/// reached, 2 if the policy or the arguments cannot be used.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The policy file; docs/policy.md describes it.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// A file of evidence: {"tee": …, "quote": …, "collateral": …}.
    #[arg(long, value_name = "FILE", requires = "report_data")]
    evidence: PathBuf,
    /// What the evidence must sign: 128 hexadecimal digits, which you chose or computed yourself.
    #[arg(long, value_name = "HEX", requires = "evidence")]
    report_data: Option<ReportData>,
    /// Judge as of this time instead of now, for evidence captured in the past.
    #[arg(long, value_name = "RFC3339")]
    now: Option<UnixTime>,
    /// Print the verdict, the claims and the transcript as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let question = read_question(args).in_json(args.json)?;
    let Question {
        policy,
        bytes,
        report_data,
        now,
    } = &question;
    let mut subject = args.evidence.display().to_string();
    let (transcript, outcome) = match Evidence::from_json(bytes) {
        Ok(evidence) => {
            let _ = write!(subject, ", evidence {}", hex::encode(evidence.digest()));
            let appraisal = appraise(&evidence, report_data, policy, *now);
            let outcome = appraisal
                .outcome
                .map(|appraised| Trusted::appraised(&appraised));
            (appraisal.transcript, outcome)
        }
        Err(error) => {
            let denial = Denial::from(error);
            let mut transcript = Transcript::new();
            transcript.fail(&denial);
            (transcript, Err(denial))
        }
    };
    let verdict = Verdict {
        subject,
        policy,
        now: *now,
        by_hand: args.now.is_some(),
        transcript: &transcript,
        outcome,
    };
    verdict.show(args.json)
}

/// Everything that is needed before anything can be judged.
struct Question {
    policy: Policy,
    bytes: Vec<u8>,
    report_data: ReportData,
    now: UnixTime,
}

fn read_question(args: &Args) -> Result<Question, Failure> {
    let Some(report_data) = args.report_data else {
        let error = anyhow!("--evidence needs --report-data");
        return Err(Failure::new(exit::Class::Usage, "arguments", error));
    };
    Ok(Question {
        policy: read_policy(&args.policy)?,
        bytes: read_limited(&args.evidence, MAX_EVIDENCE_JSON)?,
        report_data,
        now: args.now.map_or_else(clock, Ok)?,
    })
}

/// A verdict to be shown.
pub(crate) struct Verdict<'a> {
    /// What was judged, for people.
    pub(crate) subject: String,
    /// By which policy.
    pub(crate) policy: &'a Policy,
    /// As of when.
    pub(crate) now: UnixTime,
    /// Whether somebody gave that time by hand.
    pub(crate) by_hand: bool,
    /// Every check.
    pub(crate) transcript: &'a Transcript,
    /// What came of it.
    pub(crate) outcome: Result<Trusted, Denial>,
}

/// What a good verdict says.
pub(crate) struct Trusted {
    /// One sentence for people. For a development root it says "NOT A TEE".
    pub(crate) sentence: String,
    /// What the evidence says, for machines.
    pub(crate) claims: Value,
}

impl Trusted {
    /// About accepted evidence.
    pub(crate) fn appraised(appraised: &Appraised) -> Trusted {
        Trusted {
            sentence: appraised.to_string(),
            claims: serde_json::to_value(appraised.claims())
                .expect("claims are strings, numbers and lists"),
        }
    }
}

impl Verdict<'_> {
    /// Prints the verdict on standard output and gives the failure whose exit code says it.
    pub(crate) fn show(self, json: bool) -> Result<(), Failure> {
        if json {
            exit::print_json(&self.to_json())?;
        } else {
            let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            exit::print(self.to_text(colour).trim_end())?;
        }
        match self.outcome {
            Ok(_) => Ok(()),
            Err(denial) => {
                let class = match denial.class {
                    Class::Malformed => exit::Class::Malformed,
                    Class::NotGenuine => exit::Class::NotAuthentic,
                    Class::Refused => exit::Class::Refused,
                };
                Err(Failure::new(class, denial.claim, denial))
            }
        }
    }

    fn to_text(&self, colour: bool) -> String {
        let mut text = String::new();
        let mut line = |label: &str, value: String| {
            let _ = writeln!(text, "{label:9}{value}");
        };
        line("judged", self.subject.clone());
        let policy = self.policy;
        line(
            "by",
            format!(
                "policy version {}, {}",
                policy.version(),
                hex::encode(policy.digest())
            ),
        );
        line(
            "as of",
            match self.by_hand {
                true => format!(
                    "{}, GIVEN BY HAND: this says nothing about any other time",
                    self.now
                ),
                false => self.now.to_string(),
            },
        );
        line("root", self.transcript.root_of_trust().to_string());
        let _ = writeln!(text, "\n{}", self.transcript.to_table(colour));
        let (on, off) = match (colour, &self.outcome) {
            (false, _) => ("", ""),
            (true, Ok(_)) if self.is_tee() => ("\u{1b}[1;32m", "\u{1b}[0m"),
            (true, Ok(_)) => ("\u{1b}[1;33m", "\u{1b}[0m"),
            (true, Err(_)) => ("\u{1b}[1;31m", "\u{1b}[0m"),
        };
        let _ = match &self.outcome {
            Ok(trusted) => writeln!(text, "{on}TRUSTED{off}: {}", trusted.sentence),
            Err(denial) => {
                let class = denial.class.to_string().to_uppercase();
                let not_a_tee = match self.transcript.root_of_trust() {
                    RootOfTrust::Development(_) => " (development evidence: NOT A TEE)",
                    RootOfTrust::Intel | RootOfTrust::Undetermined => "",
                };
                writeln!(text, "{on}{class}{off} by {}{not_a_tee}", denial.claim)
            }
        };
        text
    }

    fn to_json(&self) -> Value {
        let (verdict, exit_code) = match &self.outcome {
            Ok(_) => ("trusted", 0),
            Err(denial) => match denial.class {
                Class::Malformed => ("malformed", denial.class.exit_code()),
                Class::NotGenuine => ("not_genuine", denial.class.exit_code()),
                Class::Refused => ("refused", denial.class.exit_code()),
            },
        };
        json!({
            "verdict": verdict,
            "exit_code": exit_code,
            "tee": self.outcome.is_ok() && self.is_tee(),
            "subject": self.subject,
            "policy": {
                "version": self.policy.version(),
                "digest": hex::encode(self.policy.digest()),
            },
            "time": self.now,
            "time_given_by_hand": self.by_hand,
            "denial": self.outcome.as_ref().err(),
            "claims": self.outcome.as_ref().ok().map(|trusted| &trusted.claims),
            "transcript": self.transcript,
        })
    }

    fn is_tee(&self) -> bool {
        self.transcript.root_of_trust().is_tee()
    }
}

/// Reads a policy file. One that cannot be used is the user's mistake, not the evidence's.
pub(crate) fn read_policy(path: &Path) -> Result<Policy, Failure> {
    let unusable = |error: anyhow::Error| {
        let error = error.context(path.display().to_string());
        Failure::new(exit::Class::Usage, "policy", error)
    };
    let bytes = read_limited(path, MAX_POLICY)?;
    let text = String::from_utf8(bytes).map_err(|error| unusable(error.into()))?;
    Policy::from_toml(&text).map_err(|error| unusable(error.into()))
}

/// The time now.
pub(crate) fn clock() -> Result<UnixTime, Failure> {
    UnixTime::try_from(SystemTime::now())
        .context("this machine's clock is before 1970")
        .map_err(Failure::io)
}

/// Reads a file, but never much more than the limit: what reads the bytes refuses the rest by size.
fn read_limited(path: &Path, limit: usize) -> Result<Vec<u8>, Failure> {
    let shown = || path.display().to_string();
    let file = File::open(path).with_context(shown).map_err(Failure::io)?;
    let mut bytes = Vec::new();
    let end = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    file.take(end)
        .read_to_end(&mut bytes)
        .with_context(shown)
        .map_err(Failure::io)?;
    Ok(bytes)
}
