//! `response_format`: plain text, any JSON object, or a JSON Schema. What answers must be, for functions too.

use std::sync::LazyLock;

use casemate_channel::receipt::{AnswerFormat, ForcedCall};
use casemate_engine::Grammar;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ApiError;

/// Largest schema, in bytes of JSON.
pub(super) const MAX_SCHEMA_BYTES: usize = 64 << 10;

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Format {
    Text {},
    JsonObject {},
    JsonSchema { json_schema: Schema },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Schema {
    name: String,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    schema: Map<String, Value>,
    /// Either way the schema is enforced whole: what cannot be is refused.
    #[serde(default, rename = "strict")]
    _strict: Option<bool>,
}

/// That of `json_object`, which all requests share.
static ANY_OBJECT: LazyLock<Grammar> = LazyLock::new(Grammar::json_object);

/// What answers must be, together with what a receipt says of it, so that none is in force untold.
#[derive(Clone)]
pub(super) struct Constraint {
    pub(super) grammar: Grammar,
    pub(super) told: Told,
}

impl Constraint {
    /// The memory that its grammar takes because this request is there: nothing, where it is there in any case.
    pub(super) fn bytes_held(&self) -> usize {
        match self.told {
            Told::Format(AnswerFormat::JsonObject) => 0,
            Told::Format(_) | Told::Call(_) => self.grammar.bytes(),
        }
    }
}

/// What a receipt says of a grammar.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Told {
    Format(AnswerFormat),
    Call(ForcedCall),
}

/// What answers must be; `None` leaves them free.
pub(super) fn parse(value: Value) -> Result<Option<Constraint>, ApiError> {
    let format: Format = serde_json::from_value(value).map_err(|_| {
        ApiError::value(
            "response_format",
            "its 'type' is text, json_object or json_schema; json_schema needs a 'json_schema' with \
             'name' and 'schema'",
        )
    })?;
    match format {
        Format::Text {} => Ok(None),
        Format::JsonObject {} => Ok(Some(Constraint {
            grammar: ANY_OBJECT.clone(),
            told: Told::Format(AnswerFormat::JsonObject),
        })),
        Format::JsonSchema { json_schema } => {
            if !super::tools::is_name(&json_schema.name) {
                return Err(ApiError::value(
                    "response_format",
                    "the schema's name has 1 to 64 letters, digits, '_' and '-'",
                ));
            }
            let grammar = compile("response_format", json_schema.schema)?;
            Ok(Some(Constraint {
                grammar,
                told: Told::Format(AnswerFormat::JsonSchema),
            }))
        }
    }
}

/// A client's schema as a grammar.
fn compile(param: &str, schema: Map<String, Value>) -> Result<Grammar, ApiError> {
    let schema = Value::Object(schema);
    if schema.to_string().len() > MAX_SCHEMA_BYTES {
        let most = format!("a schema has at most {MAX_SCHEMA_BYTES} bytes");
        return Err(ApiError::value(param, most));
    }
    Grammar::from_schema(&schema).map_err(|error| ApiError::value(param, error))
}
