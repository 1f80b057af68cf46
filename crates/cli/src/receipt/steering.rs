//! What steered an answer beside its prompt, in words for people and for machines.

use casemate_channel::receipt::{AnswerFormat, ForcedCall, Steering};
use serde_json::{Map, Value, json};

/// What was in force that can dictate or cut an answer, each in a few words. Functions that might be called are not: they
/// are shown to the model as a part of its prompt.
pub(super) fn means(steering: &Steering) -> Vec<String> {
    let mut means = Vec::new();
    if let Some(bias) = &steering.bias {
        means.push(format!(
            "logit_bias on {}, the strongest of {} (100 bans a token or forces it)",
            counted(bias.tokens.get(), "token"),
            bias.strongest
        ));
    }
    match steering.format {
        None => {}
        Some(AnswerFormat::JsonObject) => {
            means.push("a response_format, json_object: any JSON object".to_owned());
        }
        Some(AnswerFormat::JsonSchema) => means.push(
            "a response_format, json_schema: what a schema in the request allows, which may be a single text"
                .to_owned(),
        ),
    }
    if let Some(functions) = &steering.functions {
        let call = match functions.forced {
            None => None,
            Some(ForcedCall::Any) => {
                Some("tool_choice: a forced call of any function offered, with any arguments")
            }
            Some(ForcedCall::One) => {
                Some("tool_choice: a forced call of one function, with any arguments")
            }
            Some(ForcedCall::OneBySchema) => Some(
                "tool_choice: a forced call of one function, with arguments that a schema in the request allows, \
                 which may be single values",
            ),
            Some(ForcedCall::AnyBySchema) => Some(
                "tool_choice: a forced call of any function offered, with arguments that schemas in the request \
                 allow, which may be single values",
            ),
            Some(ForcedCall::IfAnyBySchema) => Some(
                "tools, strict: if the model called, arguments that schemas in the request allow, which may be \
                 single values",
            ),
        };
        means.extend(call.map(str::to_owned));
        if functions.first_call_only {
            means
                .push("parallel_tool_calls, false: calls after the first were left out".to_owned());
        }
    }
    if let Some(stops) = steering.stop_strings {
        let stops = counted(stops.get(), "stop string");
        means.push(format!("{stops}, at which an answer ends"));
    }
    means
}

fn counted(count: u32, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// The same for machines, under the names of the request's fields; null where a field had no effect.
pub(super) fn claims(steering: &Steering) -> Map<String, Value> {
    let format = steering.format.map(|format| match format {
        AnswerFormat::JsonObject => "json_object",
        AnswerFormat::JsonSchema => "json_schema",
    });
    let functions = steering.functions.map(|functions| {
        let forced = functions.forced.map(|call| match call {
            ForcedCall::Any => "any",
            ForcedCall::One => "one",
            ForcedCall::OneBySchema => "one_by_schema",
            ForcedCall::AnyBySchema => "any_by_schema",
            ForcedCall::IfAnyBySchema => "if_any_by_schema",
        });
        json!({
            "offered": functions.offered,
            "forced": forced,
            "first_call_only": functions.first_call_only,
        })
    });
    let bias = steering
        .bias
        .map(|bias| json!({"tokens": bias.tokens, "strongest": bias.strongest}));
    Map::from_iter([
        ("logit_bias".to_owned(), json!(bias)),
        ("response_format".to_owned(), json!(format)),
        ("tools".to_owned(), json!(functions)),
        ("stop_strings".to_owned(), json!(steering.stop_strings)),
    ])
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use casemate_channel::receipt::{Bias, Functions};

    use super::*;

    fn functions(forced: Option<ForcedCall>, first_call_only: bool) -> Steering {
        let offered = NonZeroU32::new(2).unwrap();
        Steering {
            functions: Some(Functions {
                offered,
                forced,
                first_call_only,
            }),
            ..Steering::default()
        }
    }

    #[test]
    fn each_means_is_named_alone_and_all_together() {
        assert!(means(&Steering::default()).is_empty());
        let bias = Steering {
            bias: Bias::of([-2.5].into_iter()),
            ..Steering::default()
        };
        let format = |format| Steering {
            format: Some(format),
            ..Steering::default()
        };
        let stop = Steering {
            stop_strings: NonZeroU32::new(2),
            ..Steering::default()
        };
        for (steering, named) in [
            (&bias, "logit_bias on 1 token, the strongest of 2.5"),
            (&format(AnswerFormat::JsonObject), "json_object"),
            (&format(AnswerFormat::JsonSchema), "json_schema"),
            (&functions(Some(ForcedCall::Any), false), "any function"),
            (
                &functions(Some(ForcedCall::One), false),
                "one function, with any",
            ),
            (&functions(Some(ForcedCall::OneBySchema), false), "a schema"),
            (
                &functions(Some(ForcedCall::AnyBySchema), false),
                "any function offered, with arguments that schemas",
            ),
            (
                &functions(Some(ForcedCall::IfAnyBySchema), false),
                "if the model called",
            ),
            (&functions(None, true), "parallel_tool_calls"),
            (&stop, "2 stop strings"),
        ] {
            let told = means(steering);
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].contains(named), "{told:?}");
        }
        // Offered functions are the model's to call, or not.
        assert!(means(&functions(None, false)).is_empty());
        let all = Steering {
            bias: bias.bias,
            stop_strings: stop.stop_strings,
            ..functions(Some(ForcedCall::Any), true)
        };
        assert_eq!(means(&all).len(), 4);
    }

    #[test]
    fn claims_have_the_names_of_the_requests_fields() {
        let nothing = json!({"logit_bias": null, "response_format": null, "tools": null, "stop_strings": null});
        assert_eq!(Value::Object(claims(&Steering::default())), nothing);
        let all = Steering {
            bias: Bias::of([1.0, -100.0].into_iter()),
            format: Some(AnswerFormat::JsonSchema),
            stop_strings: NonZeroU32::new(3),
            ..functions(Some(ForcedCall::OneBySchema), true)
        };
        let expected = json!({
            "logit_bias": {"tokens": 2, "strongest": 100.0},
            "response_format": "json_schema",
            "tools": {"offered": 2, "forced": "one_by_schema", "first_call_only": true},
            "stop_strings": 3,
        });
        assert_eq!(Value::Object(claims(&all)), expected);
    }
}
