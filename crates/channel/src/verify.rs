//! The user's verification of a service: evidence over the user's own nonce, the keyset it vouches
//! for, the credential that says whose service it is, and the user's policy about all of them.
//!
//! [`verify_service`] and [`verify_connection`] are the only ways to a [`VerifiedService`] that requests may be sent to.
//! After the former, a request is encrypted to the key that it holds; after the latter, it is sent on the connection that
//! was verified. Fetching the answer and keeping it fresh is the caller's part. What a user kept is judged again by
//! [`crate::receipt::verify_bundle`].

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::{
    Appraised, Denial, Evidence, MAX_EVIDENCE_JSON, Policy, Transcript, UnixTime, appraise,
};
use casemate_container::signing::VerifyingKey;
use casemate_release::credential::{
    CLOCK_SKEW_SECONDS, Credential, MAX_CREDENTIAL_BYTES, VerifiedCredential, claimed_issuer,
};
use casemate_release::{Refused, ReleaseError};
use serde::{Deserialize, Serialize};

use crate::keyset::{
    self, ChannelBinding, Keyset, KeysetDigest, MAX_ENCODED as MAX_KEYSET, Purpose, Role,
};
use crate::ohttp::Recipient;
use crate::tls::Handshake;

/// Where a service answers with its evidence, relative to its URL; the query is
/// `nonce=` and 64 hexadecimal digits.
pub const ATTESTATION_PATH: &str = "/v1/attestation";
/// The largest answer that is looked at.
pub const MAX_RESPONSE: usize = MAX_EVIDENCE_JSON + 2 * (MAX_KEYSET + MAX_CREDENTIAL_BYTES) + 1024;

/// A nonce of the user's own, and when it was made. Evidence is as old as its nonce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    nonce: [u8; 32],
    issued_at: UnixTime,
}

/// The system gave no randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no randomness")]
pub struct NoRandomness;

impl Challenge {
    /// A fresh random nonce.
    ///
    /// # Errors
    /// [`NoRandomness`].
    pub fn new(now: UnixTime) -> Result<Challenge, NoRandomness> {
        let mut nonce = [0; 32];
        rand::fill(&mut nonce).map_err(|_| NoRandomness)?;
        Ok(Challenge::from_parts(nonce, now))
    }

    /// A nonce that was made elsewhere.
    pub const fn from_parts(nonce: [u8; 32], issued_at: UnixTime) -> Challenge {
        Challenge { nonce, issued_at }
    }

    /// The nonce.
    pub fn nonce(&self) -> &[u8; 32] {
        &self.nonce
    }

    /// When it was made.
    pub fn issued_at(&self) -> UnixTime {
        self.issued_at
    }

    /// The path and query to ask a service for evidence over this nonce.
    pub fn path_and_query(&self) -> String {
        format!("{ATTESTATION_PATH}?nonce={}", hex::encode(self.nonce))
    }
}

/// A service's answer to a challenge. Nothing of it is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttestationResponse {
    /// Evidence over the keyset and the nonce.
    pub evidence: Evidence,
    /// The encoded keyset.
    pub keyset: Vec<u8>,
    /// The encoded deployment credential.
    pub credential: Vec<u8>,
}

/// The JSON form, as it is read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WireResponse {
    evidence: Evidence,
    keyset: String,
    credential: String,
}

#[derive(Serialize)]
struct WireOut<'a> {
    evidence: &'a Evidence,
    keyset: String,
    credential: String,
}

impl AttestationResponse {
    /// Reads `{"evidence": {…}, "keyset": "<base64>", "credential": "<base64>"}`.
    ///
    /// # Errors
    /// A [`Denial`] of class malformed.
    pub fn from_json(json: &[u8]) -> Result<AttestationResponse, Denial> {
        if json.len() > MAX_RESPONSE {
            return Err(malformed(format!("{} bytes", json.len())));
        }
        AttestationResponse::from_wire(
            serde_json::from_slice(json).map_err(|e| malformed(e.to_string()))?,
        )
    }

    /// What a JSON document that was read holds, within its limits.
    pub(crate) fn from_wire(wire: WireResponse) -> Result<AttestationResponse, Denial> {
        wire.evidence.check_limits()?;
        let decode = |field: &str, text: &str, limit: usize| match STANDARD.decode(text) {
            Ok(bytes) if bytes.len() <= limit => Ok(bytes),
            Ok(bytes) => Err(malformed(format!("a {field} of {} bytes", bytes.len()))),
            Err(_) => Err(malformed(format!("a {field} that is not base64"))),
        };
        Ok(AttestationResponse {
            evidence: wire.evidence,
            keyset: decode("keyset", &wire.keyset, MAX_KEYSET)?,
            credential: decode("credential", &wire.credential, MAX_CREDENTIAL_BYTES)?,
        })
    }

