use proptest::prelude::*;

use super::*;
use crate::jwe::RecipientKey;
use crate::random::tests::Counting;

const VECTORS: &str = include_str!("../../../../docs/vectors/key-release.json");

fn runtime_data() -> RuntimeData {
    let key = RecipientKey::generate(&Counting::default()).unwrap();
    RuntimeData {
        nonce: STANDARD.encode([7; 32]),
        tee_pubkey: key.public().to_jwk(),
    }
}

fn evidence() -> Evidence {
    let json = json!({ "tee": "tdx", "quote": STANDARD.encode([1, 2, 3]) });
    Evidence::from_json(json.to_string().as_bytes()).unwrap()
}

fn attestation() -> Value {
    serde_json::to_value(Attestation::new(runtime_data(), &evidence()).unwrap()).unwrap()
}

fn refusal(attestation: &Value) -> ReleaseError {
    Attestation::parse(attestation.to_string().as_bytes(), TeeKind::Tdx).unwrap_err()
}

/// What guest components of the Confidential Containers project send.
const GUEST_REQUEST: &str = r#"{"version":"0.4.0","tee":"tdx",
    "extra-params":{"supported-hash-algorithms":["sha256","sha384","sha512"],
    "tee-metadata":{"primary_tee":{"tee":"tdx"},"additional_tees":[]}}}"#;

