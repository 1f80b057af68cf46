//! Int8 packing, quantisation and product against a plain implementation of what `q8` documents.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::q8::{PackError, Q8Matrix, Q8Rows, matmul_q8};
use casemate_kernels::team::Team;
use half::f16;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, teams};

const GROUP: usize = 32;

/// A row of Q8_0 blocks with their numbers.
struct Blocks {
    bytes: Vec<u8>,
    scales: Vec<f16>,
    weights: Vec<i8>,
}

fn blocks(groups: usize, mut number: impl FnMut(usize) -> (f16, i8)) -> Blocks {
    let mut row = Blocks {
        bytes: vec![],
        scales: vec![],
        weights: vec![],
    };
    for g in 0..groups {
        let scale = number(g * GROUP).0;
        row.scales.push(scale);
        row.bytes.extend(scale.to_le_bytes());
        for i in 0..GROUP {
            let w = number(g * GROUP + i).1;
            row.weights.push(w);
            row.bytes.push(w as u8);
        }
    }
    row
}

/// The documented quantisation of activations, one element at a time.
fn quantise(row: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let (mut quants, mut scales) = (vec![], vec![]);
    for group in row.chunks(GROUP) {
        let largest = group.iter().fold(0f32, |a, x| a.max(x.abs()));
        let scale = largest / 127.0;
        scales.push(scale);
        let inverse = 1.0 / scale;
        quants.extend(group.iter().map(|x| {
            if largest == 0.0 {
                0
            } else {
                (x * inverse).round_ties_even() as i8
            }
        }));
    }
    (quants, scales)
}

/// The documented product of one row of activations and one of weights.
fn product(x: &(Vec<i8>, Vec<f32>), weights: &[i8], scales: &[f16]) -> f32 {
    let groups =
        x.0.chunks(GROUP)
            .zip(weights.chunks(GROUP))
            .zip(x.1.iter().zip(scales));
    groups.fold(0.0, |sum, ((x, w), (xs, ws))| {
        let dot: i32 = x
            .iter()
            .zip(w)
            .map(|(x, w)| i32::from(*x) * i32::from(*w))
            .sum();
        (dot as f32).mul_add(ws.to_f32() * xs, sum)
    })
}

#[test]
fn product_has_the_documented_bits_on_every_isa_thread_count_and_batch() {
    let teams = teams();
    let mut random = Random(1);
    for (n, k) in [
        (1, 32),
        (15, 64),
        (16, 32),
        (17, 96),
        (31, 32),
        (32, 64),
        (33, 32),
        (100, 288),
        (64, 1024),
    ] {
        let rows: Vec<Blocks> = (0..n)
            .map(|_| {
                blocks(k / GROUP, |i| {
                    let w = match i % 7 {
                        0 => -128,
                        1 => 127,
                        _ => random.next() as i8,
                    };
                    (f16::from_f32(random.unit()), w)
                })
            })
            .collect();
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 25] {
            let x = random.vector(m * k);
            let quantised: Vec<_> = x.chunks(k).map(quantise).collect();
            let expected: Vec<f32> = quantised
                .iter()
                .flat_map(|x| rows.iter().map(|w| product(x, &w.weights, &w.scales)))
                .collect();
            for team in &teams {
                let w = Q8Matrix::from_q8_0(team, n, k, |i| &rows[i].bytes).unwrap();
                let mut activations = Q8Rows::with_capacity(0, k);
                activations.quantise(team, &x, k);
                let mut y = vec![f32::NAN; m * n];
                matmul_q8(team, &activations, &w, &mut y);
                assert_same_bits(
                    &y,
                    &expected,
                    &format!("{} m={m} n={n} k={k}", describe(team)),
                );
            }
        }
    }
}

