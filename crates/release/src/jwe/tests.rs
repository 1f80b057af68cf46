use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::random::SystemRandom;
use crate::random::tests::{Counting, Zeros};

const VECTORS: &str = include_str!("../../../../docs/vectors/key-release.json");

fn vectors() -> Value {
    serde_json::from_str(VECTORS).unwrap()
}

fn key() -> RecipientKey {
    RecipientKey::generate(&Counting::default()).unwrap()
}

fn sealed(payload: &[u8]) -> (RecipientKey, Jwe) {
    let key = key();
    let jwe = Jwe::encrypt(payload, key.public(), &SystemRandom).unwrap();
    (key, jwe)
}

fn header(jwe: &Jwe) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(&jwe.protected).unwrap()).unwrap()
}

fn with_header(jwe: &Jwe, header: &Value) -> Jwe {
    Jwe {
        protected: URL_SAFE_NO_PAD.encode(header.to_string()),
        ..jwe.clone()
    }
}

/// RFC 7518 appendix C.
#[test]
fn key_derivation_matches_rfc_7518_appendix_c() {
    let part = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let alice = part("0_NxaRPUMQoAJt50Gz8YiTr8gRTwyEaCumd-MToTmIo");
    let alice = agreement::PrivateKey::from_private_key(&ECDH_P256, &alice).unwrap();
    let bob = PublicKey::from_parts(
        "bob",
        "EC",
        "P-256",
        "weNJy2HscCSM6AEDTDg04biOvhFhyyWvOHQfeF_PxMQ",
        "e8lnCO-AlStT-NJVX-crhB7QRYhiix03illJOVAOyck",
    )
    .unwrap();
    let peer = UnparsedPublicKey::new(&ECDH_P256, &bob.sec1[..]);
    let derived = agreement::agree(&alice, peer, (), |z| {
        assert_eq!(
            z,
            [
                158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156, 251, 49,
                110, 163, 218, 128, 106, 72, 246, 218, 167, 121, 140, 254, 144, 196
            ]
        );
        let mut key = [0; 16];
        concat_kdf(z, "A128GCM", b"Alice", b"Bob", &mut key).unwrap();
        Ok(key)
    });
    assert_eq!(
        URL_SAFE_NO_PAD.encode(derived.unwrap()),
        "VqqN6vgjbSBcIijNcacQGg"
    );
}

#[test]
fn decrypts_what_another_implementation_encrypted() {
    let vector = &vectors()["foreign"];
    let jwe = Jwe::from_json(vector["jwe"].to_string().as_bytes()).unwrap();
    assert_eq!(jwe.decrypt(&key()).unwrap().as_slice(), b"made by jwcrypto");
}

/// `tools/vectors/jwe.py check` decrypts the same vector with another implementation.
#[test]
fn encrypts_the_vector_byte_for_byte() {
    let vector = &vectors()["jwe"];
    let random = Counting::default();
    let recipient = RecipientKey::generate(&random).unwrap();
    let payload = hex::decode(vector["payload"].as_str().unwrap()).unwrap();
    let jwe = Jwe::encrypt(&payload, recipient.public(), &random).unwrap();
    assert_eq!(serde_json::to_value(&jwe).unwrap(), vector["message"]);
    let jwk = serde_json::to_value(recipient.public().to_jwk()).unwrap();
    assert_eq!(jwk, vector["recipient"]);
}

/// Guests of the Confidential Containers project parse the header into a map, serialise it again and
/// use that as additional data: only a header in exactly this order and spacing survives.
#[test]
fn the_header_survives_being_parsed_and_serialised_again() {
    let (_, jwe) = sealed(b"x");
    let text = URL_SAFE_NO_PAD.decode(&jwe.protected).unwrap();
    let header = header(&jwe);
    let again = format!(
        r#"{{"alg":"{ALG}","enc":"{ENC}","epk":{{"crv":"P-256","kty":"EC","x":{},"y":{}}}}}"#,
        header["epk"]["x"], header["epk"]["y"]
    );
    assert_eq!(std::str::from_utf8(&text).unwrap(), again);
}

