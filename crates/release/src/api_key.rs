//! API keys in a key grant: who may use a model, and how much.
//!
//! ```text
//! access  = 0 (open, no list) / 1 (by API key, and the list)
//! api key = { 0: name tstr, 1: SHA-256 of the key's text bstr32, ? 2: requests per minute uint32,
//!             ? 3: tokens per minute uint32, ? 4: answers at the same time uint32,
//!             ? 5: requests per day uint32, ? 6: tokens per day uint32 }
//! ```
//! A key is the text `cm-` and 64 lowercase hexadecimal digits of 32 random bytes. With that much randomness its plain
//! hash reveals nothing of it, so hashes may travel and rest where keys must not.

use std::num::NonZeroU32;

use aws_lc_rs::digest::{SHA256, digest};
use minicbor::{Decode, Encode};
use zeroize::{Zeroize, Zeroizing};

use crate::error::{Malformed, ReleaseError, shown};
use crate::random::Random;

/// Most API keys of one grant.
pub const MAX_API_KEYS: usize = 256;
/// Most characters of an API key's name.
pub const MAX_NAME_BYTES: usize = 32;
/// What an API key's name may be, in words.
pub const NAME_RULE: &str = "1 to 32 letters, digits, '.', '_' or '-'";
/// Most bytes of an encoded entry: its head, name, hash and limits.
pub(crate) const MAX_ENTRY_BYTES: usize = 1 + (3 + MAX_NAME_BYTES) + (3 + 32) + 5 * (1 + 5);
/// What every API key begins with, so that people and scanners recognise one.
pub const PREFIX: &str = "cm-";

/// How much one API key allows; what is absent is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests for answers per minute.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Tokens of prompts and answers per minute.
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Requests that are being answered at the same time.
    pub concurrency: Option<NonZeroU32>,
    /// Requests for answers per day: how much may be learned from them, where the limits above are about load.
    pub requests_per_day: Option<NonZeroU32>,
    /// Tokens of prompts and answers per day.
    pub tokens_per_day: Option<NonZeroU32>,
}

/// One API key, known by its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// What the provider calls its holder: 1 to 32 ASCII letters, digits, `.`, `_` or `-`.
    pub name: String,
    /// [`hash`] of the key.
    pub hash: [u8; 32],
    /// How much it allows.
    pub limits: Limits,
}

/// Who may use a model, as its grant says. There is no default: a provider says which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Whoever reaches the enclave.
    Open,
    /// Who has one of these keys.
    Keyed(ApiKeys),
}

impl Access {
    /// Whether anybody may use the model.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self, Access::Open)
    }

    /// The keys, of which open access has none.
    #[must_use]
    pub fn api_keys(&self) -> Option<&ApiKeys> {
        match self {
            Access::Open => None,
            Access::Keyed(keys) => Some(keys),
        }
    }
}

impl std::fmt::Display for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.api_keys().map(|keys| keys.as_slice().len()) {
            None => f.write_str("open to anybody"),
            Some(1) => f.write_str("1 API key"),
            Some(count) => write!(f, "{count} API keys"),
        }
    }
}

/// The API keys of a grant: 1 to [`MAX_API_KEYS`], ordered by name, no name and no hash twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKeys(Vec<ApiKey>);

impl ApiKeys {
    /// Checks a list and brings it into order.
    ///
    /// # Errors
    /// [`Malformed`] for none or too many, for a name that is not allowed, and for one that occurs twice.
    pub fn new(mut keys: Vec<ApiKey>) -> Result<Self, ReleaseError> {
        keys.sort_by(|a, b| a.name.cmp(&b.name));
        check(&keys)?;
        Ok(Self(keys))
    }

    /// The keys, ordered by name.
    #[must_use]
    pub fn as_slice(&self) -> &[ApiKey] {
        &self.0
    }
}

/// Whether an API key may have this name: [`NAME_RULE`].
#[must_use]
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed)
}

