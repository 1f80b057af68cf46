//! The offline verification of a kept receipt: the stored attestation is judged by the same code that judged it when it
//! was fresh, as of then; after that the receipt, and the request and answer where somebody has them.

use casemate_attest::{Denial, Policy, Transcript, UnixTime};

use super::{Bundle, Receipt, ReceiptError, SignedReceipt, VerifiedReceipt};
use crate::keyset::ChannelBinding;
use crate::verify::{Judge, VerifiedService, listed, verify_bound};

/// A request as its client sent it.
#[derive(Clone, Copy, Debug)]
pub struct RequestBytes<'a> {
    /// Its method.
    pub method: &'a str,
    /// Its path, with the query if there was one.
    pub target: &'a str,
    /// Its body.
    pub body: &'a [u8],
}

/// What somebody has of the exchange that a receipt is about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exchange<'a> {
    /// The request.
    pub request: Option<RequestBytes<'a>>,
    /// The answer's body, as its client received it.
    pub answer: Option<&'a [u8]>,
}

/// Proof that a bundle was verified and that the policy accepts it. Only [`verify_bundle`] makes one.
#[derive(Clone, Debug)]
pub struct VerifiedExchange {
    service: VerifiedService,
    receipt: VerifiedReceipt,
    request: bool,
    answer: bool,
    binding: ChannelBinding,
    as_of: UnixTime,
}

impl VerifiedExchange {
    /// The service that made the receipt.
    pub fn service(&self) -> &VerifiedService {
        &self.service
    }

    /// What it stated.
    pub fn receipt(&self) -> &Receipt {
        self.receipt.receipt()
    }

    /// Whether the request was at hand and is the one that the receipt is about.
    pub fn covers_request(&self) -> bool {
        self.request
    }

    /// Whether the answer was at hand and is the one that the receipt is about.
    pub fn covers_answer(&self) -> bool {
        self.answer
    }

    /// What the evidence is bound to besides the keyset.
    pub fn binding(&self) -> ChannelBinding {
        self.binding
    }

    /// The time as of which the attestation was judged.
    pub fn as_of(&self) -> UnixTime {
        self.as_of
    }
}

/// The checks this room adds to those of the attestation, in order.
const CHECKS: [&str; 9] = [
    "receipt.structure",
    "receipt.keyset",
    "receipt.signature",
    "receipt.evidence",
    "receipt.model",
    "receipt.time",
    "receipt.complete",
    "request",
    "answer",
];

/// Decides whether a bundle shows that a service which `policy` accepts made this exchange. The attestation is judged as
/// of `at`, or of the time at which the user's proxy did.
///
/// Pure: the same arguments give the same answer, always. The transcript holds every check, passed, failed or skipped;
/// the denial is the first that failed.
pub fn verify_bundle(
    bundle: &Bundle,
    exchange: &Exchange<'_>,
    policy: &Policy,
    at: Option<UnixTime>,
) -> (Transcript, Result<VerifiedExchange, Denial>) {
    let saved = &bundle.attestation;
    let as_of = at.unwrap_or(saved.verified_at);
    let (transcript, outcome) = verify_bound(
        &saved.response,
        &saved.challenge,
        &saved.binding,
        policy,
        as_of,
    );
    let mut judge = Judge::continuing(transcript);
    let verified = match outcome {
        Err(denial) => {
            judge.stop(denial);
            None
        }
        Ok(service) => judge
            .receipt(bundle, &service, exchange)
            .map(|receipt| VerifiedExchange {
                service,
                receipt,
                request: exchange.request.is_some(),
                answer: exchange.answer.is_some(),
                binding: saved.binding,
                as_of,
            }),
    };
    judge.conclude(verified, &CHECKS)
}

