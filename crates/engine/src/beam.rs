//! Beam search: the likeliest answer that keeping a few beginnings at each length finds.
//!
//! As `generate(num_beams=…, do_sample=False, length_penalty=…, early_stopping=…)` of Hugging Face's
//! `transformers`. A beam's sum is that of the natural logarithms of its tokens' probabilities (f64,
//! over the model's own logits). At each length all continuations of the `width` beams are ordered by
//! their sums. Of the first `width` of them those by an end token are answers, with the score `sum / length^length_penalty`,
//! the end token counted; the first `width` by other tokens are the next beams. The best `width` answers
//! are kept. It is over when there are so many and no beam can do better: with `early_stopping` at
//! once, otherwise when the largest sum, divided by the present `length^length_penalty`, is at most the
//! worst answer's score. At the largest length all beams become answers. The best answer is told.
//!
//! **Ties.** Of equal sums the lower beam comes first, of its tokens the lower id; of equal scores the
//! one found first.

use crate::logprobs::log_total;
use crate::sampler::{NonFiniteLogits, all_finite};

/// Most beams of one request.
pub const MAXIMUM_BEAMS: usize = 32;

/// How beams are searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamSearch {
    /// Beginnings kept at each length, 1 to [`MAXIMUM_BEAMS`]. Each takes a place of the batch.
    pub width: usize,
    /// Exponent of the length by which sums are divided: above 0 prefers long answers, below 0 short
    /// ones. From -10 to 10.
    pub length_penalty: f32,
    /// End as soon as there are `width` answers.
    pub early_stopping: bool,
}

impl BeamSearch {
    /// The usual: length penalty 1, no early stopping.
    #[must_use]
    pub fn new(width: usize) -> Self {
        Self {
            width,
            length_penalty: 1.0,
            early_stopping: false,
        }
    }
}

/// A beginning, or an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Beam {
    pub(crate) tokens: Vec<u32>,
    /// The sum of a beginning, the score of an answer.
    pub(crate) score: f64,
}

#[derive(Clone, Copy)]
struct Candidate {
    beam: usize,
    id: u32,
    sum: f64,
}

/// One request's search.
pub(crate) struct Beams {
    search: BeamSearch,
    end_tokens: Vec<u32>,
    /// Largest length of an answer.
    limit: usize,
    /// None before the first step, then `width`.
    live: Vec<Beam>,
    next: Vec<Beam>,
    /// For each beam of `live`, which one it continues.
    parents: Vec<usize>,
    /// The best first.
    answers: Vec<Beam>,
    candidates: Vec<Candidate>,
}

impl Beams {
    pub(crate) fn new(search: BeamSearch, end_tokens: Vec<u32>, limit: usize) -> Self {
        let width = search.width;
        let empty = || Beam {
            tokens: Vec::with_capacity(limit),
            score: 0.0,
        };
        let beams = || (0..width).map(|_| empty()).collect::<Vec<_>>();
        Self {
            live: Vec::with_capacity(width),
            next: beams(),
            parents: vec![0; width],
            answers: Vec::with_capacity(width + 1),
            candidates: Vec::with_capacity(candidates(width, end_tokens.len()) + 1),
            search,
            end_tokens,
            limit,
        }
    }

    pub(crate) fn width(&self) -> usize {
        self.search.width
    }

    /// Whether there are beams besides the prompt.
    pub(crate) fn begun(&self) -> bool {
        !self.live.is_empty()
    }

    /// Tokens of each beam.
    pub(crate) fn length(&self) -> usize {
        self.live.first().map_or(0, |beam| beam.tokens.len())
    }

    /// The tokens of a beam.
    pub(crate) fn tokens(&self, beam: usize) -> &[u32] {
        &self.live[beam].tokens
    }

    /// For each beam, which of those before the last step it continues.
    pub(crate) fn parents(&self) -> &[usize] {
        &self.parents
    }

