//! The generator of the test vectors in `tests/vectors`: one valid file per case worth having, one file per fault.
//!
//! Everything is fixed (keys, salt, file id, contents), so that whoever runs it gets the same bytes. The test below
//! compares them with the files; with `CASEMATE_WRITE_VECTORS=1` in the environment it writes them instead.
//! `tests/vectors.rs` opens the files through the public interface and knows nothing of how they were made.

mod manifests;

use std::fs;
use std::path::PathBuf;

use crate::adapter::AdapterConfig;
use crate::config::{Family, ModelConfig, RopeLayout, RopeScaling};
use crate::data_key::DataKey;
use crate::digest::ModelDigest;
use crate::dtype::DType;
use crate::header::{HEADER_LEN, Header, PREAMBLE_LEN, TAG_LEN};
use crate::keys::FileKeys;
use crate::manifest::{Access, AssetEntry, Kind, Manifest, TensorEntry, digest_of};
use crate::seal::{Fresh, Front, SIGNATURE_DOMAIN, front};
use crate::signing::SigningKey;

const CHUNK_LOG2: u8 = 10;

/// 32 bytes that count upwards.
fn counting<const N: usize>(first: u8) -> [u8; N] {
    std::array::from_fn(|i| first.wrapping_add(i as u8))
}

fn data_key() -> DataKey {
    DataKey::from_bytes(&counting(0x00))
}

fn provider() -> SigningKey {
    SigningKey::from_seed(&counting(0x20))
}

fn stranger() -> SigningKey {
    SigningKey::from_seed(&counting(0x40))
}

fn fresh(first: u8) -> Fresh {
    Fresh {
        file_id: counting(first),
        salt: counting(first.wrapping_add(0x20)),
    }
}

fn config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden: 4,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 2,
        ffn: 8,
        vocab: 4,
        context: 16,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        rope_layout: RopeLayout::Half,
        sliding_window: None,
        tied_embeddings: true,
        qkv_bias: false,
        bos: Some(1),
        eos: vec![2],
        add_bos: true,
    }
}

fn adapter() -> AdapterConfig {
    AdapterConfig {
        base: ModelDigest(counting(0x60)),
        rank: 2,
        alpha: 4.0,
        rank_stabilised: false,
        rope_layout: RopeLayout::Half,
    }
}

/// What goes into a file before anything is wrong with it.
struct Contents {
    manifest: Manifest,
    payload: Vec<u8>,
}

impl Contents {
    fn new(tensors: &[(&str, DType, &[u64])], assets: &[(&str, &[u8])]) -> Self {
        Self::of(Kind::Model(&config()), tensors, assets)
    }

    /// An adapter to one product.
    fn adapter() -> Self {
        Contents::of(
            Kind::Adapter(&adapter()),
            &[
                ("blk.0.attn_q.weight.lora_a", DType::F16, &[2, 4]),
                ("blk.0.attn_q.weight.lora_b", DType::F16, &[4, 2]),
            ],
            &[],
        )
    }

