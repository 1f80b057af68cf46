//! A service at a URL, and its verification over a fresh nonce: the part of `verify` and `proxy`
//! that has a network and a clock. What is accepted is decided in `casemate_channel::verify`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use casemate_attest::{Denial, Policy, Transcript, UnixTime};
use casemate_channel::keyset::{ChannelBinding, KeysetDigest};
use casemate_channel::ohttp::{GATEWAY_PATH, KEYSET_HINT, REQUEST_MEDIA_TYPE};
use casemate_channel::receipt::SavedAttestation;
use casemate_channel::tls::URL_SCHEME;
use casemate_channel::verify::{
    AttestationResponse, Challenge, MAX_RESPONSE, VerifiedService, verify_connection,
    verify_service,
};
use reqwest::{Certificate, Client, Response, StatusCode, Url, header, redirect};
use tokio_rustls::rustls;

use crate::direct::{ConnectError, Direct, DirectBody, SendError, Verified};
use crate::exit::{Class, Failure};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const ATTESTATION_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest silence of a service that is answering: the prefill of a long prompt is silent.
const READ_TIMEOUT: Duration = Duration::from_secs(600);

/// What tells the time; a test has its own.
pub(crate) type Clock = Arc<dyn Fn() -> UnixTime + Send + Sync>;

/// A service that is asked for evidence and sent requests.
pub(crate) struct Service {
    way: Way,
    url: Url,
    policy: Policy,
    clock: Clock,
}

/// How a service is reached.
enum Way {
    /// Requests are encrypted to its key, whoever carries them.
    Encrypted(Client),
    /// On connections that end inside the enclave.
    Direct(Arc<Direct>),
}

/// For how long a verification holds: until a moment of the clock on the wall, and for a span of the one that is never
/// set.
pub(crate) struct Holding {
    until: UnixTime,
    since: Instant,
    lifetime: Duration,
}

impl Holding {
    /// Of a verification whose nonce was made at `began`, which was at `started` by the other clock.
    pub(crate) fn of(service: &VerifiedService, began: UnixTime, started: Instant) -> Holding {
        Holding {
            until: service.valid_until(),
            since: started,
            lifetime: service.valid_until().saturating_since(began),
        }
    }

