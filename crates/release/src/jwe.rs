//! JSON Web Encryption in the one form that key release uses: ECDH-ES+A256KW over P-256 with A256GCM
//! content encryption, flattened JSON serialisation (RFC 7516 section 7.2.2, RFC 7518 sections 4.6 and 5.3).
//!
//! Nothing else of JOSE lives here: other algorithms, curves, `apu`/`apv`, `aad`, `crit` and compression
//! are refused, not negotiated.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{self, ECDH_P256, UnparsedPublicKey};
use aws_lc_rs::kdf::{SskdfDigestAlgorithmId, get_sskdf_digest_algorithm, sskdf_digest};
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::{Malformed, ReleaseError, Unverified, bounded, shown};
use crate::random::Random;

/// Key management algorithm, the only one.
pub const ALG: &str = "ECDH-ES+A256KW";
/// Content encryption algorithm, the only one.
pub const ENC: &str = "A256GCM";
/// Curve of both the recipient's and the ephemeral key.
pub const CURVE: &str = "P-256";
/// Most bytes of a JWE's JSON text.
pub const MAX_JWE_BYTES: usize = 96 * 1024;
/// Most bytes of a payload.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;

const MAX_HEADER_BYTES: usize = 1024;
const WRAPPED_KEY_BYTES: usize = 40;
const IV_BYTES: usize = 12;
const TAG_BYTES: usize = 16;

/// A P-256 public key as RFC 7517 JSON; the shape of RCAR's `tee-pubkey`.
///
/// The members stand in lexical order, which makes the serialised form canonical (RFC 8785).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwk {
    /// [`ALG`].
    pub alg: String,
    /// [`CURVE`].
    pub crv: String,
    /// `EC`.
    pub kty: String,
    /// Big-endian x coordinate, base64url without padding.
    pub x: String,
    /// Big-endian y coordinate, base64url without padding.
    pub y: String,
}

/// A point of P-256 to which payloads can be encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey {
    /// SEC 1 uncompressed form: 4 ‖ x ‖ y.
    sec1: [u8; 65],
}

impl PublicKey {
    /// Parses a recipient's JWK and checks that it is a point of the curve.
    ///
    /// # Errors
    /// [`Malformed::Unsupported`] for another key type, curve or algorithm; [`Malformed::Base64`],
    /// [`Malformed::Length`] or [`Malformed::NotAPoint`] for bad coordinates.
    pub fn from_jwk(jwk: &Jwk) -> Result<Self, ReleaseError> {
        expect("tee-pubkey.alg", &jwk.alg, ALG)?;
        Self::from_parts("tee-pubkey", &jwk.kty, &jwk.crv, &jwk.x, &jwk.y)
    }

    /// The key as a JWK with `alg` set.
    pub fn to_jwk(&self) -> Jwk {
        let (x, y) = self.coordinates();
        Jwk {
            alg: ALG.into(),
            crv: CURVE.into(),
            kty: "EC".into(),
            x,
            y,
        }
    }

    /// SEC 1 uncompressed form, 65 bytes.
    pub fn as_sec1(&self) -> &[u8; 65] {
        &self.sec1
    }

    fn coordinates(&self) -> (String, String) {
        (
            URL_SAFE_NO_PAD.encode(&self.sec1[1..33]),
            URL_SAFE_NO_PAD.encode(&self.sec1[33..]),
        )
    }

    fn from_parts(
        what: &'static str,
        kty: &str,
        crv: &str,
        x: &str,
        y: &str,
    ) -> Result<Self, ReleaseError> {
        expect("kty", kty, "EC")?;
        expect("crv", crv, CURVE)?;
        let mut sec1 = [4u8; 65];
        sec1[1..33].copy_from_slice(&fixed::<32>(what, x)?);
        sec1[33..].copy_from_slice(&fixed::<32>(what, y)?);
        agreement::ParsedPublicKey::try_from(UnparsedPublicKey::new(&ECDH_P256, &sec1[..]))
            .map_err(|_| Malformed::NotAPoint { what })?;
        Ok(Self { sec1 })
    }

    fn of(private: &agreement::PrivateKey) -> Result<Self, ReleaseError> {
        let public = private
            .compute_public_key()
            .map_err(|_| ReleaseError::Crypto("P-256 public key"))?;
        let sec1 = public
            .as_ref()
            .try_into()
            .map_err(|_| ReleaseError::Crypto("P-256 public key form"))?;
        Ok(Self { sec1 })
    }
}

/// The recipient's private key: made inside the TEE, never leaves it, gone with the exchange.
pub struct RecipientKey {
    private: agreement::PrivateKey,
    public: PublicKey,
}

impl RecipientKey {
    /// Makes a fresh key.
    ///
    /// # Errors
    /// [`ReleaseError::Crypto`] when the generator or the library fails.
    pub fn generate(random: &dyn Random) -> Result<Self, ReleaseError> {
        let private = fresh_private_key(random)?;
        let public = PublicKey::of(&private)?;
        Ok(Self { private, public })
    }

    /// The public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }
}

