//! Appraisal as a whole: captures from real machines, hostile samples with one fault each, and properties.

#![allow(unreachable_pub, missing_docs)]

mod captures;
mod data;
mod forge;
mod hostile;
mod parse_everything;
mod policies;
mod properties;
