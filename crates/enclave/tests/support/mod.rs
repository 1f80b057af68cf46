//! A tiny real model.

use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, Model, SealOptions, SealedFile, Silent, seal};
use casemate_testkit::models::Tiny;

/// Sealed, opened and checked.
pub(crate) fn tiny_model() -> Model {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.casemate");
    let (data_key, signing_key) = (DataKey::generate(), SigningKey::generate());
    let options = SealOptions {
        version: 1,
        ..SealOptions::default()
    };
    seal(
        &Tiny::default().build(),
        &options,
        &data_key,
        &signing_key,
        &path,
        &Silent,
    )
    .unwrap();
    let file = SealedFile::open(&path).unwrap();
    file.unlock(&data_key, &signing_key.verifying_key())
        .unwrap()
        .load(1, &Silent)
        .unwrap()
}
