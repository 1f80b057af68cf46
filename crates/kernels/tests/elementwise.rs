//! Norm, softmax, gated activation, rotation and sums against f64, with the same bits from every
//! instruction set.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::elementwise::{add, add_bias, argmax, axpy, dot, silu_mul};
use casemate_kernels::norm::rmsnorm;
use casemate_kernels::rope::{RopeLayout, RopeTable};
use casemate_kernels::softmax::softmax;
use support::{Random, assert_same_bits};

const LENGTHS: [usize; 16] = [
    0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 127, 172, 576,
];

/// Runs `f` with every instruction set, expects one result and returns it.
#[track_caller]
fn everywhere(f: impl Fn(Isa) -> Vec<f32>) -> Vec<f32> {
    let expected = f(Isa::SCALAR);
    for isa in Isa::available() {
        assert_same_bits(&f(isa), &expected, isa.name());
    }
    expected
}

#[track_caller]
fn assert_close(found: f32, exact: f64, bound: f64) {
    assert!(
        (f64::from(found) - exact).abs() <= bound,
        "{found} instead of {exact}"
    );
}

#[test]
fn rmsnorm_agrees_with_f64() {
    let mut random = Random(31);
    for n in LENGTHS.into_iter().filter(|n| *n > 0) {
        let (x, weight) = (random.vector(3 * n), random.vector(n));
        let out = everywhere(|isa| {
            let mut out = vec![f32::NAN; 3 * n];
            rmsnorm(isa, &x, &weight, 1e-5, &mut out);
            out
        });
        for (row, out) in x.chunks(n).zip(out.chunks(n)) {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
            for ((x, w), out) in row.iter().zip(&weight).zip(out) {
                let exact = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert_close(*out, exact, exact.abs() * 1e-6);
            }
        }
    }
}

#[test]
fn softmax_agrees_with_f64_and_sums_to_one() {
    let mut random = Random(32);
    for n in LENGTHS {
        for spread in [1.0, 30.0, 200.0] {
            let x: Vec<f32> = random.vector(n).iter().map(|x| x * spread).collect();
            let out = everywhere(|isa| {
                let mut out = x.clone();
                softmax(isa, &mut out);
                out
            });
            let largest = x.iter().copied().fold(f32::MIN, f32::max);
            let weights: Vec<f64> = x
                .iter()
                .map(|x| (f64::from(*x) - f64::from(largest)).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            for (out, w) in out.iter().zip(&weights) {
                // The subtraction of the largest is rounded: 2^-24 of up to 400.
                assert_close(*out, w / total, w / total * 3e-5 + 1e-38);
            }
        }
    }
}

#[test]
fn softmax_handles_infinities_and_nan() {
    for isa in Isa::available() {
        for n in [3, 16, 20] {
            let mut x = vec![f32::NEG_INFINITY; n];
            x[n - 1] = -5.0;
            softmax(isa, &mut x);
            assert_eq!(x[n - 1], 1.0);
            assert!(x[..n - 1].iter().all(|x| *x == 0.0));
            for bad in [f32::NAN, f32::INFINITY] {
                for at in [0, n - 1] {
                    let mut x = vec![1.0; n];
                    x[at] = bad;
                    softmax(isa, &mut x);
                    assert!(x.iter().all(|x| x.is_nan()), "{isa} {bad} at {at} of {n}");
                }
            }
        }
    }
}

#[test]
fn exponential_is_within_two_units_everywhere() {
    // silu(x) with x = -t is -t / (1 + e^t); for large t this is -t e^-t to many digits, so it
    // shows e^t.
    let t: Vec<f32> = (0..20_000).map(|i| i as f32 * 0.0043 + 1e-3).collect();
    let out = everywhere(|isa| {
        let mut gate: Vec<f32> = t.iter().map(|t| -t).collect();
        silu_mul(isa, &mut gate, &vec![1.0; t.len()]);
        gate
    });
    for (t, out) in t.iter().zip(&out) {
        let exact = -f64::from(*t) / (1.0 + f64::from(*t).exp());
        assert!(
            (f64::from(*out) / exact - 1.0).abs() < 4e-7,
            "at {t}: {out} instead of {exact}"
        );
    }
}

#[test]
fn silu_mul_agrees_with_f64_also_far_out() {
    let mut random = Random(33);
    for n in LENGTHS {
        let gate: Vec<f32> = random.vector(n).iter().map(|x| x * 120.0).collect();
        let up = random.vector(n);
        let out = everywhere(|isa| {
            let mut out = gate.clone();
            silu_mul(isa, &mut out, &up);
            out
        });
        for ((g, u), out) in gate.iter().zip(&up).zip(out) {
            let exact = f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u);
            assert_close(out, exact, exact.abs() * 1e-6 + 1e-36);
        }
    }
    let mut nan = [f32::NAN; 5];
    silu_mul(Isa::detect(), &mut nan, &[1.0; 5]);
    assert!(nan.iter().all(|x| x.is_nan()));
}

