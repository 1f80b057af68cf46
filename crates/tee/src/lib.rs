//! Evidence collection in the guest: quotes from the kernel's configfs-tsm or from a quoting service on a Unix socket.
//! Nothing is judged here; that is the room `attest`. Nothing is fetched from a network either: collateral comes with
//! the quote or from a file that somebody outside the guest keeps fresh.

#![forbid(unsafe_code)]

mod configfs;
mod error;
mod quoting_service;
pub mod wire;

use casemate_attest::{Evidence, ReportData};

pub use configfs::ConfigfsTsm;
pub use error::TeeError;
pub use quoting_service::QuotingService;

/// A source of evidence about the program that asks.
pub trait QuoteProvider: Send + Sync {
    /// The source's name as configurations write it.
    fn name(&self) -> &'static str;

    /// A quote over `report_data`, with collateral where the source has it. Blocks.
    fn quote(&self, report_data: &ReportData) -> Result<Evidence, TeeError>;
}
