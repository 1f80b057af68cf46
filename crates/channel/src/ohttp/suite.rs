//! The one cipher suite and the key schedule of chunked Oblivious HTTP. Primitives come from `hpke`
//! (X-Wing, HPKE) and `aws-lc-rs` (HKDF and AES-128-GCM of the answer); nothing here frames or pads.

use aws_lc_rs::{aead, hkdf};
use hpke::aead::{AeadCtxR, AeadCtxS, AesGcm128};
use hpke::kdf::HkdfSha256;
use hpke::kem::XWing;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, setup_receiver, setup_sender};
use zeroize::Zeroizing;

/// What follows the key id in a request's header: X-Wing, HKDF-SHA256, AES-128-GCM.
pub(super) const SUITE: [u8; 6] = [0x64, 0x7a, 0x00, 0x01, 0x00, 0x01];
/// Bytes of an X-Wing public key: ML-KEM-768 (1184) and X25519 (32).
pub(super) const PUBLIC_KEY_BYTES: usize = 1216;
/// Bytes of the encapsulated secret in a request: ML-KEM-768 (1088) and X25519 (32).
pub(super) const ENC_BYTES: usize = 1120;
/// Bytes of a key configuration with one suite: id, KEM, key, length of suites, KDF, AEAD.
pub(super) const CONFIG_BYTES: usize = 1 + 2 + PUBLIC_KEY_BYTES + 2 + 4;
/// Bytes before the first chunk of a request: key id, suite, enc.
pub(super) const REQUEST_HEAD_BYTES: usize = 1 + SUITE.len() + ENC_BYTES;
/// Bytes before the first chunk of an answer: a nonce as long as the longer of the AEAD's key (16)
/// and nonce (12).
pub(super) const ANSWER_NONCE_BYTES: usize = 16;
/// Bytes of an authentication tag.
pub(super) const TAG_BYTES: usize = 16;

const REQUEST_INFO: &[u8] = b"message/bhttp chunked request\0";
const ANSWER_LABEL: &[u8] = b"message/bhttp chunked response";

/// The additional data of a chunk tells the last from the others.
fn chunk_aad(last: bool) -> &'static [u8] {
    if last { b"final" } else { b"" }
}

/// Something does not authenticate.
#[derive(Debug)]
pub(super) struct Forged;

/// The library failed at something that cannot fail but for the system's randomness.
#[derive(Debug)]
pub(super) struct CryptoFailure;

/// A private key; `hpke` clears its memory when it is dropped.
pub(super) struct PrivateKey(<XWing as Kem>::PrivateKey);

/// A public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PublicKey(<XWing as Kem>::PublicKey);

impl PrivateKey {
    /// A fresh key pair.
    pub(super) fn generate() -> (PrivateKey, PublicKey) {
        let (private, public) = XWing::gen_keypair();
        (PrivateKey(private), PublicKey(public))
    }

    /// The key pair that HPKE's DeriveKeyPair makes of `seed`; for test vectors.
    #[cfg(test)]
    pub(super) fn derive(seed: &[u8; 32]) -> (PrivateKey, PublicKey) {
        let (private, public) = XWing::derive_keypair(seed);
        (PrivateKey(private), PublicKey(public))
    }
}

impl PublicKey {
    /// The key configuration that offers this key under our suite alone:
    /// `id 1 ‖ KEM 2 ‖ public key 1216 ‖ length of suites 2 ‖ KDF 2 ‖ AEAD 2`.
    pub(super) fn to_config(&self, id: u8) -> Vec<u8> {
        let mut config = Vec::with_capacity(CONFIG_BYTES);
        config.push(id);
        config.extend_from_slice(&SUITE[..2]);
        config.extend_from_slice(&self.0.to_bytes());
        config.extend_from_slice(&[0, 4]);
        config.extend_from_slice(&SUITE[2..]);
        config
    }

    /// Reads such a configuration and nothing else.
    pub(super) fn from_config(config: &[u8]) -> Option<(u8, PublicKey)> {
        let fits = config.len() == CONFIG_BYTES
            && config[1..3] == SUITE[..2]
            && config[CONFIG_BYTES - 6..CONFIG_BYTES - 4] == [0, 4]
            && config[CONFIG_BYTES - 4..] == SUITE[2..];
        if !fits {
            return None;
        }
        let key = Deserializable::from_bytes(&config[3..3 + PUBLIC_KEY_BYTES]).ok()?;
        Some((config[0], PublicKey(key)))
    }
}

/// Seals the chunks of one request.
pub(super) struct RequestSealer(AeadCtxS<AesGcm128, HkdfSha256, XWing>);

impl RequestSealer {
    /// Begins a request; returns its head (`key id ‖ suite ‖ enc`) with the sealer.
    pub(super) fn new(
        key_id: u8,
        key: &PublicKey,
    ) -> Result<([u8; REQUEST_HEAD_BYTES], RequestSealer), CryptoFailure> {
        let mut head = [0; REQUEST_HEAD_BYTES];
        head[0] = key_id;
        head[1..7].copy_from_slice(&SUITE);
        let info = [REQUEST_INFO, &head[..7]].concat();
        let (enc, context) =
            setup_sender::<AesGcm128, HkdfSha256, XWing>(&OpModeS::Base, &key.0, &info)
                .map_err(|_| CryptoFailure)?;
        head[7..].copy_from_slice(&enc.to_bytes());
        Ok((head, RequestSealer(context)))
    }

