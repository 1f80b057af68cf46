//! Figures of paired runs.

use std::time::Duration;

/// A ratio with its 95 % interval.
pub(crate) struct Ratio {
    /// Geometric mean.
    pub(crate) mean: f64,
    /// Lower end.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
}

/// The first of each pair over the second, by Student's t on the logarithms.
pub(crate) fn paired_ratio(pairs: &[(Duration, Duration)]) -> Ratio {
    let logs: Vec<f64> = pairs
        .iter()
        .map(|(ours, theirs)| (ours.as_secs_f64() / theirs.as_secs_f64()).ln())
        .collect();
    let n = logs.len() as f64;
    let mean = logs.iter().sum::<f64>() / n;
    let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (n - 1.0);
    // The quantile for 20 pairs; for more it is smaller.
    let half = 2.093 * (variance / n).sqrt();
    Ratio {
        mean: mean.exp(),
        low: (mean - half).exp(),
        high: (mean + half).exp(),
    }
}

/// The median in milliseconds.
pub(crate) fn median_ms(times: impl Iterator<Item = Duration>) -> f64 {
    let mut times: Vec<_> = times.collect();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}
