//! The enclave's conversations with the key broker: the exchange that brings the model key, and the one that brings a
//! deployment credential. The messages and their checks are `casemate_release`'s; here they are carried.
//!
//! Nothing the broker says is believed for its address: the grant is verified under the provider's key and the
//! credential under the issuer's, and both keys are part of the measured configuration.

use std::sync::Arc;
use std::time::Duration;

use casemate_attest::{Report, ReportData, TeeKind};
use casemate_channel::keyset::{ChannelBinding, KeysetDigest, Purpose, Role, report_data};
use casemate_container::ModelDigest;
use casemate_container::signing::VerifyingKey;
use casemate_release::ReleaseError;
use casemate_release::client::{Attested, Exchange};
use casemate_release::credential::VerifiedCredential;
use casemate_release::grant::VerifiedGrant;
use casemate_release::issuance::{
    CHALLENGE_PATH, CREDENTIAL_PATH, CredentialRequest, CredentialResponse, IssuanceChallenge,
};
use casemate_release::random::SystemRandom;
use casemate_release::rcar::{
    ATTEST_PATH, AUTH_PATH, ErrorInformation, RESOURCE_PATH, ResourcePath,
};
use casemate_release::received::{self, Received};
use casemate_tee::{QuoteProvider, TeeError};
use reqwest::header::{CONTENT_TYPE, COOKIE, SET_COOKIE};
use thiserror::Error;
use tokio::sync::OwnedSemaphorePermit;

use crate::config;

/// Longest reply of a broker that is read, in bytes.
const MAX_REPLY: usize = 1 << 20;
/// Longest time for one request to the broker.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Why the broker did not provide what was asked.
#[derive(Debug, Error)]
pub enum ProvisionError {
    /// It could not be reached, or the connection failed.
    #[error("cannot reach the key broker at {url}: {source}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// It answered, but refused; the text is the broker's own.
    #[error("the key broker refused {what} with status {status}: {}", said(text))]
    Refused {
        /// The step.
        what: &'static str,
        /// HTTP status.
        status: u16,
        /// The broker's words, cut to a bounded length.
        text: String,
    },
    /// It answered more than any valid answer has.
    #[error("the key broker's answer to {0} is too large")]
    TooLarge(&'static str),
    /// What it sent does not hold: malformed, not signed by the configured key, for another model.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// No evidence could be obtained.
    #[error("no evidence: {0}")]
    Tee(#[from] TeeError),
    /// The program is stopping.
    #[error("interrupted")]
    Interrupted,
    /// The broker does not say under which policy it released the key, so no keyset can name it.
    #[error("the broker's token names no policy version: is it Casemate's?")]
    NoPolicyVersion,
    /// The grant is the provider's, but for another adapter than the measured configuration has under this name.
    #[error(
        "the key broker's grant for the adapter {name:?} is for {found}, and the configuration has {expected} under \
         that name"
    )]
    OtherAdapter {
        /// What requests call it.
        name: String,
        /// Digest in the configuration.
        expected: ModelDigest,
        /// Digest in the grant.
        found: ModelDigest,
    },
    /// The credential is valid, but for another keyset or service: somebody between here and the broker exchanged it.
    #[error("the credential is for another keyset or service")]
    OtherCredential,
    /// The evidence describes another configuration than the one in use.
    #[error(
        "the evidence measures another configuration than this process read: the file changed while starting, or the \
         host named another one"
    )]
    ConfigurationNotMeasured,
}

/// A denial in words, of which the detail beside it is a summary; anything else as it is.
fn said(text: &str) -> String {
    let Ok(information) = serde_json::from_str::<ErrorInformation>(text) else {
        return text.to_owned();
    };
    let ErrorInformation { detail, denial, .. } = information;
    match denial {
        None => detail,
        Some(denial) => format!(
            "claim {}: found {}, expected {}; {}",
            denial.claim, denial.found, denial.expected, denial.remedy
        ),
    }
}

/// A broker, and the TEE that speaks for this enclave.
pub struct Provisioner {
    http: reqwest::Client,
    url: String,
    resource: ResourcePath,
    /// In the order of the configuration.
    adapters: Vec<config::Adapter>,
    provider: VerifyingKey,
    issuer: VerifyingKey,
    service: String,
    quoter: Arc<dyn QuoteProvider>,
    configuration: [u8; 48],
}

