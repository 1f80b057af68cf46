//! What an honest enclave and broker state about one small service, for tests to sign and to meddle with: a keyset, the
//! credential over it, a receipt under it.

use casemate_channel::keyset::{Keyset, KeysetDigest};
use casemate_channel::receipt::{AnswerHash, Parameters, Receipt, RequestHash, RequestId, Usage};
use casemate_container::ModelDigest;
use casemate_release::credential::Credential;

/// The digest of the service's model.
pub const MODEL: [u8; 32] = [5; 32];
/// The digest of the evidence that its credential names.
pub const EVIDENCE: [u8; 32] = [6; 32];
/// A keyset for an hour from `now` on, with this key configuration, without a TLS key and adapters.
pub fn keyset(ohttp_config: Vec<u8>, now: u64) -> Keyset {
    Keyset {
        ohttp_config,
        receipt_key: [4; 32],
        tls_key_digest: None,
        model_name: "smollm2".into(),
        model_digest: MODEL,
        model_version: 7,
        adapter_digests: vec![],
        compute: "int8-g32".into(),
        policy_version: 3,
        not_before: now,
        expires_at: now + 3600,
    }
}

/// A credential for an hour from `now` on over such a keyset.
pub fn credential(keyset: &KeysetDigest, now: u64) -> Credential {
    Credential {
        evidence_digest: EVIDENCE,
        keyset_digest: keyset.0,
        model_digest: ModelDigest(MODEL),
        model_version: 7,
        adapter_digests: vec![],
        service: "demo".into(),
        policy_version: 3,
        log_size: 1,
        log_head: [8; 32],
        issued_at: now,
        expires_at: now + 3600,
    }
}

/// The first receipt under such a keyset and its credential: of a whole answer of a chat that asked for nothing.
pub fn receipt(keyset: &Keyset, request: RequestHash, answer: AnswerHash, time: u64) -> Receipt {
    let encoded = keyset.encode().expect("a keyset that keeps the rules");
    Receipt {
        id: RequestId::new("chatcmpl", [0xab; 16]),
        counter: 1,
        keyset_digest: KeysetDigest::of(&encoded),
        evidence_digest: EVIDENCE,
        model_digest: keyset.model_digest,
        model_version: keyset.model_version,
        adapter_digests: keyset.adapter_digests.clone(),
        adapter: None,
        compute: keyset.compute.clone(),
        parameters: Parameters::default(),
        request_hash: request,
        status: 200,
        answer_hash: answer,
        usage: Some(Usage {
            prompt_tokens: 12,
            completion_tokens: 34,
        }),
        time,
    }
}
