//! Which vector instructions this machine has, proved once; the only place where a kernel is bound
//! to them.
//!
//! Detection happens at run time through the standard library. There is no build-time switch.

use std::fmt;

#[cfg(target_arch = "aarch64")]
use crate::isa::neon::Neon;
use crate::isa::{Scalar, Simd};
#[cfg(target_arch = "x86_64")]
use crate::isa::{amx, amx::Amx, avx2::Avx2, avx512::Avx512};

/// An instruction set that this machine has: a value exists only if detection succeeded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512<true>),
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    #[cfg(all(test, target_arch = "x86_64"))]
    Interpreted(Scalar),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Isa {
    /// The portable twin, available everywhere.
    pub const SCALAR: Isa = Isa(Level::Scalar(Scalar::new()));

    /// The portable twin with [tile registers](amx::interpreter) that are interpreted.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub(crate) const INTERPRETED: Isa = Isa(Level::Interpreted(Scalar::new()));

    /// The best instruction set of this machine.
    pub fn detect() -> Isa {
        Isa::available().last().unwrap_or(Isa::SCALAR)
    }

    /// Every instruction set of this machine, the slowest first.
    pub fn available() -> impl DoubleEndedIterator<Item = Isa> {
        let mut found = [Some(Isa::SCALAR), None, None, None, None];
        #[cfg(target_arch = "x86_64")]
        {
            found[1] = Avx2::detect().map(|token| Isa(Level::Avx2(token)));
            found[2] = Avx512::<false>::detect().map(|token| Isa(Level::Avx512(token)));
            found[3] = Avx512::<true>::detect().map(|token| Isa(Level::Avx512Bf16(token)));
            found[4] = Amx::detect().map(|token| Isa(Level::Amx(token)));
        }
        #[cfg(target_arch = "aarch64")]
        {
            found[1] = Neon::detect().map(|token| Isa(Level::Neon(token)));
        }
        found.into_iter().flatten()
    }

    /// The instruction set of this [`name`](Isa::name), if this machine has it.
    pub fn named(name: &str) -> Option<Isa> {
        Isa::available().find(|isa| isa.name() == name)
    }

    /// `"scalar"`; `"avx2"`, `"avx512-vnni"`, `"avx512-bf16"` or `"amx"`, of which the last two include the one
    /// before; `"neon-dotprod"`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar(_) => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16(_) => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Level::Amx(_) => "amx",
            #[cfg(all(test, target_arch = "x86_64"))]
            Level::Interpreted(_) => "interpreted",
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => "neon-dotprod",
        }
    }

    /// Whether there are registers for large blocks: see [`Simd::WIDE`].
    pub(crate) fn wide(self) -> bool {
        struct Wide;

        impl Kernel for Wide {
            type Output = bool;

            #[inline(always)]
            fn run<V: Simd>(self, _: V) -> bool {
                V::WIDE
            }
        }
        self.dispatch(Wide)
    }

    /// Runs a kernel with this instruction set: the one dispatch point of the crate.
    #[inline]
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Scalar(token) => kernel.run(token),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Level::Amx(token) => token.enter(kernel),
            #[cfg(all(test, target_arch = "x86_64"))]
            Level::Interpreted(token) => kernel.run(token),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(token) => token.enter(kernel),
        }
    }

    /// Whether there are tile registers.
    pub(crate) fn has_tiles(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx(_) => true,
            #[cfg(all(test, target_arch = "x86_64"))]
            Level::Interpreted(_) => true,
            _ => false,
        }
    }

    /// Runs a kernel with tile registers beside this instruction set.
    ///
    /// # Panics
    /// If there are none.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn dispatch_tiles<K: TileKernel>(self, kernel: K) {
        struct Beside<K>(K, Amx);

        impl<K: TileKernel> Kernel for Beside<K> {
            type Output = ();

            const BF16: bool = true;

            #[inline(always)]
            fn run<V: Simd>(self, v: V) {
                self.0.run(v, &mut self.1.tiles());
            }
        }
        match self.0 {
            Level::Amx(token) => token.enter(Beside(kernel, token)),
            #[cfg(test)]
            Level::Interpreted(token) => {
                kernel.run(token, &mut amx::interpreter::Interpreter::new());
            }
            _ => unreachable!("rows are laid out for tiles only where there are tiles"),
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An algorithm over sixteen lanes, instantiated once per instruction set. `run` must be
/// `#[inline(always)]`: it is compiled with the instruction set's features only as part of the
/// function that [`Isa::dispatch`] enters.
pub(crate) trait Kernel {
    type Output;

    /// Whether it multiplies pairs of bf16. One that does not is compiled for AVX-512 only once, with or
    /// without BF16.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "bf16 has instructions of its own on x86-64 alone")
    )]
    const BF16: bool = false;

    fn run<V: Simd>(self, v: V) -> Self::Output;
}

/// An algorithm that also uses tile registers; `run` must be `#[inline(always)]` as
/// [`Kernel::run`].
#[cfg(target_arch = "x86_64")]
pub(crate) trait TileKernel {
    fn run<V: Simd, T: amx::Tiles>(self, v: V, tiles: &mut T);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_scalar_is_always_there() {
        let all: Vec<Isa> = Isa::available().collect();
        assert_eq!(all[0], Isa::SCALAR);
        assert_eq!(*all.last().unwrap(), Isa::detect());
        for isa in all {
            assert_eq!(Isa::named(isa.name()), Some(isa));
        }
        assert_eq!(Isa::named("AVX2"), None);
        assert_eq!(Isa::named("neon"), None);
    }

    /// Where tests run in an emulator, whoever started it says which instruction set its processor has.
    #[test]
    fn the_instruction_set_of_an_emulated_processor_is_found() {
        if let Ok(expected) = std::env::var("CASEMATE_EMULATED") {
            assert_eq!(Isa::detect().name(), expected);
        }
    }
}
