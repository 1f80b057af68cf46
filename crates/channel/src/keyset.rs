//! The serving keyset: what an enclave generates after loading its model, and how evidence is bound
//! to it.
//!
//! A keyset is deterministic CBOR. Its SHA-256 enters the report data of the serving quote together
//! with the verifier's nonce, so evidence vouches for exactly these keys, this model and this
//! lifetime. Whose service it is, evidence cannot say: that is the deployment credential
//! (`casemate_release::credential`), and both are judged together in [`crate::verify`].

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;
use casemate_attest::ReportData;
use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

/// The version of the keyset encoding described here and in docs/channel.md.
pub const FORMAT: u32 = 1;
/// The largest encoded keyset that is looked at.
pub const MAX_ENCODED: usize = 16 * 1024;
/// The longest time a keyset may be valid: an hour of service and as much again while its successor
/// takes over.
pub const MAX_LIFETIME_SECONDS: u64 = 2 * 3600;

const MAX_TEXT: usize = 128;
const MAX_ADAPTERS: usize = 64;
const MAX_OHTTP_CONFIG: usize = 4096;
const DOMAIN: &str = "casemate report data v1";

/// The keys and facts an enclave serves under.
///
/// The fields are plain because [`Keyset::encode`] and [`Keyset::decode`] both check them: a keyset
/// that breaks a rule can be written down but neither published nor accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyset {
    /// One OHTTP key configuration (RFC 9458, section 3.1), without a length prefix.
    pub ohttp_config: Vec<u8>,
    /// Ed25519 public key under which receipts are signed.
    pub receipt_key: [u8; 32],
    /// SHA-256 of the SubjectPublicKeyInfo of the key for attested TLS, if the enclave offers it.
    pub tls_key_digest: Option<[u8; 32]>,
    /// Name of the model, as its manifest has it.
    pub model_name: String,
    /// Digest of the model's canonical plaintext manifest.
    pub model_digest: [u8; 32],
    /// The model's monotonic version.
    pub model_version: u64,
    /// Digests of the adapters that are loaded, ascending.
    pub adapter_digests: Vec<[u8; 32]>,
    /// Arithmetic the model is served in, such as `int8-g32`.
    pub compute: String,
    /// Version of the broker's policy under which the model key was released.
    pub policy_version: u64,
    /// Start of validity, seconds since the Unix epoch.
    pub not_before: u64,
    /// End of validity, seconds since the Unix epoch; at this second the keyset is no longer valid.
    pub expires_at: u64,
}

