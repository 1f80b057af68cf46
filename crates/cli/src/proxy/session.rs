//! The service as it was last verified, and its renewal. A service is used until its verification
//! runs out, by the clock on the wall or by the time that has passed, whichever is first; nothing
//! prolongs it but a new verification.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::rand;
use casemate_channel::keyset::KeysetDigest;
use casemate_channel::receipt::SavedAttestation;
use casemate_channel::verify::VerifiedService;
use tracing::{info, warn};

use super::presence::{Pace, Presence};
use super::refusal::Refusal;
use crate::service::{Holding, NotVerified, Service, Verification};
use crate::verdict::Verdict;

/// Pause after a failed renewal, at the most.
const RETRY: Duration = Duration::from_secs(15);
/// Pause between two renewals, at the least.
const MINIMUM_PAUSE: Duration = Duration::from_secs(1);

/// Keysets whose evidence is kept. A keyset is renewed about every half hour.
const KEYSETS: usize = 16;

/// A verified service, or the memory of one.
pub(super) struct Session {
    service: Service,
    state: Mutex<State>,
    presence: Presence,
    /// Held while the service is being verified, so that one verification serves all who wait.
    verifying: tokio::sync::Mutex<()>,
}

struct State {
    current: Arc<Current>,
    /// The last keysets, oldest first.
    keysets: VecDeque<Kept>,
    /// Why the latest renewal failed, if it did.
    failure: Option<NotVerified>,
    /// How many renewals have ended.
    attempts: u64,
}

/// A keyset that was verified.
struct Kept {
    /// Its first verification: what a receipt of it is completed with.
    first: Arc<Current>,
    /// Its last: until when it may be sent to.
    latest: Arc<Current>,
}

/// A successful verification.
pub(super) struct Current {
    pub(super) service: VerifiedService,
    /// What was verified.
    pub(super) attestation: SavedAttestation,
    /// The verdict as JSON.
    pub(super) verdict: String,
    holding: Holding,
}

impl Current {
    fn of(service: &Service, verification: Verification) -> Result<Current, NotVerified> {
        let verdict = Verdict::of(service, &verification).to_json().to_string();
        let verified = verification.outcome.map_err(NotVerified::Denied)?;
        let attestation = verification
            .attestation
            .expect("what was verified had been read");
        let holding = Holding::of(&verified, verification.began, verification.started);
        Ok(Current {
            service: verified,
            attestation,
            verdict,
            holding,
        })
    }
}

impl Kept {
    fn new(verified: Arc<Current>) -> Kept {
        Kept {
            first: Arc::clone(&verified),
            latest: verified,
        }
    }

    fn is(&self, digest: &KeysetDigest) -> bool {
        self.first.service.keyset_digest() == digest
    }
}

impl State {
    /// Keeps the evidence of a keyset that is new, and for how long one that is known may be used.
    fn remember(&mut self, verified: Arc<Current>) {
        let digest = verified.service.keyset_digest();
        if let Some(known) = self.keysets.iter_mut().find(|kept| kept.is(digest)) {
            known.latest = verified;
            return;
        }
        if self.keysets.len() == KEYSETS {
            self.keysets.pop_front();
        }
        self.keysets.push_back(Kept::new(verified));
    }
}

impl Session {
    /// Begins with a first verification, if that succeeded.
    pub(super) fn new(service: Service, first: Verification) -> Result<Session, NotVerified> {
        Session::with_pace(service, first, Pace::default())
    }

    /// As [`Session::new`], asking the service at another pace.
    pub(super) fn with_pace(
        service: Service,
        first: Verification,
        pace: Pace,
    ) -> Result<Session, NotVerified> {
        let current = Arc::new(Current::of(&service, first)?);
        Ok(Session {
            presence: Presence::new(current.attestation.verified_at, pace),
            service,
            state: Mutex::new(State {
                keysets: VecDeque::from([Kept::new(Arc::clone(&current))]),
                current,
                failure: None,
                attempts: 0,
            }),
            verifying: tokio::sync::Mutex::new(()),
        })
    }

    /// The service, to send requests to.
    pub(super) fn service(&self) -> &Service {
        &self.service
    }

    /// What is known of its being there.
    pub(super) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// The latest verification, if it still holds.
    pub(super) fn valid(&self) -> Option<Arc<Current>> {
        let current = self.latest();
        self.holds(&current).then_some(current)
    }

