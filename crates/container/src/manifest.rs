//! The manifest: what a sealed model is, to the byte. Deterministic CBOR, parsed with limits.
//!
//! A [`Manifest`] cannot exist with lengths that lie: entries are sorted, lie back to back at their canonical
//! offsets, and their sizes follow from shape and encoding. All of it is checked before anything is allocated for
//! the model itself.

use aws_lc_rs::digest as sha;
use minicbor::{Decode, Encode};

use crate::adapter::AdapterConfig;
use crate::config::ModelConfig;
use crate::digest::ModelDigest;
use crate::dtype::DType;

/// Value of the manifest's `format` field.
pub(crate) const FORMAT: u32 = 1;
/// Every entry starts at a multiple of this, which is a cache line and the widest vector register.
pub(crate) const ALIGNMENT: u64 = 64;
/// Longest encoded manifest, in bytes.
pub(crate) const LARGEST_MANIFEST: usize = 16 << 20;
/// Longest payload, in bytes: 2⁴⁰ AES blocks, which keeps GCM's bound under one key below 2⁻⁴⁸.
pub(crate) const LARGEST_PAYLOAD: u64 = 1 << 44;
const LARGEST_ASSET: u64 = 256 << 20;
const MOST_TENSORS: usize = 65_536;
const MOST_ASSETS: usize = 64;
const LONGEST_NAME: usize = 128;
const HIGHEST_RANK: usize = 4;

/// Whether a tensor may leave the enclave. The default is no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Access {
    /// Stays inside.
    #[n(0)]
    Private,
    /// The provider allows that others see it.
    #[n(1)]
    Public,
}

/// One tensor of the table.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TensorEntry {
    /// Canonical name, for example `blk.0.attn_q.weight`.
    #[n(0)]
    pub name: String,
    /// Element encoding.
    #[n(1)]
    pub dtype: DType,
    /// Row-major, outermost first: `[rows (out), columns (in)]`.
    #[n(2)]
    pub shape: Vec<u64>,
    /// First byte in the payload.
    #[n(3)]
    pub offset: u64,
    /// Bytes.
    #[n(4)]
    pub size: u64,
    /// BLAKE3 of the tensor's bytes.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub digest: [u8; 32],
    /// Who may see it.
    #[n(6)]
    pub access: Access,
}

/// One asset of the table: a file that belongs to the model.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct AssetEntry {
    /// File name, for example `tokenizer.json`.
    #[n(0)]
    pub name: String,
    /// First byte in the payload.
    #[n(1)]
    pub offset: u64,
    /// Bytes.
    #[n(2)]
    pub size: u64,
    /// BLAKE3 of the asset's bytes.
    #[cbor(n(3), with = "minicbor::bytes")]
    pub digest: [u8; 32],
}

/// What a model is. Exists only in canonical form.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
#[cbor(map)]
pub struct Manifest {
    #[n(0)]
    pub(crate) format: u32,
    #[n(1)]
    pub(crate) name: String,
    #[n(2)]
    pub(crate) version: u64,
    /// Of a model.
    #[n(3)]
    pub(crate) config: Option<ModelConfig>,
    #[n(4)]
    pub(crate) tensors: Vec<TensorEntry>,
    #[n(5)]
    pub(crate) assets: Vec<AssetEntry>,
    /// Of an adapter. One of the two is there.
    #[n(6)]
    pub(crate) adapter: Option<AdapterConfig>,
}