/// A session in which the broker released the key; credentials can be asked for in it.
pub struct Session {
    attested: Attested,
    /// The grant, verified under the provider's key.
    pub grant: VerifiedGrant,
    /// Those of the adapters, in the order of the configuration.
    pub adapters: Vec<VerifiedGrant>,
    /// As what each came, the model's first: the broker confirms it with the credential.
    received: Vec<Received>,
    /// Version of the broker's policy under which it was released, in the broker's words; the broker compares it again
    /// before it signs a credential.
    pub policy_version: u64,
}

impl Provisioner {
    /// `configuration` is the SHA-384 of the configuration bytes in use.
    pub fn new(
        config: &config::Config,
        configuration: [u8; 48],
        quoter: Arc<dyn QuoteProvider>,
    ) -> Result<Self, reqwest::Error> {
        // No redirects, no proxies from the environment: only the configured address is asked.
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        let broker = &config.broker;
        Ok(Self {
            http,
            url: broker.url.trim_end_matches('/').to_owned(),
            resource: broker.resource.clone(),
            adapters: config.adapters.clone(),
            provider: broker.provider,
            issuer: broker.issuer,
            service: config.service.name.clone(),
            quoter,
            configuration,
        })
    }

    /// Evidence over `report_data`, after comparing what it measures with what this process runs on. A permit is held
    /// until the quote is made, even when nobody waits for it any more: who hangs up must not start more of them.
    pub async fn evidence(
        &self,
        report_data: ReportData,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<casemate_attest::Evidence, ProvisionError> {
        let quoter = Arc::clone(&self.quoter);
        let evidence = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            quoter.quote(&report_data)
        })
        .await
        .map_err(|_| ProvisionError::Interrupted)??;
        // The file is read by this process and measured by somebody else: only if both saw the same bytes do the
        // keys in it deserve trust.
        let measured = evidence
            .unverified_quote()
            .ok()
            .is_some_and(|quote| match quote.report() {
                Report::Td(td) => td.mr_config_id == self.configuration,
                Report::Sgx(_) => false,
            });
        if measured {
            Ok(evidence)
        } else {
            Err(ProvisionError::ConfigurationNotMeasured)
        }
    }

    /// Attests once, and receives the key grants of the model and of all adapters.
    pub async fn obtain_key(&self) -> Result<Session, ProvisionError> {
        let exchange = Exchange::new(TeeKind::Tdx, &SystemRandom)?;
        let response = self.post(AUTH_PATH, None, exchange.request()).await?;
        let cookies: Vec<String> = response
            .headers()
            .get_all(SET_COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok().map(str::to_owned))
            .collect();
        let body = read("the request", response).await?;
        let challenged = exchange.challenge(&body, cookies.iter().map(String::as_str))?;

        let evidence = self.evidence(challenged.report_data(), None).await?;
        let cookie = challenged.cookie();
        let attestation = challenged.attestation(&evidence)?;
        let response = self.post(ATTEST_PATH, Some(&cookie), attestation).await?;
        let attested = challenged.attested(&read("the evidence", response).await?)?;

        let grant = self
            .obtain_grant(&attested, &self.resource, "the key")
            .await?;
        let as_received = |path: &ResourcePath, grant: &VerifiedGrant| Received {
            path: path.clone(),
            sha256: *grant.envelope_sha256(),
        };
        let mut received = vec![as_received(&self.resource, &grant)];
        let mut adapters = Vec::with_capacity(self.adapters.len());
        for adapter in &self.adapters {
            let what = "the key of an adapter";
            let grant = self.obtain_grant(&attested, &adapter.resource, what);
            let grant = of_adapter(adapter, grant.await?)?;
            received.push(as_received(&adapter.resource, &grant));
            adapters.push(grant);
        }
        let policy_version = attested
            .policy_version()
            .ok_or(ProvisionError::NoPolicyVersion)?;
        Ok(Session {
            attested,
            grant,
            adapters,
            received,
            policy_version,
        })
    }

    async fn obtain_grant(
        &self,
        attested: &Attested,
        resource: &ResourcePath,
        what: &'static str,
    ) -> Result<VerifiedGrant, ProvisionError> {
        let url = format!("{}{RESOURCE_PATH}/{resource}", self.url);
        let request = self.http.get(&url).header(COOKIE, attested.cookie());
        let response = request
            .send()
            .await
            .map_err(|source| ProvisionError::Unreachable { url, source })?;
        Ok(attested.grant(&read(what, response).await?, &self.provider)?)
    }

    /// Has the broker sign that `keyset` belongs to its deployment, and with it confirm that each grant of the session is the
    /// one it released as what was asked for; returns the credential's bytes and contents.
    pub async fn obtain_credential(
        &self,
        session: &Session,
        keyset: Vec<u8>,
        now: u64,
    ) -> Result<(Vec<u8>, VerifiedCredential), ProvisionError> {
        let cookie = session.attested.cookie();
        let response = self
            .post(CHALLENGE_PATH, Some(&cookie), b"{}".to_vec())
            .await?;
        let challenge = IssuanceChallenge::parse(&read("the challenge", response).await?)?;
        let nonce = challenge.nonce();
        let digest = KeysetDigest::of(&keyset);
        let binding = report_data(
            Purpose::Credential(received::digest(&session.received)),
            Role::Service,
            &digest,
            &nonce,
            &ChannelBinding::Key,
        );
        let evidence = self.evidence(binding, None).await?;
        let request = CredentialRequest {
            nonce,
            service: self.service.clone(),
            received: session.received.clone(),
            keyset,
            evidence,
        };
        let response = self
            .post(CREDENTIAL_PATH, Some(&cookie), request.to_json()?)
            .await?;
        let envelope = CredentialResponse::parse(&read("the credential", response).await?)?;
        let credential = VerifiedCredential::verify(&envelope, &self.issuer, now)?;
        let claims = credential.claims();
        if claims.keyset_digest != digest.0 || claims.service != self.service {
            return Err(ProvisionError::OtherCredential);
        }
        Ok((envelope, credential))
    }

    async fn post(
        &self,
        path: &str,
        cookie: Option<&str>,
        body: Vec<u8>,
    ) -> Result<reqwest::Response, ProvisionError> {
        let url = format!("{}{path}", self.url);
        let mut request = self
            .http
            .post(&url)
            .header(CONTENT_TYPE, "application/json")
            .body(body);
        if let Some(cookie) = cookie {
            request = request.header(COOKIE, cookie);
        }
        request
            .send()
            .await
            .map_err(|source| ProvisionError::Unreachable { url, source })
    }
}

