//! What the broker acknowledged, and whether it is all there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use casemate_broker::log::{Action, Anchor, Decision, Entry, Head, Verdict};
use casemate_broker::state::{database, issuer_public_key};
use casemate_broker::store::{StorageKey, Store, verify_offline};
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::random::SystemRandom;
use casemate_release::rollback::sha256;
use rusqlite::Connection;

use crate::support::cut_log;

/// SHA-256 of a stored thing; none for one that is deleted or was never there.
pub(super) type Content = Option<[u8; 32]>;

/// Something that the broker said it did.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fact {
    Policy { version: u64, content: [u8; 32] },
    Put { path: String, content: [u8; 32] },
    Delete { path: String },
    Attest { session: [u8; 32] },
    Release { session: [u8; 32], path: String },
    Credential { session: [u8; 32], keyset: [u8; 32] },
}

/// One policy or resource: what was acknowledged last, and what was asked for without an answer yet.
#[derive(Clone, Default)]
struct Slot {
    acknowledged: Content,
    pending: Option<Content>,
}

/// What the tables should hold, according to the log.
#[derive(Clone, Default)]
struct Tables {
    policy: Option<(u64, [u8; 32])>,
    resources: BTreeMap<String, [u8; 32]>,
}

#[derive(Clone)]
pub(super) struct Ledger {
    /// Acknowledged since the last check.
    facts: Vec<Fact>,
    anchors: Vec<Anchor>,
    policy: Slot,
    resources: BTreeMap<String, Slot>,
    last_credential: Option<Vec<u8>>,
    totals: BTreeMap<&'static str, u64>,
    /// Up to here the log was checked, and what it said.
    head: Head,
    tables: Tables,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            facts: Vec::new(),
            anchors: Vec::new(),
            policy: Slot::default(),
            resources: BTreeMap::new(),
            last_credential: None,
            totals: BTreeMap::new(),
            head: Head::empty(),
            tables: Tables::default(),
        }
    }

    /// A change of a policy (without a path) or resource was asked for.
    pub(super) fn asked(&mut self, path: Option<&str>, content: Content) {
        self.slot(path).pending = Some(content);
    }

    /// The broker said that something is done.
    pub(super) fn acknowledged(&mut self, fact: Fact) {
        let (kind, change) = match &fact {
            Fact::Policy { content, .. } => ("policies", Some((None, Some(*content)))),
            Fact::Put { path, content } => ("puts", Some((Some(path.clone()), Some(*content)))),
            Fact::Delete { path } => ("deletes", Some((Some(path.clone()), None))),
            Fact::Attest { .. } => ("attestations", None),
            Fact::Release { .. } => ("releases", None),
            Fact::Credential { .. } => ("credentials", None),
        };
        if let Some((path, acknowledged)) = change {
            *self.slot(path.as_deref()) = Slot {
                acknowledged,
                pending: None,
            };
        }
        *self.totals.entry(kind).or_default() += 1;
        self.facts.push(fact);
    }

    /// A credential was issued over this log.
    pub(super) fn anchored(&mut self, anchor: Anchor, envelope: Vec<u8>) {
        self.anchors.push(anchor);
        self.last_credential = Some(envelope);
    }

    pub(super) fn last_credential(&self) -> Option<&[u8]> {
        self.last_credential.as_deref()
    }

    /// The version after the highest that was ever asked for.
    pub(super) fn policy_version(&self) -> u64 {
        self.tables.policy.map_or(0, |(version, _)| version)
    }

    pub(super) fn summary(&self, kills: u64) -> String {
        let total: u64 = self.totals.values().sum();
        format!(
            "kills: {kills}, acknowledged: {total} {:?}, log entries checked: {}, lost: 0",
            self.totals, self.head.size
        )
    }

    pub(super) fn assert_all_kinds_occurred(&self) {
        assert_eq!(self.totals.len(), 6, "{:?}", self.totals);
    }

    /// Compares everything that was acknowledged with a state directory, whether or not a broker is serving it.
    pub(super) fn check(&mut self, state: &Path) -> Result<(), String> {
        let issuer: VerifyingKey = std::fs::read_to_string(issuer_public_key(state))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        // The whole chain, from its first entry; what was checked before must be its beginning.
        let mut anchors = std::mem::take(&mut self.anchors);
        if self.head.size > 0 {
            anchors.push(self.head);
        }
        let head = verify_offline(&database(state), &issuer, &anchors)
            .map_err(|error| error.to_string())?;
        let store = open(state);
        let new = store
            .entries(self.head.size, head.size - self.head.size)
            .map_err(|error| error.to_string())?;
        self.check_facts(&new)?;
        for entry in &new {
            self.tables.follow(&entry.decision);
        }
        self.tables.compare(&store)?;
        self.check_slots()?;
        self.head = head;
        Ok(())
    }

    fn check_facts(&mut self, new: &[Entry]) -> Result<(), String> {
        let logged: BTreeSet<Fact> = new
            .iter()
            .filter_map(|entry| fact(&entry.decision))
            .collect();
        for fact in self.facts.drain(..) {
            if !logged.contains(&fact) {
                return Err(format!("acknowledged, but not in the log: {fact:?}"));
            }
        }
        Ok(())
    }

    /// Whatever was asked for without an answer is now either done or not; nothing else may have happened.
    fn check_slots(&mut self) -> Result<(), String> {
        let policy = self.tables.policy.map(|(_, content)| content);
        settle("the policy", &mut self.policy, policy)?;
        for (path, slot) in &mut self.resources {
            settle(path, slot, self.tables.resources.get(path).copied())?;
        }
        Ok(())
    }

    fn slot(&mut self, path: Option<&str>) -> &mut Slot {
        match path {
            None => &mut self.policy,
            Some(path) => self.resources.entry(path.to_owned()).or_default(),
        }
    }
}

