//! The tokenizer and chat template of a directory.
//!
//! `tokenizer.json` is taken as found, except that truncation and padding are switched off: they belong to training
//! scripts and would cut prompts short without a word. Without one, `tokenizer.model` is converted, with the added
//! tokens and the prefix rules that `tokenizer_config.json` states.

use std::collections::BTreeMap;
use std::fmt;

use casemate_container::ModelConfig;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::directory::{Directory, MAX_SETTINGS, MAX_TOKENIZER, json_fault};
use crate::error::{Fault, ImportError, Problem, Unsupported};
use crate::tokenizer::{
    ByteLevel, Kind, Pieces, SpacePrefix, Token, Vocabulary, sentencepiece, tiktoken,
    with_plain_spaces,
};

const TOKENIZER_MODEL: &str = "tokenizer.model";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const ADDED_TOKENS: &str = "added_tokens.json";
/// The longest chat template.
const MAX_TEMPLATE: u64 = 1 << 20;
/// The most tokens that settings may add to a vocabulary.
const MAX_ADDED: usize = 65_536;

/// The converted tokenizer.
pub(super) struct Found {
    pub(super) json: Vec<u8>,
    /// The file that it comes from.
    pub(super) found_in: &'static str,
}

/// Reads the tokenizer.
pub(super) fn read(directory: &Directory<'_>, config: &ModelConfig) -> Result<Found, ImportError> {
    if let Some(json) = directory.read(crate::TOKENIZER_JSON, MAX_TOKENIZER)? {
        return Ok(Found {
            json: directory.explain(crate::TOKENIZER_JSON, without_truncation(json))?,
            found_in: crate::TOKENIZER_JSON,
        });
    }
    let Some(model) = directory.read(TOKENIZER_MODEL, MAX_TOKENIZER)? else {
        return Err(directory.missing("tokenizer.json or tokenizer.model"));
    };
    let settings = Settings::read(directory)?;
    let vocabulary = if tiktoken::looks_like(&model) {
        tiktoken::parse_llama3(&model).map(Vocabulary::ByteLevel)
    } else {
        sentencepiece::parse(&model).map(|model| Vocabulary::Pieces(settings.pieces(model)))
    };
    let mut vocabulary = directory.explain(TOKENIZER_MODEL, vocabulary)?;
    directory.explain(TOKENIZER_CONFIG, settings.apply(&mut vocabulary, config))?;
    Ok(Found {
        json: directory.explain(TOKENIZER_MODEL, vocabulary.to_json())?,
        found_in: TOKENIZER_MODEL,
    })
}

/// Reads the chat template, wherever it is.
pub(super) fn chat_template(directory: &Directory<'_>) -> Result<Option<String>, ImportError> {
    if let Some(text) = directory.read(crate::CHAT_TEMPLATE, MAX_TEMPLATE)? {
        let text = String::from_utf8(text).map_err(|e| {
            Problem::from(Fault::NotUtf8 {
                what: "the chat template",
                offset: e.utf8_error().valid_up_to() as u64,
            })
        });
        return directory.explain(crate::CHAT_TEMPLATE, text).map(Some);
    }
    for (name, what) in [
        (TOKENIZER_CONFIG, "tokenizer_config.json"),
        ("chat_template.json", "chat_template.json"),
    ] {
        let Some(json) = directory.read(name, MAX_SETTINGS)? else {
            continue;
        };
        let holder: TemplateHolder = directory.explain(
            name,
            serde_json::from_slice(&json).map_err(|e| json_fault(what, &e)),
        )?;
        if let Some(template) = holder.default() {
            return Ok(Some(template));
        }
    }
    Ok(None)
}

#[derive(Deserialize)]
struct TemplateHolder {
    chat_template: Option<Template>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Template {
    One(String),
    Several(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl TemplateHolder {
    fn default(self) -> Option<String> {
        match self.chat_template? {
            Template::One(text) => Some(text),
            Template::Several(list) => list
                .into_iter()
                .find(|template| template.name == "default")
                .map(|template| template.template),
        }
    }
}

/// `json` with `truncation` and `padding` null; unchanged, byte for byte, if they are.
fn without_truncation(json: Vec<u8>) -> Result<Vec<u8>, Problem> {
    const OFF: [&str; 2] = ["truncation", "padding"];
    let fields: Fields<'_> =
        serde_json::from_slice(&json).map_err(|e| json_fault("tokenizer.json", &e))?;
    let mut fields = fields.0;
    let mut names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Fault::DuplicateKey {
            key: pair[0].to_owned(),
        }
        .into());
    }
    let on = |name: &str, value: &RawValue| OFF.contains(&name) && value.get() != "null";
    if !fields.iter().any(|(name, value)| on(name, value)) {
        return Ok(json);
    }
    for (name, value) in &mut fields {
        if on(name, value) {
            *value = RawValue::NULL;
        }
    }
    let mut out = Vec::with_capacity(json.len());
    for (name, value) in &fields {
        out.push(if out.is_empty() { b'{' } else { b',' });
        serde_json::to_writer(&mut out, name).map_err(|e| json_fault("tokenizer.json", &e))?;
        out.push(b':');
        out.extend_from_slice(value.get().as_bytes());
    }
    out.push(b'}');
    Ok(out)
}

/// The top level of an object, in order, values unread.
struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Collect).map(Fields)
    }
}

