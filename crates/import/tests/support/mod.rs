//! What the tests of this crate share: writers that can lie, and a tiny model to write with them.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses a part of what it includes"
)]

pub mod directory;
pub mod gguf;
pub mod sentencepiece;

use std::path::Path;

use casemate_container::ModelSource;
use casemate_import::{Fault, ImportError, Missing, Unsupported};

/// Opens `path`, which must succeed.
pub fn open(path: &Path) -> Box<dyn ModelSource> {
    casemate_import::open(path).unwrap_or_else(|e| panic!("{e}"))
}

/// Opens `path`, which must fail.
pub fn refusal(path: &Path) -> ImportError {
    match casemate_import::open(path) {
        Ok(_) => panic!("a model was made of it"),
        Err(e) => e,
    }
}

/// The fault for which `path` is malformed.
pub fn fault(path: &Path) -> Fault {
    match refusal(path) {
        ImportError::Malformed { fault, .. } => fault,
        other => panic!("not malformed but {other:?}"),
    }
}

/// What `path` needs that is not supported.
pub fn unsupported(path: &Path) -> Unsupported {
    match refusal(path) {
        ImportError::Unsupported { need, .. } => need,
        other => panic!("not unsupported but {other:?}"),
    }
}

/// What `path` lacks.
pub fn missing(path: &Path) -> Missing {
    match refusal(path) {
        ImportError::Missing { part, .. } => part,
        other => panic!("not missing but {other:?}"),
    }
}

/// The bytes of the tensor called `name`.
pub fn tensor(model: &dyn ModelSource, name: &str) -> Vec<u8> {
    let index = model
        .tensors()
        .iter()
        .position(|tensor| tensor.name == name)
        .unwrap_or_else(|| panic!("no tensor {name}"));
    let mut bytes = vec![0; model.tensors()[index].size as usize];
    model.read_tensor(index, 0, &mut bytes).unwrap();
    bytes
}

/// The asset called `name`.
pub fn asset<'a>(model: &'a dyn ModelSource, name: &str) -> Option<&'a [u8]> {
    let (_, bytes) = model.assets().iter().find(|(asset, _)| asset == name)?;
    Some(bytes)
}
