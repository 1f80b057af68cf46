//! The sealed file, its manifest, and key files.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use casemate_container::signing::{SigningKey, VerifyingKey};
use casemate_container::{DataKey, Manifest, SealedFile, Silent};

use crate::{Walk, damage as program, scratch};

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../container/tests/vectors");

/// The key and provider of the vectors: 32 bytes that count upwards from 0 and from 0x20.
fn data_key() -> DataKey {
    DataKey::from_bytes(&std::array::from_fn(|i| i as u8))
}

fn provider() -> VerifyingKey {
    SigningKey::from_seed(&std::array::from_fn(|i| 0x20 + i as u8)).verifying_key()
}

fn vector(name: &str) -> Vec<u8> {
    fs::read(Path::new(VECTORS).join(name)).expect("the vectors are part of the tree")
}

const VALID_VECTORS: [&str; 3] = [
    "valid.casemate",
    "valid-small.casemate",
    "valid-adapter.casemate",
];

static VALID: LazyLock<[Vec<u8>; VALID_VECTORS.len()]> =
    LazyLock::new(|| VALID_VECTORS.map(vector));

/// Whether `bytes` open, to the last digest, as what the vectors' provider sealed.
fn opens(bytes: &[u8]) -> bool {
    scratch::with_file(bytes, |path| {
        let Ok(file) = SealedFile::open(path) else {
            return false;
        };
        assert_eq!(file.header().file_len(), bytes.len() as u64);
        let unlocked = file.unlock(&data_key(), &provider());
        unlocked.is_ok_and(|unlocked| unlocked.check(1, &Silent).is_ok())
    })
}

/// Bytes as a sealed file. Nothing opens but what the provider sealed.
pub(crate) fn file(data: &[u8]) {
    let sealed = VALID.iter().any(|valid| valid == data);
    assert_eq!(opens(data), sealed, "opens, although nobody sealed it");
}

pub(crate) fn file_seeds() -> Vec<Vec<u8>> {
    let entries = fs::read_dir(VECTORS).expect("the vectors are part of the tree");
    let paths = entries.map(|entry| entry.expect("a directory entry").path());
    let sealed = paths.filter(|path| path.extension().is_some_and(|e| e == "casemate"));
    sealed
        .map(|path| fs::read(path).expect("a vector"))
        .collect()
}

/// Damage to a sealed file. It opens only if there is none.
pub(crate) fn damage(data: &[u8]) {
    let (which, edits) = data.split_first().unwrap_or((&0, &[]));
    let honest = &VALID[usize::from(*which) % VALID.len()];
    let mut bytes = honest.clone();
    program::apply(edits, &mut bytes);
    assert_eq!(opens(&bytes), bytes == *honest);
}

pub(crate) fn walks() -> Vec<Walk> {
    let walk = |what, prefix, valid: &Vec<u8>| Walk {
        target: "container_damage",
        what,
        prefix,
        len: valid.len(),
    };
    vec![
        walk("a container of three chunks", &[0], &VALID[0]),
        walk("a container of one chunk", &[1], &VALID[1]),
        walk("a container with an adapter", &[2], &VALID[2]),
    ]
}

pub(crate) fn damage_seeds() -> Vec<Vec<u8>> {
    program::seeds_of_parts(VALID_VECTORS.len() as u8)
}

/// A manifest. What is accepted is its own one encoding, and consistent.
pub(crate) fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::from_cbor(data) else {
        return;
    };
    assert_eq!(manifest.to_cbor(), data, "a second encoding was accepted");
    let mut end = 0;
    for tensor in manifest.tensors() {
        assert!(tensor.offset >= end, "tensors overlap");
        end = tensor.offset + tensor.size;
        assert_eq!(manifest.tensor(&tensor.name), Some(tensor));
    }
    for asset in manifest.assets() {
        assert!(asset.offset >= end, "assets overlap");
        end = asset.offset + asset.size;
        assert_eq!(manifest.asset(&asset.name), Some(asset));
    }
    assert_eq!(manifest.payload_len(), end);
}

pub(crate) fn manifest_seeds() -> Vec<Vec<u8>> {
    let manifests = VALID.iter().map(|valid| {
        scratch::with_file(valid, |path| {
            let file = SealedFile::open(path).expect("a valid vector");
            let inspected = file.inspect(&data_key()).expect("a valid vector");
            inspected.manifest().to_cbor()
        })
    });
    manifests.collect()
}

/// Key files of the three kinds. A key that was read is written and read again as the same.
pub(crate) fn key_files(data: &[u8]) {
    let again = |write: &dyn Fn(&Path)| {
        let directory = scratch::directory();
        let path = directory.path().join("key");
        write(&path);
        (directory, path)
    };
    scratch::with_file(data, |path| {
        if let Ok(key) = DataKey::read_file(path) {
            let (_guard, path) = again(&|path| key.write_file(path, false).expect("a new file"));
            assert!(
                DataKey::read_file(&path)
                    .expect("just written")
                    .matches(&key)
            );
        }
        if let Ok(key) = SigningKey::read_file(path) {
            let (_guard, path) = again(&|path| key.write_file(path, false).expect("a new file"));
            let reread = SigningKey::read_file(&path).expect("just written");
            assert_eq!(reread.verifying_key(), key.verifying_key());
        }
        if let Ok(key) = VerifyingKey::read_file(path) {
            let (_guard, path) = again(&|path| key.write_file(path, false).expect("a new file"));
            assert_eq!(VerifyingKey::read_file(&path).expect("just written"), key);
        }
    });
}

pub(crate) fn key_file_seeds() -> Vec<Vec<u8>> {
    let directory = scratch::directory();
    let path = |name: &str| directory.path().join(name);
    let signing = SigningKey::from_seed(&[0x77; 32]);
    data_key()
        .write_file(&path("data"), false)
        .expect("a new file");
    signing
        .write_file(&path("signing"), false)
        .expect("a new file");
    let public = signing.verifying_key();
    public
        .write_file(&path("public"), false)
        .expect("a new file");
    let files = ["data", "signing", "public"];
    files
        .map(|name| fs::read(path(name)).expect("just written"))
        .into()
}
