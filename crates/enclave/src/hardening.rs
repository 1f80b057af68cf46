//! What the process asks of the system so that secrets stay in its memory.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// What was granted; shown at start, so that nobody has to assume.
pub struct Hardening {
    /// The process writes no core dump and cannot be traced by its own user.
    pub not_dumpable: bool,
    /// The core size limit is zero.
    pub no_core_files: bool,
}

/// Forbids core dumps and tracing. Called after the connection to a quoting service was made: a development quoting
/// service measures its peer through files that a non-dumpable process hides from other users.
pub fn apply() -> Hardening {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Hardening {
        not_dumpable: set_dumpable_behavior(DumpableBehavior::NotDumpable).is_ok(),
        no_core_files: setrlimit(Resource::Core, none).is_ok(),
    }
}

impl std::fmt::Display for Hardening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = |granted| if granted { "granted" } else { "DENIED" };
        write!(
            f,
            "no core dumps or tracing: {}; core size limit zero: {}",
            state(self.not_dumpable),
            state(self.no_core_files)
        )
    }
}
