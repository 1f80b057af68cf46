//! From one row of logits to one token id: penalties, temperature, top-k, top-p, min-p and the
//! seeded draw. It holds no text and no model: stop strings live in `stop`, end tokens in
//! `scheduler`.
//!
//! Order of the filters, as in `transformers`: repetition penalty, frequency and presence penalty,
//! bias, what a constraint allows, temperature, top-k, top-p, min-p, then one draw. A request's random stream belongs to that
//! request alone, so its tokens do not depend on what else is in the batch.
//!
//! There are two ways to the same token: the usual one looks at what is likely, that of the module `oblivious` at everything.

mod oblivious;

use casemate_kernels::cpu::Isa;
use casemate_kernels::softmax::exp_differences;

use crate::logprobs::Row;
use crate::tokenizer::PieceFinder;
use oblivious::Passes;

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token (the lowest id on a tie) and ignores the
    /// filters below.
    pub temperature: f32,
    /// Keep only this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Subtracted from the logit of each token that this request has already generated.
    pub presence_penalty: f32,
    /// Subtracted once per time that this request has already generated the token.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the answer; 1
    /// changes nothing.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// The request's random stream. The caller draws it where the client gave none: the engine has
    /// no randomness of its own.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks each parameter against its range.
    ///
    /// # Errors
    /// The first parameter that is not finite or lies outside of its range.
    pub fn validate(&self) -> Result<(), InvalidSampling> {
        let within = |parameter, value: f32, low: f32, high: f32| {
            if value.is_finite() && value >= low && value <= high {
                Ok(())
            } else {
                Err(InvalidSampling {
                    parameter,
                    value,
                    low,
                    high,
                })
            }
        };
        within("temperature", self.temperature, 0.0, 100.0)?;
        // An exact 0 would keep nothing; the smallest positive value keeps the most likely token.
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        for &(_, bias) in &self.bias {
            within("logit_bias", bias, -100.0, 100.0)?;
        }
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
    }

    /// Whether the likeliest token is taken as the model has it.
    pub(crate) fn is_plain(&self) -> bool {
        self.temperature == 0.0 && !self.penalises() && self.bias.is_empty()
    }

    fn penalises(&self) -> bool {
        self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.repetition_penalty != 1.0
    }
}

/// A sampling parameter outside of its range.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{parameter} is {value}, but must be from {low} to {high}")]
pub struct InvalidSampling {
    /// The field's name.
    pub parameter: &'static str,
    /// What was given.
    pub value: f32,
    /// Smallest value allowed.
    pub low: f32,
    /// Largest value allowed.
    pub high: f32,
}

/// The logits held a NaN or an infinity: the model's arithmetic failed for this request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits are not finite")]
pub struct NonFiniteLogits;

/// Scratch space shared by all requests of one scheduler: candidates of the row at hand.
pub struct Scratch {
    pub(crate) isa: Isa,
    /// Unnormalised probabilities: e^((logit - largest) / temperature).
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
    passes: Passes,
    /// The row as the model computed it, where somebody asked for log-probabilities.
    pub(crate) row: Row,
    /// What finds the text of a token where nobody may see which.
    pub(crate) pieces: Option<PieceFinder>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            isa: Isa::detect(),
            weights: Vec::new(),
            candidates: Vec::new(),
            passes: Passes::default(),
            row: Row::default(),
            pieces: None,
        }
    }
}

#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    /// Unnormalised probability.
    weight: f32,
}

/// The sampler of one request.
pub struct Sampler {
    sampling: Sampling,
    random: Xoshiro256,
    /// Only kept while a penalty is in force.
    seen: SeenTokens,
}

/// Tokens of the prompt and of the answer.
enum SeenTokens {
    /// Sorted by id.
    Sorted(Vec<Seen>),
    /// In their order, each as often as it came, with whether it was generated.
    Listed(Vec<(u32, bool)>),
}

struct Seen {
    id: u32,
    generated: u32,
}