/// The grant, if it is for the adapter that the configuration has under this name. Which resource an answer is of, only
/// its sender says: who stands between here and the broker can exchange the answers to two requests.
fn of_adapter(
    adapter: &config::Adapter,
    grant: VerifiedGrant,
) -> Result<VerifiedGrant, ProvisionError> {
    if *grant.model_digest() == adapter.digest {
        return Ok(grant);
    }
    Err(ProvisionError::OtherAdapter {
        name: adapter.name.clone(),
        expected: adapter.digest,
        found: *grant.model_digest(),
    })
}

/// Reads a bounded answer; a refusal becomes an error that carries the broker's own words.
async fn read(
    what: &'static str,
    mut response: reqwest::Response,
) -> Result<Vec<u8>, ProvisionError> {
    let status = response.status();
    let url = response.url().to_string();
    let mut body = Vec::new();
    while let Some(piece) =
        response
            .chunk()
            .await
            .map_err(|source| ProvisionError::Unreachable {
                url: url.clone(),
                source,
            })?
    {
        if body.len() + piece.len() > MAX_REPLY {
            return Err(ProvisionError::TooLarge(what));
        }
        body.extend_from_slice(&piece);
    }
    if status.is_success() {
        return Ok(body);
    }
    let text = String::from_utf8_lossy(&body);
    let text = text
        .chars()
        .filter(|c| !c.is_control())
        .take(2000)
        .collect();
    Err(ProvisionError::Refused {
        what,
        status: status.as_u16(),
        text,
    })
}
