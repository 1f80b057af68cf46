//! Products with the help of workers in this process, honest and not.

mod adapters;
mod encrypted;
mod engine;
mod fake;
mod faults;
mod products;
#[path = "../../../engine/tests/support/mod.rs"]
mod support;
#[path = "../../src/testing.rs"]
#[allow(dead_code, reason = "the unit tests use other parts of it")]
mod testing;
