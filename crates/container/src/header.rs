//! The fixed-size header in front of everything, and the arithmetic of where things lie in the file.
//!
//! ```text
//!   0   8  magic            89 43 53 4d 54 0d 0a 1a
//!   8   2  format           1, little-endian
//!  10   1  suite            1
//!  11   1  chunk size       log2, 10 to 22
//!  12   4  manifest section bytes with tag, little-endian
//!  16   8  payload          bytes in the clear, little-endian
//!  24  16  file id          random
//!  40  32  salt             random
//!  72  32  key commitment
//! 104      manifest section, then chunks: each ciphertext ‖ tag
//! ```

use crate::error::{Malformed, OpenError};
use crate::manifest::{LARGEST_MANIFEST, LARGEST_PAYLOAD};

pub(crate) const HEADER_LEN: usize = 104;
pub(crate) const TAG_LEN: usize = 16;
/// Provider key and signature, in front of the manifest in its section.
pub(crate) const PREAMBLE_LEN: usize = 32 + 64;
/// Chunk size that [`crate::seal`] uses: argued in the specification.
pub(crate) const CHUNK_LOG2: u8 = 20;
const CHUNK_LOG2_RANGE: std::ops::RangeInclusive<u8> = 10..=22;

/// Not text, and damaged visibly by whatever rewrites line ends.
const MAGIC: [u8; 8] = [0x89, b'C', b'S', b'M', b'T', 0x0d, 0x0a, 0x1a];
const FORMAT: u16 = 1;
/// AES-256-GCM, HKDF-SHA-256, BLAKE3, Ed25519.
const SUITE: u8 = 1;

/// What can be read of a sealed file without its key. Nothing of it is authenticated before
/// [`crate::SealedFile::unlock`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub(crate) chunk_log2: u8,
    pub(crate) section_len: u32,
    pub(crate) payload_len: u64,
    pub(crate) file_id: [u8; 16],
    pub(crate) salt: [u8; 32],
    pub(crate) commitment: [u8; 32],
}

impl Header {
    /// Format version of the file; this crate reads 1.
    pub fn format(&self) -> u16 {
        FORMAT
    }

    /// Name of the cryptographic suite.
    pub fn suite(&self) -> &'static str {
        "AES-256-GCM, HKDF-SHA-256, BLAKE3, Ed25519"
    }

    /// Plaintext bytes per chunk; the final one may have fewer.
    pub fn chunk_len(&self) -> u64 {
        1 << self.chunk_log2
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> u64 {
        self.payload_len.div_ceil(self.chunk_len())
    }

    /// Bytes of tensors and assets, with the padding between them.
    pub fn payload_len(&self) -> u64 {
        self.payload_len
    }

    /// Bytes of the encrypted manifest with provider key, signature and tag.
    pub fn manifest_section_len(&self) -> u64 {
        self.section_len.into()
    }

    /// Random name of this one file: each sealing makes another.
    pub fn file_id(&self) -> &[u8; 16] {
        &self.file_id
    }

    /// The length that the file must have.
    pub fn file_len(&self) -> u64 {
        HEADER_LEN as u64
            + u64::from(self.section_len)
            + self.payload_len
            + self.chunks() * TAG_LEN as u64
    }

    /// Plaintext length of chunk `index`.
    pub(crate) fn chunk_plain_len(&self, index: u64) -> usize {
        let rest = self.payload_len - index * self.chunk_len();
        rest.min(self.chunk_len()) as usize
    }

    /// Where chunk `index` begins in the file.
    pub(crate) fn chunk_position(&self, index: u64) -> u64 {
        HEADER_LEN as u64
            + u64::from(self.section_len)
            + index * (self.chunk_len() + TAG_LEN as u64)
    }

    pub(crate) fn is_final(&self, index: u64) -> bool {
        index + 1 == self.chunks()
    }

    pub(crate) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[10] = SUITE;
        bytes[11] = self.chunk_log2;
        bytes[12..16].copy_from_slice(&self.section_len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.file_id);
        bytes[40..72].copy_from_slice(&self.salt);
        bytes[72..].copy_from_slice(&self.commitment);
        bytes
    }

    pub(crate) fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, OpenError> {
        if bytes[..8] != MAGIC {
            return Err(Malformed::NotAContainer.into());
        }
        let format = u16::from_le_bytes(part(bytes, 8));
        if format != FORMAT {
            return Err(Malformed::Format { found: format }.into());
        }
        if bytes[10] != SUITE {
            return Err(Malformed::Suite { found: bytes[10] }.into());
        }
        let header = Header {
            chunk_log2: bytes[11],
            section_len: u32::from_le_bytes(part(bytes, 12)),
            payload_len: u64::from_le_bytes(part(bytes, 16)),
            file_id: part(bytes, 24),
            salt: part(bytes, 40),
            commitment: part(bytes, 72),
        };
        if !CHUNK_LOG2_RANGE.contains(&header.chunk_log2) {
            return Err(Malformed::ChunkSize {
                log2: header.chunk_log2,
            }
            .into());
        }
        let shortest = PREAMBLE_LEN + 1 + TAG_LEN;
        let longest = PREAMBLE_LEN + LARGEST_MANIFEST + TAG_LEN;
        if !(shortest..=longest).contains(&(header.section_len as usize)) {
            return Err(Malformed::ManifestLength {
                found: header.section_len,
            }
            .into());
        }
        if !(1..=LARGEST_PAYLOAD).contains(&header.payload_len) {
            return Err(Malformed::PayloadLength {
                found: header.payload_len,
            }
            .into());
        }
        Ok(header)
    }
}

