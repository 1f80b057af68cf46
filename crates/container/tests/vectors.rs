//! Opens every vector through the public interface and compares with the index. Another implementation of
//! `docs/container-format.md` would do the same with the same files.

use std::fs;
use std::path::Path;

use casemate_container::{
    DataKey, Kind, Model, NotAuthentic, OpenError, RopeLayout, SealedFile, Silent, Unlocked,
    signing::VerifyingKey,
};
use serde_json::Value;

fn vectors() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors"))
}

fn index() -> Value {
    serde_json::from_slice(&fs::read(vectors().join("index.json")).unwrap()).unwrap()
}

fn unlock(index: &Value, file: &str) -> Result<Unlocked, OpenError> {
    let mut key = [0; 32];
    hex::decode_to_slice(index["data_key"].as_str().unwrap(), &mut key).unwrap();
    let provider: VerifyingKey = index["provider"].as_str().unwrap().parse().unwrap();
    SealedFile::open(&vectors().join(file))?.unlock(&DataKey::from_bytes(&key), &provider)
}

fn open(index: &Value, file: &str) -> Result<Model, OpenError> {
    unlock(index, file)?.load(2, &Silent)
}

/// What comes of a file, whatever it holds.
fn verdict(index: &Value, file: &str) -> &'static str {
    let code = |done: Result<(), OpenError>| done.map_or_else(|e| e.code(), |()| "ok");
    let loaded = unlock(index, file).and_then(|unlocked| match unlocked.manifest().kind() {
        Kind::Model(_) => unlocked.load(2, &Silent).map(drop),
        Kind::Adapter(_) => unlocked.load_adapter(2, &Silent).map(drop),
    });
    let loaded = code(loaded);
    // Checking without loading must come to the same verdict.
    let checked = unlock(index, file).and_then(|u| u.check(2, &Silent));
    assert_eq!(loaded, code(checked), "{file}");
    loaded
}

#[test]
fn every_vector_opens_or_fails_as_the_index_says() {
    let index = index();
    let list = index["vectors"].as_array().unwrap();
    assert!(list.len() > 50);
    for vector in list {
        let file = vector["file"].as_str().unwrap();
        assert_eq!(
            verdict(&index, file),
            vector["expect"].as_str().unwrap(),
            "{file}: {}",
            vector["about"]
        );
    }
}

#[test]
fn valid_vectors_hold_what_the_specification_says() {
    let index = index();
    for (file, tensors, last) in [
        ("valid.casemate", 2, "{\"version\":\"1.0\"}"),
        ("valid-small.casemate", 1, "{}"),
    ] {
        let model = open(&index, file).unwrap();
        assert_eq!(
            model.digest().to_string(),
            index["digests"][file].as_str().unwrap()
        );
        assert_eq!(model.manifest().digest(), model.digest());
        assert_eq!(model.manifest().name(), "vector");
        assert_eq!(model.manifest().version(), 7);
        assert_eq!(model.manifest().tensors().len(), tensors);
        assert_eq!(model.asset("tokenizer.json").unwrap(), last.as_bytes());
        for entry in model.manifest().tensors() {
            let bytes = model.tensor(&entry.name).unwrap().bytes;
            assert!(
                bytes
                    .iter()
                    .enumerate()
                    .all(|(i, &b)| b == (i * 7 + 1) as u8),
                "{file} {}",
                entry.name
            );
        }
    }
}

#[test]
fn the_first_wrong_chunk_is_named() {
    let index = index();
    for (file, want) in [
        ("chunk-bit.casemate", 0),
        ("chunk-tag.casemate", 0),
        ("chunks-swapped.casemate", 0),
        ("chunk-of-another-file.casemate", 1),
        ("final-flag-missing.casemate", 0),
        ("final-flag-early.casemate", 0),
    ] {
        match open(&index, file) {
            Err(OpenError::NotAuthentic(NotAuthentic::Chunk { index })) => {
                assert_eq!(index, want, "{file}")
            }
            other => panic!("{file}: {:?}", other.err()),
        }
    }
}

#[test]
fn an_adapter_is_no_model_and_a_model_no_adapter() {
    let index = index();
    let unlocked = || unlock(&index, "valid-adapter.casemate").unwrap();
    let adapter = unlocked().load_adapter(2, &Silent).unwrap();
    let digest = index["digests"]["valid-adapter.casemate"].as_str().unwrap();
    assert_eq!(adapter.digest().to_string(), digest);
    let config = adapter.config();
    assert_eq!(config.base.as_bytes()[..2], [0x60, 0x61]);
    assert_eq!((config.rank, config.scale()), (2, 2.0));
    assert_eq!(config.rope_layout, RopeLayout::Half);
    let factor = adapter.tensor("blk.0.attn_q.weight.lora_b").unwrap();
    assert_eq!(factor.entry.shape, [4, 2]);
    assert_eq!(factor.bytes[..2], [1, 8]);

    let refused = |error: Option<OpenError>| error.map(|e| e.code());
    let as_model = unlocked().load(2, &Silent).err();
    assert_eq!(refused(as_model), Some("other-kind"));
    let model = unlock(&index, "valid.casemate").unwrap();
    let as_adapter = model.load_adapter(2, &Silent).err();
    assert_eq!(refused(as_adapter), Some("other-kind"));
}
