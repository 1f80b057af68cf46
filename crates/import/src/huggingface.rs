//! Hugging Face model directories: `config.json`, safetensors (one file or shards with an index), a tokenizer.
//!
//! ```text
//! config.json                        → ModelConfig                          config.rs
//! generation_config.json (optional)  → further end-of-text tokens
//! model.safetensors | model.safetensors.index.json + shards                 safetensors.rs, shards.rs
//! tensor names of transformers       → canonical names                      names.rs
//! tokenizer.json | tokenizer.model   → tokenizer.json                       tokenizer.rs
//! chat_template.jinja | tokenizer_config.json | chat_template.json → chat_template.jinja
//! ```
//!
//! A directory with `adapter_config.json` holds a LoRA adapter and no model  adapter.rs
//!
//! Not here: Python code, pickled weights.

pub(crate) mod adapter;
mod config;
mod directory;
mod modules;
mod names;
mod safetensors;
mod shards;
mod tokenizer;

use std::path::Path;

use self::directory::Directory;
use crate::architecture;
use crate::error::{ImportError, Problem, Unsupported};
use crate::source::Imported;

/// The supported values of `architectures` in `config.json`, for messages.
pub(crate) const ARCHITECTURES: &str = "LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM";

/// Opens the directory at `path` and checks everything but the values of its tensors.
pub(crate) fn open(path: &Path) -> Result<Imported, ImportError> {
    let directory = Directory::new(path);
    if !directory.file(crate::CONFIG_JSON).exists() && directory.file(adapter::SETTINGS).exists() {
        return Err(ImportError::unsupported(path, Unsupported::Adapter));
    }
    let config_json = directory.require(crate::CONFIG_JSON, directory::MAX_SETTINGS)?;
    let generation_json = directory.read(crate::GENERATION_CONFIG_JSON, directory::MAX_SETTINGS)?;
    let config = directory.explain(crate::CONFIG_JSON, config::read(&config_json))?;
    let config = match &generation_json {
        None => config,
        Some(json) => directory.explain(
            crate::GENERATION_CONFIG_JSON,
            config::add_end_ids(config, json),
        )?,
    };

    let weights = shards::open(&directory)?;
    let mut tensors = Vec::new();
    let mut places = Vec::new();
    for (tensor, place) in weights.tensors {
        let file = &weights.files[place.file].0;
        let tensor = names::canonical(tensor, &config).map_err(|problem| problem.at(file))?;
        if let Some(tensor) = tensor {
            tensors.push(tensor);
            places.push(place);
        }
    }

    let tokenizer = tokenizer::read(&directory, &config)?;
    let config = crate::tokenizer::check(&tokenizer.json, config)
        .map_err(|problem| problem.at(&directory.file(tokenizer.found_in)))?;
    architecture::check(&config, &tensors).map_err(|problem| at_fault(&directory, problem))?;

    let mut assets = vec![(crate::TOKENIZER_JSON.to_owned(), tokenizer.json)];
    if let Some(template) = tokenizer::chat_template(&directory)? {
        assets.push((crate::CHAT_TEMPLATE.to_owned(), template.into_bytes()));
    }
    assets.push((crate::CONFIG_JSON.to_owned(), config_json));
    if let Some(json) = generation_json {
        assets.push((crate::GENERATION_CONFIG_JSON.to_owned(), json));
    }
    Ok(Imported {
        name: crate::source::model_name(None, path),
        config,
        tensors,
        places,
        files: weights.files,
        assets,
    })
}

/// Disagreements between configuration and tensors are nobody's alone: the directory's.
fn at_fault(directory: &Directory<'_>, problem: Problem) -> ImportError {
    problem.at(directory.path())
}

#[cfg(test)]
mod tests;
