//! Exit codes, and how a failure is shown: one line on standard error, and with `--json` one object on standard output.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::anyhow;
use casemate_container::{KeyFileError, OpenError, SealError, one_line};
use casemate_import::ImportError;
use serde_json::{Value, json};

use crate::terminal::{printable, printable_json};

/// What the codes mean, for `--help`.
pub(crate) const CODES: &str = "\
Exit codes:
   0  done; for check and verify: everything that was to be proven is proven
   2  wrong usage
  10  malformed: the input is not what it claims to be
  20  not authentic: key, signature, digest or evidence do not fit together
  30  refused by policy
  40  input or output failed: missing file, no permission, path taken, unreachable";

/// Who is at fault; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Arguments that do not go together.
    Usage,
    /// The input is not what it claims to be.
    Malformed,
    /// Key, signature, digest or evidence do not fit together.
    NotAuthentic,
    /// A policy says no.
    Refused,
    /// The system or the network.
    Io,
}

impl Class {
    fn code(self) -> u8 {
        match self {
            Class::Usage => 2,
            Class::Malformed => 10,
            Class::NotAuthentic => 20,
            Class::Refused => 30,
            Class::Io => 40,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Class::Usage => "usage",
            Class::Malformed => "malformed",
            Class::NotAuthentic => "not-authentic",
            Class::Refused => "refused",
            Class::Io => "io",
        }
    }
}

/// A command that did not do what it was asked to.
#[derive(Debug)]
pub(crate) struct Failure {
    class: Class,
    /// A stable word for machines.
    code: &'static str,
    error: anyhow::Error,
    /// How to learn more.
    hint: Option<&'static str>,
    json: bool,
}

impl Failure {
    pub(crate) fn new(class: Class, code: &'static str, error: impl Into<anyhow::Error>) -> Self {
        Failure {
            class,
            code,
            error: error.into(),
            hint: None,
            json: false,
        }
    }

    /// The same, saying first what it is about.
    pub(crate) fn about(self, what: String) -> Self {
        Failure {
            error: self.error.context(what),
            ..self
        }
    }

    /// The same, with a second line that says how to learn more.
    pub(crate) fn hint(self, hint: &'static str) -> Self {
        Failure {
            hint: Some(hint),
            ..self
        }
    }

    pub(crate) fn io(error: impl Into<anyhow::Error>) -> Self {
        Failure::new(Class::Io, "io", error)
    }

    fn value(&self) -> Value {
        let message = one_line(self.error.as_ref());
        json!({ "error": { "class": self.class.name(), "code": self.code, "message": message } })
    }
}

/// Shows a failure and turns it into the exit code.
pub(crate) fn report(done: Result<(), Failure>) -> ExitCode {
    let Err(failure) = done else {
        return ExitCode::SUCCESS;
    };
    if failure.json {
        let _ = print_json(&failure.value());
    }
    let mut stderr = io::stderr().lock();
    let message = one_line(failure.error.as_ref());
    let _ = writeln!(stderr, "casemate: {}", printable(&message));
    if let Some(hint) = failure.hint.filter(|_| !failure.json) {
        let _ = writeln!(stderr, "casemate: {hint}");
    }
    ExitCode::from(failure.class.code())
}

/// Prints one object on standard output.
pub(crate) fn print_json(value: &Value) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).expect("a JSON value has a text");
    print(&printable_json(&text))
}

/// Prints on standard output. A reader that left, as `head` does, has what it wanted: the exit code stays the verdict.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.map_err(Failure::io),
    }
}

/// Failures of a command that was asked for JSON say so in JSON too.
pub(crate) trait InJson {
    fn in_json(self, json: bool) -> Self;
}

impl<T> InJson for Result<T, Failure> {
    fn in_json(self, json: bool) -> Self {
        self.map_err(|failure| Failure { json, ..failure })
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let class = match error {
            OpenError::Malformed(_) => Class::Malformed,
            OpenError::NotAuthentic(_) => Class::NotAuthentic,
            OpenError::Memory { .. } | OpenError::Io { .. } => Class::Io,
        };
        Failure::new(class, error.code(), error)
    }
}

impl From<SealError> for Failure {
    fn from(error: SealError) -> Self {
        match error {
            SealError::Manifest(ref e) => Failure::new(Class::Malformed, e.code(), error),
            SealError::Source(_) => Failure::new(Class::Io, "source", error),
            SealError::SourceChanged { .. } => Failure::new(Class::Io, "source-changed", error),
            SealError::NothingPublic { .. } => Failure::new(Class::Usage, "nothing-public", error),
            SealError::Exists { .. } => {
                Failure::new(Class::Io, "exists", anyhow!("{error}; --force replaces it"))
            }
            SealError::Io { .. } => Failure::io(error),
        }
    }
}

impl From<KeyFileError> for Failure {
    fn from(error: KeyFileError) -> Self {
        match error {
            KeyFileError::Io { .. } => Failure::new(Class::Io, "key-file", error),
            KeyFileError::Exists { .. } => {
                Failure::new(Class::Io, "exists", anyhow!("{error}; --force replaces it"))
            }
            KeyFileError::Exposed { .. } => Failure::new(Class::Io, "key-file-exposed", error),
            KeyFileError::NotAKey { .. } => Failure::new(Class::Malformed, "not-a-key", error),
        }
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Self {
        match error {
            ImportError::Io { .. } => Failure::io(error),
            _ => Failure::new(Class::Malformed, "model", error),
        }
    }
}
