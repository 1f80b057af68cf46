//! Keyed noise on reported log-probabilities: the same for the same tokens, whoever asks, however often, wherever.
//!
//! Noise that is drawn anew for each answer averages out over repeated requests. This noise is a function of a key, of all
//! tokens before a position, and of the token whose value is told:
//!
//! ```text
//! key   = HKDF-SHA-256(salt "casemate logprob perturbation v1", data key, info model digest)
//! u     = HMAC-SHA-256(key, tokens before, u32 LE each ‖ the token, u32 LE), its first 8 bytes, u64 LE
//! noise = amplitude · (⌊u / 2^11⌋ / 2^52 − 1)                          uniform in [−amplitude, amplitude)
//! ```
//! The data key is what all replicas of a model have in common and nobody outside of them and the provider knows, so a
//! second replica, a restart or another API key is no second draw; and neither are a seed, a temperature, a longer answer
//! or a prompt that already contains the answer's beginning. Another text before the position is one.

use aws_lc_rs::{hkdf, hmac};
use casemate_container::{DataKey, ModelDigest};
use zeroize::Zeroizing;

/// Separates this use of the data key from every other.
const SALT: &[u8] = b"casemate logprob perturbation v1";

/// What the noise depends on besides tokens. Secret: who has it can take the noise off.
pub struct PerturbationKey(hmac::Key);

impl PerturbationKey {
    /// The key of a model, the same in every enclave that was granted it.
    #[must_use]
    pub fn derive(data_key: &DataKey, model: &ModelDigest) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        hkdf::Salt::new(hkdf::HKDF_SHA256, SALT)
            .extract(data_key.expose())
            .expand(&[model.as_bytes()], hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(&mut *key))
            .expect("32 bytes are within HKDF's bounds");
        Self(hmac::Key::new(hmac::HMAC_SHA256, &*key))
    }
}

/// The noise along one answer.
#[derive(Clone)]
pub(super) struct Perturbation {
    /// Has taken in every token so far.
    context: hmac::Context,
    amplitude: f64,
}

impl Perturbation {
    /// Before the first token of an answer to `prompt`.
    pub(super) fn new(key: &PerturbationKey, amplitude: f64, prompt: &[u32]) -> Self {
        let mut noise = Self {
            context: hmac::Context::with_key(&key.0),
            amplitude,
        };
        prompt.iter().for_each(|&token| noise.push(token));
        noise
    }

    /// Goes on behind `token`.
    pub(super) fn push(&mut self, token: u32) {
        self.context.update(&token.to_le_bytes());
    }

    /// What is added to the log-probability of `token` at this position, in nats.
    pub(super) fn of(&self, token: u32) -> f64 {
        let mut context = self.context.clone();
        context.update(&token.to_le_bytes());
        let tag = context.sign();
        let first = tag.as_ref()[..8].try_into().expect("a tag has 32 bytes");
        let unit = (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
        self.amplitude * unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(data_key: u8, model: u8) -> PerturbationKey {
        PerturbationKey::derive(
            &DataKey::from_bytes(&[data_key; 32]),
            &ModelDigest([model; 32]),
        )
    }

    #[test]
    fn the_noise_is_that_of_the_tokens_wherever_the_prompt_ends() {
        let whole = Perturbation::new(&key(1, 2), 0.5, &[1, 2, 3]);
        let mut grown = Perturbation::new(&key(1, 2), 0.5, &[1]);
        grown.push(2);
        assert_ne!(grown.of(3), whole.of(3), "one token earlier");
        grown.push(3);
        for token in [0, 7, u32::MAX] {
            assert_eq!(grown.of(token), whole.of(token));
            assert_eq!(grown.of(token), grown.of(token), "asked again");
        }
    }

    #[test]
    fn everything_else_changes_it() {
        let noise = |data_key, model, prompt: &[u32], token| {
            Perturbation::new(&key(data_key, model), 1.0, prompt).of(token)
        };
        let one = noise(1, 2, &[5, 6], 7);
        for other in [
            noise(3, 2, &[5, 6], 7),
            noise(1, 3, &[5, 6], 7),
            noise(1, 2, &[5, 7], 7),
            noise(1, 2, &[6, 5], 7),
            noise(1, 2, &[5, 6], 8),
        ] {
            assert_ne!(one, other);
        }
    }

    /// Computed with Python's `hmac` and `hashlib`.
    #[test]
    fn a_known_answer() {
        let noise = Perturbation::new(&key(0x33, 0x22), 1.0, &[1, 403, 407]);
        assert_eq!(noise.of(261), 0.21318823386235297);
    }

    /// Mean and variance of a uniform distribution, and no value beyond the amplitude.
    #[test]
    fn it_is_uniform_and_bounded() {
        let noise = Perturbation::new(&key(9, 9), 0.25, &[1]);
        let values: Vec<f64> = (0..20_000).map(|token| noise.of(token)).collect();
        assert!(values.iter().all(|v| v.abs() <= 0.25));
        let mean = values.iter().sum::<f64>() / 20_000.0;
        let variance = values.iter().map(|v| v * v).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.005, "{mean}");
        assert!((variance - 0.0625 / 3.0).abs() < 0.001, "{variance}");
    }
}
