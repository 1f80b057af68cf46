//! A service at a URL, and its verification over a fresh nonce: the part of `verify` and `proxy`
//! that has a network and a clock. What is accepted is decided in `casemate_channel::verify`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use casemate_attest::{Denial, Policy, Transcript, UnixTime};
use casemate_channel::keyset::KeysetDigest;
use casemate_channel::ohttp::{GATEWAY_PATH, KEYSET_HINT, REQUEST_MEDIA_TYPE};
use casemate_channel::receipt::SavedAttestation;
use casemate_channel::verify::{
    AttestationResponse, Challenge, MAX_RESPONSE, VerifiedService, verify_service,
};
use reqwest::{Certificate, Client, Response, StatusCode, Url, header, redirect};

use crate::exit::{Class, Failure};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ATTESTATION_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest silence of a service that is answering: the prefill of a long prompt is silent.
const READ_TIMEOUT: Duration = Duration::from_secs(600);

/// What tells the time; a test has its own.
pub(crate) type Clock = Arc<dyn Fn() -> UnixTime + Send + Sync>;

/// A service that is asked for evidence and sent requests.
pub(crate) struct Service {
    client: Client,
    url: Url,
    policy: Policy,
    clock: Clock,
}

/// How a verification went, of a service that answered.
pub(crate) struct Verification {
    /// Every check.
    pub(crate) transcript: Transcript,
    /// What came of it.
    pub(crate) outcome: Result<VerifiedService, Denial>,
    /// What was judged, if it could be read.
    pub(crate) attestation: Option<SavedAttestation>,
    /// When the nonce was made.
    pub(crate) began: UnixTime,
    /// The same moment by the clock that is never set.
    pub(crate) started: Instant,
}

/// Why there is no verified service.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotVerified {
    #[error("unreachable: {0}")]
    Unreachable(String),
    #[error("{0}")]
    Denied(Denial),
}

impl NotVerified {
    /// The failure of a command that needs a verified service.
    pub(crate) fn into_failure(self) -> Failure {
        let (class, code) = match &self {
            NotVerified::Unreachable(_) => (Class::Io, "unreachable"),
            NotVerified::Denied(denial) => match denial.class {
                casemate_attest::Class::Malformed => (Class::Malformed, denial.claim),
                casemate_attest::Class::NotGenuine => (Class::NotAuthentic, denial.claim),
                casemate_attest::Class::Refused => (Class::Refused, denial.claim),
            },
        };
        Failure::new(class, code, self)
    }
}

impl Service {
    /// Prepares to talk to the service at `url`; sends nothing yet.
    pub(crate) fn new(url: &str, policy: Policy, ca: Option<&Path>) -> Result<Service, Failure> {
        // A policy without [service] may be good for a broker; no user can verify anything with it.
        policy
            .service()
            .map_err(|denial| Failure::new(Class::Usage, "policy", denial))?;
        let clock: Clock = Arc::new(|| {
            // A clock before 1970 makes everything look not yet valid, which fails closed.
            UnixTime::try_from(SystemTime::now()).unwrap_or(UnixTime::from_secs(0))
        });
        Service::with_clock(url, policy, ca, clock)
    }

