//! What the broker keeps: policies, resources, the decision log; one SQLite file.
//!
//! Every change and every decision enters the log in the transaction that makes it, and a transaction is
//! on disk (WAL, `synchronous=FULL`) before its caller learns of it. Resources are encrypted under the
//! storage key, a separate file: a copy of the database alone gives no key away.
//!
//! What is decided, and when, is [`crate::broker`]'s business.

mod access;
mod schema;
mod versions;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use casemate_attest::UnixTime;
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::grant::{self, GrantSummary};
use casemate_release::random::Random;
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::{VerifiedRollback, sha256};
use casemate_release::{Malformed, ReleaseError};
use minicbor::{Decode, Encode};
use rusqlite::{
    Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};
use zeroize::{Zeroize, Zeroizing};

use crate::log::{
    Action, Anchor, ChainCheck, Decision, Digest, Entry, Head, LogFault, Verdict, hash,
};

/// Most bytes of a resource.
pub const MAX_RESOURCE_BYTES: usize = 32 * 1024;
const _: () = assert!(grant::MAX_GRANT_BYTES <= MAX_RESOURCE_BYTES);
/// Most resources.
pub const MAX_RESOURCES: u64 = 10_000;

const RESOURCE_DOMAIN: &str = "casemate broker resource v1";

/// Why the store cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite failed: disk full, file unreadable, not a database.
    #[error("database: {0}")]
    Database(#[from] rusqlite::Error),
    /// The file is of another version of this program.
    #[error("database schema version {found}, this program knows {known}; use the program that wrote it", known = schema::VERSION)]
    Schema {
        /// Version in the file.
        found: i64,
    },
    /// A stored row breaks its format.
    #[error("stored {0} is damaged")]
    Damaged(&'static str),
    /// The log's end does not verify.
    #[error("decision log: {0}")]
    Log(#[from] LogFault),
    /// A resource does not decrypt under the storage key.
    #[error("resource {0} does not decrypt under the storage key")]
    Sealed(String),
    /// The policy's version is below the one in force.
    #[error(
        "policy version {found} is below version {in_force}, which is in force; versions only go up, unless the \
         provider signs a step back (`casemate rollback policy`, then --rollback FILE)"
    )]
    PolicyGoesBack {
        /// Version offered.
        found: u64,
        /// Version in force.
        in_force: u64,
    },
    /// A version that had another text.
    #[error("policy version {0} is, or was, in force with another text; raise the version")]
    PolicyChanged(u64),
    /// The grant's minimum version is below one that was stored for this model and path.
    #[error(
        "the grant's minimum version {found} of model {name:?} is below {floor}, which was stored at this path; versions \
         only go up, unless the provider signs a step back (`casemate rollback model`, then --rollback FILE)"
    )]
    ModelGoesBack {
        /// The model.
        name: String,
        /// Version offered.
        found: u64,
        /// The highest that was stored.
        floor: u64,
    },
    /// The rollback permits another step.
    #[error("{0}")]
    Rollback(ReleaseError),
    /// The rollback has served.
    #[error("this rollback was used before; each permits one step, once")]
    RollbackUsed,
    /// The step does not go back.
    #[error(
        "this step does not go back, so it needs no rollback: leave --rollback out and keep the file unused"
    )]
    RollbackNotNeeded,
    /// A key grant that would be stored as other bytes.
    #[error("this is a key grant: store it with --grant, so that the policy's models apply to it")]
    GrantAsOpaque,
    /// An open grant where the last one listed API keys.
    #[error(
        "this grant lets anybody use the model, and the last one at {0} asked for API keys; make it with `casemate grant \
         --api-keys`, or put it with --open if anybody who reaches the enclave shall use the model"
    )]
    OpensAccess(ResourcePath),
    /// Told to open what the grant keeps closed.
    #[error(
        "this grant lists API keys, so it opens nothing: leave --open out, or make a grant with `casemate grant --open`"
    )]
    GrantNotOpen,
    /// A version SQLite cannot hold.
    #[error("policy version {0} is too large")]
    PolicyVersion(u64),
    /// Too many or too large resources.
    #[error("{0} exceeds its limit")]
    Limit(&'static str),
    /// A stored grant does not parse.
    #[error("key grant: {0}")]
    Grant(#[from] ReleaseError),
    /// The cryptographic library failed.
    #[error("cryptographic library: {0}")]
    Crypto(&'static str),
}

/// A secret that is to be stored.
#[derive(Clone, Copy)]
pub enum NewResource<'a, R = &'a [u8]> {
    /// A key grant.
    Grant {
        /// As the provider signed it.
        envelope: &'a [u8],
        /// The provider's permission to go back to exactly this grant: as it came, or verified.
        rollback: Option<R>,
        /// Whether it may let anybody in where the last grant asked for API keys.
        open: bool,
    },
    /// Any other secret; it is released under the policy's measurements alone.
    Opaque(&'a [u8]),
}

impl<'a, R> NewResource<'a, R> {
    /// A grant that neither goes back nor opens what was closed.
    pub fn grant(envelope: &'a [u8]) -> Self {
        Self::Grant {
            envelope,
            rollback: None,
            open: false,
        }
    }

    /// What is stored.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Grant { envelope, .. } => envelope,
            Self::Opaque(bytes) => bytes,
        }
    }
}

/// A secret that can be released.
pub struct Resource {
    /// What is released.
    pub bytes: Zeroizing<Vec<u8>>,
    /// The name under which a service using it may be credentialed.
    pub service: String,
    /// What kind of secret it is.
    pub kind: Kind,
}

/// Kinds of stored secrets.
pub enum Kind {
    /// A key grant, and what it says.
    Grant(GrantSummary),
    /// A key grant of the former form, which does not say who may use the model, and what it said. It is not released.
    FormerGrant(GrantSummary),
    /// Anything else.
    Opaque,
}

impl Kind {
    fn of(record: &Record) -> Result<Self, StoreError> {
        if !record.is_grant {
            return Ok(Self::Opaque);
        }
        match grant::inspect(&record.bytes) {
            Err(ReleaseError::Malformed(Malformed::FormerGrant)) => {
                Ok(Self::FormerGrant(grant::inspect_former(&record.bytes)?))
            }
            inspected => Ok(Self::Grant(inspected?)),
        }
    }
}

/// The storage key, 32 bytes, wiped when dropped.
pub struct StorageKey(Zeroizing<[u8; 32]>);

impl StorageKey {
    /// Takes the key from its bytes.
    pub fn new(bytes: Zeroizing<[u8; 32]>) -> Self {
        Self(bytes)
    }

    fn cipher(&self) -> Result<LessSafeKey, StoreError> {
        UnboundKey::new(&AES_256_GCM, &self.0[..])
            .map(LessSafeKey::new)
            .map_err(|_| StoreError::Crypto("AES-GCM key"))
    }
}

/// The database, its storage key and the issuer's key, which signs the log's head.
pub struct Store {
    connection: Connection,
    storage_key: StorageKey,
    issuer: Arc<SigningKey>,
    random: Arc<dyn Random>,
}

impl Store {
    /// Creates the database with its first log entry.
    ///
    /// # Errors
    /// [`StoreError::Database`] when the file exists or cannot be written.
    pub fn create(
        path: &Path,
        storage_key: StorageKey,
        issuer: Arc<SigningKey>,
        random: Arc<dyn Random>,
        now: UnixTime,
    ) -> Result<Self, StoreError> {
        let connection = schema::connect(path, OpenFlags::SQLITE_OPEN_CREATE)?;
        let mut store = Self {
            connection,
            storage_key,
            issuer,
            random,
        };
        let tx = store
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        schema::create(&tx)?;
        let mut begin = Decision::new(Action::Begin, Verdict::Administered);
        begin.content = Some((*store.issuer.verifying_key().as_bytes()).into());
        append(&tx, &Head::empty(), now, begin, &store.issuer)?;
        tx.commit()?;
        Ok(store)
    }

    /// Opens the database, brings it up to date, and checks head signature and last entry.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(
        path: &Path,
        storage_key: StorageKey,
        issuer: Arc<SigningKey>,
        random: Arc<dyn Random>,
    ) -> Result<Self, StoreError> {
        let connection = schema::connect(path, OpenFlags::empty())?;
        let version = schema::version(&connection)?;
        check_end(&connection, &issuer.verifying_key())?;
        let mut store = Self {
            connection,
            storage_key,
            issuer,
            random,
        };
        if version < schema::VERSION {
            store.upgrade(version)?;
        }
        Ok(store)
    }

    fn upgrade(&mut self, version: i64) -> Result<(), StoreError> {
        let mut grants = Vec::new();
        for path in self.resource_paths()? {
            // What a grant of the former form said holds for the next one at its place.
            match self.resource(&path)?.map(|resource| resource.kind) {
                Some(Kind::Grant(grant) | Kind::FormerGrant(grant)) => grants.push((path, grant)),
                Some(Kind::Opaque) | None => {}
            }
        }
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        schema::upgrade(&tx, version)?;
        for (path, grant) in grants {
            versions::set_floor(&tx, &path, &grant)?;
            access::set(&tx, &path, &grant.access)?;
        }
        tx.commit()?;
        Ok(())
    }

    /// Appends decisions and returns the new head once they are on disk.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing was appended.
    pub fn record(
        &mut self,
        now: UnixTime,
        decisions: impl IntoIterator<Item = Decision>,
    ) -> Result<Head, StoreError> {
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut head = read_head(&tx)?.0;
        for decision in decisions {
            head = append(&tx, &head, now, decision, &self.issuer)?;
        }
        tx.commit()?;
        Ok(head)
    }

    /// Stores a resource, replacing one of the same path.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Grant`] when the bytes are not a whole key grant, [`StoreError::ModelGoesBack`]
    /// without a rollback when its minimum version is below one that was stored, [`StoreError::OpensAccess`] when it
    /// opens unasked what was closed.
    pub fn put_resource(
        &mut self,
        now: UnixTime,
        path: &ResourcePath,
        service: &str,
        resource: NewResource<'_, &VerifiedRollback>,
    ) -> Result<Option<GrantSummary>, StoreError> {
        let bytes = resource.bytes();
        if bytes.len() > MAX_RESOURCE_BYTES {
            return Err(StoreError::Limit("resource size"));
        }
        let summary = match (&resource, grant::inspect(bytes)) {
            (NewResource::Grant { .. }, inspected) => Some(inspected?),
            (NewResource::Opaque(_), Ok(_)) => return Err(StoreError::GrantAsOpaque),
            (
                NewResource::Opaque(_),
                Err(former @ ReleaseError::Malformed(Malformed::FormerGrant)),
            ) => return Err(former.into()),
            (NewResource::Opaque(_), Err(_)) => None,
        };
        let record = Record {
            bytes: bytes.to_vec(),
            is_grant: summary.is_some(),
            service: service.into(),
        };
        let sealed = self.seal(path, &record)?;
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        // A full store still takes what replaces something, such as a grant that revokes keys.
        let count: i64 = tx.query_row(
            "SELECT count(*) FROM resource WHERE path <> ?1",
            [path.as_str()],
            |row| row.get(0),
        )?;
        if u64::try_from(count).unwrap_or(u64::MAX) >= MAX_RESOURCES {
            return Err(StoreError::Limit("number of resources"));
        }
        tx.execute(
            "INSERT INTO resource (path, sealed) VALUES (?1, ?2)
             ON CONFLICT (path) DO UPDATE SET sealed = excluded.sealed",
            params![path.as_str(), sealed],
        )?;
        let mut decision = Decision::new(Action::PutResource, Verdict::Administered);
        decision.subject = Some(path.as_str().into());
        decision.content = Some(sha256(bytes).into());
        decision.model = summary
            .as_ref()
            .map(|grant| (*grant.model_digest.as_bytes()).into());
        if let (Some(grant), NewResource::Grant { rollback, open, .. }) = (&summary, resource) {
            decision.access = Some((&grant.access).into());
            let back = versions::check_floor(&tx, path, grant, bytes, rollback)?;
            if let Some(rollback) = back {
                versions::use_up(&tx, now, rollback, &decision, &self.issuer)?;
            }
            versions::set_floor(&tx, path, grant)?;
            access::check(&tx, path, &grant.access, open)?;
            access::set(&tx, path, &grant.access)?;
        }
        let head = read_head(&tx)?.0;
        append(&tx, &head, now, decision, &self.issuer)?;
        tx.commit()?;
        Ok(summary)
    }

    /// Deletes a resource; false when there was none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn delete_resource(
        &mut self,
        now: UnixTime,
        path: &ResourcePath,
    ) -> Result<bool, StoreError> {
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        if tx.execute("DELETE FROM resource WHERE path = ?1", [path.as_str()])? == 0 {
            return Ok(false);
        }
        let mut decision = Decision::new(Action::DeleteResource, Verdict::Administered);
        decision.subject = Some(path.as_str().into());
        let head = read_head(&tx)?.0;
        append(&tx, &head, now, decision, &self.issuer)?;
        tx.commit()?;
        Ok(true)
    }

    /// Reads and decrypts a resource.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn resource(&self, path: &ResourcePath) -> Result<Option<Resource>, StoreError> {
        let sealed: Option<Vec<u8>> = self
            .connection
            .query_row(
                "SELECT sealed FROM resource WHERE path = ?1",
                [path.as_str()],
                |row| row.get(0),
            )
            .optional()?;
        sealed.map(|sealed| self.unseal(path, &sealed)).transpose()
    }

    /// Paths of all resources, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn resource_paths(&self) -> Result<Vec<ResourcePath>, StoreError> {
        let mut statement = self
            .connection
            .prepare("SELECT path FROM resource ORDER BY path")?;
        let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
        rows.map(|path| {
            path?
                .parse()
                .map_err(|_| StoreError::Damaged("resource path"))
        })
        .collect()
    }

    /// Paths of the grants of the former form, which must be made anew. What cannot be read is not among them: it is told
    /// when it is asked for.
    ///
    /// # Errors
    /// [`StoreError`], if there is no list of resources.
    pub fn former_grants(&self) -> Result<Vec<ResourcePath>, StoreError> {
        let mut paths = self.resource_paths()?;
        paths.retain(|path| {
            let kind = self
                .resource(path)
                .ok()
                .flatten()
                .map(|resource| resource.kind);
            matches!(kind, Some(Kind::FormerGrant(_)))
        });
        Ok(paths)
    }

    /// The end of the log.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn head(&self) -> Result<Head, StoreError> {
        Ok(read_head(&self.connection)?.0)
    }

    /// At most `limit` entries from `from` on.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn entries(&self, from: u64, limit: u64) -> Result<Vec<Entry>, StoreError> {
        let mut statement = self
            .connection
            .prepare("SELECT entry FROM log WHERE position >= ?1 ORDER BY position LIMIT ?2")?;
        let clamp = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let rows =
            statement.query_map([clamp(from), clamp(limit)], |row| row.get::<_, Vec<u8>>(0))?;
        rows.map(|bytes| Entry::decode(&bytes?).ok_or(StoreError::Damaged("log entry")))
            .collect()
    }

    fn seal(&self, path: &ResourcePath, record: &Record) -> Result<Vec<u8>, StoreError> {
        let mut plain = Zeroizing::new(Vec::with_capacity(MAX_RESOURCE_BYTES + 1024));
        minicbor::encode(record, &mut *plain).expect("writing to memory cannot fail");
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce)?;
        let tag = self
            .storage_key
            .cipher()?
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(aad(path)),
                &mut plain,
            )
            .map_err(|_| StoreError::Crypto("AES-GCM"))?;
        Ok([&nonce[..], &plain, tag.as_ref()].concat())
    }

    fn unseal(&self, path: &ResourcePath, sealed: &[u8]) -> Result<Resource, StoreError> {
        let damaged = || StoreError::Sealed(path.as_str().into());
        let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or_else(damaged)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| damaged())?;
        let mut body = Zeroizing::new(body.to_vec());
        let plain = self
            .storage_key
            .cipher()?
            .open_in_place(nonce, Aad::from(aad(path)), &mut body)
            .map_err(|_| damaged())?;
        let mut record: Record = minicbor::decode(plain).map_err(|_| damaged())?;
        Ok(Resource {
            kind: Kind::of(&record)?,
            bytes: Zeroizing::new(std::mem::take(&mut record.bytes)),
            service: std::mem::take(&mut record.service),
        })
    }
}

