//! The decisions: challenge, appraisal, release of resources, issuance of credentials. No HTTP, no files.
//!
//! Every allowed and every denied request with a session is a log entry, and the entry is on disk before
//! the caller gets its answer. Whatever releases a secret or signs a credential does so with the policy
//! locked: a policy that came into force before is the one that is applied.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use casemate_attest::{
    Appraised, Denial, Evidence, Policy, PolicyError, ReportData, UnixTime, appraise,
};
use casemate_channel::keyset::{
    ChannelBinding, Keyset, KeysetDigest, KeysetError, Purpose, Role, report_data,
};
use casemate_container::ModelDigest;
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::ReleaseError;
use casemate_release::credential::{CLOCK_SKEW_SECONDS, Credential, MAX_LIFETIME_SECONDS};
use casemate_release::issuance::{CredentialRequest, CredentialResponse, IssuanceChallenge};
use casemate_release::jwe::{Jwe, PublicKey};
use casemate_release::random::Random;
use casemate_release::rcar::{
    AttestResponse, Attestation, Challenge, HashAlgorithm, NONCE_BYTES, Request, ResourcePath,
    tee_name,
};

use crate::clock::Clock;
use crate::log::{Action, Anchor, Decision, Entry, Head, LoggedDenial, Verdict};
use crate::metrics::Metrics;
use crate::sessions::{Attested, Released, SessionFault, SessionLimits, Sessions, session_digest};
use crate::state::State;
use crate::store::{Store, StoreError, verify_offline};
use crate::token::{TokenClaims, TokenKey};

/// What an operator may set.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Sessions.
    pub sessions: SessionLimits,
    /// Life of a deployment credential, at most an hour.
    pub credential_life: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sessions: SessionLimits::default(),
            credential_life: Duration::from_secs(900),
        }
    }
}

