//! What an administrator may do, and see.

use std::sync::Arc;

use casemate_attest::{Denial, Policy, UnixTime};
use casemate_container::signing::VerifyingKey;
use casemate_release::grant;
use casemate_release::rcar::ResourcePath;
use casemate_release::rollback::{VerifiedRollback, sha256};

use super::judgement::former_grant_remedy;
use super::{Broker, Rejection};
use crate::log::{Access, Action, Anchor, Decision, Entry, Head, LoggedDenial, Verdict};
use crate::store::{Kind, NewResource, Store, StoreError, verify_offline};

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
    /// Who may use the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<Access>,
    /// How many API keys the grant lists, where it lists any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<usize>,
    /// What to do where this is not released any more: a grant of the former form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
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
    /// [`Rejection::Store`], [`Rejection::OtherProvider`], with a rollback also [`Rejection::Rollback`]. That a grant
    /// would open what was closed ([`StoreError::OpensAccess`]) is logged.
    pub fn put_resource(
        &self,
        path: &ResourcePath,
        service: Option<&str>,
        resource: NewResource<'_>,
    ) -> Result<ResourceSummary, Rejection> {
        let service = service.unwrap_or(path.tag());
        let (envelope, rollback, open) = match resource {
            NewResource::Opaque(bytes) => {
                let mut inner = self.inner();
                let now = self.clock.now();
                let resource = NewResource::Opaque(bytes);
                inner.store.put_resource(now, path, service, resource)?;
                return summarise(&inner.store, path);
            }
            NewResource::Grant {
                envelope,
                rollback,
                open,
            } => (envelope, rollback, open),
        };
        let grant = grant::inspect(envelope).map_err(StoreError::Grant)?;
        let found = grant.provider;
        if let Some(expected) = self.provider.filter(|expected| *expected != found) {
            return Err(Rejection::OtherProvider { found, expected });
        }
        let mut inner = self.inner();
        let now = self.clock.now();
        let rollback = rollback
            .map(|rollback| self.verify_rollback(rollback, &found, now))
            .transpose()?;
        let resource = NewResource::Grant {
            envelope,
            rollback: rollback.as_ref(),
            open,
        };
        match inner.store.put_resource(now, path, service, resource) {
            Ok(_) => summarise(&inner.store, path),
            Err(StoreError::OpensAccess(path)) => {
                let denial = opens_access();
                let decision = Decision {
                    subject: Some(path.as_str().into()),
                    model: Some((*grant.model_digest.as_bytes()).into()),
                    content: Some(sha256(envelope).into()),
                    access: Some((&grant.access).into()),
                    denial: Some(LoggedDenial::from(&denial)),
                    ..Decision::new(Action::PutResource, Verdict::Denied)
                };
                self.record(&mut inner, now, decision)?;
                Err(StoreError::OpensAccess(path).into())
            }
            Err(error) => Err(error.into()),
        }
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

    /// Logs which grants are not released any more, and what to do about each.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn warn_of_former_grants(&self) -> Result<(), Rejection> {
        for path in self.inner().store.former_grants()? {
            let remedy = former_grant_remedy(&path);
            tracing::warn!(
                %path,
                "a grant of the former form, which does not say who may use the model, is kept and not released: {remedy}"
            );
        }
        Ok(())
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

/// The denial that is logged for a grant that would open what was closed.
fn opens_access() -> Denial {
    Denial::refused(
        "grant.access",
        "open to anybody",
        "API keys, as the last grant at this path lists them",
        "make the grant with `casemate grant --api-keys`; if anybody shall use the model, put it with --open",
    )
}

fn summarise(store: &Store, path: &ResourcePath) -> Result<ResourceSummary, Rejection> {
    let resource = store
        .resource(path)?
        .ok_or_else(|| Rejection::NoResource(path.clone()))?;
    // Of a grant of the former form, what holds for the next one at its place; it does not say who may use the model.
    let (grant, access, remedy) = match &resource.kind {
        Kind::Grant(grant) => (Some(grant), Some(&grant.access), None),
        Kind::FormerGrant(grant) => (Some(grant), None, Some(former_grant_remedy(path))),
        Kind::Opaque => (None, None, None),
    };
    Ok(ResourceSummary {
        path: path.to_string(),
        service: resource.service.clone(),
        model_digest: grant.map(|grant| grant.model_digest.to_string()),
        model_name: grant.map(|grant| grant.model_name.clone()),
        minimum_version: grant.map(|grant| grant.minimum_version),
        provider: grant.map(|grant| grant.provider.to_string()),
        access: access.map(Into::into),
        api_keys: access.and_then(|access| Some(access.api_keys()?.as_slice().len())),
        remedy,
    })
}