impl Sampler {
    /// A sampler over `prompt`, which counts for the repetition penalty. `capacity` further tokens
    /// are recorded without allocation.
    ///
    /// # Errors
    /// A parameter outside of its range.
    pub fn new(
        sampling: Sampling,
        prompt: &[u32],
        capacity: usize,
    ) -> Result<Self, InvalidSampling> {
        let mut seen = Vec::new();
        if sampling.penalises() {
            let mut ids = prompt.to_vec();
            ids.sort_unstable();
            ids.dedup();
            seen.reserve_exact(ids.len() + capacity);
            seen.extend(ids.into_iter().map(|id| Seen { id, generated: 0 }));
        }
        Self::with(sampling, SeenTokens::Sorted(seen))
    }

    /// As [`Sampler::new`]; it chooses the same tokens, and touches memory in an order that does not depend on which. What a
    /// constraint allows is taken as it is.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn oblivious(
        sampling: Sampling,
        prompt: &[u32],
        capacity: usize,
    ) -> Result<Self, InvalidSampling> {
        let mut seen = Vec::new();
        if sampling.penalises() {
            seen.reserve_exact(prompt.len() + capacity);
            seen.extend(prompt.iter().map(|&id| (id, false)));
        }
        Self::with(sampling, SeenTokens::Listed(seen))
    }

    fn with(sampling: Sampling, seen: SeenTokens) -> Result<Self, InvalidSampling> {
        sampling.validate()?;
        let random = Xoshiro256::from_seed(sampling.seed);
        Ok(Self {
            sampling,
            random,
            seen,
        })
    }

    /// Whether it touches everything.
    pub(crate) fn is_oblivious(&self) -> bool {
        matches!(self.seen, SeenTokens::Listed(_))
    }

    /// Chooses the next token and records it. `logits` is changed in place. `allowed` has a bit for
    /// each token that may be chosen, and at least one is set; `None` allows all.
    ///
    /// # Errors
    /// [`NonFiniteLogits`]: nothing was chosen and nothing recorded.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        allowed: Option<&[u64]>,
        scratch: &mut Scratch,
    ) -> Result<u32, NonFiniteLogits> {
        if logits.is_empty() || !all_finite(logits) {
            return Err(NonFiniteLogits);
        }
        self.penalise(logits);
        let hides = self.is_oblivious();
        if hides {
            oblivious::bias(&self.sampling.bias, logits);
        } else {
            for &(id, bias) in &self.sampling.bias {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit += bias;
                }
            }
        }
        match allowed {
            Some(allowed) if hides => oblivious::forbid_others(logits, allowed),
            Some(allowed) => forbid_others(logits, allowed),
            None => {}
        }
        let id = match (self.sampling.temperature == 0.0, hides) {
            (true, false) => arg_max(logits),
            (true, true) => oblivious::greedy(scratch.isa, logits),
            (false, _) => self.draw(logits, scratch),
        };
        self.record(id);
        Ok(id)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let s = &self.sampling;
        let seen = match &self.seen {
            SeenTokens::Sorted(seen) => seen,
            SeenTokens::Listed(seen) => {
                if s.penalises() {
                    oblivious::penalise(s, seen, logits);
                }
                return;
            }
        };
        for seen in seen {
            let Some(logit) = logits.get_mut(seen.id as usize) else {
                continue;
            };
            *logit = if *logit > 0.0 {
                *logit / s.repetition_penalty
            } else {
                *logit * s.repetition_penalty
            };
            if seen.generated > 0 {
                *logit -= s.presence_penalty + s.frequency_penalty * seen.generated as f32;
            }
        }
    }

    fn record(&mut self, id: u32) {
        if !self.sampling.penalises() {
            return;
        }
        match &mut self.seen {
            SeenTokens::Listed(seen) => seen.push((id, true)),
            SeenTokens::Sorted(seen) => match seen.binary_search_by_key(&id, |seen| seen.id) {
                Ok(at) => seen[at].generated += 1,
                Err(at) => seen.insert(at, Seen { id, generated: 1 }),
            },
        }
    }

    fn draw(&mut self, logits: &[f32], scratch: &mut Scratch) -> u32 {
        let hides = self.is_oblivious();
        let (s, isa, weights) = (&self.sampling, scratch.isa, &mut scratch.weights);
        // Temperatures close to zero overflow the division; the differences to the maximum are what
        // matters, and those only run to −infinity, whose weight is the right one: zero.
        let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.resize(logits.len(), 0.0);
        exp_differences(isa, logits, maximum, s.temperature, weights);
        if hides {
            return scratch.passes.draw(isa, s, weights, &mut self.random);
        }
        let candidates = &mut scratch.candidates;
        candidates.clear();
        let weighed = weights.iter().zip(0u32..);
        candidates.extend(weighed.map(|(&weight, id)| Candidate { id, weight }));
        let top_k = if s.top_k == 0 {
            candidates.len()
        } else {
            (s.top_k as usize).min(candidates.len())
        };
        if top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, more_likely);
            candidates.truncate(top_k);
        }
        if s.top_p < 1.0 {
            keep_top_p(candidates, s.top_p);
        }
        if s.min_p > 0.0 {
            // The most likely candidate has weight 1.
            candidates.retain(|c| c.weight >= s.min_p);
        }
        // Selection leaves an order of its own; the draw must not depend on it.
        if top_k < logits.len() || s.top_p < 1.0 {
            candidates.sort_unstable_by_key(|c| c.id);
        }
        let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
        let mut left = self.random.unit() * total;
        let mut last = candidates[0].id;
        for c in candidates.iter().filter(|c| c.weight > 0.0) {
            last = c.id;
            left -= f64::from(c.weight);
            if left < 0.0 {
                break;
            }
        }
        last
    }
}

