//! The one error type of this crate, sorted by who is at fault.

/// Why a message, grant or credential was not accepted or could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    /// The sender's bytes are not what the format allows.
    #[error("malformed: {0}")]
    Malformed(#[from] Malformed),
    /// Well-formed bytes whose signature or authentication tag does not verify.
    #[error("failed verification: {0}")]
    Unverified(#[from] Unverified),
    /// Genuine, but not allowed here and now.
    #[error("refused: {0}")]
    Refused(#[from] Refused),
    /// The caller asked for something that cannot be.
    #[error("misuse: {0}")]
    Misuse(&'static str),
    /// The cryptographic library or the random generator failed.
    #[error("cryptographic library failed: {0}")]
    Crypto(&'static str),
}

/// What is wrong with the bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Longer than the limit, checked before parsing.
    #[error("{what} has {found} bytes, the limit is {limit}")]
    TooLarge {
        /// The part of the message.
        what: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// A field of fixed size with another size.
    #[error("{what} has {found} bytes, expected {expected}")]
    Length {
        /// The part of the message.
        what: &'static str,
        /// Its length in bytes.
        found: usize,
        /// The only length accepted.
        expected: usize,
    },
    /// Not JSON of the expected shape: a missing, unknown, repeated or mistyped member.
    #[error("{what} is not JSON of the expected shape")]
    Json {
        /// The part of the message.
        what: &'static str,
    },
    /// Not base64 of the expected alphabet and padding.
    #[error("{what} is not the expected base64")]
    Base64 {
        /// The part of the message.
        what: &'static str,
    },
    /// Not CBOR of the expected shape.
    #[error("{what} is not CBOR of the expected shape")]
    Cbor {
        /// The part of the message.
        what: &'static str,
    },
    /// CBOR that a deterministic encoder would have written otherwise.
    #[error("{what} is not deterministically encoded")]
    NotDeterministic {
        /// The part of the message.
        what: &'static str,
    },
    /// A value outside what this version of the format offers.
    #[error("{what} is {found:?}, expected {expected}")]
    Unsupported {
        /// The part of the message.
        what: &'static str,
        /// The value found, cut to 64 characters.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// A JOSE header that the sender marks as critical; none is understood here.
    #[error("the JWE marks header parameters as critical, none is supported")]
    CriticalHeader,
    /// Coordinates that are not a point of P-256.
    #[error("{what} is not a point of P-256")]
    NotAPoint {
        /// The key in question.
        what: &'static str,
    },
    /// A key grant that does not say who may use its model, as grants once did not.
    #[error(
        "the key grant is of the former form, which does not say who may use the model: make it anew with `casemate \
         grant --api-keys LIST` or `casemate grant --open`"
    )]
    FormerGrant,
    /// Text that may not stand in this field.
    #[error("{what} holds a character or length that is not allowed")]
    Text {
        /// The part of the message.
        what: &'static str,
    },
}

/// What did not verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unverified {
    /// The JWE's wrapped key or ciphertext does not authenticate under the recipient's key.
    #[error("the JWE does not authenticate under this key")]
    Jwe,
    /// The grant is not signed by the expected provider.
    #[error("the key grant is not signed by the expected provider")]
    Grant,
    /// The credential is not signed by the expected issuer.
    #[error("the deployment credential is not signed by the expected issuer")]
    Credential,
    /// The rollback is not signed by the expected provider.
    #[error("the rollback is not signed by the expected provider")]
    Rollback,
}

/// Why something genuine is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The credential's life has ended.
    #[error("expired at {expires_at}, now {now}")]
    Expired {
        /// End of validity, seconds since 1970.
        expires_at: u64,
        /// The time that was passed in.
        now: u64,
    },
    /// The credential was issued after now (beyond the allowed clock skew).
    #[error("issued at {issued_at}, which is after now {now}")]
    NotYetValid {
        /// Start of validity, seconds since 1970.
        issued_at: u64,
        /// The time that was passed in.
        now: u64,
    },
    /// The grant is for another model.
    #[error("the grant is for model {expected}, found {found}")]
    OtherModel {
        /// Hex digest in the grant.
        expected: String,
        /// Hex digest of the model at hand.
        found: String,
    },
    /// The model is older than the grant allows.
    #[error("model version {found} is below the minimum {minimum}")]
    OldVersion {
        /// Version of the model at hand.
        found: u64,
        /// Minimum in the grant.
        minimum: u64,
    },
    /// The rollback is for something else.
    #[error("the rollback is for {what} {permitted}, here it is {actual}")]
    Rollback {
        /// The part that differs.
        what: &'static str,
        /// What the provider permitted.
        permitted: String,
        /// What would be done.
        actual: String,
    },
    /// The rollback would be valid for longer than a rollback may.
    #[error(
        "the rollback is valid until {expires_at}, now is {now}; it may be valid for a week at most"
    )]
    LivesTooLong {
        /// End of validity, seconds since 1970.
        expires_at: u64,
        /// The time that was passed in.
        now: u64,
    },
}

/// Cuts text from a stranger to a length that is safe to show.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

/// Refuses input beyond its limit before anything parses it.
pub(crate) fn bounded(what: &'static str, bytes: &[u8], limit: usize) -> Result<(), Malformed> {
    if bytes.len() > limit {
        return Err(Malformed::TooLarge {
            what,
            found: bytes.len(),
            limit,
        });
    }
    Ok(())
}
