//! The sealed model format: manifest, digests, chunked AEAD, signatures.

#![forbid(unsafe_code)]
