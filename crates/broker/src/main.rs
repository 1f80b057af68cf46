//! casemate-broker: appraises evidence, releases keys, signs credentials, logs decisions.

#![forbid(unsafe_code)]

fn main() {}
