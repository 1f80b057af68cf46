//! Exit codes of a start that failed: those of `casemate`, so that an operator has to learn them once.

use casemate_container::OpenError;
use casemate_release::ReleaseError;
use casemate_release::rcar::ErrorInformation;

use crate::config::ConfigError;
use crate::provision::ProvisionError;
use crate::serving::ServingError;

/// What the codes mean, for `--help`.
pub const CODES: &str = "\
Exit codes:
   0  stopped as it was told to
   2  wrong usage
  10  malformed: configuration, model or message is not what it claims to be
  20  not authentic: key, signature, digest or evidence do not fit together
  30  refused by the broker's policy, or by this program
  40  the system or the network: missing file, port taken, unreachable";

const MALFORMED: u8 = 10;
const NOT_AUTHENTIC: u8 = 20;
const REFUSED: u8 = 30;
const SYSTEM: u8 = 40;

/// The code for an error, by the first of its causes that decides.
#[must_use]
pub fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(of_cause).unwrap_or(SYSTEM)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(error) = cause.downcast_ref::<ConfigError>() {
        return Some(match error {
            ConfigError::Io(_) => SYSTEM,
            ConfigError::TooLarge | ConfigError::Malformed(_) => MALFORMED,
        });
    }
    if let Some(error) = cause.downcast_ref::<OpenError>() {
        return Some(match error {
            OpenError::Malformed(_) => MALFORMED,
            OpenError::NotAuthentic(_) => NOT_AUTHENTIC,
            OpenError::Memory { .. } | OpenError::Io { .. } => SYSTEM,
        });
    }
    if let Some(error) = cause.downcast_ref::<ReleaseError>() {
        return Some(releasing(error));
    }
    if let Some(ServingError::Provision(error)) = cause.downcast_ref() {
        return Some(provisioning(error));
    }
    cause.downcast_ref().map(provisioning)
}

fn releasing(error: &ReleaseError) -> u8 {
    match error {
        ReleaseError::Malformed(_) => MALFORMED,
        ReleaseError::Unverified(_) => NOT_AUTHENTIC,
        ReleaseError::Refused(_) => REFUSED,
        ReleaseError::Misuse(_) | ReleaseError::Crypto(_) => SYSTEM,
    }
}

fn provisioning(error: &ProvisionError) -> u8 {
    match error {
        ProvisionError::Release(error) => releasing(error),
        ProvisionError::TooLarge(_) => MALFORMED,
        ProvisionError::OtherCredential | ProvisionError::ConfigurationNotMeasured => NOT_AUTHENTIC,
        ProvisionError::Refused { status, text, .. } => {
            let said: Option<ErrorInformation> = serde_json::from_str(text).ok();
            let denial = said.and_then(|said| said.denial);
            match denial.as_ref().map(|denial| &*denial.class) {
                Some("malformed") => MALFORMED,
                Some("not_genuine") => NOT_AUTHENTIC,
                Some(_) => REFUSED,
                None if matches!(status, 401 | 403) => REFUSED,
                None => SYSTEM,
            }
        }
        ProvisionError::OtherAdapter { .. } => REFUSED,
        ProvisionError::NoPolicyVersion => MALFORMED,
        ProvisionError::Unreachable { .. }
        | ProvisionError::Tee(_)
        | ProvisionError::Interrupted => SYSTEM,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use casemate_container::{ModelDigest, NotAuthentic};
    use casemate_release::Unverified;

    use super::*;

    fn denied(class: &str) -> ProvisionError {
        let text = format!(
            r#"{{"type":"evidence_denied","detail":"evidence denied: rtmr1 is a, expected b","denial":{{"class":"{class}",
            "claim":"rtmr1","found":"a","expected":"b","remedy":"c"}}}}"#
        );
        refused(401, &text)
    }

    fn refused(status: u16, text: &str) -> ProvisionError {
        ProvisionError::Refused {
            what: "the evidence",
            status,
            text: text.into(),
        }
    }

    #[test]
    fn codes_tell_who_has_to_do_something() {
        let unverified = || ReleaseError::from(Unverified::Grant);
        let io = ConfigError::Io(std::io::ErrorKind::NotFound.into());
        let exchanged = ProvisionError::OtherAdapter {
            name: "bills".into(),
            expected: ModelDigest([1; 32]),
            found: ModelDigest([2; 32]),
        };
        let cases: [(anyhow::Error, u8); 12] = [
            (exchanged.into(), 30),
            (denied("malformed").into(), 10),
            (denied("not_genuine").into(), 20),
            (denied("refused").into(), 30),
            (refused(403, "no").into(), 30),
            (refused(503, "no").into(), 40),
            (ServingError::Provision(denied("refused")).into(), 30),
            (unverified().into(), 20),
            (ProvisionError::Release(unverified()).into(), 20),
            (ConfigError::TooLarge.into(), 10),
            (io.into(), 40),
            (anyhow::anyhow!("cannot listen"), 40),
        ];
        for (error, expected) in cases {
            assert_eq!(code(&error), expected, "{error:#}");
        }
        let opening = OpenError::from(NotAuthentic::Chunk { index: 3 });
        let below = Err::<(), _>(opening).context("cannot open the model");
        assert_eq!(code(&below.unwrap_err()), 20);
    }

    #[test]
    fn a_denial_is_told_in_words() {
        let shown = denied("refused").to_string();
        let told = "claim rtmr1: found a, expected b; c";
        assert!(shown.ends_with(told), "{shown}");
        assert!(!shown.contains('{'), "{shown}");
        assert_eq!(shown.matches("expected b").count(), 1, "{shown}");
        assert!(refused(502, "<html>").to_string().ends_with("502: <html>"));
    }
}
