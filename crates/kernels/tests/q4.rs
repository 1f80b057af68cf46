//! 4-bit weights against a plain implementation of what `q4` documents, and against the same weights in
//! 8 bits.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::mem::{Purpose, Region};
use casemate_kernels::q4::{Encoding, Q4Matrix, matmul_q4, matmul_q4_in};
use casemate_kernels::q8::{PackError, Q8Matrix, Q8Rows, matmul_q8, matmul_q8_in};
use casemate_kernels::team::Team;
use half::f16;
use proptest::prelude::*;
use support::{Random, assert_same_bits, describe, teams};

const GROUP: usize = 32;
const ALL: [Encoding; 3] = [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q4K];

/// One group of 32 weights: w = scale * q + offset.
#[derive(Clone, Default)]
struct Group {
    q: Vec<i32>,
    scale: f32,
    offset: f32,
    /// As the file's own reader computes them.
    values: Vec<f32>,
}

/// A row as a file holds it, and what it means.
struct Row {
    bytes: Vec<u8>,
    groups: Vec<Group>,
}

fn half(random: &mut Random, limit: f32) -> f16 {
    f16::from_f32(random.unit() * limit)
}

/// 32 nibbles as Q4_0 and Q4_1 hold them.
fn nibbles(n: &[u8]) -> Vec<u8> {
    (0..16).map(|i| n[i] | n[i + 16] << 4).collect()
}

/// A row of random blocks, extremes among the nibbles.
fn row(random: &mut Random, encoding: Encoding, columns: usize) -> Row {
    let mut bytes = vec![];
    let mut groups = vec![];
    let numbers = |random: &mut Random| -> Vec<u8> {
        let number = |random: &mut Random| match random.below(6) {
            0 => 0,
            1 => 15,
            _ => random.below(16) as u8,
        };
        (0..GROUP).map(|_| number(random)).collect()
    };
    for _ in 0..columns / encoding.block_columns() {
        let (d, m) = (half(random, 0.1), half(random, 1.0));
        bytes.extend(d.to_le_bytes());
        let (d, low) = (d.to_f32(), m.to_f32());
        match encoding {
            Encoding::Q4_0 => {
                let n = numbers(random);
                bytes.extend(nibbles(&n));
                groups.push(Group {
                    q: n.iter().map(|n| i32::from(*n) - 8).collect(),
                    scale: d,
                    offset: 0.0,
                    values: n.iter().map(|n| d * (f32::from(*n) - 8.0)).collect(),
                });
            }
            Encoding::Q4_1 => {
                let n = numbers(random);
                bytes.extend(m.to_le_bytes());
                bytes.extend(nibbles(&n));
                groups.push(Group {
                    q: n.iter().map(|n| i32::from(*n)).collect(),
                    scale: d,
                    offset: low,
                    values: n.iter().map(|n| d * f32::from(*n) + low).collect(),
                });
            }
            Encoding::Q4K => {
                bytes.extend(m.to_le_bytes());
                let six: Vec<(u8, u8)> = (0..8)
                    .map(|_| (random.below(64) as u8, random.below(64) as u8))
                    .collect();
                let mut packed = [0u8; 12];
                for (g, (scale, minimum)) in six.iter().enumerate() {
                    if g < 4 {
                        packed[g] |= scale;
                        packed[g + 4] |= minimum;
                    } else {
                        packed[g + 4] |= scale & 15 | minimum << 4;
                        packed[g - 4] |= scale >> 4 << 6;
                        packed[g] |= minimum >> 4 << 6;
                    }
                }
                bytes.extend(packed);
                let all: Vec<Vec<u8>> = (0..8).map(|_| numbers(random)).collect();
                for pair in all.chunks(2) {
                    bytes.extend(pair[0].iter().zip(&pair[1]).map(|(a, b)| a | b << 4));
                }
                for (n, (scale, minimum)) in all.iter().zip(six) {
                    let (scale, minimum) = (d * f32::from(scale), low * f32::from(minimum));
                    groups.push(Group {
                        q: n.iter().map(|n| i32::from(*n)).collect(),
                        scale,
                        offset: -minimum,
                        values: n.iter().map(|n| scale * f32::from(*n) - minimum).collect(),
                    });
                }
            }
        }
    }
    Row { bytes, groups }
}

