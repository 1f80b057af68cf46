//! Frequencies of the rotary position embedding, with the scalings of long-context models. Tables
//! of angles and the rotation itself are the kernels'.

use std::f64::consts::TAU;

use casemate_container::RopeScaling;

/// Frequencies in radians per position for each pair of a head's dimensions.
///
/// `factors` (the tensor `rope_freqs.weight`) divides each frequency; it is how GGUF files carry
/// the Llama-3 scaling.
pub(crate) fn frequencies(
    head_dim: usize,
    theta: f32,
    scaling: &RopeScaling,
    factors: Option<&[f32]>,
) -> Vec<f32> {
    (0..head_dim / 2)
        .map(|pair| {
            let frequency = f64::from(theta).powf(-2.0 * pair as f64 / head_dim as f64);
            let frequency = match factors {
                Some(factors) => frequency / f64::from(factors[pair]),
                None => frequency,
            };
            scale(frequency, scaling) as f32
        })
        .collect()
}

fn scale(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / f64::from(factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let (factor, low, high) = (
                f64::from(factor),
                f64::from(low_freq_factor),
                f64::from(high_freq_factor),
            );
            // How often the pair turns within the context it was trained on: fast ones stay, slow
            // ones stretch.
            let turns = f64::from(original_context) * frequency / TAU;
            if turns > high {
                frequency
            } else if turns < low {
                frequency / factor
            } else {
                let keep = (turns - low) / (high - low);
                (1.0 - keep) * frequency / factor + keep * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_fall_geometrically() {
        let f = frequencies(8, 10_000.0, &RopeScaling::None, None);
        for (found, expected) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((found - expected).abs() < 1e-9, "{f:?}");
        }
        let linear = frequencies(8, 10_000.0, &RopeScaling::Linear { factor: 4.0 }, None);
        assert!(
            linear
                .iter()
                .zip(&f)
                .all(|(a, b)| (a * 4.0 - b).abs() < 1e-9)
        );
    }

    #[test]
    fn llama3_keeps_fast_and_stretches_slow_pairs() {
        // Llama-3.2-1B; the expected ratios follow the published formula in wavelengths.
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = frequencies(64, 500_000.0, &RopeScaling::None, None);
        let scaled = frequencies(64, 500_000.0, &scaling, None);
        let mut branches = [0; 3];
        for (plain, scaled) in plain.iter().zip(&scaled) {
            let wavelength = TAU / f64::from(*plain);
            let ratio = f64::from(*scaled) / f64::from(*plain);
            let (branch, expected) = if wavelength < 2048.0 {
                (0, 1.0)
            } else if wavelength > 8192.0 {
                (1, 1.0 / 32.0)
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (2, (1.0 - smooth) / 32.0 + smooth)
            };
            branches[branch] += 1;
            assert!((ratio - expected).abs() < 1e-6, "wavelength {wavelength}");
        }
        assert!(
            branches.iter().all(|&n| n > 0),
            "all three branches are exercised: {branches:?}"
        );
    }

    #[test]
    fn a_factor_tensor_equals_the_scaling_it_was_made_from() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = frequencies(128, 500_000.0, &RopeScaling::None, None);
        let scaled = frequencies(128, 500_000.0, &scaling, None);
        let factors: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
        let by_tensor = frequencies(128, 500_000.0, &RopeScaling::None, Some(&factors));
        assert!(
            by_tensor
                .iter()
                .zip(&scaled)
                .all(|(a, b)| (a / b - 1.0).abs() < 1e-6)
        );
    }
}
