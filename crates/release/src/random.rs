//! The source of randomness as an argument, so that vectors and tests can fix it.

use crate::ReleaseError;

/// Fills buffers with bytes nobody can guess.
pub trait Random: Send + Sync {
    /// Fills `out` completely.
    ///
    /// # Errors
    /// [`ReleaseError::Crypto`] when the generator fails; `out` must then not be used.
    fn fill(&self, out: &mut [u8]) -> Result<(), ReleaseError>;
}

/// The operating system's generator through aws-lc-rs.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&self, out: &mut [u8]) -> Result<(), ReleaseError> {
        aws_lc_rs::rand::fill(out).map_err(|_| ReleaseError::Crypto("random generator"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;

    /// The bytes 00 01 02 … ff 00 …; the randomness behind the vectors.
    #[derive(Default)]
    pub(crate) struct Counting(AtomicU8);

    impl Random for Counting {
        fn fill(&self, out: &mut [u8]) -> Result<(), ReleaseError> {
            for byte in out {
                *byte = self.0.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    }

    /// A generator that only ever returns zeros, as a broken one might.
    pub(crate) struct Zeros;

    impl Random for Zeros {
        fn fill(&self, out: &mut [u8]) -> Result<(), ReleaseError> {
            out.fill(0);
            Ok(())
        }
    }

    #[test]
    fn the_system_generator_does_not_repeat_itself() {
        let mut draws = [[0u8; 32]; 4];
        for draw in &mut draws {
            SystemRandom.fill(draw).unwrap();
        }
        for (i, a) in draws.iter().enumerate() {
            assert!(draws[i + 1..].iter().all(|b| a != b));
        }
    }
}
