//! Versions only go up: of the policy, and of each model at each path. A step back needs the provider's rollback, once.

use casemate_attest::UnixTime;
use casemate_container::signing::SigningKey;
use casemate_release::grant::GrantSummary;
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::{Target, VerifiedRollback, sha256};
use rusqlite::{OptionalExtension, Transaction, TransactionBehavior, params};

use super::{Store, StoreError, append, read_head, time_to_row};
use crate::log::{Action, Decision, Verdict};

const FLOOR_DOMAIN: &[u8] = b"casemate broker model floor v1\0";

impl Store {
    /// The policy in force: version and text.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn policy(&self) -> Result<Option<(u64, String)>, StoreError> {
        policy(&self.connection)
    }

    /// Puts a policy into force; the same version with the same text changes nothing.
    ///
    /// # Errors
    /// [`StoreError::PolicyGoesBack`] without a rollback for this step, [`StoreError::PolicyChanged`], or
    /// [`StoreError::Rollback`], [`StoreError::RollbackUsed`], [`StoreError::RollbackNotNeeded`].
    pub fn set_policy(
        &mut self,
        now: UnixTime,
        version: u64,
        toml: &str,
        rollback: Option<&VerifiedRollback>,
    ) -> Result<(), StoreError> {
        let row_version = i64::try_from(version).map_err(|_| StoreError::PolicyVersion(version))?;
        let tx = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let in_force = policy(&tx)?;
        let other_text: bool = tx.query_row(
            "SELECT EXISTS (SELECT 1 FROM policy WHERE version = ?1 AND toml <> ?2)",
            params![row_version, toml],
            |row| row.get(0),
        )?;
        if other_text {
            return Err(StoreError::PolicyChanged(version));
        }
        let mut decision = Decision::new(Action::SetPolicy, Verdict::Administered);
        decision.policy_version = Some(version);
        decision.content = Some(sha256(toml.as_bytes()).into());
        match (in_force, rollback) {
            (Some((in_force, _)), Some(rollback)) if version < in_force => {
                rollback
                    .check_step(&Target::Policy, in_force, version, toml.as_bytes())
                    .map_err(StoreError::Rollback)?;
                use_up(&tx, now, rollback, &decision, &self.issuer)?;
            }
            (_, Some(_)) => return Err(StoreError::RollbackNotNeeded),
            (Some((in_force, _)), None) if version < in_force => {
                return Err(StoreError::PolicyGoesBack {
                    found: version,
                    in_force,
                });
            }
            (Some((in_force, _)), None) if version == in_force => return Ok(()),
            (_, None) => {}
        }
        tx.execute(
            "INSERT INTO policy (version, toml, set_at) VALUES (?1, ?2, ?3)",
            params![row_version, toml, time_to_row(now)],
        )?;
        let head = read_head(&tx)?.0;
        append(&tx, &head, now, decision, &self.issuer)?;
        tx.commit()?;
        Ok(())
    }
}

fn policy(connection: &rusqlite::Connection) -> Result<Option<(u64, String)>, StoreError> {
    let row = connection
        .query_row(
            "SELECT version, toml FROM policy ORDER BY sequence DESC LIMIT 1",
            [],
            |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)),
        )
        .optional()?;
    row.map(|(version, toml)| {
        let version = u64::try_from(version).map_err(|_| StoreError::Damaged("policy"))?;
        Ok((version, toml))
    })
    .transpose()
}

/// Compares a grant's minimum version with the model's floor. A lower one needs a rollback for exactly this grant, which is
/// returned to be used up.
///
/// The floor outlives the resource: deleting and storing again is no way back. It is kept for each provider, because
/// whoever can store a grant can store one that somebody else signed, which the enclave will refuse.
pub(super) fn check_floor<'a>(
    tx: &Transaction<'_>,
    path: &ResourcePath,
    grant: &GrantSummary,
    envelope: &[u8],
    rollback: Option<&'a VerifiedRollback>,
) -> Result<Option<&'a VerifiedRollback>, StoreError> {
    let version = grant.minimum_version;
    let floor: Option<i64> = tx
        .query_row(
            "SELECT version FROM model_floor WHERE scope = ?1",
            [scope(path, grant)],
            |row| row.get(0),
        )
        .optional()?;
    let floor = floor
        .map(u64::try_from)
        .transpose()
        .map_err(|_| StoreError::Damaged("model floor"))?;
    match (floor, rollback) {
        (Some(floor), Some(rollback)) if version < floor => {
            let target = Target::Model {
                path: path.clone(),
                name: grant.model_name.clone(),
            };
            rollback
                .check_step(&target, floor, version, envelope)
                .map_err(StoreError::Rollback)?;
            Ok(Some(rollback))
        }
        (_, Some(_)) => Err(StoreError::RollbackNotNeeded),
        (Some(floor), None) if version < floor => Err(StoreError::ModelGoesBack {
            name: grant.model_name.clone(),
            found: version,
            floor,
        }),
        (_, None) => Ok(None),
    }
}

/// Makes a grant's minimum version the model's floor.
pub(super) fn set_floor(
    tx: &Transaction<'_>,
    path: &ResourcePath,
    grant: &GrantSummary,
) -> Result<(), StoreError> {
    let version =
        i64::try_from(grant.minimum_version).map_err(|_| StoreError::Limit("model version"))?;
    tx.execute(
        "INSERT INTO model_floor (scope, version) VALUES (?1, ?2)
         ON CONFLICT (scope) DO UPDATE SET version = excluded.version",
        params![scope(path, grant), version],
    )?;
    Ok(())
}

/// Remembers a rollback for ever and logs it, as part of the step that it permits.
pub(super) fn use_up(
    tx: &Transaction<'_>,
    now: UnixTime,
    rollback: &VerifiedRollback,
    step: &Decision,
    issuer: &SigningKey,
) -> Result<(), StoreError> {
    let added = tx.execute(
        "INSERT INTO used_rollback (digest, used_at) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        params![rollback.digest(), time_to_row(now)],
    )?;
    if added == 0 {
        return Err(StoreError::RollbackUsed);
    }
    let mut decision = Decision::new(Action::Rollback, Verdict::Administered);
    decision.policy_version = step.policy_version;
    decision.subject = step.subject.clone();
    decision.model = step.model;
    decision.content = Some((*rollback.digest()).into());
    decision.expires_at = Some(rollback.claims().expires_at);
    let head = read_head(tx)?.0;
    append(tx, &head, now, decision, issuer)?;
    Ok(())
}

/// Model names are kept as digests: a copy of the database shows fewer of them.
fn scope(path: &ResourcePath, grant: &GrantSummary) -> [u8; 32] {
    // Neither a path nor a name holds a zero byte.
    let provider = grant.provider.as_bytes();
    sha256(
        &[
            FLOOR_DOMAIN,
            provider,
            path.as_str().as_bytes(),
            b"\0",
            grant.model_name.as_bytes(),
        ]
        .concat(),
    )
}