/// An encrypted payload in flattened JSON serialisation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jwe {
    protected: String,
    encrypted_key: String,
    iv: String,
    ciphertext: String,
    tag: String,
}

impl Jwe {
    /// Parses the JSON text; the members' contents are checked by [`Jwe::decrypt`].
    ///
    /// # Errors
    /// [`Malformed::TooLarge`] or [`Malformed::Json`] (which includes unknown members such as `aad`).
    pub fn from_json(json: &[u8]) -> Result<Self, ReleaseError> {
        bounded("jwe", json, MAX_JWE_BYTES)?;
        Ok(serde_json::from_slice(json).map_err(|_| Malformed::Json { what: "jwe" })?)
    }

    /// The JSON text.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("five strings always serialise")
    }

    /// Encrypts `payload` to `recipient` under a fresh content key and a fresh ephemeral key.
    ///
    /// The protected header's bytes are `{"alg":…,"enc":…,"epk":{"crv":…,"kty":…,"x":…,"y":…}}` in exactly
    /// this order without spaces, because clients of the Confidential Containers project serialise the
    /// header again to compute the additional data.
    ///
    /// # Errors
    /// [`Malformed::TooLarge`] for a payload above [`MAX_PAYLOAD_BYTES`]; [`ReleaseError::Crypto`].
    pub fn encrypt(
        payload: &[u8],
        recipient: &PublicKey,
        random: &dyn Random,
    ) -> Result<Self, ReleaseError> {
        bounded("payload", payload, MAX_PAYLOAD_BYTES)?;
        let ephemeral = fresh_private_key(random)?;
        let mut content_key = Zeroizing::new([0u8; 32]);
        random.fill(&mut content_key[..])?;
        let mut iv = [0u8; IV_BYTES];
        random.fill(&mut iv)?;

        let (x, y) = PublicKey::of(&ephemeral)?.coordinates();
        let header = Header {
            alg: ALG.into(),
            enc: ENC.into(),
            epk: Epk {
                crv: CURVE.into(),
                kty: "EC".into(),
                x,
                y,
            },
            crit: None,
        };
        let header = serde_json::to_vec(&header).expect("a header of strings always serialises");
        let protected = URL_SAFE_NO_PAD.encode(header);

        let wrapping_key = wrapping_key(&ephemeral, recipient)?;
        let mut wrapped = [0u8; WRAPPED_KEY_BYTES];
        AesKek::new(&AES_256, &wrapping_key[..])
            .and_then(|kek| kek.wrap(&content_key[..], &mut wrapped).map(|_| ()))
            .map_err(|_| ReleaseError::Crypto("AES key wrap"))?;

        let mut ciphertext = payload.to_vec();
        let tag = content_cipher(&content_key)?
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(iv),
                Aad::from(protected.as_bytes()),
                &mut ciphertext,
            )
            .map_err(|_| ReleaseError::Crypto("AES-GCM"))?;
        Ok(Self {
            protected,
            encrypted_key: URL_SAFE_NO_PAD.encode(wrapped),
            iv: URL_SAFE_NO_PAD.encode(iv),
            ciphertext: URL_SAFE_NO_PAD.encode(&ciphertext),
            tag: URL_SAFE_NO_PAD.encode(tag.as_ref()),
        })
    }

    /// Decrypts with the recipient's key. Nothing of the payload is returned unless its tag verifies.
    ///
    /// # Errors
    /// [`ReleaseError::Malformed`] names the member or header parameter that is not accepted;
    /// [`Unverified::Jwe`] when the wrapped key or the ciphertext does not authenticate.
    pub fn decrypt(&self, key: &RecipientKey) -> Result<Zeroizing<Vec<u8>>, ReleaseError> {
        bounded("jwe.protected", self.protected.as_bytes(), MAX_HEADER_BYTES)?;
        let header = Header::parse(&decode("jwe.protected", &self.protected)?)?;
        let Epk { crv, kty, x, y } = &header.epk;
        let epk = PublicKey::from_parts("jwe.protected.epk", kty, crv, x, y)?;
        let wrapped = fixed::<WRAPPED_KEY_BYTES>("jwe.encrypted_key", &self.encrypted_key)?;
        let iv = fixed::<IV_BYTES>("jwe.iv", &self.iv)?;
        let tag = fixed::<TAG_BYTES>("jwe.tag", &self.tag)?;
        bounded("jwe.ciphertext", self.ciphertext.as_bytes(), MAX_JWE_BYTES)?;
        let mut payload = Zeroizing::new(decode("jwe.ciphertext", &self.ciphertext)?);
        let plaintext_bytes = payload.len();
        payload.extend_from_slice(&tag);

        let wrapping_key = wrapping_key(&key.private, &epk)?;
        let mut content_key = Zeroizing::new([0u8; 32]);
        AesKek::new(&AES_256, &wrapping_key[..])
            .and_then(|kek| kek.unwrap(&wrapped, &mut content_key[..]).map(|_| ()))
            .map_err(|_| Unverified::Jwe)?;
        content_cipher(&content_key)?
            .open_in_place(
                Nonce::assume_unique_for_key(iv),
                Aad::from(self.protected.as_bytes()),
                &mut payload,
            )
            .map_err(|_| Unverified::Jwe)?;
        payload.truncate(plaintext_bytes);
        Ok(payload)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    enc: String,
    epk: Epk,
    #[serde(default, skip_serializing)]
    crit: Option<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Epk {
    crv: String,
    kty: String,
    x: String,
    y: String,
}

impl Header {
    fn parse(json: &[u8]) -> Result<Self, ReleaseError> {
        // `alg` and `enc` are read on their own first, so that a header of another algorithm is
        // refused by the algorithm's name rather than for the members that come with it.
        #[derive(Deserialize)]
        struct Names {
            alg: String,
            enc: String,
            #[serde(default)]
            crit: Option<serde_json::Value>,
        }
        let malformed = |_| Malformed::Json {
            what: "jwe.protected",
        };
        let names: Names = serde_json::from_slice(json).map_err(malformed)?;
        expect("jwe.protected.alg", &names.alg, ALG)?;
        expect("jwe.protected.enc", &names.enc, ENC)?;
        if names.crit.is_some() {
            return Err(Malformed::CriticalHeader.into());
        }
        let header: Header = serde_json::from_slice(json).map_err(malformed)?;
        if header.crit.is_some() {
            return Err(Malformed::CriticalHeader.into());
        }
        Ok(header)
    }
}

fn expect(what: &'static str, found: &str, expected: &'static str) -> Result<(), Malformed> {
    if found != expected {
        return Err(Malformed::Unsupported {
            what,
            found: shown(found),
            expected,
        });
    }
    Ok(())
}

fn decode(what: &'static str, text: &str) -> Result<Vec<u8>, Malformed> {
    URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|_| Malformed::Base64 { what })
}

