//! The hash-chained decision log: entries, their encoding, and the check of a whole chain.
//!
//! ```text
//! hash(entry) = SHA-256("casemate decision log entry v1" ‖ 0x00 ‖ deterministic CBOR of the entry)
//! entry       = { 0: 1, 1: position, 2: hash of the entry before (zeros at position 0), 3: time, 4: action, … }
//! head        = size ‖ hash of the last entry, signed by the issuer over SIGNATURE_DOMAIN
//! ```
//! An edited, removed, inserted or reordered entry breaks the chain; entries cut off at the end break the
//! signed head. Putting back an older copy of the whole log does not show in the log itself, but against
//! any credential issued since, because credentials carry size and head: see [`Anchor`].
//!
//! Where entries are kept is [`crate::store`]'s business.

use aws_lc_rs::digest::{Context, SHA256};
use casemate_attest::{Class, Denial};
use casemate_container::signing::{Signature, SigningKey, VerifyingKey};
use casemate_release::api_key;
use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};
use serde::{Serialize, Serializer};

/// Domain of the issuer's signature over a head.
pub const SIGNATURE_DOMAIN: &str = "casemate decision log head v1";
/// Most bytes of one entry.
pub const MAX_ENTRY_BYTES: usize = 16 * 1024;

const ENTRY_DOMAIN: &[u8] = b"casemate decision log entry v1\0";
const FORMAT: u32 = 1;
const MAX_TEXT_CHARS: usize = 512;

/// A SHA-256 value in an entry; hex in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct Digest(#[n(0)] ByteArray<32>);

impl Digest {
    /// The bytes.
    pub fn bytes(&self) -> [u8; 32] {
        *self.0
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes.into())
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(*self.0))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(*self.0))
    }
}

/// What was decided about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum Action {
    /// The log was begun; `content` is the issuer's public key.
    #[n(0)]
    Begin,
    /// A policy came into force; `content` is the SHA-256 of its text.
    #[n(1)]
    SetPolicy,
    /// A resource was stored; `content` is its SHA-256.
    #[n(2)]
    PutResource,
    /// A resource was deleted.
    #[n(3)]
    DeleteResource,
    /// Evidence was appraised.
    #[n(4)]
    Attest,
    /// A resource was asked for.
    #[n(5)]
    Release,
    /// A deployment credential was asked for; `content` is the keyset's digest.
    #[n(6)]
    Credential,
    /// The provider's rollback was used; `content` is its SHA-256, the next entry is the step back.
    #[n(7)]
    Rollback,
    /// Requests were denied without an entry of their own, because there were too many; `count` says how many.
    #[n(8)]
    Suppressed,
}

/// How it was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum Verdict {
    /// Done at the administrator's request.
    #[n(0)]
    Administered,
    /// Allowed: evidence of a genuine TEE.
    #[n(1)]
    Genuine,
    /// Allowed: evidence under the development root that the policy names. Not a TEE.
    #[n(2)]
    Development,
    /// Denied; `denial` says why.
    #[n(3)]
    Denied,
}

/// Who may use a model, as its grant says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "snake_case")]
#[cbor(index_only)]
pub enum Access {
    /// Whoever reaches the enclave.
    #[n(0)]
    Open,
    /// Who has one of the API keys that the grant lists.
    #[n(1)]
    ApiKeys,
}

impl From<&api_key::Access> for Access {
    fn from(access: &api_key::Access) -> Self {
        match access {
            api_key::Access::Open => Self::Open,
            api_key::Access::Keyed(_) => Self::ApiKeys,
        }
    }
}

/// A denial as it is logged.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct LoggedDenial {
    /// `malformed`, `not_genuine` or `refused`.
    #[n(0)]
    pub class: String,
    /// The claim that failed.
    #[n(1)]
    pub claim: String,
    /// What was found.
    #[n(2)]
    pub found: String,
    /// What would have been accepted.
    #[n(3)]
    pub expected: String,
    /// What to do.
    #[n(4)]
    pub remedy: String,
}

impl From<&Denial> for LoggedDenial {
    fn from(denial: &Denial) -> Self {
        let class = match denial.class {
            Class::Malformed => "malformed",
            Class::NotGenuine => "not_genuine",
            Class::Refused => "refused",
        };
        Self {
            class: class.into(),
            claim: cut(denial.claim),
            found: cut(&denial.found),
            expected: cut(&denial.expected),
            remedy: cut(&denial.remedy),
        }
    }
}

