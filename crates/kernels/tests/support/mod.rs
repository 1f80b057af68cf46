//! Deterministic numbers and the list of machines-in-this-machine that every kernel test runs on.

#![allow(dead_code, reason = "each test program uses its part")]

use casemate_kernels::cpu::Isa;
use casemate_kernels::team::Team;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// One team for each instruction set here, with 1 to 4 members.
pub(crate) fn teams() -> Vec<Team> {
    Isa::available()
        .flat_map(|isa| (1..=4).map(move |threads| Team::with_isa(threads, isa).unwrap()))
        .collect()
}

/// Whether this runs in an emulator (`cargo xtask test --only neon`), where everything takes a hundred times as long.
pub(crate) fn emulated() -> bool {
    std::env::var_os("CASEMATE_EMULATED").is_some()
}

pub(crate) fn describe(team: &Team) -> String {
    format!("{} x {}", team.isa(), team.members())
}

#[track_caller]
pub(crate) fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            f.to_bits() == e.to_bits(),
            "{what}: element {i} is {f:e} instead of {e:e}"
        );
    }
}
