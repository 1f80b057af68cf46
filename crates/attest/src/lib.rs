//! Evidence parsing and appraisal against a policy; no clock, no I/O, no network.

#![forbid(unsafe_code)]

pub mod measure;
