//! The 64 bytes a TEE signs on behalf of the software inside it.

use std::fmt;
use std::str::FromStr;

use subtle::ConstantTimeEq as _;

/// Report data: exactly 64 bytes, never padded or cut to fit. Compared in constant time.
#[derive(Clone, Copy)]
pub struct ReportData([u8; 64]);

/// The text is not report data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("report data must be exactly 128 hexadecimal digits (64 bytes)")]
pub struct ReportDataError;

impl ReportData {
    /// Report data from its 64 bytes.
    pub const fn new(bytes: [u8; 64]) -> ReportData {
        ReportData(bytes)
    }

    /// The 64 bytes.
    pub const fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }
}

impl From<[u8; 64]> for ReportData {
    fn from(bytes: [u8; 64]) -> ReportData {
        ReportData(bytes)
    }
}

impl PartialEq for ReportData {
    fn eq(&self, other: &ReportData) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for ReportData {}

impl FromStr for ReportData {
    type Err = ReportDataError;

    fn from_str(text: &str) -> Result<ReportData, ReportDataError> {
        let mut bytes = [0; 64];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| ReportDataError)?;
        Ok(ReportData(bytes))
    }
}

impl fmt::Display for ReportData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ReportData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReportData({self})")
    }
}

impl serde::Serialize for ReportData {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_exactly_64_bytes_of_hex() {
        let text = "ab".repeat(64);
        assert_eq!(text.parse::<ReportData>().unwrap().to_string(), text);
        for bad in [
            String::new(),
            "ab".repeat(63),
            "ab".repeat(65),
            "zz".repeat(64),
        ] {
            assert_eq!(bad.parse::<ReportData>(), Err(ReportDataError), "{bad}");
        }
    }

    #[test]
    fn equality_looks_at_every_byte() {
        let base = ReportData::new([7; 64]);
        assert_eq!(base, ReportData::new([7; 64]));
        for i in 0..64 {
            let mut other = [7; 64];
            other[i] ^= 1;
            assert_ne!(base, ReportData::new(other), "byte {i}");
        }
    }
}