#[test]
fn two_encryptions_share_nothing() {
    let key = key();
    let a = Jwe::encrypt(b"same", key.public(), &SystemRandom).unwrap();
    let b = Jwe::encrypt(b"same", key.public(), &SystemRandom).unwrap();
    assert_ne!(a.protected, b.protected);
    assert_ne!(a.encrypted_key, b.encrypted_key);
    assert_ne!(a.iv, b.iv);
    assert_ne!(a.ciphertext, b.ciphertext);
}

#[test]
fn another_key_does_not_decrypt() {
    let (_, jwe) = sealed(b"secret");
    let other = RecipientKey::generate(&SystemRandom).unwrap();
    assert_eq!(jwe.decrypt(&other), Err(Unverified::Jwe.into()));
}

#[test]
fn refuses_other_algorithms_and_curves_by_name() {
    let (key, jwe) = sealed(b"secret");
    let refused = |pointer: &str, value: &str| {
        let mut header = header(&jwe);
        *header.pointer_mut(pointer).unwrap() = json!(value);
        with_header(&jwe, &header).decrypt(&key).unwrap_err()
    };
    let unsupported = |what, found: &str, expected| {
        ReleaseError::from(Malformed::Unsupported {
            what,
            found: found.into(),
            expected,
        })
    };
    for alg in [
        "ECDH-ES",
        "ECDH-ES+A128KW",
        "RSA-OAEP-256",
        "dir",
        "none",
        "",
    ] {
        assert_eq!(
            refused("/alg", alg),
            unsupported("jwe.protected.alg", alg, ALG)
        );
    }
    for enc in ["A128GCM", "A128CBC-HS256", "A256GCMKW"] {
        assert_eq!(
            refused("/enc", enc),
            unsupported("jwe.protected.enc", enc, ENC)
        );
    }
    for curve in ["P-384", "X25519", "p-256"] {
        assert_eq!(refused("/epk/crv", curve), unsupported("crv", curve, CURVE));
    }
    assert_eq!(refused("/epk/kty", "OKP"), unsupported("kty", "OKP", "EC"));
}

#[test]
fn refuses_critical_and_unknown_header_parameters() {
    let (key, jwe) = sealed(b"secret");
    for crit in [json!(["exp"]), json!([]), json!("b64")] {
        let mut header = header(&jwe);
        header["crit"] = crit;
        let refused = with_header(&jwe, &header).decrypt(&key);
        assert_eq!(refused, Err(Malformed::CriticalHeader.into()));
    }
    for name in ["apu", "apv", "zip", "kid", "typ"] {
        let mut header = header(&jwe);
        header[name] = json!("QQ");
        let refused = with_header(&jwe, &header).decrypt(&key);
        assert_eq!(
            refused,
            Err(Malformed::Json {
                what: "jwe.protected"
            }
            .into()),
            "{name}"
        );
    }
}

