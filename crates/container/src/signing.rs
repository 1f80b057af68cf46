//! Ed25519 signatures with a domain in front of every message, and the files that hold the keys.
//!
//! The signed message is always `domain ‖ 0x00 ‖ message`; a domain holds no zero byte, so that a signature made
//! for one purpose verifies for no other.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use minicbor::{Decode, Encode};
use zeroize::Zeroizing;

use crate::digest::{DigestParseError, parse_hex32};
use crate::key_file::{self, KeyFileError};

const SECRET_LABEL: &str = "PRIVATE KEY";
const PUBLIC_LABEL: &str = "PUBLIC KEY";

/// SubjectPublicKeyInfo of an Ed25519 key up to the key itself (RFC 8410 §4): every such key has these bytes.
const SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];

/// A secret Ed25519 key. The library erases it when dropped; it cannot be printed or cloned.
pub struct SigningKey(Ed25519KeyPair);

/// A public Ed25519 key. Written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
#[cbor(transparent)]
pub struct VerifyingKey(#[cbor(n(0), with = "minicbor::bytes")] [u8; 32]);

/// An Ed25519 signature.
#[derive(Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct Signature(#[cbor(n(0), with = "minicbor::bytes")] pub [u8; 64]);

/// The signature is not this key's over this message in this domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct BadSignature;

impl SigningKey {
    /// A fresh random key.
    ///
    /// # Panics
    /// When the system has no randomness.
    pub fn generate() -> Self {
        SigningKey(Ed25519KeyPair::generate().expect("the system provides randomness"))
    }

    /// The key with this RFC 8032 seed. The caller erases its copy.
    ///
    /// # Panics
    /// Never: every 32 bytes are a seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        SigningKey(Ed25519KeyPair::from_seed_unchecked(seed).expect("every 32 bytes are a seed"))
    }

    /// The public half.
    pub fn verifying_key(&self) -> VerifyingKey {
        let bytes = self.0.public_key().as_ref();
        VerifyingKey(
            bytes
                .try_into()
                .expect("an Ed25519 public key has 32 bytes"),
        )
    }

    /// Signs `message` for one purpose.
    pub fn sign(&self, domain: &str, message: &[u8]) -> Signature {
        let signature = self.0.sign(&framed(domain, message));
        Signature(
            signature
                .as_ref()
                .try_into()
                .expect("an Ed25519 signature has 64 bytes"),
        )
    }

    /// Reads a PKCS#8 PEM file as written by [`Self::write_file`] or `openssl genpkey -algorithm ed25519`.
    ///
    /// # Errors
    /// When the file cannot be read, is open to other users, or is no Ed25519 key.
    pub fn read_file(path: &Path) -> Result<Self, KeyFileError> {
        let der = key_file::read_secret(path, SECRET_LABEL)?;
        Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der)
            .map(SigningKey)
            .map_err(|_| KeyFileError::not_a(SECRET_LABEL, path))
    }

    /// Writes a PKCS#8 PEM file that only its owner can read. Replaces an existing file only when `overwrite` says so.
    ///
    /// # Errors
    /// When the file exists or cannot be written; an existing file is then as it was.
    pub fn write_file(&self, path: &Path, overwrite: bool) -> Result<(), KeyFileError> {
        // Version 1, which OpenSSL's command line reads too.
        let document = self
            .0
            .to_pkcs8v1()
            .expect("an Ed25519 key has a PKCS#8 form");
        key_file::write_secret(path, SECRET_LABEL, document.as_ref(), overwrite)
    }
}

impl VerifyingKey {
    /// A key from its 32 bytes. Whether they are a point of the curve shows at the first verification, which then fails.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        VerifyingKey(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Checks a signature made by [`SigningKey::sign`] with the same domain.
    ///
    /// # Errors
    /// [`BadSignature`] without further detail.
    pub fn verify(
        &self,
        domain: &str,
        message: &[u8],
        signature: &Signature,
    ) -> Result<(), BadSignature> {
        UnparsedPublicKey::new(&ED25519, &self.0)
            .verify(&framed(domain, message), &signature.0)
            .map_err(|_| BadSignature)
    }

    /// Reads a public key PEM file (SubjectPublicKeyInfo).
    ///
    /// # Errors
    /// When the file cannot be read or is no Ed25519 public key.
    pub fn read_file(path: &Path) -> Result<Self, KeyFileError> {
        let der = key_file::read_public(path, PUBLIC_LABEL)?;
        der.strip_prefix(&SPKI_PREFIX)
            .and_then(|key| key.try_into().ok())
            .map(VerifyingKey)
            .ok_or_else(|| KeyFileError::not_a(PUBLIC_LABEL, path))
    }

    /// Writes a public key PEM file. Replaces an existing file only when `overwrite` says so.
    ///
    /// # Errors
    /// When the file exists or cannot be written; an existing file is then as it was.
    pub fn write_file(&self, path: &Path, overwrite: bool) -> Result<(), KeyFileError> {
        let mut der = SPKI_PREFIX.to_vec();
        der.extend_from_slice(&self.0);
        key_file::write_public(path, PUBLIC_LABEL, &der, overwrite)
    }
}

/// `domain ‖ 0x00 ‖ message`; erased after use, since what is signed may itself be private.
fn framed(domain: &str, message: &[u8]) -> Zeroizing<Vec<u8>> {
    assert!(
        !domain.is_empty() && !domain.contains('\0'),
        "a domain is text without zero bytes"
    );
    let mut framed = Zeroizing::new(Vec::with_capacity(domain.len() + 1 + message.len()));
    framed.extend_from_slice(domain.as_bytes());
    framed.push(0);
    framed.extend_from_slice(message);
    framed
}

impl fmt::Display for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for VerifyingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifyingKey({self})")
    }
}

impl FromStr for VerifyingKey {
    type Err = DigestParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex32(text).map(VerifyingKey)
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({})", hex::encode(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8032 §7.1, test 2.
    const SEED: &str = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb";
    const PUBLIC: &str = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c";

    #[test]
    fn the_public_key_is_that_of_rfc_8032() {
        let key = SigningKey::from_seed(&parse_hex32(SEED).unwrap());
        assert_eq!(key.verifying_key().to_string(), PUBLIC);
        assert_eq!(PUBLIC.parse(), Ok(key.verifying_key()));
    }

    #[test]
    fn a_signature_holds_for_its_domain_message_and_key_only() {
        let key = SigningKey::generate();
        let public = key.verifying_key();
        let signature = key.sign("a", b"bc");
        assert_eq!(public.verify("a", b"bc", &signature), Ok(()));
        assert_eq!(public.verify("ab", b"c", &signature), Err(BadSignature));
        assert_eq!(public.verify("a", b"bd", &signature), Err(BadSignature));
        let other = SigningKey::generate().verifying_key();
        assert_eq!(other.verify("a", b"bc", &signature), Err(BadSignature));
        for i in 0..64 {
            let mut bent = signature;
            bent.0[i] ^= 1;
            assert_eq!(
                public.verify("a", b"bc", &bent),
                Err(BadSignature),
                "byte {i}"
            );
        }
    }

    #[test]
    fn the_signed_bytes_are_domain_zero_message() {
        let key = SigningKey::generate();
        let public = key.verifying_key();
        let raw = UnparsedPublicKey::new(&ED25519, public.as_bytes());
        assert!(raw.verify(b"a\0bc", &key.sign("a", b"bc").0).is_ok());
    }
}
