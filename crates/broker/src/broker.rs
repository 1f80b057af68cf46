//! The decisions: challenge, appraisal, release of resources, issuance of credentials. No HTTP, no files.
//! What is allowed is judged in `judgement`; what an administrator may do is in `administration`.
//!
//! Every allowed request is a log entry, and the entry is on disk before the caller gets its answer. So is
//! a denied one with a session, as long as there are not too many ([`crate::denials`]). Whatever releases a
//! secret or signs a credential does so with policy and resources locked: what came into force before is
//! what is applied.

mod administration;
mod judgement;

pub use administration::ResourceSummary;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use casemate_attest::{Appraised, Denial, Policy, PolicyError, UnixTime, appraise};
use casemate_channel::keyset::{
    ChannelBinding, Keyset, KeysetDigest, KeysetError, Purpose, Role, report_data,
};
use casemate_container::ModelDigest;
use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_release::ReleaseError;
use casemate_release::credential::{Credential, MAX_LIFETIME_SECONDS};
use casemate_release::issuance::{CredentialRequest, CredentialResponse, IssuanceChallenge};
use casemate_release::jwe::{Jwe, PublicKey};
use casemate_release::random::Random;
use casemate_release::rcar::{
    AttestResponse, Attestation, Challenge, HashAlgorithm, NONCE_BYTES, Request, ResourcePath,
    tee_name,
};
use casemate_release::received;
use casemate_release::rollback::sha256;

use self::judgement::Refusal;
use crate::clock::Clock;
use crate::denials::DenialLimits;
use crate::log::{Action, Decision, Head, LoggedDenial, Verdict};
use crate::metrics::Metrics;
use crate::sessions::{Attested, Released, SessionFault, SessionLimits, Sessions, session_digest};
use crate::state::State;
use crate::store::{Kind, Store, StoreError};
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
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The rollback offered does not verify.
    #[error("rollback: {0}")]
    Rollback(ReleaseError),
    /// There is no key under which a rollback of the policy could verify.
    #[error(
        "this broker knows no provider, so it accepts no rollback of its policy; it is named by \
         `casemate-broker init --provider`, or by provider.pub in the state directory of a stopped broker"
    )]
    NoProvider,
    /// The grant is signed by another provider than the broker's.
    #[error("the grant is signed by {found}, this broker's provider is {expected}")]
    OtherProvider {
        /// Who signed.
        found: VerifyingKey,
        /// Who should have.
        expected: VerifyingKey,
    },
    /// The store failed; nothing was released.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The broker: state in, decisions out. Shared between threads.
pub struct Broker {
    inner: Mutex<Inner>,
    sessions: Mutex<Sessions>,
    issuer: Arc<SigningKey>,
    provider: Option<VerifyingKey>,
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
    denials: DenialLimits,
}

