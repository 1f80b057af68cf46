//! Sums, products and comparisons of whole slices: residuals, biases, the gated activation, dot
//! products, argmax.

use crate::cpu::{Isa, Kernel};
use crate::isa::{LANES, Simd, exp, load_part, store_part};

/// `y += x`.
///
/// # Panics
/// If the lengths differ.
pub fn add(isa: Isa, x: &[f32], y: &mut [f32]) {
    isa.dispatch(Update { x, y, f: Add });
}

/// `y += a * x`, fused.
///
/// # Panics
/// If the lengths differ.
pub fn axpy(isa: Isa, a: f32, x: &[f32], y: &mut [f32]) {
    isa.dispatch(Update {
        x,
        y,
        f: AddScaled(a),
    });
}

/// Adds `bias` to every row of `y` (`bias.len()` long).
///
/// # Panics
/// If `y` is not a whole number of rows.
pub fn add_bias(isa: Isa, bias: &[f32], y: &mut [f32]) {
    assert!(
        !bias.is_empty() && y.len().is_multiple_of(bias.len()),
        "{} by rows of {}",
        y.len(),
        bias.len()
    );
    for row in y.chunks_exact_mut(bias.len()) {
        add(isa, bias, row);
    }
}

/// `gate = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    isa.dispatch(Update {
        x: up,
        y: gate,
        f: SiluMul,
    });
}

/// Sum of `a[i] * b[i]`: lane j of four vectors takes elements j, j + 64, ... by fused
/// multiply-add; the vectors are added as (0 + 1) + (2 + 3) and the lanes by halving.
///
/// # Panics
/// If the lengths differ.
pub fn dot(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);

    impl Kernel for Dot<'_> {
        type Output = f32;

        #[inline(always)]
        fn run<V: Simd>(self, v: V) -> f32 {
            sum_of_products(v, self.0, self.1)
        }
    }
    assert_eq!(
        a.len(),
        b.len(),
        "a dot product takes two slices of one length"
    );
    isa.dispatch(Dot(a, b))
}

/// Index of the largest element, the first of several equal ones; NaN is never the largest. `None`
/// if there is no number.
pub fn argmax(x: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (i, x) in x.iter().enumerate() {
        if !x.is_nan() && best.is_none_or(|(_, largest)| *x > largest) {
            best = Some((i, *x));
        }
    }
    best.map(|(i, _)| i)
}

#[inline(always)]
pub(crate) fn sum_of_products<V: Simd>(v: V, a: &[f32], b: &[f32]) -> f32 {
    const UNROLL: usize = 4;
    let mut sums = [v.splat(0.0); UNROLL];
    let (a_blocks, a) = a.as_chunks::<{ UNROLL * LANES }>();
    let (b_blocks, b) = b.as_chunks::<{ UNROLL * LANES }>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        let (a, b) = (a.as_chunks::<LANES>().0, b.as_chunks::<LANES>().0);
        for i in 0..UNROLL {
            sums[i] = v.fma(v.load(&a[i]), v.load(&b[i]), sums[i]);
        }
    }
    // The rest starts again with the first vector.
    for ((a, b), sum) in a.chunks(LANES).zip(b.chunks(LANES)).zip(&mut sums) {
        *sum = v.fma(load_part(v, a), load_part(v, b), *sum);
    }
    v.sum(v.add(v.add(sums[0], sums[1]), v.add(sums[2], sums[3])))
}

/// `y = f(x, y)` element by element.
struct Update<'a, F> {
    x: &'a [f32],
    y: &'a mut [f32],
    f: F,
}

trait Elementwise {
    fn apply<V: Simd>(&self, v: V, x: V::F, y: V::F) -> V::F;
}

impl<F: Elementwise> Kernel for Update<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Simd>(self, v: V) {
        assert_eq!(self.x.len(), self.y.len(), "both slices have one length");
        let (x, x_rest) = self.x.as_chunks::<LANES>();
        let (y, y_rest) = self.y.as_chunks_mut::<LANES>();
        for (x, y) in x.iter().zip(y) {
            v.store(self.f.apply(v, v.load(x), v.load(y)), y);
        }
        if !x_rest.is_empty() {
            store_part(
                v,
                self.f.apply(v, load_part(v, x_rest), load_part(v, y_rest)),
                y_rest,
            );
        }
    }
}

struct Add;

impl Elementwise for Add {
    #[inline(always)]
    fn apply<V: Simd>(&self, v: V, x: V::F, y: V::F) -> V::F {
        v.add(y, x)
    }
}

struct AddScaled(f32);

impl Elementwise for AddScaled {
    #[inline(always)]
    fn apply<V: Simd>(&self, v: V, x: V::F, y: V::F) -> V::F {
        v.fma(v.splat(self.0), x, y)
    }
}

struct SiluMul;

impl Elementwise for SiluMul {
    #[inline(always)]
    fn apply<V: Simd>(&self, v: V, up: V::F, gate: V::F) -> V::F {
        let denominator = v.add(v.splat(1.0), exp(v, v.sub(v.splat(0.0), gate)));
        v.mul(v.div(gate, denominator), up)
    }
}