/// What a manifest describes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind<'a> {
    /// A model.
    Model(&'a ModelConfig),
    /// An adapter to a model.
    Adapter(&'a AdapterConfig),
}

/// A manifest is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Longer than any real manifest.
    #[error("manifest of {bytes} bytes is longer than {LARGEST_MANIFEST}")]
    TooLarge {
        /// Its length.
        bytes: u64,
    },
    /// Not the CBOR of a manifest.
    #[error("not the CBOR of a manifest")]
    NotAManifest,
    /// The CBOR of a manifest, but not in its one canonical encoding.
    #[error("the manifest is not in canonical form")]
    NotCanonical,
    /// A later revision of the manifest.
    #[error("manifest format {found} is not known")]
    Format {
        /// Value of the field.
        found: u32,
    },
    /// The model's name is empty, too long, or holds control characters.
    #[error("the model's name must be 1 to {LONGEST_NAME} bytes without control characters")]
    ModelName,
    /// Both a model and an adapter, or neither.
    #[error("the manifest must describe a model or an adapter")]
    Kind,
    /// Something of an adapter with which none can be applied.
    #[error("the adapter's `{field}` is impossible")]
    Adapter {
        /// What.
        field: &'static str,
    },
    /// A field of the configuration with which no model can be run.
    #[error("configuration field `{field}` has an impossible value")]
    Config {
        /// The field.
        field: &'static str,
    },
    /// Too few or too many entries.
    #[error("{found} {what}")]
    Count {
        /// `tensors` or `assets`.
        what: &'static str,
        /// How many there are.
        found: usize,
    },
    /// An entry's name is empty, too long, or holds characters other than `A–Z a–z 0–9 . _ -`.
    #[error("the {what} table's entry {index} has an impossible name")]
    EntryName {
        /// `tensors` or `assets`.
        what: &'static str,
        /// Position in the table.
        index: usize,
    },
    /// Entries are not in strictly ascending order of their names (twice the same name among them).
    #[error("`{name}` is out of order or there twice")]
    Order {
        /// The entry.
        name: String,
    },
    /// More dimensions than 4, or none.
    #[error("`{name}` has {rank} dimensions")]
    Rank {
        /// The entry.
        name: String,
        /// How many it has.
        rank: usize,
    },
    /// The size does not follow from shape and encoding, or is zero, or beyond the limit.
    #[error("`{name}` cannot have a size of {found} bytes")]
    Size {
        /// The entry.
        name: String,
        /// Value of the field.
        found: u64,
    },
    /// The entry reaches into the one before it.
    #[error("`{name}` overlaps its predecessor")]
    Overlap {
        /// The entry.
        name: String,
    },
    /// The entry does not start at the first aligned byte after the one before it.
    #[error("`{name}` does not follow its predecessor directly")]
    Gap {
        /// The entry.
        name: String,
    },
    /// All entries together exceed 2⁴⁴ bytes.
    #[error("the payload exceeds 2^44 bytes")]
    PayloadTooLarge,
}

