//! Request fields that chat and text completions share, with their ranges and the list of refused ones.

use casemate_attest::UniqueValue;
use casemate_engine::Sampling;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::extraction::Extraction;

/// Most choices (`n`) that one request may ask for.
const MAX_CHOICES: u32 = 8;
/// Most stop strings, and the longest one in bytes.
const MAX_STOPS: usize = 4;
const MAX_STOP_BYTES: usize = 256;
/// Longest `user`, in bytes.
const MAX_USER_BYTES: usize = 512;

/// OpenAI fields that are known but not implemented, and why. A value that asks for nothing (null, false, an empty
/// list, the documented default) is accepted: many clients send those.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("audio", "is not supported: this service produces text only"),
    ("best_of", "is not supported: use 'n'"),
    ("echo", "is not supported"),
    ("function_call", "is not supported: use 'tool_choice'"),
    ("functions", "is not supported: use 'tools'"),
    (
        "modalities",
        "is not supported: this service produces text only",
    ),
    ("moderation", "is not supported"),
    ("prediction", "is not supported"),
    (
        "prompt_cache_key",
        "is not supported: prompts are not cached across requests",
    ),
    (
        "prompt_cache_retention",
        "is not supported: prompts are not cached across requests",
    ),
    (
        "reasoning_effort",
        "is not supported: the served model has no reasoning mode",
    ),
    ("suffix", "is not supported"),
    (
        "parallel_tool_calls",
        "is not supported: only chats have tools",
    ),
    (
        "response_format",
        "is not supported: only chats can be constrained",
    ),
    ("tool_choice", "is not supported: only chats have tools"),
    ("tools", "is not supported: only chats have tools"),
    (
        "top_logprobs",
        "is not supported: only chats have it; give 'logprobs' a number",
    ),
    (
        "max_completion_tokens",
        "is not supported: only chats have it; use 'max_tokens'",
    ),
    ("messages", "is not supported: only chats have it"),
    ("prompt", "is not supported: only completions have it"),
    ("verbosity", "is not supported"),
    (
        "web_search_options",
        "is not supported: the enclave reaches no web",
    ),
];

/// Fields with the same meaning in both endpoints. `top_k`, `min_p` and `repetition_penalty` are extensions that
/// other open servers share under these names.
#[derive(Deserialize)]
pub(super) struct Common {
    pub(super) model: String,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) n: Option<u32>,
    pub(super) stop: Option<Stop>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    seed: Option<i64>,
    logit_bias: Option<Map<String, Value>>,
    user: Option<String>,
    safety_identifier: Option<String>,
    metadata: Option<Map<String, Value>>,
    store: Option<bool>,
    service_tier: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
    /// Padding against length analysis; frames of the channel are padded already, so either value holds.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

/// `stop`: one string or several.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Stop {
    One(String),
    Many(Vec<String>),
}

const COMMON_FIELDS: &[&str] = &[
    "model",
    "stream",
    "stream_options",
    "n",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logit_bias",
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "service_tier",
];

/// Every field that has a meaning here or is refused with a reason of its own.
pub(super) fn known_fields() -> impl Iterator<Item = &'static str> {
    let refused = UNSUPPORTED.iter().map(|(name, _)| *name);
    COMMON_FIELDS.iter().copied().chain(refused)
}

/// A JSON object whose every field has been accounted for: common, the endpoint's own, or refused by name.
pub(super) struct Fields {
    pub(super) common: Common,
    own: Map<String, Value>,
}

/// A JSON object in which a repeated key, at any depth, is an error instead of "the last one wins".
struct UniqueObject(Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueObject {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = UniqueObject;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut access: A,
            ) -> Result<Self::Value, A::Error> {
                let mut map: Map<String, Value> = Map::new();
                while let Some((key, UniqueValue(value))) = access.next_entry()? {
                    if map.insert(key, value).is_some() {
                        return Err(serde::de::Error::custom("a field is given twice"));
                    }
                }
                Ok(UniqueObject(map))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

impl Fields {
    /// Parses `body`, refusing by name every field that is neither common nor in `own_fields`.
    pub(super) fn parse(body: &[u8], own_fields: &[&str]) -> Result<Self, ApiError> {
        let UniqueObject(object) = serde_json::from_slice(body).map_err(ApiError::malformed)?;
        let mut common = Map::new();
        let mut own = Map::new();
        for (key, value) in object {
            if value.is_null() {
                continue;
            }
            if own_fields.contains(&key.as_str()) {
                own.insert(key, value);
            } else if COMMON_FIELDS.contains(&key.as_str()) {
                common.insert(key, value);
            } else if let Some((name, why)) = UNSUPPORTED.iter().find(|(name, _)| *name == key) {
                if !asks_for_nothing(name, &value) {
                    return Err(ApiError::unsupported(name, why));
                }
            } else {
                // Reflected so that a typing error can be found; cut because it came from outside.
                return Err(ApiError::unknown(&key.chars().take(64).collect::<String>()));
            }
        }
        if !common.contains_key("model") {
            return Err(ApiError::missing("model"));
        }
        let mut fields = Self {
            common: Common::empty(),
            own,
        };
        // One field at a time, so that an error names the field.
        macro_rules! take {
            ($($field:ident),*) => { $( fields.common.$field = take_field(&mut common, stringify!($field))?; )* };
        }
        fields.common.model = take_field(&mut common, "model")?.unwrap_or_default();
        take!(
            stream,
            stream_options,
            n,
            stop,
            temperature,
            top_p,
            top_k,
            min_p,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            seed,
            logit_bias,
            user,
            safety_identifier,
            metadata,
            store,
            service_tier
        );
        fields.common.check_what_has_no_effect()?;
        Ok(fields)
    }

    /// One of the endpoint's own fields.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, ApiError> {
        take_field(&mut self.own, name)
    }
}

fn take_field<T: DeserializeOwned>(
    map: &mut Map<String, Value>,
    name: &str,
) -> Result<Option<T>, ApiError> {
    // serde's messages quote the offending value; a value may be the prompt, so only its place is told.
    map.remove(name)
        .map(|value| serde_json::from_value(value).map_err(|_| ApiError::value(name, "wrong type")))
        .transpose()
}

/// A seed for a request that gave none. It is told in the answer, so it is a number that every client
/// can read: below 2^53.
fn random_seed() -> u64 {
    let mut seed = [0; 8];
    aws_lc_rs::rand::fill(&mut seed).expect("the operating system gives randomness");
    u64::from_ne_bytes(seed) >> 11
}

fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match (name, value) {
        ("modalities", Value::Array(list)) => list.len() == 1 && list[0] == "text",
        ("function_call", Value::String(choice)) => choice == "none",
        ("best_of", value) => value == 1,
        (_, Value::Bool(set)) => !set,
        (_, Value::Array(list)) => list.is_empty(),
        (_, Value::Object(object)) => object.is_empty(),
        (_, Value::String(text)) => text.is_empty(),
        _ => false,
    }
}

