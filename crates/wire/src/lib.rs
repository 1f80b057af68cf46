//! The protocol between an enclave and a worker that multiplies matrices for it and is believed
//! nothing: `docs/offload.md`. Both ends, over any `Read + Write`, without threads.
//!
//! | module | holds |
//! |---|---|
//! | [`client`] | the enclave's end: [`Client`] |
//! | [`server`] | the worker's end: [`Receiver`] and [`Responder`], which may live on two threads |
//! | [`message`] | what both say: [`Welcome`], [`Shape`], the digest of a matrix |
//! | [`socket`] | [`Address`] and [`Timed`], a socket whose reads and writes end in time |
//! | [`error`] | [`WireError`] and the [`Refusal`]s of a worker |
//!
//! Elements are `u32` below p, weights `i8` in -127..=127; masks, checks and what rows mean are not
//! known here. Every length is compared with what is due before room is made for it, and room is made
//! as bytes come. After any fault a connection is over.

#![forbid(unsafe_code)]

pub mod client;
pub mod error;
mod frame;
pub mod message;
pub mod server;
pub mod socket;

pub use client::{Answer, Client};
pub use error::{Refusal, WireError};
pub use message::{Digest, Hello, Shape, Welcome};
pub use server::{Load, Multiply, Receiver, Request, Responder, Weights, refuse};
pub use socket::{Address, Timed};

/// The version of the protocol that is spoken.
pub const VERSION: u16 = 1;

/// The least that either side must take as a payload.
pub const MIN_PAYLOAD: u32 = 1 << 20;

/// The most that either side may take as a payload.
pub const MAX_PAYLOAD: u32 = 64 << 20;

/// Most MULTIPLYs without an answer that a worker may offer.
pub const MAX_WINDOW: u16 = 64;

/// Most matrices of a connection.
pub const MAX_MATRICES: u32 = 1 << 16;

/// Bytes of each PART but the last of a matrix.
pub const PART: u32 = 1 << 20;
