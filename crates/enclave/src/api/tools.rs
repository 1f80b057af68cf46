//! `tools` and `tool_choice`: which functions a model may or must call. What it writes is read by
//! [`super::calls`].

use std::sync::Arc;

use casemate_channel::receipt::ForcedCall;
use casemate_engine::{CallFormat, CallGrammar, ChatTemplate, Grammar, Offered};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::format::{Constraint, MAX_SCHEMA_BYTES, Told};

/// Most functions of one request, and their definitions in bytes of JSON.
const MAX_TOOLS: usize = 128;
const MAX_TOOL_BYTES: usize = 256 << 10;
/// Most that an allocation takes beyond what was asked for.
const ALLOCATION: usize = 24;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tool {
    #[serde(rename = "type")]
    kind: FunctionWord,
    function: Function,
}

/// The word `function`.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FunctionWord {
    Function,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    #[serde(default, rename = "description")]
    _description: Option<String>,
    #[serde(default)]
    parameters: Option<Value>,
    #[serde(default)]
    strict: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Choice {
    Word(Word),
    Named(Named),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    None,
    Auto,
    Required,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(rename = "type")]
    _kind: FunctionWord,
    function: Name,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

/// What a request says about functions.
#[derive(Default)]
pub(super) struct Tools {
    /// As the template sees them; none where none may be called.
    pub(super) shown: Vec<Value>,
    /// How answers are read; `None` where none may be called.
    pub(super) reading: Option<Reading>,
    /// What answers must be, where a call is forced or any function is strict.
    pub(super) constraint: Option<Constraint>,
    /// What a forced call begins with.
    pub(super) begin: &'static str,
}

/// How calls are found in what a model writes.
#[derive(Clone)]
pub(super) struct Reading {
    pub(super) format: CallFormat,
    /// Names that count.
    pub(super) names: Arc<[String]>,
    /// At most one call.
    pub(super) single: bool,
    /// The whole answer is one call.
    pub(super) forced: bool,
    /// What calls must be: nothing else is one. It also bound the model.
    pub(super) grammar: Option<CallGrammar>,
}

impl Reading {
    /// What its names take, which clones share.
    pub(super) fn bytes_of_names(&self) -> usize {
        let each = |name: &String| size_of::<String>() + name.capacity() + ALLOCATION;
        self.names.iter().map(each).sum()
    }
}

/// 1 to 64 letters, digits, `_` and `-`.
pub(super) fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

impl Tools {
    /// Reads the three fields. `template` is the model's.
    pub(super) fn parse(
        tools: Option<Vec<Value>>,
        choice: Option<Value>,
        parallel: Option<bool>,
        template: Option<&ChatTemplate>,
    ) -> Result<Self, ApiError> {
        let shown = tools.unwrap_or_default();
        let choice = match choice {
            None => Choice::Word(Word::Auto),
            Some(choice) => serde_json::from_value(choice).map_err(|_| {
                let rule = "is none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": …}}";
                ApiError::value("tool_choice", rule)
            })?,
        };
        if shown.is_empty() {
            return match choice {
                Choice::Word(Word::None | Word::Auto) => Ok(Self::default()),
                _ => Err(ApiError::value(
                    "tool_choice",
                    "needs 'tools' to choose from",
                )),
            };
        }
        let Some(format) = template.and_then(ChatTemplate::call_format) else {
            return Err(ApiError::unsupported(
                "tools",
                "is not supported: the served model's chat template shows no functions to the model, \
                 or shows calls in a form that this service cannot read",
            ));
        };
        let functions = parse_functions(&shown)?;
        let find = |name: &str| functions.iter().find(|function| function.name == name);
        if matches!(choice, Choice::Word(Word::None)) {
            return Ok(Self::default());
        }
        let only = match (&choice, functions.as_slice()) {
            (Choice::Named(named), _) => {
                let unknown = || ApiError::value("tool_choice", "names none of 'tools'");
                Some(find(&named.function.name).ok_or_else(unknown)?)
            }
            (Choice::Word(Word::Required), [one]) => Some(one),
            _ => None,
        };
        let forced = !matches!(choice, Choice::Word(Word::Auto));
        let callable = only.map_or(functions.as_slice(), std::slice::from_ref);
        let strict = callable.iter().any(|f| f.strict == Some(true));
        let calls = (forced || strict).then(|| grammar(format, callable, &functions));
        let calls = calls.transpose()?;
        let told = Told::Call(match (forced, only.is_some(), strict) {
            (true, true, true) => ForcedCall::OneBySchema,
            (true, true, false) => ForcedCall::One,
            (true, false, true) => ForcedCall::AnyBySchema,
            (true, false, false) => ForcedCall::Any,
            (false, ..) => ForcedCall::IfAnyBySchema,
        });
        Ok(Self {
            constraint: calls.clone().map(|calls| Constraint {
                grammar: match forced {
                    true => Grammar::call(calls),
                    false => Grammar::text_with_calls(calls),
                },
                told,
            }),
            begin: match format {
                CallFormat::Tagged if forced => "<tool_call>\n",
                _ => "",
            },
            reading: Some(Reading {
                format,
                names: functions.into_iter().map(|f| f.name).collect(),
                single: parallel == Some(false),
                forced,
                grammar: calls,
            }),
            shown,
        })
    }
}