/// What `tokenizer_config.json` and `added_tokens.json` say about a `tokenizer.model`.
#[derive(Default)]
struct Settings {
    config: TokenizerConfig,
    added: BTreeMap<u32, Added>,
}

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    add_prefix_space: Option<bool>,
    legacy: Option<bool>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, Added>,
}

#[derive(Deserialize, Clone)]
struct Added {
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

impl Settings {
    fn read(directory: &Directory<'_>) -> Result<Self, ImportError> {
        let mut settings = Self::default();
        if let Some(json) = directory.read(TOKENIZER_CONFIG, MAX_SETTINGS)? {
            settings.config = directory.explain(
                TOKENIZER_CONFIG,
                serde_json::from_slice(&json).map_err(|e| json_fault(TOKENIZER_CONFIG, &e)),
            )?;
        }
        settings.added = std::mem::take(&mut settings.config.added_tokens_decoder);
        if settings.added.is_empty()
            && let Some(json) = directory.read(ADDED_TOKENS, MAX_SETTINGS)?
        {
            let ids: BTreeMap<String, u32> = directory.explain(
                ADDED_TOKENS,
                serde_json::from_slice(&json).map_err(|e| json_fault(ADDED_TOKENS, &e)),
            )?;
            settings.added = ids
                .into_iter()
                .map(|(content, id)| {
                    let added = Added {
                        content,
                        special: false,
                        lstrip: false,
                        rstrip: false,
                        single_word: false,
                    };
                    (id, added)
                })
                .collect();
        }
        Ok(settings)
    }

    /// A SentencePiece model with the prefix rules of transformers.
    fn pieces(&self, model: sentencepiece::Model) -> Pieces {
        let prefix = model.add_dummy_prefix && self.config.add_prefix_space.unwrap_or(true);
        Pieces {
            tokens: with_plain_spaces(model.tokens),
            scores: model.scores,
            unknown: model.unknown,
            bos: model.bos,
            space_prefix: match (prefix, self.config.legacy) {
                (false, _) => SpacePrefix::Never,
                (true, Some(false)) => SpacePrefix::TextOnly,
                (true, Some(true) | None) => SpacePrefix::EachStretch,
            },
        }
    }

    /// Adds the stated tokens and takes away the leading one where it is unwanted.
    fn apply(&self, vocabulary: &mut Vocabulary, config: &ModelConfig) -> Result<(), Problem> {
        if self.config.add_eos_token == Some(true) {
            return Err(setting("add_eos_token", true));
        }
        let (tokens, bos) = match vocabulary {
            Vocabulary::Pieces(Pieces { tokens, bos, .. })
            | Vocabulary::ByteLevel(ByteLevel { tokens, bos, .. }) => (tokens, bos),
        };
        if self.config.add_bos_token == Some(false) {
            *bos = None;
        }
        if self.added.len() > MAX_ADDED {
            return Err(Fault::TooMany {
                what: "added tokens",
                count: self.added.len() as u64,
                limit: MAX_ADDED as u64,
            }
            .into());
        }
        for (id, added) in &self.added {
            for (key, on) in [
                ("lstrip", added.lstrip),
                ("rstrip", added.rstrip),
                ("single_word", added.single_word),
            ] {
                if on {
                    return Err(setting(&format!("{key} of added token {id}"), true));
                }
            }
            let token = Token {
                text: added.content.clone(),
                kind: if added.special {
                    Kind::Control
                } else {
                    Kind::UserDefined
                },
            };
            let place = *id as usize;
            if place == tokens.len() {
                tokens.push(token);
                continue;
            }
            match tokens.get_mut(place) {
                // The special tokens of tiktoken are a convention that the directory may state differently.
                Some(old) if old.text == token.text || old.kind == Kind::Control => *old = token,
                Some(old) => {
                    return Err(Fault::Contradiction {
                        first: format!("added token {id} is {:?}", token.text),
                        second: format!("{TOKENIZER_MODEL} has {:?} there", old.text),
                    }
                    .into());
                }
                None => {
                    return Err(Fault::TokenId {
                        what: "an added token",
                        id: u64::from(*id),
                        vocabulary: u64::from(config.vocab),
                    }
                    .into());
                }
            }
        }
        Ok(())
    }
}

fn setting(key: &str, value: impl ToString) -> Problem {
    Unsupported::Setting {
        key: key.to_owned(),
        value: value.to_string(),
    }
    .into()
}
