//! Signed objects: a body, and an Ed25519 signature over the domain of its kind and the body's bytes.
//!
//! ```text
//! envelope = { 0: body bstr, 1: signer's Ed25519 key bstr32, 2: signature bstr64 }
//! body     = { 0: 1, … }
//! ```
//! Both are deterministic CBOR. A body is parsed only after its signature verified. Credentials have an envelope of
//! their own, without the signer, whom their body names.

use casemate_container::signing::{Signature, SigningKey, VerifyingKey};
use minicbor::{Decode, Decoder, Encode};
use zeroize::{Zeroize, Zeroizing};

use crate::encoding::{decode, encode};
use crate::error::{Malformed, ReleaseError, Unverified, bounded};

/// The format of every body so far, under its key 0.
pub(crate) const FORMAT: u32 = 1;

/// What tells one kind of signed object from another.
pub(crate) struct Kind {
    /// The envelope, as errors name it.
    pub(crate) envelope: &'static str,
    /// The body, as errors name it.
    pub(crate) body: &'static str,
    /// The body's format number, as errors name it.
    pub(crate) format: &'static str,
    /// Domain of the signature; no two kinds share one.
    pub(crate) domain: &'static str,
    /// Most bytes of an envelope.
    pub(crate) limit: usize,
    /// What is said of another signer or changed bytes.
    pub(crate) unverified: Unverified,
}

/// What can be a body.
pub(crate) trait Cbor: Encode<()> + for<'b> Decode<'b, ()> {}
impl<T: Encode<()> + for<'b> Decode<'b, ()>> Cbor for T {}

impl Kind {
    /// Signs a body and returns the envelope.
    pub(crate) fn sign<B: Cbor>(&self, body: &B, signer: &SigningKey) -> Zeroizing<Vec<u8>> {
        let (body, signature) = self.sign_body(body, signer);
        let envelope = Envelope {
            body: body.to_vec(),
            signer: *signer.verifying_key().as_bytes(),
            signature,
        };
        encode(&envelope, self.limit)
    }

    /// The body of an envelope that `signer` signed.
    ///
    /// # Errors
    /// [`Malformed`] for anything but the one encoding, [`Kind::unverified`] for another signer or changed bytes.
    pub(crate) fn verify<B: Cbor>(
        &self,
        envelope: &[u8],
        signer: &VerifyingKey,
    ) -> Result<B, ReleaseError> {
        let envelope: Envelope = decode(self.envelope, envelope, self.limit)?;
        if envelope.signer != *signer.as_bytes() {
            return Err(self.unverified.into());
        }
        self.verify_body(&envelope.body, envelope.signature, signer)
    }

    /// The signer that an envelope names, verified or not.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(crate) fn claimed_signer(&self, envelope: &[u8]) -> Result<VerifyingKey, Malformed> {
        let envelope: Envelope = decode(self.envelope, envelope, self.limit)?;
        Ok(VerifyingKey::from_bytes(envelope.signer))
    }

    /// Encodes and signs a body, for an envelope of another shape.
    pub(crate) fn sign_body<B: Cbor>(
        &self,
        body: &B,
        signer: &SigningKey,
    ) -> (Zeroizing<Vec<u8>>, [u8; 64]) {
        let body = encode(body, self.limit);
        let signature = signer.sign(self.domain, &body).0;
        (body, signature)
    }

    /// A body that `signer` signed.
    ///
    /// # Errors
    /// As [`Kind::verify`].
    pub(crate) fn verify_body<B: Cbor>(
        &self,
        body: &[u8],
        signature: [u8; 64],
        signer: &VerifyingKey,
    ) -> Result<B, ReleaseError> {
        signer
            .verify(self.domain, body, &Signature(signature))
            .map_err(|_| self.unverified)?;
        Ok(self.parse_body(body)?)
    }

    /// A body whose signature is not looked at.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(crate) fn parse_body<B: Cbor>(&self, body: &[u8]) -> Result<B, Malformed> {
        bounded(self.body, body, self.limit)?;
        // First: another format may have other fields.
        match format(body) {
            Some(found) if found != FORMAT => Err(Malformed::Unsupported {
                what: self.format,
                found: found.to_string(),
                expected: "1",
            }),
            _ => decode(self.body, body, self.limit),
        }
    }
}

/// The number under key 0, which comes first.
fn format(body: &[u8]) -> Option<u32> {
    let mut decoder = Decoder::new(body);
    decoder.map().ok()?;
    match decoder.u32().ok()? {
        0 => decoder.u32().ok(),
        _ => None,
    }
}

/// Who signed what; the body is wiped, because a key grant's holds the data key.
#[derive(Encode, Decode)]
#[cbor(map)]
pub(crate) struct Envelope {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub(crate) body: Vec<u8>,
    #[cbor(n(1), with = "minicbor::bytes")]
    pub(crate) signer: [u8; 32],
    #[cbor(n(2), with = "minicbor::bytes")]
    pub(crate) signature: [u8; 64],
}

impl Drop for Envelope {
    fn drop(&mut self) {
        self.body.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Encode, Decode, Debug, PartialEq)]
    #[cbor(map)]
    struct Body {
        #[n(0)]
        format: u32,
        #[n(1)]
        text: String,
    }

    const KIND: Kind = Kind {
        envelope: "note",
        body: "note.body",
        format: "note.format",
        domain: "casemate note v1",
        limit: 256,
        unverified: Unverified::Rollback,
    };

    fn signer() -> SigningKey {
        SigningKey::from_seed(&[0x11; 32])
    }

    /// What the signer makes of any bytes.
    fn signed(body: &[u8]) -> Zeroizing<Vec<u8>> {
        let envelope = Envelope {
            body: body.to_vec(),
            signer: *signer().verifying_key().as_bytes(),
            signature: signer().sign(KIND.domain, body).0,
        };
        encode(&envelope, KIND.limit)
    }

    #[test]
    fn each_kind_has_its_domain_and_its_signer() {
        let body = || Body {
            format: FORMAT,
            text: "hello".into(),
        };
        let envelope = KIND.sign(&body(), &signer());
        let key = signer().verifying_key();
        assert_eq!(KIND.verify::<Body>(&envelope, &key), Ok(body()));
        assert_eq!(KIND.claimed_signer(&envelope), Ok(key));
        let other = Kind {
            domain: "casemate letter v1",
            ..KIND
        };
        let unverified = Err(Unverified::Rollback.into());
        assert_eq!(other.verify::<Body>(&envelope, &key), unverified);
        let stranger = SigningKey::generate().verifying_key();
        assert_eq!(KIND.verify::<Body>(&envelope, &stranger), unverified);
    }

    #[test]
    fn a_later_format_is_refused_by_its_number_whatever_else_it_has() {
        // { 0: 2, 7: true }
        let envelope = signed(&[0xa2, 0x00, 0x02, 0x07, 0xf5]);
        assert_eq!(
            KIND.verify::<Body>(&envelope, &signer().verifying_key()),
            Err(Malformed::Unsupported {
                what: "note.format",
                found: "2".into(),
                expected: "1",
            }
            .into())
        );
        // { 7: true } and bytes that are no map.
        for body in [&[0xa1, 0x07, 0xf5][..], &[0x00], &[]] {
            assert_eq!(
                KIND.verify::<Body>(&signed(body), &signer().verifying_key()),
                Err(Malformed::Cbor { what: "note.body" }.into())
            );
        }
    }
}
