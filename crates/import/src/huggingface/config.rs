//! `config.json` as a [`ModelConfig`].
//!
//! Absent keys get the defaults of transformers where it has a safe one; settings that would change the arithmetic in
//! a way the engine does not have are refused by name, never ignored.

use casemate_container::{Family, ModelConfig, RopeLayout, RopeScaling};
use serde_json::{Map, Value};

use super::directory::json_fault;
use crate::error::{Fault, Missing, Problem, Unsupported};

/// Reads `config.json`.
pub(super) fn read(json: &[u8]) -> Result<ModelConfig, Problem> {
    let settings = Settings::parse("config.json", json)?;
    let family = settings.family()?;
    settings.refuse_other_shapes(family)?;

    let hidden = settings.require_u32("hidden_size")?;
    let layers = settings.require_u32("num_hidden_layers")?;
    let heads = settings.require_u32("num_attention_heads")?;
    let kv_heads = match settings.u32("num_key_value_heads")? {
        Some(count) => count,
        // Llama 1 and 2 were published before grouped queries.
        None if family == Family::Llama => heads,
        None => settings.require_u32("num_key_value_heads")?,
    };
    let head_dim = match settings.u32("head_dim")? {
        Some(dimension) => dimension,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    let rope = settings.rope()?;
    Ok(ModelConfig {
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn: settings.require_u32("intermediate_size")?,
        vocab: settings.require_u32("vocab_size")?,
        context: settings.require_u32("max_position_embeddings")?,
        norm_eps: settings.f32("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        rope_layout: RopeLayout::Half,
        sliding_window: settings.sliding_window(family, layers)?,
        tied_embeddings: settings.bool("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: family == Family::Qwen2,
        bos: settings.ids("bos_token_id")?.first().copied(),
        eos: settings.ids("eos_token_id")?,
        // The tokenizer is the authority: see `crate::tokenizer::check`.
        add_bos: false,
    })
}

/// Adds the end-of-text tokens that `generation_config.json` names.
pub(super) fn add_end_ids(mut config: ModelConfig, json: &[u8]) -> Result<ModelConfig, Problem> {
    let settings = Settings::parse("generation_config.json", json)?;
    for id in settings.ids("eos_token_id")? {
        if !config.eos.contains(&id) {
            config.eos.push(id);
        }
    }
    Ok(config)
}

/// The most end-of-text tokens.
const MAX_IDS: usize = 64;

struct Settings {
    values: Map<String, Value>,
}

struct Rope {
    theta: f32,
    scaling: RopeScaling,
}

impl Settings {
    fn parse(what: &'static str, json: &[u8]) -> Result<Self, Problem> {
        serde_json::from_slice(json)
            .map(|values| Self { values })
            .map_err(|e| json_fault(what, &e))
    }

    /// The value of `key`; null counts as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn u32(&self, key: &str) -> Result<Option<u32>, Problem> {
        self.get(key).map(|value| as_u32(key, value)).transpose()
    }

    fn require_u32(&self, key: &str) -> Result<u32, Problem> {
        self.u32(key)?.ok_or_else(|| missing(key))
    }

    fn f32(&self, key: &str) -> Result<Option<f32>, Problem> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number as f32)),
                None => Err(wrong_type(key, "a number")),
            },
        }
    }

    fn require_f32(&self, key: &str) -> Result<f32, Problem> {
        self.f32(key)?.ok_or_else(|| missing(key))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, Problem> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(wrong_type(key, "a Boolean")),
        }
    }

    fn str(&self, key: &str) -> Result<Option<&str>, Problem> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(wrong_type(key, "a string")),
        }
    }

    fn array(&self, key: &str) -> Result<Option<&[Value]>, Problem> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(_) => Err(wrong_type(key, "an array")),
        }
    }

    /// Token ids: one, several or none.
    fn ids(&self, key: &str) -> Result<Vec<u32>, Problem> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) if values.len() > MAX_IDS => Err(Fault::TooMany {
                what: "token ids",
                count: values.len() as u64,
                limit: MAX_IDS as u64,
            }
            .into()),
            Some(Value::Array(values)) => values.iter().map(|value| as_u32(key, value)).collect(),
            Some(value) => as_u32(key, value).map(|id| vec![id]),
        }
    }

    fn family(&self) -> Result<Family, Problem> {
        const KEY: &str = "architectures";
        let names = self.array(KEY)?.ok_or_else(|| missing(KEY))?;
        let [name] = names else {
            return Err(unsupported(KEY, Value::from(names.to_vec())));
        };
        match name.as_str() {
            Some("LlamaForCausalLM") => Ok(Family::Llama),
            Some("MistralForCausalLM") => Ok(Family::Mistral),
            Some("Qwen2ForCausalLM") => Ok(Family::Qwen2),
            Some(other) => Err(Unsupported::Architecture {
                name: other.to_owned(),
            }
            .into()),
            None => Err(wrong_type(KEY, "an array of strings")),
        }
    }

    /// Settings under which a model of a supported name computes something else.
    fn refuse_other_shapes(&self, family: Family) -> Result<(), Problem> {
        if let Some(name) = self.str("hidden_act")?.filter(|name| *name != "silu") {
            return Err(unsupported("hidden_act", name));
        }
        for key in ["mlp_bias", "rope_interleaved"] {
            if self.bool(key)? == Some(true) {
                return Err(unsupported(key, true));
            }
        }
        // Qwen 2 has biases without saying so, and none on the output projection.
        if family != Family::Qwen2 && self.bool("attention_bias")? == Some(true) {
            return Err(unsupported("attention_bias", true));
        }
        if let Some(factor) = self
            .f32("partial_rotary_factor")?
            .filter(|factor| *factor != 1.0)
        {
            return Err(unsupported("partial_rotary_factor", factor));
        }
        if let Some(value) = self.get("quantization_config") {
            let method = value.get("quant_method").unwrap_or(value);
            return Err(unsupported("quantization_config", method.clone()));
        }
        Ok(())
    }

    /// The window that all layers share. A model whose layers differ is refused.
    fn sliding_window(&self, family: Family, layers: u32) -> Result<Option<u32>, Problem> {
        let window = self.u32("sliding_window")?;
        let window = match family {
            // transformers does not look at the key.
            Family::Llama => None,
            // Its default when the key is absent, as opposed to null.
            Family::Mistral if !self.values.contains_key("sliding_window") => Some(4096),
            Family::Mistral => window,
            Family::Qwen2 if self.bool("use_sliding_window")? == Some(true) => {
                let first = self.u32("max_window_layers")?.unwrap_or(28);
                match first {
                    0 => Some(window.unwrap_or(4096)),
                    first if first >= layers => None,
                    first => return Err(unsupported("max_window_layers", first)),
                }
            }
            Family::Qwen2 => None,
        };
        let Some(types) = self.array("layer_types")? else {
            return Ok(window);
        };
        let implied = match window {
            None => "full_attention",
            Some(_) => "sliding_attention",
        };
        match types.iter().find(|kind| kind.as_str() != Some(implied)) {
            None => Ok(window),
            Some(kind) => Err(unsupported("layer_types", kind.clone())),
        }
    }

    /// Rotary settings: loose keys up to transformers 4, `rope_parameters` since 5.
    fn rope(&self) -> Result<Rope, Problem> {
        let nested = |key: &str| match self.get(key) {
            None => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Self {
                values: values.clone(),
            })),
            Some(_) => Err(wrong_type(key, "an object")),
        };
        let parameters = match nested("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => nested("rope_scaling")?,
        };
        let own_theta = self.f32("rope_theta")?;
        let Some(parameters) = parameters else {
            return Ok(Rope {
                theta: own_theta.unwrap_or(10_000.0),
                scaling: RopeScaling::None,
            });
        };
        let theta = parameters.f32("rope_theta")?.or(own_theta);
        let kind = match parameters.str("rope_type")? {
            Some(kind) => kind,
            None => parameters.str("type")?.unwrap_or("default"),
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: parameters.require_f32("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: parameters.require_f32("factor")?,
                low_freq_factor: parameters.require_f32("low_freq_factor")?,
                high_freq_factor: parameters.require_f32("high_freq_factor")?,
                original_context: parameters.require_u32("original_max_position_embeddings")?,
            },
            other => return Err(unsupported("rope_type", other)),
        };
        Ok(Rope {
            theta: theta.unwrap_or(10_000.0),
            scaling,
        })
    }
}

fn as_u32(key: &str, value: &Value) -> Result<u32, Problem> {
    match value.as_u64().map(u32::try_from) {
        Some(Ok(number)) => Ok(number),
        _ if value.is_number() => Err(Fault::OutOfRange {
            key: key.to_owned(),
            value: value.to_string(),
        }
        .into()),
        _ => Err(wrong_type(key, "an integer")),
    }
}

fn wrong_type(key: &str, expected: &'static str) -> Problem {
    Fault::WrongType {
        key: key.to_owned(),
        expected,
    }
    .into()
}

fn missing(key: &str) -> Problem {
    Missing::Key {
        key: key.to_owned(),
    }
    .into()
}

fn unsupported(key: &str, value: impl Into<Value>) -> Problem {
    Unsupported::Setting {
        key: key.to_owned(),
        value: value.into().to_string(),
    }
    .into()
}
