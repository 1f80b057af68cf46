//! What everything secret here is made of: a key that is drawn when the enclave starts, and uniform
//! field elements from it.
//!
//! ```text
//! PRK      = HKDF-Extract(32 zero bytes, boot key)                        SHA-256
//! key      = HKDF-Expand(PRK, "casemate/1 offload " + purpose)            one a purpose
//! stream   = AES-256-CTR(key), first counter block = group u32 ‖ index u64 ‖ 0 u32, big-endian
//! words    = the stream in pieces of 4 bytes, little-endian, of which the lowest 29 or 31 bits count
//! elements = the words that are less than p, in order
//! ```
//! The boot key is never stored, so nothing made from it outlives the process.

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use aws_lc_rs::cipher::{AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::hkdf;
use aws_lc_rs::iv::FixedLength;
use casemate_field::Field;
use zeroize::Zeroizing;

/// Bytes of the stream that are made at once.
const PIECE: usize = 4096;
/// Bytes of a block of the cipher.
const BLOCK: usize = 16;

/// The secret of one run of an enclave, from which all pads, checks and seals come.
pub struct BootKey(Zeroizing<[u8; 32]>);

impl BootKey {
    /// The key of these bytes, which must be fresh from the system's randomness, never stored, and used
    /// for one [`Offload`](crate::Offload): a second one would use its pads again.
    #[must_use]
    pub fn new(fresh: Zeroizing<[u8; 32]>) -> BootKey {
        BootKey(fresh)
    }

    /// The uniform elements of one purpose.
    pub(crate) fn uniform(&self, purpose: &[u8]) -> Uniform {
        let key = self.derive(purpose);
        let key = UnboundCipherKey::new(&AES_256, &*key).and_then(EncryptingKey::ctr);
        Uniform {
            key: key.expect("AES-256 takes 32 bytes and has a counter mode"),
            #[cfg(test)]
            broken: None,
        }
    }

    /// The key for what lies outside of the enclave's memory.
    pub(crate) fn seal(&self) -> LessSafeKey {
        let key = self.derive(b"spill");
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).expect("AES-256 takes 32 bytes"))
    }

    fn derive(&self, purpose: &[u8]) -> Zeroizing<[u8; 32]> {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &[0; 32]).extract(&*self.0);
        let mut key = Zeroizing::new([0; 32]);
        prk.expand(&[b"casemate/1 offload ", purpose], hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(key.as_mut_slice()))
            .expect("32 bytes are within HKDF's bounds");
        key
    }
}

/// Uniform rows of field elements, each regenerated from its place alone.
pub(crate) struct Uniform {
    key: EncryptingKey,
    /// How the sampler is broken on purpose, so that the detectors can be seen to fire.
    #[cfg(test)]
    pub(crate) broken: Option<fn(Field, &mut [u32])>,
}

impl Uniform {
    /// Writes the row of this place. The time it takes depends on which words were refused, which
    /// says nothing of those that were not.
    pub(crate) fn row(&self, field: Field, group: u32, index: u64, out: &mut [u32]) {
        let mut piece = Zeroizing::new([0; PIECE]);
        let (mut filled, mut block) = (0, 0);
        while filled < out.len() {
            let bytes = ((out.len() - filled) * 4).min(PIECE);
            let piece = &mut piece[..bytes.next_multiple_of(BLOCK)];
            self.stream(group, index, block, piece);
            filled += accept(field, piece, &mut out[filled..]);
            block += (piece.len() / BLOCK) as u32;
        }
        #[cfg(test)]
        if let Some(broken) = self.broken {
            broken(field, out);
        }
    }

    /// The stream of a place from one of its blocks on.
    fn stream(&self, group: u32, index: u64, block: u32, out: &mut [u8]) {
        let mut counter = [0; BLOCK];
        counter[..4].copy_from_slice(&group.to_be_bytes());
        counter[4..12].copy_from_slice(&index.to_be_bytes());
        counter[12..].copy_from_slice(&block.to_be_bytes());
        out.fill(0);
        let context = EncryptionContext::Iv128(FixedLength::from(counter));
        self.key
            .less_safe_encrypt(out, context)
            .expect("a counter mode takes any length");
    }
}