/// Why a request was not answered as asked.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    /// The request is not what the protocol allows.
    #[error(transparent)]
    Malformed(#[from] ReleaseError),
    /// The keyset is not what its format allows.
    #[error("keyset: {0}")]
    Keyset(#[from] KeysetError),
    /// There is no session that could do this.
    #[error(transparent)]
    Session(#[from] SessionFault),
    /// The evidence was not accepted.
    #[error("evidence denied: {} is {}, expected {}", .0.claim, .0.found, .0.expected)]
    Evidence(Denial),
    /// The evidence was accepted once, but the policy does not allow this now.
    #[error("not allowed: {} is {}, expected {}", .0.claim, .0.found, .0.expected)]
    NotAllowed(Denial),
    /// No such resource.
    #[error("there is no resource {0}")]
    NoResource(ResourcePath),
    /// No policy is in force, so nothing can be accepted.
    #[error("no policy is in force; set one with `casemate-broker admin policy set`")]
    NoPolicy,
    /// The policy offered cannot be read.
    #[error("policy: {0}")]
    Policy(#[from] PolicyError),
    /// The store failed; nothing was released.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The broker: state in, decisions out. Shared between threads.
pub struct Broker {
    inner: Mutex<Inner>,
    sessions: Mutex<Sessions>,
    issuer: Arc<SigningKey>,
    token: TokenKey,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    settings: Settings,
    metrics: Metrics,
    database: PathBuf,
    /// Keeps a second broker off the state directory.
    _lock: std::fs::File,
}

struct Inner {
    store: Store,
    policy: Option<Arc<Policy>>,
}

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
    /// Takes over an opened state.
    ///
    /// # Errors
    /// [`Rejection::Policy`] when the stored policy cannot be read by this version of the program.
    pub fn new(
        state: State,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        settings: Settings,
    ) -> Result<Self, Rejection> {
        let State {
            issuer,
            token,
            store,
            database,
            lock,
        } = state;
        let policy = match store.policy()? {
            Some((_, toml)) => Some(Arc::new(Policy::from_toml(&toml)?)),
            None => None,
        };
        Ok(Self {
            inner: Mutex::new(Inner { store, policy }),
            sessions: Mutex::new(Sessions::new(settings.sessions)),
            issuer,
            token,
            clock,
            random,
            settings,
            metrics: Metrics::default(),
            database,
            _lock: lock,
        })
    }

    /// Public key of the issuer.
    pub fn issuer(&self) -> VerifyingKey {
        self.issuer.verifying_key()
    }

    /// Public key under which tokens are signed, as a JWK.
    pub fn token_jwk(&self) -> serde_json::Value {
        self.token.public_jwk()
    }

    /// Counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Number of sessions waiting for evidence, and with accepted evidence.
    pub fn session_counts(&self) -> (usize, usize) {
        self.sessions().counts()
    }

    /// The policy in force.
    pub fn policy(&self) -> Option<Arc<Policy>> {
        self.inner().policy.clone()
    }

    /// `POST /kbs/v0/auth`: opens a session and returns its identifier and the challenge.
    ///
    /// # Errors
    /// [`Rejection::Malformed`], [`Rejection::NoPolicy`], or [`SessionFault::Full`].
    pub fn auth(&self, body: &[u8]) -> Result<(String, Challenge), Rejection> {
        let (_, tee) = Request::parse(body)?;
        if self.inner().policy.is_none() {
            return Err(Rejection::NoPolicy);
        }
        let mut id = [0u8; 32];
        self.random.fill(&mut id)?;
        let mut nonce = [0u8; NONCE_BYTES];
        self.random.fill(&mut nonce)?;
        let id = hex::encode(id);
        let challenge = Challenge::new(&nonce);
        self.sessions()
            .begin(&id, tee, challenge.nonce.clone(), self.clock.now())?;
        Ok((id, challenge))
    }

    /// `POST /kbs/v0/attest`: appraises evidence over the session's nonce and the guest's key.
    ///
    /// # Errors
    /// [`Rejection`]; the nonce is used up whatever the outcome.
    pub fn attest(&self, session: &str, body: &[u8]) -> Result<AttestResponse, Rejection> {
        let now = self.clock.now();
        let pending = self.sessions().take_pending(session, now)?;
        let (attestation, evidence) = Attestation::parse(body, pending.tee)?;
        let runtime_data = &attestation.runtime_data;
        let recipient = PublicKey::from_jwk(&runtime_data.tee_pubkey)?;
        let additional = &attestation.tee_evidence.additional_evidence;
        let report_data = runtime_data.report_data(HashAlgorithm::Sha384, additional);

        let mut decision = Decision::new(Action::Attest, Verdict::Denied);
        decision.session = Some(session_digest(session).into());
        decision.evidence = Some(evidence.digest().into());
        // The appraisal runs without the lock: anybody can send evidence here, and nothing is released.
        let policy = self.inner().policy.clone().ok_or(Rejection::NoPolicy)?;
        decision.policy_version = Some(policy.version());
        let outcome = if runtime_data.nonce == pending.nonce {
            appraise(&evidence, &report_data, &policy, now).outcome
        } else {
            Err(Denial::not_genuine(
                "nonce",
                "another value",
                "the nonce of this session's challenge",
                "begin again with POST /kbs/v0/auth and use its nonce",
            ))
        };
        let appraised = match outcome {
            Ok(appraised) => appraised,
            Err(denial) => return Err(self.deny(now, decision, denial, Rejection::Evidence)?),
        };
        decision.verdict = verdict(&appraised);
        decision.measurement = Some(appraised.claims().measurement_name.clone());
        let expires_at = now.saturating_add(self.settings.sessions.session_life);
        decision.expires_at = Some(expires_at.as_secs());
        self.record(now, decision)?;
        let attested = Attested {
            evidence,
            report_data,
            recipient,
        };
        self.sessions().accept(session, attested, now)?;
        let token = self.token.sign(&TokenClaims {
            issuer: &self.issuer().to_string(),
            issued_at: now.as_secs(),
            expires_at: expires_at.as_secs(),
            tee_pubkey: &runtime_data.tee_pubkey,
            tee: tee_name(pending.tee),
            verdict: verdict_name(&appraised),
            measurement: &appraised.claims().measurement_name,
            evidence: *appraised.evidence_digest(),
            policy_version: policy.version(),
        });
        Ok(AttestResponse { token })
    }

    /// `GET /kbs/v0/resource/…`: appraises the session's evidence again, under the policy now in force and
    /// at this time, and encrypts the resource to the key inside the TEE.
    ///
    /// # Errors
    /// [`Rejection`]; then nothing is released.
    pub fn resource(&self, session: &str, path: &ResourcePath) -> Result<Jwe, Rejection> {
        let now = self.clock.now();
        let attested = self.sessions().attested(session, now)?;
        let mut inner = self.inner();
        let policy = inner.policy.clone().ok_or(Rejection::NoPolicy)?;
        let mut decision = Decision::new(Action::Release, Verdict::Denied);
        decision.session = Some(session_digest(session).into());
        decision.subject = Some(path.as_str().into());
        decision.evidence = Some(attested.evidence.digest().into());
        decision.policy_version = Some(policy.version());

        let Attested {
            evidence,
            report_data,
            recipient,
        } = &*attested;
        let appraised = match appraise(evidence, report_data, &policy, now).outcome {
            Ok(appraised) => appraised,
            Err(denial) => {
                return Err(self.deny_locked(
                    &mut inner,
                    now,
                    decision,
                    denial,
                    Rejection::NotAllowed,
                )?);
            }
        };
        decision.measurement = Some(appraised.claims().measurement_name.clone());
        let Some(resource) = inner.store.resource(path)? else {
            let denial = Denial::refused(
                "resource",
                path.as_str(),
                "a stored resource",
                "store it with `casemate-broker admin resource put`, or correct the path",
            );
            let rejection = |_| Rejection::NoResource(path.clone());
            return Err(self.deny_locked(&mut inner, now, decision, denial, rejection)?);
        };
        let mut released = None;
        if let Some(grant) = &resource.grant {
            decision.model = Some((*grant.model_digest.as_bytes()).into());
            if let Err(denial) = model_is_allowed(&policy, &grant.model_digest) {
                return Err(self.deny_locked(
                    &mut inner,
                    now,
                    decision,
                    denial,
                    Rejection::NotAllowed,
                )?);
            }
            released = Some(Released {
                path: path.clone(),
                model_digest: grant.model_digest,
                minimum_version: grant.minimum_version,
                service: resource.service.clone(),
                policy_version: policy.version(),
            });
        }
        let jwe = Jwe::encrypt(&resource.bytes, recipient, &*self.random)?;
        decision.verdict = verdict(&appraised);
        self.record_locked(&mut inner, now, decision)?;
        if let Some(released) = released {
            self.sessions().release(session, released, now)?;
        }
        Ok(jwe)
    }

    /// `POST /casemate/v1/challenge`: a fresh nonce for evidence over a keyset.
    ///
    /// # Errors
    /// [`Rejection::Session`].
    pub fn challenge(&self, session: &str) -> Result<IssuanceChallenge, Rejection> {
        let mut nonce = [0u8; 32];
        self.random.fill(&mut nonce)?;
        let expires_at = self
            .sessions()
            .challenge(session, nonce, self.clock.now())?;
        Ok(IssuanceChallenge::new(&nonce, expires_at.as_secs()))
    }

    /// `POST /casemate/v1/credential`: appraises evidence over a keyset and signs a credential for it.
    ///
    /// # Errors
    /// [`Rejection`]; then nothing is signed. The nonce is used up once the request could be read.
    pub fn credential(&self, session: &str, body: &[u8]) -> Result<CredentialResponse, Rejection> {
        let now = self.clock.now();
        let request = CredentialRequest::parse(body)?;
        let released = self
            .sessions()
            .take_challenge(session, &request.nonce, now)?;
        let keyset = Keyset::decode(&request.keyset)?;
        let keyset_digest = KeysetDigest::of(&request.keyset);
        let expected = report_data(
            Purpose::Credential,
            Role::Service,
            &keyset_digest,
            &request.nonce,
            &ChannelBinding::Key,
        );

        let mut inner = self.inner();
        let policy = inner.policy.clone().ok_or(Rejection::NoPolicy)?;
        let mut decision = Decision::new(Action::Credential, Verdict::Denied);
        decision.session = Some(session_digest(session).into());
        decision.subject = Some(request.service.clone());
        decision.evidence = Some(request.evidence.digest().into());
        decision.policy_version = Some(policy.version());
        decision.model = Some(keyset.model_digest.into());
        decision.content = Some(keyset_digest.0.into());

        let judged = judge_keyset(&request, &keyset, &released, &policy, now)
            .and_then(|()| appraise_for(&request.evidence, &expected, &policy, now));
        let appraised = match judged {
            Ok(appraised) => appraised,
            Err(denial) => {
                return Err(self.deny_locked(
                    &mut inner,
                    now,
                    decision,
                    denial,
                    Rejection::NotAllowed,
                )?);
            }
        };
        let life = self
            .settings
            .credential_life
            .as_secs()
            .clamp(1, MAX_LIFETIME_SECONDS);
        let expires_at = keyset.expires_at.min(now.as_secs().saturating_add(life));
        decision.verdict = verdict(&appraised);
        decision.measurement = Some(appraised.claims().measurement_name.clone());
        decision.expires_at = Some(expires_at);
        let head = self.record_locked(&mut inner, now, decision)?;
        let credential = Credential {
            evidence_digest: *appraised.evidence_digest(),
            keyset_digest: keyset_digest.0,
            model_digest: ModelDigest(keyset.model_digest),
            model_version: keyset.model_version,
            adapter_digests: keyset.adapter_digests,
            service: request.service,
            policy_version: policy.version(),
            log_size: head.size,
            log_head: head.hash.bytes(),
            issued_at: now.as_secs(),
            expires_at,
        };
        Ok(CredentialResponse::new(
            &credential.issue(&self.issuer)?,
            expires_at,
        ))
    }

    /// Puts a policy into force.
    ///
    /// # Errors
    /// [`Rejection::Policy`], [`StoreError::PolicyGoesBack`], [`StoreError::PolicyChanged`].
    pub fn set_policy(&self, toml: &str) -> Result<Arc<Policy>, Rejection> {
        let policy = Arc::new(Policy::from_toml(toml)?);
        let mut inner = self.inner();
        inner
            .store
            .set_policy(self.clock.now(), policy.version(), toml)?;
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
    /// [`Rejection::Store`].
    pub fn put_resource(
        &self,
        path: &ResourcePath,
        bytes: &[u8],
        is_grant: bool,
        service: Option<&str>,
    ) -> Result<ResourceSummary, Rejection> {
        let service = service.unwrap_or(path.tag());
        let now = self.clock.now();
        let mut inner = self.inner();
        inner
            .store
            .put_resource(now, path, bytes, is_grant, service)?;
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

    /// Log entries.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn entries(&self, from: u64, limit: u64) -> Result<Vec<Entry>, Rejection> {
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
    pub fn verify_log(&self, anchor: Option<Anchor>) -> Result<Head, Rejection> {
        // Over a connection of its own: a long log does not hold up decisions.
        Ok(verify_offline(&self.database, &self.issuer(), anchor)?)
    }

    fn deny(
        &self,
        now: UnixTime,
        decision: Decision,
        denial: Denial,
        rejection: impl FnOnce(Denial) -> Rejection,
    ) -> Result<Rejection, Rejection> {
        self.deny_locked(&mut self.inner(), now, decision, denial, rejection)
    }

    fn deny_locked(
        &self,
        inner: &mut Inner,
        now: UnixTime,
        mut decision: Decision,
        denial: Denial,
        rejection: impl FnOnce(Denial) -> Rejection,
    ) -> Result<Rejection, Rejection> {
        decision.verdict = Verdict::Denied;
        decision.denial = Some(LoggedDenial::from(&denial));
        self.record_locked(inner, now, decision)?;
        Ok(rejection(denial))
    }

    fn record(&self, now: UnixTime, decision: Decision) -> Result<Head, Rejection> {
        self.record_locked(&mut self.inner(), now, decision)
    }

    fn record_locked(
        &self,
        inner: &mut Inner,
        now: UnixTime,
        decision: Decision,
    ) -> Result<Head, Rejection> {
        let (action, verdict) = (decision.action, decision.verdict);
        let head = inner.store.record(now, decision)?;
        self.metrics.count(action, verdict);
        Ok(head)
    }

    // A panic while holding a lock leaves neither the store (its transaction rolls back) nor the session
    // table half-changed, so a poisoned lock is taken as it is.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn appraise_for(
    evidence: &Evidence,
    expected: &ReportData,
    policy: &Policy,
    now: UnixTime,
) -> Result<Appraised, Denial> {
    appraise(evidence, expected, policy, now).outcome
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
        "if this model may be served, add its digest to the policy and raise the policy's version",
    ))
}

/// What a keyset must say to be credentialed in a session that received a model's key.
fn judge_keyset(
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

fn verdict(appraised: &Appraised) -> Verdict {
    match appraised {
        Appraised::Genuine(_) => Verdict::Genuine,
        Appraised::Development(_) => Verdict::Development,
    }
}

fn verdict_name(appraised: &Appraised) -> &'static str {
    match appraised {
        Appraised::Genuine(_) => "genuine",
        Appraised::Development(_) => "development",
    }
}
