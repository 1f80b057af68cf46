//! Rotary position embedding with precomputed angles.
//!
//! Scaling of frequencies (linear, Llama 3) is the caller's: a [`RopeTable`] is made from the
//! frequencies it chose.

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Elements 2i and 2i + 1 (GGUF llama, llama2.c).
    Interleaved,
    /// Elements i and i + rotated / 2 (Hugging Face, GGUF qwen2).
    Half,
}

/// Cosines and sines of every position and frequency.
pub struct RopeTable {
    angles: Vec<[f32; 2]>,
    frequencies: usize,
}

impl RopeTable {
    /// Angle = position * frequency in f32; its cosine and sine are taken in f64 and rounded. A
    /// frequency rotates two elements, so there are `head_dim / 2` of them, or fewer to leave the
    /// tail of each head alone.
    pub fn new(frequencies: &[f32], positions: usize) -> RopeTable {
        let angles = (0..positions)
            .flat_map(|position| {
                frequencies
                    .iter()
                    .map(move |f| f64::from(position as f32 * f))
            })
            .map(|angle| [angle.cos() as f32, angle.sin() as f32])
            .collect();
        RopeTable {
            angles,
            frequencies: frequencies.len(),
        }
    }

    /// Positions.
    pub fn positions(&self) -> usize {
        self.angles.len().checked_div(self.frequencies).unwrap_or(0)
    }

    /// Rotates each head (`head_dim` long) of `x` to `position`: `(a, b)` becomes `(a cos - b sin,
    /// b cos + a sin)`.
    ///
    /// # Panics
    /// If the position is not in the table, `x` is not a whole number of heads, or a head is
    /// shorter than the elements to rotate.
    pub fn apply(&self, layout: RopeLayout, position: usize, head_dim: usize, x: &mut [f32]) {
        assert!(
            2 * self.frequencies <= head_dim,
            "{} frequencies for heads of {head_dim}",
            self.frequencies
        );
        assert!(
            x.len().is_multiple_of(head_dim),
            "{} is not a number of heads of {head_dim}",
            x.len()
        );
        let angles = &self.angles[position * self.frequencies..(position + 1) * self.frequencies];
        for head in x.chunks_exact_mut(head_dim) {
            let head = &mut head[..2 * self.frequencies];
            match layout {
                RopeLayout::Interleaved => {
                    for ([a, b], angle) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                        rotate(a, b, angle);
                    }
                }
                RopeLayout::Half => {
                    let (low, high) = head.split_at_mut(self.frequencies);
                    for ((a, b), angle) in low.iter_mut().zip(high).zip(angles) {
                        rotate(a, b, angle);
                    }
                }
            }
        }
    }
}

/// Not fused, so that the compiler may vectorise it for any machine without changing a bit.
#[inline(always)]
fn rotate(a: &mut f32, b: &mut f32, [cos, sin]: &[f32; 2]) {
    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
}
