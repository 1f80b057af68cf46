//! Exit codes: the same as those of `casemate`.

use casemate_attest::PolicyError;
use casemate_broker::admin::AdminError;
use casemate_broker::broker::Rejection;
use casemate_broker::state::StateError;
use casemate_broker::store::StoreError;
use casemate_container::KeyFileError;

/// What the codes mean, for `--help`.
pub(crate) const CODES: &str = "\
Exit codes:
   0  done; for log verify: the log is whole and contains every anchor
   2  wrong usage
  10  malformed: a file is not what it should be
  20  not authentic: signature, chain or anchor do not hold
  30  refused: versions only go up, the rollback is for something else, what is closed stays closed, no such resource
  40  input or output failed: missing file, no permission, nobody serving, address taken";

/// What is wrong with arguments and files, found by this program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// Arguments that do not go together.
    #[error("{0}")]
    Usage(String),
    /// A file that is not what it should be.
    #[error("{0}")]
    Malformed(String),
    /// A file whose signature does not hold.
    #[error("{0}")]
    NotAuthentic(String),
}

const USAGE: u8 = 2;
const MALFORMED: u8 = 10;
const NOT_AUTHENTIC: u8 = 20;
const REFUSED: u8 = 30;
const IO: u8 = 40;

/// The code for a failure: by its first cause that says who is at fault.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(of_cause).unwrap_or(IO)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(fault) = cause.downcast_ref() {
        return Some(match fault {
            Fault::Usage(_) => USAGE,
            Fault::Malformed(_) => MALFORMED,
            Fault::NotAuthentic(_) => NOT_AUTHENTIC,
        });
    }
    if let Some(error) = cause.downcast_ref::<AdminError>() {
        return Some(match error {
            AdminError::Refused { kind, .. } => of_kind(kind),
            AdminError::Connect { .. } | AdminError::Protocol(_) => IO,
        });
    }
    if let Some(error) = cause.downcast_ref::<StateError>() {
        return Some(match error {
            StateError::Key(_) | StateError::KeyFile(KeyFileError::NotAKey { .. }) => MALFORMED,
            StateError::Store(error) => of_store(error),
            _ => IO,
        });
    }
    if let Some(error) = cause.downcast_ref::<Rejection>() {
        return Some(match error {
            Rejection::Store(error) => of_store(error),
            _ => MALFORMED,
        });
    }
    if cause.is::<PolicyError>() {
        return Some(MALFORMED);
    }
    cause.downcast_ref().map(of_store)
}

fn of_store(error: &StoreError) -> u8 {
    match error {
        StoreError::Log(_) | StoreError::Sealed(_) => NOT_AUTHENTIC,
        StoreError::Schema { .. } | StoreError::Damaged(_) | StoreError::Grant(_) => MALFORMED,
        _ => IO,
    }
}

/// By the kind that the broker names.
fn of_kind(kind: &str) -> u8 {
    match kind {
        "malformed" => MALFORMED,
        "not_authentic" | "log" => NOT_AUTHENTIC,
        "storage" => IO,
        _ => REFUSED,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use casemate_broker::log::LogFault;

    use super::*;

    #[test]
    fn the_first_cause_that_knows_decides() {
        let log = || StoreError::from(LogFault::HeadSignature);
        assert_eq!(code(&log().into()), NOT_AUTHENTIC);
        let wrapped = Err::<(), _>(StateError::from(log())).context("at start");
        assert_eq!(code(&wrapped.unwrap_err()), NOT_AUTHENTIC);
        assert_eq!(code(&Fault::Usage("no".into()).into()), USAGE);
        let refused = |kind: &str| AdminError::Refused {
            kind: kind.into(),
            detail: String::new(),
        };
        assert_eq!(code(&refused("malformed").into()), MALFORMED);
        assert_eq!(code(&refused("version").into()), REFUSED);
        assert_eq!(code(&anyhow::anyhow!("anything else")), IO);
    }
}
