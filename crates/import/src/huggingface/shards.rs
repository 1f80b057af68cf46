//! The weights of a directory: one safetensors file, or shards that an index ties together.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::directory::{Directory, MAX_INDEX, json_fault};
use super::safetensors::{self, StoredTensor};
use crate::error::{Fault, ImportError, Missing, Problem, Unsupported};
use crate::source::Place;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What directories have that were never converted.
const PICKLED: [&str; 4] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "tf_model.h5",
];
/// The most shards; Llama 3.1 405B has 191.
const MAX_SHARDS: usize = 1024;

/// All tensors of a directory.
pub(super) struct Weights {
    pub(super) files: Vec<(PathBuf, File)>,
    pub(super) tensors: Vec<(StoredTensor, Place)>,
}

/// Opens the weights and checks them against each other.
pub(super) fn open(directory: &Directory<'_>) -> Result<Weights, ImportError> {
    let mut weights = Weights {
        files: Vec::new(),
        tensors: Vec::new(),
    };
    if directory.file(SINGLE).exists() {
        weights.add(directory, SINGLE)?;
        return Ok(weights);
    }
    let Some(json) = directory.read(INDEX, MAX_INDEX)? else {
        return Err(
            match PICKLED.iter().find(|name| directory.file(name).exists()) {
                None => directory.missing(SINGLE),
                Some(name) => ImportError::unsupported(
                    directory.path(),
                    Unsupported::WeightFormat {
                        file: (*name).to_owned(),
                    },
                ),
            },
        );
    };
    let index = directory.explain(INDEX, Index::parse(&json))?;
    for shard in &index.shards {
        if !directory.file(shard).exists() {
            return Err(ImportError::missing(
                directory.path(),
                Missing::Shard {
                    name: shard.clone(),
                },
            ));
        }
        let first = weights.tensors.len();
        weights.add(directory, shard)?;
        let added = &weights.tensors[first..];
        directory.explain(shard, index.check_shard(shard, added))?;
    }
    Ok(weights)
}

impl Weights {
    fn add(&mut self, directory: &Directory<'_>, name: &str) -> Result<(), ImportError> {
        let path = directory.file(name);
        let io = |e| ImportError::io(&path, e);
        let file = File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let tensors =
            safetensors::read_header(&file, length).map_err(|problem| problem.at(&path))?;
        let index = self.files.len();
        self.tensors.extend(tensors.into_iter().map(|tensor| {
            let place = Place {
                file: index,
                offset: tensor.offset,
            };
            (tensor, place)
        }));
        self.files.push((path, file));
        Ok(())
    }
}

/// `model.safetensors.index.json`: which shard holds which tensor.
struct Index {
    shard_of: HashMap<String, String>,
    shards: BTreeSet<String>,
}

impl Index {
    fn parse(json: &[u8]) -> Result<Self, Problem> {
        #[derive(Deserialize)]
        struct Document {
            weight_map: Pairs,
        }
        let document: Document =
            serde_json::from_slice(json).map_err(|e| json_fault("the index of shards", &e))?;
        let mut index = Self {
            shard_of: HashMap::new(),
            shards: BTreeSet::new(),
        };
        for (tensor, shard) in document.weight_map.0 {
            if !is_plain_name(&shard) {
                return Err(Fault::ShardName { name: shard }.into());
            }
            index.shards.insert(shard.clone());
            if index.shard_of.insert(tensor.clone(), shard).is_some() {
                return Err(Fault::DuplicateTensor { tensor }.into());
            }
        }
        if index.shards.len() > MAX_SHARDS {
            return Err(Fault::TooMany {
                what: "shards",
                count: index.shards.len() as u64,
                limit: MAX_SHARDS as u64,
            }
            .into());
        }
        Ok(index)
    }

    /// Refuses tensors that the index places elsewhere or does not know, and promised ones that are absent.
    fn check_shard(&self, shard: &str, tensors: &[(StoredTensor, Place)]) -> Result<(), Problem> {
        let mut promised: BTreeSet<&str> = self
            .shard_of
            .iter()
            .filter(|(_, place)| *place == shard)
            .map(|(tensor, _)| tensor.as_str())
            .collect();
        for (tensor, _) in tensors {
            if !promised.remove(tensor.name.as_str()) {
                return Err(Fault::WrongShard {
                    tensor: tensor.name.clone(),
                    found: shard.to_owned(),
                    expected: self.shard_of.get(&tensor.name).cloned(),
                }
                .into());
            }
        }
        match promised.first() {
            None => Ok(()),
            Some(tensor) => Err(Missing::IndexedTensor {
                tensor: (*tensor).to_owned(),
                shard: shard.to_owned(),
            }
            .into()),
        }
    }
}

/// A name in this directory and nowhere else.
fn is_plain_name(name: &str) -> bool {
    name.len() <= 255
        && name.ends_with(".safetensors")
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// An object of strings, duplicates and all.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to shard names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}
