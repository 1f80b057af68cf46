//! Writes the seeds of every target, and the inputs that once broke something, into a corpus directory:
//! `casemate-fuzz-seeds fuzz/corpus`. Prints the targets, one per line with the longest input worth trying.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let Some(corpus) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: casemate-fuzz-seeds CORPUS");
        std::process::exit(2);
    };
    for target in casemate_fuzzing::TARGETS {
        let directory = corpus.join(target.name);
        fs::create_dir_all(&directory)?;
        for (index, seed) in (target.seeds)().iter().enumerate() {
            fs::write(directory.join(format!("seed-{index}")), seed)?;
        }
        for (name, input) in casemate_fuzzing::regressions(target.name)? {
            fs::write(directory.join(Path::new(&name)), input)?;
        }
        println!("{} {}", target.name, target.max_len);
    }
    Ok(())
}