    /// Takes the logits after each beam, at first those after the prompt. `true`: it is over.
    pub(crate) fn advance(&mut self, logits: &[f32]) -> Result<bool, NonFiniteLogits> {
        let rows = self.live.len().max(1);
        self.order(logits, logits.len() / rows)?;
        let width = self.search.width;
        let length = self.length() + 1;
        let divisor = (length as f64).powf(f64::from(self.search.length_penalty));
        let mut taken = 0;
        for rank in 0..self.candidates.len() {
            let Candidate { beam, id, sum } = self.candidates[rank];
            if self.end_tokens.contains(&id) {
                if rank < width {
                    let before = self.live.get(beam).map_or(&[][..], |b| &b.tokens);
                    answer(&mut self.answers, width, before, Some(id), sum / divisor);
                }
            } else if taken < width {
                let next = &mut self.next[taken];
                next.tokens.clear();
                if let Some(before) = self.live.get(beam) {
                    next.tokens.extend_from_slice(&before.tokens);
                }
                next.tokens.push(id);
                next.score = sum;
                self.parents[taken] = beam;
                taken += 1;
            }
        }
        if self.live.is_empty() {
            let empty = || Beam {
                tokens: Vec::with_capacity(self.limit),
                score: 0.0,
            };
            self.live = (0..width).map(|_| empty()).collect();
        }
        std::mem::swap(&mut self.live, &mut self.next);
        let best = self.candidates.first().map_or(f64::NEG_INFINITY, |c| c.sum);
        let enough = self.answers.len() == width
            && (self.search.early_stopping || self.answers[width - 1].score >= best / divisor);
        if !enough && length == self.limit {
            for beam in &self.live {
                answer(
                    &mut self.answers,
                    width,
                    &beam.tokens,
                    None,
                    beam.score / divisor,
                );
            }
        }
        Ok(enough || length == self.limit)
    }

    /// Fills the list of candidates, the likeliest first.
    fn order(&mut self, logits: &[f32], vocab: usize) -> Result<(), NonFiniteLogits> {
        let most = candidates(self.search.width, self.end_tokens.len());
        self.candidates.clear();
        for (beam, row) in logits.chunks_exact(vocab.max(1)).enumerate() {
            if !all_finite(row) {
                return Err(NonFiniteLogits);
            }
            let before = self.live.get(beam).map_or(0.0, |b| b.score);
            let total = log_total(row);
            for (&logit, id) in row.iter().zip(0u32..) {
                let sum = before + (f64::from(logit) - total);
                let full = self.candidates.len() == most;
                if full && self.candidates[most - 1].sum >= sum {
                    continue;
                }
                let at = self.candidates.partition_point(|c| c.sum >= sum);
                self.candidates.truncate(most - 1);
                self.candidates.insert(at, Candidate { beam, id, sum });
            }
        }
        Ok(())
    }

    /// The best answer, once it is over.
    pub(crate) fn best(&self) -> Option<&Beam> {
        self.answers.first()
    }
}

/// So many candidates are enough for `width` beams, whatever of them are end tokens.
fn candidates(width: usize, end_tokens: usize) -> usize {
    width * (1 + end_tokens).max(2)
}

/// Fewest tokens that a vocabulary must have for a search.
pub(crate) fn least_vocabulary(width: usize, end_tokens: usize) -> usize {
    candidates(width, end_tokens)
}

