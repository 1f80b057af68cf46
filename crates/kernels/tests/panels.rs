//! Products of rows against a plain implementation of what `panels` documents.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::panels::{
    Int8Matrix, Int8Rows, MAX_COLUMNS, matmul_int8, matmul_int8_sums, scale_sums,
};
use casemate_kernels::q8::PackError;
use casemate_kernels::rotate::Rotation;
use casemate_kernels::team::Team;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, teams};

/// Rows of integers with their scales.
struct Weights {
    quants: Vec<Vec<i8>>,
    scales: Vec<f32>,
}

impl Weights {
    /// Random ones, extremes among them.
    fn random(random: &mut Random, rows: usize, columns: usize) -> Weights {
        let quant = |random: &mut Random| match random.below(7) {
            0 => -127,
            1 => 127,
            _ => (random.below(255) as i32 - 127) as i8,
        };
        Weights {
            quants: (0..rows)
                .map(|_| (0..columns).map(|_| quant(random)).collect())
                .collect(),
            scales: (0..rows).map(|_| random.unit()).collect(),
        }
    }

    fn pack(&self, team: &Team) -> Result<Int8Matrix, PackError> {
        let row = |i: usize| (&self.quants[i][..], self.scales[i]);
        let (rows, columns) = (self.quants.len(), self.quants[0].len());
        Int8Matrix::from_int8_in(&mut Region::default(), team, rows, columns, row)
    }
}

/// The documented quantisation of a row of activations, one element at a time.
fn quantise(row: &[f32]) -> (Vec<i8>, f32) {
    let largest = row.iter().fold(0f32, |a, x| a.max(x.abs()));
    if largest < 1e-30 {
        return (vec![0; row.len()], 0.0);
    }
    let scale = largest / 127.0;
    let inverse = 1.0 / scale;
    let quant = |x: &f32| (x * inverse).round_ties_even() as i8;
    (row.iter().map(quant).collect(), scale)
}

fn dot(x: &[i8], w: &[i8]) -> i32 {
    let products = x.iter().zip(w).map(|(x, w)| i64::from(*x) * i64::from(*w));
    i32::try_from(products.sum::<i64>()).expect("the sum fits by the limit on columns")
}

/// The documented sums and results.
fn expected(x: &[f32], columns: usize, w: &Weights) -> (Vec<i32>, Vec<f32>) {
    let mut sums = vec![];
    let mut results = vec![];
    for row in x.chunks(columns) {
        let (quants, scale) = quantise(row);
        for (w, wscale) in w.quants.iter().zip(&w.scales) {
            let sum = dot(&quants, w);
            sums.push(sum);
            results.push((sum as f32 * wscale) * scale);
        }
    }
    (sums, results)
}

/// Sums, results, and results from sums of one team.
fn multiply(team: &Team, x: &[f32], w: &Int8Matrix) -> (Vec<i32>, Vec<f32>, Vec<f32>) {
    let mut rows = Int8Rows::with_capacity(0, w.columns());
    rows.quantise(team, x, w.columns(), None);
    let elements = rows.rows() * w.rows();
    let mut sums = vec![i32::MIN; elements];
    let mut y = vec![f32::NAN; elements];
    let mut scaled = vec![f32::NAN; elements];
    matmul_int8_sums(team, &rows, w, &mut sums);
    matmul_int8(team, &rows, w, &mut y);
    scale_sums(team, &rows, w, &sums, &mut scaled);
    (sums, y, scaled)
}

#[track_caller]
fn check(team: &Team, x: &[f32], w: &Int8Matrix, expected: &(Vec<i32>, Vec<f32>), what: &str) {
    let what = format!("{} {what}", describe(team));
    let (sums, y, scaled) = multiply(team, x, w);
    assert!(sums == expected.0, "{what}: sums differ");
    assert_same_bits(&y, &expected.1, &what);
    assert_same_bits(&scaled, &expected.1, &format!("{what}, from sums"));
}