#[test]
fn sums_agree_with_f64() {
    let mut random = Random(34);
    for n in LENGTHS {
        let (a, b, c) = (random.vector(n), random.vector(n), random.unit());
        let found = everywhere(|isa| vec![dot(isa, &a, &b)])[0];
        let exact: f64 = a
            .iter()
            .zip(&b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum();
        assert_close(found, exact, 1e-6 * (n as f64 + 1.0));
        let sum = everywhere(|isa| {
            let mut y = b.clone();
            add(isa, &a, &mut y);
            y
        });
        let scaled = everywhere(|isa| {
            let mut y = b.clone();
            axpy(isa, c, &a, &mut y);
            y
        });
        for i in 0..n {
            assert_eq!(sum[i], b[i] + a[i]);
            assert_eq!(scaled[i], c.mul_add(a[i], b[i]));
        }
    }
}

#[test]
fn bias_is_added_to_every_row() {
    let mut y = vec![1.0; 3 * 20];
    let bias: Vec<f32> = (0..20).map(|i| i as f32).collect();
    add_bias(Isa::detect(), &bias, &mut y);
    assert!(
        y.iter()
            .enumerate()
            .all(|(i, y)| *y == 1.0 + (i % 20) as f32)
    );
}

#[test]
fn argmax_takes_the_first_largest_and_never_nan() {
    assert_eq!(argmax(&[]), None);
    assert_eq!(argmax(&[f32::NAN]), None);
    assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
    assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, f32::NAN, 3.0, 2.0]), Some(2));
}

#[test]
fn rotation_agrees_with_f64_in_both_layouts() {
    let mut random = Random(35);
    for (head_dim, rotated) in [(8, 8), (64, 64), (80, 32), (6, 6)] {
        let half = rotated / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 10000f32.powf(-(i as f32) / half as f32))
            .collect();
        let table = RopeTable::new(&frequencies, 900);
        assert_eq!(table.positions(), 900);
        let x = random.vector(3 * head_dim);
        for (layout, position) in [
            (RopeLayout::Interleaved, 0),
            (RopeLayout::Interleaved, 899),
            (RopeLayout::Half, 77),
        ] {
            let mut out = x.clone();
            table.apply(layout, position, head_dim, &mut out);
            for (x, out) in x.chunks(head_dim).zip(out.chunks(head_dim)) {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (a, b) = match layout {
                        RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                        RopeLayout::Half => (i, i + half),
                    };
                    let angle = f64::from(position as f32 * frequency);
                    let (xa, xb) = (f64::from(x[a]), f64::from(x[b]));
                    assert_close(out[a], xa * angle.cos() - xb * angle.sin(), 3e-7);
                    assert_close(out[b], xb * angle.cos() + xa * angle.sin(), 3e-7);
                }
                assert_eq!(x[rotated..], out[rotated..]);
            }
        }
    }
}

#[test]
#[should_panic(expected = "both slices have one length")]
fn lengths_are_checked() {
    add(Isa::detect(), &[1.0; 17], &mut [1.0; 33]);
}

#[test]
#[should_panic(expected = "head")]
fn rotating_more_than_a_head_panics() {
    RopeTable::new(&[1.0; 5], 1).apply(RopeLayout::Half, 0, 8, &mut [0.0; 8]);
}