#[test]
fn extreme_bytes_do_not_saturate() {
    let rows: Vec<Blocks> = [-128i8, 127]
        .iter()
        .map(|w| blocks(4, |_| (f16::ONE, *w)))
        .collect();
    for team in teams() {
        let w = Q8Matrix::from_q8_0(&team, 2, 128, |i| &rows[i].bytes).unwrap();
        for sign in [1.0, -1.0] {
            let mut x = Q8Rows::with_capacity(1, 128);
            x.quantise(&team, &[127.0 * sign; 128], 128);
            let mut y = [0.0; 2];
            matmul_q8(&team, &x, &w, &mut y);
            assert_eq!(
                y,
                [-128.0 * 127.0 * 128.0 * sign, 127.0 * 127.0 * 128.0 * sign],
                "{}",
                describe(&team)
            );
        }
    }
}

#[test]
fn columns_that_are_no_multiple_of_32_are_padded() {
    let mut random = Random(2);
    for k in [1, 12, 31, 33, 47, 48, 49, 172, 255] {
        let (m, n) = (3, 20);
        let (x, w) = (random.vector(m * k), random.vector(n * k));
        let mut first: Option<Vec<f32>> = None;
        for team in teams() {
            let packed =
                Q8Matrix::from_rows(&team, n, k, |i, out| out.copy_from_slice(&w[i * k..][..k]))
                    .unwrap();
            let mut rows = Q8Rows::with_capacity(m, k);
            rows.quantise(&team, &x, k);
            let mut y = vec![f32::NAN; m * n];
            matmul_q8(&team, &rows, &packed, &mut y);
            for (i, y) in y.iter().enumerate() {
                let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
                let exact: f64 = x
                    .iter()
                    .zip(w)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                // Each factor is off by at most half a step of 1/127 of its group's largest, which
                // is below 1.
                let bound = k as f64 * (1.01 / 127.0);
                assert!(
                    (f64::from(*y) - exact).abs() <= bound,
                    "{} k={k}: {y} for {exact}",
                    describe(&team)
                );
            }
            let expected = first.get_or_insert_with(|| y.clone());
            assert_same_bits(&y, expected, &format!("{} k={k}", describe(&team)));
        }
    }
}

#[test]
fn matrices_share_an_arena_and_outlive_it() {
    let team = Team::new(2).unwrap();
    let bytes = Q8Matrix::packed_bytes(40, 64).unwrap();
    assert_eq!(bytes, (2usize * 2 * 1088).next_multiple_of(4096));
    let mut arena = Region::zeroed(2 * bytes, Purpose::Weights).unwrap();
    let make = |arena: &mut Region, factor: f32| {
        Q8Matrix::from_rows_in(arena, &team, 40, 64, move |i, out| {
            out.fill(i as f32 * factor)
        })
        .unwrap()
    };
    let matrices = [1.0, 2.0, 3.0].map(|factor| make(&mut arena, factor));
    assert_eq!(arena.len(), 0, "two fit, the third has memory of its own");
    drop(arena);
    let mut out = [0.0; 64];
    for (matrix, factor) in matrices.iter().zip([1.0, 2.0, 3.0]) {
        matrix.row(39, &mut out);
        assert!(out.iter().all(|x| (x / factor - 39.0).abs() < 0.02));
    }
    assert_eq!(Q8Matrix::packed_bytes(0, 4), None);
    assert_eq!(Q8Matrix::packed_bytes(usize::MAX, 40), None);
}

#[test]
fn q8_0_rows_are_kept_exactly() {
    let team = Team::new(2).unwrap();
    let mut random = Random(3);
    let rows: Vec<Blocks> = (0..37)
        .map(|_| {
            blocks(3, |_| {
                (f16::from_f32(random.unit() * 1e-3), random.next() as i8)
            })
        })
        .collect();
    let w = Q8Matrix::from_q8_0(&team, 37, 96, |i| &rows[i].bytes).unwrap();
    assert_eq!(w.bytes(), 2 * 3 * 1088);
    let mut out = vec![0.0; 96];
    for (i, row) in rows.iter().enumerate() {
        w.row(i, &mut out);
        let expected: Vec<f32> = row
            .weights
            .iter()
            .enumerate()
            .map(|(c, w)| f32::from(*w) * row.scales[c / GROUP].to_f32())
            .collect();
        assert_same_bits(&out, &expected, "row");
    }
}

