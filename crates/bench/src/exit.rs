//! Exit codes, as `casemate` has them: 2 for wrong usage, 10 for input that is not what it claims to be, 40 for the system.

use std::fmt;
use std::process::ExitCode;

use casemate_container::one_line;
use casemate_import::ImportError;

/// What the options ask for does not go together, or this machine or model cannot do it.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

/// A report that is none.
#[derive(Debug)]
pub(crate) struct Malformed(pub(crate) String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}
impl std::error::Error for Malformed {}

/// Shows a failure in one line and turns it into the exit code.
pub(crate) fn report(done: anyhow::Result<()>) -> ExitCode {
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    eprintln!("casemate bench: {}", one_line(error.as_ref()));
    ExitCode::from(code(&error))
}

fn code(error: &anyhow::Error) -> u8 {
    let malformed = |error: &ImportError| !matches!(error, ImportError::Io { .. });
    if error.downcast_ref::<Usage>().is_some() {
        2
    } else if error.downcast_ref::<Malformed>().is_some()
        || error.downcast_ref().is_some_and(malformed)
    {
        10
    } else {
        40
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_say_who_is_at_fault_also_behind_context() {
        let usage = anyhow::Error::new(Usage("0 threads".into()));
        assert_eq!(code(&usage), 2);
        assert_eq!(code(&usage.context("while starting")), 2);
        assert_eq!(code(&anyhow::Error::new(Malformed("no report".into()))), 10);
        assert_eq!(code(&anyhow::anyhow!("disk full")), 40);
    }
}
