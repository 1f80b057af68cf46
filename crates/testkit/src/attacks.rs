//! The enemies of a deployment: a list of attacks, each with who must refuse it, and why. They are mounted against the
//! real programs on loopback; the end-to-end tests demand every refusal, the demonstration shows them. An attack that
//! is accepted, or refused by somebody else or for another reason, or ended by a crash or by patience, is a failure.
//!
//! A new attack is a function from a [`Ground`] to a [`Refusal`] and an entry in [`ATTACKS`], with nothing to be added
//! anywhere else.

mod enclaves;
mod evidence;
mod ground;
mod model_files;
mod users;
mod wire;

use std::fmt;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use ground::Ground;

/// One attack.
pub struct Attack {
    /// A short name, to ask for it.
    pub name: &'static str,
    /// What the attacker does, in one line.
    pub what: &'static str,
    /// What must come of it.
    pub expected: Expected,
    mount: fn(&mut Ground) -> Result<Refusal, Miss>,
}

/// The refusal that an attack must meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Who refuses.
    pub by: By,
    /// Whose fault it is: `malformed`, `not_genuine`, `not_authentic`, `refused`…
    pub class: &'static str,
    /// The claim that fails.
    pub claim: &'static str,
    /// How the refusal reaches whoever asked.
    pub verdict: Verdict,
}

/// Who refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The broker, which releases no key.
    Broker,
    /// The enclave: it does not start, or does not answer.
    Enclave,
    /// `casemate proxy`.
    Proxy,
    /// `casemate verify`.
    Verify,
    /// Nobody needs to: what is seen cannot be read.
    Encryption,
}

/// How a refusal reaches whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A program's exit code.
    Exit(i32),
    /// The status of an HTTP answer.
    Http(u16),
    /// An HTTP answer whose body visibly lacks its end.
    Unfinished,
}

/// A refusal as it was met.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Who refused.
    pub by: By,
    /// Whose fault it is.
    pub class: String,
    /// The claim that failed.
    pub claim: String,
    /// What was found.
    pub found: String,
    /// What would have been accepted.
    pub expected: String,
    /// How it was told.
    pub verdict: Verdict,
    /// What was printed, logged or answered, as `casemate explain` reads it.
    pub transcript: String,
}

/// What else can come of an attack.
#[derive(Debug)]
pub enum Miss {
    /// It succeeded.
    Accepted(String),
    /// It could not be mounted, or ended without a verdict: by a crash, or by patience.
    Broken(String),
}

impl<E: std::error::Error> From<E> for Miss {
    fn from(error: E) -> Miss {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        Miss::Broken(text)
    }
}

/// How an attack ended.
#[derive(Debug)]
pub struct Report {
    /// What came of it.
    pub outcome: Result<Refusal, Failure>,
    /// How long it took.
    pub took: Duration,
}

/// An attack did not end as it must.
#[derive(Debug)]
pub enum Failure {
    /// It was accepted: what the attacker got.
    Accepted(String),
    /// It was refused, but not as expected.
    Otherwise(Box<Refusal>),
    /// There was no verdict.
    Broken(String),
}

impl Attack {
    /// Mounts the attack and judges what comes of it.
    pub fn mount(&self, ground: &mut Ground) -> Report {
        let started = Instant::now();
        let outcome = ground.begin(self.name).map_err(Miss::from);
        let outcome = match outcome.and_then(|()| (self.mount)(ground)) {
            Ok(refusal) if refusal.is(&self.expected) => Ok(refusal),
            Ok(refusal) => Err(Failure::Otherwise(Box::new(refusal))),
            Err(Miss::Accepted(what)) => Err(Failure::Accepted(what)),
            Err(Miss::Broken(what)) => Err(Failure::Broken(what)),
        };
        Report {
            outcome,
            took: started.elapsed(),
        }
    }
}

impl Refusal {
    fn is(&self, expected: &Expected) -> bool {
        self.by == expected.by
            && self.class == expected.class
            && self.claim == expected.claim
            && self.verdict == expected.verdict
    }

