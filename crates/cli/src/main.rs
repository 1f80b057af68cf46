//! `casemate`. The program is a library, so that fuzzers reach what it reads from strangers.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    casemate_cli::main()
}