fn fixed<const N: usize>(what: &'static str, text: &str) -> Result<[u8; N], Malformed> {
    // Four characters carry three bytes; anything much longer is refused before it is decoded.
    bounded(what, text.as_bytes(), N * 2 + 4)?;
    let bytes = decode(what, text)?;
    let found = bytes.len();
    bytes.try_into().map_err(|_| Malformed::Length {
        what,
        found,
        expected: N,
    })
}

fn fresh_private_key(random: &dyn Random) -> Result<agreement::PrivateKey, ReleaseError> {
    let mut scalar = Zeroizing::new([0u8; 32]);
    // A random 256-bit string is not in [1, n) with probability 2^-32: draw again, but not for ever.
    for _ in 0..8 {
        random.fill(&mut scalar[..])?;
        if let Ok(key) = agreement::PrivateKey::from_private_key(&ECDH_P256, &scalar[..]) {
            return Ok(key);
        }
    }
    Err(ReleaseError::Crypto("P-256 key generation"))
}

fn content_cipher(key: &[u8; 32]) -> Result<LessSafeKey, ReleaseError> {
    UnboundKey::new(&AES_256_GCM, key)
        .map(LessSafeKey::new)
        .map_err(|_| ReleaseError::Crypto("AES-GCM key"))
}

fn wrapping_key(
    private: &agreement::PrivateKey,
    public: &PublicKey,
) -> Result<Zeroizing<[u8; 32]>, ReleaseError> {
    let peer = UnparsedPublicKey::new(&ECDH_P256, &public.sec1[..]);
    agreement::agree(private, peer, ReleaseError::Crypto("ECDH"), |z| {
        let mut key = Zeroizing::new([0u8; 32]);
        concat_kdf(z, ALG, b"", b"", &mut key[..])?;
        Ok(key)
    })
}

/// Concat KDF of RFC 7518 section 4.6.2: NIST SP 800-56A single-step KDF with SHA-256 and
/// OtherInfo = len ‖ AlgorithmID ‖ len ‖ PartyUInfo ‖ len ‖ PartyVInfo ‖ SuppPubInfo (key bits).
fn concat_kdf(
    z: &[u8],
    algorithm: &str,
    party_u: &[u8],
    party_v: &[u8],
    out: &mut [u8],
) -> Result<(), ReleaseError> {
    let mut info = Vec::with_capacity(64);
    for part in [algorithm.as_bytes(), party_u, party_v] {
        let length = u32::try_from(part.len()).map_err(|_| ReleaseError::Misuse("KDF input"))?;
        info.extend_from_slice(&length.to_be_bytes());
        info.extend_from_slice(part);
    }
    let bits = u32::try_from(out.len() * 8).map_err(|_| ReleaseError::Misuse("KDF output"))?;
    info.extend_from_slice(&bits.to_be_bytes());
    let sha256 = get_sskdf_digest_algorithm(SskdfDigestAlgorithmId::Sha256)
        .ok_or(ReleaseError::Crypto("SHA-256 KDF"))?;
    sskdf_digest(sha256, z, &info, out).map_err(|_| ReleaseError::Crypto("SHA-256 KDF"))
}

#[cfg(test)]
mod tests;
