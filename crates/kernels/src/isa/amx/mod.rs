//! AMX: eight tile registers of sixteen rows of 64 bytes, multiplied with each other. (Sapphire Rapids
//! servers and later.) Neither the intrinsics nor their detection are stable in the language, so
//! instructions are written as assembly here, one method each, and nowhere else.
//!
//! What the instructions do is stated as [`Tiles`], after Intel's Software Developer's Manual, volume 2
//! (LDTILECFG, TILELOADD, TILESTORED, TDPBSUD, TDPBF16PS) and volume 1, chapter 18. Tests run the
//! same products on an interpreter of these five, and compare the assembled bytes with the manual's.

#[cfg(test)]
pub(crate) mod interpreter;

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::avx512::Avx512;
use crate::cpu::Kernel;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Bytes of a row of a tile.
pub(crate) const ROW_BYTES: usize = 64;

/// How large each tile is: what LDTILECFG reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 8],
    reserved_too: [u16; 8],
    rows: [u8; 8],
    reserved_at_last: [u8; 8],
}

impl Config {
    /// `(rows, bytes a row)` of each tile; tiles that are not used may be `(0, 0)`.
    pub(crate) fn new(tiles: [(usize, usize); 8]) -> Config {
        for (rows, bytes) in tiles {
            assert!(
                rows <= ROWS && bytes <= ROW_BYTES && bytes.is_multiple_of(4),
                "a tile has no {rows} rows of {bytes} bytes"
            );
        }
        Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: tiles.map(|(_, bytes)| bytes as u16),
            reserved_too: [0; 8],
            rows: tiles.map(|(rows, _)| rows as u8),
            reserved_at_last: [0; 8],
        }
    }

    #[cfg(test)]
    fn tile(&self, tile: usize) -> (usize, usize) {
        (self.rows[tile].into(), self.row_bytes[tile].into())
    }
}

/// The tile registers of a thread.
///
/// # Safety
/// An implementation reads and writes memory only where its methods say so.
pub(crate) unsafe trait Tiles {
    /// Makes tiles as large as `config` says, all of them zero.
    fn configure(&mut self, config: &Config);

    /// Row `i` of the tile is read from `from + i * stride`.
    ///
    /// # Safety
    /// Each of the tile's rows must be readable there, and tiles configured.
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize);

    /// Row `i` of the tile is written to `to + i * stride`.
    ///
    /// # Safety
    /// Each of the tile's rows must be writable there, and tiles configured.
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize);

    /// `c[m][n] += sum over k and i of a[m][4k+i] * b[k][4n+i]` in i32, where `a` is signed and `b`
    /// unsigned.
    ///
    /// # Safety
    /// Tiles must be configured so that `a` has `c`'s rows, `b` has `c`'s bytes a row, and `a` four
    /// bytes for each row of `b`.
    unsafe fn dot_int8<const C: u8, const A: u8, const B: u8>(&mut self);

    /// `c[m][n] += even + odd`, where `even` is the sum of `a[m][2k] * b[k][2n]` over k in order by fused
    /// multiply-add from zero, and `odd` that of `a[m][2k+1] * b[k][2n+1]`. Each step is rounded to
    /// nearest even; subnormal numbers are zeros, given or computed.
    ///
    /// # Safety
    /// As [`Tiles::dot_int8`].
    unsafe fn dot_bf16<const C: u8, const A: u8, const B: u8>(&mut self);

    /// Gives the registers back, so that the system need not save them.
    fn release(&mut self);
}

/// Proof of AMX with int8 and bf16, of the system's permission to use it, and of everything that
/// [`super::avx512`] uses with BF16.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Amx(Avx512<true>);

impl Amx {
    pub(crate) fn detect() -> Option<Amx> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        let vectors = Avx512::<true>::detect()?;
        USABLE
            .get_or_init(|| processor_has_amx() && system_permits())
            .then_some(Amx(vectors))
    }

    #[inline]
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        self.0.enter(kernel)
    }

    /// The tile registers of this thread.
    pub(crate) fn tiles(self) -> Registers {
        Registers(self)
    }
}

/// CPUID leaf 7 names the instructions, XCR0 what the system saves for a thread.
fn processor_has_amx() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    const TILE_STATE: u32 = 0b11 << 17;
    let features = __cpuid_count(7, 0).edx;
    if features & (BF16 | TILE | INT8) != BF16 | TILE | INT8 {
        return false;
    }
    let saved: u32;
    // SAFETY: AVX was detected before, so the system has enabled XGETBV; it reads a register.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") saved, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    saved & TILE_STATE == TILE_STATE
}

/// Linux gives the state of tiles, 8 KiB a thread, only to processes that ask.
fn system_permits() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but the permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