/// What a decision says, before it gets its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct Decision {
    /// What was decided about.
    #[n(0)]
    pub action: Action,
    /// How.
    #[n(1)]
    pub verdict: Verdict,
    /// The policy in force.
    #[n(2)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_version: Option<u64>,
    /// SHA-256 of the session's identifier.
    #[n(3)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<Digest>,
    /// Path of the resource, or name of the service.
    #[n(4)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// SHA-256 of the evidence.
    #[n(5)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Digest>,
    /// Name of the measurement in the policy that matched.
    #[n(6)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measurement: Option<String>,
    /// The model whose key it is about.
    #[n(7)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Digest>,
    /// What the action's description says.
    #[n(8)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
    /// End of validity of what was issued, seconds since 1970.
    #[n(9)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<u64>,
    /// Why it was denied.
    #[n(10)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denial: Option<LoggedDenial>,
    /// How many.
    #[n(11)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Who may use the model of the key grant that was stored, or refused.
    #[n(12)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
}

impl Decision {
    /// A decision with nothing but what and how.
    pub fn new(action: Action, verdict: Verdict) -> Self {
        Self {
            action,
            verdict,
            policy_version: None,
            session: None,
            subject: None,
            evidence: None,
            measurement: None,
            model: None,
            content: None,
            expires_at: None,
            denial: None,
            count: None,
            access: None,
        }
    }
}

/// One link of the chain.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct Entry {
    #[n(0)]
    #[serde(skip)]
    format: u32,
    /// Number of entries before this one.
    #[n(1)]
    pub position: u64,
    /// Hash of the entry before; zeros for the first.
    #[n(2)]
    pub previous: Digest,
    /// Seconds since 1970.
    #[n(3)]
    pub time: u64,
    /// What was decided.
    #[n(4)]
    #[serde(flatten)]
    pub decision: Decision,
}

impl Entry {
    /// The next entry after `head`.
    pub fn after(head: &Head, time: u64, mut decision: Decision) -> Self {
        for text in [&mut decision.subject, &mut decision.measurement]
            .into_iter()
            .flatten()
        {
            *text = cut(text);
        }
        Self {
            format: FORMAT,
            position: head.size,
            previous: head.hash,
            time,
            decision,
        }
    }

    /// The one encoding.
    pub fn encode(&self) -> Vec<u8> {
        minicbor::to_vec(self).expect("writing to memory cannot fail")
    }

    /// Parses an encoding; none for anything that [`Entry::encode`] would not have written.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > MAX_ENTRY_BYTES {
            return None;
        }
        let entry: Entry = minicbor::decode(bytes).ok()?;
        (entry.format == FORMAT && entry.encode() == bytes).then_some(entry)
    }
}

/// Hash of an encoded entry.
pub fn hash(encoded: &[u8]) -> Digest {
    let mut context = Context::new(&SHA256);
    context.update(ENTRY_DOMAIN);
    context.update(encoded);
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out.into()
}

/// Where a log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Head {
    /// Number of entries.
    pub size: u64,
    /// Hash of the last one; zeros for an empty log.
    pub hash: Digest,
}

impl Head {
    /// The head of a log without entries.
    pub fn empty() -> Self {
        Self {
            size: 0,
            hash: [0; 32].into(),
        }
    }

    /// Signs the head.
    pub fn sign(&self, issuer: &SigningKey) -> [u8; 64] {
        issuer.sign(SIGNATURE_DOMAIN, &self.message()).0
    }

    /// Whether `issuer` signed this head.
    pub fn is_signed_by(&self, issuer: &VerifyingKey, signature: &[u8; 64]) -> bool {
        issuer
            .verify(SIGNATURE_DOMAIN, &self.message(), &Signature(*signature))
            .is_ok()
    }

    fn message(&self) -> [u8; 40] {
        let mut message = [0; 40];
        message[..8].copy_from_slice(&self.size.to_be_bytes());
        message[8..].copy_from_slice(&self.hash.bytes());
        message
    }
}

