//! Models of published shapes with random weights, made while they are read: nothing is downloaded and nothing is held.
//! The same name gives the same bytes everywhere. What they say is noise; how long it takes is what is measured.

use std::fmt;

use casemate_container::{
    DType, Family, ModelConfig, ModelSource, RopeLayout, RopeScaling, SourceError, SourceTensor,
};
use casemate_testkit::models::{self, Vocabulary};
use clap::ValueEnum;

/// Whose shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// 6.7 billion weights: 32 layers of 4096, feed-forward 11008, 32 heads.
    #[value(name = "llama2-7b")]
    Llama2With7B,
    /// 13.0 billion weights: 40 layers of 5120, feed-forward 13824, 40 heads.
    #[value(name = "llama2-13b")]
    Llama2With13B,
    /// 1.1 billion weights: 22 layers of 2048, feed-forward 5632, 32 heads over 4.
    #[value(name = "tinyllama-1.1b")]
    TinyLlama,
    /// 8.0 billion weights: 32 layers of 4096, feed-forward 14336, 32 heads over 8.
    #[value(name = "llama3-8b")]
    Llama3With8B,
    /// 9 million weights: to see that everything works.
    #[value(name = "smoke")]
    Smoke,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shape::Llama2With7B => "llama2-7b",
            Shape::Llama2With13B => "llama2-13b",
            Shape::TinyLlama => "tinyllama-1.1b",
            Shape::Llama3With8B => "llama3-8b",
            Shape::Smoke => "smoke",
        })
    }
}

impl Shape {
    /// The architecture. Every context is at least 4096, also TinyLlama's, which was trained for 2048: positions are no
    /// weights, and so all shapes can be measured at 2048.
    pub(crate) fn config(self) -> ModelConfig {
        // hidden, layers, heads, kv_heads, ffn, vocab, context
        let [hidden, layers, heads, kv_heads, ffn, vocab, context] = match self {
            Shape::Llama2With7B => [4096, 32, 32, 32, 11008, 32000, 4096],
            Shape::Llama2With13B => [5120, 40, 40, 40, 13824, 32000, 4096],
            Shape::TinyLlama => [2048, 22, 32, 4, 5632, 32000, 4096],
            Shape::Llama3With8B => [4096, 32, 32, 8, 14336, 128_256, 8192],
            Shape::Smoke => [256, 4, 4, 2, 768, 4096, 4096],
        };
        ModelConfig {
            family: Family::Llama,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim: hidden / heads,
            ffn,
            vocab,
            context,
            norm_eps: 1e-5,
            rope_theta: if self == Shape::Llama3With8B {
                500_000.0
            } else {
                10_000.0
            },
            rope_scaling: RopeScaling::None,
            rope_layout: RopeLayout::Interleaved,
            sliding_window: None,
            tied_embeddings: false,
            qkv_bias: false,
            bos: Some(models::special_token(models::BEGIN)),
            eos: vec![
                models::special_token(models::END),
                models::special_token("<|im_end|>"),
            ],
            add_bos: true,
        }
    }
}

/// Random weights in a shape.
pub(crate) struct Synthetic {
    name: String,
    config: ModelConfig,
    tensors: Vec<SourceTensor>,
    assets: Vec<(String, Vec<u8>)>,
    vocabulary: Vocabulary,
}

impl Synthetic {
    /// Matrices in `dtype`, which is Q8_0, Q4_0 or BF16; vectors are F32.
    pub(crate) fn new(shape: Shape, dtype: DType) -> Synthetic {
        assert!(
            matches!(dtype, DType::Q8_0 | DType::Q4_0 | DType::BF16),
            "no generator for {dtype}"
        );
        let config = shape.config();
        let [hidden, ffn, vocab] = [config.hidden, config.ffn, config.vocab].map(u64::from);
        let kv = u64::from(config.kv_heads * config.head_dim);
        let mut tensors = Vec::new();
        let mut add = |name: String, dtype: DType, shape: Vec<u64>| {
            let size = dtype
                .bytes_for(&shape)
                .expect("the shapes above have sizes");
            tensors.push(SourceTensor {
                name,
                dtype,
                shape,
                size,
            });
        };
        add("token_embd.weight".into(), dtype, vec![vocab, hidden]);
        add("output.weight".into(), dtype, vec![vocab, hidden]);
        add("output_norm.weight".into(), DType::F32, vec![hidden]);
        for layer in 0..config.layers {
            for (part, rows, columns) in [
                ("attn_q", hidden, hidden),
                ("attn_k", kv, hidden),
                ("attn_v", kv, hidden),
                ("attn_output", hidden, hidden),
                ("ffn_gate", ffn, hidden),
                ("ffn_up", ffn, hidden),
                ("ffn_down", hidden, ffn),
            ] {
                add(
                    format!("blk.{layer}.{part}.weight"),
                    dtype,
                    vec![rows, columns],
                );
            }
            for part in ["attn_norm", "ffn_norm"] {
                add(
                    format!("blk.{layer}.{part}.weight"),
                    DType::F32,
                    vec![hidden],
                );
            }
        }
        let vocabulary = models::padded_vocabulary(config.vocab as usize);
        Synthetic {
            name: shape.to_string(),
            assets: models::assets(&vocabulary),
            config,
            tensors,
            vocabulary,
        }
    }

