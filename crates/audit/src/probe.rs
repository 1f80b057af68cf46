//! A classifier that tries to read tokens off the rows that a worker saw. Logistic regression over classes, trained by
//! gradient descent: it finds whatever depends linearly on a row, and finds nothing in uniform noise. The same classifier
//! is given the same rows without pads, so that its finding nothing means something.

use serde::{Deserialize, Serialize};

/// How far each step goes.
const RATE: f32 = 0.5;
/// Times that all rows are gone through.
const ROUNDS: usize = 40;

/// What the probe found in rows that it was not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// Rows that it was tried on.
    pub(crate) rows: usize,
    /// Share of them that it named rightly.
    pub(crate) right: f64,
    /// Share that naming the most frequent class always would have.
    pub(crate) by_chance: f64,
}

/// Trains on every second row, and tries on the others. A label is below `classes`.
pub(crate) fn probe(rows: &[Vec<f32>], labels: &[usize], classes: usize) -> Found {
    let scaled = scaled(rows);
    let features = scaled.first().map_or(0, Vec::len);
    let mut weights = vec![vec![0f32; features + 1]; classes];
    let split = |rest: usize| {
        let both = scaled.iter().zip(labels);
        both.skip(rest).step_by(2)
    };
    let trained = split(0).count().max(1);
    for _ in 0..ROUNDS {
        let mut step = vec![vec![0f32; features + 1]; classes];
        for (row, &label) in split(0) {
            let likely = softmax(&scores(&weights, row));
            for (class, step) in step.iter_mut().enumerate() {
                let error = likely[class] - f32::from(u8::from(class == label));
                for (step, x) in step.iter_mut().zip(row.iter().chain([&1.0])) {
                    *step += error * x;
                }
            }
        }
        for (weights, step) in weights.iter_mut().zip(&step) {
            for (weight, step) in weights.iter_mut().zip(step) {
                *weight -= RATE * step / trained as f32;
            }
        }
    }
    let tried = split(1).count();
    let named = |row: &[f32]| crate::metrics::top(&scores(&weights, row));
    let right = split(1)
        .filter(|(row, label)| named(row) == **label)
        .count();
    let of = |class: usize| split(1).filter(|(_, label)| **label == class).count();
    let most = (0..classes).map(of).max().unwrap_or(0);
    let share = |count: usize| count as f64 / tried.max(1) as f64;
    Found {
        rows: tried,
        right: share(right),
        by_chance: share(most),
    }
}

/// Each feature with mean 0 and variance 1.
fn scaled(rows: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let count = rows.len().max(1) as f32;
    let features = rows.first().map_or(0, Vec::len);
    let column = |at: usize| rows.iter().map(move |row| row[at]);
    let scale: Vec<(f32, f32)> = (0..features)
        .map(|at| {
            let mean = column(at).sum::<f32>() / count;
            let variance = column(at).map(|x| (x - mean).powi(2)).sum::<f32>() / count;
            (mean, variance.sqrt().max(1e-6))
        })
        .collect();
    let scaled = |row: &Vec<f32>| {
        let both = row.iter().zip(&scale);
        both.map(|(x, (mean, deviation))| (x - mean) / deviation)
            .collect()
    };
    rows.iter().map(scaled).collect()
}

fn scores(weights: &[Vec<f32>], row: &[f32]) -> Vec<f32> {
    let score = |weights: &Vec<f32>| {
        let inputs = row.iter().chain([&1.0]);
        weights.iter().zip(inputs).map(|(w, x)| w * x).sum()
    };
    weights.iter().map(score).collect()
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let logs = crate::metrics::log_softmax(scores);
    logs.into_iter().map(f32::exp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// Rows of three classes about a place each, in 8 dimensions.
    fn rows(spread: f32) -> (Vec<Vec<f32>>, Vec<usize>) {
        let mut random = Random::new(7);
        let labels: Vec<usize> = (0..600).map(|_| random.below(3)).collect();
        let row = |label: &usize| {
            let centre = |at: usize| if at % 3 == *label { 1.0 } else { 0.0 };
            (0..8)
                .map(|at| centre(at) + spread * (random.unit() as f32 - 0.5))
                .collect()
        };
        (labels.iter().map(row).collect(), labels)
    }

    #[test]
    fn it_reads_what_is_there() {
        let (rows, labels) = rows(1.0);
        let found = probe(&rows, &labels, 3);
        assert_eq!(found.rows, 300);
        assert!(found.right > 0.95 && found.by_chance < 0.45, "{found:?}");
    }

    #[test]
    fn it_finds_nothing_in_noise() {
        let (_, labels) = rows(1.0);
        let mut random = Random::new(8);
        let noise: Vec<Vec<f32>> = (0..600)
            .map(|_| (0..8).map(|_| random.unit() as f32).collect())
            .collect();
        let found = probe(&noise, &labels, 3);
        assert!(found.right < found.by_chance + 0.1, "{found:?}");
    }

    #[test]
    fn nothing_is_no_division_by_zero() {
        let found = probe(&[], &[], 3);
        assert_eq!((found.rows, found.right), (0, 0.0));
    }
}
