//! Key release: RCAR messages, JWE, signed key grants, deployment credentials; no sockets.
//!
//! | module | holds |
//! |---|---|
//! | [`rcar`] | messages of the Confidential Containers key broker's protocol and the report data they imply |
//! | [`jwe`] | ECDH-ES+A256KW with A256GCM |
//! | [`grant`] | a model's data key, signed by its provider |
//! | [`api_key`] | who may use a model, as grants list it |
//! | [`rollback`] | the provider's permission to go back to an older policy or model, once |
//! | [`credential`] | the short-lived statement that a keyset belongs to an issuer's deployment |
//! | `signed` | the envelope that grants, rollbacks and credentials are signed in |
//! | [`encoding`] | deterministic CBOR |
//! | [`issuance`] | messages by which an enclave obtains a credential |
//! | [`received`] | what an enclave says it received, bound to its evidence |
//! | [`client`] | the enclave's half of the exchange, without input or output |
//!
//! The specification is `docs/key-release.md`. Policy and appraisal live in `casemate-attest`; storage,
//! sessions and the decision log live in `casemate-broker`.

#![forbid(unsafe_code)]

pub mod api_key;
pub mod client;
pub mod credential;
pub mod encoding;
pub mod error;
pub mod grant;
pub mod issuance;
pub mod jwe;
pub mod random;
pub mod rcar;
pub mod received;
pub mod rollback;
pub(crate) mod signed;

pub use error::{Malformed, Refused, ReleaseError, Unverified};
