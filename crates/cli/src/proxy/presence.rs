//! Whether the service is there: what it proved last and when, and asking it again when that is old or in doubt.
//!
//! The question is an ordinary request, encrypted to the attested key or sent on a verified connection, whose answer
//! nobody else can make. It needs no evidence, so that asking costs the service less than any prompt; and whoever asks
//! this proxy, and how often, the service is asked by one at a time and not again within a pause.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use casemate_attest::UnixTime;
use tracing::{info, warn};

use super::refusal::{KEY_REFUSED, NOT_VERIFIED, Refusal};

/// When the service is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// For how long an answer counts.
    pub(super) fresh: Duration,
    /// For how long it is not asked again after it was asked, whatever came of it.
    pub(super) pause: Duration,
    /// The same where asking means a verification, of which the last did not help: evidence costs it more.
    pub(super) verify_pause: Duration,
    /// How long it may take to answer, a verification included if that is needed.
    pub(super) patience: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            fresh: Duration::from_secs(2),
            pause: Duration::from_secs(1),
            verify_pause: Duration::from_secs(15),
            patience: Duration::from_secs(10),
        }
    }
}

/// What is known of the service.
pub(super) struct Presence {
    pub(super) pace: Pace,
    state: Mutex<State>,
    /// Held while the service is being asked, so that one answer serves all who wait.
    pub(super) asking: tokio::sync::Mutex<()>,
}

struct State {
    /// When it last gave an answer that only it can give.
    answered: UnixTime,
    /// The same by the clock that is never set.
    answered_at: Instant,
    /// Something failed since that may mean that it is gone.
    doubted: bool,
    /// When the last question ended, also one that was answered.
    asked_at: Option<Instant>,
    away: Option<Away>,
}

/// What shows that the service is there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Proof {
    Answer,
    Verification,
}

/// A service that was asked in vain.
struct Away {
    refusal: Refusal,
    asked_at: Instant,
}

impl Away {
    /// Whether its evidence, or the lack of it, is what is wrong. Then no answer helps, only a verification.
    fn unverified(&self) -> bool {
        self.refusal.code == NOT_VERIFIED
    }

    /// Whether the next question will cost the service evidence.
    fn costs_evidence(&self) -> bool {
        matches!(self.refusal.code, NOT_VERIFIED | KEY_REFUSED)
    }

    /// Whether this is what was missing. A host that refuses the key does so after every verification.
    fn ends_with(&self, proof: Proof) -> bool {
        match self.refusal.code {
            NOT_VERIFIED => proof == Proof::Verification,
            KEY_REFUSED => proof == Proof::Answer,
            _ => true,
        }
    }
}

impl Presence {
    /// Of a service that has just answered, at `now`.
    pub(super) fn new(now: UnixTime, pace: Pace) -> Presence {
        Presence {
            pace,
            state: Mutex::new(State {
                answered: now,
                answered_at: Instant::now(),
                doubted: false,
                asked_at: None,
                away: None,
            }),
            asking: tokio::sync::Mutex::new(()),
        }
    }

    /// The service has answered a request.
    pub(super) fn answered(&self, now: UnixTime) {
        self.proven(now, Proof::Answer);
    }

    /// The service was verified.
    pub(super) fn verified(&self, now: UnixTime) {
        self.proven(now, Proof::Verification);
    }

    fn proven(&self, now: UnixTime, proof: Proof) {
        let mut state = self.state();
        state.answered = now;
        state.answered_at = Instant::now();
        state.doubted = false;
        if state
            .away
            .as_ref()
            .is_some_and(|away| away.ends_with(proof))
        {
            state.away = None;
            info!("ready again");
        }
    }

    /// The service may be gone: it is asked before it is called ready again.
    pub(super) fn doubt(&self) {
        self.state().doubted = true;
    }

    /// The service was asked in vain. Evidence that was refused stays so until other evidence is accepted: that there is
    /// none at the moment does not make it better.
    pub(super) fn failed(&self, refusal: Refusal) {
        let mut state = self.state();
        let refusal = match state.away.take() {
            Some(away) if away.unverified() && refusal.code != NOT_VERIFIED => away.refusal,
            Some(_) => refusal,
            None => {
                let (code, reason) = (refusal.code, &refusal.message);
                warn!(code, %reason, last_answer = %state.answered, "not ready");
                refusal
            }
        };
        state.away = Some(Away {
            refusal,
            asked_at: Instant::now(),
        });
    }

    /// The service was asked, with this result. Returns what that makes of all that is known.
    pub(super) fn asked(&self, result: Result<(), Refusal>) -> Result<(), Refusal> {
        if let Err(refusal) = result {
            self.failed(refusal);
        }
        let mut state = self.state();
        state.asked_at = Some(Instant::now());
        match &state.away {
            Some(away) => Err(away.refusal.clone()),
            None => Ok(()),
        }
    }

    /// When the service last answered.
    pub(super) fn last_answer(&self) -> UnixTime {
        self.state().answered
    }

    /// Whether only a verification can make it ready.
    pub(super) fn unverified(&self) -> bool {
        self.state().away.as_ref().is_some_and(Away::unverified)
    }

    /// What needs no new question: that the service is there, or what it was found to be a moment ago.
    pub(super) fn known(&self) -> Option<Result<(), Refusal>> {
        let state = self.state();
        let Some(away) = &state.away else {
            let fresh = !state.doubted && state.answered_at.elapsed() < self.pace.fresh;
            let asked = |at: Instant| at.elapsed() < self.pace.pause;
            return (fresh || state.asked_at.is_some_and(asked)).then_some(Ok(()));
        };
        let pause = match away.costs_evidence() {
            true => self.pace.verify_pause,
            false => self.pace.pause,
        };
        (away.asked_at.elapsed() < pause).then(|| Err(away.refusal.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