    /// The document that [`AttestationResponse::from_json`] reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&self.to_wire())
            .expect("strings and byte strings always have a JSON form")
    }

    /// The same document, as part of another.
    pub(crate) fn to_wire(&self) -> impl Serialize {
        WireOut {
            evidence: &self.evidence,
            keyset: STANDARD.encode(&self.keyset),
            credential: STANDARD.encode(&self.credential),
        }
    }
}

fn malformed(found: String) -> Denial {
    Denial::malformed(
        "response.structure",
        found,
        "a JSON object with evidence, keyset and credential",
        "check that the URL is that of a Casemate enclave and that nothing alters its answers",
    )
}

/// Proof that a service was verified and that the user's policy accepts it. Only [`verify_service`] and
/// [`verify_connection`] make one, and [`crate::receipt::verify_bundle`] for who looks back.
#[derive(Clone, Debug)]
pub struct VerifiedService {
    recipient: Recipient,
    keyset: Keyset,
    keyset_digest: KeysetDigest,
    issuer: VerifyingKey,
    credential: Credential,
    appraised: Appraised,
    valid_until: UnixTime,
}

impl VerifiedService {
    /// The key that requests are encrypted to.
    pub fn recipient(&self) -> &Recipient {
        &self.recipient
    }

    /// The key under which the service signs receipts.
    pub fn receipt_key(&self) -> VerifyingKey {
        VerifyingKey::from_bytes(self.keyset.receipt_key)
    }

    /// What the service serves, and under which keys.
    pub fn keyset(&self) -> &Keyset {
        &self.keyset
    }

    /// Digest of the encoded keyset.
    pub fn keyset_digest(&self) -> &KeysetDigest {
        &self.keyset_digest
    }

    /// The issuer that the user's policy pins, who signed the credential.
    pub fn issuer(&self) -> &VerifyingKey {
        &self.issuer
    }

    /// What the issuer says about it.
    pub fn credential(&self) -> &Credential {
        &self.credential
    }

    /// What the evidence shows; under a development root, that this is **not a TEE**.
    pub fn appraised(&self) -> &Appraised {
        &self.appraised
    }

    /// From this moment on nothing may be sent to the service without verifying it again: the first
    /// of the ends of keyset, credential and collateral, and of the age that the policy allows.
    pub fn valid_until(&self) -> UnixTime {
        self.valid_until
    }
}

/// The checks this room adds to those of the appraisal, in order.
const CHECKS: [&str; 15] = [
    "keyset.structure",
    "keyset.ohttp_config",
    "keyset.validity",
    "credential.structure",
    "credential.issuer",
    "credential.signature",
    "credential.validity",
    "credential.keyset",
    "credential.model",
    "credential.service",
    "credential.policy_version",
    "model.digest",
    "model.version",
    "model.adapters",
    "freshness",
];

/// Decides whether `response` answers `challenge` and shows a service that `policy` accepts at `now`.
///
/// Pure: the same arguments give the same answer, always. The transcript holds every check of the
/// appraisal and of this room; the denial is the first that failed.
pub fn verify_service(
    response: &AttestationResponse,
    challenge: &Challenge,
    policy: &Policy,
    now: UnixTime,
) -> (Transcript, Result<VerifiedService, Denial>) {
    let judge = Judge::continuing(Transcript::new());
    judge.verify(response, challenge, &ChannelBinding::Key, policy, now)
}

/// As [`verify_service`], for a service at the other end of a TLS connection: evidence has to vouch for the key that
/// the handshake proved, and for this connection, so requests may be sent on it and on no other.
pub fn verify_connection(
    response: &AttestationResponse,
    challenge: &Challenge,
    handshake: &Handshake,
    policy: &Policy,
    now: UnixTime,
) -> (Transcript, Result<VerifiedService, Denial>) {
    let mut judge = Judge::continuing(Transcript::new());
    judge.tls_key(&response.keyset, handshake);
    judge.verify(response, challenge, &handshake.binding(), policy, now)
}

