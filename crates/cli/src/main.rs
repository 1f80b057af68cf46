//! casemate: keygen, seal, inspect, check, measure, verify, proxy.

#![forbid(unsafe_code)]

fn main() {}