    pub(super) fn seal(&mut self, plaintext: &[u8], last: bool) -> Result<Vec<u8>, CryptoFailure> {
        self.0
            .seal(plaintext, chunk_aad(last))
            .map_err(|_| CryptoFailure)
    }

    pub(super) fn answer_secret(&self) -> Result<AnswerSecret, CryptoFailure> {
        let mut secret = Zeroizing::new([0; 16]);
        self.0
            .export(ANSWER_LABEL, &mut secret[..])
            .map_err(|_| CryptoFailure)?;
        Ok(AnswerSecret(secret))
    }
}

/// Opens the chunks of one request.
pub(super) struct RequestOpener(AeadCtxR<AesGcm128, HkdfSha256, XWing>);

impl RequestOpener {
    /// Begins with the head of a request whose suite has been compared with ours.
    pub(super) fn new(
        head: &[u8; REQUEST_HEAD_BYTES],
        key: &PrivateKey,
    ) -> Result<RequestOpener, Forged> {
        let info = [REQUEST_INFO, &head[..7]].concat();
        let enc = <XWing as Kem>::EncappedKey::from_bytes(&head[7..]).map_err(|_| Forged)?;
        let context = setup_receiver(&OpModeR::Base, &key.0, &enc, &info).map_err(|_| Forged)?;
        Ok(RequestOpener(context))
    }

    pub(super) fn open(&mut self, chunk: &[u8], last: bool) -> Result<Vec<u8>, Forged> {
        self.0.open(chunk, chunk_aad(last)).map_err(|_| Forged)
    }

    pub(super) fn answer_secret(&self) -> Result<AnswerSecret, CryptoFailure> {
        let mut secret = Zeroizing::new([0; 16]);
        self.0
            .export(ANSWER_LABEL, &mut secret[..])
            .map_err(|_| CryptoFailure)?;
        Ok(AnswerSecret(secret))
    }
}

/// What both ends of a request derive the keys of its answer from.
pub(super) struct AnswerSecret(Zeroizing<[u8; 16]>);

/// The cipher of one answer, for either direction. Chunks are counted, and each has its own nonce.
pub(super) struct AnswerCipher {
    key: aead::LessSafeKey,
    base: [u8; aead::NONCE_LEN],
    sequence: u64,
}

impl AnswerSecret {
    #[cfg(test)]
    pub(super) fn again(&self) -> AnswerSecret {
        AnswerSecret(self.0.clone())
    }

    /// The cipher of the answer that begins with `nonce` and belongs to the request with `enc`.
    pub(super) fn cipher(
        &self,
        enc: &[u8],
        nonce: &[u8; ANSWER_NONCE_BYTES],
    ) -> Result<AnswerCipher, CryptoFailure> {
        let salt = [enc, nonce].concat();
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt).extract(&self.0[..]);
        let key = prk
            .expand(&[b"key"], &aead::AES_128_GCM)
            .map_err(|_| CryptoFailure)?;
        let mut base = [0; aead::NONCE_LEN];
        prk.expand(&[b"nonce"], NonceLength)
            .and_then(|okm| okm.fill(&mut base))
            .map_err(|_| CryptoFailure)?;
        let key = aead::LessSafeKey::new(aead::UnboundKey::from(key));
        Ok(AnswerCipher {
            key,
            base,
            sequence: 0,
        })
    }
}

impl AnswerCipher {
    /// Replaces a plaintext by its ciphertext and tag.
    pub(super) fn seal(&mut self, chunk: &mut Vec<u8>, last: bool) -> Result<(), CryptoFailure> {
        let nonce = self.nonce();
        self.key
            .seal_in_place_append_tag(nonce, aead::Aad::from(chunk_aad(last)), chunk)
            .map_err(|_| CryptoFailure)
    }

    /// Replaces a ciphertext and tag by the plaintext.
    pub(super) fn open(&mut self, chunk: &mut Vec<u8>, last: bool) -> Result<(), Forged> {
        let nonce = self.nonce();
        let aad = aead::Aad::from(chunk_aad(last));
        let length = self
            .key
            .open_in_place(nonce, aad, chunk)
            .map_err(|_| Forged)?
            .len();
        chunk.truncate(length);
        Ok(())
    }

    fn nonce(&mut self) -> aead::Nonce {
        let mut nonce = self.base;
        nonce[4..]
            .iter_mut()
            .zip(self.sequence.to_be_bytes())
            .for_each(|(n, s)| *n ^= s);
        // 2^64 chunks of at least a byte are out of reach.
        self.sequence += 1;
        aead::Nonce::assume_unique_for_key(nonce)
    }
}

struct NonceLength;

impl hkdf::KeyType for NonceLength {
    fn len(&self) -> usize {
        aead::NONCE_LEN
    }
}
