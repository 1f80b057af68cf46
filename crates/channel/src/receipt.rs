//! Receipts: an enclave's signed statement about one answer.
//!
//! ```text
//! envelope = { 0: body bstr, 1: signature bstr64 }
//! body     = { 0: 2, 1: request id tstr, 2: counter uint, 3: keyset digest bstr32,
//!              4: evidence digest bstr32, 5: model digest bstr32, 6: model version uint,
//!              7: [* adapter digest bstr32], 8: compute tstr, 9: parameters, 10: request hash bstr32,
//!              11: status uint, 12: answer hash bstr32, ? 13: [prompt, completion tokens], 14: time uint,
//!              ? 15: adapter digest bstr32 }
//! ```
//! Both are deterministic CBOR; the signature covers the domain [`DOMAIN`] and the body's bytes. `docs/receipts.md` is
//! the specification and says what each field shows. [`Receipt::sign`] is the enclave's part; [`SignedReceipt::verify`]
//! is the one way to a [`VerifiedReceipt`]. What is hashed is in [`RequestHash`] and [`AnswerHasher`], what a user
//! keeps is a [`Bundle`], and [`verify_bundle`] judges that offline.

mod bundle;
mod hash;
mod parameters;
mod verify;
mod wire;

use std::fmt;
use std::str::FromStr;

use casemate_container::signing::{Signature, SigningKey, VerifyingKey};
use casemate_release::credential::CLOCK_SKEW_SECONDS;
use casemate_release::encoding::{decode, encode};
use casemate_release::{Malformed, credential};

use crate::keyset::{Keyset, KeysetDigest};
use crate::verify::VerifiedService;

pub use bundle::{Bundle, FetchedReceipt, MAX_BUNDLE, MAX_FETCHED, SavedAttestation};
pub use hash::{AnswerHash, AnswerHasher, RequestHash, Salt};
pub use parameters::{AnswerFormat, Bias, ForcedCall, Functions, Parameters, Steering};
pub use verify::{Exchange, RequestBytes, VerifiedExchange, verify_bundle};
use wire::{Body, Envelope};

/// Domain of the signature.
pub const DOMAIN: &str = "casemate receipt v1";
/// Most bytes of an envelope.
pub const MAX_RECEIPT_BYTES: usize = 4096;
/// Where receipts are fetched inside the channel; the request id follows.
pub const RECEIPTS_PATH: &str = "/v1/receipts/";
/// The field of an inner answer that says under which id its receipt can be fetched.
pub const RECEIPT_FIELD: &str = "casemate-receipt";

/// Format 1 did not say what steered an answer, so its silence means nothing: it is not read.
const FORMAT: u32 = 2;
const MAX_PREFIX: usize = 16;
const ID_DIGITS: usize = 32;

/// The id of a request: the `id` of its answer. Lower-case letters, `-`, 128 random bits in hexadecimal; so it is safe
/// as part of a path and as the name of a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(String);

/// The text is not a request id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a request id: lower-case letters, '-' and 32 lower-case hexadecimal digits")]
pub struct InvalidRequestId;

impl RequestId {
    /// The id with this prefix and these random bits.
    ///
    /// # Panics
    /// When the prefix is not 1 to 16 lower-case letters, which is a mistake of the program.
    pub fn new(prefix: &str, random: [u8; 16]) -> RequestId {
        format!("{prefix}-{}", hex::encode(random))
            .parse()
            .expect("a prefix is 1 to 16 lower-case letters")
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before the `-`: which API made the answer.
    pub fn prefix(&self) -> &str {
        self.0.split('-').next().unwrap_or_default()
    }
}

impl FromStr for RequestId {
    type Err = InvalidRequestId;

