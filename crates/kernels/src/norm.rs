//! Root-mean-square normalisation.

use crate::cpu::{Isa, Kernel};
use crate::elementwise::sum_of_products;
use crate::isa::{LANES, Simd, load_part, store_part};

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row (`weight.len()` long).
///
/// # Panics
/// If `x` is not a whole number of rows or `out` has another length.
pub fn rmsnorm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(
        !weight.is_empty() && x.len().is_multiple_of(weight.len()),
        "{} by rows of {}",
        x.len(),
        weight.len()
    );
    assert_eq!(x.len(), out.len(), "input and output have one length");
    for (x, out) in x
        .chunks_exact(weight.len())
        .zip(out.chunks_exact_mut(weight.len()))
    {
        isa.dispatch(Row {
            x,
            weight,
            eps,
            out,
        });
    }
}

struct Row<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        let mean = sum_of_products(v, self.x, self.x) / self.x.len() as f32;
        let factor = v.splat(1.0 / (mean + self.eps).sqrt());
        let (x, x_rest) = self.x.as_chunks::<LANES>();
        let (w, w_rest) = self.weight.as_chunks::<LANES>();
        let (out, out_rest) = self.out.as_chunks_mut::<LANES>();
        for ((x, w), out) in x.iter().zip(w).zip(out) {
            v.store(v.mul(v.mul(v.load(x), factor), v.load(w)), out);
        }
        if !x_rest.is_empty() {
            store_part(
                v,
                v.mul(v.mul(load_part(v, x_rest), factor), load_part(v, w_rest)),
                out_rest,
            );
        }
    }
}
