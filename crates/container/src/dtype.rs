//! How the elements of a tensor are encoded, and how many bytes a shape takes in each encoding.

use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};

/// Element encoding of a tensor. The quantised ones are GGML's blocks along the innermost dimension, byte for
/// byte; the CBOR indices are GGML's type numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
#[allow(
    non_camel_case_types,
    reason = "these are the field's names for the encodings"
)]
pub enum DType {
    /// IEEE 754 binary32, little-endian.
    #[n(0)]
    F32,
    /// IEEE 754 binary16, little-endian.
    #[n(1)]
    F16,
    /// 32 elements: one f16 scale, 32 × 4 bit.
    #[n(2)]
    Q4_0,
    /// 32 elements: f16 scale, f16 minimum, 32 × 4 bit.
    #[n(3)]
    Q4_1,
    /// 32 elements: f16 scale, 32 × i8.
    #[n(8)]
    Q8_0,
    /// 256 elements: two f16 super-scales, 12 bytes of 6-bit scales and minima, 256 × 4 bit.
    #[n(12)]
    Q4_K,
    /// 256 elements: 128 bytes low 4 bits, 64 bytes high 2 bits, 16 × i8 scales, f16 super-scale.
    #[n(14)]
    Q6_K,
    /// The upper half of an IEEE 754 binary32, little-endian.
    #[n(30)]
    BF16,
}

/// Text that names no [`DType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such tensor encoding")]
pub struct UnknownDType;

impl DType {
    /// Every encoding, for tables and tests.
    pub const ALL: [DType; 8] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q4_K,
        DType::Q6_K,
    ];

    /// Elements per block; 1 for the plain encodings.
    pub const fn block_len(self) -> u64 {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => 32,
            DType::Q4_K | DType::Q6_K => 256,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q8_0 => 34,
            DType::Q4_0 => 18,
            DType::Q4_1 => 20,
            DType::Q4_K => 144,
            DType::Q6_K => 210,
        }
    }

    /// Bytes that a tensor of this row-major shape takes. `None` for an empty shape, a zero dimension, an
    /// innermost dimension that is no multiple of the block, or a product beyond 64 bits.
    pub fn bytes_for(self, shape: &[u64]) -> Option<u64> {
        let (&inner, outer) = shape.split_last()?;
        if inner == 0 || !inner.is_multiple_of(self.block_len()) {
            return None;
        }
        let row = (inner / self.block_len()).checked_mul(self.block_bytes())?;
        outer.iter().try_fold(row, |bytes, &dim| match dim {
            0 => None,
            _ => bytes.checked_mul(dim),
        })
    }

    /// The field's name for it, for example `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Q8_0 => "Q8_0",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q4_K => "Q4_K",
            DType::Q6_K => "Q6_K",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        DType::ALL
            .into_iter()
            .find(|d| d.name() == text)
            .ok_or(UnknownDType)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_those_of_ggml() {
        // Bits per weight, which is how these encodings are usually quoted: 34·8/32 = 8.5 and so on.
        let bits = |d: DType| d.block_bytes() as f64 * 8.0 / d.block_len() as f64;
        let expected = [
            (DType::F32, 32.0),
            (DType::F16, 16.0),
            (DType::BF16, 16.0),
            (DType::Q8_0, 8.5),
            (DType::Q4_0, 4.5),
            (DType::Q4_1, 5.0),
            (DType::Q4_K, 4.5),
            (DType::Q6_K, 6.5625),
        ];
        for (dtype, want) in expected {
            assert_eq!(bits(dtype), want, "{dtype}");
        }
    }

    #[test]
    fn shapes_that_have_no_size_are_refused() {
        assert_eq!(DType::F32.bytes_for(&[]), None);
        assert_eq!(DType::F32.bytes_for(&[3, 0]), None);
        assert_eq!(DType::F32.bytes_for(&[0, 3]), None);
        assert_eq!(DType::Q8_0.bytes_for(&[4, 33]), None);
        assert_eq!(DType::Q4_K.bytes_for(&[4, 128]), None);
        assert_eq!(DType::F32.bytes_for(&[1 << 40, 1 << 40]), None);
        assert_eq!(DType::F32.bytes_for(&[u64::MAX]), None);
        assert_eq!(DType::Q6_K.bytes_for(&[3, 512]), Some(3 * 2 * 210));
        assert_eq!(DType::F32.bytes_for(&[5]), Some(20));
    }

    #[test]
    fn names_parse_back() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!("q4_k".parse::<DType>(), Err(UnknownDType));
    }
}