#[test]
fn refuses_repeated_header_parameters() {
    let (key, jwe) = sealed(b"secret");
    let text = header(&jwe).to_string();
    for repeated in [format!(r#""alg":"{ALG}""#), format!(r#""enc":"{ENC}""#)] {
        let text = format!("{{{repeated},{}", &text[1..]);
        let jwe = Jwe {
            protected: URL_SAFE_NO_PAD.encode(text),
            ..jwe.clone()
        };
        assert_eq!(
            jwe.decrypt(&key),
            Err(Malformed::Json {
                what: "jwe.protected"
            }
            .into())
        );
    }
}

#[test]
fn refuses_members_beyond_the_five() {
    let (_, jwe) = sealed(b"secret");
    for name in ["aad", "header", "unprotected", "recipients"] {
        let mut value = serde_json::to_value(&jwe).unwrap();
        value[name] = json!("QQ");
        assert_eq!(
            Jwe::from_json(value.to_string().as_bytes()),
            Err(Malformed::Json { what: "jwe" }.into())
        );
    }
}

#[test]
fn refuses_ephemeral_keys_off_the_curve() {
    let (key, jwe) = sealed(b"secret");
    let mut header = header(&jwe);
    header["epk"]["y"] = header["epk"]["x"].clone();
    assert_eq!(
        with_header(&jwe, &header).decrypt(&key),
        Err(Malformed::NotAPoint {
            what: "jwe.protected.epk"
        }
        .into())
    );
    header["epk"]["x"] = json!("AAAA");
    assert_eq!(
        with_header(&jwe, &header).decrypt(&key),
        Err(Malformed::Length {
            what: "jwe.protected.epk",
            found: 3,
            expected: 32
        }
        .into())
    );
}

#[test]
fn refuses_recipients_off_the_curve_or_of_another_kind() {
    let good = key().public().to_jwk();
    let off = Jwk {
        y: good.x.clone(),
        ..good.clone()
    };
    assert_eq!(
        PublicKey::from_jwk(&off),
        Err(Malformed::NotAPoint { what: "tee-pubkey" }.into())
    );
    let other = Jwk {
        alg: "ECDH-ES".into(),
        ..good.clone()
    };
    assert!(matches!(
        PublicKey::from_jwk(&other),
        Err(ReleaseError::Malformed(Malformed::Unsupported {
            what: "tee-pubkey.alg",
            ..
        }))
    ));
    assert_eq!(PublicKey::from_jwk(&good).as_ref(), Ok(key().public()));
}

#[test]
fn refuses_a_zero_scalar_rather_than_looping() {
    assert_eq!(
        RecipientKey::generate(&Zeros).err(),
        Some(ReleaseError::Crypto("P-256 key generation"))
    );
}

#[test]
fn limits_come_before_parsing() {
    let long = vec![b' '; MAX_JWE_BYTES + 1];
    assert_eq!(
        Jwe::from_json(&long),
        Err(Malformed::TooLarge {
            what: "jwe",
            found: MAX_JWE_BYTES + 1,
            limit: MAX_JWE_BYTES
        }
        .into())
    );
    let payload = vec![0; MAX_PAYLOAD_BYTES + 1];
    assert!(matches!(
        Jwe::encrypt(&payload, key().public(), &SystemRandom),
        Err(ReleaseError::Malformed(Malformed::TooLarge {
            what: "payload",
            ..
        }))
    ));
    let (key, jwe) = sealed(&payload[..MAX_PAYLOAD_BYTES]);
    assert!(
        jwe.to_json().len() <= MAX_JWE_BYTES,
        "the largest payload must fit"
    );
    assert_eq!(jwe.decrypt(&key).unwrap().len(), MAX_PAYLOAD_BYTES);
}

#[test]
fn a_changed_bit_in_any_member_is_refused() {
    let (key, jwe) = sealed(b"a grant");
    let value = serde_json::to_value(&jwe).unwrap();
    for name in ["encrypted_key", "iv", "ciphertext", "tag"] {
        let bytes = URL_SAFE_NO_PAD
            .decode(value[name].as_str().unwrap())
            .unwrap();
        for index in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[index] ^= 1;
            let mut value = value.clone();
            value[name] = json!(URL_SAFE_NO_PAD.encode(&bytes));
            let jwe = Jwe::from_json(value.to_string().as_bytes()).unwrap();
            assert_eq!(
                jwe.decrypt(&key),
                Err(Unverified::Jwe.into()),
                "{name} {index}"
            );
        }
    }
    // The header is authenticated as text: the same members in another order do not pass.
    let mut header = header(&jwe);
    let alg = header.as_object_mut().unwrap().remove("alg").unwrap();
    header["alg"] = alg;
    let reordered = with_header(&jwe, &header);
    assert_eq!(reordered.decrypt(&key), Err(Unverified::Jwe.into()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_payload_round_trips(payload in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let (key, jwe) = sealed(&payload);
        let jwe = Jwe::from_json(&jwe.to_json()).unwrap();
        prop_assert_eq!(&*jwe.decrypt(&key).unwrap(), &payload);
    }

    #[test]
    fn arbitrary_text_never_panics(text in ".{0,256}", header in ".{0,64}") {
        let _ = Jwe::from_json(text.as_bytes());
        let (key, jwe) = sealed(b"x");
        let protected = URL_SAFE_NO_PAD.encode(header);
        let other_header = Jwe { protected, ..jwe.clone() };
        prop_assert!(other_header.decrypt(&key).is_err());
        let other_text = Jwe { ciphertext: text, ..jwe };
        prop_assert!(other_text.decrypt(&key).is_err());
    }
}