    /// The tokens behind the tokenizer.
    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

/// Scale of the weights, 0.00045 in half precision: with levels of ±127 their deviation is 0.033.
const Q8_SCALE: [u8; 2] = [0x60, 0x0f];
/// Scale 0.0071 for levels of ±8.
const Q4_SCALE: [u8; 2] = [0x40, 0x1f];

impl ModelSource for Synthetic {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        let tensor = &self.tensors[index];
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > tensor.size) {
            return Err(SourceError::Short {
                tensor: tensor.name.clone(),
            });
        }
        // Every byte depends on its place only, so that ranges may be read in any order and more than once.
        let (block, scale) = match tensor.dtype {
            DType::BF16 => {
                fill_random((index as u64) << 40, offset, out);
                // Sign and mantissa are random; the exponent is that of 1/128 to 1/32.
                for (_, high) in (offset..).zip(out).filter(|(at, _)| at % 2 == 1) {
                    *high = *high & 0x80 | 0x3c;
                }
                return Ok(());
            }
            DType::Q8_0 => (34, Q8_SCALE),
            DType::Q4_0 => (18, Q4_SCALE),
            _ => {
                for (at, byte) in (offset..).zip(out) {
                    *byte = 1f32.to_le_bytes()[(at % 4) as usize];
                }
                return Ok(());
            }
        };
        fill_random((index as u64) << 40, offset, out);
        // The first two bytes of each block are its scale; a range may begin or end between them.
        let mut start = offset / block * block;
        while start < offset + out.len() as u64 {
            for (at, byte) in (start..).zip(scale) {
                if let Some(slot) = at.checked_sub(offset).and_then(|i| out.get_mut(i as usize)) {
                    *slot = byte;
                }
            }
            start += block;
        }
        Ok(())
    }

    fn assets(&self) -> &[(String, Vec<u8>)] {
        &self.assets
    }
}

/// Bytes `offset..` of the stream `seed`: SplitMix64 of each eighth position.
fn fill_random(seed: u64, offset: u64, out: &mut [u8]) {
    let word = |at: u64| {
        let mut z = (seed ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    };
    let skip = (offset % 8) as usize;
    let head = if skip == 0 {
        0
    } else {
        (8 - skip).min(out.len())
    };
    let (first, rest) = out.split_at_mut(head);
    first.copy_from_slice(&word(offset / 8)[skip..][..head]);
    for (at, eight) in (offset.div_ceil(8)..).zip(rest.chunks_mut(8)) {
        eight.copy_from_slice(&word(at)[..eight.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(shape: Shape) -> u64 {
        let model = Synthetic::new(shape, DType::Q8_0);
        model.config.check().unwrap();
        model
            .tensors
            .iter()
            .map(|t| t.shape.iter().product::<u64>())
            .sum()
    }

    #[test]
    fn shapes_have_the_published_number_of_weights() {
        assert_eq!(parameters(Shape::Llama2With7B), 6_738_415_616);
        assert_eq!(parameters(Shape::Llama2With13B), 13_015_864_320);
        assert_eq!(parameters(Shape::TinyLlama), 1_100_048_384);
        assert_eq!(parameters(Shape::Llama3With8B), 8_030_261_248);
    }

    #[test]
    fn any_range_reads_as_the_whole_does() {
        for dtype in [DType::Q8_0, DType::Q4_0, DType::BF16] {
            let model = Synthetic::new(Shape::Smoke, dtype);
            // An embedding, and a norm.
            for index in [0, 2] {
                let mut whole = vec![0; 1000];
                model.read_tensor(index, 0, &mut whole).unwrap();
                for start in [0usize, 1, 7, 8, 17, 18, 33, 34, 35, 511] {
                    for length in [0, 1, 2, 7, 8, 9, 33, 36, 400] {
                        let mut part = vec![0; length];
                        model.read_tensor(index, start as u64, &mut part).unwrap();
                        assert_eq!(
                            part,
                            whole[start..start + length],
                            "{dtype} {start} {length}"
                        );
                    }
                }
            }
            let mut beyond = [0];
            let end = model.tensors[0].size;
            assert!(matches!(
                model.read_tensor(0, end, &mut beyond),
                Err(SourceError::Short { .. })
            ));
        }
    }

    #[test]
    fn weights_are_spread_and_tensors_differ() {
        let model = Synthetic::new(Shape::Smoke, DType::Q8_0);
        let read = |index| {
            let mut bytes = vec![0; 34 * 1000];
            model.read_tensor(index, 0, &mut bytes).unwrap();
            bytes
        };
        let (a, b) = (read(0), read(1));
        assert_ne!(a, b);
        let weights: Vec<f64> = a
            .chunks(34)
            .flat_map(|block| block[2..].iter().map(|&b| f64::from(b.cast_signed())))
            .collect();
        let deviation = crate::statistics::deviation(&weights);
        // Uniform over -128..=127: 256 / sqrt(12).
        assert!((deviation - 73.9).abs() < 1.0, "{deviation}");
        assert!(crate::statistics::mean(&weights).abs() < 2.0);
    }
}