#[test]
fn product_has_the_documented_bits_on_every_isa_thread_count_and_batch() {
    let teams = teams();
    let mut random = Random(1);
    // Rows of weights around panels and groups of panels, columns around lines.
    for (n, k) in [
        (1, 1),
        (15, 4),
        (16, 64),
        (17, 5),
        (31, 63),
        (33, 66),
        (48, 128),
        (49, 7),
        (64, 260),
        (65, 96),
        (113, 31),
        (200, 576),
    ] {
        let weights = Weights::random(&mut random, n, k);
        // Rows around every height of a block: one pass up to 24, blocks of up to 8 beyond.
        let batches = (1..=26).chain([31, 32, 33, 40, 41, 47, 48, 49, 57, 64, 65]);
        for m in batches.filter(|m| m * n * k < 200_000) {
            let x = random.vector(m * k);
            let expected = expected(&x, k, &weights);
            for team in &teams {
                let w = weights.pack(team).unwrap();
                check(team, &x, &w, &expected, &format!("m={m} n={n} k={k}"));
            }
        }
    }
}

#[test]
fn columns_beyond_one_cache_piece_are_summed_on() {
    let mut random = Random(2);
    // 2,048 lines of four columns are one piece; a single block of rows takes all at once.
    for k in [8191, 8192, 8193, 16_390] {
        let weights = Weights::random(&mut random, 35, k);
        for m in [1, 5, 9, 25] {
            let x = random.vector(m * k);
            let expected = expected(&x, k, &weights);
            for isa in Isa::available() {
                let team = Team::with_isa(2, isa).unwrap();
                let w = weights.pack(&team).unwrap();
                check(&team, &x, &w, &expected, &format!("m={m} k={k}"));
            }
        }
    }
}

#[test]
fn the_longest_rows_of_extremes_do_not_overflow() {
    for sign in [1i8, -1] {
        let weights = Weights {
            quants: vec![vec![127 * sign; MAX_COLUMNS]; 2],
            scales: vec![1.0; 2],
        };
        for isa in Isa::available() {
            let team = Team::with_isa(1, isa).unwrap();
            let w = weights.pack(&team).unwrap();
            for m in [1, 25] {
                let x = vec![1.0; m * MAX_COLUMNS];
                let sum = 127 * 127 * MAX_COLUMNS as i32 * i32::from(sign);
                assert!(multiply(&team, &x, &w).0.iter().all(|s| *s == sum), "{isa}");
            }
        }
    }
    let team = Team::new(1).unwrap();
    let fill = |_: usize, out: &mut [f32]| out.fill(1.0);
    let make = |columns| Int8Matrix::from_rows_in(&mut Region::default(), &team, 1, columns, fill);
    assert_eq!(MAX_COLUMNS, 133_144);
    assert!(make(MAX_COLUMNS).is_ok());
    assert!(matches!(
        make(MAX_COLUMNS + 1),
        Err(PackError::TooManyColumns { columns: 133_145 })
    ));
}

#[test]
fn weights_are_quantised_as_documented() {
    let mut random = Random(3);
    for (n, k) in [(1, 1), (17, 33), (40, 100)] {
        let mut w = random.vector(n * k);
        if n > 1 {
            w[k..2 * k].fill(0.0);
            w[2 * k..3 * k].fill(1e-31);
        }
        let mut first: Option<Vec<(Vec<i8>, f32)>> = None;
        for team in teams() {
            let fill = |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * k..][..k]);
            let packed =
                Int8Matrix::from_rows_in(&mut Region::default(), &team, n, k, fill).unwrap();
            let rows: Vec<_> = (0..n)
                .map(|i| {
                    let mut out = vec![-128; k];
                    let scale = packed.row(i, &mut out);
                    (out, scale)
                })
                .collect();
            for ((quants, scale), w) in rows.iter().zip(w.chunks(k)) {
                let largest = w.iter().fold(0f32, |a, x| a.max(x.abs()));
                if largest < 1e-30 {
                    assert_eq!((*scale, quants.iter().all(|q| *q == 0)), (0.0, true));
                    continue;
                }
                assert_eq!(*scale, largest / 127.0);
                for (q, w) in quants.iter().zip(w) {
                    assert_eq!(f32::from(*q), (w / scale).round_ties_even(), "{w}");
                }
            }
            let first = first.get_or_insert_with(|| rows.clone());
            assert_eq!(*first, rows, "{}", describe(&team));
        }
    }
}

