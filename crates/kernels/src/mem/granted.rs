//! What the kernel made of memory, read back from `/proc/self/smaps`: accepting advice and following
//! it are two things.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use super::Region;

/// Where a region lies, to ask later what became of it. It gives no access to the memory, and may
/// outlive it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    start: usize,
    len: usize,
}

/// What the kernel says of a range of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Bytes of the range.
    pub bytes: u64,
    /// Bytes of it that have pages at all.
    pub resident: u64,
    /// Bytes of it that lie in huge pages (`AnonHugePages`).
    pub huge: u64,
    /// The whole range is locked (`VmFlags: lo`): none of it reaches swap.
    pub locked: bool,
    /// The whole range is left out of core dumps (`VmFlags: dd`).
    pub dump_excluded: bool,
}

impl Region {
    /// Where it lies; with what is [taken](Region::take) from it afterwards.
    pub fn extent(&self) -> Extent {
        Extent {
            start: self.start.as_ptr() as usize,
            len: self.mapped,
        }
    }
}

impl Extent {
    /// Asks the kernel. It counts mapping by mapping: where one reaches beyond the range, because the
    /// kernel has joined it with a neighbour of the same kind, as much of it is taken to be in the
    /// range as fits there.
    ///
    /// # Errors
    /// `/proc/self/smaps` cannot be read, or says nothing of the range.
    pub fn granted(self) -> io::Result<Granted> {
        self.granted_by(BufReader::new(File::open("/proc/self/smaps")?))
    }

    fn granted_by(self, smaps: impl BufRead) -> io::Result<Granted> {
        let mut granted = Granted {
            bytes: self.len as u64,
            resident: 0,
            huge: 0,
            locked: self.len > 0,
            dump_excluded: self.len > 0,
        };
        // Bytes of the current mapping that lie in the range, and of all so far.
        let (mut overlap, mut covered) = (0, 0);
        for line in smaps.lines() {
            let line = line?;
            if let Some((start, end)) = mapping(&line) {
                let first = start.max(self.start as u64);
                let last = end.min((self.start + self.len) as u64);
                overlap = last.saturating_sub(first);
                covered += overlap;
            } else if overlap == 0 {
            } else if let Some(bytes) = kilobytes(&line, "Rss:") {
                granted.resident += bytes.min(overlap);
            } else if let Some(bytes) = kilobytes(&line, "AnonHugePages:") {
                granted.huge += bytes.min(overlap);
            } else if let Some(flags) = line.strip_prefix("VmFlags:") {
                granted.locked &= flags.split_whitespace().any(|flag| flag == "lo");
                granted.dump_excluded &= flags.split_whitespace().any(|flag| flag == "dd");
            }
        }
        if covered == self.len as u64 {
            Ok(granted)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

/// `7f0000000000-7f0000200000 rw-p 00000000 00:00 0`
fn mapping(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(start)?, hex(end)?))
}

/// `AnonHugePages:      2048 kB`
fn kilobytes(line: &str, field: &str) -> Option<u64> {
    let number = line.strip_prefix(field)?.trim().strip_suffix(" kB")?;
    number.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{HUGE_PAGE, Purpose};

    fn smaps(mappings: &[(u64, u64, u64, u64, &str)]) -> String {
        let one = |&(start, end, rss, huge, flags): &(u64, u64, u64, u64, &str)| {
            format!(
                "{start:x}-{end:x} rw-p 00000000 00:00 0 \nSize:        4 kB\nRss:    {rss} kB\n\
                 AnonHugePages:    {huge} kB\nVmFlags: rd wr mr mw me ac {flags}\n"
            )
        };
        mappings.iter().map(one).collect()
    }

    #[test]
    fn a_range_is_the_sum_of_its_mappings() {
        let extent = Extent {
            start: 0x20_0000,
            len: 0x40_0000,
        };
        let text = smaps(&[
            (0x10_0000, 0x20_0000, 1024, 1024, ""),
            (0x20_0000, 0x40_0000, 2048, 2048, "lo dd hg"),
            (0x40_0000, 0x60_0000, 12, 0, "lo dd"),
            (0x60_0000, 0x80_0000, 2048, 2048, ""),
        ]);
        let granted = extent.granted_by(text.as_bytes()).unwrap();
        assert_eq!(
            granted,
            Granted {
                bytes: 4 << 20,
                resident: (2 << 20) + (12 << 10),
                huge: 2 << 20,
                locked: true,
                dump_excluded: true,
            }
        );
    }

    #[test]
    fn one_mapping_without_protection_is_said_of_the_range() {
        let extent = Extent {
            start: 0x1000,
            len: 0x2000,
        };
        for (flags, locked, dump_excluded) in [
            ("lo", true, false),
            ("dd", false, true),
            ("load", false, false),
        ] {
            let text = smaps(&[
                (0x1000, 0x2000, 4, 0, "lo dd"),
                (0x2000, 0x3000, 4, 0, flags),
            ]);
            let granted = extent.granted_by(text.as_bytes()).unwrap();
            assert_eq!(
                (granted.locked, granted.dump_excluded),
                (locked, dump_excluded),
                "{flags}"
            );
        }
    }

    #[test]
    fn a_joined_mapping_counts_for_no_more_than_the_range() {
        let extent = Extent {
            start: 0x20_0000,
            len: 0x20_0000,
        };
        let text = smaps(&[(0x20_0000, 0x80_0000, 6144, 4096, "lo dd")]);
        let granted = extent.granted_by(text.as_bytes()).unwrap();
        assert_eq!((granted.resident, granted.huge), (2 << 20, 2 << 20));
    }

    #[test]
    fn a_range_that_is_not_there_is_an_error() {
        let extent = Extent {
            start: 0x1000,
            len: 0x2000,
        };
        let text = smaps(&[(0x1000, 0x2000, 4, 0, "")]);
        let error = extent.granted_by(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_kernel_agrees_with_what_a_region_was_granted() {
        let mut region = Region::zeroed(3 * HUGE_PAGE, Purpose::Weights).unwrap();
        let extent = region.extent();
        let before = extent.granted().unwrap();
        assert_eq!(before.bytes, 3 * HUGE_PAGE as u64);
        assert_eq!(before.locked, region.report().locked);
        assert_eq!(before.dump_excluded, region.report().dump_excluded);
        region.fill(1);
        let parts = [HUGE_PAGE, 5000].map(|len| region.take(len).unwrap());
        let after = extent.granted().unwrap();
        assert_eq!(
            after.resident,
            3 * HUGE_PAGE as u64,
            "every page was written"
        );
        assert!(after.huge <= after.resident);
        if !region.report().huge_pages {
            assert_eq!(after.huge, 0, "nobody asked for them");
        }
        drop(parts);
        assert!(extent.granted().is_err(), "part of it was given back");
    }
}
