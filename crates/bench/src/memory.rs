//! The peak of this process's memory over what is being judged, and only that: measuring a limit needs memory of its own,
//! so the peak is read before it and counted afresh after it.

use std::fs;

use anyhow::{Context, Result};

use crate::machine::kib;

/// A peak with interruptions.
pub(crate) struct Peak {
    most: u64,
}

impl Peak {
    /// Counts from here on.
    pub(crate) fn start() -> Result<Peak> {
        reset()?;
        Ok(Peak { most: 0 })
    }

    /// Does something whose memory does not count. What is resident before and after it does.
    pub(crate) fn without<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.most = self.most.max(status("VmHWM:")?);
        let done = work();
        reset()?;
        done
    }

    /// Bytes at most resident so far.
    pub(crate) fn bytes(&self) -> Result<u64> {
        Ok(self.most.max(status("VmHWM:")?))
    }
}

/// Makes the kernel count the peak from here on (proc(5): 5 resets VmHWM).
pub(crate) fn reset() -> Result<()> {
    fs::write("/proc/self/clear_refs", "5")
        .context("cannot reset the peak in /proc/self/clear_refs")
}

/// A field of /proc/self/status, in bytes.
pub(crate) fn status(field: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    kib(&status, field).with_context(|| format!("/proc/self/status has no {field}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_leaves_out_what_does_not_count() {
        const SIZE: u64 = 256 << 20;
        let touch = || {
            vec![1u8; SIZE as usize]
                .iter()
                .map(|&b| u64::from(b))
                .sum::<u64>()
        };
        let mut peak = Peak::start().unwrap();
        let before = peak.bytes().unwrap();
        let sum = peak.without(|| Ok(touch())).unwrap();
        assert_eq!(sum, SIZE);
        // Other tests of this process allocate too, though nothing like that.
        let without = peak.bytes().unwrap();
        assert!(without < before + SIZE / 2, "{before} {without}");
        assert_eq!(touch(), SIZE);
        let with = peak.bytes().unwrap();
        assert!(with > without + SIZE / 2, "{without} {with}");
    }
}
