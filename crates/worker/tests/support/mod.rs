//! Random matrices, and their products by plain arithmetic.

#![allow(dead_code, reason = "each test program uses its part")]

use std::io::{Read, Write};

use casemate_field::Field;
use casemate_wire::{Client, Shape};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Extremes among them.
    pub(crate) fn weight(&mut self) -> i8 {
        match self.next() % 8 {
            0 => 127,
            1 => -127,
            _ => ((self.next() % 255) as i16 - 127) as i8,
        }
    }

    pub(crate) fn elements(&mut self, field: Field, count: usize) -> Vec<u32> {
        let p = u64::from(field.modulus());
        let edges = [0, 1, p - 1, p / 2, p / 2 + 1];
        let element = |x: u64| match x % 16 {
            i @ 0..5 => edges[i as usize],
            _ => (x >> 8) % p,
        };
        (0..count).map(|_| element(self.next()) as u32).collect()
    }
}

/// `x * w^T` modulo p. All terms are below 2^38 in magnitude, so 2^25 of them fit.
pub(crate) fn product(field: Field, shape: Shape, weights: &[i8], x: &[u32]) -> Vec<u32> {
    let columns = shape.columns as usize;
    let p = i64::from(field.modulus());
    let mut out = vec![];
    for x in x.chunks(columns) {
        for w in weights.chunks(columns) {
            let terms = x.iter().zip(w).map(|(x, w)| i64::from(*x) * i64::from(*w));
            out.push(terms.sum::<i64>().rem_euclid(p) as u32);
        }
    }
    out
}

/// Loads a random matrix, multiplies it with batches of random rows, and compares.
#[track_caller]
pub(crate) fn check_products<S: Read + Write>(
    client: &mut Client<S>,
    random: &mut Random,
    shape: Shape,
    batches: &[usize],
) {
    let weights: Vec<i8> = (0..shape.weights()).map(|_| random.weight()).collect();
    let columns = shape.columns as usize;
    let row =
        |i: u32, out: &mut [i8]| out.copy_from_slice(&weights[i as usize * columns..][..columns]);
    let matrix = client.load(shape, row, |_| ()).unwrap();
    for rows in batches {
        let x = random.elements(client.field(), rows * columns);
        client.multiply(matrix, &x).unwrap();
        let mut found = vec![u32::MAX; rows * shape.rows as usize];
        client.product(&mut found).unwrap();
        let expected = product(client.field(), shape, &weights, &x);
        assert!(
            found == expected,
            "{rows} rows with {shape:?} in {:?}",
            client.field()
        );
    }
}