impl Manifest {
    /// Sorts the entries, gives them their offsets and checks the whole.
    pub(crate) fn lay_out(
        name: String,
        version: u64,
        kind: Kind<'_>,
        mut tensors: Vec<TensorEntry>,
        mut assets: Vec<AssetEntry>,
    ) -> Result<Self, ManifestError> {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        assets.sort_by(|a, b| a.name.cmp(&b.name));
        let mut end = 0u64;
        for (offset, size) in tensors
            .iter_mut()
            .map(|t| (&mut t.offset, t.size))
            .chain(assets.iter_mut().map(|a| (&mut a.offset, a.size)))
        {
            *offset = align(end).ok_or(ManifestError::PayloadTooLarge)?;
            end = offset
                .checked_add(size)
                .ok_or(ManifestError::PayloadTooLarge)?;
        }
        let (config, adapter) = match kind {
            Kind::Model(config) => (Some(config.clone()), None),
            Kind::Adapter(adapter) => (None, Some(adapter.clone())),
        };
        let manifest = Manifest {
            format: FORMAT,
            name,
            version,
            config,
            tensors,
            assets,
            adapter,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// Decodes and checks. Anything but the canonical encoding of a valid manifest is refused.
    ///
    /// # Errors
    /// What is wrong with it first.
    pub fn from_cbor(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > LARGEST_MANIFEST {
            return Err(ManifestError::TooLarge {
                bytes: bytes.len() as u64,
            });
        }
        let manifest: Manifest =
            minicbor::decode(bytes).map_err(|_| ManifestError::NotAManifest)?;
        if manifest.format != FORMAT {
            return Err(ManifestError::Format {
                found: manifest.format,
            });
        }
        // Map order, duplicate and unknown keys, long integers, indefinite lengths and trailing bytes all end here.
        if manifest.to_cbor() != bytes {
            return Err(ManifestError::NotCanonical);
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// The canonical encoding.
    pub fn to_cbor(&self) -> Vec<u8> {
        minicbor::to_vec(self).expect("writing to a vector cannot fail")
    }

    /// SHA-256 of the canonical encoding.
    pub fn digest(&self) -> ModelDigest {
        digest_of(&self.to_cbor())
    }

    /// The model's name, as its provider gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model's version, which the provider only ever raises.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What it describes.
    pub fn kind(&self) -> Kind<'_> {
        match (&self.config, &self.adapter) {
            (Some(config), _) => Kind::Model(config),
            (None, Some(adapter)) => Kind::Adapter(adapter),
            (None, None) => unreachable!("a manifest exists only after its check"),
        }
    }

    /// Tensors in ascending order of their names.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// Assets in ascending order of their names.
    pub fn assets(&self) -> &[AssetEntry] {
        &self.assets
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensor_index(name).map(|i| &self.tensors[i])
    }

    pub(crate) fn tensor_index(&self, name: &str) -> Option<usize> {
        self.tensors
            .binary_search_by(|t| t.name.as_str().cmp(name))
            .ok()
    }

    /// The asset of that name.
    pub fn asset(&self, name: &str) -> Option<&AssetEntry> {
        let index = self
            .assets
            .binary_search_by(|a| a.name.as_str().cmp(name))
            .ok()?;
        Some(&self.assets[index])
    }

    /// Bytes from the first entry's start to the last one's end: the length of the payload.
    pub fn payload_len(&self) -> u64 {
        self.extents().last().map_or(0, |e| e.offset + e.size)
    }

    /// Bytes of all tensors, without padding.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.size).sum()
    }

    /// Where each entry lies and what its bytes must hash to: tensors, then assets; ascending, disjoint.
    pub(crate) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let tensors = self.tensors.iter().map(|t| Extent {
            offset: t.offset,
            size: t.size,
            digest: t.digest,
        });
        let assets = self.assets.iter().map(|a| Extent {
            offset: a.offset,
            size: a.size,
            digest: a.digest,
        });
        tensors.chain(assets)
    }

    /// Name of the `index`th of [`Self::extents`].
    pub(crate) fn entry_name(&self, index: usize) -> &str {
        match index.checked_sub(self.tensors.len()) {
            None => &self.tensors[index].name,
            Some(asset) => &self.assets[asset].name,
        }
    }

    /// The same with the digests that were computed, in the order of [`Self::extents`].
    pub(crate) fn with_digests(&self, digests: &[[u8; 32]]) -> Manifest {
        let mut manifest = self.clone();
        let tensors = manifest.tensors.iter_mut().map(|t| &mut t.digest);
        let assets = manifest.assets.iter_mut().map(|a| &mut a.digest);
        for (place, digest) in tensors.chain(assets).zip(digests) {
            *place = *digest;
        }
        manifest
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.name.is_empty()
            || self.name.len() > LONGEST_NAME
            || self.name.chars().any(char::is_control)
        {
            return Err(ManifestError::ModelName);
        }
        match (&self.config, &self.adapter) {
            (Some(config), None) => config.check()?,
            (None, Some(adapter)) => self.check_adapter(adapter)?,
            _ => return Err(ManifestError::Kind),
        }
        check_names(
            "tensors",
            1..=MOST_TENSORS,
            self.tensors.iter().map(|t| &t.name),
        )?;
        check_names(
            "assets",
            0..=MOST_ASSETS,
            self.assets.iter().map(|a| &a.name),
        )?;
        let mut end = 0;
        for t in &self.tensors {
            if !(1..=HIGHEST_RANK).contains(&t.shape.len()) {
                return Err(ManifestError::Rank {
                    name: t.name.clone(),
                    rank: t.shape.len(),
                });
            }
            if t.dtype.bytes_for(&t.shape) != Some(t.size) {
                return Err(ManifestError::Size {
                    name: t.name.clone(),
                    found: t.size,
                });
            }
            end = place(&t.name, t.offset, t.size, end)?;
        }
        for a in &self.assets {
            if !(1..=LARGEST_ASSET).contains(&a.size) {
                return Err(ManifestError::Size {
                    name: a.name.clone(),
                    found: a.size,
                });
            }
            end = place(&a.name, a.offset, a.size, end)?;
        }
        Ok(())
    }
}

impl Manifest {
    /// An adapter is private as a whole, and brings nothing but tensors.
    fn check_adapter(&self, adapter: &AdapterConfig) -> Result<(), ManifestError> {
        adapter.check()?;
        if self.tensors.iter().any(|t| t.access != Access::Private) {
            return Err(ManifestError::Adapter { field: "access" });
        }
        if !self.assets.is_empty() {
            return Err(ManifestError::Adapter { field: "assets" });
        }
        Ok(())
    }
}

/// The bytes of one tensor or asset within the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) digest: [u8; 32],
}