fn rows(random: &mut Random, encoding: Encoding, n: usize, columns: usize) -> Vec<Row> {
    (0..n).map(|_| row(random, encoding, columns)).collect()
}

fn pack(team: &Team, encoding: Encoding, rows: &[Row]) -> Result<Q4Matrix, PackError> {
    let columns = rows[0].bytes.len() / encoding.block_bytes() * encoding.block_columns();
    let row = |i: usize| &rows[i].bytes[..];
    let shape = (rows.len(), columns);
    Q4Matrix::from_blocks_in(&mut Region::default(), team, encoding, shape, row)
}

/// The documented quantisation of a row of activations, group by group.
fn quantise(row: &[f32]) -> Vec<(Vec<i32>, f32)> {
    let group = |group: &[f32]| {
        let largest = group.iter().fold(0f32, |a, x| a.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = 1.0 / scale;
        let quant = |x: &f32| (x * inverse).round_ties_even() as i32;
        (group.iter().map(quant).collect(), scale)
    };
    row.chunks(GROUP).map(group).collect()
}

/// The documented product.
fn product(x: &[(Vec<i32>, f32)], w: &Row, encoding: Encoding) -> f32 {
    x.iter().zip(&w.groups).fold(0.0, |sum, ((x, xscale), w)| {
        let dot: i32 = x.iter().zip(&w.q).map(|(x, q)| x * q).sum();
        let sum = (dot as f32).mul_add(w.scale * xscale, sum);
        if encoding == Encoding::Q4_0 {
            return sum;
        }
        let total: i32 = x.iter().sum();
        w.offset.mul_add(xscale * total as f32, sum)
    })
}

fn expected(x: &[f32], columns: usize, w: &[Row], encoding: Encoding) -> Vec<f32> {
    x.chunks(columns)
        .map(quantise)
        .flat_map(|x| w.iter().map(move |w| product(&x, w, encoding)))
        .collect()
}

fn activations(team: &Team, x: &[f32], columns: usize) -> Q8Rows {
    let mut rows = Q8Rows::with_capacity(0, columns);
    rows.quantise(team, x, columns);
    rows
}

fn multiply(team: &Team, x: &[f32], w: &Q4Matrix) -> Vec<f32> {
    let rows = activations(team, x, w.columns());
    let mut y = vec![f32::NAN; rows.rows() * w.rows()];
    matmul_q4(team, &rows, w, &mut y);
    y
}

#[test]
fn product_has_the_documented_bits_on_every_isa_thread_count_and_batch() {
    let teams = teams();
    let mut random = Random(1);
    for encoding in ALL {
        // Rows of weights around tiles and halves of tiles.
        for (n, blocks) in [
            (1, 1),
            (15, 2),
            (16, 1),
            (17, 3),
            (31, 1),
            (32, 2),
            (33, 1),
            (100, 3),
        ] {
            let k = blocks * encoding.block_columns();
            let rows = rows(&mut random, encoding, n, k);
            for m in [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 25] {
                let x = random.vector(m * k);
                let expected = expected(&x, k, &rows, encoding);
                for team in &teams {
                    let w = pack(team, encoding, &rows).unwrap();
                    let what = format!("{} {encoding:?} m={m} n={n} k={k}", describe(team));
                    assert_same_bits(&multiply(team, &x, &w), &expected, &what);
                }
            }
        }
    }
}

#[test]
fn rows_hold_exactly_what_the_file_means() {
    let team = Team::new(2).unwrap();
    let mut random = Random(2);
    for encoding in ALL {
        let k = 3 * encoding.block_columns();
        let rows = rows(&mut random, encoding, 37, k);
        let w = pack(&team, encoding, &rows).unwrap();
        assert_eq!((w.rows(), w.columns(), w.encoding()), (37, k, encoding));
        let mut out = vec![f32::NAN; k];
        for (i, row) in rows.iter().enumerate() {
            w.row(i, &mut out);
            let values: Vec<f32> = row.groups.iter().flat_map(|g| g.values.clone()).collect();
            assert_same_bits(&out, &values, &format!("{encoding:?} row {i}"));
        }
    }
}

/// Q4_0 is Q8_0 with small numbers, so both kernels must agree to the bit.
#[test]
fn the_same_weights_in_8_bits_give_the_same_bits() {
    let mut random = Random(3);
    let rows = rows(&mut random, Encoding::Q4_0, 70, 96);
    let wide: Vec<Vec<u8>> = rows
        .iter()
        .map(|row| {
            let block = |g: &Group| {
                let d = f16::from_f32(g.scale).to_le_bytes();
                let q: Vec<u8> = g.q.iter().map(|q| *q as i8 as u8).collect();
                [&d[..], &q].concat()
            };
            row.groups.iter().flat_map(block).collect()
        })
        .collect();
    for team in teams() {
        let w = pack(&team, Encoding::Q4_0, &rows).unwrap();
        let wide = Q8Matrix::from_q8_0(&team, 70, 96, |i| &wide[i]).unwrap();
        for m in [1, 7] {
            let x = random.vector(m * 96);
            let mut y = vec![f32::NAN; m * 70];
            matmul_q8(&team, &activations(&team, &x, 96), &wide, &mut y);
            assert_same_bits(&multiply(&team, &x, &w), &y, &describe(&team));
        }
    }
}

#[test]
fn matrices_of_several_encodings_fill_the_columns_of_one_product() {
    let mut random = Random(4);
    let (m, k) = (9, 256);
    let x = random.vector(m * k);
    let parts: Vec<(Encoding, Vec<Row>)> = ALL
        .iter()
        .zip([40, 33, 7])
        .map(|(encoding, n)| (*encoding, rows(&mut random, *encoding, n, k)))
        .collect();
    let eight = random.vector(5 * k);
    for team in teams() {
        let fill = |i: usize, out: &mut [f32]| out.copy_from_slice(&eight[i * k..][..k]);
        let last = Q8Matrix::from_rows(&team, 5, k, fill).unwrap();
        let quantised = activations(&team, &x, k);
        let width = 40 + 33 + 7 + 5;
        let mut y = vec![f32::NAN; m * width];
        let mut first = 0;
        for (encoding, rows) in &parts {
            let w = pack(&team, *encoding, rows).unwrap();
            matmul_q4_in(&team, &quantised, &w, &mut y, width, first);
            let expected = expected(&x, k, rows, *encoding);
            for (y, expected) in y.chunks(width).zip(expected.chunks(rows.len())) {
                assert_same_bits(&y[first..][..rows.len()], expected, &describe(&team));
            }
            first += rows.len();
        }
        matmul_q8_in(&team, &quantised, &last, &mut y, width, first);
        let mut alone = vec![f32::NAN; m * 5];
        matmul_q8(&team, &quantised, &last, &mut alone);
        for (i, y) in y.chunks(width).enumerate() {
            assert_same_bits(&y[first..], &alone[i * 5..][..5], &describe(&team));
            assert!(
                y.iter().all(|y| y.is_finite()),
                "the parts before are whole"
            );
        }
    }
}

#[test]
fn nan_and_infinite_activations_show_in_their_row_only() {
    let mut random = Random(5);
    for encoding in ALL {
        let rows = rows(&mut random, encoding, 40, 256);
        for team in teams() {
            let w = pack(&team, encoding, &rows).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0; 3 * 256];
                x[256 + 140] = bad;
                let y = multiply(&team, &x, &w);
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
fn memory_is_that_of_the_file_and_comes_from_the_arena() {
    let team = Team::new(2).unwrap();
    // 64 rows of 256: bytes of a block, in the file and here.
    for (encoding, file, here) in [
        (Encoding::Q4_0, 8 * 18, 8 * 18),
        (Encoding::Q4_1, 8 * 20, 8 * 20),
        (Encoding::Q4K, 144, 148),
    ] {
        let per_row = 256 / encoding.block_columns() * encoding.block_bytes();
        assert_eq!(per_row, file);
        let rows = rows(&mut Random(6), encoding, 64, 256);
        let bytes = Q4Matrix::packed_bytes(encoding, 64, 256).unwrap();
        assert_eq!(bytes, (64usize * here).next_multiple_of(4096));
        let mut arena = Region::zeroed(bytes, Purpose::Weights).unwrap();
        let w =
            Q4Matrix::from_blocks_in(
                &mut arena,
                &team,
                encoding,
                (64, 256),
                |i| &rows[i].bytes[..],
            )
            .unwrap();
        assert_eq!((arena.len(), w.bytes()), (0, 64 * here));
        assert_eq!(Q4Matrix::packed_bytes(encoding, 0, 256), None);
        assert_eq!(Q4Matrix::packed_bytes(encoding, usize::MAX, 256), None);
    }
}

#[test]
fn packing_refuses_what_it_cannot_hold() {
    let team = Team::new(3).unwrap();
    let make = |encoding, shape, bytes: &[u8]| {
        Q4Matrix::from_blocks_in(&mut Region::default(), &team, encoding, shape, |_| bytes)
            .map(|_| ())
    };
    for encoding in ALL {
        let (columns, bytes) = (encoding.block_columns(), encoding.block_bytes());
        let block = vec![0; bytes];
        assert!(make(encoding, (40, columns), &block).is_ok());
        assert!(matches!(
            make(encoding, (0, columns), &block),
            Err(PackError::Empty { rows: 0, .. })
        ));
        assert!(matches!(
            make(encoding, (4, 0), &block),
            Err(PackError::Empty { columns: 0, .. })
        ));
        match make(encoding, (4, columns + 16), &block) {
            Err(PackError::PartialBlock { columns: c, block }) => {
                assert_eq!((c, block), (columns + 16, columns));
            }
            other => panic!("{other:?}"),
        }
        match make(encoding, (4, 2 * columns), &block) {
            Err(PackError::RowLength {
                row: 0,
                expected,
                found,
            }) => assert_eq!((expected, found), (2 * bytes, bytes)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            make(encoding, (usize::MAX, columns), &block),
            Err(PackError::TooLarge { .. })
        ));
        assert!(matches!(
            make(encoding, (1 << 45, 1024), &block),
            Err(PackError::Memory(_))
        ));
        let numbers = if encoding == Encoding::Q4_0 { 1 } else { 2 };
        for at in 0..numbers {
            let mut bad = block.clone();
            bad[2 * at..][..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
            let row = |i: usize| if i == 70 || i == 150 { &bad } else { &block };
            let shape = (200, columns);
            let packed =
                Q4Matrix::from_blocks_in(&mut Region::default(), &team, encoding, shape, |i| {
                    &row(i)[..]
                });
            assert!(matches!(packed, Err(PackError::NotFinite { row: 70 })));
        }
    }
}

#[test]
#[should_panic(expected = "x.rows() * w.rows()")]
fn a_short_output_panics() {
    let team = Team::new(1).unwrap();
    let w = pack(
        &team,
        Encoding::Q4_0,
        &rows(&mut Random(7), Encoding::Q4_0, 4, 32),
    )
    .unwrap();
    matmul_q4(
        &team,
        &activations(&team, &[1.0; 64], 32),
        &w,
        &mut [0.0; 7],
    );
}

#[test]
#[should_panic(expected = "do not fit")]
fn columns_beyond_the_width_panic() {
    let team = Team::new(1).unwrap();
    let w = pack(
        &team,
        Encoding::Q4_0,
        &rows(&mut Random(7), Encoding::Q4_0, 4, 32),
    )
    .unwrap();
    let x = activations(&team, &[1.0; 64], 32);
    matmul_q4_in(&team, &x, &w, &mut [0.0; 12], 6, 3);
}

#[test]
#[should_panic(expected = "differ in columns")]
fn different_columns_panic() {
    let team = Team::new(1).unwrap();
    let w = pack(
        &team,
        Encoding::Q4_0,
        &rows(&mut Random(7), Encoding::Q4_0, 4, 64),
    )
    .unwrap();
    matmul_q4(
        &team,
        &activations(&team, &[1.0; 32], 32),
        &w,
        &mut [0.0; 4],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_shape_gives_the_documented_bits(
        m in 1usize..30, n in 1usize..100, blocks in 1usize..6, threads in 1usize..9, seed: u64
    ) {
        let mut random = Random(seed);
        for encoding in ALL {
            let k = encoding.block_columns() * if encoding == Encoding::Q4K { 1 } else { blocks };
            let rows = rows(&mut random, encoding, n, k);
            let x = random.vector(m * k);
            let expected = expected(&x, k, &rows, encoding);
            for isa in Isa::available() {
                let team = Team::with_isa(threads, isa).unwrap();
                let w = pack(&team, encoding, &rows).unwrap();
                assert_same_bits(&multiply(&team, &x, &w), &expected, &describe(&team));
            }
        }
    }
}