fn part<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_header() -> impl Strategy<Value = Header> {
        (
            CHUNK_LOG2_RANGE,
            113..=(LARGEST_MANIFEST as u32 + 112),
            1..=LARGEST_PAYLOAD,
            any::<[u8; 16]>(),
            any::<[u8; 32]>(),
            any::<[u8; 32]>(),
        )
            .prop_map(
                |(chunk_log2, section_len, payload_len, file_id, salt, commitment)| Header {
                    chunk_log2,
                    section_len,
                    payload_len,
                    file_id,
                    salt,
                    commitment,
                },
            )
    }

    proptest! {
        #[test]
        fn headers_read_back(header in any_header()) {
            prop_assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
        }

        #[test]
        fn any_bytes_are_refused_or_read_back(mut bytes in proptest::array::uniform32(any::<u8>())) {
            let mut whole = [0; HEADER_LEN];
            whole[..8].copy_from_slice(&MAGIC);
            bytes[0] &= 1;
            whole[8..40].copy_from_slice(&bytes);
            if let Ok(header) = Header::parse(&whole) {
                prop_assert_eq!(header.to_bytes(), whole);
            }
        }

        #[test]
        fn chunks_tile_the_file(header in any_header(), at in any::<u64>()) {
            let last = header.chunks() - 1;
            let index = at % header.chunks();
            prop_assert_eq!(header.is_final(index), index == last);
            if index < last {
                prop_assert_eq!(header.chunk_plain_len(index) as u64, header.chunk_len());
                let end = header.chunk_position(index) + header.chunk_len() + TAG_LEN as u64;
                prop_assert_eq!(end, header.chunk_position(index + 1));
            }
            let end = header.chunk_position(last) + (header.chunk_plain_len(last) + TAG_LEN) as u64;
            prop_assert_eq!(end, header.file_len());
        }
    }

    #[test]
    fn refuses_every_field_out_of_range() {
        let good = Header {
            chunk_log2: 20,
            section_len: 500,
            payload_len: 9,
            file_id: [1; 16],
            salt: [2; 32],
            commitment: [3; 32],
        };
        let malformed = |edit: &dyn Fn(&mut [u8; HEADER_LEN])| {
            let mut bytes = good.to_bytes();
            edit(&mut bytes);
            match Header::parse(&bytes) {
                Err(OpenError::Malformed(m)) => m,
                other => panic!("{other:?}"),
            }
        };
        for i in 0..8 {
            assert!(matches!(
                malformed(&|b| b[i] ^= 1),
                Malformed::NotAContainer
            ));
        }
        assert!(matches!(
            malformed(&|b| b[8] = 2),
            Malformed::Format { found: 2 }
        ));
        assert!(matches!(
            malformed(&|b| b[9] = 1),
            Malformed::Format { found: 257 }
        ));
        assert!(matches!(
            malformed(&|b| b[10] = 0),
            Malformed::Suite { found: 0 }
        ));
        assert!(matches!(
            malformed(&|b| b[11] = 9),
            Malformed::ChunkSize { log2: 9 }
        ));
        assert!(matches!(
            malformed(&|b| b[11] = 23),
            Malformed::ChunkSize { log2: 23 }
        ));
        let section = |n: u32| malformed(&|b| b[12..16].copy_from_slice(&n.to_le_bytes()));
        assert!(matches!(
            section(112),
            Malformed::ManifestLength { found: 112 }
        ));
        assert!(matches!(
            section(u32::MAX),
            Malformed::ManifestLength { .. }
        ));
        let payload = |n: u64| malformed(&|b| b[16..24].copy_from_slice(&n.to_le_bytes()));
        assert!(matches!(payload(0), Malformed::PayloadLength { found: 0 }));
        assert!(matches!(
            payload(LARGEST_PAYLOAD + 1),
            Malformed::PayloadLength { .. }
        ));
    }
}