#[test]
fn nan_and_infinite_activations_show_in_their_row_only() {
    for team in teams() {
        let w = Q8Matrix::from_rows(&team, 40, 64, |i, out| out.fill(i as f32)).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 3 * 64];
            x[64 + 40] = bad;
            let mut rows = Q8Rows::with_capacity(3, 64);
            rows.quantise(&team, &x, 64);
            let mut y = vec![0.0; 3 * 40];
            matmul_q8(&team, &rows, &w, &mut y);
            assert!(y[40..80].iter().all(|y| y.is_nan()), "{}", describe(&team));
            assert!(
                y[..40].iter().chain(&y[80..]).all(|y| y.is_finite()),
                "{}",
                describe(&team)
            );
        }
    }
}

#[test]
fn a_smaller_batch_after_a_larger_one_uses_its_own_rows() {
    let team = Team::new(2).unwrap();
    let w = Q8Matrix::from_rows(&team, 33, 32, |i, out| out.fill(i as f32)).unwrap();
    let mut rows = Q8Rows::with_capacity(1, 32);
    rows.quantise(&team, &[5.0; 7 * 32], 32);
    rows.quantise(&team, &[1.0; 2 * 32], 32);
    assert_eq!((rows.rows(), rows.columns()), (2, 32));
    let mut y = vec![0.0; 66];
    matmul_q8(&team, &rows, &w, &mut y);
    assert!((y[65] - 32.0 * 32.0).abs() < 1.0, "{}", y[65]);
}

