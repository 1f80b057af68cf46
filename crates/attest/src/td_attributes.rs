//! The bits of a TD's attributes and XFAM, as the TDX module's ABI defines them, and which of them a verifier must
//! refuse whatever the policy says.

/// Attributes of a TD (TDX Module ABI specification 348551, "ATTRIBUTES").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TdAttributes(u64);

/// Bits 0..=7, TUD: any of them makes the TD untrusted (debugging, profiling).
const TUD: u64 = 0xff;
const SERVTD_EXT: u64 = 1 << 17;
const SEPT_VE_DISABLE: u64 = 1 << 28;
const MIGRATABLE: u64 = 1 << 29;
/// Bits that must be zero: 1–3, 7–15, 23–26, 32–61.
const RESERVED: u64 = ones(1, 3) | ones(7, 15) | ones(23, 26) | ones(32, 61);

/// XFAM bits that a TD may set, and those it must (the module's XFAM_FIXED0 and XFAM_FIXED1): x87, SSE, AVX,
/// AVX-512, PT, PKRU, CET, UINTR, LBR and AMX; x87 and SSE always.
const XFAM_ALLOWED: u64 = 0x0006_dbe7;
const XFAM_REQUIRED: u64 = 0x3;

const fn ones(first: u32, last: u32) -> u64 {
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

impl TdAttributes {
    pub(crate) fn new(bytes: [u8; 8]) -> TdAttributes {
        TdAttributes(u64::from_le_bytes(bytes))
    }

    pub(crate) fn under_debug(self) -> bool {
        self.0 & TUD != 0
    }

    pub(crate) fn sept_ve_disable(self) -> bool {
        self.0 & SEPT_VE_DISABLE != 0
    }

    pub(crate) fn migratable(self) -> bool {
        self.0 & MIGRATABLE != 0
    }

    pub(crate) fn servtd_ext(self) -> bool {
        self.0 & SERVTD_EXT != 0
    }

    /// Reserved bits outside the TUD group, which [`TdAttributes::under_debug`] covers.
    pub(crate) fn reserved(self) -> u64 {
        self.0 & RESERVED & !TUD
    }
}

/// The XFAM bits that no TDX module lets a TD set, or that it must set and did not.
pub(crate) fn impossible_xfam(bytes: [u8; 8]) -> u64 {
    let xfam = u64::from_le_bytes(bytes);
    (xfam & !XFAM_ALLOWED) | (XFAM_REQUIRED & !xfam)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_is_in_the_group_the_abi_gives_it() {
        for bit in 0..64 {
            let attributes = TdAttributes(1 << bit);
            assert_eq!(attributes.under_debug(), bit < 8, "bit {bit}");
            assert_eq!(attributes.sept_ve_disable(), bit == 28, "bit {bit}");
            assert_eq!(attributes.migratable(), bit == 29, "bit {bit}");
            assert_eq!(attributes.servtd_ext(), bit == 17, "bit {bit}");
            let reserved = matches!(bit, 8..=15 | 23..=26 | 32..=61);
            assert_eq!(attributes.reserved() != 0, reserved, "bit {bit}");
        }
    }

    #[test]
    fn xfam_needs_x87_and_sse_and_nothing_unknown() {
        assert_eq!(impossible_xfam([0xe7, 0x42, 6, 0, 0, 0, 0, 0]), 0);
        assert_eq!(impossible_xfam([0xe5, 0, 0, 0, 0, 0, 0, 0]), 2);
        assert_eq!(
            impossible_xfam([0xe7, 0x04, 0, 0, 0, 0, 0, 0x80]),
            0x8000_0000_0000_0400
        );
    }
}
