//! `cargo xtask demo`.
use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave the deployment running until Ctrl-C and print how to talk to it
    #[arg(long)]
    keep: bool,
    /// A GGUF file or Hugging Face directory to serve instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    model: Option<std::path::PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let _ = (options.keep, &options.model);
    anyhow::bail!("the demonstration is not there yet")
}
