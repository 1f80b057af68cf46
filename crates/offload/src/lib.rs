//! The secret half of products by an untrusted worker: pads, masks, checks and restoring.
//!
//! ```text
//! enclave                                                     worker
//! x int8 rows, r fresh pads           x + r                   holds W, which is public
//! (W·r made before)               ─────────────▶              W·(x + r)
//! s·y' = (sW)·(x + r)?            ◀─────────────
//! y = y' - W·r, exactly W·x
//! ```
//! | module | holds |
//! |---|---|
//! | [`offload`] | [`Offload`]: who computes which product; the road back when a worker fails |
//! | [`plan`] | which matrices go where, and why |
//! | `layers` (feature `engine`) | layers of the engine whose sums may come from a worker |
//! | [`link`] | connections to workers: what goes out is masked, what comes in is checked |
//! | `memory` | where all that is kept: locked, wiped |
//! | `pad`, `pool` | pads, of which each is used once; W·r of those that wait |
//! | `spill` | masks that memory has no room for, sealed |
//! | `check` | two secret vectors for each matrix, and products that passed them |
//! | [`tls`] | encrypted connections to a pinned key, which shares must go over |
//! | [`costs`] | what the parts take, for measurements |
//! | `public` | matrices that others may see |
//! | `keys` | the key of a run and the uniform elements made from it |
//!
//! What is not here: where workers are (the caller connects), activations in floating point and the
//! model (the engine's), the protocol (`casemate-wire`), arithmetic modulo p (`casemate-field`).
//! `docs/offload.md` says what is promised and why it holds.

#![forbid(unsafe_code)]

mod check;
pub mod costs;
mod keys;
#[cfg(feature = "engine")]
pub mod layers;
pub mod link;
mod memory;
pub mod offload;
mod pad;
pub mod plan;
mod pool;
mod public;
mod spill;
pub mod tls;

#[cfg(test)]
mod detectors;
#[cfg(test)]
mod testing;
#[cfg(all(test, feature = "engine"))]
mod transcripts;

pub use keys::BootKey;
pub use link::{Connect, Fault, Transport};
pub use offload::{Config, Event, Metrics, Offload, Workers};
pub use pad::{Masked, Pad};
pub use public::{Private, PublicMatrix, Weights};
pub use tls::{Encrypted, Pin};
