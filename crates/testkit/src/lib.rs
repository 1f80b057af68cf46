//! What tests and demonstrations need and no product may link: a fake TEE with its own root of trust, hostile
//! samples, tiny models, the test data, whole deployments. Nothing in here protects anything.

#![forbid(unsafe_code)]

pub mod adapters;
pub mod attacks;
pub mod data;
pub mod deployment;
pub mod fake_tee;
pub mod gguf;
pub mod hostile;
pub mod llama2c;
pub mod models;
pub mod policies;
pub mod statements;
pub mod tap;
pub mod uniform;
