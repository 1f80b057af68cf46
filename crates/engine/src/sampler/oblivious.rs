//! The sampler that does not tell by what it touches which tokens are likely, seen or chosen: every pass goes over the whole
//! vocabulary in order, and choices are made by arithmetic. It gives the tokens of the other one.
//!
//! Selection without sorting: weights are not negative, so their bits are in their order, and the least that is kept is
//! found by halving the range of bits, 30 passes of counting (top-k) or of adding up (top-p). Equal ones at that limit are
//! kept from the lowest id on, by a running count or sum.

use casemate_kernels::cpu::Isa;
use casemate_kernels::oblivious::{argmax, count_at_least, equal, sum_at_least};

use super::{Sampling, Xoshiro256, share};

/// Bits of 1.0, the largest weight.
const ONE: u32 = 0x3F80_0000;

/// Working memory for a row.
#[derive(Default)]
pub(super) struct Passes {
    bits: Vec<u32>,
    fixed: Vec<u64>,
}

/// All ones if so, otherwise zeros.
fn mask(is: bool) -> u32 {
    u32::from(is).wrapping_neg()
}

/// `yes` where the mask is ones, `no` where it is zeros.
fn select(mask: u32, yes: u32, no: u32) -> u32 {
    yes & mask | no & !mask
}

/// Applies penalties for all tokens of `seen` (ids, and whether they were generated), by comparing each with each.
pub(super) fn penalise(s: &Sampling, seen: &[(u32, bool)], logits: &mut [f32]) {
    for (logit, id) in logits.iter_mut().zip(0u32..) {
        let (mut present, mut generated) = (0u32, 0u32);
        for &(other, was_generated) in seen {
            let same = equal(id, other);
            present |= same;
            generated = generated.wrapping_add(same & u32::from(was_generated));
        }
        let positive = mask(*logit > 0.0);
        let (divided, multiplied) = (*logit / s.repetition_penalty, *logit * s.repetition_penalty);
        let repeated = select(positive, divided.to_bits(), multiplied.to_bits());
        let less = s.presence_penalty + s.frequency_penalty * generated as f32;
        let lowered = (f32::from_bits(repeated) - less).to_bits();
        let penalised = select(mask(generated > 0), lowered, repeated);
        *logit = f32::from_bits(select(present, penalised, logit.to_bits()));
    }
}

/// Adds each bias where its token is.
pub(super) fn bias(biases: &[(u32, f32)], logits: &mut [f32]) {
    for &(id, bias) in biases {
        for (logit, other) in logits.iter_mut().zip(0u32..) {
            let biased = (*logit + bias).to_bits();
            *logit = f32::from_bits(select(equal(id, other), biased, logit.to_bits()));
        }
    }
}

/// Makes all tokens impossible whose bit is not set.
pub(super) fn forbid_others(logits: &mut [f32], allowed: &[u64]) {
    let impossible = f32::NEG_INFINITY.to_bits();
    for (logits, bits) in logits.chunks_mut(64).zip(allowed) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            let allowed = mask(bits >> bit & 1 == 1);
            *logit = f32::from_bits(select(allowed, logit.to_bits(), impossible));
        }
    }
}

/// The likeliest token.
pub(super) fn greedy(isa: Isa, logits: &[f32]) -> u32 {
    argmax(isa, logits)
}

impl Passes {
    /// Draws one of the tokens that the filters keep of these weights, the largest of which is 1.
    pub(super) fn draw(
        &mut self,
        isa: Isa,
        s: &Sampling,
        weights: &[f32],
        random: &mut Xoshiro256,
    ) -> u32 {
        let Passes { bits, fixed } = self;
        bits.clear();
        bits.extend(weights.iter().map(|weight| weight.to_bits()));
        let top_k = s.top_k as usize;
        if top_k > 0 && top_k < bits.len() {
            keep_top_k(isa, bits, top_k as u64);
        }
        if s.top_p < 1.0 {
            fixed.clear();
            fixed.extend(bits.iter().map(|bits| share(f32::from_bits(*bits))));
            keep_top_p(isa, bits, fixed, s.top_p);
        }
        if s.min_p > 0.0 {
            for bits in bits.iter_mut() {
                *bits &= mask(f32::from_bits(*bits) >= s.min_p);
            }
        }
        // What is not kept weighs nothing, and adding or taking nothing changes no sum.
        let weight = |bits: &u32| f64::from(f32::from_bits(*bits));
        let total: f64 = bits.iter().map(weight).sum();
        let mut left = random.unit() * total;
        let mut last = 0;
        for (bits, id) in bits.iter().zip(0u32..) {
            let weight = weight(bits);
            let drawn = mask(left >= 0.0) & mask(weight > 0.0);
            last = select(drawn, id, last);
            left -= weight;
        }
        last
    }
}

/// The largest limit at which `reached` holds. It holds at 0, and at every limit below one at which it does.
fn limit(reached: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut range) = (0u32, ONE.next_power_of_two());
    while range > 1 {
        range /= 2;
        let middle = low + range;
        low = select(mask(reached(middle)), middle, low);
    }
    low
}

