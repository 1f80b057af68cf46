//! What an administrator may do, and see.

use std::sync::Arc;

use casemate_attest::{Policy, UnixTime};
use casemate_container::signing::VerifyingKey;
use casemate_release::grant;
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::VerifiedRollback;

use super::{Broker, Rejection};
use crate::log::{Anchor, Entry, Head};
use crate::store::{Store, StoreError, verify_offline};

/// What is listed of a resource; never its bytes.
#[derive(Debug, serde::Serialize)]
pub struct ResourceSummary {
    /// Its path.
    pub path: String,
    /// The name under which a service using it may be credentialed.
    pub service: String,
    /// The model that a key grant opens, in hex.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// The model's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// The lowest version that may be served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimum_version: Option<u64>,
    /// The provider that signed the grant, in hex.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
}

impl Broker {
    /// Puts a policy into force.
    ///
    /// # Errors
    /// [`Rejection::Policy`], [`StoreError::PolicyGoesBack`], [`StoreError::PolicyChanged`]; with a rollback also
    /// [`Rejection::NoProvider`], [`Rejection::Rollback`] and what [`Store::set_policy`] says.
    pub fn set_policy(
        &self,
        toml: &str,
        rollback: Option<&[u8]>,
    ) -> Result<Arc<Policy>, Rejection> {
        let policy = Arc::new(Policy::from_toml(toml)?);
        let mut inner = self.inner();
        let now = self.clock.now();
        let rollback = rollback
            .map(|envelope| {
                let provider = self.provider.ok_or(Rejection::NoProvider)?;
                self.verify_rollback(envelope, &provider, now)
            })
            .transpose()?;
        inner
            .store
            .set_policy(now, policy.version(), toml, rollback.as_ref())?;
        inner.policy = Some(policy.clone());
        Ok(policy)
    }

    /// Version and text of the policy in force.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn policy_text(&self) -> Result<Option<(u64, String)>, Rejection> {
        Ok(self.inner().store.policy()?)
    }

    /// Stores a resource. The service's name defaults to the path's tag.
    ///
    /// # Errors
    /// [`Rejection::Store`], [`Rejection::OtherProvider`], with a rollback also [`Rejection::Rollback`].
    pub fn put_resource(
        &self,
        path: &ResourcePath,
        bytes: &[u8],
        is_grant: bool,
        service: Option<&str>,
        rollback: Option<&[u8]>,
    ) -> Result<ResourceSummary, Rejection> {
        let service = service.unwrap_or(path.tag());
        let signer = match is_grant {
            true => Some(grant::inspect(bytes).map_err(StoreError::Grant)?.provider),
            false => None,
        };
        if let (Some(found), Some(expected)) = (signer, self.provider)
            && found != expected
        {
            return Err(Rejection::OtherProvider { found, expected });
        }
        let mut inner = self.inner();
        let now = self.clock.now();
        let rollback = rollback
            .map(|envelope| {
                let provider = signer.ok_or(StoreError::RollbackNotNeeded)?;
                self.verify_rollback(envelope, &provider, now)
            })
            .transpose()?;
        inner
            .store
            .put_resource(now, path, bytes, is_grant, service, rollback.as_ref())?;
        summarise(&inner.store, path)
    }

    /// All resources.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn resources(&self) -> Result<Vec<ResourceSummary>, Rejection> {
        let inner = self.inner();
        let paths = inner.store.resource_paths()?;
        paths
            .iter()
            .map(|path| summarise(&inner.store, path))
            .collect()
    }

    /// Deletes a resource.
    ///
    /// # Errors
    /// [`Rejection::NoResource`] or [`Rejection::Store`].
    pub fn delete_resource(&self, path: &ResourcePath) -> Result<(), Rejection> {
        if self.inner().store.delete_resource(self.clock.now(), path)? {
            return Ok(());
        }
        Err(Rejection::NoResource(path.clone()))
    }

    /// Log entries. Denials that were left out until now are counted in one first.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn entries(&self, from: u64, limit: u64) -> Result<Vec<Entry>, Rejection> {
        self.log_what_was_left_out()?;
        Ok(self.inner().store.entries(from, limit)?)
    }

    /// The end of the log.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn head(&self) -> Result<Head, Rejection> {
        Ok(self.inner().store.head()?)
    }

    /// Checks the whole log.
    ///
    /// # Errors
    /// [`StoreError::Log`] with the first fault.
    pub fn verify_log(&self, anchors: &[Anchor]) -> Result<Head, Rejection> {
        // Over a connection of its own: a long log does not hold up decisions.
        Ok(verify_offline(&self.database, &self.issuer(), anchors)?)
    }

    fn verify_rollback(
        &self,
        envelope: &[u8],
        provider: &VerifyingKey,
        now: UnixTime,
    ) -> Result<VerifiedRollback, Rejection> {
        VerifiedRollback::verify(envelope, provider, &self.issuer(), now.as_secs())
            .map_err(Rejection::Rollback)
    }
}

fn summarise(store: &Store, path: &ResourcePath) -> Result<ResourceSummary, Rejection> {
    let resource = store
        .resource(path)?
        .ok_or_else(|| Rejection::NoResource(path.clone()))?;
    let grant = resource.grant.as_ref();
    Ok(ResourceSummary {
        path: path.to_string(),
        service: resource.service.clone(),
        model_digest: grant.map(|grant| grant.model_digest.to_string()),
        model_name: grant.map(|grant| grant.model_name.clone()),
        minimum_version: grant.map(|grant| grant.minimum_version),
        provider: grant.map(|grant| grant.provider.to_string()),
    })
}
