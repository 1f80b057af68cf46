//! Shapes that parsers are attacked with, tried on every parser: nesting without end, members stated twice, CBOR that is
//! not the one encoding, and more than is looked at. Each is refused with the error for it, by a stack of ordinary size.

use casemate_attest::{
    Evidence, EvidenceError, MAX_EVIDENCE_JSON, MAX_POLICY, MAX_QUOTE, Policy, PolicyFault, Quote,
    QuoteFault, ReportData, TeeKind,
};
use casemate_broker::log::{Action, Decision, Entry, Head, Verdict};
use casemate_channel::keyset::{Keyset, KeysetError, MAX_ENCODED};
use casemate_channel::verify::{AttestationResponse, MAX_RESPONSE};
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, KeyFileError, Manifest, ManifestError, ModelDigest};
use casemate_enclave::config::{ConfigError, MeasuredConfig};
use casemate_engine::{ChatError, ChatTemplate, ControlNames, Tokenizer, TokenizerError};
use casemate_release::credential::{Credential, MAX_CREDENTIAL_BYTES, VerifiedCredential};
use casemate_release::error::Malformed;
use casemate_release::grant::{self, MAX_GRANT_BYTES};
use casemate_release::issuance::{CredentialRequest, IssuanceChallenge};
use casemate_release::jwe::{Jwe, MAX_JWE_BYTES};
use casemate_release::{ReleaseError, issuance, rcar};
use casemate_tee::wire;

/// Bytes of nesting, beyond any parser's limit and below every limit on length.
const DEEP: usize = 1000;

fn nested(open: &str, inner: &str, close: &str) -> String {
    format!("{}{inner}{}", open.repeat(DEEP), close.repeat(DEEP))
}

fn json(what: &'static str) -> ReleaseError {
    Malformed::Json { what }.into()
}

