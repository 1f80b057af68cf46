//! A model in memory, every byte of it verified.

use casemate_kernels::mem::{MemReport, Region};

use crate::adapter::AdapterConfig;
use crate::config::ModelConfig;
use crate::digest::ModelDigest;
use crate::manifest::{Kind, Manifest, TensorEntry};

/// A verified model. Exists only if provider, key, every chunk and every digest were right; holds the payload in one
/// region of locked, undumpable memory that is erased when dropped.
pub struct Model {
    manifest: Manifest,
    digest: ModelDigest,
    region: Region,
    released: Vec<bool>,
}

/// One tensor of a [`Model`].
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    /// Name, encoding, shape.
    pub entry: &'a TensorEntry,
    /// The bytes that the entry's digest covers, aligned to 64.
    pub bytes: &'a [u8],
}

impl Model {
    pub(crate) fn verified(manifest: Manifest, digest: ModelDigest, region: Region) -> Self {
        let released = vec![false; manifest.tensors().len()];
        Model {
            manifest,
            digest,
            region,
            released,
        }
    }

    /// What the model is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Architecture.
    pub fn config(&self) -> &ModelConfig {
        match self.manifest.kind() {
            Kind::Model(config) => config,
            Kind::Adapter(_) => unreachable!("only manifests of models become one"),
        }
    }

    /// What names the model.
    pub fn digest(&self) -> ModelDigest {
        self.digest
    }

    /// The tensor of that name, unless it was released.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let index = self
            .manifest
            .tensor_index(name)
            .filter(|&i| !self.released[i])?;
        let entry = &self.manifest.tensors()[index];
        Some(TensorRef {
            entry,
            bytes: self.bytes(entry.offset, entry.size),
        })
    }

    /// The asset of that name.
    pub fn asset(&self, name: &str) -> Option<&[u8]> {
        self.manifest
            .asset(name)
            .map(|a| self.bytes(a.offset, a.size))
    }

    /// Erases a tensor that has been converted and gives its pages back to the system; [`Self::tensor`] does not know it
    /// any more. Returns how many bytes became free: 0 for an unknown or released one, and pages that neighbours share
    /// stay.
    pub fn release(&mut self, name: &str) -> usize {
        let Some(index) = self
            .manifest
            .tensor_index(name)
            .filter(|&i| !self.released[i])
        else {
            return 0;
        };
        self.released[index] = true;
        let entry = &self.manifest.tensors()[index];
        let start = entry.offset as usize;
        self.region.release(start..start + entry.size as usize)
    }

    /// What the system granted to the model's memory.
    pub fn memory(&self) -> MemReport {
        self.region.report()
    }

    fn bytes(&self, offset: u64, size: u64) -> &[u8] {
        &self.region[offset as usize..(offset + size) as usize]
    }
}

/// A verified adapter, as [`Model`]: it exists only if everything about it was right, and lies in memory of that kind.
pub struct Adapter(Model);

impl Adapter {
    pub(crate) fn verified(manifest: Manifest, digest: ModelDigest, region: Region) -> Self {
        Adapter(Model::verified(manifest, digest, region))
    }

    /// What it is, and for which base.
    pub fn config(&self) -> &AdapterConfig {
        match self.0.manifest.kind() {
            Kind::Adapter(config) => config,
            Kind::Model(_) => unreachable!("only manifests of adapters become one"),
        }
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.0.manifest
    }

    /// What names the adapter.
    pub fn digest(&self) -> ModelDigest {
        self.0.digest
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.0.tensor(name)
    }
}
