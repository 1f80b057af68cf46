//! The fake TEE.
#![forbid(unsafe_code)]

fn main() {}
