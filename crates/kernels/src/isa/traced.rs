//! The scalar operations, with a list of the addresses that are loaded from and stored to: for tests of what shows in the
//! order of accesses.

use std::cell::RefCell;

use half::f16;

use super::{LANES, Scalar, Simd};

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) address: usize,
    pub(crate) store: bool,
}

thread_local! {
    static ACCESSES: RefCell<Vec<Access>> = const { RefCell::new(Vec::new()) };
}

/// What was accessed since this was asked last.
pub(crate) fn accesses() -> Vec<Access> {
    ACCESSES.with(RefCell::take)
}

fn note<T>(at: *const T, store: bool) {
    let address = at.addr();
    ACCESSES.with(|all| all.borrow_mut().push(Access { address, store }));
}

/// See the module.
#[derive(Clone, Copy)]
pub(crate) struct Traced(pub(crate) Scalar);

macro_rules! as_scalar {
    ($(fn $name:ident($($x:ident: $t:ty),*) $(-> $out:ty)?;)*) => {
        $(#[inline(always)]
        fn $name(self, $($x: $t),*) $(-> $out)? {
            self.0.$name($($x),*)
        })*
    };
}

macro_rules! loads {
    ($(fn $name:ident($x:ident: $t:ty) -> $out:ty;)*) => {
        $(#[inline(always)]
        fn $name(self, $x: $t) -> $out {
            note($x.as_ptr(), false);
            self.0.$name($x)
        })*
    };
}

type F = <Scalar as Simd>::F;
type I = <Scalar as Simd>::I;
type W = <Scalar as Simd>::W;
type P = <Scalar as Simd>::P;
type U = <Scalar as Simd>::U;
type B = <Scalar as Simd>::B;

// SAFETY: uses no instruction set.
unsafe impl Simd for Traced {
    type F = F;
    type I = I;
    type W = W;
    type P = P;
    type U = U;
    type B = B;

    const WIDE: bool = Scalar::WIDE;

    loads! {
        fn load(x: &[f32; LANES]) -> F;
        fn load_f16(x: &[f16; LANES]) -> F;
        fn load_u8(x: &[u8; LANES]) -> F;
        fn load_i(x: &[i32; LANES]) -> I;
        fn load_bytes(x: &[u8; 64]) -> I;
        fn weights(x: &[u8; 64]) -> W;
        fn nibbles(x: &[u8; 64]) -> [U; 2];
        fn pairs(x: &[i8; 2 * LANES]) -> P;
        fn bf16_pairs(x: &[u8; 64]) -> B;
    }

    fn store(self, x: F, to: &mut [f32; LANES]) {
        note(to.as_ptr(), true);
        self.0.store(x, to);
    }

    fn store_i(self, x: I, to: &mut [i32; LANES]) {
        note(to.as_ptr(), true);
        self.0.store_i(x, to);
    }

    as_scalar! {
        fn prefetch(line: *const u8);
        fn prefetch_l2(line: *const u8);
        fn splat(x: f32) -> F;
        fn add(a: F, b: F) -> F;
        fn sub(a: F, b: F) -> F;
        fn mul(a: F, b: F) -> F;
        fn div(a: F, b: F) -> F;
        fn fma(a: F, b: F, c: F) -> F;
        fn max(a: F, b: F) -> F;
        fn min(a: F, b: F) -> F;
        fn zero_below(x: F, limit: f32, y: F) -> F;
        fn sum(x: F) -> f32;
        fn largest(x: F) -> f32;
        fn swap1(x: F) -> F;
        fn swap2(x: F) -> F;
        fn swap4(x: F) -> F;
        fn swap8(x: F) -> F;
        fn splat_i(x: i32) -> I;
        fn narrow(x: I) -> [i32; 4];
        fn add_i(a: I, b: I) -> I;
        fn max_i(a: I, b: I) -> I;
        fn and_i(a: I, b: I) -> I;
        fn shift_to_exponent(x: I) -> I;
        fn round(x: F) -> I;
        fn widen(x: I) -> F;
        fn bits(x: F) -> I;
        fn float_from_bits(x: I) -> F;
        fn dot_start(offset: i32) -> I;
        fn dot4(sum: I, w: W, a: i32) -> I;
        fn dot4_small(sum: I, w: U, a: i32) -> I;
        fn dot2(sum: I, x: P, a: i32) -> I;
        fn dot_bf16(sum: F, w: B, x: i32) -> F;
    }
}
