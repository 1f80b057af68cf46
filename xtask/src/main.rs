//! The two commands of the README.
#![forbid(unsafe_code)]

fn main() {}