    fn of(kind: Kind<'_>, tensors: &[(&str, DType, &[u64])], assets: &[(&str, &[u8])]) -> Self {
        let tensors = tensors.iter().map(|&(name, dtype, shape)| TensorEntry {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            offset: 0,
            size: dtype.bytes_for(shape).unwrap(),
            digest: [0; 32],
            access: Access::Private,
        });
        let entries = assets.iter().map(|&(name, bytes)| AssetEntry {
            name: name.to_owned(),
            offset: 0,
            size: bytes.len() as u64,
            digest: [0; 32],
        });
        let layout = Manifest::lay_out(
            "vector".into(),
            7,
            kind,
            tensors.collect(),
            entries.collect(),
        );
        let layout = layout.unwrap();
        let mut payload = vec![0; layout.payload_len() as usize];
        for t in &layout.tensors {
            for i in 0..t.size {
                payload[(t.offset + i) as usize] = (i * 7 + 1) as u8;
            }
        }
        for a in &layout.assets {
            let bytes = assets.iter().find(|(name, _)| *name == a.name).unwrap().1;
            payload[a.offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        let digests: Vec<[u8; 32]> = layout
            .extents()
            .map(|e| {
                let bytes = &payload[e.offset as usize..(e.offset + e.size) as usize];
                *blake3::hash(bytes).as_bytes()
            })
            .collect();
        Contents {
            manifest: layout.with_digests(&digests),
            payload,
        }
    }

    /// One chunk: a tensor of 64 bytes and an asset of two.
    fn small() -> Self {
        Contents::new(
            &[("token_embd.weight", DType::F32, &[4, 4])],
            &[("tokenizer.json", b"{}")],
        )
    }

    /// Three chunks; the second tensor lies in all of them, with a gap of 60 bytes before it.
    fn large() -> Self {
        Contents::new(
            &[
                ("output_norm.weight", DType::F32, &[1]),
                ("token_embd.weight", DType::Q8_0, &[60, 32]),
            ],
            &[("tokenizer.json", b"{\"version\":\"1.0\"}")],
        )
    }

    /// One chunk: two tensors with a gap of 60 bytes between them.
    fn gapped() -> Self {
        Contents::new(&[("a", DType::F32, &[1]), ("b", DType::F32, &[1])], &[])
    }

    fn seal(&self) -> Vec<u8> {
        seal(
            &self.manifest.to_cbor(),
            &self.payload,
            &provider(),
            fresh(0xa0),
            |_, _| {},
        )
    }

    /// Sealed after a change to the manifest.
    fn with_manifest(mut self, change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
        change(&mut self.manifest);
        self.seal()
    }

    /// Sealed with other bytes in place of the manifest's encoding.
    fn with_cbor(self, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut cbor = self.manifest.to_cbor();
        change(&mut cbor);
        seal(&cbor, &self.payload, &provider(), fresh(0xa0), |_, _| {})
    }
}

/// Puts a file together. `flag` may change the final flag that a chunk is sealed with.
fn seal(
    manifest: &[u8],
    payload: &[u8],
    signer: &SigningKey,
    fresh: Fresh,
    flag: impl Fn(u64, &mut bool),
) -> Vec<u8> {
    let length = payload.len() as u64;
    let made = front(manifest, length, CHUNK_LOG2, &data_key(), signer, fresh).unwrap();
    let Front {
        header,
        payload_key,
        bytes: mut file,
        ..
    } = made;
    for (index, chunk) in payload.chunks(1 << CHUNK_LOG2).enumerate() {
        let index = index as u64;
        let mut last = header.is_final(index);
        flag(index, &mut last);
        let mut chunk = chunk.to_vec();
        let tag = payload_key.seal(index, last, &mut chunk);
        file.extend_from_slice(&chunk);
        file.extend_from_slice(&tag);
    }
    file
}

/// A file whose signature is over another digest than its own.
fn forged() -> Vec<u8> {
    let contents = Contents::small();
    let manifest = contents.manifest.to_cbor();
    let Fresh { file_id, salt } = fresh(0xa0);
    let keys = FileKeys::derive(&data_key(), &salt, &file_id);
    let header = Header {
        chunk_log2: CHUNK_LOG2,
        section_len: (PREAMBLE_LEN + manifest.len() + TAG_LEN) as u32,
        payload_len: contents.payload.len() as u64,
        file_id,
        salt,
        commitment: keys.commitment(),
    };
    let mut section = provider().verifying_key().as_bytes().to_vec();
    section.extend_from_slice(&provider().sign(SIGNATURE_DOMAIN, &[0; 32]).0);
    section.extend_from_slice(&manifest);
    keys.manifest_key().seal(&header.to_bytes(), &mut section);
    let mut chunk = contents.payload;
    let tag = keys
        .payload_key(&digest_of(&manifest))
        .seal(0, true, &mut chunk);
    [&header.to_bytes()[..], &section, &chunk, &tag].concat()
}

fn edited(mut file: Vec<u8>, edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    edit(&mut file);
    file
}

fn set_payload_len(file: &mut [u8], length: u64) {
    file[16..24].copy_from_slice(&length.to_le_bytes());
}

/// Position of chunk `index` in a file.
fn chunk_at(file: &[u8], index: u64) -> usize {
    let header = Header::parse(file[..HEADER_LEN].try_into().unwrap()).unwrap();
    header.chunk_position(index) as usize
}

struct Vector {
    name: &'static str,
    expect: &'static str,
    about: &'static str,
    file: Vec<u8>,
}

fn v(name: &'static str, expect: &'static str, about: &'static str, file: Vec<u8>) -> Vector {
    Vector {
        name,
        expect,
        about,
        file,
    }
}

fn vectors() -> Vec<Vector> {
    file_vectors()
        .into_iter()
        .chain(manifests::vectors())
        .collect()
}

/// Faults of the file around the manifest.
fn file_vectors() -> Vec<Vector> {
    let small = || Contents::small().seal();
    let large = || Contents::large().seal();
    let chunk = (1 << CHUNK_LOG2) + TAG_LEN;
    let v = |name, expect, about, file| Vector {
        name,
        expect,
        about,
        file,
    };
    vec![
        v(
            "valid",
            "ok",
            "three chunks, two tensors, one asset",
            large(),
        ),
        v(
            "valid-small",
            "ok",
            "one chunk; the faults below start from it or from `valid`",
            small(),
        ),
        v(
            "valid-adapter",
            "ok",
            "an adapter of rank 2 to one product",
            Contents::adapter().seal(),
        ),
        // The header.
        v(
            "magic",
            "not-a-container",
            "first byte changed",
            edited(small(), |f| f[0] ^= 0x80),
        ),
        v(
            "format",
            "format",
            "format 2",
            edited(small(), |f| f[8] = 2),
        ),
        v("suite", "suite", "suite 2", edited(small(), |f| f[10] = 2)),
        v(
            "chunk-too-small",
            "chunk-size",
            "chunks of 2^9",
            edited(small(), |f| f[11] = 9),
        ),
        v(
            "chunk-too-large",
            "chunk-size",
            "chunks of 2^23",
            edited(small(), |f| f[11] = 23),
        ),
        v(
            "section-too-short",
            "manifest-length",
            "112 bytes hold no manifest",
            edited(small(), |f| {
                f[12..16].copy_from_slice(&112u32.to_le_bytes())
            }),
        ),
        v(
            "section-too-long",
            "manifest-length",
            "2^32 - 1 bytes",
            edited(small(), |f| f[12..16].fill(0xff)),
        ),
        v(
            "payload-empty",
            "payload-length",
            "a payload of 0 bytes",
            edited(small(), |f| set_payload_len(f, 0)),
        ),
        v(
            "payload-too-long",
            "payload-length",
            "a payload of 2^64 - 1 bytes",
            edited(small(), |f| f[16..24].fill(0xff)),
        ),
        v(
            "header-cut",
            "truncated",
            "the first 103 bytes",
            edited(small(), |f| f.truncate(103)),
        ),
        v(
            "last-byte-missing",
            "truncated",
            "one byte too short",
            edited(small(), |f| {
                f.pop();
            }),
        ),
        v(
            "final-chunk-missing",
            "truncated",
            "cut after the second of three chunks",
            edited(large(), |f| f.truncate(chunk_at(f, 2))),
        ),
        v(
            "trailing-byte",
            "trailing-data",
            "one byte after the final chunk",
            edited(small(), |f| f.push(0)),
        ),
        v(
            "commitment",
            "wrong-key",
            "commitment changed",
            edited(small(), |f| f[72] ^= 1),
        ),
        v(
            "salt",
            "wrong-key",
            "salt changed",
            edited(small(), |f| f[40] ^= 1),
        ),
        v(
            "chunk-size-altered",
            "manifest-altered",
            "the header says 2^11; the length stays right",
            edited(small(), |f| f[11] = 11),
        ),
        v(
            "final-chunk-missing-header-altered",
            "manifest-altered",
            "cut after the second chunk, the header's length made to fit",
            edited(large(), |f| {
                f.truncate(chunk_at(f, 2));
                set_payload_len(f, 2048);
            }),
        ),
        v(
            "manifest-ciphertext",
            "manifest-altered",
            "one bit of the manifest section changed",
            edited(small(), |f| f[HEADER_LEN + 120] ^= 1),
        ),
        // Who signed.
        v(
            "other-provider",
            "wrong-signer",
            "sealed by somebody else with the same data key",
            {
                let c = Contents::small();
                seal(
                    &c.manifest.to_cbor(),
                    &c.payload,
                    &stranger(),
                    fresh(0xa0),
                    |_, _| {},
                )
            },
        ),
        v(
            "signature-of-another-model",
            "signature",
            "the provider's signature over another digest",
            forged(),
        ),
        // Chunks.
        v(
            "chunk-bit",
            "chunk",
            "one bit of the chunk changed",
            edited(small(), |f| {
                let at = chunk_at(f, 0);
                f[at] ^= 1;
            }),
        ),
        v(
            "chunk-tag",
            "chunk",
            "one bit of the chunk's tag changed",
            edited(small(), |f| *f.last_mut().unwrap() ^= 1),
        ),
        v(
            "chunks-swapped",
            "chunk",
            "first and second chunk exchanged",
            edited(large(), |f| {
                let at = chunk_at(f, 0);
                f[at..at + 2 * chunk].rotate_left(chunk);
            }),
        ),
        v(
            "chunk-of-another-file",
            "chunk",
            "second chunk taken from another sealing of the same model with the same data key",
            {
                let c = Contents::large();
                let other = seal(
                    &c.manifest.to_cbor(),
                    &c.payload,
                    &provider(),
                    fresh(0x90),
                    |_, _| {},
                );
                edited(large(), |f| {
                    let at = chunk_at(f, 1);
                    f[at..at + chunk].copy_from_slice(&other[at..at + chunk]);
                })
            },
        ),
        v(
            "final-flag-missing",
            "chunk",
            "the final chunk was sealed as if another followed",
            {
                let c = Contents::small();
                let manifest = c.manifest.to_cbor();
                seal(
                    &manifest,
                    &c.payload,
                    &provider(),
                    fresh(0xa0),
                    |_, last| *last = false,
                )
            },
        ),
        v(
            "final-flag-early",
            "chunk",
            "the first of three chunks was sealed as the final one",
            {
                let c = Contents::large();
                seal(
                    &c.manifest.to_cbor(),
                    &c.payload,
                    &provider(),
                    fresh(0xa0),
                    |i, last| *last |= i == 0,
                )
            },
        ),
        // Sealed and signed by the provider, but not what the manifest says.
        v(
            "tensor-digest",
            "tensor-digest",
            "one bit of a tensor differs from the digest",
            {
                let mut c = Contents::small();
                c.payload[5] ^= 1;
                c.seal()
            },
        ),
        v(
            "asset-digest",
            "asset-digest",
            "the asset differs from its digest",
            {
                let mut c = Contents::small();
                c.payload[64] ^= 1;
                c.seal()
            },
        ),
        v(
            "padding",
            "padding",
            "a byte between two entries is not zero",
            {
                let mut c = Contents::gapped();
                c.payload[40] = 1;
                c.seal()
            },
        ),
        v(
            "payload-mismatch",
            "payload-mismatch",
            "one byte follows the last entry",
            {
                let mut c = Contents::small();
                c.payload.push(0);
                c.seal()
            },
        ),
    ]
}

fn index(vectors: &[Vector]) -> String {
    let lines: Vec<String> = vectors
        .iter()
        .map(|v| {
            let about = serde_json::Value::from(v.about);
            format!(
                "    {{\"file\": \"{}.casemate\", \"expect\": \"{}\", \"about\": {about}}}",
                v.name, v.expect
            )
        })
        .collect();
    format!(
        "{{\n  \"data_key\": \"{}\",\n  \"provider\": \"{}\",\n  \"digests\": {{\"valid.casemate\": \"{}\", \
         \"valid-small.casemate\": \"{}\", \
         \"valid-adapter.casemate\": \"{}\"}},\n  \"vectors\": [\n{}\n  ]\n}}\n",
        hex::encode(data_key().expose()),
        provider().verifying_key(),
        Contents::large().manifest.digest(),
        Contents::small().manifest.digest(),
        Contents::adapter().manifest.digest(),
        lines.join(",\n")
    )
}

#[test]
fn the_files_are_what_the_generator_makes() {
    let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors"));
    let vectors = vectors();
    let mut files: Vec<(String, Vec<u8>)> = vectors
        .iter()
        .map(|v| (format!("{}.casemate", v.name), v.file.clone()))
        .collect();
    files.push(("index.json".into(), index(&vectors).into_bytes()));
    if std::env::var_os("CASEMATE_WRITE_VECTORS").is_some() {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in &files {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in &files {
        let found = fs::read(dir.join(name)).unwrap_or_default();
        assert!(found == *bytes, "{name} is not what the generator makes");
    }
    assert_eq!(
        fs::read_dir(&dir).unwrap().count(),
        files.len(),
        "files that nobody made"
    );
}
