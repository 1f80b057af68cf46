//! The salted hashes that stand in a receipt for request and answer.

use std::fmt;

use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::rand;
use zeroize::Zeroizing;

const REQUEST_DOMAIN: &[u8] = b"casemate receipt request v1\0";
const ANSWER_DOMAIN: &[u8] = b"casemate receipt answer v1\0";

/// What keeps a hash from confirming guesses: 32 random bytes, erased when dropped. It travels inside the encrypted
/// channel only.
pub struct Salt(Zeroizing<[u8; 32]>);

impl Salt {
    /// A fresh random salt.
    ///
    /// # Panics
    /// When the system has no randomness.
    pub fn random() -> Salt {
        let mut salt = Zeroizing::new([0; 32]);
        rand::fill(&mut *salt).expect("the system provides randomness");
        Salt(salt)
    }

    /// A salt that was made elsewhere. The caller erases its copy.
    pub fn from_bytes(bytes: &[u8; 32]) -> Salt {
        Salt(Zeroizing::new(*bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Salted hash of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RequestHash(pub [u8; 32]);

/// Salted hash of an answer's body.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AnswerHash(pub [u8; 32]);

impl RequestHash {
    /// The hash of a request as its client sent it: method, path with query, body.
    pub fn of(salt: &Salt, method: &str, target: &str, body: &[u8]) -> RequestHash {
        let mut context = Context::new(&SHA256);
        context.update(REQUEST_DOMAIN);
        context.update(salt.as_bytes());
        for part in [method, target] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        context.update(body);
        RequestHash(finish(context))
    }
}

/// Hashes an answer's body while it passes.
pub struct AnswerHasher(Context);

impl AnswerHasher {
    /// Of no bytes yet.
    pub fn new(salt: &Salt) -> AnswerHasher {
        let mut context = Context::new(&SHA256);
        context.update(ANSWER_DOMAIN);
        context.update(salt.as_bytes());
        AnswerHasher(context)
    }

    /// Takes the next bytes in; how a body is cut into pieces makes no difference.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of all bytes.
    pub fn finish(self) -> AnswerHash {
        AnswerHash(finish(self.0))
    }
}

fn finish(context: Context) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

impl fmt::Debug for RequestHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestHash({})", hex::encode(self.0))
    }
}

impl fmt::Debug for AnswerHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnswerHash({})", hex::encode(self.0))
    }
}
