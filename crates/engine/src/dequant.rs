//! Stored weights to f32, exactly as GGUF defines each encoding. Scalar: it runs once per tensor at
//! load and for single embedding rows. Packing for the kernels is theirs; choosing what to convert
//! is [`crate::weights`]'.
//!
//! All encodings are little-endian. Blocks, in bytes (`d`, `m` are f16):
//! ```text
//! Q8_0  32 weights: d | 32 × i8                                    w = d·q
//! Q4_0  32 weights: d | 16 × (low: weight i, high: weight i + 16)  w = d·(q − 8)
//! Q4_1  32 weights: d | m | 16 × as Q4_0                           w = d·q + m
//! Q4_K 256 weights: d | dmin | 12 bytes: 8 scales and 8 minima of 6 bits | 128 × nibbles
//! Q6_K 256 weights: 128 × low nibbles | 64 × high bit pairs | 16 × i8 scales | d
//! ```

use casemate_container::DType;
use half::{bf16, f16};

/// Weights in one block of the k-quantised encodings.
const K: usize = 256;

/// Converts whole blocks of `bytes` into `out`.
///
/// # Panics
/// If `bytes` is not exactly the encoding of `out.len()` weights; callers have checked the tensor's
/// size.
pub fn dequantise(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        dtype.bytes_for(&[out.len() as u64]),
        Some(bytes.len() as u64),
        "bytes are whole blocks of the output"
    );
    match dtype {
        DType::F32 => each(bytes, out, |b: &[u8; 4]| f32::from_le_bytes(*b)),
        DType::F16 => each(bytes, out, |b: &[u8; 2]| f16::from_le_bytes(*b).to_f32()),
        DType::BF16 => each(bytes, out, |b: &[u8; 2]| bf16::from_le_bytes(*b).to_f32()),
        DType::Q8_0 => blocks(bytes, out, q8_0),
        DType::Q4_0 => blocks(bytes, out, q4_0),
        DType::Q4_1 => blocks(bytes, out, q4_1),
        DType::Q4_K => blocks(bytes, out, q4_k),
        DType::Q6_K => blocks(bytes, out, q6_k),
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn(&[u8; N]) -> f32) {
    let (values, _) = bytes.as_chunks::<N>();
    for (value, out) in values.iter().zip(out) {
        *out = convert(value);
    }
}

fn blocks<const N: usize, const W: usize>(
    bytes: &[u8],
    out: &mut [f32],
    convert: impl Fn(&[u8; N], &mut [f32; W]),
) {
    let (from, _) = bytes.as_chunks::<N>();
    let (to, _) = out.as_chunks_mut::<W>();
    for (from, to) in from.iter().zip(to) {
        convert(from, to);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = d * f32::from(q as i8);
    }
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Eight groups of 32 weights; group `g` has scale and minimum of six bits each in `packed[0..12]`:
/// the first four in the low bits of bytes `g` and `g + 4`, the others split over bytes `g + 4` and
/// the high bits of the first eight.
fn q4_k(block: &[u8; 144], out: &mut [f32; K]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (packed, quants) = block[4..].split_at(12);
    for (g, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, minimum) = if g < 4 {
            (packed[g] & 63, packed[g + 4] & 63)
        } else {
            (
                (packed[g + 4] & 15) | (packed[g - 4] >> 6 << 4),
                (packed[g + 4] >> 4) | (packed[g] >> 6 << 4),
            )
        };
        let (scale, minimum) = (d * f32::from(scale), dmin * f32::from(minimum));
        // Two groups share 32 bytes: the even one has the low nibbles.
        let quants = &quants[g / 2 * 32..][..32];
        for (out, &q) in out.iter_mut().zip(quants) {
            let q = if g % 2 == 0 { q & 15 } else { q >> 4 };
            *out = scale * f32::from(q) - minimum;
        }
    }
}

