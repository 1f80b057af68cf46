//! The steps before the model, normalizer and pre-tokenizer, and the post-processor behind it.
//!
//! Each list is bounded and no list holds another, and no step makes more of a text than a small multiple, so what a
//! text costs is bounded by its length.

use serde_json::Value;

use crate::{TokenizerFileError, malformed, unsupported};

/// The most steps in a list.
const MAX_STEPS: usize = 16;
/// The longest text that is put in front of each stretch, in bytes.
const MAX_PREFIX: usize = 16;
/// The longest regular expression, in bytes. Those that spell out the letters of all scripts have a few thousand.
const MAX_REGEX: usize = 16 << 10;

/// The steps of a part: none, one, or the members `list` of a `Sequence`.
pub(crate) fn steps<'a>(
    part: &'static str,
    value: &'a Value,
    list: &str,
) -> Result<&'a [Value], TokenizerFileError> {
    if value.is_null() {
        return Ok(&[]);
    }
    if value["type"] != "Sequence" {
        return Ok(std::slice::from_ref(value));
    }
    let steps = value[list]
        .as_array()
        .ok_or_else(|| malformed(format!("`{part}` is a Sequence without `{list}`")))?;
    if steps.len() > MAX_STEPS {
        return Err(malformed(format!(
            "`{part}` has {} steps, at most {MAX_STEPS} are accepted",
            steps.len()
        )));
    }
    Ok(steps)
}

pub(crate) fn check_normalizer(value: &Value) -> Result<(), TokenizerFileError> {
    const PART: &str = "normalizer";
    for step in steps(PART, value, "normalizers")? {
        match step["type"].as_str() {
            Some("NFC") => {}
            Some("Prepend") => {
                let text = step["prepend"].as_str();
                if text.is_none_or(|text| text.len() > MAX_PREFIX) {
                    return Err(unsupported("normalizer.prepend", &step["prepend"]));
                }
            }
            Some("Replace") => {
                replacement("normalizer.pattern", step)?;
            }
            _ => return Err(unsupported(PART, step)),
        }
    }
    Ok(())
}

/// Plain text for plain text that is not longer, in characters: so no sequence of them multiplies a text.
pub(crate) fn replacement<'a>(
    part: &'static str,
    step: &'a Value,
) -> Result<(&'a str, &'a str), TokenizerFileError> {
    let characters = |text: &str| text.chars().count();
    match (step["pattern"]["String"].as_str(), step["content"].as_str()) {
        (Some(from), Some(to)) if !from.is_empty() && characters(to) <= characters(from) => {
            Ok((from, to))
        }
        _ => Err(unsupported(part, &step["pattern"])),
    }
}

pub(crate) fn check_pre_tokenizer(value: &Value) -> Result<(), TokenizerFileError> {
    const PART: &str = "pre_tokenizer";
    let steps = steps(PART, value, "pretokenizers")?;
    for (place, step) in steps.iter().enumerate() {
        match step["type"].as_str() {
            Some("Digits" | "Metaspace") => {}
            // Only as the last: each doubles what it is given.
            Some("ByteLevel") if place + 1 == steps.len() => {}
            Some("Split") => check_split(&step["pattern"])?,
            _ => return Err(unsupported(PART, step)),
        }
    }
    Ok(())
}

fn check_split(pattern: &Value) -> Result<(), TokenizerFileError> {
    let part = "pre_tokenizer.pattern";
    if pattern["String"].as_str().is_some_and(|s| !s.is_empty()) {
        return Ok(());
    }
    match pattern["Regex"].as_str() {
        Some(regex) if is_plain(regex) => Ok(()),
        _ => Err(unsupported(part, pattern)),
    }
}

/// Whether a regular expression has only what finds words: literals, classes, repetitions, groups, alternatives and
/// looking ahead. Back references take exponential time; looking behind and `\K` move where matches begin.
fn is_plain(regex: &str) -> bool {
    let mut rest = regex.chars();
    while let Some(c) = rest.next() {
        match c {
            '\\' => {
                let plain = rest.next().is_some_and(|escaped| {
                    escaped.is_ascii_punctuation() || "sSdDwWpPrntfvxu".contains(escaped)
                });
                if !plain {
                    return false;
                }
            }
            '(' => {
                let group = rest.as_str();
                let known = ["?:", "?i:", "?=", "?!"];
                if group.starts_with('?') && !known.iter().any(|k| group.starts_with(k)) {
                    return false;
                }
            }
            _ => {}
        }
    }
    !regex.is_empty() && regex.len() <= MAX_REGEX
}

/// The one thing that a post-processor may do: put a token in front.
pub(crate) fn leading_token(value: &Value) -> Result<Option<u32>, TokenizerFileError> {
    const PART: &str = "post_processor";
    let mut leading = None;
    for step in steps(PART, value, "processors")? {
        match step["type"].as_str() {
            // Trims offsets, which nobody asks for.
            Some("ByteLevel") => {}
            Some("TemplateProcessing") if leading.is_none() => leading = of_template(step)?,
            _ => return Err(unsupported(PART, step)),
        }
    }
    Ok(leading)
}

fn of_template(template: &Value) -> Result<Option<u32>, TokenizerFileError> {
    const PART: &str = "post_processor.single";
    let single = &template["single"];
    let other = || unsupported(PART, single);
    let pieces = single.as_array().ok_or_else(other)?;
    let is_text = |piece: &Value| piece["Sequence"]["id"] == "A";
    let name = match &pieces[..] {
        [text] if is_text(text) => return Ok(None),
        [token, text] if is_text(text) => token["SpecialToken"]["id"].as_str().ok_or_else(other)?,
        _ => return Err(other()),
    };
    let ids = template["special_tokens"][name]["ids"].as_array();
    let ids = ids.ok_or_else(|| {
        malformed(format!(
            "the post-processor's template names the token {name:?}, which its `special_tokens` lack"
        ))
    })?;
    match &ids[..] {
        [id] => {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            id.map(Some).ok_or_else(other)
        }
        _ => Err(other()),
    }
}
