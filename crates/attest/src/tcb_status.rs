//! Intel's verdict on a platform's security versions, in Intel's words. What a policy makes of it is decided elsewhere.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// Intel's verdict on a platform's security versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs)] // Intel's words, defined in its PCS documentation.
pub enum TcbStatus {
    UpToDate,
    SWHardeningNeeded,
    ConfigurationNeeded,
    ConfigurationAndSWHardeningNeeded,
    OutOfDate,
    OutOfDateConfigurationNeeded,
    TDRelaunchAdvised,
    TDRelaunchAdvisedConfigurationNeeded,
    Revoked,
}

impl TcbStatus {
    const ALL: [TcbStatus; 9] = [
        TcbStatus::UpToDate,
        TcbStatus::SWHardeningNeeded,
        TcbStatus::ConfigurationNeeded,
        TcbStatus::ConfigurationAndSWHardeningNeeded,
        TcbStatus::OutOfDate,
        TcbStatus::OutOfDateConfigurationNeeded,
        TcbStatus::TDRelaunchAdvised,
        TcbStatus::TDRelaunchAdvisedConfigurationNeeded,
        TcbStatus::Revoked,
    ];
}

impl fmt::Display for TcbStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The variants carry Intel's words.
        write!(f, "{self:?}")
    }
}

impl FromStr for TcbStatus {
    type Err = ();

    fn from_str(text: &str) -> Result<TcbStatus, ()> {
        TcbStatus::ALL
            .into_iter()
            .find(|status| status.to_string() == text)
            .ok_or(())
    }
}