impl Inner {
    /// The entry about denials that have none, and how many it counts.
    fn left_out(&self) -> (Option<Decision>, u64) {
        let count = self.denials.uncounted();
        let entry = (count > 0).then(|| Decision {
            count: Some(count),
            ..Decision::new(Action::Suppressed, Verdict::Denied)
        });
        (entry, count)
    }
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
            provider,
            store,
            database,
            lock,
        } = state;
        let policy = match store.policy()? {
            Some((_, toml)) => Some(Arc::new(Policy::from_toml(&toml)?)),
            None => None,
        };
        Ok(Self {
            inner: Mutex::new(Inner {
                store,
                policy,
                denials: DenialLimits::new(clock.now()),
            }),
            sessions: Mutex::new(Sessions::new(settings.sessions)),
            issuer,
            provider,
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
        let mut inner = self.inner();
        let outcome = outcome.map_err(Refusal::Evidence);
        let appraised = self.settle(&mut inner, now, session, &decision, outcome)?;
        decision.verdict = verdict(&appraised);
        decision.measurement = Some(appraised.claims().measurement_name.clone());
        let expires_at = now.saturating_add(self.settings.sessions.session_life);
        decision.expires_at = Some(expires_at.as_secs());
        self.record(&mut inner, now, decision)?;
        drop(inner);
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
        let attested = self.sessions().attested(session, self.clock.now())?;
        let mut inner = self.inner();
        // Read with the lock held: waiting for it makes no evidence valid for longer.
        let now = self.clock.now();
        let policy = inner.policy.clone().ok_or(Rejection::NoPolicy)?;
        let mut decision = Decision::new(Action::Release, Verdict::Denied);
        decision.session = Some(session_digest(session).into());
        decision.subject = Some(path.as_str().into());
        decision.evidence = Some(attested.evidence.digest().into());
        decision.policy_version = Some(policy.version());

        let judged = judgement::release(&inner.store, &policy, &attested, path, now, &mut decision);
        let resource = self.settle(&mut inner, now, session, &decision, judged)?;
        let jwe = Jwe::encrypt(&resource.bytes, &attested.recipient, &*self.random)?;
        self.record(&mut inner, now, decision)?;
        if let Kind::Grant(grant) = &resource.kind {
            let released = Released {
                path: path.clone(),
                content: sha256(&resource.bytes),
                model_digest: grant.model_digest,
                minimum_version: grant.minimum_version,
                service: resource.service.clone(),
                policy_version: policy.version(),
            };
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
    /// [`Rejection`]; then nothing is signed. Once the nonce was the right one, the session has ended.
    pub fn credential(&self, session: &str, body: &[u8]) -> Result<CredentialResponse, Rejection> {
        let request = CredentialRequest::parse(body)?;
        let released = self
            .sessions()
            .take_challenge(session, &request.nonce, self.clock.now())?;
        let keyset = Keyset::decode(&request.keyset)?;
        let keyset_digest = KeysetDigest::of(&request.keyset);
        let expected = report_data(
            Purpose::Credential(received::digest(&request.received)),
            Role::Service,
            &keyset_digest,
            &request.nonce,
            &ChannelBinding::Key,
        );

        let mut inner = self.inner();
        let now = self.clock.now();
        let policy = inner.policy.clone().ok_or(Rejection::NoPolicy)?;
        let mut decision = Decision::new(Action::Credential, Verdict::Denied);
        decision.session = Some(session_digest(session).into());
        decision.subject = Some(request.service.clone());
        decision.evidence = Some(request.evidence.digest().into());
        decision.policy_version = Some(policy.version());
        decision.model = Some(keyset.model_digest.into());
        decision.content = Some(keyset_digest.0.into());

        let judged = judgement::keyset(&inner.store, &request, &keyset, &released, &policy, now)
            .and_then(|()| Ok(appraise(&request.evidence, &expected, &policy, now).outcome?));
        let appraised = self.settle(&mut inner, now, session, &decision, judged)?;
        let life = self
            .settings
            .credential_life
            .as_secs()
            .clamp(1, MAX_LIFETIME_SECONDS);
        let expires_at = keyset.expires_at.min(now.as_secs().saturating_add(life));
        decision.verdict = verdict(&appraised);
        decision.measurement = Some(appraised.claims().measurement_name.clone());
        decision.expires_at = Some(expires_at);
        let head = self.record(&mut inner, now, decision)?;
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

    /// Turns a judgement into an answer. A refusal is a decision, logged within the limits on denials, and ends the session.
    fn settle<T>(
        &self,
        inner: &mut Inner,
        now: UnixTime,
        session: &str,
        decision: &Decision,
        judged: Result<T, Refusal>,
    ) -> Result<T, Rejection> {
        let (denial, rejection) = match judged {
            Ok(value) => return Ok(value),
            Err(Refusal::Failed(rejection)) => return Err(rejection),
            Err(Refusal::Evidence(denial)) => (denial.clone(), Rejection::Evidence(denial)),
            Err(Refusal::NotAllowed(denial)) => (denial.clone(), Rejection::NotAllowed(denial)),
            Err(Refusal::NoResource(path)) => {
                (judgement::no_resource(&path), Rejection::NoResource(path))
            }
        };
        self.sessions().end(session);
        if inner.denials.admit(decision.action, now) {
            let decision = Decision {
                verdict: Verdict::Denied,
                denial: Some(LoggedDenial::from(&denial)),
                ..decision.clone()
            };
            self.record(inner, now, decision)?;
        } else {
            self.metrics.count_suppressed();
        }
        Err(rejection)
    }

    /// Logs a decision, and before it how many denials were left out since the last entry.
    fn record(
        &self,
        inner: &mut Inner,
        now: UnixTime,
        decision: Decision,
    ) -> Result<Head, Rejection> {
        let (action, verdict) = (decision.action, decision.verdict);
        let (left_out, count) = inner.left_out();
        let head = inner
            .store
            .record(now, left_out.into_iter().chain([decision]))?;
        inner.denials.logged(count);
        self.metrics.count(action, verdict);
        Ok(head)
    }

    /// Logs how many denials were left out so far. For the end of the program, and before the log is shown.
    ///
    /// # Errors
    /// [`Rejection::Store`].
    pub fn log_what_was_left_out(&self) -> Result<(), Rejection> {
        let mut inner = self.inner();
        let (left_out, count) = inner.left_out();
        if left_out.is_some() {
            inner.store.record(self.clock.now(), left_out)?;
            inner.denials.logged(count);
        }
        Ok(())
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
