//! The f32 product against a plain implementation of what `gemm` documents, and against f64.

mod support;

use casemate_kernels::gemm::{F32Matrix, gemm_f32};
use casemate_kernels::q8::PackError;
use casemate_kernels::team::Team;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, teams};

/// The documented order: fused multiply-add within blocks of 256, then the blocks are added.
fn product(x: &[f32], w: &[f32]) -> f32 {
    let mut blocks = x
        .chunks(256)
        .zip(w.chunks(256))
        .map(|(x, w)| x.iter().zip(w).fold(0f32, |s, (x, w)| x.mul_add(*w, s)));
    let first = blocks.next().unwrap();
    blocks.fold(first, |sum, block| sum + block)
}

fn pack(team: &Team, n: usize, k: usize, w: &[f32]) -> F32Matrix {
    F32Matrix::from_rows(team, n, k, |i, out| out.copy_from_slice(&w[i * k..][..k])).unwrap()
}

fn check(teams: &[Team], random: &mut Random, m: usize, n: usize, k: usize) {
    let (x, w) = (random.vector(m * k), random.vector(n * k));
    let expected: Vec<f32> = x
        .chunks(k)
        .flat_map(|x| w.chunks(k).map(move |w| product(x, w)))
        .collect();
    for (i, y) in expected.iter().enumerate() {
        let exact: f64 = x[i / n * k..][..k]
            .iter()
            .zip(&w[i % n * k..])
            .map(|(x, w)| f64::from(*x) * f64::from(*w))
            .sum();
        assert!(
            (f64::from(*y) - exact).abs() <= 1e-6 * k as f64,
            "the documented order itself: {y} for {exact}"
        );
    }
    for team in teams {
        let mut y = vec![f32::NAN; m * n];
        gemm_f32(team, &x, &pack(team, n, k, &w), &mut y);
        assert_same_bits(
            &y,
            &expected,
            &format!("{} m={m} n={n} k={k}", describe(team)),
        );
    }
}

#[test]
fn product_has_the_documented_bits_on_every_isa_thread_count_and_batch() {
    let teams = teams();
    let mut random = Random(11);
    for m in 1..=14 {
        check(&teams, &mut random, m, 33, 70);
    }
    for n in [1, 15, 16, 17, 31, 32, 63, 64, 65, 300] {
        check(&teams, &mut random, 13, n, 37);
        check(&teams, &mut random, 1, n, 37);
    }
    for k in [1, 2, 172, 255, 256, 257, 511, 512, 700] {
        check(&teams, &mut random, 25, 40, k);
        check(&teams, &mut random, 1, 40, k);
    }
}

#[test]
fn rows_come_back_as_packed() {
    let team = Team::new(2).unwrap();
    let w = Random(12).vector(67 * 45);
    let packed = pack(&team, 67, 45, &w);
    assert_eq!(
        (packed.rows(), packed.columns(), packed.bytes()),
        (67, 45, 96 * 45 * 4)
    );
    let mut out = vec![0.0; 45];
    for (i, row) in w.chunks(45).enumerate() {
        packed.row(i, &mut out);
        assert_same_bits(&out, row, "row");
    }
}

#[test]
fn no_rows_of_activations_are_no_product() {
    let team = Team::new(2).unwrap();
    gemm_f32(&team, &[], &pack(&team, 3, 4, &[1.0; 12]), &mut []);
}

#[test]
fn empty_and_oversized_matrices_are_refused() {
    let team = Team::new(1).unwrap();
    let fill = |_: usize, _: &mut [f32]| {};
    assert!(matches!(
        F32Matrix::from_rows(&team, 0, 4, fill),
        Err(PackError::Empty { .. })
    ));
    assert!(matches!(
        F32Matrix::from_rows(&team, usize::MAX, 2, fill),
        Err(PackError::TooLarge { .. })
    ));
    assert!(matches!(
        F32Matrix::from_rows(&team, 1 << 50, 64, fill),
        Err(PackError::Memory(_))
    ));
}

#[test]
#[should_panic(expected = "one row of w.rows()")]
fn a_long_output_panics() {
    let team = Team::new(1).unwrap();
    gemm_f32(
        &team,
        &[0.0; 8],
        &pack(&team, 3, 4, &[1.0; 12]),
        &mut [0.0; 7],
    );
}

#[test]
#[should_panic(expected = "number of rows")]
fn a_broken_row_panics() {
    let team = Team::new(1).unwrap();
    gemm_f32(
        &team,
        &[0.0; 7],
        &pack(&team, 3, 4, &[1.0; 12]),
        &mut [0.0; 6],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_shape_has_the_documented_bits(m in 1usize..40, n in 1usize..100, k in 1usize..300, seed: u64) {
        check(&[Team::new(2).unwrap()], &mut Random(seed), m, n, k);
    }
}