/// Makes all tokens impossible whose bit is not set.
fn forbid_others(logits: &mut [f32], allowed: &[u64]) {
    for (logits, bits) in logits.chunks_mut(64).zip(allowed) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if bits >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// What a weight of at most 1 counts for top-p, where sums must not depend on their order: in 2^-40, rounded down.
fn share(weight: f32) -> u64 {
    const UNIT: f32 = (1u64 << 40) as f32;
    (weight * UNIT) as u64
}

/// The sum of shares that top-p wants of all of them; never none.
fn wanted(total: u64, top_p: f32) -> u64 {
    ((total as f64 * f64::from(top_p)) as u64).max(1)
}

/// Keeps the smallest prefix of the candidates in falling order whose share of the total reaches
/// `top_p`. Sorts only as many as are needed.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f32) {
    let total: u64 = candidates.iter().map(|c| share(c.weight)).sum();
    let wanted = wanted(total, top_p);
    let mut sorted = 0;
    let mut reached = 0;
    let mut step = 64;
    loop {
        let rest = &mut candidates[sorted..];
        let take = step.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, more_likely);
        }
        rest[..take].sort_unstable_by(more_likely);
        for (i, c) in rest[..take].iter().enumerate() {
            reached += share(c.weight);
            if reached >= wanted {
                candidates.truncate(sorted + i + 1);
                return;
            }
        }
        sorted += take;
        if sorted == candidates.len() {
            return;
        }
        step *= 8;
    }
}

