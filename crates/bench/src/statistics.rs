//! Figures of repeated measurements: outliers dropped and counted, medians, quantiles, intervals. Pure functions; random
//! numbers for resampling come from a seed, so that the same samples give the same report.

use casemate_report::quantile;
use serde::{Deserialize, Serialize};

/// Standard deviations beyond which a sample is an outlier, as in the paper's protocol.
pub(crate) const OUTLIER_Z: f64 = 3.0;
/// Resamplings behind an interval of a median.
const RESAMPLINGS: usize = 2000;

/// What a series of samples says, after its outliers were dropped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// Samples that count.
    pub(crate) count: usize,
    /// Samples with |Z| > 3, which do not.
    pub(crate) dropped: usize,
    pub(crate) mean: f64,
    /// Of the sample (n - 1); 0 for a single one.
    pub(crate) deviation: f64,
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) most: f64,
    /// 95 % interval of the median, by resampling.
    pub(crate) median_low: f64,
    pub(crate) median_high: f64,
}

impl Summary {
    /// Of `samples`; nothing where there are none, or where one is not finite.
    pub(crate) fn of(samples: &[f64]) -> Option<Summary> {
        if samples.is_empty() || samples.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let (mut kept, dropped) = without_outliers(samples);
        kept.sort_by(f64::total_cmp);
        let (median_low, median_high) = median_interval(&kept);
        Some(Summary {
            count: kept.len(),
            dropped,
            mean: mean(&kept),
            deviation: deviation(&kept),
            least: kept[0],
            median: quantile(&kept, 0.5),
            p95: quantile(&kept, 0.95),
            p99: quantile(&kept, 0.99),
            most: kept[kept.len() - 1],
            median_low,
            median_high,
        })
    }
}

/// The samples within [`OUTLIER_Z`] standard deviations of the mean of all of them, and how many lie beyond. Once, not
/// repeated until none is left: dropping makes the deviation smaller, and in the end nothing but the mean would remain.
pub(crate) fn without_outliers(samples: &[f64]) -> (Vec<f64>, usize) {
    let (mean, deviation) = (mean(samples), deviation(samples));
    let kept: Vec<f64> = samples
        .iter()
        .copied()
        .filter(|x| (x - mean).abs() <= OUTLIER_Z * deviation)
        .collect();
    let dropped = samples.len() - kept.len();
    (kept, dropped)
}

/// Arithmetic mean; 0 of nothing.
pub(crate) fn mean(samples: &[f64]) -> f64 {
    match samples.len() {
        0 => 0.0,
        n => samples.iter().sum::<f64>() / n as f64,
    }
}

/// Standard deviation of a sample (n - 1); 0 for fewer than two.
pub(crate) fn deviation(samples: &[f64]) -> f64 {
    if samples.len() < 2 {
        return 0.0;
    }
    let mean = mean(samples);
    let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (samples.len() - 1) as f64).sqrt()
}

/// Median in any order; 0 of nothing.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

