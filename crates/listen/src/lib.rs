//! Accepts connections and serves HTTP/1.1 on them, with limits on everything and a graceful end.
//!
//! | module | holds |
//! |---|---|
//! | [`limits`] | how many, how long, how large |
//! | [`server`] | the accept loop, and what happens when all places are taken |
//! | `activity` | what a connection is doing: who may be closed, and when |
//! | `progress` | a stream that gives up on a peer which does not read |
//!
//! There is no limit on the life of a connection or of an answer: an answer may take as long as it is wanted. What is
//! limited is every way of holding a connection without using it: not finishing a request's head, not asking again, not
//! reading the answer. How long a request's body may take is the handler's business, which knows how large it may be.
//!
//! All times are `tokio::time`, so tests pause and advance them.

#![forbid(unsafe_code)]

mod activity;
pub mod limits;
mod progress;
pub mod server;

pub use limits::{Limits, connections_within_descriptors};
pub use server::{Counters, Ended, Establish, Server};
