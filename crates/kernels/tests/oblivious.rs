//! Rows that are found by reading everything against rows that are read where they lie, and the largest number likewise.

mod support;

use casemate_kernels::cpu::Isa;
use casemate_kernels::elementwise;
use casemate_kernels::gemm::F32Matrix;
use casemate_kernels::mem::Region;
use casemate_kernels::oblivious::{AT_ONCE, Found, argmax, count_at_least, sum_at_least};
use casemate_kernels::panels::Bf16Matrix;
use casemate_kernels::q4::{Encoding, Q4Matrix};
use casemate_kernels::q8::Q8Matrix;
use casemate_kernels::softmax::exp_differences;
use casemate_kernels::team::Team;
use support::{Random, assert_same_bits, describe, emulated, teams};

/// Rows and columns: one row, whole tiles, parts of tiles and panels.
fn shapes() -> Vec<(usize, usize)> {
    match emulated() {
        true => vec![(1, 32), (70, 256)],
        false => vec![
            (1, 32),
            (16, 32),
            (33, 96),
            (70, 256),
            (100, 1056),
            (257, 288),
        ],
    }
}

/// None, one, several, the same twice, and more than are looked for at once; first and last row among them.
fn id_lists(rows: usize, random: &mut Random) -> Vec<Vec<u32>> {
    let last = rows as u32 - 1;
    let mut many: Vec<u32> = (0..2 * AT_ONCE + 3)
        .map(|_| random.below(rows) as u32)
        .collect();
    (many[0], many[AT_ONCE]) = (last, 0);
    vec![vec![], vec![last], vec![0, last, last, 0, last / 2], many]
}

fn compare(
    rows: usize,
    columns: usize,
    what: &str,
    row: impl Fn(usize, &mut [f32]),
    mut find: impl FnMut(&Team, &[u32], &mut [f32]),
) {
    let mut random = Random(rows as u64);
    for team in teams() {
        for ids in id_lists(rows, &mut random) {
            let mut expected = vec![0.0; ids.len() * columns];
            for (id, out) in ids.iter().zip(expected.chunks_mut(columns)) {
                row(*id as usize, out);
            }
            let mut found = vec![f32::NAN; ids.len() * columns];
            find(&team, &ids, &mut found);
            let what = format!(
                "{what} {rows}x{columns}, {} ids, {}",
                ids.len(),
                describe(&team)
            );
            assert_same_bits(&found, &expected, &what);
        }
    }
}

#[test]
fn rows_of_packed_matrices_are_those_at_their_places() {
    let team = Team::new(2).unwrap();
    for (rows, columns) in shapes() {
        let mut random = Random(7);
        let values = random.vector(rows * columns);
        let fill = |i: usize, out: &mut [f32]| {
            out.copy_from_slice(&values[i * columns..(i + 1) * columns]);
        };
        let q8 = Q8Matrix::from_rows(&team, rows, columns, fill).unwrap();
        let mut found = q8.found().unwrap();
        compare(
            rows,
            columns,
            "q8",
            |i, out| q8.row(i, out),
            |team, ids, out| {
                q8.find_rows(team, &mut found, ids, out);
            },
        );
        let bf16 = Bf16Matrix::from_rows_in(&mut Region::default(), &team, rows, columns, fill);
        let bf16 = bf16.unwrap();
        let mut found = bf16.found().unwrap();
        compare(
            rows,
            columns,
            "bf16",
            |i, out| bf16.row(i, out),
            |team, ids, out| {
                bf16.find_rows(team, &mut found, ids, out);
            },
        );
        let f32s = F32Matrix::from_rows(&team, rows, columns, fill).unwrap();
        let mut found = f32s.found().unwrap();
        compare(
            rows,
            columns,
            "f32",
            |i, out| f32s.row(i, out),
            |team, ids, out| {
                f32s.find_rows(team, &mut found, ids, out);
            },
        );
        for encoding in [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q4K] {
            if !columns.is_multiple_of(encoding.block_columns()) {
                continue;
            }
            let row = columns / encoding.block_columns() * encoding.block_bytes();
            let mut bytes: Vec<u8> = (0..rows * row).map(|_| random.next() as u8).collect();
            for block in bytes.chunks_mut(encoding.block_bytes()) {
                // Finite scales, of either sign.
                (block[1], block[3]) = (block[1] & 0xBF, block[3] & 0xBF);
            }
            let (shape, arena) = ((rows, columns), &mut Region::default());
            let at = |i: usize| &bytes[i * row..(i + 1) * row];
            let q4 = Q4Matrix::from_blocks_in(arena, &team, encoding, shape, at).unwrap();
            let mut found = q4.found().unwrap();
            let what = format!("{encoding:?}");
            compare(
                rows,
                columns,
                &what,
                |i, out| q4.row(i, out),
                |team, ids, out| {
                    q4.find_rows(team, &mut found, ids, out);
                },
            );
        }
    }
}

