//! What measurements of a worker's view are made of: the rows that products get, before anything hides them, and files of
//! rows. `casemate-audit` is built on it, and the demonstration shows it. No product links it.

#![forbid(unsafe_code)]

pub mod transcript;
pub mod watched;