/// A head that somebody else remembers, for example from a deployment credential.
pub type Anchor = Head;

/// The first thing that is wrong with a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogFault {
    /// The bytes at this position are not an entry.
    #[error("entry {0} cannot be read")]
    Unreadable(u64),
    /// Another position stands in the entry, or one is missing before it.
    #[error("entry {0} is missing or out of order")]
    OutOfOrder(u64),
    /// The entry does not follow from the one before.
    #[error("entry {0} does not continue the chain: it or the entry before was changed")]
    BrokenLink(u64),
    /// The log ends elsewhere than its signed head says.
    #[error("the log has {found} entries or another last entry, its signed head says {signed}")]
    OtherHead {
        /// Number of entries found.
        found: u64,
        /// Number of entries in the signed head.
        signed: u64,
    },
    /// The head is not signed by the issuer.
    #[error("the head is not signed by the issuer")]
    HeadSignature,
    /// The log does not contain a head that somebody else remembers.
    #[error(
        "the log does not contain the anchored head of size {0}: entries were cut off or replaced, or it is another broker's"
    )]
    NotAnchored(u64),
}

/// Checks a chain entry by entry, without holding it in memory.
pub struct ChainCheck {
    head: Head,
    /// Ascending by size.
    anchors: Vec<Anchor>,
}

impl ChainCheck {
    /// Begins before the first entry. The log must contain every anchor.
    pub fn new(anchors: &[Anchor]) -> Self {
        let mut anchors = anchors.to_vec();
        anchors.sort_by_key(|anchor| anchor.size);
        Self {
            head: Head::empty(),
            anchors,
        }
    }

    /// Takes the next stored row.
    ///
    /// # Errors
    /// The first [`LogFault`].
    pub fn next(&mut self, position: u64, encoded: &[u8], stored: Digest) -> Result<(), LogFault> {
        let expected = self.head.size;
        if position != expected {
            return Err(LogFault::OutOfOrder(expected));
        }
        let entry = Entry::decode(encoded).ok_or(LogFault::Unreadable(position))?;
        if entry.position != position {
            return Err(LogFault::OutOfOrder(position));
        }
        if entry.previous != self.head.hash || hash(encoded) != stored {
            return Err(LogFault::BrokenLink(position));
        }
        self.head = Head {
            size: position + 1,
            hash: stored,
        };
        let first = self.anchors.partition_point(|a| a.size < self.head.size);
        let mut here = self.anchors[first..]
            .iter()
            .take_while(|anchor| anchor.size == self.head.size);
        match here.find(|anchor| anchor.hash != self.head.hash) {
            Some(anchor) => Err(LogFault::NotAnchored(anchor.size)),
            None => Ok(()),
        }
    }