fn parse_functions(tools: &[Value]) -> Result<Vec<Function>, ApiError> {
    if tools.len() > MAX_TOOLS {
        return Err(ApiError::value("tools", format!("at most {MAX_TOOLS}")));
    }
    if tools
        .iter()
        .map(|tool| tool.to_string().len())
        .sum::<usize>()
        > MAX_TOOL_BYTES
    {
        let most = format!("at most {MAX_TOOL_BYTES} bytes in all");
        return Err(ApiError::value("tools", most));
    }
    let mut functions: Vec<Function> = Vec::with_capacity(tools.len());
    for (index, tool) in tools.iter().enumerate() {
        let place = format!("tools[{index}]");
        let Ok(Tool {
            kind: FunctionWord::Function,
            function,
        }) = Tool::deserialize(tool)
        else {
            return Err(ApiError::value(
                &place,
                "needs \"type\": \"function\" and a 'function' with 'name', and perhaps 'description', \
                 'parameters' and 'strict'",
            ));
        };
        if function.parameters.as_ref().is_some_and(|p| !p.is_object()) {
            return Err(ApiError::value(
                &place,
                "'parameters' is a JSON Schema: an object",
            ));
        }
        if !is_name(&function.name) {
            let rule = "a function's name has 1 to 64 letters, digits, '_' and '-'";
            return Err(ApiError::value(&place, rule));
        }
        if functions.iter().any(|other| other.name == function.name) {
            return Err(ApiError::value(&place, "two functions have the same name"));
        }
        functions.push(function);
    }
    Ok(functions)
}

/// What calls must be. Arguments of strict functions follow their schemas, others are any object. `all` are the
/// functions of the request, whose places errors name.
fn grammar(
    format: CallFormat,
    callable: &[Function],
    all: &[Function],
) -> Result<CallGrammar, ApiError> {
    let nothing = json!({"type": "object", "additionalProperties": false});
    let place = |function: &Function, member: &str| {
        let index = all.iter().position(|other| other.name == function.name);
        format!("tools[{}].function.{member}", index.unwrap_or_default())
    };
    let mut offered = Vec::with_capacity(callable.len());
    for function in callable {
        let strict = function.strict == Some(true);
        let schema = function.parameters.as_ref().unwrap_or(&nothing);
        if strict && schema.to_string().len() > MAX_SCHEMA_BYTES {
            let most = format!("a schema has at most {MAX_SCHEMA_BYTES} bytes");
            return Err(ApiError::value(&place(function, "parameters"), most));
        }
        offered.push(Offered {
            name: &function.name,
            arguments: strict.then_some(schema),
        });
    }
    CallGrammar::new(format, &offered)
        .map_err(|error| ApiError::value(&place(&callable[error.index], "parameters"), error))
}