/// Judges again what was judged when it was fresh: evidence over this binding. The handshake is gone, so whose connection
/// it was is not judged, and shown as skipped.
pub(crate) fn verify_bound(
    response: &AttestationResponse,
    challenge: &Challenge,
    binding: &ChannelBinding,
    policy: &Policy,
    now: UnixTime,
) -> (Transcript, Result<VerifiedService, Denial>) {
    let mut judge = Judge::continuing(Transcript::new());
    if let ChannelBinding::TlsExporter(_) = binding {
        let why = "only who made the connection saw the key at its end";
        judge.skip("tls.key", "", why);
    }
    judge.verify(response, challenge, binding, policy, now)
}

/// Every path without a service records a denial; this stands in for one that a change forgot.
fn unexplained() -> Denial {
    Denial::not_genuine(
        "verification",
        "a refusal that no check explains",
        "a service that every check accepts",
        "report this as a defect of Casemate",
    )
}

/// Makes checks, remembers the first that failed.
pub(crate) struct Judge {
    transcript: Transcript,
    first: Option<Denial>,
}

impl Judge {
    fn verify(
        mut self,
        response: &AttestationResponse,
        challenge: &Challenge,
        binding: &ChannelBinding,
        policy: &Policy,
        now: UnixTime,
    ) -> (Transcript, Result<VerifiedService, Denial>) {
        let digest = KeysetDigest::of(&response.keyset);
        let expected = keyset::report_data(
            Purpose::Serving,
            Role::Service,
            &digest,
            &challenge.nonce,
            binding,
        );
        let appraisal = appraise(&response.evidence, &expected, policy, now);
        self.transcript.append(appraisal.transcript);
        let outcome = match appraisal.outcome {
            Err(denial) => {
                self.stop(denial);
                None
            }
            Ok(appraised) => self.service(response, digest, challenge, policy, now, appraised),
        };
        self.conclude(outcome, &CHECKS)
    }

    /// Goes on where another judge ended without a denial.
    pub(crate) fn continuing(transcript: Transcript) -> Judge {
        Judge {
            transcript,
            first: None,
        }
    }

    /// Takes over a denial that the transcript shows already.
    pub(crate) fn stop(&mut self, denial: Denial) {
        self.first.get_or_insert(denial);
    }

