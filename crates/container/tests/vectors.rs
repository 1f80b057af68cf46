//! Opens every vector through the public interface and compares with the index. Another implementation of
//! `docs/container-format.md` would do the same with the same files.

use std::fs;
use std::path::Path;

use casemate_container::{
    DataKey, Model, NotAuthentic, OpenError, SealedFile, Silent, signing::VerifyingKey,
};
use serde_json::Value;

fn vectors() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors"))
}

fn index() -> Value {
    serde_json::from_slice(&fs::read(vectors().join("index.json")).unwrap()).unwrap()
}

fn open(index: &Value, file: &str) -> Result<Model, OpenError> {
    let mut key = [0; 32];
    hex::decode_to_slice(index["data_key"].as_str().unwrap(), &mut key).unwrap();
    let provider: VerifyingKey = index["provider"].as_str().unwrap().parse().unwrap();
    let unlock =
        || SealedFile::open(&vectors().join(file))?.unlock(&DataKey::from_bytes(&key), &provider);
    let loaded = unlock().and_then(|u| u.load(2, &Silent));
    // Checking without loading must come to the same verdict.
    let checked = unlock().and_then(|u| u.check(2, &Silent));
    assert_eq!(
        loaded.as_ref().err().map(OpenError::code),
        checked.as_ref().err().map(OpenError::code),
        "{file}"
    );
    loaded
}

#[test]
fn every_vector_opens_or_fails_as_the_index_says() {
    let index = index();
    let list = index["vectors"].as_array().unwrap();
    assert!(list.len() > 50);
    for vector in list {
        let file = vector["file"].as_str().unwrap();
        let found = match open(&index, file) {
            Ok(_) => "ok",
            Err(e) => e.code(),
        };
        assert_eq!(
            found,
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
