//! What an enclave received in a session, as it says so when it asks for a credential: for each resource that it asked for,
//! the SHA-256 of what it got.
//!
//! A guest's request for a resource and the broker's answer carry nothing that ties one to the other. Whoever passes them on
//! can ask for another resource than the guest did, and the guest cannot tell two grants apart that are for one model. The
//! broker can: it knows what it released as what.

use aws_lc_rs::digest::{Context, SHA256};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::error::{Malformed, shown};
use crate::issuance::bytes32;
use crate::rcar::ResourcePath;

/// Domain of the digest that evidence is bound to.
const DOMAIN: &str = "casemate received resources v1";
/// Most resources: a model and as many adapters as a keyset may have.
pub const MAX_RECEIVED: usize = 65;

/// A resource, and what was received as it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// What was asked for.
    pub path: ResourcePath,
    /// SHA-256 of what came.
    pub sha256: [u8; 32],
}

/// Its form in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wire {
    path: String,
    sha256: String,
}

impl From<&Received> for Wire {
    fn from(received: &Received) -> Self {
        Self {
            path: received.path.to_string(),
            sha256: STANDARD.encode(received.sha256),
        }
    }
}

/// Reads a list: the model's resource first, each resource once.
pub(crate) fn parse(wire: &[Wire]) -> Result<Vec<Received>, Malformed> {
    let what = "credential request.received";
    if !(1..=MAX_RECEIVED).contains(&wire.len()) {
        return Err(Malformed::Unsupported {
            what,
            found: wire.len().to_string(),
            expected: "1 to 65 resources",
        });
    }
    let mut all: Vec<Received> = Vec::with_capacity(wire.len());
    for Wire { path, sha256 } in wire {
        let path: ResourcePath = path.parse()?;
        if all.iter().any(|other| other.path == path) {
            return Err(Malformed::Unsupported {
                what,
                found: shown(path.as_str()),
                expected: "each resource once",
            });
        }
        let sha256 = bytes32("credential request.received.sha256", sha256)?;
        all.push(Received { path, sha256 });
    }
    Ok(all)
}

/// What evidence for a credential is bound to besides keyset and nonce: SHA-256 of the domain, a zero byte and the CBOR
/// array of `[path, sha256]`.
#[must_use]
pub fn digest(received: &[Received]) -> [u8; 32] {
    let mut cbor = minicbor::Encoder::new(Vec::new());
    let mut written = cbor.array(received.len() as u64).map(|_| ());
    for Received { path, sha256 } in received {
        written = written.and_then(|()| {
            cbor.array(2)?.str(path.as_str())?.bytes(sha256)?;
            Ok(())
        });
    }
    written.expect("writing to a Vec cannot fail");
    let mut context = Context::new(&SHA256);
    for part in [DOMAIN.as_bytes(), &[0], &cbor.into_writer()] {
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const VECTORS: &str = include_str!("../../../docs/vectors/key-release.json");

    fn received(path: &str, byte: u8) -> Received {
        Received {
            path: path.parse().unwrap(),
            sha256: [byte; 32],
        }
    }

    #[test]
    fn the_digest_is_the_vectors() {
        let vectors: Value = serde_json::from_str(VECTORS).unwrap();
        let list = [
            received("default/model/smollm2", 0x61),
            received("default/model/bills", 0x62),
        ];
        assert_eq!(hex::encode(digest(&list)), vectors["received"]["digest"]);
        // Order, names and contents count.
        let others = [
            vec![list[1].clone(), list[0].clone()],
            vec![list[0].clone()],
            vec![list[0].clone(), received("default/model/bills", 0x63)],
            vec![list[0].clone(), received("default/model/bill", 0x62)],
        ];
        for other in others {
            assert_ne!(digest(&other), digest(&list), "{other:?}");
        }
    }

    #[test]
    fn a_list_names_each_resource_once() {
        let wire = |paths: &[&str]| -> Vec<Wire> {
            let of = |path: &&str| Wire {
                path: (*path).to_owned(),
                sha256: STANDARD.encode([1; 32]),
            };
            paths.iter().map(of).collect()
        };
        assert_eq!(
            parse(&wire(&["a/b/c", "a/b/d"])).unwrap(),
            [received("a/b/c", 1), received("a/b/d", 1)]
        );
        let said = |wire: &[Wire]| parse(wire).unwrap_err().to_string();
        assert!(said(&[]).contains("1 to 65"));
        assert!(said(&wire(&["a/b/c", "a/b/c"])).contains("each resource once"));
        assert!(said(&wire(&["a/b"])).contains("resource path"));
        let many: Vec<_> = (0..66).map(|n| format!("a/b/{n}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert!(said(&wire(&many)).contains("1 to 65"));
        parse(&wire(&many[..65])).unwrap();
        let mut short = wire(&["a/b/c"]);
        short[0].sha256 = STANDARD.encode([1; 31]);
        assert!(said(&short).contains("31 bytes"));
    }
}