    /// What is left of it. The wall clock counts a suspended machine's sleep, the monotonic one does not care if the
    /// other is set back: the shorter answer counts.
    pub(crate) fn remaining(&self, now: UnixTime) -> Duration {
        let by_wall = self.until.saturating_since(now);
        let by_passing = self.lifetime.saturating_sub(self.since.elapsed());
        by_wall.min(by_passing)
    }
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
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NotVerified {
    #[error("unreachable: {0}")]
    Unreachable(String),
    #[error("{0}")]
    Denied(Denial),
}

/// Why a request on a verified connection has no answer.
#[derive(Debug)]
pub(crate) enum DirectError {
    /// There is no such connection.
    NotVerified(NotVerified),
    /// The request may have been served.
    Failed(String),
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
        if let Some(authority) = direct_authority(&url) {
            if ca.is_some() {
                let error = anyhow!("--ca is for https: over tls, evidence vouches for the key");
                return Err(Failure::new(Class::Usage, "ca", error));
            }
            let direct = Direct::new(&authority)
                .map_err(|error| Failure::io(anyhow!("cannot prepare TLS: {error}")))?;
            return Ok(Service {
                way: Way::Direct(Arc::new(direct)),
                url,
                policy,
                clock,
            });
        }
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
            way: Way::Encrypted(client),
            url,
            policy,
            clock,
        })
    }

    /// Connections to the enclave itself, if that is how the service is reached.
    pub(crate) fn direct(&self) -> Option<&Arc<Direct>> {
        match &self.way {
            Way::Direct(direct) => Some(direct),
            Way::Encrypted(_) => None,
        }
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
        match &self.way {
            Way::Encrypted(client) => self.verify_key(client).await,
            Way::Direct(direct) => {
                let (verification, connection) = self.verify_new(direct).await?;
                // The next request finds it.
                connection.into_iter().for_each(|c| direct.keep(c));
                Ok(verification)
            }
        }
    }

    /// Makes a connection and verifies it; it may be used if that succeeded.
    async fn verify_new(
        &self,
        direct: &Direct,
    ) -> Result<(Verification, Option<Verified>), NotVerified> {
        let (began, started) = (self.now(), Instant::now());
        let challenge =
            Challenge::new(began).map_err(|e| NotVerified::Unreachable(e.to_string()))?;
        let asking = async {
            let mut connection = direct.connect().await?;
            let path = challenge.path_and_query();
            let json = connection.get(&path, MAX_RESPONSE).await;
            let json = json.map_err(ConnectError::Unreachable)?;
            Ok((connection, json))
        };
        let late = |_| {
            Err(ConnectError::Unreachable(format!(
                "no answer in {ATTESTATION_TIMEOUT:?}"
            )))
        };
        let asked = tokio::time::timeout(ATTESTATION_TIMEOUT, asking)
            .await
            .unwrap_or_else(late);
        let verification = |transcript, outcome, attestation| Verification {
            transcript,
            outcome,
            attestation,
            began,
            started,
        };
        let denied = |denial: Denial| {
            let mut transcript = Transcript::new();
            transcript.fail(&denial);
            (verification(transcript, Err(denial), None), None)
        };
        let (connection, json) = match asked {
            Ok(asked) => asked,
            Err(ConnectError::Unreachable(reason)) => return Err(self.unreachable(&reason)),
            Err(ConnectError::Handshake(found)) => {
                return Ok(denied(Denial::not_genuine(
                    "tls.handshake",
                    found,
                    "a full TLS 1.3 handshake with X25519MLKEM768, signed by the key that the service shows",
                    "check that the port is that of the enclave's attested TLS, and that nothing in between ends TLS",
                )));
            }
        };
        let response = match AttestationResponse::from_json(&json) {
            Ok(response) => response,
            Err(denial) => return Ok(denied(denial)),
        };
        let (handshake, verified_at) = (&connection.handshake, self.now());
        let (transcript, outcome) =
            verify_connection(&response, &challenge, handshake, &self.policy, verified_at);
        let attestation = SavedAttestation {
            response,
            challenge,
            binding: handshake.binding(),
            verified_at,
        };
        let holding = outcome
            .as_ref()
            .ok()
            .map(|service| Holding::of(service, began, started));
        let connection = holding.map(|holding| connection.verified(holding));
        let verification = verification(transcript, outcome, Some(attestation));
        Ok((verification, connection))
    }

    /// Sends a request on a verified connection: one that waits for it, or a new one, whose verification comes with the
    /// answer.
    pub(crate) async fn send_direct(
        &self,
        direct: &Arc<Direct>,
        mut request: http::Request<Bytes>,
    ) -> Result<(http::Response<DirectBody>, Option<Verification>), DirectError> {
        loop {
            let mut made = None;
            let waiting = direct.take(self.now());
            let waited = waiting.is_some();
            let connection = match waiting {
                Some(connection) => connection,
                None => {
                    let verified = self.verify_new(direct).await;
                    let (verification, connection) = verified.map_err(DirectError::NotVerified)?;
                    match (connection, &verification.outcome) {
                        (Some(connection), Ok(_)) => {
                            made = Some(verification);
                            connection
                        }
                        (_, Err(denial)) => {
                            let denied = NotVerified::Denied(denial.clone());
                            return Err(DirectError::NotVerified(denied));
                        }
                        (None, Ok(_)) => unreachable!("a verified connection is given out"),
                    }
                }
            };
            match direct.send(connection, request).await {
                Ok(answer) => return Ok((answer, made)),
                // The connection was closed while it waited.
                Err(SendError::NotSent(unsent)) if waited => request = *unsent,
                Err(SendError::NotSent(_)) => {
                    return Err(DirectError::Failed(self.about("the connection was closed")));
                }
                Err(SendError::Failed(reason)) => {
                    return Err(DirectError::Failed(self.about(&reason)));
                }
            }
        }
    }

    async fn verify_key(&self, client: &Client) -> Result<Verification, NotVerified> {
        let (began, started) = (self.now(), Instant::now());
        let challenge =
            Challenge::new(began).map_err(|e| NotVerified::Unreachable(e.to_string()))?;
        let json = tokio::time::timeout(ATTESTATION_TIMEOUT, self.ask(client, &challenge))
            .await
            .unwrap_or_else(|_| Err(format!("no answer in {ATTESTATION_TIMEOUT:?}")))
            .map_err(|reason| self.unreachable(&reason))?;
        let verified_at = self.now();
        let (transcript, outcome, attestation) = match AttestationResponse::from_json(&json) {
            Ok(response) => {
                let (transcript, outcome) =
                    verify_service(&response, &challenge, &self.policy, verified_at);
                let attestation = SavedAttestation {
                    response,
                    challenge,
                    binding: ChannelBinding::Key,
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

    /// Nobody answered there as a service does.
    fn unreachable(&self, reason: &str) -> NotVerified {
        NotVerified::Unreachable(self.about(reason))
    }

    async fn ask(&self, client: &Client, challenge: &Challenge) -> Result<Vec<u8>, String> {
        let url = self.join(&challenge.path_and_query());
        let mut response = client.get(url).send().await.map_err(describe)?;
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
        let Way::Encrypted(client) = &self.way else {
            return Err("requests over tls are not encrypted once more".to_owned());
        };
        client
            .post(self.join(GATEWAY_PATH))
            .header(header::CONTENT_TYPE, REQUEST_MEDIA_TYPE)
            .header(KEYSET_HINT, keyset.to_string())
            .body(encapsulated)
            .send()
            .await
            .map_err(|error| self.about(&describe(error)))
    }

    /// What went wrong, and where.
    fn about(&self, reason: &str) -> String {
        format!("{}: {reason}", self.url)
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

/// The URL of a service, with hints about what people mistake for one. It is shown in logs and error messages, so it
/// holds no secret; nor is a text shown that may hold one.
fn parse_url(text: &str) -> Result<Url, Failure> {
    if holds_credentials(text) {
        let error = anyhow!(
            "the service's URL holds a user name or a password (what is before the @), which logs and error messages \
             would show; give the URL without them"
        );
        return Err(Failure::new(Class::Usage, "url", error));
    }
    let unusable = |why: String| Failure::new(Class::Usage, "url", anyhow!("{text:?} {why}"));
    if !text.contains("://") && !text.is_empty() {
        let why = format!("has no scheme; do you mean http://{text} or https://{text}?");
        return Err(unusable(why));
    }
    let usable = |url: &Url| match url.scheme() {
        "http" | "https" => url.query().is_none(),
        URL_SCHEME => direct_authority(url).is_some(),
        _ => false,
    };
    let url = Url::parse(text).ok().filter(usable);
    let url =
        url.ok_or_else(|| unusable("is not the http, https or tls URL of a service".into()))?;
    let segments = url.path().split('/').collect::<Vec<_>>();
    if let Some(at) = segments.iter().position(|segment| *segment == "v1") {
        let mut base = url.clone();
        base.set_path(&segments[..at].join("/"));
        let why = format!("is inside the API; give the service's base URL, {base}");
        return Err(unusable(why));
    }
    Ok(url)
}

/// Whether a text has the user name or the password of a URL, or may have one if it is no URL.
fn holds_credentials(text: &str) -> bool {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    let mut parts = rest.split(['/', '?', '#']);
    let in_authority = parts.next().is_some_and(|part| part.contains('@'));
    match Url::parse(text) {
        Ok(url) => in_authority || !url.username().is_empty() || url.password().is_some(),
        Err(_) => text.contains('@'),
    }
}

/// `HOST:PORT` of a URL of [`URL_SCHEME`] that names nothing else.
fn direct_authority(url: &Url) -> Option<String> {
    let plain = url.scheme() == URL_SCHEME
        && matches!(url.path(), "" | "/")
        && url.query().is_none()
        && url.fragment().is_none();
    let (host, port) = (url.host_str()?, url.port()?);
    (plain && !host.is_empty()).then(|| format!("{host}:{port}"))
}

/// An error with its causes and without the URL, which the caller knows.
fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut no_tls = false;
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        no_tls |= matches!(of_tls(error), Some(rustls::Error::InvalidMessage(_)));
        cause = error.source();
    }
    if no_tls {
        text.push_str("; does it speak http instead of https?");
    }
    text
}

/// What TLS says that errors of input and output are wrapped around.
fn of_tls<'a>(mut error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    while let Some(inner) = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref)
    {
        error = inner;
    }
    error.downcast_ref()
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
        for good in ["tls://a:1", "tls://10.0.0.1:8443/", "tls://[::1]:1"] {
            let service = Service::with_clock(good, policy(), None, clock.clone()).unwrap();
            assert!(service.direct().is_some(), "{good}");
        }
        for bad in [
            "ftp://a",
            "a:1",
            "",
            "http://a/?q=1",
            "http://a:1/v1",
            "tls://a",
            "tls://a:1/path",
            "tls://a:1?q",
            "tls://u@a:1",
            "tls://:1",
        ] {
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

    #[test]
    fn a_url_with_a_user_name_or_a_password_is_refused_and_not_shown() {
        for bad in [
            "http://hunter2@a",
            "https://me:hunter2@a.example/x",
            "https://:hunter2@a.example",
            "https://me:hunter2@a.example/v1",
            "tls://me:hunter2@a:1",
            "ftp://me:hunter2@a",
            "http:/me:hunter2@a",
            "me:hunter2@a:8090",
            "hunter2@a",
            "https://me:hunter2/@a",
        ] {
            let failure = parse_url(bad).unwrap_err();
            let said = format!("{failure:?}");
            assert!(said.contains("a user name or a password"), "{bad}: {said}");
            assert!(!said.contains("hunter2"), "{bad}: {said}");
            assert!(said.contains("Usage"), "{bad}: {said}");
        }
        assert!(parse_url("https://a.example/@team").is_ok());
    }
}
