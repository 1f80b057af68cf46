//! What a process asks of the system so that secrets stay in its memory. Every program that holds keys, prompts or
//! weights calls [`at_start`] first of all and [`before_secrets`] before the first of them exists.
//!
//! | asked for | against | how |
//! |---|---|---|
//! | no core file, no core pipe | crashes that write memory to disk | `RLIMIT_CORE` of 1 byte |
//! | not dumpable | tracing, `/proc/PID/mem`, core pipes of kernels that ignore the limit | `PR_SET_DUMPABLE` 0 |
//! | nothing in swap | memory written to disk under pressure | `mlockall`, on fault, now and later |
//! | panics without their message | text of prompts in standard error: slicing errors quote what was sliced | a hook |
//!
//! A core limit of 1 does more than 0: the kernel ignores the limit for `core_pattern`s that name a program, except for
//! this value, at which it gives up (fs/coredump.c); for files any limit below a page means none.
//!
//! All memory is locked only where that cannot fail later. Under a limit, each further allocation beyond it would be
//! refused, and the program with it; then only [`crate::mem::Region`]s are locked, as far as the limit allows.

use std::fmt;
use std::panic;

/// What was granted; shown at start, so that nobody has to assume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardening {
    /// The core size limit is below a page, for this process and its children.
    pub no_core_files: bool,
    /// The process cannot be dumped, nor traced by its own user.
    pub not_dumpable: bool,
    /// What of its memory stays out of swap.
    pub swap: Swap,
}

/// What stays out of swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// All memory, now and later.
    Nothing,
    /// What [`crate::mem::Region`] could lock. The limit, in bytes, does not allow more.
    BeyondLimit(u64),
    /// As before, although there is no limit: the system refused.
    Refused,
}

/// Turns core files and the messages of panics off. The first thing a program does.
pub fn at_start() {
    limit_core();
    panic::set_hook(Box::new(|panic| {
        // The payload is left out: it may quote a prompt. Where is what somebody needs to find the defect.
        match panic.location() {
            Some(place) => eprintln!("panicked at {place}; the message is withheld"),
            None => eprintln!("panicked; the message is withheld"),
        }
    }));
}

/// Turns dumps and tracing off and locks memory. Called after a quoting service was connected to, if there is one: one
/// for development measures its peer through files that a process which is not dumpable hides from other users.
pub fn before_secrets() -> Hardening {
    Hardening {
        no_core_files: limit_core(),
        not_dumpable: forbid_dumps(),
        swap: lock_all(),
    }
}

fn limit_core() -> bool {
    let set = |value| {
        let limit = libc::rlimit {
            rlim_cur: value,
            rlim_max: value,
        };
        // SAFETY: `setrlimit` reads one `rlimit`, which `limit` is for the whole call.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) == 0 }
    };
    // Where the hard limit is 0 already, it cannot be raised to 1.
    set(1) || set(0)
}

fn forbid_dumps() -> bool {
    // SAFETY: this option takes a number and touches no memory of ours.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) == 0 }
}

fn lock_all() -> Swap {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `getrlimit` writes one `rlimit`, which `limit` is for the whole call.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } != 0 {
        return Swap::Refused;
    }
    if limit.rlim_cur != libc::RLIM_INFINITY && !may_lock_everything() {
        return Swap::BeyondLimit(limit.rlim_cur);
    }
    // SAFETY: locking changes neither contents nor validity of any mapping.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Swap::Nothing,
        _ => Swap::Refused,
    }
}

/// Whether the process has `CAP_IPC_LOCK`, for which limits do not count.
fn may_lock_everything() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|set| set & (1 << CAP_IPC_LOCK) != 0)
}

impl fmt::Display for Hardening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = |granted| if granted { "granted" } else { "DENIED" };
        write!(
            f,
            "no core files: {}; no dumps or tracing: {}; out of swap: {}",
            state(self.no_core_files),
            state(self.not_dumpable),
            self.swap
        )
    }
}

impl fmt::Display for Swap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Swap::Nothing => f.write_str("all memory"),
            Swap::BeyondLimit(bytes) => write!(
                f,
                "weights and caches up to {bytes} bytes (raise RLIMIT_MEMLOCK for more)"
            ),
            Swap::Refused => f.write_str("DENIED"),
        }
    }
}
