//! How far elements of a field are from uniform ones: what an observer of a worker would compute first.

use casemate_field::Field;

/// Which bits of an element are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// The highest.
    High,
    /// The lowest.
    Low,
}

/// Distance of the distribution over 2^`log2_bins` bins from that of uniform elements: Pearson's chi-square with each
/// bin's exact probability, in standard deviations of what uniform elements give. Too even is as suspicious as too uneven.
///
/// # Panics
/// If there are more bins than the field has bits for.
#[must_use]
pub fn chi_square(
    field: Field,
    bits: Bits,
    log2_bins: u32,
    elements: impl Iterator<Item = u32>,
) -> f64 {
    assert!(
        (1..=field.bits()).contains(&log2_bins),
        "2^{log2_bins} bins"
    );
    let bins = 1u64 << log2_bins;
    let shift = field.bits() - log2_bins;
    let (p, width) = (u64::from(field.modulus()), 1u64 << shift);
    let mut seen = vec![0u64; bins as usize];
    let mut total = 0u64;
    for x in elements {
        let bin = match bits {
            Bits::High => u64::from(x >> shift),
            Bits::Low => u64::from(x) & (bins - 1),
        };
        seen[bin as usize] += 1;
        total += 1;
    }
    let statistic: f64 = (0..bins)
        .zip(&seen)
        .map(|(bin, seen)| {
            // How many elements fall into the bin.
            let elements = match bits {
                Bits::High => p.min((bin + 1) * width) - p.min(bin * width),
                Bits::Low => (p - bin).div_ceil(bins),
            };
            let expected = total as f64 * elements as f64 / p as f64;
            (*seen as f64 - expected).powi(2) / expected
        })
        .sum();
    let freedom = (bins - 1) as f64;
    (statistic - freedom) / (2.0 * freedom).sqrt()
}

/// As many bins as this many elements fill with 32 each, at most 2^16: then [`chi_square`] is nearly normal.
#[must_use]
pub fn log2_bins(elements: usize) -> u32 {
    (elements / 32).checked_ilog2().unwrap_or(0).clamp(1, 16)
}

/// How many elements lie in each of `bins` equal parts of the field.
#[must_use]
pub fn histogram(field: Field, bins: usize, elements: impl Iterator<Item = u32>) -> Vec<u64> {
    let mut counts = vec![0; bins];
    for x in elements {
        let bin = u64::from(x) * bins as u64 / u64::from(field.modulus());
        counts[bin as usize] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements that are as uniform as 64-bit noise modulo p.
    fn noise(field: Field, count: usize) -> impl Iterator<Item = u32> {
        let mut state = 9u64;
        std::iter::repeat_with(move || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            field.reduce(z ^ (z >> 31))
        })
        .take(count)
    }

    #[test]
    fn noise_is_near_and_a_little_less_is_far() {
        for field in Field::ALL {
            for bits in [Bits::High, Bits::Low] {
                let count = 300_000;
                let bins = log2_bins(count);
                let distance = chi_square(field, bits, bins, noise(field, count));
                assert!(distance.abs() < 4.0, "{field:?} {bits:?}: {distance}");
                let short = noise(field, count).map(|x| if x % 16 == 0 { x / 2 } else { x });
                assert!(
                    chi_square(field, bits, bins, short) > 6.0,
                    "{field:?} {bits:?}"
                );
                // Every bin as full as the next: no chance does that.
                let even = (0..count as u64)
                    .map(|i| (i * u64::from(field.modulus()) / count as u64) as u32);
                if bits == Bits::High {
                    assert!(chi_square(field, bits, bins, even) < -8.0);
                }
            }
        }
    }

    #[test]
    fn parts_of_the_field_are_equal_and_cover_it() {
        let last = Field::P29.modulus() - 1;
        let ends = [0, last / 4, last / 2 + 1, last].into_iter();
        assert_eq!(histogram(Field::P29, 4, ends), [2, 0, 1, 1]);
        let counts = histogram(Field::P31, 8, noise(Field::P31, 80_000));
        assert!(
            counts.iter().all(|count| (9_500..10_500).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn there_are_no_more_bins_than_elements_fill() {
        assert_eq!([0, 64, 4096, 10_000_000].map(log2_bins), [1, 1, 7, 16]);
    }
}