/// Two halves of 128 weights; in a half, weight `32·part + i` has its low nibble in byte `32·(part
/// % 2) + i` (upper nibble from part 2 on), its two high bits in bits `2·part` of byte `i`, and
/// shares a scale with 15 neighbours.
fn q6_k(block: &[u8; 210], out: &mut [f32; K]) {
    let (low, rest) = block.split_at(128);
    let (high, scales) = rest.split_at(64);
    let d = half_at(block, 208);
    for (h, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        for (n, out) in out.iter_mut().enumerate() {
            let (part, i) = (n / 32, n % 32);
            let low = low[h * 64 + part % 2 * 32 + i] >> (part / 2 * 4) & 15;
            let high = high[h * 32 + i] >> (part * 2) & 3;
            let scale = scales[h * 8 + n / 16] as i8;
            *out = d * f32::from(scale) * (f32::from(low | high << 4) - 32.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    fn run(dtype: DType, bytes: &[u8], n: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; n];
        dequantise(dtype, bytes, &mut out);
        out
    }

    #[test]
    fn plain_encodings() {
        assert_eq!(
            run(DType::F32, &[0, 0, 0xc0, 0x3f, 0, 0, 0, 0x80], 2),
            [1.5, -0.0]
        );
        assert_eq!(run(DType::F16, &[0, 0x3e, 1, 0], 2), [1.5, 5.960_464_5e-8]);
        assert_eq!(
            run(DType::BF16, &[0xc0, 0x3f, 0x80, 0xff], 2),
            [1.5, f32::NEG_INFINITY]
        );
    }

    #[test]
    fn q8_0_scales_signed_bytes() {
        let mut block = half(0.5).to_vec();
        block.extend((0..32u8).map(|i| if i == 31 { 0x80 } else { i }));
        block.extend(half(-2.0));
        block.extend([1; 32]);
        let out = run(DType::Q8_0, &block, 64);
        assert_eq!(
            (out[1], out[30], out[31], out[32]),
            (0.5, 15.0, -64.0, -2.0)
        );
    }

    #[test]
    fn q4_puts_low_nibbles_first() {
        let mut nibbles = [0u8; 16];
        nibbles[0] = 0xf1;
        nibbles[15] = 0x29;
        let out = run(DType::Q4_0, &[&half(2.0)[..], &nibbles].concat(), 32);
        assert_eq!(
            (out[0], out[15], out[16], out[31], out[1]),
            (-14.0, 2.0, 14.0, -12.0, -16.0)
        );
        let out = run(
            DType::Q4_1,
            &[&half(2.0)[..], &half(-0.5), &nibbles].concat(),
            32,
        );
        assert_eq!(
            (out[0], out[15], out[16], out[31], out[1]),
            (1.5, 17.5, 29.5, 3.5, -0.5)
        );
    }

    /// The k encodings against a straightforward reading of the format's definition in loops over
    /// pointers.
    #[test]
    fn k_encodings_follow_their_definition() {
        let mut state = 1u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for _ in 0..50 {
            let mut block: Vec<u8> = (0..144).map(|_| byte()).collect();
            block[..4].copy_from_slice(&[half(0.25), half(0.75)].concat());
            let (scales, quants) = (&block[4..16], &block[16..]);
            let mut expected = Vec::new();
            for pair in 0..4 {
                let six = |j: usize| -> (f32, f32) {
                    let (s, m) = if j < 4 {
                        (scales[j] & 63, scales[j + 4] & 63)
                    } else {
                        (
                            (scales[j + 4] & 0xf) | ((scales[j - 4] >> 6) << 4),
                            (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4),
                        )
                    };
                    (0.25 * f32::from(s), 0.75 * f32::from(m))
                };
                let q = &quants[pair * 32..(pair + 1) * 32];
                let (d1, m1) = six(pair * 2);
                expected.extend(q.iter().map(|&q| d1 * f32::from(q & 0xf) - m1));
                let (d2, m2) = six(pair * 2 + 1);
                expected.extend(q.iter().map(|&q| d2 * f32::from(q >> 4) - m2));
            }
            assert_eq!(run(DType::Q4_K, &block, 256), expected);

            let mut block: Vec<u8> = (0..210).map(|_| byte()).collect();
            block[208..].copy_from_slice(&half(0.5));
            let mut expected = vec![0.0; 256];
            for half in 0..2 {
                let (ql, qh, sc, y) = (half * 64, 128 + half * 32, 192 + half * 8, half * 128);
                for l in 0..32 {
                    let is = l / 16;
                    let q = |low: u8, shift: u8| {
                        f32::from((low & 0xf) | ((block[qh + l] >> shift & 3) << 4)) - 32.0
                    };
                    let s = |i: usize| 0.5 * f32::from(block[sc + is + i] as i8);
                    expected[y + l] = s(0) * q(block[ql + l], 0);
                    expected[y + l + 32] = s(2) * q(block[ql + l + 32], 2);
                    expected[y + l + 64] = s(4) * q(block[ql + l] >> 4, 4);
                    expected[y + l + 96] = s(6) * q(block[ql + l + 32] >> 4, 6);
                }
            }
            assert_eq!(run(DType::Q6_K, &block, 256), expected);
        }
    }

    #[test]
    #[should_panic(expected = "whole blocks")]
    fn refuses_partial_blocks() {
        run(DType::Q8_0, &[0; 34], 31);
    }
}