#[test]
fn accepts_the_requests_of_other_clients() {
    for extra in [
        r#""""#,
        "null",
        "{}",
        r#"{"supported-hash-algorithms":["SHA384"]}"#,
    ] {
        let text = format!(r#"{{"version":"0.4.0","tee":"sgx","extra-params":{extra}}}"#);
        assert_eq!(
            Request::parse(text.as_bytes()).unwrap().1,
            TeeKind::Sgx,
            "{extra}"
        );
    }
    assert_eq!(
        Request::parse(GUEST_REQUEST.as_bytes()).unwrap().1,
        TeeKind::Tdx
    );
    let own = serde_json::to_vec(&Request::new(TeeKind::Tdx)).unwrap();
    assert_eq!(Request::parse(&own).unwrap().0, Request::new(TeeKind::Tdx));
}

#[test]
fn refuses_requests_by_the_name_of_what_is_wrong() {
    let cases = [
        ("0.4.0", "0.3.0", "request.version"),
        ("0.4.0", "0.4.1", "request.version"),
        (r#""tee":"tdx","#, r#""tee":"snp","#, "request.tee"),
        (r#""tee":"tdx","#, r#""tee":"sample","#, "request.tee"),
        (
            r#"{"tee":"tdx"}"#,
            r#"{"tee":"sgx"}"#,
            "request.extra-params.tee-metadata",
        ),
        (
            "[]",
            r#"[{"tee":"nvidia"}]"#,
            "request.extra-params.tee-metadata",
        ),
        (r#""sha384","#, "", "supported-hash-algorithms"),
        (
            "tee-metadata",
            "attestation-policy-selector",
            "request.extra-params",
        ),
    ];
    for (from, to, field) in cases {
        let text = GUEST_REQUEST.replacen(from, to, 1);
        assert_ne!(text, GUEST_REQUEST, "{from}");
        match Request::parse(text.as_bytes()) {
            Err(ReleaseError::Malformed(Malformed::Unsupported { what, .. })) => {
                assert_eq!(what, field);
            }
            other => panic!("{to}: {other:?}"),
        }
    }
    assert_eq!(
        Request::parse(&vec![b' '; MAX_REQUEST_BYTES + 1]),
        Err(Malformed::TooLarge {
            what: "request",
            found: MAX_REQUEST_BYTES + 1,
            limit: MAX_REQUEST_BYTES
        }
        .into())
    );
}

#[test]
fn finds_the_selected_hash_and_defaults_to_sha384() {
    let parse = |extra: &str| {
        let text = format!(r#"{{"nonce":"42","extra-params":{extra}}}"#);
        Challenge::parse(text.as_bytes()).map(|(_, algorithm)| algorithm)
    };
    assert_eq!(parse(r#""""#), Ok(HashAlgorithm::Sha384));
    assert_eq!(parse("{}"), Ok(HashAlgorithm::Sha384));
    let selected = |name: &str| parse(&format!(r#"{{"selected-hash-algorithm":{name}}}"#));
    assert_eq!(selected(r#""sha512""#), Ok(HashAlgorithm::Sha512));
    assert_eq!(selected(r#""SHA256""#), Ok(HashAlgorithm::Sha256));
    assert!(selected(r#""md5""#).is_err());
    assert!(selected("384").is_err());
    let own = serde_json::to_vec(&Challenge::new(&[7; 32])).unwrap();
    assert_eq!(Challenge::parse(&own).unwrap().1, HashAlgorithm::Sha384);
    for nonce in ["", " ", "a b", &"x".repeat(257)] {
        let text = json!({ "nonce": nonce, "extra-params": "" }).to_string();
        assert_eq!(
            Challenge::parse(text.as_bytes()),
            Err(Malformed::Text { what: "nonce" }.into())
        );
    }
}

/// The vector was computed by `tools/vectors/runtime_data.py`.
#[test]
fn report_data_is_the_vectors() {
    let vectors: Value = serde_json::from_str(VECTORS).unwrap();
    let vector = &vectors["runtime_data"];
    let canonical = runtime_data().canonical("");
    assert_eq!(
        std::str::from_utf8(&canonical).unwrap(),
        vector["canonical"]
    );
    for (algorithm, name) in [
        (HashAlgorithm::Sha256, "sha256"),
        (HashAlgorithm::Sha384, "sha384"),
        (HashAlgorithm::Sha512, "sha512"),
    ] {
        let data = runtime_data().report_data(algorithm, "");
        assert_eq!(
            hex::encode(data.as_bytes()),
            vector["report_data"][name],
            "{name}"
        );
    }
}

#[test]
fn report_data_depends_on_nonce_key_and_additional_evidence() {
    let report_data = |runtime_data: &RuntimeData, additional| {
        *runtime_data
            .report_data(HashAlgorithm::Sha384, additional)
            .as_bytes()
    };
    let base = report_data(&runtime_data(), "");
    let other_nonce = RuntimeData {
        nonce: "other".into(),
        ..runtime_data()
    };
    let mut other_key = runtime_data();
    std::mem::swap(&mut other_key.tee_pubkey.x, &mut other_key.tee_pubkey.y);
    assert_ne!(report_data(&other_nonce, ""), base);
    assert_ne!(report_data(&other_key, ""), base);
    assert_ne!(report_data(&runtime_data(), "{}"), base);
}

#[test]
fn evidence_passes_through_the_message_unchanged() {
    let text = attestation().to_string();
    let (parsed, found) = Attestation::parse(text.as_bytes(), TeeKind::Tdx).unwrap();
    assert_eq!(found.digest(), evidence().digest());
    assert_eq!(parsed.runtime_data, runtime_data());
    let (_, as_sgx) = Attestation::parse(text.as_bytes(), TeeKind::Sgx).unwrap();
    assert_eq!(
        as_sgx.tee,
        TeeKind::Sgx,
        "the kind is the request's, not the message's"
    );
}

#[test]
fn accepts_event_logs_and_empty_additional_evidence() {
    let mut message = attestation();
    message["tee-evidence"]["primary_evidence"]["cc_eventlog"] = json!("AAAA");
    message["tee-evidence"]["primary_evidence"]["aa_eventlog"] = json!("AAAA");
    message["tee-evidence"]["additional_evidence"] = json!("{}");
    assert!(Attestation::parse(message.to_string().as_bytes(), TeeKind::Tdx).is_ok());
}

#[test]
fn refuses_what_nothing_here_would_check() {
    let mut message = attestation();
    message["init-data"] = json!({ "format": "toml", "body": "" });
    assert!(matches!(
        refusal(&message),
        ReleaseError::Malformed(Malformed::Unsupported {
            what: "attestation.init-data",
            ..
        })
    ));
    let mut message = attestation();
    message["tee-evidence"]["additional_evidence"] = json!(r#"{"nvidia":{}}"#);
    assert!(matches!(
        refusal(&message),
        ReleaseError::Malformed(Malformed::Unsupported {
            what: "tee-evidence.additional_evidence",
            ..
        })
    ));
    let primary = Malformed::Json {
        what: "tee-evidence.primary_evidence",
    };
    for quote in ["", "not base64!", "AA=A"] {
        let mut message = attestation();
        message["tee-evidence"]["primary_evidence"]["quote"] = json!(quote);
        if !quote.is_empty() {
            assert_eq!(refusal(&message), primary.clone().into(), "{quote}");
        }
    }
    let mut message = attestation();
    message["tee-evidence"]["primary_evidence"]["collateral"] = json!({});
    assert_eq!(refusal(&message), primary.into());
    for pointer in [
        "",
        "/runtime-data",
        "/runtime-data/tee-pubkey",
        "/tee-evidence",
    ] {
        let mut message = attestation();
        message.pointer_mut(pointer).unwrap()["more"] = json!(1);
        assert_eq!(
            refusal(&message),
            Malformed::Json {
                what: "attestation"
            }
            .into()
        );
    }
}

#[test]
fn resource_paths_have_three_plain_parts() {
    assert_eq!(
        "default/model/smollm2"
            .parse::<ResourcePath>()
            .unwrap()
            .tag(),
        "smollm2"
    );
    for bad in [
        "",
        "a/b",
        "a/b/c/d",
        "a//c",
        "../b/c",
        "a/./c",
        "a/b/c d",
        "a/b/ü",
        &format!("a/b/{}", "x".repeat(65)),
    ] {
        assert!(bad.parse::<ResourcePath>().is_err(), "{bad}");
    }
}

#[test]
fn cookies_are_found_among_others_but_not_when_ambiguous() {
    assert_eq!(session_of_cookie("kbs-session-id=abc"), Some("abc"));
    assert_eq!(
        session_of_cookie("a=1; kbs-session-id=abc; b=2"),
        Some("abc")
    );
    assert_eq!(
        session_of_cookie("kbs-session-id=abc; kbs-session-id=abc"),
        Some("abc")
    );
    assert_eq!(
        session_of_cookie("kbs-session-id=abc; kbs-session-id=abd"),
        None
    );
    assert_eq!(session_of_cookie("xkbs-session-id=abc"), None);
    assert_eq!(session_of_cookie("kbs-session-id="), None);
    assert_eq!(
        session_of_set_cookie("kbs-session-id=abc; Path=/; HttpOnly"),
        Some("abc")
    );
    assert_eq!(session_of_set_cookie("other=1; kbs-session-id=abc"), None);
    assert_eq!(session_of_set_cookie("kbs-session-id=a\"b"), None);
}

/// A parser that takes the first of two and one that takes the last would read two messages.
#[test]
fn refuses_repeated_members_at_every_depth() {
    let request = |extra: &str| {
        let text = format!(r#"{{"version":"0.4.0","tee":"tdx","extra-params":{extra}}}"#);
        Request::parse(text.as_bytes()).unwrap_err()
    };
    let what = "request";
    for extra in [
        r#"{"supported-hash-algorithms":["sha384"],"supported-hash-algorithms":["sha384"]}"#,
        r#"{"tee-metadata":{"primary_tee":{"tee":"sgx","tee":"tdx"},"additional_tees":[]}}"#,
        r#""","tee":"tdx""#,
    ] {
        assert_eq!(request(extra), Malformed::Json { what }.into(), "{extra}");
    }
    let what = "challenge";
    for text in [
        r#"{"nonce":"AA==","nonce":"AA==","extra-params":""}"#,
        r#"{"nonce":"AA==","extra-params":{"selected-hash-algorithm":"sha256","selected-hash-algorithm":"sha384"}}"#,
    ] {
        let error = Challenge::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error, Malformed::Json { what }.into(), "{text}");
    }
    let what = "attestation";
    let text = attestation().to_string();
    for (member, repeated) in [
        (r#""nonce":"#, r#""nonce":"AA==","nonce":"#),
        (r#""kty":"#, r#""kty":"EC","kty":"#),
        (r#""quote":"#, r#""quote":"AQID","quote":"#),
        (
            r#""quote":"#,
            r#""collateral":{"a":{"b":1,"b":1}},"quote":"#,
        ),
    ] {
        let changed = text.replacen(member, repeated, 1);
        assert_ne!(changed, text);
        let error = Attestation::parse(changed.as_bytes(), TeeKind::Tdx).unwrap_err();
        assert_eq!(error, Malformed::Json { what }.into(), "{repeated}");
    }
}

#[test]
fn deep_nesting_is_malformed_and_harms_nothing() {
    let deep = format!("{}1{}", "[".repeat(3000), "]".repeat(3000));
    let text = format!(r#"{{"version":"0.4.0","tee":"tdx","extra-params":{deep}}}"#);
    let error = Request::parse(text.as_bytes()).unwrap_err();
    assert_eq!(error, Malformed::Json { what: "request" }.into());
    let deep = format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000));
    let collateral = format!(r#""collateral":{deep},"quote":"#);
    let text = attestation()
        .to_string()
        .replacen(r#""quote":"#, &collateral, 1);
    let error = Attestation::parse(text.as_bytes(), TeeKind::Tdx).unwrap_err();
    assert_eq!(
        error,
        Malformed::Json {
            what: "attestation"
        }
        .into()
    );
}

/// Every byte of every message, three changes each: a panic nowhere, and what is still accepted was said differently.
#[test]
fn every_single_byte_corruption_of_a_message_is_refused_or_another_message() {
    type Parse = fn(&[u8]) -> Option<Value>;
    let messages: [(Vec<u8>, Parse); 4] = [
        (
            serde_json::to_vec(&Request::new(TeeKind::Tdx)).unwrap(),
            |bytes| Some(serde_json::to_value(Request::parse(bytes).ok()?.0).unwrap()),
        ),
        (
            serde_json::to_vec(&Challenge::new(&[7; 32])).unwrap(),
            |bytes| Some(serde_json::to_value(Challenge::parse(bytes).ok()?.0).unwrap()),
        ),
        (attestation().to_string().into_bytes(), |bytes| {
            Some(serde_json::to_value(Attestation::parse(bytes, TeeKind::Tdx).ok()?.0).unwrap())
        }),
        (br#"{"token":"a.b.c"}"#.to_vec(), |bytes| {
            Some(serde_json::to_value(AttestResponse::parse(bytes).ok()?).unwrap())
        }),
    ];
    for (message, parse) in messages {
        let honest = parse(&message);
        assert!(honest.is_some());
        for at in 0..message.len() {
            for mask in [0x01, 0x20, 0x80] {
                let mut changed = message.clone();
                changed[at] ^= mask;
                // Between tokens one white space may stand for another; serde_json writes none.
                assert_ne!(parse(&changed), honest, "byte {at} ^ {mask:#x}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,256}") {
        let bytes = text.as_bytes();
        let _ = Request::parse(bytes);
        let _ = Challenge::parse(bytes);
        let _ = Attestation::parse(bytes, TeeKind::Tdx);
        let _ = AttestResponse::parse(bytes);
        let _ = session_of_cookie(&text);
        let _ = session_of_set_cookie(&text);
        let _ = text.parse::<ResourcePath>();
    }

    /// Whatever a broker puts into its nonce, the hashed text is the one RFC 8785 gives: parsing it
    /// and serialising it with sorted members changes nothing.
    #[test]
    fn canonical_form_is_a_fixed_point(nonce in "\\PC{0,64}", additional in "\\PC{0,64}") {
        let data = RuntimeData { nonce, ..runtime_data() };
        let canonical = data.canonical(&additional);
        let value: std::collections::BTreeMap<String, Value> =
            serde_json::from_slice(&canonical).unwrap();
        prop_assert_eq!(serde_json::to_vec(&value).unwrap(), canonical);
    }
}
