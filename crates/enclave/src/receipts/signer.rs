//! The receipt key of one keyset, and how many receipts it has signed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use casemate_channel::keyset::KeysetDigest;
use casemate_channel::receipt::{
    AnswerHash, Parameters, Receipt, ReceiptError, RequestHash, RequestId, Usage,
};
use casemate_container::signing::{SigningKey, VerifyingKey};

/// What all receipts of a keyset say.
#[derive(Clone, Debug)]
pub struct KeysetFacts {
    /// Digest of the encoded keyset.
    pub keyset_digest: KeysetDigest,
    /// The evidence in its credential.
    pub evidence_digest: [u8; 32],
    /// The loaded model.
    pub model_digest: [u8; 32],
    /// Its version.
    pub model_version: u64,
    /// The loaded adapters, ascending.
    pub adapter_digests: Vec<[u8; 32]>,
    /// Arithmetic.
    pub compute: String,
    /// End of the keyset, seconds since the Unix epoch.
    pub expires_at: u64,
}

/// What one receipt says of its answer.
pub struct Statement {
    /// The answer's id.
    pub id: RequestId,
    /// The adapter that was applied, if one was.
    pub adapter: Option<[u8; 32]>,
    /// How tokens were drawn.
    pub parameters: Parameters,
    /// Salted hash of the request.
    pub request_hash: RequestHash,
    /// Status of the answer.
    pub status: u16,
    /// Salted hash of the answer.
    pub answer_hash: AnswerHash,
    /// Tokens; nothing where the answer is incomplete.
    pub usage: Option<Usage>,
}

/// What came of signing.
pub enum Signed {
    /// The receipt's envelope.
    Receipt(Vec<u8>),
    /// The keyset has ended; its key is erased.
    KeysetEnded,
}

/// Signs the receipts of one keyset, numbered from 1 without gaps, until the keyset ends.
pub struct Signer {
    facts: KeysetFacts,
    key: Mutex<Option<CountingKey>>,
}

struct CountingKey {
    key: SigningKey,
    signed: u64,
}

impl Signer {
    /// Signs with the key whose public half the keyset names.
    pub fn new(facts: KeysetFacts, key: SigningKey) -> Signer {
        let key = CountingKey { key, signed: 0 };
        Signer {
            facts,
            key: Mutex::new(Some(key)),
        }
    }

    /// The public half; nothing once the key is erased.
    pub fn verifying_key(&self) -> Option<VerifyingKey> {
        self.key().as_ref().map(|held| held.key.verifying_key())
    }

    /// Signs the next receipt, dated `now`.
    ///
    /// # Errors
    /// [`ReceiptError::Malformed`] for a statement that breaks a rule of receipts; it takes no number.
    pub fn sign(&self, statement: Statement, now: u64) -> Result<Signed, ReceiptError> {
        self.erase_expired(now);
        let mut key = self.key();
        let Some(held) = key.as_mut() else {
            return Ok(Signed::KeysetEnded);
        };
        let facts = &self.facts;
        let receipt = Receipt {
            id: statement.id,
            counter: held.signed + 1,
            keyset_digest: facts.keyset_digest,
            evidence_digest: facts.evidence_digest,
            model_digest: facts.model_digest,
            model_version: facts.model_version,
            adapter_digests: facts.adapter_digests.clone(),
            adapter: statement.adapter,
            compute: facts.compute.clone(),
            parameters: statement.parameters,
            request_hash: statement.request_hash,
            status: statement.status,
            answer_hash: statement.answer_hash,
            usage: statement.usage,
            time: now,
        };
        let envelope = receipt.sign(&held.key)?;
        held.signed += 1;
        Ok(Signed::Receipt(envelope))
    }

    /// Erases the key if its keyset has ended by `now`; returns whether it is erased.
    pub fn erase_expired(&self, now: u64) -> bool {
        let mut key = self.key();
        if now >= self.facts.expires_at {
            *key = None;
        }
        key.is_none()
    }

    fn key(&self) -> MutexGuard<'_, Option<CountingKey>> {
        self.key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use casemate_channel::receipt::{AnswerHasher, Salt, SignedReceipt};

    use super::*;

    /// Signs until `expires_at`, under a keyset of no importance.
    pub(crate) fn signer_until(expires_at: u64) -> Signer {
        let facts = KeysetFacts {
            keyset_digest: KeysetDigest([1; 32]),
            evidence_digest: [2; 32],
            model_digest: [3; 32],
            model_version: 4,
            adapter_digests: vec![],
            compute: "int8-g32".into(),
            expires_at,
        };
        Signer::new(facts, SigningKey::generate())
    }

    fn statement(choices: u32) -> Statement {
        let salt = Salt::random();
        Statement {
            id: RequestId::new("chatcmpl", [5; 16]),
            adapter: None,
            parameters: Parameters {
                choices,
                ..Parameters::default()
            },
            request_hash: RequestHash::of(&salt, "POST", "/", b""),
            status: 200,
            answer_hash: AnswerHasher::new(&salt).finish(),
            usage: None,
        }
    }

    fn counter(signed: Result<Signed, ReceiptError>) -> u64 {
        match signed.unwrap() {
            Signed::Receipt(envelope) => {
                SignedReceipt::parse(&envelope)
                    .unwrap()
                    .unverified()
                    .counter
            }
            Signed::KeysetEnded => panic!("the keyset has ended"),
        }
    }

    #[test]
    fn receipts_are_numbered_from_one_without_gaps() {
        let signer = signer_until(100);
        assert_eq!(counter(signer.sign(statement(1), 10)), 1);
        assert_eq!(counter(signer.sign(statement(1), 10)), 2);
        // What cannot be signed takes no number.
        let refused = signer.sign(statement(0), 10);
        assert!(matches!(refused, Err(ReceiptError::Malformed(_))));
        assert_eq!(counter(signer.sign(statement(1), 10)), 3);
    }

    #[test]
    fn the_key_is_gone_at_the_end_of_its_keyset() {
        let signer = signer_until(100);
        assert!(!signer.erase_expired(99));
        assert_eq!(counter(signer.sign(statement(1), 99)), 1);
        let ended = signer.sign(statement(1), 100);
        assert!(matches!(ended, Ok(Signed::KeysetEnded)));
        assert!(signer.verifying_key().is_none());
        // And stays so, whatever the host does to the clock.
        let ended = signer.sign(statement(1), 99);
        assert!(matches!(ended, Ok(Signed::KeysetEnded)));
    }
}
