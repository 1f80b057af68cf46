//! Keysets, the user's verification of a service, OHTTP bodies; no sockets.

#![forbid(unsafe_code)]

pub mod keyset;
pub mod ohttp;
pub mod verify;