#[test]
fn rotated_products_are_those_of_the_rows() {
    let mut random = Random(4);
    for (n, k) in [(20, 64), (33, 48), (20, 36), (5, 35)] {
        let rotation = Rotation::new(k);
        let (x, w) = (random.vector(6 * k), random.vector(n * k));
        let mut first: Option<Vec<f32>> = None;
        for team in teams() {
            let fill = |i: usize, out: &mut [f32]| {
                out.copy_from_slice(&w[i * k..][..k]);
                rotation.apply(team.isa(), out);
            };
            let packed =
                Int8Matrix::from_rows_in(&mut Region::default(), &team, n, k, fill).unwrap();
            let mut rows = Int8Rows::with_capacity(6, k);
            rows.quantise(&team, &x, k, Some(&rotation));
            let mut y = vec![f32::NAN; 6 * n];
            matmul_int8(&team, &rows, &packed, &mut y);
            for (i, y) in y.iter().enumerate() {
                let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
                let exact: f64 = x
                    .iter()
                    .zip(w)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                // Rotated rows of numbers below 1 stay below the root of the block, and each factor
                // is off by half a step of 1/127 of the largest; the errors' signs are random.
                assert!(
                    (f64::from(*y) - exact).abs() < 0.6,
                    "k={k}: {y} for {exact}"
                );
            }
            let first = first.get_or_insert_with(|| y.clone());
            assert_same_bits(&y, first, &format!("{} k={k}", describe(&team)));
        }
    }
}

#[test]
fn a_smaller_batch_after_a_larger_one_uses_its_own_rows() {
    let mut random = Random(5);
    let weights = Weights::random(&mut random, 33, 32);
    let team = Team::new(2).unwrap();
    let w = weights.pack(&team).unwrap();
    let mut rows = Int8Rows::with_capacity(1, 32);
    rows.quantise(&team, &[5.0; 70 * 32], 32, None);
    let x = random.vector(2 * 32);
    rows.quantise(&team, &x, 32, None);
    assert_eq!((rows.rows(), rows.columns()), (2, 32));
    let mut y = vec![0.0; 66];
    matmul_int8(&team, &rows, &w, &mut y);
    assert_same_bits(&y, &expected(&x, 32, &weights).1, "the smaller batch");
}

/// Digits of masked activations come this way: any number of rows, every instruction set.
#[test]
fn integers_that_somebody_else_made_have_exact_sums() {
    let mut random = Random(23);
    for team in teams() {
        // One buffer for all, so that later contents do not see earlier ones.
        let mut rows = Int8Rows::with_capacity(0, 1);
        for (count, columns, outputs) in [(4, 1, 1), (24, 67, 33), (52, 4100, 19), (1, 16, 16)] {
            let w = Weights::random(&mut random, outputs, columns);
            let x = Weights::random(&mut random, count, columns);
            rows.assign(&team, &x.quants.concat(), columns);
            assert_eq!((rows.rows(), rows.columns()), (count, columns));
            let mut read = vec![0; columns];
            assert_eq!(rows.row(count - 1, &mut read), 1.0);
            assert_eq!(read, x.quants[count - 1]);
            let mut sums = vec![0; count * outputs];
            matmul_int8_sums(&team, &rows, &w.pack(&team).unwrap(), &mut sums);
            let expected: Vec<_> = x
                .quants
                .iter()
                .flat_map(|x| w.quants.iter().map(|w| dot(x, w)))
                .collect();
            assert!(
                sums == expected,
                "{count} x {outputs} x {columns}, {}",
                describe(&team)
            );
        }
    }
}

