//! `casemate explain`: a refusal in plain words. Reading a transcript is `reading`'s, telling what else a file may be
//! is `kinds`'s, and what each claim means stands in `claims`.

mod claims;
pub(crate) mod kinds;
mod reading;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};

use crate::exit::{self, Class, Failure, InJson};
use crate::terminal::printable;
use reading::Finding;

/// What the proxy adds to its refusals, and an explanation leaves out.
pub(crate) const TELLS_MORE: &str = "; `casemate explain` reads this answer and tells more";

/// The longest input that is read; a log can have the end of it cut off.
const MAX_INPUT: u64 = 16 << 20;

/// Explain a refusal in plain words: what was claimed, found and expected, the likely cause, and what to do.
///
/// Reads the output of `verify --json`, `check --json` and the other commands' `--json`, what the proxy, the broker or
/// an enclave answered, `casemate-broker admin log show --json`, and the log of an enclave that did not start.
///
/// Exits 0 if everything in the input was explained, or if nothing in it was refused; 10 if it is not the record of a
/// refusal, and says then what it looks like; 40 if it cannot be read.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file, or - for standard input.
    file: PathBuf,
    /// Print the explanations as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    explain(args).in_json(args.json)
}

fn explain(args: &Args) -> Result<(), Failure> {
    let bytes = read(&args.file)?;
    let findings = Findings::read(&bytes).map_err(|looks_like| {
        let error = anyhow!("{}: {looks_like}", shown(&args.file));
        Failure::new(Class::Malformed, "not-a-transcript", error)
    })?;
    if args.json {
        return exit::print_json(&findings.to_json());
    }
    let bold = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    exit::print(findings.to_text(bold).trim_end())
}

/// The refusals in a transcript.
pub struct Findings(Vec<Finding>);

impl Findings {
    /// Finds them.
    ///
    /// # Errors
    /// What `bytes` look like instead, if they are no transcript.
    pub fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let findings = reading::findings(bytes).ok_or_else(|| kinds::describe(bytes))?;
        Ok(Self(findings))
    }

    /// Whether nothing was refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The explanations, for people.
    #[must_use]
    pub fn to_text(&self, bold: bool) -> String {
        if self.is_empty() {
            return "nothing was refused here, so there is nothing to explain".to_owned();
        }
        let texts = self.0.iter().map(|finding| to_text(finding, bold));
        texts.collect::<Vec<_>>().join("\n")
    }

    /// The explanations, for programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let explanations: Vec<Value> = self.0.iter().map(to_json).collect();
        json!({ "explanations": explanations })
    }
}

fn shown(path: &Path) -> String {
    match path.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => path.display().to_string(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    if path.is_dir() {
        let error = anyhow!("{}: {}", shown(path), kinds::describe_directory(path));
        return Err(Failure::io(error));
    }
    let mut bytes = Vec::new();
    let done = match path.to_str() {
        Some("-") => io::stdin().lock().take(MAX_INPUT).read_to_end(&mut bytes),
        _ => File::open(path).and_then(|file| file.take(MAX_INPUT).read_to_end(&mut bytes)),
    };
    done.with_context(|| shown(path)).map_err(Failure::io)?;
    Ok(bytes)
}

fn to_text(finding: &Finding, bold: bool) -> String {
    let (on, off) = if bold {
        ("\u{1b}[1m", "\u{1b}[0m")
    } else {
        ("", "")
    };
    let mut text = format!("{on}{}{off}", printable(&finding.claim));
    let mut about = vec![format!("refused by {}", finding.by)];
    about.extend(
        finding
            .class
            .as_deref()
            .map(|class| class.replace('_', " ")),
    );
    about.extend(finding.context.clone());
    // A String takes every write.
    let _ = writeln!(text, "  ({})", printable(&about.join(", ")));
    let mut line = |label: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(text, "  {label:10}{}", printable(value));
        }
    };
    let known = claims::find(&finding.claim);
    line("claim", known.map_or("", |known| known.means));
    line("found", &finding.found);
    line("expected", &finding.expected);
    match known {
        Some(known) => {
            line("likely", known.cause);
            line("to do", known.remedy);
        }
        None => line("likely", UNKNOWN),
    }
    if known.is_none_or(|known| !known.remedy.contains(&finding.remedy)) {
        line("it says", &finding.remedy);
    }
    text
}

const UNKNOWN: &str = "this version of casemate does not know the claim: the other side is newer, or is not Casemate's";

fn to_json(finding: &Finding) -> Value {
    let known = claims::find(&finding.claim);
    json!({
        "claim": finding.claim,
        "by": finding.by,
        "class": finding.class,
        "known": known.is_some(),
        "means": known.map(|known| known.means),
        "found": finding.found,
        "expected": finding.expected,
        "cause": known.map(|known| known.cause),
        "remedy": known.map(|known| known.remedy),
        "said": finding.remedy,
        "context": finding.context,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_every_part_and_nothing_that_moves_the_cursor() {
        let finding = Finding {
            by: "verify",
            claim: "debug".into(),
            class: Some("refused".into()),
            found: "\u{1b}[2Jon".into(),
            expected: "off".into(),
            remedy: "start it without".into(),
            context: Some("http://x".into()),
        };
        let text = to_text(&finding, false);
        for part in [
            "debug  (refused by verify, refused, http://x)",
            "found",
            "likely",
            "to do",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn an_unknown_claim_is_said_to_be_one() {
        let finding = Finding {
            claim: "brand.new".into(),
            ..Finding::default()
        };
        assert!(to_text(&finding, false).contains("does not know the claim"));
        assert_eq!(to_json(&finding)["known"], false);
    }
}
