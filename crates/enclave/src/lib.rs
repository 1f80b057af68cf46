//! `casemate-enclave`: the only program that sees keys, private weights and prompts in clear.
//!
//! | module | holds |
//! |---|---|
//! | [`config`] | the measured configuration |
//! | [`exit`] | exit codes of a start that failed |
//! | [`startup`] | the order in which an enclave comes to serve |
//! | [`provision`] | conversations with the key broker |
//! | [`serving`] | keyset, credential and evidence, and their renewal |
//! | [`renewal`] | when that is |
//! | [`quotes`] | how many quotes are made and waited for |
//! | [`clock`] | the time, though the host sets the clock |
//! | [`server`], [`gateway`] | what anybody may call, and the encrypted door |
//! | [`access`] | who asks |
//! | [`attested_tls`] | the other door: TLS that ends here |
//! | [`arrival`], [`bodies`] | places for requests that are arriving, and how many bytes all of them hold |
//! | [`linger`] | what still comes of one that was refused |
//! | [`refusal`] | why one is refused before the API sees it |
//! | [`relay`] | requests that another replica can open |
//! | [`workers`] | threads for preparing requests |
//! | [`api`] | the OpenAI-compatible API behind that door |
//! | [`grammars`] | how many bytes what answers must be takes, and for whom |
//! | [`receipts`] | signed statements about its answers |
//! | [`denial`] | why a start was denied, for machines |
//! | [`metrics`] | counters |
//!
//! Sealing and importing models, judging evidence and talking to users' programs happen elsewhere; the library form
//! exists for tests.

#![forbid(unsafe_code)]

pub mod access;
pub mod adapters;
pub mod api;
pub mod arrival;
pub mod attested_tls;
pub mod bodies;
pub mod clock;
pub mod config;
pub mod denial;
pub mod exit;
pub mod gateway;
pub mod grammars;
pub mod linger;
pub mod metrics;
pub mod offload;
pub mod provision;
pub mod quotes;
pub mod receipts;
pub mod refusal;
pub mod relay;
pub mod renewal;
pub mod server;
pub mod serving;
pub mod startup;
pub mod workers;