#[test]
#[should_panic(expected = "integers reach from -127 to 127")]
fn an_integer_below_the_range_panics() {
    let mut rows = Int8Rows::with_capacity(1, 2);
    rows.assign(&Team::new(1).unwrap(), &[0, -128], 2);
}

#[test]
fn no_rows_are_no_product() {
    let team = Team::new(2).unwrap();
    let w = Weights::random(&mut Random(6), 3, 8).pack(&team).unwrap();
    let mut rows = Int8Rows::with_capacity(4, 8);
    rows.quantise(&team, &[], 8, Some(&Rotation::new(8)));
    matmul_int8(&team, &rows, &w, &mut []);
    assert_eq!(rows.rows(), 0);
}

#[test]
fn nan_and_infinite_activations_show_in_their_row_only() {
    for team in teams() {
        let fill = |i: usize, out: &mut [f32]| out.fill(i as f32);
        let w = Int8Matrix::from_rows_in(&mut Region::default(), &team, 40, 64, fill).unwrap();
        for rotation in [None, Some(Rotation::new(64))] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0; 3 * 64];
                x[64 + 40] = bad;
                let mut rows = Int8Rows::with_capacity(3, 64);
                rows.quantise(&team, &x, 64, rotation.as_ref());
                let mut y = vec![0.0; 3 * 40];
                matmul_int8(&team, &rows, &w, &mut y);
                assert!(y[40..80].iter().all(|y| y.is_nan()), "{}", describe(&team));
                assert!(
                    y[..40].iter().chain(&y[80..]).all(|y| y.is_finite()),
                    "{}",
                    describe(&team)
                );
            }
        }
    }
}

#[test]
fn matrices_share_an_arena_and_outlive_it() {
    let team = Team::new(2).unwrap();
    let bytes = Int8Matrix::packed_bytes(40, 1000).unwrap();
    assert_eq!(bytes, (3usize * 250 * 64).next_multiple_of(4096) + 4096);
    let mut arena = Region::zeroed(2 * bytes, Purpose::Weights).unwrap();
    let make = |arena: &mut Region, factor: f32| {
        let fill = move |i: usize, out: &mut [f32]| out.fill(i as f32 * factor);
        Int8Matrix::from_rows_in(arena, &team, 40, 1000, fill).unwrap()
    };
    let matrices = [1.0, 2.0, 3.0].map(|factor| make(&mut arena, factor));
    assert_eq!(arena.len(), 0, "two fit, the third has memory of its own");
    drop(arena);
    let mut out = [0; 1000];
    for (matrix, factor) in matrices.iter().zip([1.0, 2.0, 3.0]) {
        assert_eq!(matrix.row(39, &mut out), 39.0 * factor / 127.0);
        assert!(out.iter().all(|x| *x == 127));
    }
    assert_eq!(Int8Matrix::packed_bytes(0, 4), None);
    assert_eq!(Int8Matrix::packed_bytes(usize::MAX, 40), None);
}