    /// As [`Service::new`], with another clock.
    pub(crate) fn with_clock(
        url: &str,
        policy: Policy,
        ca: Option<&Path>,
        clock: Clock,
    ) -> Result<Service, Failure> {
        let url = parse_url(url)?;
        // Messages are encrypted end to end, so where they go is no secret's concern; but a redirect
        // or a proxy of the environment is never what was asked for.
        let mut builder = Client::builder()
            .redirect(redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .tcp_nodelay(true);
        if let Some(path) = ca {
            let pem = std::fs::read(path)
                .with_context(|| path.display().to_string())
                .map_err(Failure::io)?;
            let certificates = Certificate::from_pem_bundle(&pem)
                .ok()
                .filter(|certificates| !certificates.is_empty())
                .ok_or_else(|| {
                    let error = anyhow!("{} holds no PEM certificates", path.display());
                    Failure::new(Class::Malformed, "ca", error)
                })?;
            builder = builder.tls_certs_only(certificates);
        } else if url.scheme() == "http" {
            // Without certificates to look for, a machine without any can use a plain URL.
            builder = builder.tls_certs_only([]);
        }
        let client = builder
            .build()
            .context("cannot prepare HTTPS")
            .map_err(Failure::io)?;
        Ok(Service {
            client,
            url,
            policy,
            clock,
        })
    }

    /// The service's URL.
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// The policy it is judged by.
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Now.
    pub(crate) fn now(&self) -> UnixTime {
        (self.clock)()
    }

    /// Asks for evidence over a fresh nonce and judges it.
    pub(crate) async fn verify(&self) -> Result<Verification, NotVerified> {
        let (began, started) = (self.now(), Instant::now());
        let challenge =
            Challenge::new(began).map_err(|e| NotVerified::Unreachable(e.to_string()))?;
        let json = tokio::time::timeout(ATTESTATION_TIMEOUT, self.ask(&challenge))
            .await
            .unwrap_or_else(|_| Err(format!("no answer in {ATTESTATION_TIMEOUT:?}")))
            .map_err(NotVerified::Unreachable)?;
        let verified_at = self.now();
        let (transcript, outcome, attestation) = match AttestationResponse::from_json(&json) {
            Ok(response) => {
                let (transcript, outcome) =
                    verify_service(&response, &challenge, &self.policy, verified_at);
                let attestation = SavedAttestation {
                    response,
                    challenge,
                    verified_at,
                };
                (transcript, outcome, Some(attestation))
            }
            Err(denial) => {
                let mut transcript = Transcript::new();
                transcript.fail(&denial);
                (transcript, Err(denial), None)
            }
        };
        Ok(Verification {
            transcript,
            outcome,
            attestation,
            began,
            started,
        })
    }

    async fn ask(&self, challenge: &Challenge) -> Result<Vec<u8>, String> {
        let url = self.join(&challenge.path_and_query());
        let mut response = self.client.get(url).send().await.map_err(describe)?;
        if !response.status().is_success() {
            let status = response.status();
            let hint = match status {
                StatusCode::NOT_FOUND => "; is this the base URL of a service?",
                StatusCode::SERVICE_UNAVAILABLE => "; it may still be starting",
                _ => "",
            };
            return Err(format!("the service answered {status}{hint}"));
        }
        let mut json = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(describe)? {
            // One byte over the limit is enough to be refused as malformed.
            let room = (MAX_RESPONSE + 1).saturating_sub(json.len());
            json.extend_from_slice(&bytes[..bytes.len().min(room)]);
            if room <= bytes.len() {
                break;
            }
        }
        Ok(json)
    }

    /// Sends a request that is encapsulated to a key of `keyset`, and names that keyset, so that any replica of the
    /// service knows where the request belongs.
    pub(crate) async fn send(
        &self,
        encapsulated: Bytes,
        keyset: &KeysetDigest,
    ) -> Result<Response, String> {
        self.client
            .post(self.join(GATEWAY_PATH))
            .header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE)
            .header(KEYSET_HINT, keyset.to_string())
            .body(encapsulated)
            .send()
            .await
            .map_err(describe)
    }

    /// The URL of `path` below the service's URL, which may itself have a path.
    fn join(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(p, q)| (p, Some(q)));
        url.set_path(&format!("{}{path}", self.url.path().trim_end_matches('/')));
        url.set_query(query);
        url
    }
}

/// The URL of a service, with hints about what people mistake for one.
fn parse_url(text: &str) -> Result<Url, Failure> {
    let unusable = |why: String| Failure::new(Class::Usage, "url", anyhow!("{text:?} {why}"));
    if !text.contains("://") && !text.is_empty() {
        let why = format!("has no scheme; do you mean http://{text} or https://{text}?");
        return Err(unusable(why));
    }
    let usable = |url: &Url| matches!(url.scheme(), "http" | "https") && url.query().is_none();
    let url = Url::parse(text).ok().filter(usable);
    let url = url.ok_or_else(|| unusable("is not the http or https URL of a service".into()))?;
    let segments = url.path().split('/').collect::<Vec<_>>();
    if let Some(at) = segments.iter().position(|segment| *segment == "v1") {
        let mut base = url.clone();
        base.set_path(&segments[..at].join("/"));
        let why = format!("is inside the API; give the service's base URL, {base}");
        return Err(unusable(why));
    }
    Ok(url)
}

/// An error with its causes and without the URL, which the caller knows.
fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_go_below_the_path_of_the_url() {
        let policy = || crate::proxy::tests::sample_policy();
        let clock: Clock = Arc::new(|| UnixTime::from_secs(1));
        let join = |url: &str| {
            let service = Service::with_clock(url, policy(), None, clock.clone()).unwrap();
            service.join("/v1/attestation?nonce=00").to_string()
        };
        assert_eq!(join("http://a:1"), "http://a:1/v1/attestation?nonce=00");
        assert_eq!(join("http://a:1/"), "http://a:1/v1/attestation?nonce=00");
        assert_eq!(
            join("http://a/x/y/"),
            "http://a/x/y/v1/attestation?nonce=00"
        );
        for bad in ["ftp://a", "a:1", "", "http://a/?q=1", "http://a:1/v1"] {
            assert!(
                Service::with_clock(bad, policy(), None, clock.clone()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn hints_at_what_was_meant() {
        let said = |url: &str| format!("{:?}", parse_url(url).err().unwrap());
        assert!(said("localhost:8090").contains("http://localhost:8090"));
        let below = said("https://a.example/x/v1/chat/completions");
        assert!(below.contains("base URL, https://a.example/x"), "{below}");
        assert!(parse_url("http://a/v10").is_ok());
    }
}
