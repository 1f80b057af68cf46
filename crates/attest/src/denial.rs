//! Why evidence was not accepted, as data: whose fault it is, which claim, what was found, what was expected and
//! what to do about it.

use std::fmt;

use serde::Serialize;

use crate::transcript::printable;

/// What was found comes from outside and can be long; a report of it need not.
const MAX_FOUND: usize = 1000;

/// Whose fault a denial is. The discriminants are the exit codes of `casemate verify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The evidence cannot be read: wrong structure, unknown version, too large.
    Malformed = 10,
    /// The evidence can be read, but nothing shows that a TEE which Intel vouches for made it over this report data.
    NotGenuine = 20,
    /// The evidence is genuine, and the policy, or a rule that no policy can relax, refuses what it says.
    Refused = 30,
}

/// One reason for not accepting evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Denial {
    /// Whose fault it is.
    pub class: Class,
    /// The claim that failed: the name of the failed check in the transcript.
    pub claim: &'static str,
    /// What the evidence says.
    pub found: String,
    /// What would have been accepted.
    pub expected: String,
    /// What to do.
    pub remedy: String,
}

impl Class {
    /// The exit code of `casemate verify` for this class.
    pub const fn exit_code(self) -> u8 {
        self as u8
    }
}

impl Denial {
    /// A denial of genuine evidence; for checks that other rooms add, such as a keyset's or a credential's.
    pub fn refused(
        claim: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Denial {
        Denial::new(Class::Refused, claim, found, expected, remedy)
    }

    /// A denial of evidence that is not shown to be genuine.
    pub fn not_genuine(
        claim: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Denial {
        Denial::new(Class::NotGenuine, claim, found, expected, remedy)
    }

    /// A denial of something that cannot be read.
    pub fn malformed(
        claim: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Denial {
        Denial::new(Class::Malformed, claim, found, expected, remedy)
    }

    fn new(
        class: Class,
        claim: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Denial {
        let mut found = found.into();
        if let Some((end, _)) = found.char_indices().nth(MAX_FOUND) {
            found.truncate(end);
            found.push('…');
        }
        Denial {
            class,
            claim,
            found,
            expected: expected.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Malformed => "malformed",
            Class::NotGenuine => "not genuine",
            Class::Refused => "refused",
        })
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: found {}; expected {}; {}",
            self.class,
            self.claim,
            printable(&self.found),
            printable(&self.expected),
            self.remedy
        )
    }
}

impl std::error::Error for Denial {}
