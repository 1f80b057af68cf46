//! The broker as its guests, its administrator and an attacker meet it.
//!
//! Evidence comes from the fake TEE, in Intel's format and through the real appraisal.

mod access;
mod adapters;
mod crash;
mod credentials;
mod decisions;
mod floods;
mod former;
mod http;
mod log;
mod program;
mod races;
mod rollbacks;
mod serving;
mod support;
