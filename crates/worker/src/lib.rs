//! A worker: multiplies matrices for enclaves that do not trust it. It holds no keys, no masks, no
//! model; what it is sent are public weights and uniformly random elements (`docs/offload.md`).
//!
//! | module | holds |
//! |---|---|
//! | [`backend`] | what multiplies: the processor, or with the features `cuda` and `wgpu` a GPU |
//! | [`memory`] | how much each connection may take, and the sizes people write |
//! | [`connection`] | one client, from HELLO to the end |
//! | [`listener`] | where clients arrive, and how many at once |
//! | [`stream`], [`tls`] | their bytes, in clear or through TLS with a key that enclaves pin |
//!
//! Nor does the worker trust its clients: whoever reaches its socket gets a share of its memory and
//! of its time, and nothing else. A client that breaks the protocol loses its connection.

#![forbid(unsafe_code)]

pub mod backend;
pub mod connection;
pub mod listener;
pub mod memory;
pub mod stream;
pub mod tls;
