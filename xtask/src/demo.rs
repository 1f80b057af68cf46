//! `cargo xtask demo`: obtains the model, builds the programs, and starts the narrated deployment.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{fetch, process, workspace};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave the deployment running until Ctrl-C and print how to talk to it
    #[arg(long)]
    keep: bool,
    /// A GGUF file or Hugging Face directory to serve instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// The question to ask
    #[arg(long, value_name = "TEXT")]
    question: Option<String>,
    /// Show what it refuses: mount every attack on the list against a deployment of a tiny model
    #[arg(long, conflicts_with_all = ["keep", "model", "question"])]
    attacks: bool,
    /// Show how a worker that nobody trusts computes products: the same answers with it, without it and while it cheats, and
    /// what it was sent
    #[arg(long, conflicts_with_all = ["keep", "attacks"])]
    offload: bool,
    /// With --attacks: mount only this one; may be given several times
    #[arg(long, value_name = "NAME|NUMBER", requires = "attacks")]
    only: Vec<String>,
    /// With --attacks: print one JSON object per attack
    #[arg(long, requires = "attacks")]
    json: bool,
}

/// The programs of a deployment, by package.
const PROGRAMS: &[(&str, &str)] = &[
    ("casemate-cli", "casemate"),
    ("casemate-broker", "casemate-broker"),
    ("casemate-enclave", "casemate-enclave"),
    ("casemate-worker", "casemate-worker"),
    ("casemate-testkit", "casemate-fake-tee"),
    ("casemate-demo", "casemate-demo"),
];

pub(crate) fn run(options: &Options) -> Result<()> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    let mut demo = Vec::new();
    if options.attacks {
        demo.push(OsString::from("--attacks"));
        for only in &options.only {
            demo.extend(["--only".into(), only.into()]);
        }
        if options.json {
            demo.push("--json".into());
        }
    } else {
        let (model, name) = model(options)?;
        demo.extend(["--model".into(), model.into(), "--name".into(), name.into()]);
        if let Some(question) = &options.question {
            demo.extend(["--question".into(), question.into()]);
        }
        if options.keep {
            demo.push("--keep".into());
        }
        if options.offload {
            let page = target.join("casemate-offload.html");
            demo.extend(["--offload".into(), "--html".into(), page.into()]);
        }
    }

    let mut build = process::cargo();
    build.args(["build", "--release", "--locked"]);
    for (package, program) in PROGRAMS {
        build.args(["--package", package, "--bin", program]);
    }
    process::run(&mut build)?;

    let status = Command::new(target.join("release/casemate-demo"))
        .args(demo)
        .status()
        .context("cannot start the demonstration")?;
    if !status.success() {
        bail!("the demonstration failed: {status}");
    }
    Ok(())
}

/// The model to serve and a name for it.
fn model(options: &Options) -> Result<(PathBuf, String)> {
    // A name that the API takes, out of whatever the file is called.
    let (model, name) = match &options.model {
        Some(path) => {
            let stem = path
                .file_stem()
                .context("--model names a file or directory")?;
            (
                path.canonicalize()
                    .with_context(|| format!("no model at {}", path.display()))?,
                stem.to_owned(),
            )
        }
        None => (fetch::demo_model()?, "smollm2-135m-instruct".into()),
    };
    let name: String = name
        .to_string_lossy()
        .to_lowercase()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "._-".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(64)
        .collect();
    Ok((model, name))
}
