//! Exit codes, as `casemate` has them: 2 for wrong usage, 10 for input that is not what it claims to be, 40 for the system.

use std::process::ExitCode;

use casemate_audit::transcript::Malformed;
use casemate_container::one_line;
use casemate_import::ImportError;

/// What the options ask for does not go together, or cannot be done with this model.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Shows a failure in one line and turns it into the exit code.
pub(crate) fn report(done: anyhow::Result<()>) -> ExitCode {
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    eprintln!("casemate audit: {}", one_line(error.as_ref()));
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
    use casemate_audit::transcript;

    #[test]
    fn codes_say_who_is_at_fault_also_behind_context() {
        let usage = anyhow::Error::new(Usage("no budget".into()));
        assert_eq!(code(&usage.context("while starting")), 2);
        let malformed = anyhow::Error::new(transcript::from_bytes(b"none").unwrap_err());
        assert_eq!(code(&malformed), 10);
        assert_eq!(code(&anyhow::anyhow!("disk full")), 40);
    }
}