/// Adds an answer to the best `width`.
fn answer(answers: &mut Vec<Beam>, width: usize, tokens: &[u32], end: Option<u32>, score: f64) {
    let at = answers.partition_point(|other| other.score >= score);
    if at < width {
        let tokens = tokens.iter().copied().chain(end).collect();
        answers.insert(at, Beam { tokens, score });
        answers.truncate(width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOCAB: usize = 24;

    /// Logits that depend on the whole text before them.
    fn logits(seed: u64, tokens: &[u32]) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = |word: u64| {
            state = (state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            state ^= state >> 29;
            state
        };
        for &token in tokens {
            next(u64::from(token) + 1);
        }
        (0..VOCAB)
            .map(|_| (next(77) >> 40) as f32 / (1 << 23) as f32 * 3.0)
            .collect()
    }

    /// The rules as they stand above, with every continuation listed and sorted. Also how many steps
    /// it took.
    fn plain(seed: u64, most: usize, ends: &[u32], search: BeamSearch) -> (Beam, usize) {
        let width = search.width;
        let mut live = vec![Beam::default()];
        let mut found: Vec<Beam> = vec![];
        let mut length = 0;
        loop {
            length += 1;
            let divisor = f64::from(length as u32).powf(f64::from(search.length_penalty));
            let mut all = vec![];
            for beam in &live {
                let row = logits(seed, &beam.tokens);
                let total = log_total(&row);
                for (logit, id) in row.into_iter().zip(0u32..) {
                    let tokens = [&beam.tokens[..], &[id]].concat();
                    let score = beam.score + (f64::from(logit) - total);
                    all.push(Beam { tokens, score });
                }
            }
            all.sort_by(|a, b| b.score.total_cmp(&a.score));
            let ended = |beam: &Beam| ends.contains(beam.tokens.last().unwrap());
            let scored = |beam: &Beam| Beam {
                tokens: beam.tokens.clone(),
                score: beam.score / divisor,
            };
            found.extend(all[..width].iter().filter(|b| ended(b)).map(scored));
            found.sort_by(|a, b| b.score.total_cmp(&a.score));
            found.truncate(width);
            let best = all[0].score / divisor;
            let others = all.iter().filter(|b| !ended(b));
            live = others.take(width).cloned().collect();
            if found.len() == width && (search.early_stopping || found[width - 1].score >= best) {
                break;
            }
            if length == most {
                found.extend(live.iter().map(scored));
                found.sort_by(|a, b| b.score.total_cmp(&a.score));
                break;
            }
        }
        (found.swap_remove(0), length)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]
        #[test]
        fn a_search_follows_its_rules(
            seed: u64,
            width in 1usize..6,
            most in 1usize..14,
            ends in prop::collection::btree_set(0u32..VOCAB as u32, 0..4),
            length_penalty in prop::sample::select(vec![-1.0f32, 0.0, 0.5, 1.0, 2.0]),
            early_stopping: bool,
        ) {
            let ends: Vec<u32> = ends.into_iter().collect();
            let search = BeamSearch { width, length_penalty, early_stopping };
            let (expected, steps) = plain(seed, most, &ends, search);
            let mut beams = Beams::new(search, ends.clone(), most);
            for step in 1.. {
                let rows: Vec<f32> = match beams.begun() {
                    false => logits(seed, &[]),
                    true => (0..width).flat_map(|b| logits(seed, beams.tokens(b))).collect(),
                };
                let before: Vec<Vec<u32>> = beams.live.iter().map(|b| b.tokens.clone()).collect();
                let over = beams.advance(&rows).unwrap();
                prop_assert_eq!(over, step == steps, "step {}", step);
                for (beam, &parent) in beams.live.iter().zip(beams.parents()) {
                    let parent = before.get(parent).map_or(&[][..], |tokens| tokens);
                    prop_assert_eq!(&beam.tokens[..beam.tokens.len() - 1], parent);
                }
                if over {
                    break;
                }
            }
            prop_assert_eq!(beams.best(), Some(&expected));
        }
    }

    #[test]
    fn equals_are_taken_in_their_order() {
        let mut beams = Beams::new(BeamSearch::new(3), vec![], 3);
        assert!(!beams.advance(&[0.0; VOCAB]).unwrap());
        assert!(!beams.advance(&[0.0; 3 * VOCAB]).unwrap());
        let tokens: Vec<_> = (0..3).map(|beam| beams.tokens(beam).to_vec()).collect();
        assert_eq!(tokens, [[0, 0], [0, 1], [0, 2]]);
        assert_eq!(beams.parents(), [0, 0, 0]);
        assert!(beams.advance(&[0.0; 3 * VOCAB]).unwrap());
        assert_eq!(beams.best().unwrap().tokens, [0, 0, 0]);
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        let mut beams = Beams::new(BeamSearch::new(2), vec![], 3);
        let mut row = [0.0; VOCAB];
        row[5] = f32::NAN;
        assert_eq!(beams.advance(&row), Err(NonFiniteLogits));
    }
}
