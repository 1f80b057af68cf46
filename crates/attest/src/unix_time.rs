//! Moments as this room sees them: whole seconds since 1970, always given by the caller.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Seconds since 1970-01-01T00:00:00Z. Shown and parsed as RFC 3339.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixTime(u64);

/// The text or clock reading is no moment since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a time since 1970 in RFC 3339 form, such as 2026-11-21T12:00:00Z")]
pub struct InvalidTime;

impl UnixTime {
    /// A moment by its seconds since 1970.
    pub const fn from_secs(secs: u64) -> UnixTime {
        UnixTime(secs)
    }

    /// Seconds since 1970.
    pub const fn as_secs(self) -> u64 {
        self.0
    }

    /// The moment `duration` later, cut to whole seconds; the end of time rather than an overflow.
    pub const fn saturating_add(self, duration: Duration) -> UnixTime {
        UnixTime(self.0.saturating_add(duration.as_secs()))
    }

    /// How long after `earlier` this is; zero where it is not after it.
    pub const fn saturating_since(self, earlier: UnixTime) -> Duration {
        Duration::from_secs(self.0.saturating_sub(earlier.0))
    }
}

impl TryFrom<SystemTime> for UnixTime {
    type Error = InvalidTime;

    fn try_from(time: SystemTime) -> Result<UnixTime, InvalidTime> {
        let since = time
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_err(|_| InvalidTime)?;
        Ok(UnixTime(since.as_secs()))
    }
}

impl FromStr for UnixTime {
    type Err = InvalidTime;

    fn from_str(text: &str) -> Result<UnixTime, InvalidTime> {
        let parsed = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| InvalidTime)?;
        let secs = u64::try_from(parsed.unix_timestamp()).map_err(|_| InvalidTime)?;
        Ok(UnixTime(secs))
    }
}

impl fmt::Display for UnixTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = i64::try_from(self.0)
            .ok()
            .and_then(|secs| OffsetDateTime::from_unix_timestamp(secs).ok())
            .and_then(|time| time.format(&Rfc3339).ok());
        match text {
            Some(text) => f.write_str(&text),
            // Beyond year 9999 RFC 3339 has no form.
            None => write!(f, "second {} since 1970", self.0),
        }
    }
}

impl serde::Serialize for UnixTime {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_shows_rfc_3339() {
        let time: UnixTime = "2026-06-08T12:42:41Z".parse().unwrap();
        assert_eq!(time, UnixTime::from_secs(1_780_922_561));
        assert_eq!(time.to_string(), "2026-06-08T12:42:41Z");
        let shifted: UnixTime = "2026-06-08T14:42:41+02:00".parse().unwrap();
        assert_eq!(shifted, time);
        for bad in [
            "",
            "2026-06-08",
            "1969-12-31T23:59:59Z",
            "2026-13-01T00:00:00Z",
        ] {
            assert_eq!(bad.parse::<UnixTime>(), Err(InvalidTime), "{bad}");
        }
        assert_eq!(
            UnixTime::from_secs(u64::MAX).to_string(),
            "second 18446744073709551615 since 1970"
        );
    }
}
