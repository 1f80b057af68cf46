//! `casemate-demo`: one deployment on loopback, told step by step. `cargo xtask demo` builds and starts it.
//!
//! With `--attacks`, the same programs against their enemies; with `--offload`, with a worker that nobody trusts. Holds the story and the question asked at its end. The deployment itself is `casemate_testkit::deployment`, the same
//! that the end-to-end tests use; everything shown is read from what the programs printed, logged or answered.

#![forbid(unsafe_code)]

mod attacks;
mod narrator;
mod offload;
mod question;
mod story;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Seals a model, releases its key to an attested enclave and asks it a question, showing what each step proved.
#[derive(Parser)]
#[command(name = "casemate-demo", version)]
struct Arguments {
    /// A GGUF file or Hugging Face directory
    #[arg(long, value_name = "PATH", required_unless_present = "attacks")]
    model: Option<PathBuf>,
    /// Name under which the model is served
    #[arg(long, default_value = "smollm2-135m-instruct")]
    name: String,
    /// The question
    #[arg(long, default_value = "What is the capital of France?")]
    question: String,
    /// Leave the deployment running until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// Instead of the story, mount every attack on the list against a deployment of a tiny model
    #[arg(long, conflicts_with_all = ["model", "keep"])]
    attacks: bool,
    /// Instead of the story, have a worker that nobody trusts compute products, and show what it saw and how it cheats
    #[arg(long, conflicts_with_all = ["keep", "attacks"])]
    offload: bool,
    /// With --offload: also write what the worker saw as a page with plots
    #[arg(long, value_name = "FILE", requires = "offload")]
    html: Option<PathBuf>,
    #[command(flatten)]
    options: attacks::Options,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.model {
        Some(model) if arguments.offload => {
            offload::tell(&arguments, model, arguments.html.as_deref())
        }
        Some(model) if !arguments.attacks => story::tell(&arguments, model),
        _ => attacks::mount(&arguments.options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