/// 95 % interval of the median of sorted samples: the same number drawn with replacement, many times.
fn median_interval(sorted: &[f64]) -> (f64, f64) {
    let mut random = Random(0x5eed);
    let mut drawn = vec![0.0; sorted.len()];
    let mut medians: Vec<f64> = (0..RESAMPLINGS)
        .map(|_| {
            for slot in &mut drawn {
                *slot = sorted[random.below(sorted.len())];
            }
            let middle = drawn.len() / 2;
            let (lower, &mut above, _) = drawn.select_nth_unstable_by(middle, f64::total_cmp);
            match sorted.len() % 2 {
                1 => above,
                _ => lower
                    .iter()
                    .copied()
                    .fold(f64::MIN, f64::max)
                    .midpoint(above),
            }
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    (quantile(&medians, 0.025), quantile(&medians, 0.975))
}

/// A ratio of paired measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) pairs: usize,
    /// Geometric mean.
    pub(crate) mean: f64,
    /// Ends of its 95 % interval.
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// The first of each pair over the second, by Student's t on the logarithms. Nothing for fewer than two pairs or where a
/// time is not positive.
pub(crate) fn paired_ratio(pairs: &[(f64, f64)]) -> Option<Ratio> {
    let positive = |x: f64| x.is_finite() && x > 0.0;
    if pairs.len() < 2 || !pairs.iter().all(|&(a, b)| positive(a) && positive(b)) {
        return None;
    }
    let logs: Vec<f64> = pairs.iter().map(|(a, b)| (a / b).ln()).collect();
    let mean = mean(&logs);
    let half = student_975(logs.len() - 1) * deviation(&logs) / (logs.len() as f64).sqrt();
    Some(Ratio {
        pairs: pairs.len(),
        mean: mean.exp(),
        low: (mean - half).exp(),
        high: (mean + half).exp(),
    })
}

/// 97.5 % quantile of Student's t: a table, then Fisher's expansion around the normal one (within 0.001).
fn student_975(freedom: usize) -> f64 {
    const TABLE: [f64; 10] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    ];
    if let Some(t) = freedom.checked_sub(1).and_then(|i| TABLE.get(i)) {
        return *t;
    }
    let (z, n) = (1.959_964_f64, freedom as f64);
    z + (z.powi(3) + z) / (4.0 * n)
        + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * n.powi(2))
        + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * n.powi(3))
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(z ^ (z >> 31)) * n as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_are_dropped_once_and_counted() {
        let mut samples: Vec<f64> = (0..100).map(|i| 10.0 + f64::from(i % 5)).collect();
        samples.push(1000.0);
        let (kept, dropped) = without_outliers(&samples);
        assert_eq!((kept.len(), dropped), (100, 1));
        // Within ten samples none can lie beyond three deviations, however far away it is.
        let few: Vec<f64> = [1.0; 9].into_iter().chain([1e9]).collect();
        assert_eq!(without_outliers(&few).1, 0);
        assert_eq!(without_outliers(&[5.0; 50]), (vec![5.0; 50], 0));
        let summary = Summary::of(&samples).unwrap();
        assert_eq!(
            (summary.count, summary.dropped, summary.most),
            (100, 1, 14.0)
        );
    }

    #[test]
    fn quantiles_are_linear_between_neighbours() {
        let sorted = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(quantile(&sorted, 0.0), 1.0);
        assert_eq!(quantile(&sorted, 0.5), 2.5);
        assert_eq!(quantile(&sorted, 1.0), 4.0);
        assert!((quantile(&sorted, 0.95) - 3.85).abs() < 1e-12);
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[1.0, 9.0, 2.0, 4.0]), 3.0);
    }

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert!((deviation(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) - 2.138_089_9).abs() < 1e-6);
        assert_eq!((deviation(&[3.0]), deviation(&[])), (0.0, 0.0));
    }

    #[test]
    fn what_cannot_be_summed_up_has_no_summary() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
        let one = Summary::of(&[4.0]).unwrap();
        assert_eq!(
            (one.median, one.median_low, one.median_high),
            (4.0, 4.0, 4.0)
        );
    }

    #[test]
    fn the_interval_of_the_median_holds_it_and_narrows() {
        let spread = |n: usize| {
            let samples: Vec<f64> = (0..n).map(|i| ((i * 7919) % n) as f64 / n as f64).collect();
            let s = Summary::of(&samples).unwrap();
            assert!(s.median_low <= s.median && s.median <= s.median_high);
            assert_eq!(Summary::of(&samples), Some(s.clone()), "the seed is fixed");
            s.median_high - s.median_low
        };
        let (few, many) = (spread(20), spread(1000));
        // The median of n uniform samples has a deviation of about 1 / (2 sqrt(n)).
        assert!((0.2..0.7).contains(&few), "{few}");
        assert!((0.03..0.1).contains(&many), "{many}");
    }

    #[test]
    fn ratios_are_of_pairs_with_students_interval() {
        let pairs: Vec<(f64, f64)> = (0..20)
            .map(|i| (1.1 * f64::from(i + 1), f64::from(i + 1)))
            .collect();
        let exact = paired_ratio(&pairs).unwrap();
        assert!((exact.mean - 1.1).abs() < 1e-9 && (exact.high - exact.low).abs() < 1e-9);
        let noisy = [(1.0, 1.0), (1.2, 1.0), (0.9, 1.0), (1.1, 1.0)];
        let ratio = paired_ratio(&noisy).unwrap();
        // By hand: logarithms 0, 0.18232, -0.10536, 0.09531; mean 0.04307, deviation 0.12435; t(3) = 3.182.
        assert!((ratio.mean - 1.044_01).abs() < 1e-4, "{ratio:?}");
        assert!((ratio.high / ratio.mean - (3.182f64 * 0.124_35 / 2.0).exp()).abs() < 1e-3);
        assert_eq!(paired_ratio(&noisy[..1]), None);
        assert_eq!(paired_ratio(&[(1.0, 0.0), (1.0, 1.0)]), None);
    }

    #[test]
    fn students_t_is_that_of_the_tables() {
        for (freedom, t) in [
            (1, 12.706),
            (10, 2.228),
            (11, 2.201),
            (19, 2.093),
            (39, 2.023),
            (1000, 1.962),
        ] {
            assert!((student_975(freedom) - t).abs() < 2e-3, "{freedom}");
        }
    }
}