fn check(keys: &[ApiKey]) -> Result<(), Malformed> {
    let unsupported = |what, found: &str, expected| Malformed::Unsupported {
        what,
        found: shown(found),
        expected,
    };
    if !(1..=MAX_API_KEYS).contains(&keys.len()) {
        let what = "number of API keys";
        return Err(unsupported(what, &keys.len().to_string(), "1 to 256"));
    }
    for key in keys {
        if !is_name(&key.name) {
            return Err(unsupported("name of an API key", &key.name, NAME_RULE));
        }
    }
    if let Some(two) = keys.windows(2).find(|two| two[0].name >= two[1].name) {
        let what = "name of an API key";
        return Err(unsupported(what, &two[1].name, "each once, in order"));
    }
    let mut hashes: Vec<_> = keys.iter().map(|key| (key.hash, &key.name)).collect();
    hashes.sort_unstable();
    if let Some(two) = hashes.windows(2).find(|two| two[0].0 == two[1].0) {
        let what = "hash of an API key";
        return Err(unsupported(what, two[1].1, "each key under one name"));
    }
    Ok(())
}

/// A new API key.
///
/// # Errors
/// [`ReleaseError::Crypto`] when there is no randomness.
pub fn generate(random: &dyn Random) -> Result<Zeroizing<String>, ReleaseError> {
    let mut bytes = Zeroizing::new([0; 32]);
    random.fill(&mut *bytes)?;
    // With room for all of it, so that growing leaves no copies behind.
    let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + 64));
    text.push_str(PREFIX);
    let mut digits = hex::encode(*bytes);
    text.push_str(&digits);
    digits.zeroize();
    Ok(text)
}

/// Whether something of an API key's form is in a text, which is not shown to anybody then. Digits may be large, as
/// somebody may have typed them.
#[must_use]
pub fn is_in(text: &str) -> bool {
    text.match_indices(PREFIX).any(|(at, prefix)| {
        let digits = text.as_bytes()[at + prefix.len()..].iter();
        digits.take_while(|byte| byte.is_ascii_hexdigit()).count() >= 64
    })
}

