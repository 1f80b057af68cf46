//! How near a copy is to its model. Pure functions over what both said.

use std::collections::HashMap;
use std::hash::Hash;

/// Longest sequences of words that BLEU compares.
const LONGEST: usize = 4;

/// Logarithms of the softmax.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
    let log_total = total.ln() as f32;
    logits.iter().map(|&x| x - most - log_total).collect()
}

/// The index of the largest value, the lowest on a tie.
pub(crate) fn top(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

/// Comparison position by position behind the same true text: teacher forcing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Forced {
    positions: usize,
    agreed: usize,
    kl: f64,
    nll: f64,
}

impl Forced {
    /// Adds a position: log-probabilities of both over the whole vocabulary, and the token that follows.
    pub(crate) fn add(&mut self, victim: &[f32], student: &[f32], next: u32) {
        self.positions += 1;
        self.agreed += usize::from(top(victim) == top(student));
        let both = victim.iter().zip(student);
        self.kl += both
            .map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q)))
            .sum::<f64>();
        self.nll -= f64::from(student[next as usize]);
    }

    /// Share of positions at which both find the same token likeliest.
    pub(crate) fn agreement(&self) -> f64 {
        self.agreed as f64 / self.positions.max(1) as f64
    }

    /// Mean of KL(victim ‖ student) over positions, in nats.
    pub(crate) fn kl(&self) -> f64 {
        self.kl / self.positions.max(1) as f64
    }

    /// Perplexity of the student on the text.
    pub(crate) fn perplexity(&self) -> f64 {
        (self.nll / self.positions.max(1) as f64).exp()
    }
}

/// Share of places at which two texts have the same token; the longer one's length counts.
pub(crate) fn token_match(pairs: &[(&[u32], &[u32])]) -> f64 {
    let same = |(a, b): &(&[u32], &[u32])| a.iter().zip(*b).filter(|(a, b)| a == b).count();
    let places = |(a, b): &(&[u32], &[u32])| a.len().max(b.len());
    let (same, places): (usize, usize) =
        (pairs.iter().map(same).sum(), pairs.iter().map(places).sum());
    same as f64 / places.max(1) as f64
}

/// BLEU of a corpus (Papineni et al., 2002): sequences of 1 to 4 words with equal weights, one reference for each
/// candidate, brevity penalty, no smoothing. From 0 to 1; words are what white space separates.
pub(crate) fn bleu(pairs: &[(&str, &str)]) -> f64 {
    let mut found = [0usize; LONGEST];
    let mut there = [0usize; LONGEST];
    let (mut candidates, mut references) = (0, 0);
    for (candidate, reference) in pairs {
        let [candidate, reference] =
            [candidate, reference].map(|text| text.split_whitespace().collect::<Vec<_>>());
        candidates += candidate.len();
        references += reference.len();
        for n in 1..=LONGEST {
            let known = counts(reference.windows(n));
            let said = counts(candidate.windows(n));
            there[n - 1] += candidate.len().saturating_sub(n - 1);
            let clipped = |(gram, count): (&&[&str], &usize)| {
                (*count).min(known.get(*gram).copied().unwrap_or(0))
            };
            found[n - 1] += said.iter().map(clipped).sum::<usize>();
        }
    }
    if found.contains(&0) {
        return 0.0;
    }
    let precision = |(found, there): (&usize, &usize)| (*found as f64 / *there as f64).ln();
    let mean = found.iter().zip(&there).map(precision).sum::<f64>() / LONGEST as f64;
    let brevity = (1.0 - references as f64 / candidates as f64).min(0.0);
    (brevity + mean).exp()
}

fn counts<T: Hash + Eq>(items: impl Iterator<Item = T>) -> HashMap<T, usize> {
    let mut counts = HashMap::new();
    items.for_each(|item| *counts.entry(item).or_default() += 1);
    counts
}

/// The middle of the values; the mean of the two in the middle where there is an even number.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    casemate_report::quantile(&sorted, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }

    #[test]
    fn a_softmax_sums_to_one() {
        let logs = log_softmax(&[10.0, 10.0 + 3f32.ln(), -1000.0]);
        near(f64::from(logs[0]).exp(), 0.25);
        near(f64::from(logs[1]).exp(), 0.75);
        assert!(logs[2] < -1000.0);
    }

    #[test]
    fn forced_figures_are_those_of_the_definitions() {
        let logs = |p: [f32; 3]| p.map(f32::ln);
        let mut forced = Forced::default();
        forced.add(&logs([0.5, 0.25, 0.25]), &logs([0.25, 0.5, 0.25]), 1);
        // 0.5 ln 2 - 0.25 ln 2.
        near(forced.kl(), 0.25 * 2f64.ln());
        near(forced.agreement(), 0.0);
        near(forced.perplexity(), 2.0);
        forced.add(&logs([0.5, 0.25, 0.25]), &logs([0.5, 0.25, 0.25]), 0);
        near(forced.kl(), 0.125 * 2f64.ln());
        near(forced.agreement(), 0.5);
        near(forced.perplexity(), 2.0);
    }

    #[test]
    fn tokens_match_by_place() {
        near(token_match(&[(&[1, 2, 3, 4], &[1, 9, 3])]), 0.5);
        near(token_match(&[(&[1], &[1]), (&[2, 3, 4], &[2, 3, 5])]), 0.75);
        near(token_match(&[]), 0.0);
    }

    /// The second by NLTK's `corpus_bleu` and by hand: precisions 5/6, 4/5, 3/4, 2/3, equal lengths.
    #[test]
    fn bleu_has_known_values() {
        let same = "the cat is on the mat";
        near(bleu(&[(same, same)]), 1.0);
        let product: f64 = (5.0 / 6.0) * (4.0 / 5.0) * (3.0 / 4.0) * (2.0 / 3.0);
        near(bleu(&[("the cat is on the rug", same)]), product.powf(0.25));
        // Shorter by one of six words: exp(1 - 6/5).
        near(bleu(&[("the cat is on the", same)]), (-0.2f64).exp());
        // Counts are clipped, and over the corpus, not sentence by sentence.
        near(bleu(&[("the the the the the the the", same)]), 0.0);
        let product: f64 = (8.0 / 13.0) * (5.0 / 11.0) * (4.0 / 9.0) * (3.0 / 7.0);
        let corpus = [(same, same), ("the the the the the the the", same)];
        near(bleu(&corpus), product.powf(0.25));
    }

    #[test]
    fn the_median_is_in_the_middle() {
        near(median(&[9.0, 1.0, 2.0]), 2.0);
        near(median(&[1.0, 2.0]), 1.5);
    }
}
