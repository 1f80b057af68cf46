//! Products with the help of workers in this process, honest and not.

mod encrypted;
mod engine;
mod fake;
mod faults;
mod products;
#[path = "../../../engine/tests/support/mod.rs"]
mod support;
