//! What a guest must show for a release and for a credential. Nothing here logs, locks or answers.

use casemate_attest::{Denial, Policy, UnixTime, appraise};
use casemate_channel::keyset::Keyset;
use casemate_container::ModelDigest;
use casemate_release::credential::CLOCK_SKEW_SECONDS;
use casemate_release::issuance::CredentialRequest;
use casemate_release::rcar::ResourcePath;
use casemate_release::received::Received;
use casemate_release::rollback::sha256;

use super::{Rejection, verdict};
use crate::log::Decision;
use crate::sessions::{Attested, Released, SessionFault};
use crate::store::{Kind, Resource, Store, StoreError};

/// Why a request is not allowed, or could not be judged.
pub(super) enum Refusal {
    /// The evidence was not accepted.
    Evidence(Denial),
    /// The evidence was accepted once, but this is not allowed now.
    NotAllowed(Denial),
    /// No such resource.
    NoResource(ResourcePath),
    /// No judgement was reached.
    Failed(Rejection),
}

impl From<Denial> for Refusal {
    fn from(denial: Denial) -> Self {
        Self::NotAllowed(denial)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

/// The resource that may be released to this guest now. What is learned on the way goes into the decision, also of a
/// refusal.
pub(super) fn release(
    store: &Store,
    policy: &Policy,
    attested: &Attested,
    path: &ResourcePath,
    now: UnixTime,
    decision: &mut Decision,
) -> Result<Resource, Refusal> {
    let appraised = appraise(&attested.evidence, &attested.report_data, policy, now).outcome?;
    decision.measurement = Some(appraised.claims().measurement_name.clone());
    let resource = store
        .resource(path)?
        .ok_or_else(|| Refusal::NoResource(path.clone()))?;
    match &resource.kind {
        Kind::Grant(grant) => {
            decision.model = Some((*grant.model_digest.as_bytes()).into());
            key_is_allowed(policy, &grant.model_digest)?;
        }
        Kind::FormerGrant(grant) => {
            decision.model = Some((*grant.model_digest.as_bytes()).into());
            return Err(former_grant(path).into());
        }
        Kind::Opaque => {}
    }
    decision.verdict = verdict(&appraised);
    Ok(resource)
}

/// The denial that is logged for a path at which nothing is stored.
pub(super) fn no_resource(path: &ResourcePath) -> Denial {
    Denial::refused(
        "resource",
        path.as_str(),
        "a stored resource",
        "store it with `casemate-broker admin resource put`, or correct the path",
    )
}

/// The denial for a grant that does not say who may use its model.
fn former_grant(path: &ResourcePath) -> Denial {
    Denial::refused(
        "grant.former",
        format!(
            "{path} holds a grant of the former form, which does not say who may use the model"
        ),
        "a grant that says who may use the model",
        former_grant_remedy(path),
    )
}

/// What to do about a grant of the former form.
pub(super) fn former_grant_remedy(path: &ResourcePath) -> String {
    format!(
        "make it anew with `casemate grant --api-keys LIST` or `casemate grant --open`, and put it with `casemate-broker \
         admin resource put {path} --grant FILE`"
    )
}

/// A grant that was replaced or deleted since its release vouches for nothing any more.
fn still_stored(store: &Store, released: &Released) -> Result<(), Refusal> {
    let stored = store.resource(&released.path)?;
    let same = stored.is_some_and(|stored| {
        sha256(&stored.bytes) == released.content && stored.service == released.service
    });
    if same {
        return Ok(());
    }
    Err(Refusal::NotAllowed(Denial::refused(
        "resource",
        format!(
            "{} was replaced or deleted after its release",
            released.path
        ),
        "the grant that was released in this session",
        "attest again and ask for the resource as it is now",
    )))
}

/// A grant names what its key opens, and not whether that is a model or an adapter: that is in the sealed file. Which of
/// the two it may be used as is compared with the keyset.
fn key_is_allowed(policy: &Policy, digest: &ModelDigest) -> Result<(), Denial> {
    match policy.model()?.adapters.contains(digest.as_bytes()) {
        true => Ok(()),
        false => model_is_allowed(policy, digest),
    }
}

/// Each adapter of a keyset is allowed, its key was released in this session, and its grant still stands.
fn adapters_are_allowed(
    store: &Store,
    policy: &Policy,
    keyset: &Keyset,
    received: &[&Released],
) -> Result<(), Refusal> {
    for adapter in &keyset.adapter_digests {
        let digest = ModelDigest(*adapter);
        if !policy.model()?.adapters.contains(adapter) {
            return Err(Refusal::NotAllowed(Denial::refused(
                "keyset.adapter",
                digest.to_string(),
                "a digest listed under [model] adapters",
                "if this adapter may be applied, add its digest to the policy and raise the policy's version",
            )));
        }
        let Some(grant) = received.iter().find(|r| r.model_digest == digest) else {
            return Err(Refusal::NotAllowed(Denial::refused(
                "keyset.adapter",
                digest.to_string(),
                "adapters whose keys were released in this session",
                "receive the adapter's key in the session in which the credential is asked for",
            )));
        };
        still_stored(store, grant)?;
    }
    Ok(())
}

fn model_is_allowed(policy: &Policy, digest: &ModelDigest) -> Result<(), Denial> {
    let model = policy.model()?;
    if model.digests.contains(digest.as_bytes()) {
        return Ok(());
    }
    Err(Denial::refused(
        "model.digest",
        digest.to_string(),
        "a digest listed under [model] digests",
        "if this model may be served, add its digest to the policy and raise the policy's version; an adapter's goes under \
         [model] adapters",
    ))
}

/// What a keyset must say to be credentialed in a session that received these keys.
pub(super) fn keyset(
    store: &Store,
    request: &CredentialRequest,
    keyset: &Keyset,
    released: &[Released],
    policy: &Policy,
    now: UnixTime,
) -> Result<(), Refusal> {
    let received = request.received.iter().map(|r| as_released(r, released));
    let received = received.collect::<Result<Vec<_>, _>>()?;
    let Some((model, adapters)) = received.split_first() else {
        return Err(Refusal::Failed(SessionFault::NothingReleased.into()));
    };
    still_stored(store, model)?;
    model_keyset(request, keyset, model, policy, now)?;
    adapters_are_allowed(store, policy, keyset, adapters)
}

/// What was released as the resource that the enclave names, if that is what it received. The enclave asks by name, but who
/// passes its requests on can ask for something else: for a grant of the same model, say, that lets in others.
fn as_released<'a>(received: &Received, released: &'a [Released]) -> Result<&'a Released, Denial> {
    let of_that_name = released.iter().find(|r| r.path == received.path);
    let found = match of_that_name {
        Some(released) if released.content == received.sha256 => return Ok(released),
        Some(_) => format!("something else was received as {}", received.path),
        None => format!("{} was not released in this session", received.path),
    };
    Err(Denial::refused(
        "received",
        found,
        "what was released in this session, each under its own name",
        "start the enclave again; if it stays so, look for who exchanges the broker's answers between here and the enclave",
    ))
}

