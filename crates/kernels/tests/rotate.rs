//! Rotations against the matrix that `rotate` documents, and against themselves.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::rotate::Rotation;
use proptest::prelude::*;
use support::{Random, assert_same_bits};

/// The documented matrix times a row, in f64, entry by entry.
fn by_matrix(row: &[f32]) -> Vec<f64> {
    let width = row.len();
    let block = 1 << width.trailing_zeros();
    let mut random = Random(width as u64);
    let words: Vec<u64> = (0..width.div_ceil(64)).map(|_| random.next()).collect();
    (0..width)
        .map(|i| {
            let first = i / block * block;
            let term = |k: usize| {
                let sign = |odd: bool| if odd { -1.0 } else { 1.0 };
                let hadamard = sign(((i - first) & (k - first)).count_ones() % 2 == 1);
                let drawn = sign(words[k / 64] >> (k % 64) & 1 == 1);
                hadamard * drawn * f64::from(row[k])
            };
            (first..first + block).map(term).sum::<f64>() / (block as f64).sqrt()
        })
        .collect()
}

const WIDTHS: [usize; 17] = [
    1, 2, 3, 4, 8, 12, 16, 24, 31, 32, 36, 48, 64, 128, 320, 576, 1536,
];

#[test]
fn rows_are_multiplied_with_the_documented_matrix() {
    let mut random = Random(1);
    for width in WIDTHS {
        let row = random.vector(width);
        let expected = by_matrix(&row);
        for isa in Isa::available() {
            let mut rotated = row.clone();
            Rotation::new(width).apply(isa, &mut rotated);
            for (found, expected) in rotated.iter().zip(&expected) {
                assert!(
                    (f64::from(*found) - expected).abs() < 2e-6 * (width as f64).sqrt(),
                    "{isa} {width}: {found} for {expected}"
                );
            }
        }
    }
}

#[test]
fn every_stage_group_is_reached() {
    // 2^4 to 2^14: groups of three stages leave none, one or two over.
    let mut random = Random(2);
    for log in 4..=14 {
        let row = random.vector(1 << log);
        let mut plain = row.clone();
        let mut stride = 1;
        let rotation = Rotation::new(row.len());
        let drawn = signs(row.len());
        let norm = (1.0 / (row.len() as f64).sqrt()) as f32;
        for (x, sign) in plain.iter_mut().zip(&drawn) {
            *x *= sign * norm;
        }
        while stride < row.len() {
            for i in 0..row.len() {
                if i & stride == 0 {
                    let (a, b) = (plain[i], plain[i + stride]);
                    (plain[i], plain[i + stride]) = (a + b, a - b);
                }
            }
            stride *= 2;
        }
        for isa in Isa::available() {
            let mut rotated = row.clone();
            rotation.apply(isa, &mut rotated);
            assert_same_bits(&rotated, &plain, &format!("{isa} 2^{log}"));
        }
    }
}

fn signs(width: usize) -> Vec<f32> {
    let mut random = Random(width as u64);
    let words: Vec<u64> = (0..width.div_ceil(64)).map(|_| random.next()).collect();
    let sign = |k: usize| {
        if words[k / 64] >> (k % 64) & 1 == 1 {
            -1.0
        } else {
            1.0
        }
    };
    (0..width).map(sign).collect()
}

#[test]
fn an_outlier_is_spread_over_its_block() {
    let mut row = vec![0.0; 576];
    row[70] = 8.0;
    Rotation::new(576).apply(Isa::detect(), &mut row);
    assert!(row[64..128].iter().all(|x| x.abs() == 1.0));
    assert!(row[..64].iter().chain(&row[128..]).all(|x| *x == 0.0));
}

#[test]
#[should_panic(expected = "another width")]
fn a_row_of_another_width_panics() {
    Rotation::new(64).apply(Isa::SCALAR, &mut [0.0; 32]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn inverting_gives_the_row_back(width in 1usize..700, seed: u64) {
        let row = Random(seed).vector(width);
        let rotation = Rotation::new(width);
        for isa in Isa::available() {
            let mut there = vec![0.0; width];
            rotation.apply_to(isa, &row, &mut there);
            let length = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            prop_assert!((length(&there) - length(&row)).abs() < 1e-4 * length(&row));
            rotation.invert(isa, &mut there);
            for (found, expected) in there.iter().zip(&row) {
                prop_assert!((found - expected).abs() < 1e-5, "{} {}: {} for {}", isa, width, found, expected);
            }
        }
    }

    #[test]
    fn all_instruction_sets_give_the_same_bits(width in 1usize..700, seed: u64) {
        let row = Random(seed).vector(width);
        let rotation = Rotation::new(width);
        let mut expected = row.clone();
        rotation.apply(Isa::SCALAR, &mut expected);
        let mut back = expected.clone();
        rotation.invert(Isa::SCALAR, &mut back);
        for isa in Isa::available() {
            let mut found = row.clone();
            rotation.apply(isa, &mut found);
            assert_same_bits(&found, &expected, &format!("{isa} {width}"));
            let mut copied = vec![f32::NAN; width];
            rotation.apply_to(isa, &row, &mut copied);
            assert_same_bits(&copied, &expected, &format!("{isa} {width}, copied"));
            rotation.invert(isa, &mut found);
            assert_same_bits(&found, &back, &format!("{isa} {width}, inverted"));
        }
    }
}