    /// Ends the check against the signed head.
    ///
    /// # Errors
    /// The first [`LogFault`].
    pub fn finish(
        self,
        signed: &Head,
        signature: &[u8; 64],
        issuer: &VerifyingKey,
    ) -> Result<Head, LogFault> {
        if !signed.is_signed_by(issuer, signature) {
            return Err(LogFault::HeadSignature);
        }
        if *signed != self.head {
            return Err(LogFault::OtherHead {
                found: self.head.size,
                signed: signed.size,
            });
        }
        match self.anchors.last() {
            Some(anchor) if anchor.size > self.head.size => Err(LogFault::NotAnchored(anchor.size)),
            _ => Ok(self.head),
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    const VECTORS: &str = include_str!("../../../docs/vectors/key-release.json");
    const TIME: u64 = 1_780_000_000;

    fn issuer() -> SigningKey {
        SigningKey::from_seed(&[0x44; 32])
    }

    fn decisions() -> [Decision; 3] {
        let mut begin = Decision::new(Action::Begin, Verdict::Administered);
        begin.content = Some((*issuer().verifying_key().as_bytes()).into());
        let mut release = Decision::new(Action::Release, Verdict::Development);
        release.policy_version = Some(7);
        release.session = Some([0x61; 32].into());
        release.subject = Some("default/model/smollm2".into());
        release.evidence = Some([0x51; 32].into());
        release.measurement = Some("casemate-enclave".into());
        release.model = Some([0x22; 32].into());
        let mut denied = Decision::new(Action::Credential, Verdict::Denied);
        denied.policy_version = Some(7);
        denied.subject = Some("smollm2".into());
        let denial = Denial::refused(
            "keyset.model_version",
            "2",
            "at least 3",
            "serve a newer one",
        );
        denied.denial = Some(LoggedDenial::from(&denial));
        [begin, release, denied]
    }

    fn chain() -> (Vec<Vec<u8>>, Head) {
        let mut head = Head::empty();
        let mut entries = Vec::new();
        for (decision, time) in decisions().into_iter().zip(TIME..) {
            let encoded = Entry::after(&head, time, decision).encode();
            head = Head {
                size: head.size + 1,
                hash: hash(&encoded),
            };
            entries.push(encoded);
        }
        (entries, head)
    }

    #[test]
    fn the_chain_is_the_vectors() {
        let vectors: Value = serde_json::from_str(VECTORS).unwrap();
        let (entries, head) = chain();
        let written: Vec<Value> = entries
            .iter()
            .map(|entry| {
                serde_json::json!({
                    "entry": hex::encode(entry),
                    "hash": hex::encode(hash(entry).bytes()),
                })
            })
            .collect();
        assert_eq!(Value::from(written), vectors["log"]["entries"]);
        assert_eq!(
            hex::encode(head.sign(&issuer())),
            vectors["log"]["head_signature"]
        );
    }

    #[test]
    fn a_chain_checks_under_its_issuer_only() {
        let (entries, head) = chain();
        let check = || {
            let mut check = ChainCheck::new(&[]);
            for (entry, position) in entries.iter().zip(0..) {
                check.next(position, entry, hash(entry)).unwrap();
            }
            check
        };
        let signature = head.sign(&issuer());
        assert_eq!(
            check().finish(&head, &signature, &issuer().verifying_key()),
            Ok(head)
        );
        let other = SigningKey::generate().verifying_key();
        assert_eq!(
            check().finish(&head, &signature, &other),
            Err(LogFault::HeadSignature)
        );
        // The signature covers the size as well as the hash.
        let longer = Head { size: 4, ..head };
        let issuer = issuer().verifying_key();
        assert_eq!(
            check().finish(&longer, &signature, &issuer),
            Err(LogFault::HeadSignature)
        );
    }

    #[test]
    fn other_encodings_of_an_entry_are_unreadable() {
        let (entries, _) = chain();
        let entry = &entries[0];
        assert!(Entry::decode(entry).is_some());
        let mut trailing = entry.clone();
        trailing.push(0);
        assert_eq!(Entry::decode(&trailing), None);
        let mut long = vec![0xb8, 0x05];
        long.extend(&entry[1..]);
        assert_eq!(Entry::decode(&long), None);
        let mut future = entry.clone();
        assert_eq!(future[1..3], [0, 1]);
        future[2] = 2;
        assert_eq!(Entry::decode(&future), None);
        for length in 0..entry.len() {
            assert_eq!(Entry::decode(&entry[..length]), None);
        }
    }

    #[test]
    fn what_strangers_write_is_cut() {
        let mut decision = Decision::new(Action::Attest, Verdict::Denied);
        decision.subject = Some("ü".repeat(100_000));
        let long = "x".repeat(100_000);
        let denial = Denial::malformed("quote.structure", &long, &long, &long);
        decision.denial = Some(LoggedDenial::from(&denial));
        let encoded = Entry::after(&Head::empty(), TIME, decision).encode();
        assert!(encoded.len() < MAX_ENTRY_BYTES, "{} bytes", encoded.len());
        assert!(Entry::decode(&encoded).is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_entry_round_trips(
            size: u64, previous: [u8; 32], time: u64, subject in ".{0,600}", policy: Option<u64>,
            session: Option<[u8; 32]>, expires_at: Option<u64>, content: Option<[u8; 32]>,
        ) {
            let decision = Decision {
                policy_version: policy,
                session: session.map(Digest::from),
                subject: Some(subject),
                content: content.map(Digest::from),
                expires_at,
                ..Decision::new(Action::Attest, Verdict::Genuine)
            };
            let head = Head { size, hash: previous.into() };
            let entry = Entry::after(&head, time, decision);
            prop_assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Entry::decode(&bytes);
        }
    }
}
