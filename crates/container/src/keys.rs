//! From the data key to the keys of one file, and the two AEAD uses of them.
//!
//! ```text
//! PRK          = HKDF-Extract(salt, data key)                       SHA-256
//! commitment   = HKDF-Expand(PRK, "casemate/1 commitment"   ‖ 00 ‖ file id)
//! manifest key = HKDF-Expand(PRK, "casemate/1 manifest key" ‖ 00 ‖ file id)
//! payload key  = HKDF-Expand(PRK, "casemate/1 payload key"  ‖ 00 ‖ file id ‖ manifest hash)
//! ```

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::data_key::DataKey;
use crate::digest::ModelDigest;
use crate::header::{HEADER_LEN, TAG_LEN};

const COMMITMENT: &[u8] = b"casemate/1 commitment\0";
const MANIFEST_KEY: &[u8] = b"casemate/1 manifest key\0";
const PAYLOAD_KEY: &[u8] = b"casemate/1 payload key\0";

/// The AEAD refused: the bytes are not what was sealed under this key, position and context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

/// The secrets of one file, before its manifest is known.
pub(crate) struct FileKeys {
    prk: hkdf::Prk,
    file_id: [u8; 16],
}

impl FileKeys {
    pub(crate) fn derive(data_key: &DataKey, salt: &[u8; 32], file_id: &[u8; 16]) -> Self {
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(data_key.expose());
        FileKeys {
            prk,
            file_id: *file_id,
        }
    }

    /// What the header publishes to tie the file to one data key: AES-GCM alone would let a file decrypt under two.
    pub(crate) fn commitment(&self) -> [u8; 32] {
        *self.expand(&[COMMITMENT, &self.file_id])
    }

    pub(crate) fn commits_to(&self, commitment: &[u8; 32]) -> bool {
        self.commitment().ct_eq(commitment).into()
    }

    pub(crate) fn manifest_key(&self) -> ManifestKey {
        ManifestKey(aes(&self.expand(&[MANIFEST_KEY, &self.file_id])))
    }

    pub(crate) fn payload_key(&self, manifest_hash: &ModelDigest) -> PayloadKey {
        let key = self.expand(&[PAYLOAD_KEY, &self.file_id, manifest_hash.as_bytes()]);
        PayloadKey {
            key: aes(&key),
            manifest_hash: *manifest_hash,
        }
    }

    fn expand(&self, info: &[&[u8]]) -> Zeroizing<[u8; 32]> {
        let mut out = Zeroizing::new([0; 32]);
        self.prk
            .expand(info, hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(out.as_mut_slice()))
            .expect("32 bytes are within HKDF's bounds");
        out
    }
}

fn aes(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"))
}

/// Encrypts one manifest section; the nonce is zero because the key is used once.
pub(crate) struct ManifestKey(LessSafeKey);

impl ManifestKey {
    /// `plain` becomes ciphertext ‖ tag.
    pub(crate) fn seal(self, header: &[u8; HEADER_LEN], plain: &mut Vec<u8>) {
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        self.0
            .seal_in_place_append_tag(nonce, Aad::from(header), plain)
            .expect("a manifest is within AES-GCM's bounds");
    }

    /// Decrypts ciphertext ‖ tag in place and returns the plaintext.
    pub(crate) fn open<'a>(
        self,
        header: &[u8; HEADER_LEN],
        section: &'a mut [u8],
    ) -> Result<&'a mut [u8], Refused> {
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        self.0
            .open_in_place(nonce, Aad::from(header), section)
            .map_err(|_| Refused)
    }
}

/// Encrypts the chunks of one payload.
pub(crate) struct PayloadKey {
    key: LessSafeKey,
    manifest_hash: ModelDigest,
}

impl PayloadKey {
    /// Encrypts `chunk` in place and returns its tag.
    pub(crate) fn seal(&self, index: u64, last: bool, chunk: &mut [u8]) -> [u8; TAG_LEN] {
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce(index), self.aad(index, last), chunk)
            .expect("a chunk is within AES-GCM's bounds");
        tag.as_ref()
            .try_into()
            .expect("an AES-GCM tag has 16 bytes")
    }

    /// Decrypts `sealed`, a ciphertext with its tag, into `out`. On refusal `out` holds no plaintext.
    pub(crate) fn open(
        &self,
        index: u64,
        last: bool,
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Refused> {
        let (ciphertext, tag) = sealed.split_at(out.len());
        self.key
            .open_separate_gather(nonce(index), self.aad(index, last), ciphertext, tag, out)
            .map_err(|_| Refused)
    }

    fn aad(&self, index: u64, last: bool) -> Aad<[u8; 41]> {
        let mut aad = [0; 41];
        aad[..32].copy_from_slice(self.manifest_hash.as_bytes());
        aad[32..40].copy_from_slice(&index.to_be_bytes());
        aad[40] = u8::from(last);
        Aad::from(aad)
    }
}

fn nonce(index: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[4..].copy_from_slice(&index.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(data_key: u8, salt: u8, file_id: u8, manifest: u8) -> PayloadKey {
        FileKeys::derive(
            &DataKey::from_bytes(&[data_key; 32]),
            &[salt; 32],
            &[file_id; 16],
        )
        .payload_key(&ModelDigest([manifest; 32]))
    }

    #[test]
    fn a_chunk_opens_in_its_place_only_and_a_refused_one_leaves_nothing() {
        let plain = [0x5a; 100];
        let mut sealed = plain.to_vec();
        let tag = key(1, 2, 3, 4).seal(5, false, &mut sealed);
        sealed.extend_from_slice(&tag);
        let open = |key: PayloadKey, index, last| {
            let mut out = [0xee; 100];
            let opened = key.open(index, last, &sealed, &mut out);
            (opened, out)
        };
        assert_eq!(open(key(1, 2, 3, 4), 5, false), (Ok(()), plain));
        for (key, index, last) in [
            (key(0, 2, 3, 4), 5, false),
            (key(1, 0, 3, 4), 5, false),
            (key(1, 2, 0, 4), 5, false),
            (key(1, 2, 3, 0), 5, false),
            (key(1, 2, 3, 4), 4, false),
            (key(1, 2, 3, 4), 5, true),
        ] {
            let (opened, out) = open(key, index, last);
            assert_eq!(opened, Err(Refused));
            assert!(!out.contains(&0x5a), "{out:x?}");
        }
    }

    #[test]
    fn the_keys_of_one_file_differ_and_the_commitment_is_none_of_them() {
        let keys = FileKeys::derive(&DataKey::from_bytes(&[1; 32]), &[2; 32], &[3; 16]);
        let manifest = keys.expand(&[MANIFEST_KEY, &[3; 16]]);
        let payload = keys.expand(&[PAYLOAD_KEY, &[3; 16], &[4; 32]]);
        assert!(*manifest != *payload && keys.commitment() != *manifest);
        assert!(keys.commits_to(&keys.commitment()));
        assert!(!keys.commits_to(&payload));
    }
}
