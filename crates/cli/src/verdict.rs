//! How a verdict about evidence or a service is shown, to people and to machines. It decides nothing.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};

use casemate_attest::{Appraised, Class, Denial, Policy, RootOfTrust, Transcript, UnixTime};
use casemate_channel::verify::VerifiedService;
use serde_json::{Value, json};

use crate::exit::{self, Failure};
use crate::service::{NotVerified, Service, Verification};

/// Behind a refusal.
const MORE: &str =
    "likely cause and what to do: the same with --json, piped into `casemate explain -`";

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

    /// About a verified service.
    pub(crate) fn service(service: &VerifiedService) -> Trusted {
        let (keyset, credential) = (service.keyset(), service.credential());
        let until = service.valid_until();
        let adapters = match keyset.adapter_digests.len() {
            0 => String::new(),
            1 => " with one adapter".to_owned(),
            more => format!(" with {more} adapters"),
        };
        let sentence = format!(
            "{}; service {} of issuer {} serves {} version {}{adapters} in {}, until {until}",
            service.appraised(),
            credential.service,
            service.issuer(),
            keyset.model_name,
            keyset.model_version,
            keyset.compute,
        );
        let adapters: Vec<_> = keyset.adapter_digests.iter().map(hex::encode).collect();
        let claims = json!({
            "service": credential.service,
            "issuer": service.issuer().to_string(),
            "model": {
                "name": keyset.model_name,
                "version": keyset.model_version,
                "digest": hex::encode(keyset.model_digest),
                "adapters": adapters,
                "compute": keyset.compute,
            },
            "keyset_digest": service.keyset_digest().to_string(),
            "credential_policy_version": credential.policy_version,
            "valid_until": until,
            "evidence": service.appraised().claims(),
        });
        Trusted { sentence, claims }
    }
}

impl<'a> Verdict<'a> {
    /// About a service that answered.
    pub(crate) fn of(service: &'a Service, verification: &'a Verification) -> Verdict<'a> {
        Verdict {
            subject: service.url().to_string(),
            policy: service.policy(),
            now: verification.began,
            by_hand: false,
            transcript: &verification.transcript,
            outcome: verification
                .outcome
                .as_ref()
                .map(Trusted::service)
                .map_err(Clone::clone),
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
                let failure = NotVerified::Denied(denial).into_failure();
                Err(match json {
                    true => failure,
                    false => failure.hint(MORE),
                })
            }
        }
    }

    /// The verdict for people.
    pub(crate) fn to_text(&self, colour: bool) -> String {
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

    /// The verdict for machines.
    pub(crate) fn to_json(&self) -> Value {
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
