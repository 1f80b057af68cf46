//! CPU compute kernels, memory mapping and locking, the thread team: the one home of `unsafe` code that an enclave links.
//!
//! What lives here: [`mem::Region`] (where weights, caches and keys lie), [`team::Team`] (the
//! threads that compute), [`cpu::Isa`] (which instructions they may use) and the arithmetic of a
//! Llama-family model in f32, bf16 and int8. What does not: tensor names, file formats, models, tokens;
//! nothing here knows what it multiplies.
//!
//! Every kernel is written once over sixteen lanes and instantiated per instruction set, so that
//! **all instruction sets, all thread counts and all batch sizes give the same bits** (but for bf16 on
//! AMX, which has a name of its own).
//! `docs/kernels.md` draws the layouts and states the order of every sum.

#![warn(missing_docs)]
#![allow(
    clippy::needless_range_loop,
    reason = "registers are indexed in step, and closures would be compiled without the instruction set"
)]

pub mod attention;
pub mod bandwidth;
pub mod cpu;
pub mod elementwise;
pub mod gemm;
pub mod hardening;
pub mod heap;
mod isa;
pub mod mem;
pub mod norm;
pub mod oblivious;
mod pack;
pub mod panels;
pub mod peak;
pub mod q4;
pub mod q8;
pub mod rope;
pub mod rotate;
pub mod softmax;
pub mod team;
