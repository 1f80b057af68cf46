//! Why there is no evidence.

use std::io;
use std::path::PathBuf;

use casemate_attest::EvidenceError;

/// Why there is no evidence, sorted by who is at fault.
#[derive(Debug, thiserror::Error)]
pub enum TeeError {
    /// The source cannot be reached or failed: this guest has none, or its service is down.
    #[error("{}: {source}", path.display())]
    Unavailable {
        /// The file, directory or socket concerned.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source did not answer in time.
    #[error("{}: no answer in time", path.display())]
    TimedOut {
        /// The socket concerned.
        path: PathBuf,
    },
    /// The one connection to the service broke earlier. It was measured when it was accepted, so it is not replaced:
    /// the program has to be started again.
    #[error("{}: the connection broke earlier; start the program again", path.display())]
    ConnectionLost {
        /// The socket concerned.
        path: PathBuf,
    },
    /// The service refused to quote.
    #[error("the quoting service refused: {reason:?}")]
    Refused {
        /// What it said, as untrusted text.
        reason: String,
    },
    /// The kernel's report provider is not the one this room knows.
    #[error("the kernel's report provider is {found:?}, expected \"tdx_guest\"")]
    OtherProvider {
        /// What the kernel named, as untrusted text.
        found: String,
    },
    /// Somebody else used the same report entry at the same time.
    #[error(
        "report entry was written to by somebody else: generation {found}, expected {expected}"
    )]
    Interference {
        /// Generation after the quote was read.
        found: u64,
        /// Generation that our one write gives.
        expected: u64,
    },
    /// An answer is larger than any honest one.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// Which answer.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// An answer does not have the agreed form.
    #[error("{what} is malformed")]
    Malformed {
        /// Which answer.
        what: &'static str,
    },
    /// Evidence or collateral cannot be read.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
}
