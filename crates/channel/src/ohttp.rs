//! The user's channel: a complete HTTP request encrypted to the key of an attested keyset, and its
//! answer as a stream, over any transport that carries bytes.
//!
//! Outside, messages are chunked Oblivious HTTP (RFC 9458 and its chunked extension) with the hybrid
//! KEM X-Wing; inside, binary HTTP (RFC 9292) under a padding profile of our own. `docs/channel.md`
//! is the specification. [`Recipient`] encapsulates requests and opens answers; [`Keyring`] holds the
//! private keys, opens each request once and answers it. Neither opens a socket, reads a clock or
//! knows what an API looks like.
//!
//! The cryptography is that of the libraries `hpke` and `aws-lc-rs`; chunking and the key schedule of
//! the answer, about 200 lines, are our own. The library `ohttp` implements them too, and our tests
//! talk to it in both directions, but version 0.8 cannot be used on a network: its chunk reader takes
//! a length that arrives in two pieces for the end of the message, and an empty chunk for the end of
//! the stream.

mod chunks;
mod client;
mod frames;
mod message;
mod replay;
mod server;
mod suite;

pub use client::{
    Answer, AnswerBody, AnswerError, EncapsulateError, PendingAnswer, Recipient, UnsupportedConfig,
};
pub use frames::{FRAME_BYTES, FRAME_DATA_BYTES, MINIMUM_FRAMES, padded_frames};
pub use message::{MAX_REQUEST_HEAD, MINIMUM_REQUEST_BYTES, MessageFault, padded_request_bytes};
pub use server::{
    Arrived, Keyring, LOOKED_AT_EARLY, NoFreeKeyId, PublicKeyConfig, ReceiveError, Received,
    Responder,
};

/// What is around the ciphertext and what is inside of it, as pure functions: for fuzzers, and for whoever holds
/// another implementation against this one.
pub mod plain {
    pub use super::chunks::{ChunkFault, ChunkReader, put, put_last};
    pub use super::message::{AnswerDecoder, AnswerHead, decode_request, encode_request};
}

/// Media type of an encapsulated request.
pub const REQUEST_MEDIA_TYPE: &str = "message/ohttp-chunked-req";
/// Media type of an encapsulated answer.
pub const ANSWER_MEDIA_TYPE: &str = "message/ohttp-chunked-res";
/// Media type of a refusal outside the encapsulation (RFC 9457).
pub const PROBLEM_MEDIA_TYPE: &str = "application/problem+json";
/// Problem type by which a server says that it does not hold the key a request names (RFC 9458,
/// section 5.3). Anybody on the path can say so too: it is a reason to attest again, nothing more.
pub const KEY_PROBLEM: &str = "https://iana.org/assignments/http-problem-types#ohttp-key";
/// Where requests go, relative to the service's URL.
pub const GATEWAY_PATH: &str = "/.well-known/ohttp-gateway";

/// Field outside the encapsulation that names the keyset a request is encrypted to, in hexadecimal: a hint for whoever
/// routes between replicas. Nobody believes it.
pub const KEYSET_HINT: &str = "casemate-keyset";
/// Field that marks a request as relayed by a replica, so that no other relays it again.
pub const RELAYED_MARK: &str = "casemate-relayed";
/// Where a replica lists the keysets it can open requests under, relative to its URL.
pub const KEYSETS_PATH: &str = "/v1/keysets";

/// Whatever a transport failed with.
pub type TransportError = Box<dyn std::error::Error + Send + Sync>;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;
