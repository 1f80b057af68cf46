//! Sessions of the RCAR exchange: single-use nonces, then evidence that was accepted.
//!
//! Sessions live in memory only. A restart forgets them, so no nonce can be used twice across it, and
//! clients begin the exchange again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use casemate_attest::{Evidence, ReportData, TeeKind, UnixTime};
use casemate_container::ModelDigest;
use casemate_release::jwe::PublicKey;
use casemate_release::rcar::ResourcePath;

/// How long things live and how many there may be.
#[derive(Debug, Clone, Copy)]
pub struct SessionLimits {
    /// Life of a nonce.
    pub nonce_life: Duration,
    /// Life of a session after its evidence was accepted.
    pub session_life: Duration,
    /// Most sessions that wait for evidence.
    pub max_pending: usize,
    /// Most sessions with accepted evidence.
    pub max_attested: usize,
    /// Most resources that one session may ask for: each is an entry in the log.
    pub max_releases: u32,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            nonce_life: Duration::from_secs(120),
            session_life: Duration::from_secs(3600),
            max_pending: 65_536,
            max_attested: 1024,
            max_releases: 16,
        }
    }
}

/// SHA-256 of a session's identifier: the table holds nothing that would let a reader take over a session.
pub type SessionDigest = [u8; 32];

/// What a session waiting for evidence expects.
#[derive(Debug)]
pub struct Pending {
    /// Kind named in the request.
    pub tee: TeeKind,
    /// The nonce in base64, as it was sent.
    pub nonce: String,
    expires_at: UnixTime,
}

/// What a session with accepted evidence holds, to be appraised again at each release.
pub struct Attested {
    /// The evidence.
    pub evidence: Evidence,
    /// What it must be bound to.
    pub report_data: ReportData,
    /// The key inside the TEE.
    pub recipient: PublicKey,
}

/// The key of a model or an adapter that was released in a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Released {
    /// Which resource.
    pub path: ResourcePath,
    /// SHA-256 of what was released, by which a credential finds out whether it was replaced since.
    pub content: [u8; 32],
    /// The model or adapter it opens.
    pub model_digest: ModelDigest,
    /// The lowest version that may be served.
    pub minimum_version: u64,
    /// The name under which the service may be credentialed.
    pub service: String,
    /// The policy it was released under.
    pub policy_version: u64,
}

struct AttestedSession {
    attested: Arc<Attested>,
    /// How many resources it may still ask for.
    releases_left: u32,
    /// What was released, each resource once.
    released: Vec<Released>,
    challenge: Option<([u8; 32], UnixTime)>,
    expires_at: UnixTime,
}

/// Why there is no such session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionFault {
    /// No cookie was sent.
    #[error("no session cookie was sent")]
    Missing,
    /// Never begun, already used, or expired and forgotten.
    #[error("the session is unknown, was already used or has expired")]
    Unknown,
    /// Its evidence has not been accepted.
    #[error("the session's evidence has not been accepted")]
    NotAttested,
    /// No model key was released in it.
    #[error("no model key was released in this session")]
    NothingReleased,
    /// The nonce is not the one that was given out last, or has expired.
    #[error("the nonce is unknown, was already used or has expired")]
    Nonce,
    /// As many as there may be.
    #[error("too many sessions are open, try again later")]
    Full,
}

/// All sessions.
pub struct Sessions {
    limits: SessionLimits,
    pending: HashMap<SessionDigest, Pending>,
    /// Pending sessions in the order in which they began, some of them used up already.
    order: VecDeque<SessionDigest>,
    attested: HashMap<SessionDigest, AttestedSession>,
    /// Expired entries are swept once a second at most, so that a full table is not scanned per request.
    next_sweep: UnixTime,
}

impl Sessions {
    /// An empty table.
    pub fn new(limits: SessionLimits) -> Self {
        Self {
            limits,
            pending: HashMap::new(),
            order: VecDeque::new(),
            attested: HashMap::new(),
            next_sweep: UnixTime::from_secs(0),
        }
    }

    /// Number of sessions waiting for evidence, and with accepted evidence.
    pub fn counts(&self) -> (usize, usize) {
        (self.pending.len(), self.attested.len())
    }

    /// Begins a session over a nonce.
    ///
    /// # Errors
    /// [`SessionFault::Full`].
    pub fn begin(
        &mut self,
        id: &str,
        tee: TeeKind,
        nonce: String,
        now: UnixTime,
    ) -> Result<(), SessionFault> {
        self.sweep(now);
        // Anybody can begin a session. The oldest gives way, so that whoever floods the table displaces above all
        // themselves, and a guest that answers at once is served.
        while self.pending.len() >= self.limits.max_pending {
            let oldest = self.order.pop_front().ok_or(SessionFault::Full)?;
            self.pending.remove(&oldest);
        }
        self.order.push_back(session_digest(id));
        let expires_at = now.saturating_add(self.limits.nonce_life);
        self.pending.insert(
            session_digest(id),
            Pending {
                tee,
                nonce,
                expires_at,
            },
        );
        Ok(())
    }