impl Judge {
    fn receipt(
        &mut self,
        bundle: &Bundle,
        service: &VerifiedService,
        exchange: &Exchange<'_>,
    ) -> Option<VerifiedReceipt> {
        let signed = match SignedReceipt::parse(&bundle.fetched.receipt) {
            Ok(signed) => signed,
            Err(error) => {
                self.deny(Denial::malformed(
                    "receipt.structure",
                    error.to_string(),
                    "a receipt of format 1",
                    "the file is damaged, or was written by another version; take the copy that the proxy saved",
                ));
                return None;
            }
        };
        let receipt = signed.unverified().clone();
        let found = format!("{}, number {}", receipt.id, receipt.counter);
        self.pass("receipt.structure", found, "a receipt of format 1");
        self.receipt_says_what_service_says(&signed, service);
        // Shown even where something before it failed; the proof below needs all of it.
        self.check(
            "receipt.complete",
            receipt.usage.is_some(),
            receipt.usage.map_or_else(
                || "the answer ended early".to_owned(),
                |usage| {
                    format!(
                        "{} tokens read, {} written",
                        usage.prompt_tokens, usage.completion_tokens
                    )
                },
            ),
            "an answer that ended as the service intended",
            "the client left or the engine failed; what arrived is part of an answer, not an answer",
        );
        let verified = signed.verify(service).ok()?;
        self.exchange(bundle, &verified, exchange);
        Some(verified)
    }

    fn receipt_says_what_service_says(
        &mut self,
        signed: &SignedReceipt,
        service: &VerifiedService,
    ) {
        let (receipt, keyset) = (signed.unverified(), service.keyset());
        self.claim(
            "receipt.keyset",
            signed.is_of_keyset(service),
            receipt.keyset_digest.to_string(),
            service.keyset_digest().to_string(),
            "the receipt and the evidence are from different sessions; take the bundle that the proxy made",
        );
        self.claim(
            "receipt.signature",
            signed.is_signed(service),
            "an Ed25519 signature",
            format!("of the attested receipt key {}", service.receipt_key()),
            "somebody altered the receipt; take the copy that the proxy saved",
        );
        self.claim(
            "receipt.evidence",
            signed.is_of_evidence(service),
            hex::encode(receipt.evidence_digest),
            hex::encode(service.credential().evidence_digest),
            "the service contradicts its own credential; tell its provider",
        );
        let show = |digest: &[u8; 32], version: u64, adapters: &[[u8; 32]], compute: &str| {
            let (digest, adapters) = (hex::encode(digest), listed(adapters));
            format!("{digest} version {version} with adapters {adapters} in {compute}")
        };
        self.claim(
            "receipt.model",
            signed.is_of_model(service),
            show(
                &receipt.model_digest,
                receipt.model_version,
                &receipt.adapter_digests,
                &receipt.compute,
            ),
            show(
                &keyset.model_digest,
                keyset.model_version,
                &keyset.adapter_digests,
                &keyset.compute,
            ),
            "the service contradicts its own keyset; tell its provider",
        );
        let shown = |secs| UnixTime::from_secs(secs).to_string();
        self.check(
            "receipt.time",
            signed.is_timely(service).is_ok(),
            format!("{} by the enclave's clock", shown(receipt.time)),
            format!(
                "{} to {}",
                shown(keyset.not_before),
                shown(keyset.expires_at)
            ),
            "the host changed the enclave's clock; tell the service's provider",
        );
    }

    fn exchange(&mut self, bundle: &Bundle, verified: &VerifiedReceipt, exchange: &Exchange<'_>) {
        match &exchange.request {
            Some(request) => self.claim(
                "request",
                verified.is_about_request(&bundle.fetched.request_salt, request),
                format!(
                    "{} {} and {} bytes",
                    request.method,
                    request.target,
                    request.body.len()
                ),
                "the request that the receipt is about",
                "give the exact bytes that the client sent, and its path if that was not the usual one",
            ),
            None => self.skip("request", "", "no request was given"),
        }
        match exchange.answer {
            Some(answer) => self.claim(
                "answer",
                verified.is_about_answer(&bundle.fetched.answer_salt, answer),
                format!("{} bytes", answer.len()),
                "the answer that the receipt is about",
                "give the exact bytes that the client received, nothing added or cut off",
            ),
            None => self.skip("answer", "", "no answer was given"),
        }
    }

    /// A check whose failure means that things do not belong together.
    fn claim(
        &mut self,
        claim: &'static str,
        result: Result<(), ReceiptError>,
        found: impl Into<String>,
        expected: impl Into<String>,
        remedy: &str,
    ) {
        match result {
            Ok(()) => self.pass(claim, found, expected),
            Err(error) => {
                let found = format!("{}: {error}", found.into());
                self.deny(Denial::not_genuine(claim, found, expected, remedy));
            }
        }
    }
}
