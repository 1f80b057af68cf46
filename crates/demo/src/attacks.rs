//! The second story: every attack on the list of `casemate_testkit::attacks`, and the refusal that each one meets.

use std::process::Command;

use anyhow::{Context, Result, bail};
use casemate_testkit::attacks::{ATTACKS, Attack, Ground, Refusal, Report};
use casemate_testkit::deployment::Deployment;
use console::style;
use serde_json::{Value, json};

use crate::narrator::{Waiting, scene, seconds, short};

/// Longest row of an explanation.
const WIDTH: usize = 100;

/// Which attacks, and how they are shown.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Mount only this attack; may be given several times
    #[arg(long, value_name = "NAME|NUMBER", requires = "attacks")]
    only: Vec<String>,
    /// Print one JSON object per attack, and nothing else
    #[arg(long, requires = "attacks")]
    json: bool,
}

/// Mounts the attacks. Fails if one of them is not refused as it must be.
pub(crate) fn mount(options: &Options) -> Result<()> {
    let chosen = chosen(&options.only)?;
    let programs = Deployment::programs_of_this_build()?;
    let directory = tempfile::Builder::new().prefix("casemate-").tempdir()?;
    if !options.json {
        scene("A deployment, and its enemies");
        println!(
            "      Real programs on this machine over a tiny model; a fake TEE signs quotes in Intel's format.\n      \
             Each attack must be refused by the party, and for the reason, that the list names."
        );
    }
    let waiting = (!options.json).then(|| Waiting::new("the deployment comes up"));
    let mut ground = Ground::prepare(&programs, directory.path())?;
    drop(waiting);

    let mut rows = Vec::new();
    for (number, attack) in chosen {
        if !options.json {
            println!(
                "\n{} {}",
                style(format!("[{number}/{}]", ATTACKS.len())).cyan().bold(),
                style(attack.what).bold()
            );
        }
        let waiting = (!options.json).then(|| Waiting::new(attack.name));
        let report = attack.mount(&mut ground);
        drop(waiting);
        if options.json {
            println!("{}", as_json(number, attack, &report));
        } else {
            show(&report, &programs.join("casemate"))?;
        }
        rows.push((number, attack, report));
    }
    // What was attacked must have come to no harm.
    ground
        .deployment()
        .verify()
        .context("after the attacks, the service does not verify")?;
    if !options.json {
        summary(&rows);
    }
    let failed = rows.iter().filter(|(_, _, report)| report.outcome.is_err());
    match failed.count() {
        0 => Ok(()),
        1 => bail!("one attack was not refused as it must be"),
        n => bail!("{n} attacks were not refused as they must be"),
    }
}

fn chosen(only: &[String]) -> Result<Vec<(usize, &'static Attack)>> {
    let all: Vec<_> = (1..).zip(ATTACKS).collect();
    if only.is_empty() {
        return Ok(all);
    }
    let find = |wanted: &String| {
        let fits = |(number, attack): &&(usize, &Attack)| {
            attack.name == wanted || number.to_string() == *wanted
        };
        all.iter().find(fits).copied().with_context(|| {
            let names: Vec<_> = ATTACKS.iter().map(|attack| attack.name).collect();
            format!(
                "there is no attack {wanted}; there are {}",
                names.join(", ")
            )
        })
    };
    only.iter().map(find).collect()
}

fn show(report: &Report, casemate: &std::path::Path) -> Result<()> {
    match &report.outcome {
        Ok(refusal) => {
            println!(
                "      {} refused by {}: {}  {}",
                style("✔").green().bold(),
                style(refusal.by).bold(),
                style(&refusal.claim).bold(),
                style(format!("({}, {})", refusal.verdict, seconds(report.took))).dim()
            );
            line("found", &refusal.found);
            line("expected", &refusal.expected);
            if let Some(cause) = likely_cause(refusal, casemate)? {
                line("likely", &cause);
            }
        }
        Err(failure) => println!("      {} {failure}", style("✘ NOT REFUSED").red().bold()),
    }
    Ok(())
}

fn line(label: &str, text: &str) {
    let mut label = label;
    let mut row = String::new();
    let print = |label: &str, row: &str| {
        println!("        {} {row}", style(format!("{label:<9}")).dim());
    };
    for word in text.split_whitespace() {
        let word: String = word.chars().filter(|c| !c.is_control()).collect();
        // A digest is to be recognised, not to be copied.
        let word = match word.len() >= 40 && word.bytes().all(|b| b.is_ascii_hexdigit()) {
            true => short(&word),
            false => word,
        };
        if !row.is_empty() && row.chars().count() + word.chars().count() >= WIDTH {
            print(label, &row);
            (label, row) = ("", String::new());
        }
        if !row.is_empty() {
            row.push(' ');
        }
        row.push_str(&word);
    }
    print(label, &row);
}

/// What `casemate explain` makes of the transcript.
fn likely_cause(refusal: &Refusal, casemate: &std::path::Path) -> Result<Option<String>> {
    // Where nothing was said, nothing can be explained.
    if refusal.transcript.is_empty() {
        return Ok(None);
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), &refusal.transcript)?;
    let output = Command::new(casemate)
        .args(["explain", "--json"])
        .arg(file.path())
        .env_clear()
        .output()?;
    if !output.status.success() {
        bail!(
            "casemate explain does not know this refusal: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            refusal.transcript
        );
    }
    let explained: Value = serde_json::from_slice(&output.stdout)?;
    let cause = explained["explanations"][0]["cause"].as_str();
    let cause = cause.with_context(|| format!("casemate explain knows no cause: {explained}"))?;
    Ok(Some(cause.to_owned()))
}

fn summary(rows: &[(usize, &Attack, Report)]) {
    scene("Summary");
    for (number, attack, report) in rows {
        let expected = &attack.expected;
        let mark = match &report.outcome {
            Ok(_) => style("refused").green(),
            Err(_) => style("FAILED ").red().bold(),
        };
        println!(
            "  {number:>2}  {mark}  {:<20} {:<10} {:<26} {:<10} {:>8}",
            attack.name,
            expected.by.to_string(),
            expected.claim,
            expected.verdict.to_string(),
            seconds(report.took)
        );
    }
    let refused = rows
        .iter()
        .filter(|(_, _, report)| report.outcome.is_ok())
        .count();
    let total: std::time::Duration = rows.iter().map(|(_, _, report)| report.took).sum();
    println!(
        "\n  {refused} of {} refused for the reason expected, in {}",
        rows.len(),
        seconds(total)
    );
    println!("  the service that was attacked still verifies");
}

fn as_json(number: usize, attack: &Attack, report: &Report) -> Value {
    let outcome = match &report.outcome {
        Ok(refusal) => json!({
            "by": refusal.by.to_string(),
            "class": refusal.class,
            "claim": refusal.claim,
            "found": refusal.found,
            "expected": refusal.expected,
            "verdict": refusal.verdict.to_string(),
        }),
        Err(_) => Value::Null,
    };
    json!({
        "number": number,
        "name": attack.name,
        "attack": attack.what,
        "refused": report.outcome.is_ok(),
        "refusal": outcome,
        "failure": report.outcome.as_ref().err().map(ToString::to_string),
        "seconds": report.took.as_secs_f64(),
    })
}
