//! The encoding, its rules and the vector.

use std::num::NonZeroU32;

use casemate_release::Malformed;
use proptest::prelude::*;
use serde_json::Value;

use super::*;

const VECTORS: &str = include_str!("../../../../docs/vectors/receipt.json");

fn vectors() -> Value {
    serde_json::from_str(VECTORS).unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn key() -> SigningKey {
    SigningKey::from_seed(&[0x66; 32])
}

fn salts() -> (Salt, Salt) {
    (Salt::from_bytes(&[0x71; 32]), Salt::from_bytes(&[0x72; 32]))
}

const REQUEST: &[u8] = br#"{"model":"smollm2","messages":[{"role":"user","content":"Hello"}]}"#;
const ANSWER: &[u8] = b"data: {\"one\":1}\n\ndata: [DONE]\n\n";

fn functions(offered: u32, forced: Option<ForcedCall>, first_call_only: bool) -> Option<Functions> {
    Some(Functions {
        offered: NonZeroU32::new(offered)?,
        forced,
        first_call_only,
    })
}

/// What steered the answers of the vector's further receipts.
fn further() -> [Steering; 7] {
    let none = Steering::default;
    [
        Steering {
            format: Some(AnswerFormat::JsonObject),
            ..none()
        },
        Steering {
            bias: Bias::of([-0.0].into_iter()),
            format: Some(AnswerFormat::JsonSchema),
            ..none()
        },
        Steering {
            functions: functions(2, Some(ForcedCall::Any), false),
            ..none()
        },
        Steering {
            functions: functions(1, Some(ForcedCall::One), false),
            ..none()
        },
        Steering {
            functions: functions(7, Some(ForcedCall::AnyBySchema), true),
            ..none()
        },
        Steering {
            functions: functions(1, Some(ForcedCall::IfAnyBySchema), true),
            ..none()
        },
        Steering {
            functions: functions(1, Some(ForcedCall::OneBySchema), true),
            stop_strings: NonZeroU32::new(4),
            ..none()
        },
    ]
}

fn incomplete() -> Receipt {
    let mut receipt = receipt();
    receipt.usage = None;
    receipt.parameters.max_tokens = None;
    receipt.parameters.steering = Steering::default();
    receipt.adapter_digests.clear();
    receipt
}

/// Of an answer that the second of the loaded adapters gave.
fn adapted() -> Receipt {
    Receipt {
        adapter: Some([0x65; 32]),
        ..receipt()
    }
}

fn receipt() -> Receipt {
    let (request_salt, answer_salt) = salts();
    let mut hasher = AnswerHasher::new(&answer_salt);
    hasher.update(ANSWER);
    Receipt {
        id: RequestId::new("chatcmpl", [0xab; 16]),
        counter: 7,
        keyset_digest: KeysetDigest([0x61; 32]),
        evidence_digest: [0x62; 32],
        model_digest: [0x63; 32],
        model_version: 4,
        adapter_digests: vec![[0x64; 32], [0x65; 32]],
        adapter: None,
        compute: "int8-g32".into(),
        parameters: Parameters {
            temperature: 0.7,
            top_p: 1.0,
            top_k: 40,
            min_p: 0.0,
            presence_penalty: -0.5,
            frequency_penalty: 0.0,
            repetition_penalty: 1.1,
            seed: u64::MAX,
            choices: 2,
            max_tokens: Some(64),
            steering: Steering {
                bias: Bias::of([100.0, -3.5, 0.0].into_iter()),
                format: None,
                functions: functions(2, None, true),
                stop_strings: NonZeroU32::new(2),
            },
        },
        request_hash: RequestHash::of(&request_salt, "POST", "/v1/chat/completions", REQUEST),
        status: 200,
        answer_hash: hasher.finish(),
        usage: Some(Usage {
            prompt_tokens: 12,
            completion_tokens: 34,
        }),
        time: 1_780_000_000,
    }
}

/// The body changed at the level of CBOR and signed again: only our rules can refuse it.
fn resigned(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let envelope: Envelope = minicbor::decode(&receipt().sign(&key()).unwrap()).unwrap();
    let mut body = envelope.body;
    change(&mut body);
    let signature = key().sign(DOMAIN, &body).0;
    encode(&Envelope { body, signature }, MAX_RECEIPT_BYTES).to_vec()
}

#[test]
fn signs_the_vector_byte_for_byte() {
    let vectors = vectors();
    let envelope = receipt().sign(&key()).unwrap();
    assert_eq!(hex::encode(&envelope), vectors["receipt"]);
    assert_eq!(key().verifying_key().to_string(), vectors["receipt_key"]);
    assert_eq!(bytes(&vectors["request"]["body"]), REQUEST);
    assert_eq!(bytes(&vectors["answer"]["body"]), ANSWER);
    let envelope = incomplete().sign(&key()).unwrap();
    assert_eq!(hex::encode(envelope), vectors["incomplete"]);
    let envelope = adapted().sign(&key()).unwrap();
    assert_eq!(hex::encode(envelope), vectors["adapted"]);
    let steered = vectors["steered"].as_array().unwrap();
    assert_eq!(steered.len(), further().len());
    for (expected, steering) in steered.iter().zip(further()) {
        let mut receipt = incomplete();
        receipt.parameters.steering = steering;
        let envelope = receipt.sign(&key()).unwrap();
        assert_eq!(hex::encode(&envelope), *expected);
        let read = SignedReceipt::parse(&envelope).unwrap();
        assert_eq!(read.unverified(), &receipt);
    }
}

#[test]
fn reads_what_it_signed_and_keeps_every_field() {
    for receipt in [receipt(), incomplete(), adapted()] {
        let signed = SignedReceipt::parse(&receipt.sign(&key()).unwrap()).unwrap();
        assert_eq!(signed.unverified(), &receipt);
    }
}

#[test]
fn refuses_other_encodings_of_the_same_receipt() {
    let good = receipt().sign(&key()).unwrap();
    let refused = |what| Err(Malformed::NotDeterministic { what }.into());
    let mut trailing = good.clone();
    trailing.push(0);
    assert_eq!(SignedReceipt::parse(&trailing), refused("receipt"));
    for length in 0..good.len() {
        let error = Err(Malformed::Cbor { what: "receipt" }.into());
        assert_eq!(SignedReceipt::parse(&good[..length]), error);
    }
    // An unknown key at the end.
    let unknown = resigned(|body| {
        body[0] += 1;
        body.extend([0x10, 0x00]);
    });
    assert_eq!(SignedReceipt::parse(&unknown), refused("receipt.body"));
    // top_p, 1.0, in single precision where half is enough.
    let long = resigned(|body| {
        let at = body.windows(4).position(|w| w == [0x01, 0xf9, 0x3c, 0x00]);
        let at = at.unwrap();
        body.splice(at + 1..at + 4, [0xfa, 0x3f, 0x80, 0x00, 0x00]);
    });
    assert_eq!(SignedReceipt::parse(&long), refused("receipt.body"));
    let huge = vec![0; MAX_RECEIPT_BYTES + 1];
    assert!(matches!(
        SignedReceipt::parse(&huge),
        Err(ReceiptError::Malformed(Malformed::TooLarge { .. }))
    ));
}

#[test]
fn neither_signs_nor_reads_fields_that_break_their_rule() {
    type Break = (&'static str, fn(&mut Receipt));
    let broken: [Break; 13] = [
        ("receipt.counter", |r| r.counter = 0),
        ("receipt.status", |r| r.status = 199),
        ("receipt.status", |r| r.status = 600),
        ("receipt.adapter_digests", |r| r.adapter_digests.reverse()),
        ("receipt.adapter_digests", |r| {
            r.adapter_digests = vec![[1; 32]; 2];
        }),
        ("receipt.adapter", |r| r.adapter = Some([0x63; 32])),
        ("receipt.adapter", |r| {
            r.adapter = Some([0x64; 32]);
            r.adapter_digests.clear();
        }),
        ("receipt.compute", |r| r.compute = "a b".into()),
        ("receipt.parameters.choices", |r| r.parameters.choices = 0),
        ("receipt.parameters", |r| r.parameters.top_p = f32::NAN),
        ("receipt.parameters", |r| {
            r.parameters.temperature = f32::INFINITY;
        }),
        ("receipt.parameters.logit_bias", |r| {
            r.parameters.steering.bias.as_mut().unwrap().strongest = f32::NAN;
        }),
        ("receipt.parameters.logit_bias", |r| {
            r.parameters.steering.bias.as_mut().unwrap().strongest = -1.0;
        }),
    ];
    for (field, break_it) in broken {
        let mut receipt = receipt();
        break_it(&mut receipt);
        let is_it = |error: &ReceiptError| matches!(error, ReceiptError::Malformed(Malformed::Unsupported { what, .. }) if *what == field);
        assert!(is_it(&receipt.sign(&key()).unwrap_err()), "{field}");
        let body = encode(&Body::from(&receipt), MAX_RECEIPT_BYTES).to_vec();
        let signature = key().sign(DOMAIN, &body).0;
        let envelope = encode(&Envelope { body, signature }, MAX_RECEIPT_BYTES);
        let read = SignedReceipt::parse(&envelope).unwrap_err();
        assert!(is_it(&read), "{field}: {read}");
    }
    // The former format left out what steered an answer; read as this one, it would say that nothing did.
    for other in [1, 3] {
        let format = resigned(|body| body[2] = other);
        assert!(matches!(
            SignedReceipt::parse(&format),
            Err(ReceiptError::Malformed(Malformed::Unsupported {
                what: "receipt.format",
                ..
            }))
        ));
    }
}

#[test]
fn steering_of_unknown_kinds_and_of_nothing_is_not_read() {
    /// Puts other bytes in the place of some that occur once.
    fn put(body: &mut Vec<u8>, from: &[u8], to: &[u8]) {
        let places: Vec<_> = (0..body.len())
            .filter(|&at| body[at..].starts_with(from))
            .collect();
        assert_eq!(places.len(), 1, "{from:02x?}");
        body.splice(places[0]..places[0] + from.len(), to.iter().copied());
    }
    // Keys 10, 12 and 13 of the parameters, as the vector has them.
    let steering = [
        &[0x0a, 0x82, 0x03, 0xf9, 0x56, 0x40][..],
        &[0x0c, 0x83, 0x02, 0xf6, 0xf5],
        &[0x0d, 0x02],
    ]
    .concat();
    let read = |to: &[&[u8]]| {
        let envelope = resigned(|body| put(body, &steering, &to.concat()));
        SignedReceipt::parse(&envelope)
    };
    let bias: &[u8] = &[0x0a, 0x82, 0x03, 0xf9, 0x56, 0x40];
    let (functions, stop): (&[u8], &[u8]) = (&[0x0c, 0x83, 0x02, 0xf6, 0xf5], &[0x0d, 0x02]);
    assert!(read(&[bias, functions, stop]).is_ok());
    for wrong in [
        // No token is biased; no function is offered; there is no stop string.
        [&[0x0a, 0x82, 0x00, 0xf9, 0x56, 0x40], functions, stop],
        [bias, &[0x0c, 0x83, 0x00, 0xf6, 0xf5], stop],
        [bias, functions, &[0x0d, 0x00]],
        // An unknown kind of forced call, a shorter and a longer array.
        [bias, &[0x0c, 0x83, 0x02, 0x06, 0xf5], stop],
        [&[0x0a, 0x81, 0x03], functions, stop],
        [bias, &[0x0c, 0x84, 0x02, 0xf6, 0xf5, 0x00], stop],
        // The same bias in single precision.
        [
            &[0x0a, 0x82, 0x03, 0xfa, 0x42, 0xc8, 0x00, 0x00],
            functions,
            stop,
        ],
        // An unknown format of answers in the place of the stop strings.
        [bias, &[0x0b, 0x03], functions],
    ] {
        assert!(
            matches!(read(&wrong), Err(ReceiptError::Malformed(_))),
            "{wrong:02x?}"
        );
    }
    let json = read(&[bias, &[0x0b, 0x02], functions]).unwrap();
    let format = json.unverified().parameters.steering.format;
    assert_eq!(format, Some(AnswerFormat::JsonSchema));
}

#[test]
fn ids_have_one_form() {
    let id = RequestId::new("chatcmpl", [0xab; 16]);
    assert_eq!(id.as_str(), format!("chatcmpl-{}", "ab".repeat(16)));
    assert_eq!(
        (id.prefix(), id.as_str().parse()),
        ("chatcmpl", Ok(id.clone()))
    );
    let digits = "ab".repeat(16);
    for bad in [
        String::new(),
        digits.clone(),
        format!("-{digits}"),
        format!("chatcmpl-{}", "AB".repeat(16)),
        format!("Chatcmpl-{digits}"),
        format!("chatcmpl-{digits}0"),
        format!("../{digits}"),
        format!("chatcmpl-../{}", &digits[3..]),
        format!("{}-{digits}", "a".repeat(17)),
    ] {
        assert_eq!(bad.parse::<RequestId>(), Err(InvalidRequestId), "{bad}");
    }
}

#[test]
fn hashes_change_with_every_input_and_not_with_the_cutting_of_an_answer() {
    let (salt, other) = salts();
    let base = RequestHash::of(&salt, "POST", "/v1/x", b"body");
    for changed in [
        RequestHash::of(&other, "POST", "/v1/x", b"body"),
        RequestHash::of(&salt, "PUT", "/v1/x", b"body"),
        RequestHash::of(&salt, "POST", "/v1/y", b"body"),
        RequestHash::of(&salt, "POST", "/v1/xb", b"ody"),
        RequestHash::of(&salt, "POST/", "v1/x", b"body"),
        RequestHash::of(&salt, "POST", "/v1/x", b"bodz"),
    ] {
        assert_ne!(base, changed);
    }
    let answer = |salt, pieces: &[&[u8]]| {
        let mut hasher = AnswerHasher::new(salt);
        pieces.iter().for_each(|piece| hasher.update(piece));
        hasher.finish()
    };
    assert_eq!(
        answer(&salt, &[ANSWER]),
        answer(&salt, &[&ANSWER[..5], b"", &ANSWER[5..]])
    );
    assert_ne!(answer(&salt, &[ANSWER]), answer(&other, &[ANSWER]));
    assert_ne!(answer(&salt, &[ANSWER]), answer(&salt, &[&ANSWER[1..]]));
}

#[test]
fn a_receipt_of_another_request_is_not_taken_for_the_one_asked_for() {
    let (request_salt, answer_salt) = salts();
    let fetched = FetchedReceipt {
        receipt: receipt().sign(&key()).unwrap(),
        request_salt,
        answer_salt,
    };
    let json = fetched.to_json();
    let id = receipt().id;
    let read = FetchedReceipt::from_json(json.as_bytes(), &id)
        .ok()
        .unwrap();
    assert_eq!(read.to_json(), json);
    let other = RequestId::new("chatcmpl", [0xac; 16]);
    let refused = FetchedReceipt::from_json(json.as_bytes(), &other).err();
    assert_eq!(refused, Some(ReceiptError::OtherId));
    for bad in [
        json.replacen('{', "{\"extra\":1,", 1),
        json[1..].to_owned(),
        json.replace("cXFx", "cXF"),
        " ".repeat(MAX_FETCHED + 1),
    ] {
        let refused = FetchedReceipt::from_json(bad.as_bytes(), &id).err();
        assert!(matches!(refused, Some(ReceiptError::Malformed(_))), "{bad}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let id = RequestId::new("a", [0; 16]);
        prop_assert!(SignedReceipt::parse(&bytes).is_err());
        prop_assert!(FetchedReceipt::from_json(&bytes, &id).is_err());
        prop_assert!(Bundle::from_json(&bytes).is_err());
    }

    #[test]
    fn every_number_survives_the_shortest_encoding(bits in any::<u32>()) {
        let value = f32::from_bits(bits);
        prop_assume!(value.is_finite());
        let mut receipt = receipt();
        receipt.parameters.temperature = value;
        let signed = SignedReceipt::parse(&receipt.sign(&key()).unwrap()).unwrap();
        prop_assert_eq!(signed.unverified().parameters.temperature.to_bits(), bits);
    }
}