/// Checks the whole log of a database, whether or not a broker is serving it, under the issuer's public key.
///
/// # Errors
/// [`StoreError`].
pub fn verify_offline(
    path: &Path,
    issuer: &VerifyingKey,
    anchors: &[Anchor],
) -> Result<Head, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    schema::version(&connection)?;
    // One read transaction: a broker may be appending meanwhile.
    let tx = connection.unchecked_transaction()?;
    let mut check = ChainCheck::new(anchors);
    let mut statement = tx.prepare("SELECT position, entry, hash FROM log ORDER BY position")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let position: i64 = row.get(0)?;
        let entry: Vec<u8> = row.get(1)?;
        let stored: Vec<u8> = row.get(2)?;
        let stored: [u8; 32] = stored
            .try_into()
            .map_err(|_| StoreError::Damaged("log hash"))?;
        let position = u64::try_from(position).map_err(|_| StoreError::Damaged("log position"))?;
        check.next(position, &entry, Digest::from(stored))?;
    }
    let (head, signature) = read_head(&tx)?;
    Ok(check.finish(&head, &signature, issuer)?)
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Record {
    #[cbor(n(0), with = "minicbor::bytes")]
    bytes: Vec<u8>,
    #[n(1)]
    is_grant: bool,
    #[n(2)]
    service: String,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

fn read_head(connection: &Connection) -> Result<(Head, [u8; 64]), StoreError> {
    let (size, hash, signature): (i64, Vec<u8>, Vec<u8>) =
        connection.query_row("SELECT size, hash, signature FROM log_head", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
    let damaged = || StoreError::Damaged("log head");
    let hash: [u8; 32] = hash.try_into().map_err(|_| damaged())?;
    let head = Head {
        size: size.try_into().map_err(|_| damaged())?,
        hash: hash.into(),
    };
    Ok((head, signature.try_into().map_err(|_| damaged())?))
}

fn append(
    tx: &Transaction<'_>,
    head: &Head,
    now: UnixTime,
    decision: Decision,
    issuer: &SigningKey,
) -> Result<Head, StoreError> {
    let encoded = Entry::after(head, now.as_secs(), decision).encode();
    let entry_hash = hash(&encoded);
    let next = Head {
        size: head.size + 1,
        hash: entry_hash,
    };
    let row = |value: u64| i64::try_from(value).map_err(|_| StoreError::Limit("log size"));
    tx.execute(
        "INSERT INTO log (position, entry, hash) VALUES (?1, ?2, ?3)",
        params![row(head.size)?, encoded, entry_hash.bytes()],
    )?;
    tx.execute(
        "INSERT INTO log_head (one, size, hash, signature) VALUES (1, ?1, ?2, ?3)
         ON CONFLICT (one) DO UPDATE
         SET size = excluded.size, hash = excluded.hash, signature = excluded.signature",
        params![row(next.size)?, next.hash.bytes(), next.sign(issuer)],
    )?;
    Ok(next)
}

/// Checks head signature and last entry: what start-up can afford however long the log is.
fn check_end(connection: &Connection, issuer: &VerifyingKey) -> Result<(), StoreError> {
    let (head, signature) = read_head(connection)?;
    if !head.is_signed_by(issuer, &signature) {
        return Err(LogFault::HeadSignature.into());
    }
    let last: Option<(i64, Vec<u8>)> = connection
        .query_row(
            "SELECT position, entry FROM log ORDER BY position DESC LIMIT 1",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let found = last
        .as_ref()
        .map_or(0, |(position, _)| position.unsigned_abs() + 1);
    let ends_there = last.is_some_and(|(_, entry)| hash(&entry) == head.hash);
    if found != head.size || !ends_there {
        return Err(LogFault::OtherHead {
            found,
            signed: head.size,
        }
        .into());
    }
    Ok(())
}

fn aad(path: &ResourcePath) -> Vec<u8> {
    [RESOURCE_DOMAIN.as_bytes(), b"\0", path.as_str().as_bytes()].concat()
}

fn time_to_row(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}
