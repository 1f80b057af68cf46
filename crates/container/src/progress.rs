//! How long steps report their progress, without knowing who shows it.

/// What a long step is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading the source and computing digests.
    Digest,
    /// Encrypting and writing.
    Seal,
    /// Reading, decrypting and verifying.
    Open,
    /// Turning verified tensors into the form that kernels read.
    Convert,
}

/// Receives progress from several threads at once.
pub trait Progress: Sync {
    /// A stage begins; `total` bytes will be reported.
    fn begin(&self, stage: Stage, total: u64);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
    /// The stage that began last is over.
    fn end(&self);
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: Stage, _: u64) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
}
