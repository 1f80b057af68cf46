//! LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Settings that change what an adapter computes and are not here are refused by name; so is any that is not known and
//! asks for something. Rows of Q and K are in the order of transformers, whatever order the base has them in; that is
//! stated, and left to whoever applies the adapter.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use casemate_container::{
    AdapterConfig, AdapterSource, ModelConfig, ModelDigest, RopeLayout, SourceError, SourceTensor,
};
use serde_json::{Map, Value};

use super::directory::{Directory, MAX_SETTINGS, json_fault};
use super::modules::{Module, Modules};
use super::names;
use super::safetensors::{self, StoredTensor};
use crate::error::{Fault, ImportError, Missing, Problem, Unsupported};
use crate::source::{model_name, read_range};

pub(super) const SETTINGS: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLED: &str = "adapter_model.bin";

/// Settings of training, of where the adapter comes from, or of how its file was made: nothing that is computed follows
/// from them.
const WITHOUT_EFFECT: [&str; 17] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    // Of QALoRA, which is refused.
    "qalora_group_size",
    "revision",
    "task_type",
    // Read here.
    "exclude_modules",
    "lora_alpha",
    "peft_type",
    "r",
    "use_rslora",
];

/// Ways to begin that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) take from the base's weights what
/// they put into the adapter, so that the adapter belongs to another base than the published one.
const BEGINNINGS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// A checked adapter whose tensors are still in their file.
struct Imported {
    name: String,
    config: AdapterConfig,
    tensors: Vec<SourceTensor>,
    /// Where each tensor begins in the file.
    offsets: Vec<u64>,
    file: File,
}

/// Opens the PEFT directory at `path`, an adapter to the model `base`; its tensors are held against the base's
/// architecture where that is known.
pub(crate) fn open(
    path: &Path,
    base: ModelDigest,
    architecture: Option<&ModelConfig>,
) -> Result<Box<dyn AdapterSource>, ImportError> {
    let directory = Directory::new(path);
    let json = directory.require(SETTINGS, MAX_SETTINGS)?;
    let settings = directory.explain(SETTINGS, Settings::read(&json))?;
    let weights = weights(&directory)?;
    let io = |e| ImportError::io(&weights, e);
    let file = File::open(&weights).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let stored = safetensors::read_header(&file, length).map_err(|p| p.at(&weights))?;
    let config = AdapterConfig {
        base,
        rank: settings.rank,
        alpha: settings.alpha,
        rank_stabilised: settings.rank_stabilised,
        rope_layout: RopeLayout::Half,
    };
    let offsets = stored.iter().map(|tensor| tensor.offset).collect();
    let tensors = check(&settings, &config, stored, architecture).map_err(|p| p.at(&weights))?;
    Ok(Box::new(Imported {
        name: model_name(None, path),
        config,
        tensors,
        offsets,
        file,
    }))
}

fn weights(directory: &Directory<'_>) -> Result<PathBuf, ImportError> {
    if directory.file(WEIGHTS).exists() {
        return Ok(directory.file(WEIGHTS));
    }
    Err(match directory.file(PICKLED).exists() {
        false => directory.missing(WEIGHTS),
        true => ImportError::unsupported(
            directory.path(),
            Unsupported::WeightFormat {
                file: PICKLED.to_owned(),
            },
        ),
    })
}

/// The tensors under their canonical names, if they are those that the settings speak of.
fn check(
    settings: &Settings,
    config: &AdapterConfig,
    stored: Vec<StoredTensor>,
    base: Option<&ModelConfig>,
) -> Result<Vec<SourceTensor>, Problem> {
    let mut tensors = Vec::with_capacity(stored.len());
    let mut modules = BTreeSet::new();
    for tensor in stored {
        let Some((module, name)) = canonical(&tensor.name) else {
            return Err(Unsupported::AdapterTensor {
                tensor: tensor.name,
            }
            .into());
        };
        modules.extend(module);
        let dtype = tensor.dtype()?;
        tensors.push(SourceTensor {
            name,
            dtype,
            shape: tensor.shape,
            size: tensor.size,
        });
    }
    let fields = tensors.iter().map(|t| (&*t.name, t.dtype, &t.shape[..]));
    config
        .check_tensors(fields, base)
        .map_err(|mismatch| Fault::Adapter { mismatch })?;
    settings
        .modules
        .check(&modules, base.map(|base| base.layers))?;
    Ok(tensors)
}

/// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` as canonical name, and its module if that is one that
/// adapters can change.
fn canonical(name: &str) -> Option<(Option<Module>, String)> {
    let inner = name.strip_prefix("base_model.model.")?;
    let (module, factor) = match inner.strip_suffix(".lora_A.weight") {
        Some(module) => (module, 'a'),
        None => (inner.strip_suffix(".lora_B.weight")?, 'b'),
    };
    module.strip_prefix("model.layers.")?;
    let weight = names::canonical_name(&format!("{module}.weight"))?;
    Some((Module::parse(module), format!("{weight}.lora_{factor}")))
}

/// What `adapter_config.json` says.
struct Settings {
    rank: u32,
    alpha: f32,
    rank_stabilised: bool,
    modules: Modules,
}

impl Settings {
    fn read(json: &[u8]) -> Result<Self, Problem> {
        let values: Map<String, Value> =
            serde_json::from_slice(json).map_err(|e| json_fault(SETTINGS, &e))?;
        let kind = require(&values, "peft_type")?;
        if kind != "LORA" {
            return Err(setting("peft_type", kind));
        }
        for (key, value) in &values {
            refuse_unknown(key, value)?;
        }
        let rank = require(&values, "r")?;
        let rank = rank.as_u64().and_then(|rank| u32::try_from(rank).ok());
        let alpha = require(&values, "lora_alpha")?.as_f64();
        let settings = Settings {
            rank: rank.ok_or_else(|| wrong_type("r", "a number of rows"))?,
            alpha: alpha.ok_or_else(|| wrong_type("lora_alpha", "a number"))? as f32,
            rank_stabilised: match values.get("use_rslora") {
                None | Some(Value::Null) => false,
                Some(Value::Bool(value)) => *value,
                Some(_) => return Err(wrong_type("use_rslora", "a Boolean")),
            },
            modules: Modules::read(values.get("target_modules"), values.get("exclude_modules"))?,
        };
        for (key, holds) in [
            (
                "r",
                (1..=casemate_container::MAX_RANK).contains(&settings.rank),
            ),
            (
                "lora_alpha",
                settings.alpha.is_finite() && settings.alpha > 0.0,
            ),
        ] {
            if !holds {
                let value = values[key].to_string();
                let key = key.to_owned();
                return Err(Fault::OutOfRange { key, value }.into());
            }
        }
        Ok(settings)
    }
}

/// Refuses a setting that would change what is computed.
fn refuse_unknown(key: &str, value: &Value) -> Result<(), Problem> {
    let supported = match key {
        "target_modules" => true,
        "bias" => asks_for_nothing(value) || value == "none",
        "init_lora_weights" => {
            value.is_boolean() || value.as_str().is_some_and(|way| BEGINNINGS.contains(&way))
        }
        key => WITHOUT_EFFECT.contains(&key) || asks_for_nothing(value),
    };
    match supported {
        true => Ok(()),
        false => Err(setting(key, value)),
    }
}

/// Null, false, and what is empty.
fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn require<'a>(values: &'a Map<String, Value>, key: &str) -> Result<&'a Value, Problem> {
    let missing = || Missing::Key {
        key: key.to_owned(),
    };
    let value = values.get(key).filter(|value| !value.is_null());
    value.ok_or_else(|| missing().into())
}

fn setting(key: &str, value: &Value) -> Problem {
    let key = key.to_owned();
    let value = value.to_string().chars().take(200).collect();
    Unsupported::Setting { key, value }.into()
}

pub(super) fn wrong_type(key: &str, expected: &'static str) -> Problem {
    let key = key.to_owned();
    Fault::WrongType { key, expected }.into()
}

impl AdapterSource for Imported {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &AdapterConfig {
        &self.config
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_tensor(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<(), SourceError> {
        read_range(
            &self.file,
            self.offsets[index],
            &self.tensors[index],
            offset,
            out,
        )
    }
}