/// One parser of JSON, as the error that it gives, or nothing if it accepts.
type Parser = (&'static str, fn(&[u8]) -> Option<String>);

fn words(error: impl std::fmt::Display) -> Option<String> {
    Some(error.to_string())
}

/// Every parser of JSON that strangers reach, with what it says of a document of another shape.
const JSON_PARSERS: [Parser; 9] = [
    ("not an evidence document", |b| {
        words(Evidence::from_json(b).err()?)
    }),
    ("response.structure", |b| {
        Some(AttestationResponse::from_json(b).err()?.claim.into())
    }),
    ("request is not JSON", |b| {
        words(rcar::Request::parse(b).err()?)
    }),
    ("challenge is not JSON", |b| {
        words(rcar::Challenge::parse(b).err()?)
    }),
    ("attestation is not JSON", |b| {
        words(rcar::Attestation::parse(b, TeeKind::Tdx).err()?)
    }),
    ("jwe is not JSON", |b| words(Jwe::from_json(b).err()?)),
    ("credential request is not JSON", |b| {
        words(CredentialRequest::parse(b).err()?)
    }),
    ("issuance challenge is not JSON", |b| {
        words(IssuanceChallenge::parse(b).err()?)
    }),
    ("the request must be", |b| {
        words(wire::parse_request(b).err()?)
    }),
];

#[test]
fn nesting_is_refused_by_every_json_parser() {
    for (expected, parse) in JSON_PARSERS {
        for text in [
            nested("[", "1", "]"),
            nested(r#"{"a":"#, "1", "}"),
            "[".repeat(DEEP),
        ] {
            let error = parse(text.as_bytes());
            let error = error.unwrap_or_else(|| panic!("{expected}: accepted"));
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
    // Inside of the members whose form is free.
    let deep = nested("[", "1", "]");
    let request = format!(r#"{{"version":"0.4.0","tee":"tdx","extra-params":{deep}}}"#);
    assert_eq!(
        rcar::Request::parse(request.as_bytes()).err(),
        Some(json("request"))
    );
    let request =
        format!(r#"{{"nonce":"","service":"s","received":[],"keyset":"","evidence":{deep}}}"#);
    let error = CredentialRequest::parse(request.as_bytes()).err();
    assert_eq!(error, Some(json("credential request")));
    let tokenizer = format!(r#"{{"model":{{}},"normalizer":{deep}}}"#);
    let error = Tokenizer::from_json(tokenizer.as_bytes(), 10, None).err();
    assert!(matches!(error, Some(TokenizerError::File(_))), "{error:?}");
}

#[test]
fn repeated_members_are_refused_by_every_json_parser() {
    let documents = [
        r#"{"tee":"tdx","tee":"tdx","quote":"AQID"}"#,
        r#"{"evidence":{"tee":"tdx","quote":"AQID","quote":"AQID"},"keyset":"","credential":""}"#,
        r#"{"version":"0.4.0","tee":"sgx","tee":"sgx","extra-params":""}"#,
        r#"{"nonce":"AA==","nonce":"AA==","extra-params":""}"#,
        r#"{"runtime-data":{},"runtime-data":{},"tee-evidence":{}}"#,
        r#"{"protected":"","protected":"","encrypted_key":"","iv":"","ciphertext":"","tag":""}"#,
        r#"{"nonce":"","service":"s","received":[],"keyset":"","evidence":{"a":1,"a":1}}"#,
        r#"{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","expires_at":1,"expires_at":1}"#,
        r#"{"report_data":"AA==","report_data":"AA=="}"#,
    ];
    for ((expected, parse), document) in JSON_PARSERS.into_iter().zip(documents) {
        let error = parse(document.as_bytes());
        let error = error.unwrap_or_else(|| panic!("{document} is accepted"));
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn nesting_is_refused_by_policies_and_configurations() {
    let long_name = format!("{} = 1", vec!["a"; DEEP].join("."));
    for text in [
        format!("version = {}", nested("[", "1", "]")),
        format!("version = {}", nested("{ a = ", "1", " }")),
        format!("version = {}", "[".repeat(DEEP)),
        format!("[{}]\nb = 1", vec!["a"; DEEP].join(".")),
        long_name,
    ] {
        let error = Policy::from_toml(&text).unwrap_err();
        assert!(matches!(error.fault, PolicyFault::Toml(_)), "{error}");
        let error = MeasuredConfig::parse(text.into_bytes()).err();
        assert!(matches!(error, Some(ConfigError::Malformed(_))));
    }
}

/// The fields of a map with `more` behind them.
fn with_entry(map: &[u8], more: &[u8]) -> Vec<u8> {
    assert!((0xa0..0xb7).contains(&map[0]), "a short map");
    [&[map[0] + 1], &map[1..], more].concat()
}

fn issuer() -> SigningKey {
    SigningKey::from_seed(&[1; 32])
}

fn keyset() -> Vec<u8> {
    let keyset = Keyset {
        ohttp_config: vec![1, 2, 3],
        receipt_key: [4; 32],
        tls_key_digest: None,
        model_name: "m".into(),
        model_digest: [5; 32],
        model_version: 6,
        adapter_digests: vec![],
        compute: "int8".into(),
        policy_version: 9,
        not_before: 1_000,
        expires_at: 4_600,
    };
    keyset.encode().unwrap()
}

fn credential() -> Vec<u8> {
    let credential = Credential {
        evidence_digest: [1; 32],
        keyset_digest: [2; 32],
        model_digest: ModelDigest([3; 32]),
        model_version: 4,
        adapter_digests: vec![],
        service: "s".into(),
        policy_version: 7,
        log_size: 8,
        log_head: [9; 32],
        issued_at: 1_000,
        expires_at: 2_000,
    };
    credential.issue(&issuer()).unwrap()
}

fn entry() -> Vec<u8> {
    let decision = Decision::new(Action::Attest, Verdict::Genuine);
    Entry::after(&Head::empty(), 1, decision).encode()
}

/// Every parser of CBOR with a valid input, and what it says of a second encoding of a value.
#[expect(clippy::type_complexity, reason = "a table")]
fn cbor_parsers() -> [(&'static str, Vec<u8>, fn(&[u8]) -> Result<(), String>); 3] {
    [
        ("not deterministically encoded", keyset(), |bytes| {
            Keyset::decode(bytes).map(|_| ()).map_err(|e| e.to_string())
        }),
        ("not deterministically encoded", credential(), |bytes| {
            let verified = VerifiedCredential::verify(bytes, &issuer().verifying_key(), 1_500);
            verified.map(|_| ()).map_err(|e| e.to_string())
        }),
        ("unreadable", entry(), |bytes| {
            Entry::decode(bytes).map(|_| ()).ok_or("unreadable".into())
        }),
    ]
}

#[test]
fn every_second_encoding_is_refused_by_every_cbor_parser() {
    for (expected, good, parse) in cbor_parsers() {
        assert_eq!(parse(&good), Ok(()));
        // Keys 0 and 1 in one byte each; the value of key 0 follows its key.
        assert_eq!(good[1], 0);
        let long_key = [&[good[0], 0x18, 0x00], &good[2..]].concat();
        let indefinite = [&[0xbf], &good[1..], &[0xff]].concat();
        let trailing = [&good[..], &[0xf6]].concat();
        let unknown = with_entry(&good, &[0x18, 0x63, 0x00]);
        let repeated = {
            let mut decoder = minicbor::Decoder::new(&good[2..]);
            decoder.skip().unwrap();
            let first = &good[1..2 + decoder.position()];
            [&[good[0] + 1], first, &good[1..]].concat()
        };
        for (what, bytes) in [
            ("a long key", long_key),
            ("indefinite length", indefinite),
            ("trailing bytes", trailing),
            ("an unknown key", unknown),
            ("a repeated key", repeated),
        ] {
            let error = parse(&bytes).expect_err(what);
            assert!(error.contains(expected), "{what}: {error}");
        }
    }
}

/// The derived decoders skip what they do not know; skipping must not recurse.
#[test]
fn nesting_in_unknown_fields_is_refused_by_every_cbor_parser() {
    for (expected, good, parse) in cbor_parsers() {
        for open in [0x81, 0x9f, 0xc1, 0xa1] {
            let mut deep = vec![0x18, 0x63];
            deep.extend(std::iter::repeat_n(open, 1500));
            deep.push(0);
            let error = parse(&with_entry(&good, &deep)).expect_err("a field nobody knows");
            // Incomplete nesting is no CBOR at all.
            let no_cbor = ["not a keyset in CBOR", "not CBOR of the expected shape"];
            let known = error.contains(expected) || no_cbor.iter().any(|text| error.contains(text));
            assert!(known, "{error}");
        }
    }
    let deep = [&[0xa1, 0x18, 0x63], &vec![0x81; 1 << 20][..], &[0]].concat();
    assert_eq!(
        Manifest::from_cbor(&deep).err(),
        Some(ManifestError::NotAManifest)
    );
    let error = grant::inspect(&[&[0xa1, 0x18, 0x63], &vec![0x81; 500][..], &[0]].concat());
    assert_eq!(error.err(), Some(Malformed::Cbor { what: "grant" }.into()));
}

fn no_control() -> ControlNames {
    ControlNames::new([]).unwrap()
}

#[test]
fn nesting_in_templates_is_a_fault_of_the_template() {
    let parts = [
        ("{{ ", "(", "1", ")", " }}"),
        ("{{ ", "[", "1", "]", " }}"),
        ("{{ ", "-", "1", "", " }}"),
        ("{{ ", "not ", "1", "", " }}"),
        ("{{ a", "[0", "", "]", " }}"),
        ("{{ a", ".b", "", "", " }}"),
        ("{{ a", "|trim", "", "", " }}"),
        ("{{ 1", "+1", "", "", " }}"),
        ("{{ 1", " if 1 else 1", "", "", " }}"),
        ("", "{% if 1 %}", "x", "{% endif %}", ""),
        ("", "{% for m in messages %}", "x", "{% endfor %}", ""),
        ("", "{% macro m() %}", "x", "{% endmacro %}", ""),
    ];
    for (before, open, inner, close, after) in parts {
        let text = format!("{before}{}{after}", nested(open, inner, close));
        let template = ChatTemplate::new(text.as_bytes(), None, None, no_control());
        let rendered = template.and_then(|t| {
            t.render(&[], true, time::OffsetDateTime::UNIX_EPOCH)
                .map(|_| ())
        });
        match rendered {
            // What only looks nested (a chain) may be fine.
            Ok(()) => assert!(close.is_empty() || open.starts_with("{% for"), "{open}"),
            Err(error) => assert!(matches!(error, ChatError::Faulty { .. }), "{open}: {error}"),
        }
    }
    // A template that calls itself ends at a limit of the engine.
    let endless = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    let template = ChatTemplate::new(endless.as_bytes(), None, None, no_control()).unwrap();
    let error = template
        .render(&[], true, time::OffsetDateTime::UNIX_EPOCH)
        .err();
    assert!(
        matches!(
            error,
            Some(ChatError::Faulty { .. } | ChatError::TooSlow { .. })
        ),
        "{error:?}"
    );
}

/// More than the limit is refused for its size and not for what it holds: nothing has looked at it.
#[test]
fn oversize_is_refused_before_anything_looks_at_it() {
    let too_large = |what, limit| {
        let found = limit + 1;
        Some(ReleaseError::from(Malformed::TooLarge {
            what,
            found,
            limit,
        }))
    };
    let bytes = |limit: usize| vec![b' '; limit + 1];

    let evidence = Evidence::from_json(&bytes(MAX_EVIDENCE_JSON));
    assert!(matches!(
        evidence,
        Err(EvidenceError::TooLarge {
            limit: MAX_EVIDENCE_JSON,
            ..
        })
    ));
    let quote = Quote::parse(&bytes(MAX_QUOTE)).unwrap_err();
    assert_eq!(quote.fault, QuoteFault::TooLarge { len: MAX_QUOTE + 1 });
    let response = AttestationResponse::from_json(&bytes(MAX_RESPONSE)).unwrap_err();
    assert_eq!(response.found, format!("{} bytes", MAX_RESPONSE + 1));
    let policy = Policy::from_toml(&" ".repeat(MAX_POLICY + 1)).unwrap_err();
    assert!(
        matches!(policy.fault, PolicyFault::TooLarge { .. }),
        "{policy}"
    );
    let limit = rcar::MAX_REQUEST_BYTES;
    assert_eq!(
        rcar::Request::parse(&bytes(limit)).err(),
        too_large("request", limit)
    );
    let limit = rcar::MAX_RESPONSE_BYTES;
    assert_eq!(
        rcar::Challenge::parse(&bytes(limit)).err(),
        too_large("challenge", limit)
    );
    let limit = rcar::MAX_ATTESTATION_BYTES;
    let attestation = rcar::Attestation::parse(&bytes(limit), TeeKind::Tdx);
    assert_eq!(attestation.err(), too_large("attestation", limit));
    assert_eq!(
        Jwe::from_json(&bytes(MAX_JWE_BYTES)).err(),
        too_large("jwe", MAX_JWE_BYTES)
    );
    let limit = issuance::MAX_REQUEST_BYTES;
    let request = CredentialRequest::parse(&bytes(limit));
    assert_eq!(request.err(), too_large("credential request", limit));
    let inspected = grant::inspect(&bytes(MAX_GRANT_BYTES));
    assert_eq!(inspected.err(), too_large("grant", MAX_GRANT_BYTES));
    let limit = MAX_CREDENTIAL_BYTES;
    let verified = VerifiedCredential::verify(&bytes(limit), &issuer().verifying_key(), 0);
    assert_eq!(verified.err(), too_large("credential", limit));
    let keyset = Keyset::decode(&bytes(MAX_ENCODED));
    assert_eq!(keyset.err(), Some(KeysetError::TooLarge(MAX_ENCODED + 1)));
    let config = MeasuredConfig::parse(bytes(64 << 10));
    assert!(matches!(config.err(), Some(ConfigError::TooLarge)));
    let mut announced: &[u8] = &[0xff; 8];
    let frame = wire::read_frame(&mut announced, wire::MAX_REQUEST);
    assert!(matches!(
        frame,
        Err(wire::WireError::TooLarge {
            length: 0xffff_ffff,
            ..
        })
    ));
    let key = tempfile::NamedTempFile::new().unwrap();
    key.as_file().set_len(16 * 1024 + 1).unwrap();
    let read = DataKey::read_file(key.path()).err();
    assert!(matches!(read, Some(KeyFileError::NotAKey { .. })));
    // And 64 bytes of report data are 64.
    assert!("00".repeat(65).parse::<ReportData>().is_err());
}
