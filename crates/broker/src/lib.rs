//! casemate-broker as a library: what the binary is made of, so that tests can drive it in one process.
//!
//! | module | holds |
//! |---|---|
//! | [`broker`] | the decisions |
//! | [`sessions`] | nonces and accepted evidence, in memory |
//! | [`denials`] | how many denials have log entries of their own |
//! | [`store`] | policies, resources and the log, in SQLite |
//! | [`log`] | the decision log's chain and its check |
//! | [`state`] | the state directory |
//! | [`token`] | attestation results tokens |
//! | [`api`] | the public HTTP interface |
//! | [`admin`] | administration over a Unix socket |
//! | [`metrics`], [`clock`] | counters; the time |
//!
//! The protocol's messages and formats are `casemate-release`'s; appraisal and policy are `casemate-attest`'s.

#![forbid(unsafe_code)]

pub mod admin;
pub mod api;
pub mod broker;
pub mod clock;
pub mod denials;
pub mod log;
pub mod metrics;
pub mod sessions;
pub mod state;
pub mod store;
pub mod token;
