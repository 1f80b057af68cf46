//! How likely a generated token was: natural logarithms of the softmax over the model's own logits,
//! at temperature 1, before penalties, biases, constraints and truncation. What a caller may see of
//! them is its own policy.

/// Most alternatives that a request can ask for.
pub const MAXIMUM_TOP: usize = 20;

/// Log-probabilities at one position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, likeliest first; the lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// A row of logits set aside before a sampler changes it.
#[derive(Default)]
pub(crate) struct Row {
    logits: Vec<f32>,
}

impl Row {
    pub(crate) fn keep(&mut self, logits: &[f32]) {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
    }

    /// Writes the log-probabilities of the kept row, which is finite.
    pub(crate) fn logprobs(&self, chosen: u32, top: usize, to: &mut TokenLogprobs) {
        let (maximum, total) = maximum_and_log_total(&self.logits);
        let of = |logit: f32| (f64::from(logit - maximum) - total) as f32;
        let likeliest = &mut to.top;
        likeliest.clear();
        likeliest.reserve_exact(top + 1);
        if top > 0 {
            for (&logit, id) in self.logits.iter().zip(0u32..) {
                if likeliest.len() == top && likeliest[top - 1].1 >= logit {
                    continue;
                }
                let at = likeliest.partition_point(|&(_, other)| other >= logit);
                likeliest.insert(at, (id, logit));
                likeliest.truncate(top);
            }
        }
        for (_, logit) in likeliest {
            *logit = of(*logit);
        }
        to.chosen = self
            .logits
            .get(chosen as usize)
            .map_or(f32::NEG_INFINITY, |&l| of(l));
    }
}

/// The maximum, and the logarithm of the sum of what the exponentials of differences to it are.
fn maximum_and_log_total(logits: &[f32]) -> (f32, f64) {
    let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits
        .iter()
        .map(|&logit| f64::from(logit - maximum).exp())
        .sum();
    (maximum, total.ln())
}

/// What is to be subtracted from a logit to make it a log-probability.
pub(crate) fn log_total(logits: &[f32]) -> f64 {
    let (maximum, total) = maximum_and_log_total(logits);
    f64::from(maximum) + total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn logprobs(logits: &[f32], chosen: u32, top: usize) -> TokenLogprobs {
        let mut row = Row::default();
        row.keep(logits);
        let mut found = TokenLogprobs::default();
        row.logprobs(chosen, top, &mut found);
        found
    }

    #[test]
    fn they_are_logarithms_of_the_softmax() {
        let p = [0.5f32, 0.125, 0.25, 0.125];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() + 40.0).collect();
        let found = logprobs(&logits, 1, 3);
        let near = |a: f32, b: f32| assert!((a - b.ln()).abs() < 1e-5, "{a} {b}");
        near(found.chosen, 0.125);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 2, 1]);
        found
            .top
            .iter()
            .for_each(|&(id, l)| near(l, p[id as usize]));
        assert!(logprobs(&logits, 1, 0).top.is_empty());
        assert_eq!(logprobs(&logits, 1, 9).top.len(), 4);
    }

    proptest! {
        #[test]
        fn the_likeliest_are_those_of_a_full_sort(logits in prop::collection::vec(-5i8..5, 1..80), top in 0usize..21) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let mut sorted: Vec<u32> = (0..logits.len() as u32).collect();
            sorted.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            sorted.truncate(top);
            let found = logprobs(&logits, 0, top);
            prop_assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), sorted);
            let all = logprobs(&logits, 0, logits.len());
            let total: f32 = all.top.iter().map(|t| t.1.exp()).sum();
            prop_assert!((total - 1.0).abs() < 1e-4);
        }
    }
}
