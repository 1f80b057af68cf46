//! The arithmetic, written once for both primes. p = 2^BITS - C.

/// A prime of the form 2^BITS - C.
pub(crate) trait Prime {
    const BITS: u32;
    const C: u64;
    const P: u32 = ((1u64 << Self::BITS) - Self::C) as u32;

    /// The smaller of x and x - p, where a difference below zero wraps to more than x: x mod p for
    /// x < 2p. An instruction, not a branch.
    #[inline(always)]
    fn once(x: u32) -> u32 {
        x.min(x.wrapping_sub(Self::P))
    }

    #[inline(always)]
    fn add(a: u32, b: u32) -> u32 {
        // Both are below p < 2^31.
        Self::once(a.wrapping_add(b))
    }

    #[inline(always)]
    fn sub(a: u32, b: u32) -> u32 {
        // If a < b the difference wraps to more than p, and adding p wraps it back.
        let difference = a.wrapping_sub(b);
        difference.min(difference.wrapping_add(Self::P))
    }

    /// Of a number above -p and below p.
    #[inline(always)]
    fn from_small(x: i32) -> u32 {
        let x = x as u32;
        x.min(x.wrapping_add(Self::P))
    }

    /// A smaller number that is the same modulo p, since 2^BITS is C: of any number one below 2^37, of
    /// one below 2^37 one below 2^BITS + 2^10.
    #[inline(always)]
    fn fold(x: u64) -> u64 {
        (x & ((1 << Self::BITS) - 1)) + Self::C * (x >> Self::BITS)
    }

    #[inline(always)]
    fn reduce(x: u64) -> u32 {
        Self::once(Self::fold(Self::fold(x)) as u32)
    }

    #[inline(always)]
    fn from_integer(x: i64) -> u32 {
        // Of the two's complement x + 2^64 for a negative x, 2^64 is too much.
        let wrap = Self::reduce(u64::MAX) + 1;
        let negative = (x >> 63) as u32;
        Self::sub(Self::reduce(x as u64), negative & wrap)
    }

    #[inline(always)]
    fn centre(x: u32) -> i32 {
        let above = u32::from(x > Self::P / 2).wrapping_neg();
        x.wrapping_sub(above & Self::P) as i32
    }
}

/// 2^29 - 3.
pub(crate) struct P29;
/// 2^31 - 1.
pub(crate) struct P31;

impl Prime for P29 {
    const BITS: u32 = 29;
    const C: u64 = 3;
}

impl Prime for P31 {
    const BITS: u32 = 31;
    const C: u64 = 1;
}

/// An expression for the prime of a field, compiled for each.
macro_rules! with_prime {
    ($field:expr, $prime:ident => $body:expr) => {
        match $field {
            $crate::Field::P29 => {
                type $prime = $crate::prime::P29;
                $body
            }
            $crate::Field::P31 => {
                type $prime = $crate::prime::P31;
                $body
            }
        }
    };
}
pub(crate) use with_prime;