    /// The verdict: `proof` if nothing was denied. Those of `checks` that were not made are shown as skipped.
    pub(crate) fn conclude<T>(
        self,
        proof: Option<T>,
        checks: &[&'static str],
    ) -> (Transcript, Result<T, Denial>) {
        let Judge {
            mut transcript,
            first,
        } = self;
        match (first, proof) {
            (None, Some(proof)) => (transcript, Ok(proof)),
            (first, _) => {
                let denial = first.unwrap_or_else(unexplained);
                for name in checks {
                    if !transcript.checks().iter().any(|check| check.name == *name) {
                        transcript.skip(name, "", format!("not reached: {} failed", denial.claim));
                    }
                }
                (transcript, Err(denial))
            }
        }
    }

    pub(crate) fn pass(
        &mut self,
        claim: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.transcript.pass(claim, found, expected);
    }

    pub(crate) fn skip(&mut self, claim: &'static str, found: &str, why: &str) {
        self.transcript.skip(claim, found, why);
    }

    /// Before everything else, because a connection that ends elsewhere is the reason why evidence that is relayed over
    /// it does not fit.
    fn tls_key(&mut self, keyset: &[u8], handshake: &Handshake) {
        let claim = "tls.key";
        let key = hex::encode(handshake.key_digest());
        let found = match Keyset::decode(keyset) {
            // Its structure is judged after the evidence.
            Err(_) => "a keyset that cannot be read".to_owned(),
            Ok(keyset) => match keyset.tls_key_digest {
                None => "a keyset without a TLS key".to_owned(),
                Some(digest) => hex::encode(digest),
            },
        };
        if found == key {
            self.transcript
                .pass(claim, found, "the key of this connection");
            return;
        }
        self.deny(Denial::not_genuine(
            claim,
            found,
            format!("{key}, the key of this connection"),
            "somebody between you and the enclave ends the connection: reach the enclave directly, or use its https URL, \
             where gateways may end TLS",
        ));
    }

    pub(crate) fn deny(&mut self, denial: Denial) {
        self.transcript.fail(&denial);
        self.first.get_or_insert(denial);
    }

    pub(crate) fn check(
        &mut self,
        claim: &'static str,
        holds: bool,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: &str,
    ) {
        if holds {
            self.transcript.pass(claim, found, expected);
        } else {
            self.deny(Denial::refused(claim, found, expected, remedy));
        }
    }

    fn service(
        &mut self,
        response: &AttestationResponse,
        keyset_digest: KeysetDigest,
        challenge: &Challenge,
        policy: &Policy,
        now: UnixTime,
        appraised: Appraised,
    ) -> Option<VerifiedService> {
        let keyset = self.keyset(&response.keyset)?;
        let recipient = self.recipient(&keyset)?;
        self.keyset_validity(&keyset, now);

        let (service, model) = match (policy.service(), policy.model()) {
            (Ok(service), Ok(model)) => (service, model),
            (Err(denial), _) | (_, Err(denial)) => {
                self.deny(denial);
                return None;
            }
        };
        let issuer = VerifyingKey::from_bytes(service.issuer);
        let credential = self.credential(&response.credential, &issuer, now)?;
        self.check(
            "credential.keyset",
            credential.keyset_digest == keyset_digest.0,
            hex::encode(credential.keyset_digest),
            keyset_digest.to_string(),
            "the issuer vouches for another keyset; ask the service for a credential of its own",
        );
        self.credential_model(&credential, &keyset);
        self.check(
            "credential.service",
            credential.service == service.name,
            &credential.service,
            &service.name,
            "use the URL of the service that the policy names, or correct the name in the policy",
        );
        self.check(
            "credential.policy_version",
            credential.policy_version >= policy.version(),
            format!("issued under policy version {}", credential.policy_version),
            format!("at least {}", policy.version()),
            "the issuer still works with an older policy; ask its operator to update it",
        );

        self.check(
            "model.digest",
            model.digests.contains(&keyset.model_digest),
            hex::encode(keyset.model_digest),
            model
                .digests
                .iter()
                .map(hex::encode)
                .collect::<Vec<_>>()
                .join(" or "),
            "the service serves another model; list its digest in the policy if you accept it",
        );
        self.check(
            "model.version",
            keyset.model_version >= model.minimum_version,
            keyset.model_version.to_string(),
            format!("at least {}", model.minimum_version),
            "the service serves a model that the policy considers too old; ask for the newer one",
        );
        self.check(
            "model.adapters",
            keyset
                .adapter_digests
                .iter()
                .all(|adapter| model.adapters.contains(adapter)),
            listed(&keyset.adapter_digests),
            format!("of these only: {}", listed(&model.adapters)),
            "the service applies other adapters; list their digests in the policy if you accept them",
        );

        let age = now.saturating_since(challenge.issued_at).as_secs();
        let maximum = service.maximum_evidence_age_seconds;
        self.check(
            "freshness",
            age < maximum,
            format!("{age} seconds since the nonce"),
            format!("less than {maximum}"),
            "ask again; if it stays so, somebody holds answers back",
        );
        if self.first.is_some() {
            return None;
        }
        let fresh_until = challenge.issued_at.as_secs().saturating_add(maximum);
        let valid_until = [
            fresh_until,
            keyset.expires_at,
            credential.expires_at,
            appraised.claims().collateral_valid_until.as_secs(),
        ]
        .into_iter()
        .min()
        .map(UnixTime::from_secs)?;
        Some(VerifiedService {
            recipient,
            keyset,
            keyset_digest,
            issuer,
            credential,
            appraised,
            valid_until,
        })
    }

    fn keyset(&mut self, encoded: &[u8]) -> Option<Keyset> {
        match Keyset::decode(encoded) {
            Ok(keyset) => {
                let found = format!("{}, {}", keyset.model_name, keyset.compute);
                self.transcript
                    .pass("keyset.structure", found, "a keyset of format 1");
                Some(keyset)
            }
            Err(error) => {
                self.deny(Denial::malformed(
                    "keyset.structure",
                    error.to_string(),
                    "a keyset of format 1",
                    "the service speaks another version of the protocol; update one of the two",
                ));
                None
            }
        }
    }

    fn recipient(&mut self, keyset: &Keyset) -> Option<Recipient> {
        match Recipient::from_config(&keyset.ohttp_config) {
            Ok(recipient) => {
                let found = format!("key {}", recipient.key_id());
                let expected = "one key for X-Wing, HKDF-SHA256 and AES-128-GCM";
                self.transcript.pass("keyset.ohttp_config", found, expected);
                Some(recipient)
            }
            Err(error) => {
                self.deny(Denial::malformed(
                    "keyset.ohttp_config",
                    error.to_string(),
                    "one key for X-Wing, HKDF-SHA256 and AES-128-GCM",
                    "the service speaks another version of the protocol; update one of the two",
                ));
                None
            }
        }
    }

    fn keyset_validity(&mut self, keyset: &Keyset, now: UnixTime) {
        let (from, until) = (keyset.not_before, keyset.expires_at);
        let secs = now.as_secs();
        self.check(
            "keyset.validity",
            from <= secs.saturating_add(CLOCK_SKEW_SECONDS) && secs < until,
            format!(
                "{} to {}",
                UnixTime::from_secs(from),
                UnixTime::from_secs(until)
            ),
            format!("valid at {now}"),
            "check this machine's clock; the service should have rotated its keys",
        );
    }

    fn credential(
        &mut self,
        envelope: &[u8],
        issuer: &VerifyingKey,
        now: UnixTime,
    ) -> Option<Credential> {
        let structure = "credential.structure";
        let malformed = |error: &ReleaseError| {
            Denial::malformed(
                structure,
                error.to_string(),
                "a deployment credential of format 1",
                "the service or its issuer speaks another version; update one of the two",
            )
        };
        let claimed = match claimed_issuer(envelope) {
            Ok(claimed) => VerifyingKey::from_bytes(claimed),
            Err(error) => {
                self.deny(malformed(&error));
                return None;
            }
        };
        let verified = VerifiedCredential::verify(envelope, issuer, now.as_secs());
        if let Err(error @ ReleaseError::Malformed(_)) = &verified {
            self.deny(malformed(error));
            return None;
        }
        self.transcript
            .pass(structure, "format 1", "a deployment credential of format 1");
        self.check(
            "credential.issuer",
            claimed == *issuer,
            claimed.to_string(),
            issuer.to_string(),
            "this may be somebody else's genuine enclave; use the URL that the issuer gave you",
        );
        if claimed != *issuer {
            return None;
        }
        let validity = |from: u64, until: u64| {
            format!(
                "{} to {}",
                UnixTime::from_secs(from),
                UnixTime::from_secs(until)
            )
        };
        let expected = format!("valid at {now}");
        let refused = |found: String| {
            Denial::refused(
                "credential.validity",
                found,
                format!("valid at {now}"),
                "check this machine's clock; the service should have renewed its credential",
            )
        };
        let signature = |judge: &mut Judge| {
            judge
                .transcript
                .pass("credential.signature", "verified", "signed by the issuer");
        };
        match verified {
            Ok(verified) => {
                signature(self);
                let claims = verified.claims().clone();
                let found = validity(claims.issued_at, claims.expires_at);
                self.transcript.pass("credential.validity", found, expected);
                Some(claims)
            }
            Err(ReleaseError::Refused(Refused::Expired { expires_at, .. })) => {
                signature(self);
                self.deny(refused(format!(
                    "until {}",
                    UnixTime::from_secs(expires_at)
                )));
                None
            }
            Err(ReleaseError::Refused(Refused::NotYetValid { issued_at, .. })) => {
                signature(self);
                self.deny(refused(format!("from {}", UnixTime::from_secs(issued_at))));
                None
            }
            Err(error) => {
                self.deny(Denial::not_genuine(
                    "credential.signature",
                    error.to_string(),
                    "signed by the issuer",
                    "somebody altered the credential or claims to be the issuer; do not use this service",
                ));
                None
            }
        }
    }

    fn credential_model(&mut self, credential: &Credential, keyset: &Keyset) {
        let same = *credential.model_digest.as_bytes() == keyset.model_digest
            && credential.model_version == keyset.model_version
            && credential.adapter_digests == keyset.adapter_digests;
        let show = |digest: &[u8; 32], version: u64, adapters: &[[u8; 32]]| {
            let (digest, adapters) = (hex::encode(digest), listed(adapters));
            format!("{digest} version {version} with adapters {adapters}")
        };
        self.check(
            "credential.model",
            same,
            show(
                credential.model_digest.as_bytes(),
                credential.model_version,
                &credential.adapter_digests,
            ),
            show(
                &keyset.model_digest,
                keyset.model_version,
                &keyset.adapter_digests,
            ),
            "the issuer vouches for another model than the enclave serves; do not use this service",
        );
    }
}

/// Digests of adapters in words.
pub(crate) fn listed<'d>(adapters: impl IntoIterator<Item = &'d [u8; 32]>) -> String {
    let all: Vec<String> = adapters.into_iter().map(hex::encode).collect();
    match all.is_empty() {
        true => "none".to_owned(),
        false => all.join(", "),
    }
}
