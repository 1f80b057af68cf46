//! Faults of the manifest itself: sealed and signed by the provider, and still refused.

use super::{Contents, Vector, adapter, config, v};
use crate::adapter::AdapterConfig;
use crate::config::ModelConfig;
use crate::dtype::DType;
use crate::manifest::{Access, Manifest};

fn config_of(manifest: &mut Manifest) -> &mut ModelConfig {
    manifest.config.as_mut().unwrap()
}

fn adapter_of(manifest: &mut Manifest) -> &mut AdapterConfig {
    manifest.adapter.as_mut().unwrap()
}

pub(super) fn vectors() -> Vec<Vector> {
    vec![
        // The manifest's encoding.
        v(
            "manifest-cut",
            "not-a-manifest",
            "the last byte of the CBOR is missing",
            Contents::small().with_cbor(|c| {
                c.pop();
            }),
        ),
        v(
            "manifest-trailing",
            "not-canonical",
            "a byte follows the CBOR",
            Contents::small().with_cbor(|c| c.push(0)),
        ),
        v(
            "manifest-long-integer",
            "not-canonical",
            "the format field takes two bytes",
            Contents::small().with_cbor(|c| {
                assert_eq!(c[2], 1);
                c.splice(2..3, [0x18, 1]);
            }),
        ),
        v(
            "manifest-unknown-key",
            "not-canonical",
            "a field that is not known",
            Contents::small().with_cbor(|c| {
                assert_eq!(c[0], 0xa6);
                c[0] = 0xa7;
                c.extend([0x07, 0x00]);
            }),
        ),
        v(
            "manifest-indefinite",
            "not-canonical",
            "the outer map has no length",
            Contents::small().with_cbor(|c| {
                c[0] = 0xbf;
                c.push(0xff);
            }),
        ),
        v(
            "manifest-key-order",
            "not-canonical",
            "the last field comes first",
            Contents::small().with_cbor(|c| {
                // `05 81 …` is the asset table, the last field of the map.
                let at = c
                    .windows(9)
                    .position(|w| w[..3] == [0x05, 0x81, 0xa4])
                    .unwrap();
                let field: Vec<u8> = c.drain(at..).collect();
                c.splice(1..1, field);
            }),
        ),
        v(
            "manifest-key-twice",
            "not-canonical",
            "the format field is there twice",
            Contents::small().with_cbor(|c| {
                c[0] = 0xa7;
                c.splice(1..1, [0x00, 0x01]);
            }),
        ),
        // The manifest's values.
        v(
            "manifest-format",
            "manifest-format",
            "manifest format 2",
            Contents::small().with_manifest(|m| m.format = 2),
        ),
        v(
            "model-name",
            "model-name",
            "a line end in the name",
            Contents::small().with_manifest(|m| m.name = "a\nb".into()),
        ),
        v(
            "config-no-heads",
            "config",
            "no heads",
            Contents::small().with_manifest(|m| config_of(m).heads = 0),
        ),
        v(
            "config-nan",
            "config",
            "ε is not a number",
            Contents::small().with_manifest(|m| config_of(m).norm_eps = f32::NAN),
        ),
        // Model or adapter.
        v(
            "kind-missing",
            "manifest-kind",
            "neither a model nor an adapter",
            Contents::small().with_manifest(|m| m.config = None),
        ),
        v(
            "kind-twice",
            "manifest-kind",
            "a model and an adapter",
            Contents::adapter().with_manifest(|m| m.config = Some(config())),
        ),
        v(
            "adapter-rank",
            "adapter",
            "an adapter of rank 0",
            Contents::adapter().with_manifest(|m| adapter_of(m).rank = 0),
        ),
        v(
            "adapter-alpha",
            "adapter",
            "α is infinite",
            Contents::adapter().with_manifest(|m| adapter_of(m).alpha = f32::INFINITY),
        ),
        v(
            "adapter-public",
            "adapter",
            "an adapter with a public tensor",
            Contents::adapter().with_manifest(|m| m.tensors[1].access = Access::Public),
        ),
        v(
            "adapter-asset",
            "adapter",
            "an adapter with a tokenizer",
            Contents::small().with_manifest(|m| (m.config, m.adapter) = (None, Some(adapter()))),
        ),
        v(
            "no-tensors",
            "entry-count",
            "an empty tensor table",
            Contents::small().with_manifest(|m| m.tensors.clear()),
        ),
        v(
            "entry-name",
            "entry-name",
            "an asset named `../x`",
            Contents::small().with_manifest(|m| m.assets[0].name = "../x".into()),
        ),
        v(
            "entry-twice",
            "entry-order",
            "the same tensor twice",
            Contents::small().with_manifest(|m| {
                let mut twin = m.tensors[0].clone();
                twin.offset = 64;
                m.tensors.push(twin);
                m.assets[0].offset = 128;
            }),
        ),
        v(
            "entry-order",
            "entry-order",
            "tensors in descending order",
            Contents::gapped().with_manifest(|m| m.tensors.swap(0, 1)),
        ),
        v(
            "rank",
            "tensor-rank",
            "five dimensions",
            Contents::small().with_manifest(|m| m.tensors[0].shape = vec![1, 1, 1, 4, 4]),
        ),
        v(
            "shape-lies",
            "entry-size",
            "the shape takes 80 bytes, the size says 64",
            Contents::small().with_manifest(|m| m.tensors[0].shape = vec![4, 5]),
        ),
        v(
            "shape-overflows",
            "entry-size",
            "2^63 × 4 elements",
            Contents::small().with_manifest(|m| m.tensors[0].shape = vec![1 << 63, 4]),
        ),
        v(
            "shape-no-block",
            "entry-size",
            "Q8_0 rows of 16 elements",
            Contents::small().with_manifest(|m| m.tensors[0].dtype = DType::Q8_0),
        ),
        v(
            "asset-empty",
            "entry-size",
            "an asset of 0 bytes",
            Contents::small().with_manifest(|m| m.assets[0].size = 0),
        ),
        v(
            "overlap",
            "entry-overlap",
            "the asset begins inside the tensor",
            Contents::small().with_manifest(|m| m.assets[0].offset = 0),
        ),
        v(
            "gap",
            "entry-gap",
            "64 bytes belong to nobody",
            Contents::small().with_manifest(|m| m.assets[0].offset = 128),
        ),
        v(
            "unaligned",
            "entry-gap",
            "the asset begins at byte 65",
            Contents::small().with_manifest(|m| m.assets[0].offset = 65),
        ),
        v(
            "offset-overflows",
            "entry-gap",
            "the asset begins at 2^64 - 64",
            Contents::small().with_manifest(|m| m.assets[0].offset = u64::MAX - 63),
        ),
        v(
            "too-large",
            "payload-too-large",
            "a tensor of 2^45 bytes",
            Contents::small().with_manifest(|m| {
                m.tensors[0].shape = vec![1 << 41, 4];
                m.tensors[0].size = 1 << 45;
            }),
        ),
    ]
}
