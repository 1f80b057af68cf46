//! Keysets, the user's verification of a service, OHTTP bodies, attested TLS, receipts; no sockets.

#![forbid(unsafe_code)]

pub mod keyset;
pub mod ohttp;
pub mod receipt;
pub mod tls;
pub mod verify;
