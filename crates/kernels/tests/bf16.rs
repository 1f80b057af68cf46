//! Products in bf16 against a plain implementation of what `panels` documents.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::panels::{BF16_TILES_NAME, Bf16Matrix, Bf16Rows, bf16_name, matmul_bf16};
use casemate_kernels::q8::PackError;
use casemate_kernels::team::Team;
use half::bf16;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, teams};

/// The documented rounding of one number.
fn round(x: f32) -> f32 {
    let x = bf16::from_f32(x).to_f32();
    if x.abs() < (-56f32).exp2() { 0.0 } else { x }
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| round(*x)).collect()
}

/// The documented product of two rounded rows.
fn product(x: &[f32], w: &[f32]) -> f32 {
    x.chunks(2).zip(w.chunks(2)).fold(0.0, |mut sum, (x, w)| {
        if let ([_, x], [_, w]) = (x, w) {
            sum = x.mul_add(*w, sum);
        }
        x[0].mul_add(w[0], sum)
    })
}

/// The documented product of two rounded rows on tile registers.
fn product_on_tiles(x: &[f32], w: &[f32]) -> f32 {
    x.chunks(32).zip(w.chunks(32)).fold(0.0, |sum, (x, w)| {
        let mut parts = [0f32; 2];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            parts[i % 2] = x.mul_add(*w, parts[i % 2]);
        }
        sum + (parts[0] + parts[1])
    })
}

fn expected(isa: Isa, x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let product = match bf16_name(isa) {
        BF16_TILES_NAME => product_on_tiles,
        _ => product,
    };
    let (x, w) = (rounded(x), rounded(w));
    x.chunks(k)
        .flat_map(|x| w.chunks(k).map(|w| product(x, w)))
        .collect()
}