#[test]
fn rows_of_bytes_are_those_at_their_places() {
    let mut random = Random(3);
    let lengths = match emulated() {
        true => &[1, 65][..],
        false => &[1, 2, 63, 64, 65, 612, 1152, 4097],
    };
    for &row in lengths {
        for rows in [1, 3, 4, 61] {
            let table: Vec<u8> = (0..rows * row).map(|_| random.next() as u8).collect();
            let mut found = Found::of_bytes(row).unwrap();
            for team in teams() {
                for ids in id_lists(rows, &mut random) {
                    for ids in ids.chunks(AT_ONCE) {
                        let rows = found.rows_of_bytes(&team, &table, row, ids);
                        for (i, id) in ids.iter().enumerate() {
                            let expected = &table[*id as usize * row..][..row];
                            assert_eq!(rows.row(i), expected, "{row} bytes, {}", describe(&team));
                        }
                    }
                }
                let one = found.row_of_bytes(team.isa(), &table, row, rows as u32 - 1);
                assert_eq!(one, &table[(rows - 1) * row..]);
                // Nobody's id finds nothing, rather than somebody's row.
                for id in [rows as u32, u32::MAX] {
                    assert_eq!(
                        found.row_of_bytes(team.isa(), &table, row, id),
                        vec![0; row]
                    );
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "whole rows")]
fn a_table_is_whole_rows() {
    let mut found = Found::of_bytes(8).unwrap();
    found.row_of_bytes(Isa::detect(), &[0; 17], 8, 0);
}

#[test]
fn the_largest_is_the_first_of_equal_ones() {
    let mut random = Random(11);
    let mut rows: Vec<Vec<f32>> = vec![
        vec![],
        vec![f32::NAN],
        vec![f32::NEG_INFINITY; 20],
        vec![-0.0, 0.0],
        vec![0.0, -0.0],
        vec![f32::NAN, -3.0, f32::NAN, -2.0, -2.0],
        vec![f32::NEG_INFINITY, -1e38, f32::NAN],
    ];
    for length in [1, 15, 16, 17, 31, 33, 500] {
        for _ in 0..20 {
            rows.push((0..length).map(|_| random.below(9) as f32 - 4.0).collect());
        }
    }
    for isa in Isa::available() {
        for row in &rows {
            let expected = elementwise::argmax(row).unwrap_or(0) as u32;
            assert_eq!(argmax(isa, row), expected, "{isa}: {row:?}");
        }
    }
}

#[test]
fn counts_and_sums_are_of_all_that_are_large_enough() {
    let mut random = Random(12);
    for length in [0, 1, 15, 100, 70_000] {
        let bits: Vec<u32> = (0..length).map(|_| random.below(20) as u32).collect();
        let values: Vec<u64> = (0..length).map(|_| random.next() >> 20).collect();
        for isa in Isa::available() {
            for limit in [0, 1, 10, 19, 20, u32::MAX] {
                let large = |i: &usize| bits[*i] >= limit;
                let count = (0..length).filter(large).count() as u64;
                assert_eq!(count_at_least(isa, &bits, limit), count);
                let sum: u64 = (0..length).filter(large).map(|i| values[i]).sum();
                assert_eq!(sum_at_least(isa, &bits, &values, limit), sum);
            }
        }
    }
}

#[test]
fn exponentials_of_differences_are_the_same_everywhere_and_1_at_the_largest() {
    let mut random = Random(13);
    for length in [1, 16, 37] {
        let mut x = random.vector(length);
        x[length / 2] = 2.0;
        x[0] = if length > 1 { f32::NEG_INFINITY } else { 2.0 };
        for divisor in [1.0, 0.3, 1e-38] {
            let mut expected = vec![0.0; length];
            exp_differences(Isa::SCALAR, &x, 2.0, divisor, &mut expected);
            assert_eq!(expected[length / 2], 1.0);
            for (x, e) in x.iter().zip(&expected) {
                let exact = f64::from((x - 2.0) / divisor).exp();
                let exact = if exact < 1.2e-38 { 0.0 } else { exact };
                assert!(
                    (f64::from(*e) - exact).abs() <= 3e-7 * exact,
                    "{x}: {e}, {exact}"
                );
            }
            for isa in Isa::available() {
                let mut out = vec![0.0; length];
                exp_differences(isa, &x, 2.0, divisor, &mut out);
                assert_same_bits(&out, &expected, isa.name());
            }
        }
    }
}
