//! `casemate audit`: starts `casemate-audit`, which lies beside this program. Attacking a model takes an engine, and whoever
//! reviews this program should not have to read one.

use std::ffi::OsString;
use std::path::Path;

use anyhow::anyhow;

use crate::companion::become_program;
use crate::exit::{Class, Failure};

/// The program that attacks.
const PROGRAM: &str = "casemate-audit";

/// Measure how well a model can be copied. Done by the program casemate-audit, which gets everything that follows, --help
/// too.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Passed on.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENTS"
    )]
    arguments: Vec<OsString>,
}

/// Becomes the other program; returns only where that fails.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    become_program(PROGRAM, &args.arguments, absent)
}

fn absent(program: &Path) -> Failure {
    Failure::new(
        Class::Io,
        "no-audit-program",
        anyhow!(
            "audits are a program of their own, and {} is not there; build it with `cargo build --release -p {PROGRAM}` \
             and put it beside casemate",
            program.display()
        ),
    )
}