/// Why bytes are not a keyset, or why a keyset may not be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysetError {
    /// More than [`MAX_ENCODED`] bytes.
    #[error("a keyset of {0} bytes is over the limit")]
    TooLarge(usize),
    /// Not CBOR of the expected shape.
    #[error("not a keyset in CBOR")]
    Cbor,
    /// CBOR of the expected shape, but not in its one deterministic encoding.
    #[error("not deterministically encoded")]
    NotDeterministic,
    /// A format version this program does not know.
    #[error("keyset format {0} is not known")]
    Format(u32),
    /// A field breaks the rule the specification gives for it.
    #[error("field {0} breaks its rule")]
    Field(&'static str),
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct Wire {
    #[n(0)]
    format: u32,
    #[cbor(n(1), with = "minicbor::bytes")]
    ohttp_config: Vec<u8>,
    #[cbor(n(2), with = "minicbor::bytes")]
    receipt_key: [u8; 32],
    #[n(3)]
    tls_key_digest: Option<ByteArray<32>>,
    #[n(4)]
    model_name: String,
    #[cbor(n(5), with = "minicbor::bytes")]
    model_digest: [u8; 32],
    #[n(6)]
    model_version: u64,
    #[n(7)]
    adapter_digests: Vec<ByteArray<32>>,
    #[n(8)]
    compute: String,
    #[n(9)]
    policy_version: u64,
    #[n(10)]
    not_before: u64,
    #[n(11)]
    expires_at: u64,
}

impl Keyset {
    /// The one encoding of this keyset.
    pub fn encode(&self) -> Result<Vec<u8>, KeysetError> {
        self.check()?;
        let wire = Wire {
            format: FORMAT,
            ohttp_config: self.ohttp_config.clone(),
            receipt_key: self.receipt_key,
            tls_key_digest: self.tls_key_digest.map(ByteArray::from),
            model_name: self.model_name.clone(),
            model_digest: self.model_digest,
            model_version: self.model_version,
            adapter_digests: self.adapter_digests.iter().map(|&d| d.into()).collect(),
            compute: self.compute.clone(),
            policy_version: self.policy_version,
            not_before: self.not_before,
            expires_at: self.expires_at,
        };
        minicbor::to_vec(&wire).map_err(|_| KeysetError::Cbor)
    }

    /// Parses an encoding and refuses every other encoding of the same values.
    pub fn decode(bytes: &[u8]) -> Result<Keyset, KeysetError> {
        if bytes.len() > MAX_ENCODED {
            return Err(KeysetError::TooLarge(bytes.len()));
        }
        let wire: Wire = minicbor::decode(bytes).map_err(|_| KeysetError::Cbor)?;
        // The derived decoder skips unknown keys and trailing bytes; encoding again shows both.
        if minicbor::to_vec(&wire).map_err(|_| KeysetError::Cbor)? != bytes {
            return Err(KeysetError::NotDeterministic);
        }
        if wire.format != FORMAT {
            return Err(KeysetError::Format(wire.format));
        }
        let keyset = Keyset {
            ohttp_config: wire.ohttp_config,
            receipt_key: wire.receipt_key,
            tls_key_digest: wire.tls_key_digest.map(Into::into),
            model_name: wire.model_name,
            model_digest: wire.model_digest,
            model_version: wire.model_version,
            adapter_digests: wire.adapter_digests.into_iter().map(Into::into).collect(),
            compute: wire.compute,
            policy_version: wire.policy_version,
            not_before: wire.not_before,
            expires_at: wire.expires_at,
        };
        keyset.check()?;
        Ok(keyset)
    }

    fn check(&self) -> Result<(), KeysetError> {
        let rule = |holds: bool, field| {
            if holds {
                Ok(())
            } else {
                Err(KeysetError::Field(field))
            }
        };
        rule(
            (1..=MAX_OHTTP_CONFIG).contains(&self.ohttp_config.len()),
            "ohttp_config",
        )?;
        rule(is_model_name(&self.model_name), "model_name")?;
        rule(is_printable(&self.compute), "compute")?;
        rule(
            self.adapter_digests.len() <= MAX_ADAPTERS,
            "adapter_digests",
        )?;
        rule(
            self.adapter_digests.windows(2).all(|w| w[0] < w[1]),
            "adapter_digests",
        )?;
        rule(self.not_before < self.expires_at, "expires_at")?;
        rule(
            self.expires_at - self.not_before <= MAX_LIFETIME_SECONDS,
            "expires_at",
        )
    }
}

/// A manifest's rule for the name of its model, which may have spaces and letters of any script.
fn is_model_name(text: &str) -> bool {
    (1..=MAX_TEXT).contains(&text.len()) && !text.contains(char::is_control)
}

fn is_printable(text: &str) -> bool {
    (1..=MAX_TEXT).contains(&text.len()) && text.bytes().all(|b| (0x21..0x7f).contains(&b))
}

/// SHA-256 of an encoded keyset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeysetDigest(pub [u8; 32]);

impl KeysetDigest {
    /// The digest of an encoding; does not look at what it encodes.
    pub fn of(encoded: &[u8]) -> KeysetDigest {
        let mut out = [0; 32];
        out.copy_from_slice(digest::digest(&digest::SHA256, encoded).as_ref());
        KeysetDigest(out)
    }
}

impl fmt::Display for KeysetDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Text that is not the digest of a keyset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a keyset digest is 64 hexadecimal digits, in lower case")]
pub struct NotADigest;

/// Reads the one form that [`fmt::Display`] writes.
impl FromStr for KeysetDigest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<KeysetDigest, NotADigest> {
        let mut digest = [0; 32];
        hex::decode_to_slice(text, &mut digest).map_err(|_| NotADigest)?;
        let digest = KeysetDigest(digest);
        (digest.to_string() == text)
            .then_some(digest)
            .ok_or(NotADigest)
    }
}

/// What a quote over a keyset is for. A quote made for one purpose proves nothing for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Shown to the broker, which then signs a deployment credential, by an enclave that received in the same session what
    /// this digest names (`casemate_release::received`).
    Credential([u8; 32]),
    /// Shown to users.
    Serving,
}

/// The part the maker of the evidence plays. Both ends of a conversation may show evidence one day;
/// the label keeps one's evidence from being reflected as the other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The enclave that serves the model.
    Service,
}

