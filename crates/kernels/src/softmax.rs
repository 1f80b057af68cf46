//! Softmax over a slice.

use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd, exp, load_part, store_part};

/// `out[i] = e^((x[i] - largest) / divisor)`, by the same exponential: 1 where x\[i\] is the largest.
///
/// # Panics
/// If the lengths differ.
pub fn exp_differences(isa: Isa, x: &[f32], largest: f32, divisor: f32, out: &mut [f32]) {
    struct Differences<'a>(&'a [f32], f32, f32, &'a mut [f32]);

    impl Kernel for Differences<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Simd>(self, v: V) {
            let (largest, divisor) = (v.splat(self.1), v.splat(self.2));
            let (x, x_rest) = self.0.as_chunks::<LANES>();
            let (out, out_rest) = self.3.as_chunks_mut::<LANES>();
            for (x, out) in x.iter().zip(out) {
                let difference = v.sub(v.load(x), largest);
                v.store(exp(v, v.div(difference, divisor)), out);
            }
            if !x_rest.is_empty() {
                let difference = v.sub(load_part(v, x_rest), largest);
                store_part(v, exp(v, v.div(difference, divisor)), out_rest);
            }
        }
    }
    assert_eq!(x.len(), out.len(), "both slices have one length");
    isa.dispatch(Differences(x, largest, divisor, out));
}

/// `x[i] = e^(x[i] - max) / sum`. The sum is taken lane by lane (elements j, j + 16, ...), then by
/// halving. An empty slice stays empty; any NaN makes every result NaN, and so does +inf.
pub fn softmax(isa: Isa, x: &mut [f32]) {
    struct Softmax<'a>(&'a mut [f32]);

    impl Kernel for Softmax<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Simd>(self, v: V) {
            let (blocks, rest) = self.0.as_chunks_mut::<LANES>();
            let mut lanes = v.splat(f32::NEG_INFINITY);
            for x in blocks.iter() {
                lanes = v.max(lanes, v.load(x));
            }
            let largest = rest.iter().fold(
                v.largest(lanes),
                |best, x| if best > *x { best } else { *x },
            );
            let mut total = v.splat(0.0);
            for x in blocks.iter_mut() {
                let e = exp(v, v.sub(v.load(x), v.splat(largest)));
                total = v.add(total, e);
                v.store(e, x);
            }
            let mut lanes = [f32::NEG_INFINITY; LANES];
            lanes[..rest.len()].copy_from_slice(rest);
            let e = exp(v, v.sub(v.load(&lanes), v.splat(largest)));
            let factor = v.splat(1.0 / v.sum(v.add(total, e)));
            store_part(v, v.mul(e, factor), rest);
            for x in blocks.iter_mut() {
                v.store(v.mul(v.load(x), factor), x);
            }
        }
    }
    isa.dispatch(Softmax(x));
}
