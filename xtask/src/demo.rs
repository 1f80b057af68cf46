//! `cargo xtask demo`: obtains the model, builds the programs, and starts the narrated deployment.

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
}

/// The programs of a deployment, by package.
const PROGRAMS: &[(&str, &str)] = &[
    ("casemate-cli", "casemate"),
    ("casemate-broker", "casemate-broker"),
    ("casemate-enclave", "casemate-enclave"),
    ("casemate-testkit", "casemate-fake-tee"),
    ("casemate-demo", "casemate-demo"),
];

pub(crate) fn run(options: &Options) -> Result<()> {
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

    let mut build = process::cargo();
    build.args(["build", "--release", "--locked"]);
    for (package, program) in PROGRAMS {
        build.args(["--package", package, "--bin", program]);
    }
    process::run(&mut build)?;

    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    let mut demo = Command::new(target.join("release/casemate-demo"));
    demo.arg("--model").arg(model).arg("--name").arg(name);
    if let Some(question) = &options.question {
        demo.arg("--question").arg(question);
    }
    if options.keep {
        demo.arg("--keep");
    }
    let status = demo.status().context("cannot start the demonstration")?;
    if !status.success() {
        bail!("the demonstration failed: {status}");
    }
    Ok(())
}