/// Clears all but the `count` largest, of equal ones the first.
fn keep_top_k(isa: Isa, bits: &mut [u32], count: u64) {
    let limit = limit(|limit| count_at_least(isa, bits, limit) >= count);
    let above = count_at_least(isa, bits, limit + 1);
    let mut left = count.wrapping_sub(above) as u32;
    for bits in bits {
        let at_limit = equal(*bits, limit);
        let kept = mask(*bits > limit) | at_limit & mask(left > 0);
        left -= at_limit & kept & 1;
        *bits &= kept;
    }
}

/// Clears all but the smallest set of largest ones whose share reaches `top_p`, of equal ones the first.
fn keep_top_p(isa: Isa, bits: &mut [u32], fixed: &[u64], top_p: f32) {
    let total = sum_at_least(isa, bits, fixed, 0);
    let wanted = super::wanted(total, top_p);
    let limit = limit(|limit| sum_at_least(isa, bits, fixed, limit) >= wanted);
    let mut reached = sum_at_least(isa, bits, fixed, limit + 1);
    for (bits, fixed) in bits.iter_mut().zip(fixed) {
        let at_limit = equal(*bits, limit);
        let kept = mask(*bits > limit) | at_limit & mask(reached < wanted);
        reached += *fixed & u64::from(at_limit & kept & 1).wrapping_neg();
        *bits &= kept;
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Sampler, Scratch};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        /// Few different logits, so that there are ties at every limit.
        #[test]
        fn the_same_tokens_are_chosen(
            rows in prop::collection::vec(prop::collection::vec(-6i8..7, 70), 1..6),
            allowed in prop::collection::vec(prop::bool::weighted(0.7), 70),
            constrained: bool,
            temperature in prop_oneof![Just(0.0f32), Just(1e-30), 0.1f32..3.0],
            top_k in prop_oneof![Just(0u32), 1u32..80],
            top_p in prop_oneof![Just(1.0f32), 0.001f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
            penalties in prop_oneof![Just((0.0f32, 0.0f32, 1.0f32)), (-2.0f32..2.0, -2.0f32..2.0, 0.2f32..3.0)],
            bias in prop::collection::vec((0u32..75, -9.0f32..9.0), 0..4),
            prompt in prop::collection::vec(0u32..80, 1..20),
            seed: u64,
        ) {
            prop_assume!(allowed.contains(&true));
            let mut bits = [0u64; 2];
            for (id, _) in allowed.iter().enumerate().filter(|(_, ok)| **ok) {
                bits[id / 64] |= 1 << (id % 64);
            }
            let sampling = Sampling {
                temperature, top_k, top_p, min_p, bias, seed,
                presence_penalty: penalties.0,
                frequency_penalty: penalties.1,
                repetition_penalty: penalties.2,
            };
            let mut usual = Sampler::new(sampling.clone(), &prompt, 8).unwrap();
            let mut hiding = Sampler::oblivious(sampling, &prompt, 8).unwrap();
            prop_assert!(hiding.is_oblivious() && !usual.is_oblivious());
            let mut scratch = Scratch::default();
            for row in rows {
                let row: Vec<f32> = row.into_iter().map(|x| f32::from(x) * 0.75).collect();
                let allowed = constrained.then_some(&bits[..]);
                let one = usual.sample(&mut row.clone(), allowed, &mut scratch);
                let other = hiding.sample(&mut row.clone(), allowed, &mut scratch);
                prop_assert_eq!(one, other);
            }
        }
    }

    /// What is kept, not only what is drawn of it.
    #[test]
    fn limits_are_found_where_sorting_finds_them() {
        let weights = [0.5f32, 1.0, 0.25, 0.5, 0.0, 0.5, 1e-30];
        let kept = |bits: &[u32]| -> Vec<usize> { (0..7).filter(|i| bits[*i] != 0).collect() };
        let isa = Isa::detect();
        for (count, expected) in [
            (1, &[1][..]),
            (2, &[0, 1]),
            (3, &[0, 1, 3]),
            (4, &[0, 1, 3, 5]),
            (6, &[0, 1, 2, 3, 5, 6]),
        ] {
            let mut bits = weights.map(f32::to_bits);
            keep_top_k(isa, &mut bits, count);
            assert_eq!(kept(&bits), expected, "{count}");
        }
        // Of 2.75 in all.
        for (top_p, expected) in [
            (f32::MIN_POSITIVE, &[1][..]),
            (0.36, &[1]),
            (0.37, &[0, 1]),
            (0.55, &[0, 1, 3]),
            (0.9, &[0, 1, 3, 5]),
            (0.95, &[0, 1, 2, 3, 5]),
        ] {
            let mut bits = weights.map(f32::to_bits);
            let fixed = weights.map(share);
            keep_top_p(isa, &mut bits, &fixed, top_p);
            assert_eq!(kept(&bits), expected, "{top_p}");
        }
    }
}
