//! End-to-end tests over the real binaries.

#![forbid(unsafe_code)]
