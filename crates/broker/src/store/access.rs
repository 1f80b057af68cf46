//! A path whose grants ask for API keys stays closed to everybody else until an administrator says otherwise.
//!
//! What is remembered outlives the resource: deleting a grant and storing another one opens nothing.

use casemate_release::api_key::Access;
use casemate_release::rcar::ResourcePath;
use rusqlite::Transaction;

use super::StoreError;

/// Refuses an open grant where the last one asked for API keys, unless `open` says that this is meant.
pub(super) fn check(
    tx: &Transaction<'_>,
    path: &ResourcePath,
    access: &Access,
    open: bool,
) -> Result<(), StoreError> {
    let closed: bool = tx.query_row(
        "SELECT EXISTS (SELECT 1 FROM keyed_path WHERE path = ?1)",
        [path.as_str()],
        |row| row.get(0),
    )?;
    match access {
        Access::Open if closed && !open => Err(StoreError::OpensAccess(path.clone())),
        Access::Keyed(_) if open => Err(StoreError::GrantNotOpen),
        _ => Ok(()),
    }
}

/// Remembers what the grant at this path says.
pub(super) fn set(
    tx: &Transaction<'_>,
    path: &ResourcePath,
    access: &Access,
) -> Result<(), StoreError> {
    let statement = match access {
        Access::Open => "DELETE FROM keyed_path WHERE path = ?1",
        Access::Keyed(_) => "INSERT INTO keyed_path (path) VALUES (?1) ON CONFLICT DO NOTHING",
    };
    tx.execute(statement, [path.as_str()])?;
    Ok(())
}