/// Puts those of the stream's words that are field elements into `out` until it is full; returns how
/// many.
fn accept(field: Field, stream: &[u8], out: &mut [u32]) -> usize {
    let p = field.modulus();
    let mask = u32::MAX >> (32 - field.bits());
    let words = stream.as_chunks::<4>().0;
    let count = out.len().min(words.len());
    let mut refused = false;
    for (out, word) in out.iter_mut().zip(words) {
        *out = u32::from_le_bytes(*word) & mask;
        refused |= *out >= p;
    }
    if !refused {
        return count;
    }
    let mut accepted = 0;
    for word in words {
        let word = u32::from_le_bytes(*word) & mask;
        if word < p && accepted < out.len() {
            out[accepted] = word;
            accepted += 1;
        }
    }
    accepted
}

#[cfg(test)]
impl BootKey {
    /// A fixed key.
    pub(crate) fn of(bytes: [u8; 32]) -> BootKey {
        BootKey::new(Zeroizing::new(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Field {
        Field::P29
    }

    fn large() -> Field {
        Field::P31
    }

    fn known() -> Uniform {
        BootKey::of(std::array::from_fn(|i| i as u8)).uniform(b"pads")
    }

    /// Computed by another implementation (Python's `cryptography`) from the description above.
    #[test]
    fn the_sampler_gives_its_known_answers() {
        let uniform = known();
        let mut row = [0; 6];
        uniform.row(small(), 0, 0, &mut row);
        let expected = [
            95_757_546,
            363_475_076,
            129_822_234,
            138_577_972,
            61_156_475,
            327_504_073,
        ];
        assert_eq!(row, expected);
        uniform.row(large(), 3, 1 << 40, &mut row);
        let expected = [
            767_866_485,
            564_127_112,
            2_115_701_899,
            1_532_746_098,
            585_245_549,
            251_451_123,
        ];
        assert_eq!(row, expected);
    }

    /// Word 24,689 of one row's stream and word 6,484 of the other's are p itself. Also from the other
    /// implementation: the last elements, which are beyond it, and a checksum of all.
    #[test]
    fn words_that_are_no_element_are_left_out() {
        for (index, length, last, checksum) in [
            (
                1844,
                24_694,
                [421_625_568, 529_031_832],
                0x0123_af6b_b968_a309,
            ),
            (
                4462,
                6489,
                [515_171_775, 71_306_428],
                0x0014_152b_7c20_eacd_u64,
            ),
        ] {
            let mut row = vec![0; length];
            known().row(small(), 7, index, &mut row);
            assert_eq!(row[length - 2..], last);
            let weighted = |(at, x): (usize, &u32)| (at as u64 + 1).wrapping_mul(u64::from(*x));
            let sum = row.iter().enumerate().map(weighted);
            assert_eq!(sum.fold(0, u64::wrapping_add), checksum);
        }
    }

    #[test]
    fn refused_words_are_skipped_wherever_they_are() {
        for field in [small(), large()] {
            let p = field.modulus();
            let high = !(u32::MAX >> (32 - field.bits()));
            let words = [p, 5 | high, p - 1, p | high, u32::MAX, 0, 7, p];
            let stream: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let all = [5, p - 1, 0, 7];
            for wanted in 0..=4 {
                let mut out = vec![9; wanted];
                assert_eq!(accept(field, &stream, &mut out), wanted);
                assert_eq!(out, all[..wanted]);
            }
            let mut out = [9; 6];
            assert_eq!(
                accept(field, &stream, &mut out),
                4,
                "the stream is too short"
            );
            assert_eq!(out[..4], all);
        }
    }

    #[test]
    fn a_row_begins_as_a_longer_one_does_and_no_place_or_purpose_shares_it() {
        let (uniform, field) = (known(), small());
        let row = |uniform: &Uniform, group, index, length| {
            let mut row = vec![0; length];
            uniform.row(field, group, index, &mut row);
            row
        };
        let long = row(&uniform, 1, 2, 5000);
        for length in [1, 3, 4, 1023, 1024, 1025, 2048, 4999] {
            assert!(long[..length] == row(&uniform, 1, 2, length), "{length}");
        }
        let another = BootKey::of([7; 32]);
        for (uniform, group, index) in [
            (&uniform, 2, 1),
            (&uniform, 1, 3),
            (&uniform, 1, 2 + (1 << 32)),
            (&uniform, 0, 2),
            (&another.uniform(b"pads"), 1, 2),
            (
                &BootKey::of(std::array::from_fn(|i| i as u8)).uniform(b"checks"),
                1,
                2,
            ),
        ] {
            let other = row(uniform, group, index, 64);
            let same = other.iter().filter(|x| long.contains(x)).count();
            assert!(same < 2, "{same} elements of {group}, {index}");
        }
    }
}