    /// Reads the denial in a transcript: an object with class, claim, found and expected.
    fn read(by: By, denial: &Value, verdict: Verdict, transcript: String) -> Result<Refusal, Miss> {
        let text = |name: &str| {
            let found = denial[name].as_str().map(str::to_owned);
            found.ok_or_else(|| Miss::Broken(format!("a refusal without {name}: {transcript}")))
        };
        Ok(Refusal {
            by,
            class: text("class")?,
            claim: text("claim")?,
            found: text("found")?,
            expected: text("expected")?,
            verdict,
            transcript,
        })
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            By::Broker => "broker",
            By::Enclave => "enclave",
            By::Proxy => "proxy",
            By::Verify => "verify",
            By::Encryption => "encryption",
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Exit(code) => write!(f, "exit {code}"),
            Verdict::Http(status) => write!(f, "HTTP {status}"),
            Verdict::Unfinished => f.write_str("unfinished"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Accepted(what) => write!(f, "ACCEPTED: {what}"),
            Failure::Otherwise(refusal) => write!(
                f,
                "refused otherwise: by {}, {} ({}, {}): {}",
                refusal.by, refusal.claim, refusal.class, refusal.verdict, refusal.found
            ),
            Failure::Broken(what) => write!(f, "no verdict: {what}"),
        }
    }
}

const fn by(by: By, class: &'static str, claim: &'static str, verdict: Verdict) -> Expected {
    Expected {
        by,
        class,
        claim,
        verdict,
    }
}

// An enclave that does not start says why and exits with the code of its reason, as every program here.
const MALFORMED: Verdict = Verdict::Exit(10);
const NOT_AUTHENTIC: Verdict = Verdict::Exit(20);
const REFUSED: Verdict = Verdict::Exit(30);

