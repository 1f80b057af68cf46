//! casemate-enclave: the only program that sees keys, private weights and prompts in clear.

#![forbid(unsafe_code)]

fn main() {}
