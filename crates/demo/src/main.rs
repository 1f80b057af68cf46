//! `casemate-demo`: one deployment on loopback, told step by step. `cargo xtask demo` builds and starts it.
//!
//! Holds the story and the question asked at its end. The deployment itself is `casemate_testkit::deployment`, the same
//! that the end-to-end tests use; everything shown is read from what the programs printed, logged or answered.

#![forbid(unsafe_code)]

mod narrator;
mod question;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Seals a model, releases its key to an attested enclave and asks it a question, showing what each step proved.
#[derive(Parser)]
#[command(name = "casemate-demo", version)]
struct Arguments {
    /// A GGUF file or Hugging Face directory
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Name under which the model is served
    #[arg(long, default_value = "smollm2-135m-instruct")]
    name: String,
    /// The question
    #[arg(long, default_value = "What is the capital of France?")]
    question: String,
    /// Leave the deployment running until Ctrl-C
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match story::tell(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
