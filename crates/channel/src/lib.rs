//! Keysets, the user's verification of a service, OHTTP bodies, receipts; no sockets.

#![forbid(unsafe_code)]

pub mod keyset;
pub mod ohttp;
pub mod receipt;
pub mod verify;