impl Common {
    fn empty() -> Self {
        Self {
            model: String::new(),
            stream: None,
            stream_options: None,
            n: None,
            stop: None,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            presence_penalty: None,
            frequency_penalty: None,
            repetition_penalty: None,
            seed: None,
            logit_bias: None,
            user: None,
            safety_identifier: None,
            metadata: None,
            store: None,
            service_tier: None,
        }
    }

    /// Fields that change nothing here: they are checked, and forgotten.
    fn check_what_has_no_effect(&self) -> Result<(), ApiError> {
        for (name, value) in [
            ("user", &self.user),
            ("safety_identifier", &self.safety_identifier),
        ] {
            if value
                .as_ref()
                .is_some_and(|text| text.len() > MAX_USER_BYTES)
            {
                let most = format!("at most {MAX_USER_BYTES} bytes");
                return Err(ApiError::value(name, most));
            }
        }
        if let Some(metadata) = &self.metadata {
            let fits = |(key, value): (&String, &Value)| {
                key.len() <= 64 && value.as_str().is_some_and(|text| text.len() <= 512)
            };
            if metadata.len() > 16 || !metadata.iter().all(fits) {
                return Err(ApiError::value(
                    "metadata",
                    "at most 16 texts of 512 bytes under names of 64 bytes",
                ));
            }
        }
        if self.store == Some(true) {
            return Err(ApiError::unsupported(
                "store",
                "must be false: nothing about a request is stored",
            ));
        }
        match self.service_tier.as_deref() {
            None | Some("auto" | "default") => Ok(()),
            Some(_) => Err(ApiError::unsupported(
                "service_tier",
                "is auto or default: there is only one",
            )),
        }
    }

    /// How the caller wants the answer delivered.
    pub(super) fn streaming(&self) -> Result<Option<bool>, ApiError> {
        match (self.stream.unwrap_or(false), &self.stream_options) {
            (false, Some(_)) => Err(ApiError::value(
                "stream_options",
                "only allowed together with 'stream': true",
            )),
            (false, None) => Ok(None),
            (true, options) => Ok(Some(
                options
                    .as_ref()
                    .and_then(|o| o.include_usage)
                    .unwrap_or(false),
            )),
        }
    }

    /// Number of independent answers wanted.
    pub(super) fn choices(&self) -> Result<u32, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_CHOICES => Ok(n),
            _ => Err(ApiError::value(
                "n",
                format!("must lie between 1 and {MAX_CHOICES}"),
            )),
        }
    }

    /// Stop strings, at most four, none empty.
    pub(super) fn stops(&mut self) -> Result<Vec<String>, ApiError> {
        let stops = match self.stop.take() {
            None => return Ok(Vec::new()),
            Some(Stop::One(one)) => vec![one],
            Some(Stop::Many(many)) => many,
        };
        if stops.len() > MAX_STOPS {
            return Err(ApiError::value(
                "stop",
                format!("at most {MAX_STOPS} strings"),
            ));
        }
        if stops
            .iter()
            .any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
        {
            return Err(ApiError::value(
                "stop",
                format!("1 to {MAX_STOP_BYTES} bytes each"),
            ));
        }
        Ok(stops)
    }

    /// Sampling parameters in range. Absent ones have OpenAI's defaults: temperature 1, top_p 1.
    pub(super) fn sampling(
        &self,
        policy: Extraction,
        beside_logprobs: bool,
        vocab: u32,
    ) -> Result<Sampling, ApiError> {
        let float = |name, value: Option<f32>, default, low: f32, high: f32| match value {
            None => Ok(default),
            Some(v) if v.is_finite() && v >= low && v <= high => Ok(v),
            Some(_) => Err(ApiError::value(
                name,
                format!("must lie between {low} and {high}"),
            )),
        };
        let repetition = float(
            "repetition_penalty",
            self.repetition_penalty,
            1.0,
            0.01,
            10.0,
        )?;
        Ok(Sampling {
            temperature: float("temperature", self.temperature, 1.0, 0.0, 2.0)?,
            top_k: self.top_k.unwrap_or(0),
            top_p: float("top_p", self.top_p, 1.0, 0.0, 1.0)?,
            min_p: float("min_p", self.min_p, 0.0, 0.0, 1.0)?,
            presence_penalty: float("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: float("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            repetition_penalty: repetition,
            bias: match &self.logit_bias {
                None => Vec::new(),
                Some(map) => policy.biases(map, beside_logprobs, vocab)?,
            },
            seed: self.seed.map_or_else(random_seed, i64::cast_unsigned),
        })
    }
}