/// What is kept of an API key: the SHA-256 of its text.
#[must_use]
pub fn hash(key: &[u8]) -> [u8; 32] {
    let hash = digest(&SHA256, key);
    hash.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// An API key as it is encoded.
#[derive(Encode, Decode)]
#[cbor(map)]
pub(crate) struct Entry {
    #[n(0)]
    name: String,
    #[cbor(n(1), with = "minicbor::bytes")]
    hash: [u8; 32],
    #[n(2)]
    requests_per_minute: Option<NonZeroU32>,
    #[n(3)]
    tokens_per_minute: Option<NonZeroU32>,
    #[n(4)]
    concurrency: Option<NonZeroU32>,
    #[n(5)]
    requests_per_day: Option<NonZeroU32>,
    #[n(6)]
    tokens_per_day: Option<NonZeroU32>,
}

/// Access for whoever reaches the enclave, as it is encoded.
const OPEN: u32 = 0;
/// Access by API key, as it is encoded; the list follows.
const KEYED: u32 = 1;

/// Access as it is encoded: which it is, and the list where it is by key.
pub(crate) fn to_wire(access: &Access) -> (u32, Option<Vec<Entry>>) {
    let entry = |key: &ApiKey| Entry {
        name: key.name.clone(),
        hash: key.hash,
        requests_per_minute: key.limits.requests_per_minute,
        tokens_per_minute: key.limits.tokens_per_minute,
        concurrency: key.limits.concurrency,
        requests_per_day: key.limits.requests_per_day,
        tokens_per_day: key.limits.tokens_per_day,
    };
    match access {
        Access::Open => (OPEN, None),
        Access::Keyed(keys) => (KEYED, Some(keys.0.iter().map(entry).collect())),
    }
}

/// The opposite of [`to_wire`]. The two must agree: an absent list opens nothing.
pub(crate) fn from_wire(access: u32, entries: Option<&[Entry]>) -> Result<Access, ReleaseError> {
    let entries = match (access, entries) {
        (OPEN, None) => return Ok(Access::Open),
        (KEYED, Some(entries)) => entries,
        _ => {
            return Err(Malformed::Unsupported {
                what: "grant.access",
                found: access.to_string(),
                expected: "0 without a list of API keys, or 1 with one",
            }
            .into());
        }
    };
    let key = |entry: &Entry| ApiKey {
        name: entry.name.clone(),
        hash: entry.hash,
        limits: Limits {
            requests_per_minute: entry.requests_per_minute,
            tokens_per_minute: entry.tokens_per_minute,
            concurrency: entry.concurrency,
            requests_per_day: entry.requests_per_day,
            tokens_per_day: entry.tokens_per_day,
        },
    };
    let keys: Vec<_> = entries.iter().map(key).collect();
    check(&keys)?;
    Ok(Access::Keyed(ApiKeys(keys)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SystemRandom;

    fn key(name: &str, byte: u8) -> ApiKey {
        ApiKey {
            name: name.into(),
            hash: [byte; 32],
            limits: Limits::default(),
        }
    }

    #[test]
    fn a_new_key_has_the_documented_form_and_is_new() {
        let keys: Vec<_> = (0..2).map(|_| generate(&SystemRandom).unwrap()).collect();
        for key in &keys {
            let digits = key.strip_prefix("cm-").unwrap();
            assert_eq!(digits.len(), 64);
            let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            assert!(digits.bytes().all(lower), "{digits}");
        }
        assert_ne!(keys[0], keys[1]);
        assert_ne!(hash(keys[0].as_bytes()), hash(keys[1].as_bytes()));
    }

    #[test]
    fn a_key_is_recognised_in_a_text() {
        let key = generate(&SystemRandom).unwrap();
        for text in [
            key.to_string(),
            format!("cm-cm-x = \"{}\"\n", &*key),
            format!("cm-{}", &key[3..].to_uppercase()),
        ] {
            assert!(is_in(&text), "{text}");
        }
        for text in ["", "cm-", &key[..66], &key[3..], "cm-list = 1"] {
            assert!(!is_in(text), "{text}");
        }
    }

    #[test]
    fn the_hash_is_that_of_the_whole_text() {
        let text = format!("cm-{}", "00".repeat(32));
        assert_eq!(
            hex::encode(hash(text.as_bytes())),
            "85df6c89d84a868f390ffbac35b4a8b4e6f704b219713aa818bfa828f2e96859"
        );
    }

    #[test]
    fn lists_are_ordered_and_hold_nothing_twice() {
        let keys = ApiKeys::new(vec![key("b", 1), key("a", 2)]).unwrap();
        let names: Vec<_> = keys.as_slice().iter().map(|key| &*key.name).collect();
        assert_eq!(names, ["a", "b"]);
        for (two, words) in [
            ([key("a", 1), key("a", 2)], "each once"),
            ([key("a", 1), key("b", 1)], "each key under one name"),
        ] {
            let error = ApiKeys::new(two.to_vec()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn names_and_numbers_are_limited() {
        let longest = "x".repeat(MAX_NAME_BYTES);
        assert!(ApiKeys::new(vec![key(&longest, 1)]).is_ok());
        for name in ["", "a b", "ü", "a\n", "a\"", &format!("{longest}x")] {
            assert!(ApiKeys::new(vec![key(name, 1)]).is_err(), "{name:?}");
        }
        let many = |count: usize| {
            let number = |index: usize| ApiKey {
                hash: hash(&index.to_be_bytes()),
                ..key(&format!("key-{index}"), 0)
            };
            ApiKeys::new((0..count).map(number).collect())
        };
        assert!(many(0).is_err(), "a list of nobody");
        assert!(many(MAX_API_KEYS).is_ok());
        assert!(many(MAX_API_KEYS + 1).is_err());
    }

    #[test]
    fn another_order_is_not_the_encoding_of_a_list() {
        let access = Access::Keyed(ApiKeys::new(vec![key("a", 1), key("b", 2)]).unwrap());
        let (tag, entries) = to_wire(&access);
        let mut entries = entries.unwrap();
        assert_eq!(from_wire(tag, Some(&entries)).unwrap(), access);
        entries.reverse();
        assert!(from_wire(tag, Some(&entries)).is_err());
    }

    #[test]
    fn access_is_said_and_never_assumed() {
        let keys = ApiKeys::new(vec![key("a", 1)]).unwrap();
        let (_, list) = to_wire(&Access::Keyed(keys.clone()));
        let list = list.as_deref();
        assert_eq!(from_wire(0, None).unwrap(), Access::Open);
        assert_eq!(from_wire(1, list).unwrap(), Access::Keyed(keys));
        for (tag, list) in [
            (0, list),
            (1, None),
            (1, Some(&[][..])),
            (2, None),
            (2, list),
        ] {
            let count = list.map(<[_]>::len);
            assert!(from_wire(tag, list).is_err(), "{tag} {count:?}");
        }
    }
}
