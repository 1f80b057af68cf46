//! What this machine is, as far as it bears on speed, and how much memory there is left.

use std::fs;
use std::path::Path;

use casemate_kernels::cpu::Isa;
use serde::{Deserialize, Serialize};

/// The machine of a report.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    /// Threads that run at once.
    pub(crate) cores: usize,
    /// What our kernels use of it.
    pub(crate) instructions: String,
    /// Those that matter here and are there, by the kernel's names.
    pub(crate) features: Vec<String>,
    /// Bytes of the last-level cache.
    pub(crate) cache: Option<u64>,
    pub(crate) memory: u64,
    /// `always`, `madvise` or `never`.
    pub(crate) huge_pages: Option<String>,
    pub(crate) system: String,
    /// Load average of the minute before the run: what other work there was.
    pub(crate) load: Option<f64>,
}

impl Machine {
    pub(crate) fn describe() -> Machine {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let flags = field("flags")
            .or_else(|| field("Features"))
            .unwrap_or_default();
        let features = FEATURES
            .iter()
            .filter(|f| flags.split(' ').any(|flag| flag == **f));
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let average = fs::read_to_string("/proc/loadavg").ok();
        Machine {
            processor: field("model name").unwrap_or_else(|| "unknown".into()),
            cores: cores(),
            instructions: Isa::detect().name().into(),
            features: features.map(|f| (*f).to_owned()).collect(),
            cache: last_level_cache(),
            memory: meminfo("MemTotal:").unwrap_or(0),
            huge_pages: fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
                .ok()
                .and_then(|text| chosen(&text)),
            system: format!("Linux {}", release.trim()),
            load: average.and_then(|text| text.split(' ').next()?.parse().ok()),
        }
    }
}

/// Processor features that decide which kernels can run.
const FEATURES: &[&str] = &[
    "avx2",
    "f16c",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_vbmi",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
];

/// Threads that this machine runs at once.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes that a process could still get: what the system has, or what its group may have if that is less.
pub(crate) fn available_memory() -> Option<u64> {
    let system = meminfo("MemAvailable:");
    let number = |name: &str| {
        let text = fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let group = match (number("memory.max"), number("memory.current")) {
        (Some(most), Some(now)) => Some(most.saturating_sub(now)),
        _ => None,
    };
    match (system, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn meminfo(field: &str) -> Option<u64> {
    kib(&fs::read_to_string("/proc/meminfo").ok()?, field)
}

/// A field of a `/proc` file in bytes, given there in KiB.
pub(crate) fn kib(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    let number: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(number * 1024)
}

/// The word in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn last_level_cache() -> Option<u64> {
    let caches = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    caches
        .flatten()
        .filter_map(|cache| {
            let text = fs::read_to_string(cache.path().join("size")).ok()?;
            text.trim().strip_suffix('K')?.parse::<u64>().ok()
        })
        .max()
        .map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_fields_are_read_in_bytes() {
        let text =
            "MemTotal:       24658348 kB\nMemAvailable:    123 kB\nHugePages_Total:       0\n";
        assert_eq!(kib(text, "MemTotal:"), Some(24_658_348 * 1024));
        assert_eq!(kib(text, "MemAvailable:"), Some(123 * 1024));
        assert_eq!(kib(text, "HugePages_Total:"), None);
        assert_eq!(kib(text, "Absent:"), None);
    }

    #[test]
    fn the_chosen_word_is_the_one_in_brackets() {
        assert_eq!(
            chosen("always [madvise] never\n").as_deref(),
            Some("madvise")
        );
        assert_eq!(chosen("always madvise never\n"), None);
    }

    #[test]
    fn this_machine_has_a_name_memory_and_cores() {
        let machine = Machine::describe();
        assert!(machine.cores > 0 && machine.memory > 1 << 20);
        assert!(available_memory().is_some_and(|bytes| bytes <= machine.memory));
    }
}