/// Every attack, in the order in which a model meets them.
pub const ATTACKS: &[Attack] = &[
    Attack {
        name: "flipped-bit",
        what: "the host flips one bit in a chunk of weights",
        expected: by(By::Enclave, "not_authentic", "chunk", NOT_AUTHENTIC),
        mount: model_files::flipped_bit,
    },
    Attack {
        name: "swapped-chunks",
        what: "the host swaps two chunks of the sealed model",
        expected: by(By::Enclave, "not_authentic", "chunk", NOT_AUTHENTIC),
        mount: model_files::swapped_chunks,
    },
    Attack {
        name: "truncated-file",
        what: "the host cuts the last chunk off",
        expected: by(By::Enclave, "malformed", "truncated", MALFORMED),
        mount: model_files::truncated,
    },
    Attack {
        name: "spliced-chunk",
        what: "the host splices in a chunk of another model sealed under the same key",
        expected: by(By::Enclave, "not_authentic", "chunk", NOT_AUTHENTIC),
        mount: model_files::spliced,
    },
    Attack {
        name: "other-weights",
        what: "a holder of the data key puts other weights behind the provider's manifest",
        expected: by(By::Enclave, "not_authentic", "tensor-digest", NOT_AUTHENTIC),
        mount: model_files::other_weights,
    },
    Attack {
        name: "older-file",
        what: "the host serves the model's former version, sealed by the provider under the same key",
        expected: by(By::Enclave, "refused", "grant.model", REFUSED),
        mount: model_files::older_version,
    },
    Attack {
        name: "older-model",
        what: "the service goes on serving a version that the user's policy considers too old",
        expected: by(By::Verify, "refused", "model.version", Verdict::Exit(30)),
        mount: users::older_version,
    },
    Attack {
        name: "other-image",
        what: "the host starts another enclave image: one byte longer",
        expected: by(By::Broker, "refused", "measurement.mr_td", REFUSED),
        mount: enclaves::other_image,
    },
    Attack {
        name: "other-arguments",
        what: "the host starts the enclave with one more argument than measured",
        expected: by(By::Broker, "refused", "measurement.rtmr1", REFUSED),
        mount: enclaves::other_arguments,
    },
    Attack {
        name: "other-environment",
        what: "the host sets a variable in the enclave's environment",
        expected: by(By::Broker, "refused", "measurement.rtmr2", REFUSED),
        mount: enclaves::other_environment,
    },
    Attack {
        name: "other-configuration",
        what: "the host edits the enclave's configuration after it was measured",
        expected: by(By::Broker, "refused", "measurement.mr_config_id", REFUSED),
        mount: enclaves::other_configuration,
    },
    Attack {
        name: "debug-mode",
        what: "the host starts the right image in a TD that it can debug",
        expected: by(By::Broker, "refused", "debug", Verdict::Http(401)),
        mount: evidence::debug_mode,
    },
    Attack {
        name: "replayed-evidence",
        what: "somebody sends recorded evidence, with its old nonce, to a new session of the broker",
        expected: by(By::Broker, "not_genuine", "nonce", Verdict::Http(401)),
        mount: evidence::replayed_to_broker,
    },
    Attack {
        name: "old-evidence",
        what: "a man in the middle answers a user's fresh nonce with recorded evidence",
        expected: by(By::Verify, "not_genuine", "report_data", Verdict::Exit(20)),
        mount: users::replayed_to_user,
    },
    Attack {
        name: "expired-collateral",
        what: "the host withholds new revocation lists: collateral that expired",
        expected: by(
            By::Broker,
            "not_genuine",
            "collateral.validity",
            Verdict::Http(401),
        ),
        mount: evidence::expired_collateral,
    },
    Attack {
        name: "revoked-platform",
        what: "the evidence comes from a machine whose certificate was revoked",
        expected: by(
            By::Broker,
            "not_genuine",
            "certificates",
            Verdict::Http(401),
        ),
        mount: evidence::revoked_platform,
    },
    Attack {
        name: "revoked-signer",
        what: "the collateral is signed by a key that was revoked",
        expected: by(
            By::Broker,
            "not_genuine",
            "certificates",
            Verdict::Http(401),
        ),
        mount: evidence::revoked_signer,
    },
    Attack {
        name: "substituted-key",
        what: "a man in the middle relays genuine evidence and puts his own key into the keyset",
        expected: by(By::Verify, "not_genuine", "report_data", Verdict::Exit(20)),
        mount: users::substituted_key,
    },
    Attack {
        name: "tls-ended-between",
        what: "a man in the middle ends attested TLS with his own key and relays genuine evidence",
        expected: by(By::Verify, "not_genuine", "tls.key", Verdict::Exit(20)),
        mount: users::tls_ended_between,
    },
    Attack {
        name: "substituted-tls-key",
        what: "he puts that key into the keyset, too: the evidence is of his own connection to the enclave",
        expected: by(By::Verify, "not_genuine", "report_data", Verdict::Exit(20)),
        mount: users::substituted_tls_key,
    },
    Attack {
        name: "reading-relay",
        what: "a man in the middle relays everything as it is and reads along",
        expected: by(
            By::Encryption,
            "unreadable",
            "prompt and answer",
            Verdict::Http(200),
        ),
        mount: users::reading_relay,
    },
    Attack {
        name: "another-provider",
        what: "the user is sent to a genuine enclave, same image and model, of somebody else",
        expected: by(
            By::Verify,
            "refused",
            "credential.issuer",
            Verdict::Exit(30),
        ),
        mount: users::another_provider,
    },
    Attack {
        name: "impostor-key",
        what: "a broker impersonator plants its own key for its own model",
        expected: by(
            By::Enclave,
            "not_authentic",
            "grant.signature",
            NOT_AUTHENTIC,
        ),
        mount: enclaves::impostor_grants,
    },
    Attack {
        name: "impostor-credential",
        what: "a broker impersonator with a stolen grant signs a credential itself",
        expected: by(
            By::Enclave,
            "not_authentic",
            "credential.signature",
            NOT_AUTHENTIC,
        ),
        mount: enclaves::impostor_signs,
    },
    Attack {
        name: "replayed-request",
        what: "somebody sends a recorded encrypted request a second time",
        expected: by(
            By::Enclave,
            "refused",
            "request.replayed",
            Verdict::Http(409),
        ),
        mount: users::replayed_request,
    },
    Attack {
        name: "cut-request",
        what: "somebody cuts an encrypted request short",
        expected: by(
            By::Enclave,
            "not_authentic",
            "request.sealed",
            Verdict::Http(400),
        ),
        mount: users::cut_request,
    },
    Attack {
        name: "cut-answer",
        what: "a man in the middle cuts an answer short",
        expected: by(
            By::Proxy,
            "proxy_error",
            "answer_refused",
            Verdict::Http(502),
        ),
        mount: users::cut_answer,
    },
    Attack {
        name: "cut-stream",
        what: "a man in the middle breaks a streamed answer off in its middle",
        expected: by(
            By::Proxy,
            "proxy_error",
            "answer_refused",
            Verdict::Unfinished,
        ),
        mount: users::cut_stream,
    },
    Attack {
        name: "no-development-root",
        what: "fake evidence is shown to a policy that names no development root",
        expected: by(
            By::Verify,
            "not_genuine",
            "root_of_trust",
            Verdict::Exit(20),
        ),
        mount: users::no_development_root,
    },
];
