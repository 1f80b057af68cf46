//! The tables, how the file is opened, and how files of earlier versions are brought up to date.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, params};

use super::StoreError;

/// The version that this program writes.
pub(super) const VERSION: i64 = 3;
/// Versions whose log this program can check without changing the file.
const CHECKABLE: std::ops::RangeInclusive<i64> = 1..=VERSION;

/// The policy in force is the one of the highest sequence. A version has one text for ever.
const VERSIONS: &str = "
    CREATE TABLE policy (
        sequence INTEGER PRIMARY KEY, version INTEGER NOT NULL, toml TEXT NOT NULL, set_at INTEGER NOT NULL) STRICT;
    CREATE TABLE model_floor (scope BLOB PRIMARY KEY, version INTEGER NOT NULL) STRICT;
    CREATE TABLE used_rollback (digest BLOB PRIMARY KEY, used_at INTEGER NOT NULL) STRICT;
";
/// The paths whose last grant asked for API keys.
const ACCESS: &str = "CREATE TABLE keyed_path (path TEXT PRIMARY KEY) STRICT;";
const RESOURCES_AND_LOG: &str = "
    CREATE TABLE resource (path TEXT PRIMARY KEY, sealed BLOB NOT NULL) STRICT;
    CREATE TABLE log (position INTEGER PRIMARY KEY, entry BLOB NOT NULL, hash BLOB NOT NULL) STRICT;
    CREATE TABLE log_head (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        size INTEGER NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL) STRICT;
";

/// Opens the file so that a committed transaction is on disk.
pub(super) fn connect(path: &Path, extra: OpenFlags) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | extra;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // Deleted and replaced resources are overwritten, not merely unlinked.
    connection.pragma_update(None, "secure_delete", true)?;
    Ok(connection)
}

/// Makes the tables of an empty file.
pub(super) fn create(tx: &Transaction<'_>) -> Result<(), StoreError> {
    tx.execute_batch(VERSIONS)?;
    tx.execute_batch(ACCESS)?;
    tx.execute_batch(RESOURCES_AND_LOG)?;
    Ok(tx.pragma_update(None, "user_version", VERSION)?)
}

/// Version 1 had one row for each policy version, the highest in force, and knew no rollbacks; version 2 did not remember
/// who was let in. What the stored grants say of both is for the caller to enter.
pub(super) fn upgrade(tx: &Transaction<'_>, from: i64) -> Result<(), StoreError> {
    if from < 2 {
        tx.execute("ALTER TABLE policy RENAME TO policy_1", [])?;
        tx.execute_batch(VERSIONS)?;
        tx.execute(
            "INSERT INTO policy (version, toml, set_at) SELECT version, toml, set_at FROM policy_1 ORDER BY version",
            params![],
        )?;
        tx.execute("DROP TABLE policy_1", [])?;
    }
    tx.execute_batch(ACCESS)?;
    Ok(tx.pragma_update(None, "user_version", VERSION)?)
}

/// The file's version, if this program can use it.
pub(super) fn version(connection: &Connection) -> Result<i64, StoreError> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if CHECKABLE.contains(&found) {
        return Ok(found);
    }
    Err(StoreError::Schema { found })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a power cut may take is decided here, and no test can cut the power.
    #[test]
    fn a_commit_is_synced_before_it_is_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        let connection = connect(&path, OpenFlags::SQLITE_OPEN_CREATE).unwrap();
        let pragma = |name: &str| -> String {
            connection
                .pragma_query_value(None, name, |row| {
                    row.get::<_, rusqlite::types::Value>(0)
                        .map(|value| format!("{value:?}"))
                })
                .unwrap()
        };
        assert_eq!(pragma("synchronous"), "Integer(2)", "2 is FULL");
        assert_eq!(pragma("journal_mode"), "Text(\"wal\")");
        assert_eq!(pragma("secure_delete"), "Integer(1)");
    }
}