fn model_keyset(
    request: &CredentialRequest,
    keyset: &Keyset,
    released: &Released,
    policy: &Policy,
    now: UnixTime,
) -> Result<(), Denial> {
    if request.service != released.service {
        return Err(Denial::refused(
            "service",
            request.service.clone(),
            released.service.clone(),
            "name the service as the resource does (`admin resource put --service`)",
        ));
    }
    let digest = ModelDigest(keyset.model_digest);
    if digest != released.model_digest {
        return Err(Denial::refused(
            "keyset.model_digest",
            digest.to_string(),
            released.model_digest.to_string(),
            "serve the model whose key was released in this session",
        ));
    }
    model_is_allowed(policy, &digest)?;
    let minimum = released
        .minimum_version
        .max(policy.model()?.minimum_version);
    if keyset.model_version < minimum {
        return Err(Denial::refused(
            "keyset.model_version",
            keyset.model_version.to_string(),
            format!("at least {minimum}"),
            "serve a newer version of the model",
        ));
    }
    if keyset.policy_version != released.policy_version {
        return Err(Denial::refused(
            "keyset.policy_version",
            keyset.policy_version.to_string(),
            released.policy_version.to_string(),
            "name the policy version in the attestation token; if it changed meanwhile, attest again",
        ));
    }
    let now = now.as_secs();
    if keyset.not_before > now.saturating_add(CLOCK_SKEW_SECONDS) || keyset.expires_at <= now {
        return Err(Denial::refused(
            "keyset.validity",
            format!("{} to {}", keyset.not_before, keyset.expires_at),
            format!("an interval that contains {now}"),
            "make a fresh keyset; compare the clocks of enclave and broker",
        ));
    }
    Ok(())
}