/// What is expected of all instruction sets here, each order computed once.
struct Expected(Vec<(&'static str, Vec<f32>)>);

impl Expected {
    fn new(x: &[f32], w: &[f32], k: usize) -> Expected {
        let mut orders: Vec<(&str, Vec<f32>)> = vec![];
        for isa in Isa::available() {
            let name = bf16_name(isa);
            if orders.iter().all(|(order, _)| *order != name) {
                orders.push((name, expected(isa, x, w, k)));
            }
        }
        Expected(orders)
    }

    fn of(&self, team: &Team) -> &[f32] {
        let name = bf16_name(team.isa());
        let found = self.0.iter().find(|(order, _)| *order == name);
        &found.expect("each order is there").1
    }
}

fn pack(team: &Team, w: &[f32], k: usize) -> Result<Bf16Matrix, PackError> {
    let fill = |row: usize, out: &mut [f32]| out.copy_from_slice(&w[row * k..][..k]);
    Bf16Matrix::from_rows_in(&mut Region::default(), team, w.len() / k, k, fill)
}

fn multiply(team: &Team, x: &[f32], w: &Bf16Matrix) -> Vec<f32> {
    let mut rows = Bf16Rows::with_capacity(0, w.columns());
    rows.round(team, x, w.columns());
    let mut y = vec![f32::NAN; rows.rows() * w.rows()];
    matmul_bf16(team, &rows, w, &mut y);
    y
}

#[track_caller]
fn check(team: &Team, x: &[f32], w: &Bf16Matrix, expected: &Expected, what: &str) {
    let what = format!("{} {what}", describe(team));
    assert_same_bits(&multiply(team, x, w), expected.of(team), &what);
}

#[test]
fn product_has_the_documented_bits_on_every_isa_thread_count_and_batch() {
    let teams = teams();
    let mut random = Random(1);
    // Rows of weights around panels and groups of panels, columns around lines.
    for (n, k) in [
        (1, 1),
        (15, 2),
        (16, 64),
        (17, 3),
        (31, 63),
        (33, 66),
        (48, 128),
        (49, 7),
        (64, 260),
        (65, 96),
        (113, 31),
    ] {
        let w = random.vector(n * k);
        // Rows around every height of a block: one pass up to 24, blocks of up to 8 beyond.
        let batches = (1..=26).chain([31, 32, 33, 40, 41, 47, 48, 49, 57, 64, 65]);
        for m in batches.filter(|m| m * n * k < 100_000) {
            let x = random.vector(m * k);
            let expected = Expected::new(&x, &w, k);
            for team in &teams {
                let w = pack(team, &w, k).unwrap();
                check(team, &x, &w, &expected, &format!("m={m} n={n} k={k}"));
            }
        }
    }
}

#[test]
fn columns_beyond_one_cache_piece_are_summed_on() {
    let mut random = Random(2);
    // 2,048 lines of two columns are one piece; a single block of rows takes all at once.
    for k in [4095, 4096, 4097, 8194] {
        let w = random.vector(35 * k);
        for m in [1, 5, 9, 25] {
            let x = random.vector(m * k);
            let expected = Expected::new(&x, &w, k);
            for isa in Isa::available() {
                let team = Team::with_isa(2, isa).unwrap();
                let w = pack(&team, &w, k).unwrap();
                check(&team, &x, &w, &expected, &format!("m={m} k={k}"));
            }
        }
    }
}

/// A number of any exponent, zeros, the least and the greatest among them.
fn wild(random: &mut Random, exponents: std::ops::Range<i32>) -> f32 {
    let mantissa = random.unit() + if random.below(2) == 0 { 1.5 } else { -1.5 };
    match random.below(20) {
        0 => 0.0,
        1 => -0.0,
        2 => f32::from_bits(1),
        3 => -f32::MIN_POSITIVE,
        4 => (-56f32).exp2(),
        5 => -(-57f32).exp2() * 1.99,
        _ => {
            let span = (exponents.end - exponents.start) as usize;
            mantissa * ((exponents.start + random.below(span) as i32) as f32).exp2()
        }
    }
}

/// What an instruction does with subnormal numbers cannot show, neither among the numbers nor in sums:
/// without the limit of 2^-56 some of these results differ.
#[test]
fn numbers_of_any_magnitude_give_the_same_bits_on_every_isa() {
    let mut random = Random(3);
    for exponents in [-149..-40, -62..-50, -70..-56, -149..60, 20..59] {
        for (m, n, k) in [(1, 40, 2), (3, 40, 9), (30, 40, 64)] {
            let mut numbers = |count: usize| -> Vec<f32> {
                (0..count)
                    .map(|_| wild(&mut random, exponents.clone()))
                    .collect()
            };
            for _ in 0..20 {
                let (x, w) = (numbers(m * k), numbers(n * k));
                let expected = Expected::new(&x, &w, k);
                for isa in Isa::available() {
                    let team = Team::with_isa(1, isa).unwrap();
                    let w = pack(&team, &w, k).unwrap();
                    check(&team, &x, &w, &expected, &format!("{exponents:?} k={k}"));
                }
            }
        }
    }
}

/// Sums that leave the range of f32, one way and the other, and come back or not.
#[test]
fn sums_beyond_the_range_give_the_same_infinities_on_every_isa() {
    let big = 1e19;
    let rows = [
        [big, big, big, big, -big, -big, 1.0, 1.0],
        [-big, big, 1.0, 1.0, big, big, big, big],
        [big, 3e38, 1.0, -3e38, 1.0, 3e38, 1.0, 1.0],
    ];
    let w: Vec<f32> = [1.0, -1.0, 1e19, 3e19, -3e19]
        .iter()
        .flat_map(|w| [*w; 8])
        .collect();
    let x = rows.concat();
    let expected = Expected::new(&x, &w, 8);
    let scalar = Team::with_isa(1, Isa::SCALAR).unwrap();
    assert!(expected.of(&scalar).contains(&f32::INFINITY));
    assert!(expected.of(&scalar).iter().any(|y| y.is_finite()));
    for team in teams() {
        let w = pack(&team, &w, 8).unwrap();
        for (i, (found, expected)) in multiply(&team, &x, &w)
            .iter()
            .zip(expected.of(&team))
            .enumerate()
        {
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{} {i}: {found} for {expected}", describe(&team));
        }
    }
}

#[test]
fn weights_and_activations_are_rounded_as_documented() {
    let tie = |upper: u32| f32::from_bits(upper << 16 | 0x8000);
    let mut numbers = vec![
        0.0,
        -0.0,
        tie(0x3F80),
        tie(0x3F81),
        -tie(0x3F81),
        f32::from_bits(0x3F80_8001),
        f32::from_bits(0x3F80_7FFF),
        (-56f32).exp2(),
        -(-56f32).exp2(),
        // Rounds up to 2^-56, and just does not.
        f32::from_bits((-56f32).exp2().to_bits() - 1),
        f32::from_bits((-56f32).exp2().to_bits() - 0x8001),
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        3.38e38,
    ];
    let mut random = Random(4);
    numbers.extend((0..500).map(|_| wild(&mut random, -149..120)));
    for k in [numbers.len(), numbers.len() - 1] {
        let x = [&numbers[..k], &numbers[..k], &numbers[..k]].concat();
        for team in teams() {
            let mut rows = Bf16Rows::with_capacity(1, k);
            rows.round(&team, &x, k);
            let w = pack(&team, &x, k).unwrap();
            assert_eq!((rows.rows(), w.rows()), (3, 3));
            for row in 0..3 {
                let (mut a, mut b) = (vec![f32::NAN; k], vec![f32::NAN; k]);
                rows.row(row, &mut a);
                w.row(row, &mut b);
                assert_eq!(a, rounded(&numbers[..k]), "{}", describe(&team));
                assert_same_bits(&a, &b, "weights and activations");
            }
        }
    }
}

#[test]
fn a_smaller_batch_after_a_larger_one_uses_its_own_rows() {
    let mut random = Random(5);
    let w = random.vector(33 * 31);
    let team = Team::new(2).unwrap();
    let packed = pack(&team, &w, 31).unwrap();
    let mut rows = Bf16Rows::with_capacity(1, 31);
    rows.round(&team, &[5.0; 70 * 31], 31);
    let x = random.vector(2 * 31);
    rows.round(&team, &x, 31);
    assert_eq!((rows.rows(), rows.columns()), (2, 31));
    let mut y = vec![0.0; 66];
    matmul_bf16(&team, &rows, &packed, &mut y);
    assert_same_bits(&y, &expected(team.isa(), &x, &w, 31), "the smaller batch");
    rows.round(&team, &[], 31);
    matmul_bf16(&team, &rows, &packed, &mut []);
    assert_eq!(rows.rows(), 0);
}

#[test]
fn nan_and_infinite_activations_show_in_their_row_only() {
    let w: Vec<f32> = (0..40 * 64).map(|i| (i / 64) as f32).collect();
    for team in teams() {
        let packed = pack(&team, &w, 64).unwrap();
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for column in [40, 41] {
                let mut x = vec![1.0; 3 * 64];
                x[64 + column] = bad;
                let y = multiply(&team, &x, &packed);
                assert!(
                    y[40..80].iter().all(|y| !y.is_finite()),
                    "{}",
                    describe(&team)
                );
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
    let bytes = Bf16Matrix::packed_bytes(40, 999).unwrap();
    assert_eq!(bytes, (3usize * 500 * 64).next_multiple_of(4096));
    let mut arena = Region::zeroed(2 * bytes, Purpose::Weights).unwrap();
    let make = |arena: &mut Region, factor: f32| {
        let fill = move |i: usize, out: &mut [f32]| out.fill(i as f32 * factor);
        Bf16Matrix::from_rows_in(arena, &team, 40, 999, fill).unwrap()
    };
    let matrices = [1.0, 2.0, 3.0].map(|factor| make(&mut arena, factor));
    assert_eq!(arena.len(), 0, "two fit, the third has memory of its own");
    drop(arena);
    let mut out = [0.0; 999];
    for (matrix, factor) in matrices.iter().zip([1.0, 2.0, 3.0]) {
        matrix.row(39, &mut out);
        assert_eq!(out, [39.0 * factor; 999]);
        assert_eq!(matrix.bytes(), 3 * 500 * 64);
    }
    assert_eq!(Bf16Matrix::packed_bytes(0, 4), None);
    assert_eq!(Bf16Matrix::packed_bytes(4, 0), None);
    assert_eq!(Bf16Matrix::packed_bytes(usize::MAX, 40), None);
}

#[test]
fn packing_refuses_what_it_cannot_hold() {
    let team = Team::new(3).unwrap();
    let from_rows = |rows, columns| {
        let fill = |_: usize, out: &mut [f32]| out.fill(1.0);
        Bf16Matrix::from_rows_in(&mut Region::default(), &team, rows, columns, fill).map(|_| ())
    };
    assert!(matches!(
        from_rows(0, 4),
        Err(PackError::Empty {
            rows: 0,
            columns: 4
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
    // The last is finite, but not as a bf16.
    for bad in [f32::NAN, f32::NEG_INFINITY, 3.4e38] {
        let mut w = vec![1.0; 200 * 41];
        w[70 * 41 + 40] = bad;
        w[150 * 41 + 40] = bad;
        assert!(matches!(
            pack(&team, &w, 41),
            Err(PackError::NotFinite { row: 70 })
        ));
    }
}

#[test]
#[should_panic(expected = "x.rows() * w.rows()")]
fn a_short_output_panics() {
    let team = Team::new(1).unwrap();
    let w = pack(&team, &[1.0; 4 * 32], 32).unwrap();
    let mut x = Bf16Rows::with_capacity(2, 32);
    x.round(&team, &[1.0; 64], 32);
    matmul_bf16(&team, &x, &w, &mut [0.0; 7]);
}

#[test]
#[should_panic(expected = "columns")]
fn different_columns_panic() {
    let team = Team::new(1).unwrap();
    let w = pack(&team, &[1.0; 4 * 33], 33).unwrap();
    let mut x = Bf16Rows::with_capacity(1, 32);
    x.round(&team, &[1.0; 32], 32);
    matmul_bf16(&team, &x, &w, &mut [0.0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_gives_the_documented_bits(
        m in 1usize..60, n in 1usize..120, k in 1usize..200, threads in 1usize..9, seed: u64
    ) {
        let mut random = Random(seed);
        let (x, w) = (random.vector(m * k), random.vector(n * k));
        let expected = Expected::new(&x, &w, k);
        for isa in Isa::available() {
            let team = Team::with_isa(threads, isa).unwrap();
            check(&team, &x, &pack(&team, &w, k).unwrap(), &expected, "");
        }
    }
}
