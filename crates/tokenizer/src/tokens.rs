//! The vocabulary: the model's tokens and those added to it.

use std::collections::HashMap;

use serde_json::Value;

use crate::{TokenizerFileError, malformed, unsupported};

/// Byte-pair encoding that gives the same text the same tokens each time.
pub(crate) fn check_model(model: &Value) -> Result<(), TokenizerFileError> {
    if model["type"] != "BPE" {
        return Err(unsupported("model.type", &model["type"]));
    }
    if !(model["dropout"].is_null() || model["dropout"] == 0.0) {
        return Err(unsupported("model.dropout", &model["dropout"]));
    }
    for part in [
        "model.continuing_subword_prefix",
        "model.end_of_word_suffix",
    ] {
        let value = &model[part.trim_start_matches("model.")];
        if !(value.is_null() || value == "") {
            return Err(unsupported(part, value));
        }
    }
    let vocabulary = model["vocab"]
        .as_object()
        .ok_or_else(|| malformed("`model.vocab` is not an object"))?;
    if let Some(unknown) = model["unk_token"].as_str()
        && !vocabulary.contains_key(unknown)
    {
        return Err(malformed(format!(
            "`model.unk_token` is {unknown:?}, which is no token"
        )));
    }
    Ok(())
}

/// A token that is looked for in a text before anything else happens to it.
pub(crate) struct Added<'a> {
    pub(crate) id: u32,
    pub(crate) content: &'a str,
}

/// The added tokens that have a name and an id. The library ignores those without a name.
pub(crate) fn added(file: &Value) -> impl Iterator<Item = Added<'_>> {
    let tokens = file["added_tokens"].as_array().into_iter().flatten();
    tokens.filter_map(|token| {
        let content = token["content"].as_str().filter(|name| !name.is_empty())?;
        let id = u32::try_from(token["id"].as_u64()?).ok()?;
        Some(Added { id, content })
    })
}

/// Each id belongs to one name, and no added token can take the spaces that are another.
pub(crate) fn check_added(file: &Value) -> Result<(), TokenizerFileError> {
    let vocabulary = file["model"]["vocab"].as_object().into_iter().flatten();
    let mut names = HashMap::new();
    let of_model = vocabulary.map(|(name, id)| (id.as_u64(), name.as_str()));
    let of_added = added(file).map(|token| (Some(u64::from(token.id)), token.content));
    for (id, name) in of_model.chain(of_added) {
        let id = id.ok_or_else(|| malformed(format!("the id of token {name:?} is no number")))?;
        match names.insert(id, name) {
            Some(first) if first != name => {
                return Err(malformed(format!(
                    "the tokens {first:?} and {name:?} have the same id {id}"
                )));
            }
            _ => {}
        }
    }
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        let is = |flag: &str| token[flag] == true;
        let name = token["content"].as_str().unwrap_or("");
        // A token that takes the spaces behind it can take all of the next one if that is spaces; if the next one looks
        // for spaces in front of it then, the library cuts from behind to in front. What normalization makes of a name
        // is not known here.
        let strips = is("lstrip") || is("rstrip");
        if strips && (is("normalized") || name.trim().is_empty()) {
            return Err(unsupported("added_tokens.lstrip", &token["content"]));
        }
    }
    Ok(())
}

pub(crate) fn rename<'a>(file: &mut Value, other: impl Fn(&str) -> Option<&'a str>) {
    for token in file["added_tokens"].as_array_mut().into_iter().flatten() {
        if let Some(internal) = token["content"].as_str().and_then(&other) {
            token["content"] = internal.into();
            // The new name is put in after normalization had its say.
            token["normalized"] = false.into();
        }
    }
    let model = &mut file["model"];
    if let Some(internal) = model["unk_token"].as_str().and_then(&other) {
        model["unk_token"] = internal.into();
    }
    if let Value::Object(vocab) = &mut model["vocab"] {
        *vocab = std::mem::take(vocab)
            .into_iter()
            .map(|(name, id)| match other(&name) {
                Some(internal) => (internal.to_owned(), id),
                None => (name, id),
            })
            .collect();
    }
    if let Some(merges) = model["merges"].as_array_mut() {
        merges.retain(|merge| {
            let parts = match merge {
                Value::String(pair) => pair.split_once(' '),
                pair => pair[0].as_str().zip(pair[1].as_str()),
            };
            parts.is_none_or(|(left, right)| {
                [left, right, &format!("{left}{right}")]
                    .iter()
                    .all(|name| other(name).is_none())
            })
        });
    }
}