#[test]
fn packing_refuses_what_it_cannot_hold() {
    let team = Team::new(3).unwrap();
    let fill = |_: usize, out: &mut [f32]| out.fill(1.0);
    assert!(matches!(
        Q8Matrix::from_rows(&team, 0, 4, fill),
        Err(PackError::Empty {
            rows: 0,
            columns: 4
        })
    ));
    assert!(matches!(
        Q8Matrix::from_rows(&team, 4, 0, fill),
        Err(PackError::Empty {
            rows: 4,
            columns: 0
        })
    ));
    let huge = Q8Matrix::from_q8_0(&team, usize::MAX / 2, 1 << 20, |_| &[]);
    assert!(matches!(huge, Err(PackError::TooLarge { .. })));
    let huge = Q8Matrix::from_q8_0(&team, 1 << 40, 1 << 20, |_| &[]);
    assert!(matches!(huge, Err(PackError::Memory(_))));
    let at = |bad: f32| {
        Q8Matrix::from_rows(&team, 200, 40, move |i, out| {
            out.fill(1.0);
            if i == 70 || i == 150 {
                out[39] = bad;
            }
        })
    };
    assert!(matches!(
        at(f32::NAN),
        Err(PackError::NotFinite { row: 70 })
    ));
    assert!(matches!(
        at(f32::NEG_INFINITY),
        Err(PackError::NotFinite { row: 70 })
    ));
    assert!(matches!(
        at(-8.4e6),
        Err(PackError::ScaleOverflow { row: 70 })
    ));
    assert!(at(-8.3e6).is_ok());
    assert!(matches!(
        Q8Matrix::from_q8_0(&team, 2, 40, |_| &[0; 34]),
        Err(PackError::PartialBlock {
            columns: 40,
            block: 32
        })
    ));
    let lengths: [&[u8]; 2] = [&[0; 34], &[0; 33]];
    assert!(matches!(
        Q8Matrix::from_q8_0(&team, 2, 32, |i| lengths[i]),
        Err(PackError::RowLength {
            row: 1,
            expected: 34,
            found: 33
        })
    ));
    let mut infinite = [0; 34];
    infinite[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    assert!(matches!(
        Q8Matrix::from_q8_0(&team, 1, 32, |_| &infinite),
        Err(PackError::NotFinite { row: 0 })
    ));
}

#[test]
#[should_panic(expected = "x.rows() * w.rows()")]
fn a_short_output_panics() {
    let team = Team::new(1).unwrap();
    let w = Q8Matrix::from_rows(&team, 4, 32, |_, out| out.fill(1.0)).unwrap();
    let mut x = Q8Rows::with_capacity(2, 32);
    x.quantise(&team, &[1.0; 64], 32);
    matmul_q8(&team, &x, &w, &mut [0.0; 7]);
}

#[test]
#[should_panic(expected = "columns")]
fn different_columns_panic() {
    let team = Team::new(1).unwrap();
    let w = Q8Matrix::from_rows(&team, 4, 33, |_, out| out.fill(1.0)).unwrap();
    let mut x = Q8Rows::with_capacity(1, 32);
    x.quantise(&team, &[1.0; 32], 32);
    matmul_q8(&team, &x, &w, &mut [0.0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_gives_the_same_bits_everywhere(
        m in 1usize..20, n in 1usize..80, k in 1usize..200, threads in 1usize..5, seed: u64
    ) {
        let mut random = Random(seed);
        let (x, w) = (random.vector(m * k), random.vector(n * k));
        let multiply = |team: &Team, x: &[f32]| {
            let packed = Q8Matrix::from_rows(team, n, k, |i, out| out.copy_from_slice(&w[i * k..][..k])).unwrap();
            let mut rows = Q8Rows::with_capacity(m, k);
            rows.quantise(team, x, k);
            let mut y = vec![f32::NAN; rows.rows() * n];
            matmul_q8(team, &rows, &packed, &mut y);
            y
        };
        let single = Team::with_isa(1, Isa::SCALAR).unwrap();
        let expected: Vec<f32> = x.chunks(k).flat_map(|row| multiply(&single, row)).collect();
        for isa in Isa::available() {
            let team = Team::with_isa(threads, isa).unwrap();
            assert_same_bits(&multiply(&team, &x), &expected, &describe(&team));
        }
    }

    #[test]
    fn packed_weights_are_within_half_a_step(magnitude in -45i32..22, seed: u64) {
        let mut random = Random(seed);
        let row: Vec<f32> = random.vector(70).iter().map(|x| x * (magnitude as f32).exp2()).collect();
        let team = Team::new(1).unwrap();
        let w = Q8Matrix::from_rows(&team, 1, 70, |_, out| out.copy_from_slice(&row)).unwrap();
        let mut out = vec![0.0; 70];
        w.row(0, &mut out);
        for (found, exact) in out.chunks(GROUP).zip(row.chunks(GROUP)) {
            let largest = exact.iter().fold(0f32, |a, x| a.max(x.abs()));
            // The scale is largest / 127 rounded to half precision: 2^-11 of itself, or 2^-24 for
            // subnormal halves.
            let step = largest / 127.0 * (1.0 + 1.0 / 1024.0) + 6e-8;
            for (found, exact) in found.iter().zip(exact) {
                prop_assert!((found - exact).abs() <= step * 0.5001, "{} for {} in steps of {}", found, exact, step);
            }
        }
    }

    #[test]
    fn quantised_activations_are_as_documented(
        magnitude in -100i32..100, len in 1usize..150, zeros: bool, seed: u64
    ) {
        let mut random = Random(seed);
        let factor = (magnitude as f32).exp2();
        let mut row: Vec<f32> = random.vector(len).iter().map(|x| x * factor).collect();
        if zeros {
            row[len / 2..].fill(0.0);
        }
        let (quants, scales) = quantise(&row);
        for isa in Isa::available() {
            let team = Team::with_isa(1, isa).unwrap();
            let mut rows = Q8Rows::with_capacity(1, len);
            rows.quantise(&team, &row, len);
            let mut out = vec![f32::NAN; len];
            rows.dequantise(0, &mut out);
            for (i, out) in out.iter().enumerate() {
                let group = &row[i / GROUP * GROUP..len.min((i / GROUP + 1) * GROUP)];
                let tiny = group.iter().all(|x| x.abs() < 1e-30);
                let expected = if tiny { 0.0 } else { f32::from(quants[i]) * scales[i / GROUP] };
                prop_assert_eq!(*out, expected, "{} element {}", isa, i);
            }
        }
    }
}