/// The processor's tile registers, for the thread that made it.
pub(crate) struct Registers(#[allow(dead_code, reason = "it proves that there are registers")] Amx);

// SAFETY: memory is touched by the instructions that the methods name, at the addresses they are given.
unsafe impl Tiles for Registers {
    #[inline(always)]
    fn configure(&mut self, config: &Config) {
        // SAFETY: AMX by `self`; 64 bytes are read, in a form that `Config` keeps valid.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) config, options(readonly, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: AMX by `self`; the caller answers for the memory.
        unsafe {
            asm!("tileloadd tmm{tile}, [{from} + {stride}]", tile = const TILE, from = in(reg) from,
                stride = in(reg) stride, options(readonly, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        // SAFETY: AMX by `self`; the caller answers for the memory.
        unsafe {
            asm!("tilestored [{to} + {stride}], tmm{tile}", tile = const TILE, to = in(reg) to,
                stride = in(reg) stride, options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn dot_int8<const C: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: AMX by `self`; only tiles are touched.
        unsafe {
            asm!("tdpbsud tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nomem, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn dot_bf16<const C: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: AMX by `self`; only tiles are touched.
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nomem, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn release(&mut self) {
        // SAFETY: AMX by `self`.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a function's code has these bytes before it returns.
    fn assembled(function: *const (), bytes: &[u8]) -> bool {
        // SAFETY: code is readable, and functions of a test program are followed by others.
        let code = unsafe { std::slice::from_raw_parts(function.cast::<u8>(), 96) };
        code.windows(bytes.len()).any(|found| found == bytes)
    }

    // Never called: a processor without AMX would refuse them.
    #[inline(never)]
    fn configure(r: &mut Registers, config: &Config) {
        r.configure(config);
    }
    #[inline(never)]
    fn load(r: &mut Registers, from: *const u8, stride: usize) {
        // SAFETY: not called.
        unsafe { r.load::<5>(from, stride) };
    }
    #[inline(never)]
    fn store(r: &mut Registers, to: *mut u8, stride: usize) {
        // SAFETY: not called.
        unsafe { r.store::<1>(to, stride) };
    }
    #[inline(never)]
    fn dot_int8(r: &mut Registers) {
        // SAFETY: not called.
        unsafe { r.dot_int8::<2, 5, 6>() };
    }
    #[inline(never)]
    fn dot_bf16(r: &mut Registers) {
        // SAFETY: not called.
        unsafe { r.dot_bf16::<3, 5, 7>() };
    }
    #[inline(never)]
    fn release(r: &mut Registers) {
        r.release();
    }

    #[test]
    fn instructions_are_assembled_as_the_manual_encodes_them() {
        // VEX with three bytes: C4, then E2 for map 0F38 and low registers, then W, the inverted second
        // source, L and the prefix (F2 = 3, F3 = 2, none = 0); opcode; ModRM with destination and first source.
        let vvvv = |tile: u8, prefix: u8| (!tile & 0xF) << 3 | prefix;
        let modrm = |destination: u8, source: u8| 0xC0 | destination << 3 | source;
        assert!(assembled(
            dot_int8 as *const (),
            &[0xC4, 0xE2, vvvv(6, 2), 0x5E, modrm(2, 5)]
        ));
        assert!(assembled(
            dot_bf16 as *const (),
            &[0xC4, 0xE2, vvvv(7, 2), 0x5C, modrm(3, 5)]
        ));
        // With a base and an index: a SIB byte follows ModRM.
        assert!(assembled(
            load as *const (),
            &[0xC4, 0xE2, vvvv(0, 3), 0x4B, 5 << 3 | 0b100]
        ));
        assert!(assembled(
            store as *const (),
            &[0xC4, 0xE2, vvvv(0, 2), 0x4B, 1 << 3 | 0b100]
        ));
        assert!(assembled(
            configure as *const (),
            &[0xC4, 0xE2, vvvv(0, 0), 0x49]
        ));
        assert!(assembled(
            release as *const (),
            &[0xC4, 0xE2, vvvv(0, 0), 0x49, 0xC0]
        ));
        assert!(!assembled(
            dot_int8 as *const (),
            &[0xC4, 0xE2, vvvv(6, 3), 0x5E, modrm(2, 5)]
        ));
    }

    #[test]
    fn a_configuration_has_the_manuals_bytes() {
        let config = Config::new([
            (1, 64),
            (2, 60),
            (3, 4),
            (16, 64),
            (0, 0),
            (5, 8),
            (6, 12),
            (7, 16),
        ]);
        assert_eq!((size_of::<Config>(), align_of::<Config>()), (64, 64));
        // SAFETY: 64 initialised bytes without padding.
        let bytes: [u8; 64] = unsafe { std::mem::transmute(config) };
        assert_eq!(bytes[0], 1, "the palette");
        assert!(bytes[1..16].iter().all(|b| *b == 0));
        let sizes: Vec<u16> = (16..32)
            .step_by(2)
            .map(|i| u16::from_le_bytes([bytes[i], bytes[i + 1]]))
            .collect();
        assert_eq!(sizes, [64, 60, 4, 64, 0, 8, 12, 16]);
        assert!(bytes[32..48].iter().all(|b| *b == 0));
        assert_eq!(bytes[48..56], [1, 2, 3, 16, 0, 5, 6, 7]);
        assert!(bytes[56..].iter().all(|b| *b == 0));
        assert_eq!(config.tile(1), (2, 60));
    }

    #[test]
    #[should_panic(expected = "a tile has no 17 rows")]
    fn tiles_larger_than_registers_are_refused() {
        Config::new([(17, 64); 8]);
    }
}