pub(crate) fn digest_of(canonical: &[u8]) -> ModelDigest {
    let hash = sha::digest(&sha::SHA256, canonical);
    ModelDigest(hash.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

fn align(offset: u64) -> Option<u64> {
    offset.checked_next_multiple_of(ALIGNMENT)
}

/// Checks that an entry lies where it must after one that ended at `end`; returns its own end.
fn place(name: &str, offset: u64, size: u64, end: u64) -> Result<u64, ManifestError> {
    if offset < end {
        return Err(ManifestError::Overlap {
            name: name.to_owned(),
        });
    }
    if Some(offset) != align(end) {
        return Err(ManifestError::Gap {
            name: name.to_owned(),
        });
    }
    match offset.checked_add(size) {
        Some(end) if end <= LARGEST_PAYLOAD => Ok(end),
        _ => Err(ManifestError::PayloadTooLarge),
    }
}

fn check_names<'a>(
    what: &'static str,
    count: std::ops::RangeInclusive<usize>,
    names: impl ExactSizeIterator<Item = &'a String>,
) -> Result<(), ManifestError> {
    if !count.contains(&names.len()) {
        return Err(ManifestError::Count {
            what,
            found: names.len(),
        });
    }
    let mut previous = "";
    for (index, name) in names.enumerate() {
        // The first character keeps names apart from options and hidden files, should somebody write them out.
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
            || name.len() > LONGEST_NAME
            || !name.bytes().all(plain)
        {
            return Err(ManifestError::EntryName { what, index });
        }
        if index > 0 && name.as_str() <= previous {
            return Err(ManifestError::Order { name: name.clone() });
        }
        previous = name;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{Family, RopeLayout, RopeScaling};

    fn any_config() -> impl Strategy<Value = ModelConfig> {
        let scaling = prop_oneof![
            Just(RopeScaling::None),
            (0.5f32..64.0).prop_map(|factor| RopeScaling::Linear { factor }),
            (1.0f32..64.0, 0.5f32..2.0, 2.5f32..8.0, 1u32..1 << 20).prop_map(
                |(factor, low_freq_factor, high_freq_factor, original_context)| {
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_context,
                    }
                }
            ),
        ];
        let family = prop_oneof![
            Just(Family::Llama),
            Just(Family::Mistral),
            Just(Family::Qwen2)
        ];
        let layout = prop_oneof![Just(RopeLayout::Interleaved), Just(RopeLayout::Half)];
        let sizes = (
            1u32..1 << 16,
            1u32..100,
            1u32..16,
            1u32..8,
            1u32..64,
            1u32..1 << 18,
        );
        let tokens = (
            proptest::option::of(0u32..500),
            proptest::collection::vec(0u32..500, 0..5),
        );
        (
            (family, layout, scaling),
            sizes,
            (1e-9f32..1e-2, 1.0f32..1e7),
            proptest::option::of(1u32..1 << 17),
            (any::<bool>(), any::<bool>(), any::<bool>()),
            tokens,
        )
            .prop_map(
                |(kinds, sizes, floats, sliding_window, flags, (bos, eos))| ModelConfig {
                    family: kinds.0,
                    hidden: sizes.0,
                    layers: sizes.1,
                    heads: sizes.2 * sizes.3,
                    kv_heads: sizes.3,
                    head_dim: 2 * sizes.4,
                    ffn: sizes.5,
                    vocab: 500,
                    context: sizes.5,
                    norm_eps: floats.0,
                    rope_theta: floats.1,
                    rope_scaling: kinds.2,
                    rope_layout: kinds.1,
                    sliding_window,
                    tied_embeddings: flags.0,
                    qkv_bias: flags.1,
                    bos,
                    eos,
                    add_bos: flags.2 && bos.is_some(),
                },
            )
    }

    fn any_manifest() -> impl Strategy<Value = Manifest> {
        let dtype = proptest::sample::select(DType::ALL.to_vec());
        let access = prop_oneof![Just(Access::Private), Just(Access::Public)];
        let outer = proptest::collection::vec(1u64..50, 0..4);
        let tensor = (
            "[a-z][a-z0-9._-]{0,20}",
            dtype,
            outer,
            1u64..40,
            any::<[u8; 32]>(),
            access,
        );
        let asset = ("[A-Z][a-z0-9._-]{0,20}", 1u64..100_000, any::<[u8; 32]>());
        (
            "[^\\p{C}]{1,30}",
            any::<u64>(),
            any_config(),
            proptest::collection::vec(tensor, 1..10),
            proptest::collection::vec(asset, 0..4),
        )
            .prop_filter_map(
                "names are unique",
                |(name, version, config, tensors, assets)| {
                    let tensors = tensors.into_iter().map(
                        |(name, dtype, mut shape, blocks, digest, access)| {
                            shape.push(blocks * dtype.block_len());
                            let size = dtype.bytes_for(&shape).unwrap();
                            TensorEntry {
                                name,
                                dtype,
                                shape,
                                offset: 0,
                                size,
                                digest,
                                access,
                            }
                        },
                    );
                    let assets = assets.into_iter().map(|(name, size, digest)| AssetEntry {
                        name,
                        offset: 0,
                        size,
                        digest,
                    });
                    Manifest::lay_out(
                        name,
                        version,
                        Kind::Model(&config),
                        tensors.collect(),
                        assets.collect(),
                    )
                    .ok()
                },
            )
    }

    proptest! {
        #[test]
        fn manifests_read_back(manifest in any_manifest()) {
            let cbor = manifest.to_cbor();
            let back = Manifest::from_cbor(&cbor).unwrap();
            prop_assert_eq!(&back, &manifest);
            prop_assert_eq!(back.digest(), digest_of(&cbor));
            for t in manifest.tensors() {
                prop_assert_eq!(manifest.tensor(&t.name), Some(t));
                prop_assert_eq!(t.offset % ALIGNMENT, 0);
            }
            for a in manifest.assets() {
                prop_assert_eq!(manifest.asset(&a.name), Some(a));
            }
        }

        /// Whatever is accepted has one encoding: other bytes are another manifest.
        #[test]
        fn changed_bytes_are_refused_or_another_manifest(
            manifest in any_manifest(), at in any::<prop::sample::Index>(), bits in 1u8..,
        ) {
            let mut cbor = manifest.to_cbor();
            let at = at.index(cbor.len());
            cbor[at] ^= bits;
            if let Ok(other) = Manifest::from_cbor(&cbor) {
                prop_assert!(other != manifest);
                prop_assert_eq!(other.to_cbor(), cbor);
            }
        }

        #[test]
        fn any_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Manifest::from_cbor(&bytes).is_err());
        }
    }

    /// A table that claims 2^62 entries in a few bytes must not make anybody allocate them.
    #[test]
    fn counts_that_lie_are_refused_before_they_cost_anything() {
        for claim in [0x9b, 0xbb, 0x7b, 0x5b] {
            let mut cbor = vec![0xa6, 0x00, 0x01, 0x04, claim];
            cbor.extend((1u64 << 62).to_be_bytes());
            assert_eq!(Manifest::from_cbor(&cbor), Err(ManifestError::NotAManifest));
        }
        let long = vec![0; LARGEST_MANIFEST + 1];
        let refused = ManifestError::TooLarge {
            bytes: LARGEST_MANIFEST as u64 + 1,
        };
        assert_eq!(Manifest::from_cbor(&long), Err(refused));
        // Nesting must not use up the stack either.
        let deep = vec![0x81; 1 << 20];
        assert_eq!(Manifest::from_cbor(&deep), Err(ManifestError::NotAManifest));
        let unknown: Vec<u8> = [&[0xa1, 0x18, 0x63][..], &deep].concat();
        assert_eq!(
            Manifest::from_cbor(&unknown),
            Err(ManifestError::NotAManifest)
        );
    }
}
