//! What tests of this crate share: numbers from a seed, matrices, products by the definition.

use casemate_field::Field;
use casemate_kernels::mem::Region;
use casemate_kernels::panels::Int8Matrix;
use casemate_kernels::team::Team;

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// From -127 to 127.
    pub(crate) fn row(&mut self, length: usize) -> Vec<i8> {
        (0..length)
            .map(|_| (self.below(255) as i64 - 127) as i8)
            .collect()
    }

    /// A matrix of random weights.
    pub(crate) fn matrix(&mut self, rows: usize, columns: usize) -> Int8Matrix {
        packed(&self.row(rows * columns), rows, columns)
    }
}

/// A matrix of these weights.
pub(crate) fn packed(weights: &[i8], rows: usize, columns: usize) -> Int8Matrix {
    let team = Team::new(1).unwrap();
    let row = |i: usize| (&weights[i * columns..(i + 1) * columns], 0.5);
    Int8Matrix::from_int8_in(&mut Region::default(), &team, rows, columns, row).unwrap()
}

/// W·x modulo p, as it is defined.
pub(crate) fn product(field: Field, weights: &Int8Matrix, x: &[u32]) -> Vec<u32> {
    let p = i128::from(field.modulus());
    let mut row = vec![0; weights.columns()];
    (0..weights.rows())
        .map(|i| {
            weights.row(i, &mut row);
            let terms = row
                .iter()
                .zip(x)
                .map(|(w, x)| i128::from(*w) * i128::from(*x));
            terms.sum::<i128>().rem_euclid(p) as u32
        })
        .collect()
}