/// The connection the evidence is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// None: messages are encrypted to a key of the keyset itself (OHTTP, JWE).
    Key,
    /// The exporter value of the TLS 1.3 connection that carries the conversation.
    TlsExporter([u8; 32]),
}

/// The report data of a quote over a keyset:
/// SHA-512 of the CBOR array `[domain, purpose, role, keyset digest, nonce, binding, ? received]`.
pub fn report_data(
    purpose: Purpose,
    role: Role,
    keyset: &KeysetDigest,
    nonce: &[u8; 32],
    binding: &ChannelBinding,
) -> ReportData {
    let (purpose, received) = match purpose {
        Purpose::Credential(received) => ("credential", Some(received)),
        Purpose::Serving => ("serving", None),
    };
    let role = match role {
        Role::Service => "service",
    };
    let binding: &[u8] = match binding {
        ChannelBinding::Key => &[],
        ChannelBinding::TlsExporter(value) => value,
    };
    let mut cbor = minicbor::Encoder::new(Vec::with_capacity(192));
    cbor.array(6 + u64::from(received.is_some()))
        .and_then(|e| e.str(DOMAIN))
        .and_then(|e| e.str(purpose))
        .and_then(|e| e.str(role))
        .and_then(|e| e.bytes(&keyset.0))
        .and_then(|e| e.bytes(nonce))
        .and_then(|e| e.bytes(binding))
        .and_then(|e| match &received {
            Some(received) => e.bytes(received),
            None => Ok(e),
        })
        .expect("writing to a Vec cannot fail");
    let mut out = [0; 64];
    out.copy_from_slice(digest::digest(&digest::SHA512, &cbor.into_writer()).as_ref());
    ReportData::new(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyset() -> Keyset {
        Keyset {
            ohttp_config: vec![1, 2, 3],
            receipt_key: [4; 32],
            tls_key_digest: None,
            model_name: "smollm2".into(),
            model_digest: [5; 32],
            model_version: 6,
            adapter_digests: vec![[7; 32], [8; 32]],
            compute: "int8-g32".into(),
            policy_version: 9,
            not_before: 1_000,
            expires_at: 4_600,
        }
    }

    #[test]
    fn encoding_is_the_one_written_in_the_specification() {
        let mut small = keyset();
        small.adapter_digests.clear();
        let expected = [
            "ab",
            "0001",
            "0143010203",
            &format!("025820{}", "04".repeat(32)),
            "0467736d6f6c6c6d32",
            &format!("055820{}", "05".repeat(32)),
            "0606",
            "0780",
            "0868696e74382d673332",
            "0909",
            "0a1903e8",
            "0b1911f8",
        ]
        .concat();
        assert_eq!(hex::encode(small.encode().unwrap()), expected);
    }

    #[test]
    fn a_digest_has_one_text() {
        let text = "0a".repeat(32);
        assert_eq!(text.parse(), Ok::<_, NotADigest>(KeysetDigest([10; 32])));
        for bad in [
            &text.to_uppercase(),
            &text[1..],
            &format!("{text}0a"),
            "",
            &format!(" {}", &text[1..]),
        ] {
            assert_eq!(bad.parse::<KeysetDigest>(), Err(NotADigest), "{bad:?}");
        }
    }

    #[test]
    fn accepts_every_model_name_that_a_manifest_may_have() {
        let keyset = Keyset {
            model_name: "Modèle 135M Instruct".into(),
            ..keyset()
        };
        assert_eq!(Keyset::decode(&keyset.encode().unwrap()).unwrap(), keyset);
    }

    #[test]
    fn round_trips_with_and_without_optional_fields() {
        for tls in [None, Some([3; 32])] {
            let keyset = Keyset {
                tls_key_digest: tls,
                ..keyset()
            };
            assert_eq!(Keyset::decode(&keyset.encode().unwrap()).unwrap(), keyset);
        }
    }

    #[test]
    fn refuses_trailing_bytes_unknown_keys_and_long_forms() {
        let good = keyset().encode().unwrap();
        let mut trailing = good.clone();
        trailing.push(0);
        assert_eq!(
            Keyset::decode(&trailing),
            Err(KeysetError::NotDeterministic)
        );

        let mut unknown = good.clone();
        unknown[0] += 1;
        unknown.extend([0x0c, 0x00]);
        assert_eq!(Keyset::decode(&unknown), Err(KeysetError::NotDeterministic));

        // The format number 1 written in two bytes instead of one.
        let mut long = vec![good[0], 0x00, 0x18, 0x01];
        long.extend(&good[3..]);
        assert_eq!(Keyset::decode(&long), Err(KeysetError::NotDeterministic));
    }

    #[test]
    fn refuses_every_truncation() {
        let good = keyset().encode().unwrap();
        for n in 0..good.len() {
            assert_eq!(
                Keyset::decode(&good[..n]),
                Err(KeysetError::Cbor),
                "{n} bytes"
            );
        }
    }

    #[test]
    fn refuses_unknown_format_and_oversize() {
        let mut bytes = keyset().encode().unwrap();
        bytes[2] = 2;
        assert_eq!(Keyset::decode(&bytes), Err(KeysetError::Format(2)));
        assert_eq!(
            Keyset::decode(&[0; MAX_ENCODED + 1]),
            Err(KeysetError::TooLarge(16385))
        );
    }

    #[test]
    fn neither_encodes_nor_decodes_fields_that_break_their_rule() {
        let broken = [
            (
                "ohttp_config",
                Keyset {
                    ohttp_config: vec![],
                    ..keyset()
                },
            ),
            (
                "model_name",
                Keyset {
                    model_name: String::new(),
                    ..keyset()
                },
            ),
            (
                "model_name",
                Keyset {
                    model_name: "line\nbreak".into(),
                    ..keyset()
                },
            ),
            (
                "compute",
                Keyset {
                    compute: "x".repeat(129),
                    ..keyset()
                },
            ),
            (
                "adapter_digests",
                Keyset {
                    adapter_digests: vec![[8; 32], [7; 32]],
                    ..keyset()
                },
            ),
            (
                "adapter_digests",
                Keyset {
                    adapter_digests: vec![[8; 32], [8; 32]],
                    ..keyset()
                },
            ),
            (
                "expires_at",
                Keyset {
                    expires_at: 1_000,
                    ..keyset()
                },
            ),
            (
                "expires_at",
                Keyset {
                    expires_at: 1_001 + MAX_LIFETIME_SECONDS,
                    ..keyset()
                },
            ),
        ];
        for (field, keyset) in broken {
            assert_eq!(keyset.encode(), Err(KeysetError::Field(field)));
        }
        // The decoder applies the same rules: an end before the start.
        let mut bytes = keyset().encode().unwrap();
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&[0x03, 0xe7]);
        assert_eq!(
            Keyset::decode(&bytes),
            Err(KeysetError::Field("expires_at"))
        );
    }

    #[test]
    fn report_data_changes_with_every_input() {
        let digest = KeysetDigest([1; 32]);
        let nonce = [2; 32];
        let base = report_data(
            Purpose::Serving,
            Role::Service,
            &digest,
            &nonce,
            &ChannelBinding::Key,
        );
        let others = [
            report_data(
                Purpose::Credential([0; 32]),
                Role::Service,
                &digest,
                &nonce,
                &ChannelBinding::Key,
            ),
            report_data(
                Purpose::Credential([1; 32]),
                Role::Service,
                &digest,
                &nonce,
                &ChannelBinding::Key,
            ),
            report_data(
                Purpose::Serving,
                Role::Service,
                &KeysetDigest([3; 32]),
                &nonce,
                &ChannelBinding::Key,
            ),
            report_data(
                Purpose::Serving,
                Role::Service,
                &digest,
                &[3; 32],
                &ChannelBinding::Key,
            ),
            report_data(
                Purpose::Serving,
                Role::Service,
                &digest,
                &nonce,
                &ChannelBinding::TlsExporter([0; 32]),
            ),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(base, *other);
            assert!(!others[..index].contains(other));
        }
    }

    #[test]
    fn report_data_is_the_vector_of_the_specification() {
        let data = report_data(
            Purpose::Serving,
            Role::Service,
            &KeysetDigest([0x11; 32]),
            &[0x22; 32],
            &ChannelBinding::Key,
        );
        assert_eq!(data.to_string(), REPORT_DATA_VECTOR);
    }

    // printf of the CBOR array by hand, through sha512sum: see docs/channel.md.
    const REPORT_DATA_VECTOR: &str = concat!(
        "b00e67c3713300ef50b2ce2a5bc4523ccd8754158fc020d0e5a1ea01d42a88d6",
        "370c64b79e5df86d72fa2dd4abd8031ee7582ff9b7f43b7e8454e5f67e587892"
    );
}