    fn from_str(text: &str) -> Result<RequestId, InvalidRequestId> {
        let (prefix, digits) = text.split_once('-').ok_or(InvalidRequestId)?;
        let prefix_holds = (1..=MAX_PREFIX).contains(&prefix.len())
            && prefix.bytes().all(|b| b.is_ascii_lowercase());
        let digits_hold = digits.len() == ID_DIGITS
            && digits
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if prefix_holds && digits_hold {
            Ok(RequestId(text.to_owned()))
        } else {
            Err(InvalidRequestId)
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Read.
    pub prompt_tokens: u64,
    /// Written, over all choices.
    pub completion_tokens: u64,
}

/// What an enclave states about one answer. The fields are plain because signing and parsing both check them.
#[derive(Clone, Debug, PartialEq)]
pub struct Receipt {
    /// The answer's id.
    pub id: RequestId,
    /// How many receipts the keyset has signed, this one included.
    pub counter: u64,
    /// The keyset under which the request was opened.
    pub keyset_digest: KeysetDigest,
    /// The evidence that the issuer appraised before it signed the keyset's credential.
    pub evidence_digest: [u8; 32],
    /// The loaded model.
    pub model_digest: [u8; 32],
    /// Its version.
    pub model_version: u64,
    /// The loaded adapters, ascending.
    pub adapter_digests: Vec<[u8; 32]>,
    /// The one of them that was applied; nothing where the model answered as it is.
    pub adapter: Option<[u8; 32]>,
    /// Arithmetic, such as `int8-g32`.
    pub compute: String,
    /// How tokens were drawn, and what steered them.
    pub parameters: Parameters,
    /// Salted hash of the request.
    pub request_hash: RequestHash,
    /// HTTP status of the answer.
    pub status: u16,
    /// Salted hash of the answer's body.
    pub answer_hash: AnswerHash,
    /// Tokens read and written; nothing where the answer is incomplete.
    pub usage: Option<Usage>,
    /// End of the answer by the enclave's clock, which the host sets: not trusted. Seconds since 1970.
    pub time: u64,
}

/// Why bytes are not a receipt, or why a receipt does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// Not a receipt, a bundle or the answer to a request for one.
    #[error("malformed: {0}")]
    Malformed(#[from] Malformed),
    /// It names another keyset than the verified one.
    #[error("the receipt is of another keyset")]
    OtherKeyset,
    /// The keyset's receipt key did not sign these bytes.
    #[error("the receipt is not signed by the receipt key of its keyset")]
    Signature,
    /// It names other evidence than the keyset's credential.
    #[error("the receipt names other evidence than the credential of its keyset")]
    OtherEvidence,
    /// It names another model, adapter or compute than its keyset.
    #[error("the receipt names another model than its keyset")]
    OtherModel,
    /// Its time is outside of its keyset's validity.
    #[error("the receipt's time is outside of its keyset's validity")]
    Time,
    /// The answer ended early.
    #[error("the answer is incomplete")]
    Incomplete,
    /// The request is not the one in the receipt.
    #[error("this is not the request that the receipt is about")]
    OtherRequest,
    /// The answer is not the one in the receipt.
    #[error("this is not the answer that the receipt is about")]
    OtherAnswer,
    /// The receipt is that of another id than was asked for.
    #[error("this is the receipt of another request id")]
    OtherId,
}

/// A field's rule; `what` names the field.
fn rule(
    holds: bool,
    what: &'static str,
    found: &dyn fmt::Display,
    expected: &'static str,
) -> Result<(), Malformed> {
    if holds {
        return Ok(());
    }
    let found = found.to_string().chars().take(64).collect();
    Err(Malformed::Unsupported {
        what,
        found,
        expected,
    })
}

impl Receipt {
    /// Signs the statement and returns the envelope.
    ///
    /// # Errors
    /// [`ReceiptError::Malformed`] when a field breaks its rule.
    pub fn sign(&self, key: &SigningKey) -> Result<Vec<u8>, ReceiptError> {
        self.check()?;
        let body = encode(&Body::from(self), MAX_RECEIPT_BYTES).to_vec();
        let signature = key.sign(DOMAIN, &body).0;
        Ok(encode(&Envelope { body, signature }, MAX_RECEIPT_BYTES).to_vec())
    }

    fn check(&self) -> Result<(), Malformed> {
        rule(
            self.counter >= 1,
            "receipt.counter",
            &self.counter,
            "at least 1",
        )?;
        rule(
            (200..=599).contains(&self.status),
            "receipt.status",
            &self.status,
            "200 to 599",
        )?;
        let adapters = &self.adapter_digests;
        rule(
            adapters.len() <= credential::MAX_ADAPTERS && adapters.windows(2).all(|w| w[0] < w[1]),
            "receipt.adapter_digests",
            &adapters.len(),
            "at most 64, ascending",
        )?;
        rule(
            self.adapter
                .is_none_or(|adapter| adapters.contains(&adapter)),
            "receipt.adapter",
            &self.adapter.map(hex::encode).unwrap_or_default(),
            "one of the loaded adapters",
        )?;
        let compute = &self.compute;
        rule(
            (1..=128).contains(&compute.len()) && compute.bytes().all(|b| b.is_ascii_graphic()),
            "receipt.compute",
            compute,
            "1 to 128 visible ASCII characters",
        )?;
        self.parameters.check()
    }

    /// Whether it names model, adapters and compute of `keyset`.
    fn is_of_model(&self, keyset: &Keyset) -> bool {
        self.model_digest == keyset.model_digest
            && self.model_version == keyset.model_version
            && self.adapter_digests == keyset.adapter_digests
            && self.compute == keyset.compute
    }

    /// Whether its time lies in `keyset`'s validity. The clock may be off, the key may not have outlived its keyset.
    fn is_within(&self, keyset: &Keyset) -> bool {
        keyset.not_before <= self.time.saturating_add(CLOCK_SKEW_SECONDS)
            && self.time < keyset.expires_at.saturating_add(CLOCK_SKEW_SECONDS)
    }
}

/// A parsed receipt. Nothing of it is verified.
#[derive(Clone, Debug, PartialEq)]
pub struct SignedReceipt {
    receipt: Receipt,
    body: Vec<u8>,
    signature: Signature,
}

impl SignedReceipt {
    /// Parses an envelope.
    ///
    /// # Errors
    /// [`ReceiptError::Malformed`] for anything but the one encoding of a receipt whose fields keep their rules.
    pub fn parse(envelope: &[u8]) -> Result<SignedReceipt, ReceiptError> {
        let envelope: Envelope = decode("receipt", envelope, MAX_RECEIPT_BYTES)?;
        let body: Body = decode("receipt.body", &envelope.body, MAX_RECEIPT_BYTES)?;
        let receipt = Receipt::try_from(body)?;
        receipt.check()?;
        Ok(SignedReceipt {
            receipt,
            body: envelope.body,
            signature: Signature(envelope.signature),
        })
    }

    /// What it says, which nothing shows to be true.
    pub fn unverified(&self) -> &Receipt {
        &self.receipt
    }

    /// Verifies that `service` signed it, and that it says of keyset, evidence and model what they say. Whether the
    /// answer is complete is left to who asks.
    ///
    /// # Errors
    /// [`ReceiptError::OtherKeyset`], [`ReceiptError::Signature`], [`ReceiptError::OtherEvidence`],
    /// [`ReceiptError::OtherModel`], [`ReceiptError::Time`]: the first that applies.
    pub fn verify(self, service: &VerifiedService) -> Result<VerifiedReceipt, ReceiptError> {
        for check in CHECKS {
            check(&self, service)?;
        }
        Ok(VerifiedReceipt(self.receipt))
    }

    fn is_of_keyset(&self, service: &VerifiedService) -> Result<(), ReceiptError> {
        holds(
            self.receipt.keyset_digest == *service.keyset_digest(),
            ReceiptError::OtherKeyset,
        )
    }

    fn is_signed(&self, service: &VerifiedService) -> Result<(), ReceiptError> {
        let key: VerifyingKey = service.receipt_key();
        key.verify(DOMAIN, &self.body, &self.signature)
            .map_err(|_| ReceiptError::Signature)
    }

    fn is_of_evidence(&self, service: &VerifiedService) -> Result<(), ReceiptError> {
        holds(
            self.receipt.evidence_digest == service.credential().evidence_digest,
            ReceiptError::OtherEvidence,
        )
    }

    fn is_of_model(&self, service: &VerifiedService) -> Result<(), ReceiptError> {
        holds(
            self.receipt.is_of_model(service.keyset()),
            ReceiptError::OtherModel,
        )
    }

    fn is_timely(&self, service: &VerifiedService) -> Result<(), ReceiptError> {
        holds(self.receipt.is_within(service.keyset()), ReceiptError::Time)
    }
}

type SignedCheck = fn(&SignedReceipt, &VerifiedService) -> Result<(), ReceiptError>;

/// What makes a receipt a verified one, in order.
const CHECKS: [SignedCheck; 5] = [
    SignedReceipt::is_of_keyset,
    SignedReceipt::is_signed,
    SignedReceipt::is_of_evidence,
    SignedReceipt::is_of_model,
    SignedReceipt::is_timely,
];

/// Proof that a verified service made this receipt. Only [`SignedReceipt::verify`] makes one.
#[derive(Clone, Debug)]
pub struct VerifiedReceipt(Receipt);

impl VerifiedReceipt {
    /// What the service stated.
    pub fn receipt(&self) -> &Receipt {
        &self.0
    }

    /// Shows that the receipt is about this request: method, target and body as the client sent them.
    ///
    /// # Errors
    /// [`ReceiptError::OtherRequest`].
    pub fn is_about_request(
        &self,
        salt: &Salt,
        request: &RequestBytes<'_>,
    ) -> Result<(), ReceiptError> {
        let hash = RequestHash::of(salt, request.method, request.target, request.body);
        holds(hash == self.0.request_hash, ReceiptError::OtherRequest)
    }

    /// Shows that the receipt is about this answer: its body as the client received it.
    ///
    /// # Errors
    /// [`ReceiptError::OtherAnswer`].
    pub fn is_about_answer(&self, salt: &Salt, body: &[u8]) -> Result<(), ReceiptError> {
        let mut hasher = AnswerHasher::new(salt);
        hasher.update(body);
        holds(
            hasher.finish() == self.0.answer_hash,
            ReceiptError::OtherAnswer,
        )
    }
}

fn holds(it_does: bool, otherwise: ReceiptError) -> Result<(), ReceiptError> {
    if it_does { Ok(()) } else { Err(otherwise) }
}

#[cfg(test)]
mod tests;