    /// The verification to use for a request: the latest, or a new one if that has run out.
    pub(super) async fn use_service(&self) -> Result<Arc<Current>, Refusal> {
        if let Some(current) = self.valid() {
            return Ok(current);
        }
        let outdated = self.latest();
        self.renew(&outdated).await.map_err(Refusal::from)
    }

    /// Verifies again, unless somebody else replaced `outdated` meanwhile. On failure the former
    /// verification stays, for as long as it holds.
    pub(super) async fn renew(&self, outdated: &Arc<Current>) -> Result<Arc<Current>, NotVerified> {
        let attempts = self.state().attempts;
        let _one_at_a_time = self.verifying.lock().await;
        {
            // What ended while we waited speaks for us, too.
            let state = self.state();
            if !Arc::ptr_eq(&state.current, outdated) && self.holds(&state.current) {
                return Ok(state.current.clone());
            }
            if let Some(failure) = state
                .failure
                .as_ref()
                .filter(|_| state.attempts != attempts)
            {
                return Err(failure.clone());
            }
        }
        let verification = self.service.verify().await;
        let result = verification.and_then(|v| Current::of(&self.service, v));
        let mut state = self.state();
        state.attempts += 1;
        match result {
            Ok(current) => {
                info!(valid_until = %current.service.valid_until(), "verified the service again");
                state.failure = None;
                self.presence.verified(self.service.now());
                let current = Arc::new(current);
                state.current = Arc::clone(&current);
                state.remember(Arc::clone(&current));
                Ok(current)
            }
            Err(error) => {
                warn!(reason = %error, "could not verify the service again");
                match error {
                    // Its verification may hold still, and so may its being there.
                    NotVerified::Unreachable(_) => self.presence.doubt(),
                    NotVerified::Denied(_) => self.presence.failed(error.clone().into()),
                }
                state.failure = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Keeps the evidence of a connection of its own, for receipts.
    pub(super) fn remember(&self, verification: Verification) {
        if let Ok(verified) = Current::of(&self.service, verification) {
            self.presence.verified(self.service.now());
            self.state().remember(Arc::new(verified));
        }
    }

    /// The first verification of a keyset, if that is one of the last.
    pub(super) fn of_keyset(&self, digest: &KeysetDigest) -> Option<Arc<Current>> {
        let state = self.state();
        let mut kept = state.keysets.iter();
        kept.find(|kept| kept.is(digest))
            .map(|kept| Arc::clone(&kept.first))
    }

    /// Verifications of other keysets than that of `current` which still hold, newest keyset first.
    pub(super) fn others(&self, current: &Current) -> Vec<Arc<Current>> {
        let digest = current.service.keyset_digest();
        let state = self.state();
        let kept = state.keysets.iter().rev();
        kept.filter(|kept| !kept.is(digest) && self.holds(&kept.latest))
            .map(|kept| Arc::clone(&kept.latest))
            .collect()
    }

    /// The latest verification, whether it holds or not.
    pub(super) fn latest(&self) -> Arc<Current> {
        self.state().current.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holds(&self, current: &Current) -> bool {
        self.remaining(current) > Duration::ZERO
    }

    fn remaining(&self, current: &Current) -> Duration {
        current.holding.remaining(self.service.now())
    }

    /// How long to wait before the next renewal: between a half and three quarters of what is left,
    /// at random, so that many proxies of one service do not come at once.
    fn pause(&self) -> Duration {
        let state = self.state();
        let remaining = self.remaining(&state.current);
        let mut random = [0];
        // Without randomness there is no spread, and no harm.
        let _ = rand::fill(&mut random);
        let pause = remaining / 2 + remaining / 4 * u32::from(random[0]) / 255;
        let pause = if state.failure.is_some() {
            pause.min(RETRY)
        } else {
            pause
        };
        if pause.is_zero() {
            RETRY
        } else {
            pause.max(MINIMUM_PAUSE)
        }
    }
}

/// Renews the session's verification for ever.
pub(super) async fn keep_fresh(session: Arc<Session>) {
    loop {
        tokio::time::sleep(session.pause()).await;
        let outdated = session.latest();
        // The failure is remembered by the session, and shown to those who ask.
        let _ = session.renew(&outdated).await;
    }
}