#[test]
fn packing_refuses_what_it_cannot_hold() {
    let team = Team::new(3).unwrap();
    let fill = |_: usize, out: &mut [f32]| out.fill(1.0);
    let from_rows = |rows, columns| {
        Int8Matrix::from_rows_in(&mut Region::default(), &team, rows, columns, fill).map(|_| ())
    };
    assert!(matches!(
        from_rows(0, 4),
        Err(PackError::Empty {
            rows: 0,
            columns: 4
        })
    ));
    assert!(matches!(
        from_rows(4, 0),
        Err(PackError::Empty {
            rows: 4,
            columns: 0
        })
    ));
    assert!(matches!(
        from_rows(usize::MAX, 4000),
        Err(PackError::TooLarge { .. })
    ));
    assert!(matches!(
        from_rows(1 << 45, 100_000),
        Err(PackError::Memory(_))
    ));
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let at = |i: usize, out: &mut [f32]| {
            out.fill(1.0);
            if i == 70 || i == 150 {
                out[39] = bad;
            }
        };
        assert!(matches!(
            Int8Matrix::from_rows_in(&mut Region::default(), &team, 200, 40, at),
            Err(PackError::NotFinite { row: 70 })
        ));
    }
    let from_int8 = |change: fn(&mut Weights)| {
        let mut weights = Weights::random(&mut Random(7), 60, 9);
        change(&mut weights);
        let row = |i: usize| (&weights.quants[i][..], weights.scales[i]);
        Int8Matrix::from_int8_in(&mut Region::default(), &team, 60, 9, row).map(|_| ())
    };
    assert!(from_int8(|_| {}).is_ok());
    assert!(matches!(
        from_int8(|w| w.quants[50][8] = -128),
        Err(PackError::Lopsided { row: 50 })
    ));
    assert!(matches!(
        from_int8(|w| w.scales[3] = f32::INFINITY),
        Err(PackError::NotFinite { row: 3 })
    ));
    assert!(matches!(
        from_int8(|w| w.quants[4].truncate(8)),
        Err(PackError::RowLength {
            row: 4,
            expected: 9,
            found: 8
        })
    ));
}

#[test]
#[should_panic(expected = "x.rows() * w.rows()")]
fn a_short_output_panics() {
    let team = Team::new(1).unwrap();
    let w = Weights::random(&mut Random(8), 4, 32).pack(&team).unwrap();
    let mut x = Int8Rows::with_capacity(2, 32);
    x.quantise(&team, &[1.0; 64], 32, None);
    matmul_int8(&team, &x, &w, &mut [0.0; 7]);
}

#[test]
#[should_panic(expected = "columns")]
fn different_columns_panic() {
    let team = Team::new(1).unwrap();
    let w = Weights::random(&mut Random(8), 4, 33).pack(&team).unwrap();
    let mut x = Int8Rows::with_capacity(1, 32);
    x.quantise(&team, &[1.0; 32], 32, None);
    matmul_int8(&team, &x, &w, &mut [0.0; 4]);
}

#[test]
#[should_panic(expected = "another width")]
fn a_rotation_of_another_width_panics() {
    let team = Team::new(1).unwrap();
    let mut x = Int8Rows::with_capacity(1, 32);
    x.quantise(&team, &[1.0; 32], 32, Some(&Rotation::new(16)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_gives_the_documented_bits(
        m in 1usize..60, n in 1usize..120, k in 1usize..200, threads in 1usize..5, seed: u64
    ) {
        let mut random = Random(seed);
        let weights = Weights::random(&mut random, n, k);
        let x = random.vector(m * k);
        let expected = expected(&x, k, &weights);
        for isa in Isa::available() {
            let team = Team::with_isa(threads, isa).unwrap();
            check(&team, &x, &weights.pack(&team).unwrap(), &expected, "");
        }
    }

    #[test]
    fn quantised_activations_are_as_documented(
        magnitude in -100i32..100, len in 1usize..150, rows in 1usize..30, seed: u64
    ) {
        let mut random = Random(seed);
        let factor = (magnitude as f32).exp2();
        let x: Vec<f32> = random.vector(rows * len).iter().map(|x| x * factor).collect();
        for isa in Isa::available() {
            let team = Team::with_isa(1, isa).unwrap();
            let mut quantised = Int8Rows::with_capacity(1, len);
            quantised.quantise(&team, &x, len, None);
            for (i, x) in x.chunks(len).enumerate() {
                let mut out = vec![-128; len];
                let scale = quantised.row(i, &mut out);
                prop_assert_eq!((out, scale), quantise(x), "{} row {}", isa, i);
            }
        }
    }
}
