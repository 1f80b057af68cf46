//! Receipts, and the bundles that users keep of them.

use std::num::NonZeroU32;

use casemate_attest::UnixTime;
use casemate_channel::keyset::{ChannelBinding, KeysetDigest};
use casemate_channel::receipt::{
    AnswerFormat, AnswerHash, Bias, Bundle, DOMAIN, FetchedReceipt, ForcedCall, Functions,
    Parameters, Receipt, RequestHash, RequestId, Salt, SavedAttestation, SignedReceipt, Steering,
    Usage,
};
use casemate_channel::verify::Challenge;
use casemate_container::signing::SigningKey;

use crate::attest::NOW;
use crate::channel::honest_response;

fn key() -> SigningKey {
    SigningKey::from_seed(&[0x66; 32])
}

fn functions(forced: Option<ForcedCall>) -> Option<Functions> {
    Some(Functions {
        offered: NonZeroU32::new(2)?,
        forced,
        first_call_only: forced.is_none(),
    })
}

fn honest() -> Receipt {
    Receipt {
        id: RequestId::new("chatcmpl", [1; 16]),
        counter: 2,
        keyset_digest: KeysetDigest([3; 32]),
        evidence_digest: [4; 32],
        model_digest: [5; 32],
        model_version: 6,
        adapter_digests: vec![[7; 32]],
        adapter: Some([7; 32]),
        compute: "int8-g32".into(),
        parameters: Parameters {
            temperature: 0.5,
            seed: 8,
            max_tokens: Some(9),
            steering: Steering {
                bias: Bias::of([-100.0, 0.3].into_iter()),
                format: None,
                functions: functions(None),
                stop_strings: NonZeroU32::new(2),
            },
            ..Parameters::default()
        },
        request_hash: RequestHash([10; 32]),
        status: 200,
        answer_hash: AnswerHash([11; 32]),
        usage: Some(Usage {
            prompt_tokens: 12,
            completion_tokens: 13,
        }),
        time: NOW,
    }
}

/// An envelope as it is, or a body that is signed whatever it says; the first byte chooses. What is accepted is its own
/// one encoding.
pub(crate) fn receipt(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    if which % 2 == 0 {
        let _ = SignedReceipt::parse(bytes);
        if let Ok(id) = String::from_utf8_lossy(bytes).parse::<RequestId>() {
            assert_eq!(id.as_str().as_bytes(), bytes);
        }
        return;
    }
    let mut cbor = minicbor::Encoder::new(Vec::new());
    cbor.map(2)
        .and_then(|e| e.u8(0)?.bytes(bytes))
        .and_then(|e| e.u8(1)?.bytes(&key().sign(DOMAIN, bytes).0))
        .expect("memory takes all bytes");
    let envelope = cbor.into_writer();
    if let Ok(parsed) = SignedReceipt::parse(&envelope) {
        let again = parsed
            .unverified()
            .sign(&key())
            .expect("an accepted receipt");
        assert_eq!(again, envelope, "a second encoding was accepted");
    }
}

pub(crate) fn receipt_seeds() -> Vec<Vec<u8>> {
    let mut incomplete = honest();
    incomplete.usage = None;
    incomplete.parameters.max_tokens = None;
    incomplete.parameters.steering = Steering::default();
    incomplete.adapter_digests.clear();
    incomplete.adapter = None;
    let mut constrained = incomplete.clone();
    constrained.parameters.steering.format = Some(AnswerFormat::JsonSchema);
    let mut calling = incomplete.clone();
    calling.parameters.steering.functions = functions(Some(ForcedCall::OneBySchema));
    let mut seeds = vec![[&[0], honest().id.as_str().as_bytes()].concat()];
    for receipt in [honest(), incomplete, constrained, calling] {
        let envelope = receipt.sign(&key()).expect("an honest receipt");
        seeds.push([&[1], &crate::release::body_of(&envelope)[..]].concat());
        seeds.push([&[0], &envelope[..]].concat());
    }
    seeds
}

/// A bundle, and what an enclave hands out; the first byte chooses. What was read is written and read as the same.
pub(crate) fn bundle(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    if which % 2 == 0 {
        if let Ok(bundle) = Bundle::from_json(bytes) {
            let text = bundle.to_json();
            let again = Bundle::from_json(text.as_bytes()).expect("what was written");
            assert_eq!(again.to_json(), text);
        }
    } else if let Ok(fetched) = FetchedReceipt::from_json(bytes, &honest().id) {
        let text = fetched.to_json();
        let again = FetchedReceipt::from_json(text.as_bytes(), &honest().id);
        assert_eq!(again.map(|again| again.to_json()), Ok(text));
        let parsed = SignedReceipt::parse(&fetched.receipt).expect("checked before");
        assert_eq!(parsed.unverified().id, honest().id);
    }
}

pub(crate) fn bundle_seeds() -> Vec<Vec<u8>> {
    let fetched = || FetchedReceipt {
        receipt: honest().sign(&key()).expect("an honest receipt"),
        request_salt: Salt::from_bytes(&[1; 32]),
        answer_salt: Salt::from_bytes(&[2; 32]),
    };
    let bundle = |binding| Bundle {
        fetched: fetched(),
        attestation: SavedAttestation {
            response: honest_response().clone(),
            challenge: Challenge::from_parts([9; 32], UnixTime::from_secs(NOW)),
            binding,
            verified_at: UnixTime::from_secs(NOW + 1),
        },
    };
    let of_key = bundle(ChannelBinding::Key).to_json();
    let of_connection = bundle(ChannelBinding::TlsExporter([3; 32])).to_json();
    vec![
        [&[0], of_key.as_bytes()].concat(),
        [&[0], of_connection.as_bytes()].concat(),
        [&[1], fetched().to_json().as_bytes()].concat(),
    ]
}