    /// Takes what the session expects. Whatever becomes of the evidence, its nonce is used up.
    ///
    /// # Errors
    /// [`SessionFault::Unknown`].
    pub fn take_pending(&mut self, id: &str, now: UnixTime) -> Result<Pending, SessionFault> {
        let pending = self
            .pending
            .remove(&session_digest(id))
            .ok_or(SessionFault::Unknown)?;
        if now >= pending.expires_at {
            return Err(SessionFault::Unknown);
        }
        Ok(pending)
    }

    /// Keeps accepted evidence under the session for the session's life.
    ///
    /// # Errors
    /// [`SessionFault::Full`].
    pub fn accept(
        &mut self,
        id: &str,
        attested: Attested,
        now: UnixTime,
    ) -> Result<(), SessionFault> {
        self.sweep(now);
        // A session that has received nothing gives way first, then the one that ends soonest; its guest attests again.
        if self.attested.len() >= self.limits.max_attested {
            let weakest = self
                .attested
                .iter()
                .min_by_key(|(_, s)| (!s.released.is_empty(), s.expires_at));
            let weakest = *weakest.ok_or(SessionFault::Full)?.0;
            self.attested.remove(&weakest);
        }
        let expires_at = now.saturating_add(self.limits.session_life);
        let attested = Arc::new(attested);
        let session = AttestedSession {
            attested,
            releases_left: self.limits.max_releases,
            released: Vec::new(),
            challenge: None,
            expires_at,
        };
        self.attested.insert(session_digest(id), session);
        Ok(())
    }

    /// The accepted evidence, for one release. A session that asked for as many as it may has ended.
    ///
    /// # Errors
    /// [`SessionFault::Unknown`], or [`SessionFault::NotAttested`] before `/attest`.
    pub fn attested(&mut self, id: &str, now: UnixTime) -> Result<Arc<Attested>, SessionFault> {
        let session = self.find(id, now)?;
        if let Some(left) = session.releases_left.checked_sub(1) {
            session.releases_left = left;
            return Ok(session.attested.clone());
        }
        self.end(id);
        Err(SessionFault::Unknown)
    }

    /// Ends a session, if there is one.
    pub fn end(&mut self, id: &str) {
        self.attested.remove(&session_digest(id));
    }

    /// Notes that the key of a model or adapter was released.
    ///
    /// # Errors
    /// As [`Sessions::attested`].
    pub fn release(
        &mut self,
        id: &str,
        released: Released,
        now: UnixTime,
    ) -> Result<(), SessionFault> {
        let session = self.find(id, now)?;
        session.released.retain(|other| other.path != released.path);
        session.released.push(released);
        Ok(())
    }

    /// Sets the nonce for a credential, in place of an earlier one, and returns when it expires.
    ///
    /// # Errors
    /// As [`Sessions::attested`], or [`SessionFault::NothingReleased`].
    pub fn challenge(
        &mut self,
        id: &str,
        nonce: [u8; 32],
        now: UnixTime,
    ) -> Result<UnixTime, SessionFault> {
        let expires_at = now.saturating_add(self.limits.nonce_life);
        let session = self.find(id, now)?;
        if session.released.is_empty() {
            return Err(SessionFault::NothingReleased);
        }
        session.challenge = Some((nonce, expires_at));
        Ok(expires_at)
    }

    /// Uses up the nonce for a credential, and with the right one the session: whatever becomes of the request, another
    /// credential needs another attestation.
    ///
    /// # Errors
    /// As [`Sessions::challenge`], or [`SessionFault::Nonce`].
    pub fn take_challenge(
        &mut self,
        id: &str,
        nonce: &[u8; 32],
        now: UnixTime,
    ) -> Result<Vec<Released>, SessionFault> {
        let session = self.find(id, now)?;
        if session.released.is_empty() {
            return Err(SessionFault::NothingReleased);
        }
        let released = session.released.clone();
        let (expected, expires_at) = session.challenge.take().ok_or(SessionFault::Nonce)?;
        if expected != *nonce || now >= expires_at {
            return Err(SessionFault::Nonce);
        }
        self.end(id);
        Ok(released)
    }

    fn find(&mut self, id: &str, now: UnixTime) -> Result<&mut AttestedSession, SessionFault> {
        let digest = session_digest(id);
        if self.pending.contains_key(&digest) {
            return Err(SessionFault::NotAttested);
        }
        match self.attested.get_mut(&digest) {
            Some(session) if now < session.expires_at => Ok(session),
            _ => Err(SessionFault::Unknown),
        }
    }

    fn sweep(&mut self, now: UnixTime) {
        if now < self.next_sweep {
            return;
        }
        self.pending.retain(|_, pending| now < pending.expires_at);
        self.order
            .retain(|session| self.pending.contains_key(session));
        self.attested.retain(|_, session| now < session.expires_at);
        self.next_sweep = now.saturating_add(Duration::from_secs(1));
    }
}

/// The digest under which a session is kept and logged.
pub fn session_digest(id: &str) -> SessionDigest {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, id.as_bytes()).as_ref());
    out
}