/// Falling weight, then rising id: a total order, as weights are never NaN.
fn more_likely(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

pub(crate) fn all_finite(logits: &[f32]) -> bool {
    // Any NaN or infinity turns its term, and so the sum, into NaN.
    logits.iter().fold(0.0f32, |sum, &x| sum + x * 0.0) == 0.0
}

/// The index of the largest value, the lowest on a tie. NaN never wins.
#[must_use]
pub fn arg_max(values: &[f32]) -> u32 {
    let mut best = (0u32, f32::NEG_INFINITY);
    for (&value, id) in values.iter().zip(0u32..) {
        if value > best.1 {
            best = (id, value);
        }
    }
    best.0
}

/// xoshiro256++ (Blackman and Vigna), seeded through splitmix64. Not for secrets: it only spreads
/// samples.
struct Xoshiro256([u64; 4]);

impl Xoshiro256 {
    fn from_seed(seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        Self([next(), next(), next(), next()])
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in [0, 1), 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn draws(sampling: Sampling, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, &[], n).unwrap();
        let mut scratch = Scratch::default();
        (0..n)
            .map(|_| {
                sampler
                    .sample(&mut logits.to_vec(), None, &mut scratch)
                    .unwrap()
            })
            .collect()
    }

    fn warm() -> Sampling {
        Sampling {
            temperature: 1.0,
            seed: 7,
            ..Sampling::default()
        }
    }

    /// Chi-square of the draws against probabilities, over the classes with probability above zero.
    fn chi_square(draws: &[u32], probabilities: &[f64]) -> f64 {
        let mut counts = vec![0u32; probabilities.len()];
        for &d in draws {
            counts[d as usize] += 1;
        }
        let n = draws.len() as f64;
        counts
            .iter()
            .zip(probabilities)
            .map(|(&count, &p)| {
                if p == 0.0 {
                    assert_eq!(count, 0, "a filtered token was drawn");
                    0.0
                } else {
                    (f64::from(count) - n * p).powi(2) / (n * p)
                }
            })
            .sum()
    }

    const P: [f64; 6] = [0.4, 0.05, 0.25, 0.15, 0.1, 0.05];

    fn logits() -> Vec<f32> {
        P.iter().map(|p| p.ln() as f32 + 3.0).collect()
    }

    #[test]
    fn draws_follow_the_softmax() {
        // 5 degrees of freedom: 20.5 is exceeded with probability 0.001; the seed is fixed.
        assert!(chi_square(&draws(warm(), &logits(), 40_000), &P) < 20.5);
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        for temperature in [0.5f32, 2.0] {
            let powered: Vec<f64> = P
                .iter()
                .map(|p| p.powf(1.0 / f64::from(temperature)))
                .collect();
            let total: f64 = powered.iter().sum();
            let expected: Vec<f64> = powered.iter().map(|p| p / total).collect();
            let sampling = Sampling {
                temperature,
                ..warm()
            };
            assert!(
                chi_square(&draws(sampling, &logits(), 40_000), &expected) < 20.5,
                "temperature {temperature}"
            );
        }
    }

    #[test]
    fn filters_keep_exactly_their_sets_and_renormalise() {
        let renormalised = |keep: &[usize]| -> Vec<f64> {
            let total: f64 = keep.iter().map(|&i| P[i]).sum();
            (0..P.len())
                .map(|i| if keep.contains(&i) { P[i] / total } else { 0.0 })
                .collect()
        };
        for (sampling, keep) in [
            (Sampling { top_k: 3, ..warm() }, &[0, 2, 3][..]),
            // The tie between 1 and 5 goes to the lower id.
            (Sampling { top_k: 5, ..warm() }, &[0, 1, 2, 3, 4]),
            (
                Sampling {
                    top_p: 0.6,
                    ..warm()
                },
                &[0, 2],
            ),
            (
                Sampling {
                    top_p: 0.66,
                    ..warm()
                },
                &[0, 2, 3],
            ),
            (
                Sampling {
                    min_p: 0.3,
                    ..warm()
                },
                &[0, 2, 3],
            ),
            // top-p acts on what top-k left: 0.4 of 0.65 is 0.615.
            (
                Sampling {
                    top_k: 2,
                    top_p: 0.61,
                    ..warm()
                },
                &[0],
            ),
        ] {
            let d = draws(sampling.clone(), &logits(), 20_000);
            assert!(chi_square(&d, &renormalised(keep)) < 20.5, "{sampling:?}");
        }
    }

    #[test]
    fn top_p_over_a_large_vocabulary_equals_full_sorting() {
        let mut random = Xoshiro256::from_seed(3);
        let weights: Vec<f32> = (0..5000).map(|_| (random.unit() as f32).powi(3)).collect();
        let mut candidates: Vec<Candidate> = weights
            .iter()
            .zip(0..)
            .map(|(&weight, id)| Candidate { id, weight })
            .collect();
        let mut sorted = candidates.clone();
        sorted.sort_by(more_likely);
        let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        for top_p in [0.001f32, 0.1, 0.5, 0.9, 0.999] {
            let mut reached = 0.0;
            let expected = sorted
                .iter()
                .take_while(|c| {
                    let before = reached < total * f64::from(top_p);
                    reached += f64::from(c.weight);
                    before
                })
                .count();
            let mut kept = candidates.clone();
            keep_top_p(&mut kept, top_p);
            assert_eq!(kept.len(), expected);
            assert!(kept.iter().zip(&sorted).all(|(a, b)| a.id == b.id));
        }
        candidates.truncate(1);
        keep_top_p(&mut candidates, 0.5);
        assert_eq!(candidates.len(), 1);
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_a_tie() {
        assert_eq!(
            draws(Sampling::default(), &[1.0, 3.0, 3.0, -1.0], 2),
            [1, 1]
        );
    }

    #[test]
    fn greedy_equals_a_vanishing_temperature() {
        let sampling = Sampling {
            temperature: 1e-30,
            ..warm()
        };
        assert_eq!(draws(sampling, &[1.0, 2.0, 3.0, 2.999], 50), [2; 50]);
    }

    #[test]
    fn seeds_decide_the_stream() {
        let one = draws(warm(), &logits(), 64);
        assert_eq!(one, draws(warm(), &logits(), 64));
        assert_ne!(one, draws(Sampling { seed: 8, ..warm() }, &logits(), 64));
    }

    #[test]
    fn penalties_count_what_they_say() {
        let penalised = |sampling: Sampling, prompt: &[u32], history: &[u32]| {
            let mut sampler = Sampler::new(sampling, prompt, 8).unwrap();
            history.iter().for_each(|&id| sampler.record(id));
            let mut logits = vec![2.0, -2.0, 1.0, 0.5];
            sampler.penalise(&mut logits);
            logits
        };
        let repetition = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::default()
        };
        assert_eq!(
            penalised(repetition, &[0, 0, 1], &[2]),
            [1.0, -4.0, 0.5, 0.5]
        );
        let presence = Sampling {
            presence_penalty: 0.5,
            ..Sampling::default()
        };
        assert_eq!(penalised(presence, &[0], &[1, 1]), [2.0, -2.5, 1.0, 0.5]);
        let frequency = Sampling {
            frequency_penalty: 0.5,
            ..Sampling::default()
        };
        assert_eq!(penalised(frequency, &[0], &[1, 1]), [2.0, -3.0, 1.0, 0.5]);
        // An id outside of the vocabulary in the prompt is no concern of the sampler.
        assert_eq!(
            penalised(
                Sampling {
                    repetition_penalty: 2.0,
                    ..Sampling::default()
                },
                &[99],
                &[]
            ),
            [2.0, -2.0, 1.0, 0.5]
        );
    }

    #[test]
    fn refuses_what_is_not_finite() {
        let mut sampler = Sampler::new(warm(), &[], 1).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(
                sampler.sample(&mut [0.0, bad], None, &mut Scratch::default()),
                Err(NonFiniteLogits)
            );
        }
        assert_eq!(
            sampler.sample(&mut [], None, &mut Scratch::default()),
            Err(NonFiniteLogits)
        );
        for (bad, parameter) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..warm()
                },
                "temperature",
            ),
            (
                Sampling {
                    temperature: f32::NAN,
                    ..warm()
                },
                "temperature",
            ),
            (
                Sampling {
                    top_p: 0.0,
                    ..warm()
                },
                "top_p",
            ),
            (
                Sampling {
                    top_p: 1.1,
                    ..warm()
                },
                "top_p",
            ),
            (
                Sampling {
                    min_p: 1.1,
                    ..warm()
                },
                "min_p",
            ),
            (
                Sampling {
                    presence_penalty: f32::INFINITY,
                    ..warm()
                },
                "presence_penalty",
            ),
            (
                Sampling {
                    frequency_penalty: 101.0,
                    ..warm()
                },
                "frequency_penalty",
            ),
            (
                Sampling {
                    repetition_penalty: 0.0,
                    ..warm()
                },
                "repetition_penalty",
            ),
        ] {
            assert_eq!(
                Sampler::new(bad, &[], 0).err().unwrap().parameter,
                parameter
            );
        }
    }

    proptest! {
        #[test]
        fn always_a_token_that_the_filters_keep(
            logits in prop::collection::vec(-30.0f32..30.0, 1..200),
            temperature in 0.0f32..3.0,
            top_k in 0u32..50,
            top_p in 0.01f32..1.0,
            min_p in 0.0f32..1.0,
            seed: u64,
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            let mut sampler = Sampler::new(sampling, &[], 1).unwrap();
            let id = sampler.sample(&mut logits.clone(), None, &mut Scratch::default()).unwrap() as usize;
            prop_assert!(id < logits.len());
            let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let more_likely = logits.iter().filter(|&&x| x > logits[id]).count();
            prop_assert!(temperature == 0.0 || top_k == 0 || more_likely < top_k as usize);
            prop_assert!(temperature > 0.0 || logits[id] == maximum);
            if temperature > 0.0 {
                prop_assert!(((logits[id] - maximum) / temperature).exp() >= min_p * 0.9999);
            }
        }
    }

    #[test]
    fn biases_are_added_after_penalties() {
        let biased = |bias: &[(u32, f32)], temperature| Sampling {
            temperature,
            bias: bias.to_vec(),
            ..warm()
        };
        let logits = [0.0, 3.0, 1.0, 2.0];
        assert_eq!(
            draws(biased(&[(1, -2.5), (3, -1.0)], 0.0), &logits, 2),
            [2, 2]
        );
        assert_eq!(draws(biased(&[(0, 3.5)], 0.0), &logits, 1), [0]);
        // The most and the least that the API lets through force and ban.
        assert_eq!(draws(biased(&[(0, 100.0)], 1.0), &logits, 50), [0; 50]);
        assert!(!draws(biased(&[(1, -100.0)], 1.0), &logits, 500).contains(&1));
        for bias in [f32::NAN, 101.0] {
            let error = biased(&[(0, bias)], 1.0).validate().unwrap_err();
            assert_eq!(error.parameter, "logit_bias");
        }
        // A token's repetition is penalised before its bias counts.
        let sampling = Sampling {
            repetition_penalty: 2.0,
            ..biased(&[(1, -0.4)], 0.0)
        };
        let mut sampler = Sampler::new(sampling, &[1], 4).unwrap();
        let mut row = [1.0, 3.0];
        sampler
            .sample(&mut row, None, &mut Scratch::default())
            .unwrap();
        assert!((row[1] - 1.1).abs() < 1e-6, "{row:?}");
    }

    proptest! {
        #[test]
        fn only_allowed_tokens_are_chosen(
            logits in prop::collection::vec(-30.0f32..30.0, 1..200),
            allowed in prop::collection::vec(any::<bool>(), 200),
            seed: u64, hot in any::<bool>(), top_k in 0u32..4, top_p in 0.01f32..1.0, min_p in 0.0f32..0.5,
        ) {
            prop_assume!(allowed[..logits.len()].contains(&true));
            let mut mask = vec![0u64; 4];
            for (id, _) in allowed.iter().enumerate().filter(|(_, ok)| **ok) {
                mask[id / 64] |= 1 << (id % 64);
            }
            let temperature = if hot { 1.0 } else { 0.0 };
            let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
            let mut sampler = Sampler::new(sampling, &[], 1).unwrap();
            let id = sampler.sample(&mut logits.clone(), Some(&mask), &mut Scratch::default()).unwrap();
            prop_assert!(allowed[id as usize]);
        }
    }
}