fn settle(what: &str, slot: &mut Slot, found: Content) -> Result<(), String> {
    if found != slot.acknowledged && Some(found) != slot.pending {
        return Err(format!(
            "{what} is neither what was acknowledged nor what was asked for"
        ));
    }
    *slot = Slot {
        acknowledged: found,
        pending: None,
    };
    Ok(())
}

impl Tables {
    fn follow(&mut self, decision: &Decision) {
        let content = decision.content.map(|content| content.bytes());
        let subject = || decision.subject.clone().unwrap();
        match decision.action {
            Action::SetPolicy => {
                self.policy = decision.policy_version.zip(content);
            }
            Action::PutResource => {
                self.resources.insert(subject(), content.unwrap());
            }
            Action::DeleteResource => {
                self.resources.remove(&subject());
            }
            _ => {}
        }
    }

    fn compare(&self, store: &Store) -> Result<(), String> {
        let policy = store.policy().map_err(|error| error.to_string())?;
        let policy = policy.map(|(version, text)| (version, sha256(text.as_bytes())));
        if policy != self.policy {
            return Err("the policy in force is not the one that the log set last".into());
        }
        let mut found = BTreeMap::new();
        for path in store.resource_paths().map_err(|error| error.to_string())? {
            let resource = store.resource(&path).map_err(|error| error.to_string())?;
            found.insert(path.to_string(), sha256(&resource.unwrap().bytes));
        }
        match found == self.resources {
            true => Ok(()),
            false => Err("the resources are not those that the log stored".into()),
        }
    }
}

/// What an entry says, where it is something that a caller would have been told.
fn fact(decision: &Decision) -> Option<Fact> {
    let content = decision.content.map(|content| content.bytes());
    let session = decision.session.map(|session| session.bytes());
    let subject = decision.subject.clone();
    if decision.verdict == Verdict::Denied {
        return None;
    }
    match decision.action {
        Action::SetPolicy => Some(Fact::Policy {
            version: decision.policy_version?,
            content: content?,
        }),
        Action::PutResource => Some(Fact::Put {
            path: subject?,
            content: content?,
        }),
        Action::DeleteResource => Some(Fact::Delete { path: subject? }),
        Action::Attest => Some(Fact::Attest { session: session? }),
        Action::Release => Some(Fact::Release {
            session: session?,
            path: subject?,
        }),
        Action::Credential => Some(Fact::Credential {
            session: session?,
            keyset: content?,
        }),
        _ => None,
    }
}

fn open(state: &Path) -> Store {
    let key: [u8; 32] = std::fs::read(state.join("storage.key"))
        .unwrap()
        .try_into()
        .unwrap();
    let issuer = SigningKey::read_file(&state.join("issuer.pem")).unwrap();
    Store::open(
        &database(state),
        StorageKey::new(key.into()),
        Arc::new(issuer),
        Arc::new(SystemRandom),
    )
    .unwrap()
}

/// Cuts a log before the last thing that somebody was told is done, and signs the new end.
pub(super) fn cut(connection: &Connection, issuer: &SigningKey) {
    let mut statement = connection
        .prepare("SELECT entry FROM log ORDER BY position DESC")
        .unwrap();
    let entries = statement.query_map([], |row| row.get::<_, Vec<u8>>(0));
    let size = entries
        .unwrap()
        .map(|bytes| Entry::decode(&bytes.unwrap()).unwrap())
        .find(|entry| fact(&entry.decision).is_some())
        .unwrap()
        .position;
    drop(statement);
    cut_log(connection, size, issuer);
}
