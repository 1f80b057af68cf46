//! CPU compute kernels, memory mapping and locking, the thread team: the one home of unsafe code.

#![warn(missing_docs)]
