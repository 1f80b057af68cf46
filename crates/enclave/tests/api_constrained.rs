//! Answers that must be JSON, and calls of functions, over a model that writes noise.

mod support;

use axum::Router;
use axum::http::StatusCode;
use casemate_enclave::api::{Extraction, Logprobs, router};
use casemate_testkit::models::TOOLS_TEMPLATE;
use serde_json::{Value, json};
use support::{api, api_that_calls, api_with, chat, events, perturbation_key, post};

const CHAT: &str = "/v1/chat/completions";

fn with_tools() -> Router {
    let policy = Extraction {
        logprobs: Logprobs::None,
        logit_bias: true,
    };
    router(api_with(Some(TOOLS_TEMPLATE), 512).with_extraction(policy, perturbation_key([1; 32])))
}

async fn answered(router: &Router, extra: &Value) -> Value {
    let (status, answer) = post(router, CHAT, &chat(extra)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

async fn refused(router: &Router, extra: &Value) -> (String, String) {
    let (status, answer) = post(router, CHAT, &chat(extra)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    let text = |name: &str| answer["error"][name].as_str().unwrap().to_owned();
    (text("param"), text("message"))
}

#[tokio::test]
async fn every_json_answer_that_ends_is_an_object() {
    let router = router(api());
    let (mut ended, mut cut) = (0, 0);
    for seed in 0..12 {
        let extra = json!({"response_format": {"type": "json_object"}, "temperature": 1, "n": 4, "seed": seed, "max_tokens": 60});
        let answer = answered(&router, &extra).await;
        for choice in answer["choices"].as_array().unwrap() {
            let text = choice["message"]["content"].as_str().unwrap();
            let parsed = serde_json::from_str::<Value>(text);
            if choice["finish_reason"] == "stop" {
                assert!(parsed.unwrap().is_object(), "{text}");
                ended += 1;
            } else {
                assert_eq!(choice["finish_reason"], "length");
                assert!(
                    parsed.is_err() && text.trim_start().starts_with('{'),
                    "{text}"
                );
                cut += 1;
            }
        }
    }
    assert!(ended > 3 && cut > 3, "{ended} ended, {cut} were cut");
}

#[tokio::test]
async fn a_streamed_json_answer_is_the_whole_one() {
    let router = router(api());
    let extra = json!({"response_format": {"type": "json_object"}, "temperature": 1, "seed": 5, "max_tokens": 100});
    let whole = answered(&router, &extra).await;
    let mut body = chat(&extra);
    body["stream"] = json!(true);
    let streamed: String = events(&router, CHAT, &body)
        .await
        .iter()
        .filter_map(|event| {
            event["choices"][0]["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(
        streamed,
        whole["choices"][0]["message"]["content"].as_str().unwrap()
    );
}

#[tokio::test]
async fn answers_follow_a_schema() {
    let router = router(api());
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["ok", "label"],
        "properties": {"ok": {"type": "boolean"}, "label": {"enum": ["red", "green", null]}, "n": {"type": "integer"}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "colour", "strict": true, "schema": schema}});
    let mut ended = 0;
    for seed in 0..6 {
        let extra = json!({"response_format": format, "temperature": 1, "n": 4, "seed": seed, "max_tokens": 200});
        let answer = answered(&router, &extra).await;
        for choice in answer["choices"].as_array().unwrap() {
            if choice["finish_reason"] == "stop" {
                let value: Value =
                    serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
                let members = value.as_object().unwrap();
                let labels = [json!("red"), json!("green"), Value::Null];
                assert!(
                    members["ok"].is_boolean() && labels.contains(&members["label"]),
                    "{value}"
                );
                let optional = members
                    .get("n")
                    .is_none_or(|n| n.is_i64() || n.is_u64() || n.is_f64());
                let known = ["ok", "label", "n"];
                assert!(
                    optional && members.keys().all(|name| known.contains(&name.as_str())),
                    "{value}"
                );
                ended += 1;
            }
        }
    }
    assert!(ended > 6, "{ended}");
    let bad = json!({"type": "object", "additionalProperties": false, "properties": {"a": {"type": "string", "pattern": "x"}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": bad}});
    let (param, message) = refused(&router, &json!({"response_format": format})).await;
    assert_eq!(param, "response_format");
    assert!(
        message.contains("'pattern'") && message.contains("schema.properties.a"),
        "{message}"
    );
    // What would become far more than it is: a long name that many places refer to, and many values.
    let mut inner = json!({"$ref": "#/$defs/o"});
    for _ in 0..24 {
        inner = json!({"anyOf": [inner]});
    }
    let object = |properties: Value| json!({"type": "object", "additionalProperties": false, "properties": properties});
    let places = (0..37).map(|n| (format!("p{n}"), json!({"$ref": "#/$defs/w"})));
    let mut bad = object(places.collect());
    bad["$defs"] = json!({"o": object(json!({"k".repeat(60_000): {"type": "null"}})), "w": inner});
    let values: Vec<u32> = (0..1024).collect();
    let places = (0..37).map(|n| (format!("p{n}"), json!({"$ref": "#/$defs/v"})));
    let mut many = object(places.collect());
    many["$defs"] = json!({"v": {"enum": values}});
    for (bad, reason) in [
        (bad, "has a name of more than 256 bytes"),
        (
            many,
            "more than 262144 bytes of names, listed values and schemas",
        ),
    ] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": bad}});
        let (param, message) = refused(&router, &json!({"response_format": format})).await;
        assert_eq!(param, "response_format");
        assert!(message.contains(reason), "{message}");
    }
    let stopped = json!({"response_format": {"type": "json_object"}, "stop": "x"});
    assert_eq!(refused(&router, &stopped).await.0, "stop");
}

fn tool(name: &str, strict: bool) -> Value {
    let parameters = json!({
        "type": "object", "additionalProperties": false, "required": ["rainy"],
        "properties": {"rainy": {"type": "boolean"}},
    });
    json!({"type": "function", "function": {"name": name, "description": "x", "strict": strict, "parameters": parameters}})
}

#[tokio::test]
async fn a_forced_call_is_made_whole_and_streamed() {
    let router = with_tools();
    let named = json!({"type": "function", "function": {"name": "sun"}});
    // A model of noise would fill its answer with white space.
    let no_blanks = json!({"9": -100, "10": -100, "13": -100, "32": -100});
    let mut made = 0;
    for (tools, choice) in [
        (json!([tool("rain", false), tool("sun", true)]), named),
        (json!([tool("sun", true)]), json!("required")),
    ] {
        for seed in 0..4 {
            let extra = json!({"tools": tools, "tool_choice": choice, "temperature": 1, "seed": seed, "max_tokens": 150, "logit_bias": no_blanks});
            let answer = answered(&router, &extra).await;
            let whole = &answer["choices"][0];
            if whole["finish_reason"] == "length" {
                continue;
            }
            made += 1;
            assert_eq!(whole["finish_reason"], "tool_calls", "{answer}");
            assert_eq!(whole["message"]["content"], Value::Null);
            let call = &whole["message"]["tool_calls"][0];
            assert_eq!(
                (&call["type"], &call["function"]["name"]),
                (&json!("function"), &json!("sun"))
            );
            assert!(call["id"].as_str().unwrap().starts_with("call_"));
            let arguments: Value =
                serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            assert!(
                arguments["rainy"].is_boolean() && arguments.as_object().unwrap().len() == 1,
                "{arguments}"
            );

            let mut body = chat(&extra);
            body["stream"] = json!(true);
            let events = events(&router, CHAT, &body).await;
            let deltas: Vec<&Value> = events
                .iter()
                .filter(|e| !e["choices"][0]["delta"]["tool_calls"].is_null())
                .collect();
            assert_eq!(deltas.len(), 1);
            let streamed = &deltas[0]["choices"][0]["delta"]["tool_calls"][0];
            assert_eq!(
                (&streamed["index"], &streamed["function"]),
                (&json!(0), &call["function"])
            );
            assert_eq!(
                events.last().unwrap()["choices"][0]["finish_reason"],
                "tool_calls"
            );
        }
    }
    assert!(made > 2, "{made}");
}

/// What a strict call of [`tool`] or of the other says, judged by hand.
fn check_call(call: &Value) {
    let arguments = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(arguments).unwrap();
    let members = arguments.as_object().unwrap();
    match call["function"]["name"].as_str().unwrap() {
        "sun" => {
            assert!(
                members.len() == 1 && members["rainy"].is_boolean(),
                "{call}"
            );
        }
        "level" => {
            let one_of = [json!(1), json!(12), Value::Null];
            assert!(
                members.len() == 1 && one_of.contains(&members["at"]),
                "{call}"
            );
        }
        other => panic!("{other} was not offered"),
    }
}

#[tokio::test]
async fn calls_of_strict_functions_are_valid_where_the_model_is_free_to_call() {
    let (api, [begin, end]) = api_that_calls(1024);
    let policy = Extraction {
        logprobs: Logprobs::Rounded {
            top: 1,
            rounding: 0.1,
            perturbation: None,
        },
        logit_bias: true,
    };
    let router = router(api.with_extraction(policy, perturbation_key([1; 32])));
    let level = json!({"type": "function", "function": {"name": "level", "strict": true, "parameters": {
        "type": "object", "additionalProperties": false, "required": ["at"],
        "properties": {"at": {"anyOf": [{"$ref": "#/$defs/Level"}, {"type": "null"}]}},
        "$defs": {"Level": {"type": "integer", "enum": [1, 12]}},
    }}});
    let tools = json!([tool("sun", true), level]);
    // A model of noise would rather say something else.
    let mut bias = json!({"9": -100, "10": -100, "13": -100, "32": -100});
    bias[begin.to_string()] = json!(9);
    bias[end.to_string()] = json!(9);
    let (mut called, mut several, mut silent, mut cut) = (0, 0, 0, 0);
    for seed in 0..12 {
        let extra = json!({"tools": tools, "temperature": 1, "n": 4, "seed": seed, "max_tokens": 120, "logit_bias": bias});
        let answer = answered(&router, &extra).await;
        for choice in answer["choices"].as_array().unwrap() {
            let calls = choice["message"]["tool_calls"].as_array();
            let calls = calls.map_or(&[][..], Vec::as_slice);
            calls.iter().for_each(check_call);
            let text = choice["message"]["content"].as_str().unwrap_or_default();
            match choice["finish_reason"].as_str().unwrap() {
                // No call was made and not reported.
                "tool_calls" | "stop" => assert!(!text.contains("<tool_call>"), "{choice}"),
                reason => {
                    assert_eq!(reason, "length");
                    cut += 1;
                }
            }
            called += usize::from(!calls.is_empty());
            several += usize::from(calls.len() > 1);
            silent += usize::from(calls.is_empty());
        }
    }
    assert!(
        called > 8 && several > 2 && silent > 8,
        "{called} called, {several} of them more than once, {silent} did not, {cut} were cut"
    );
    let single = json!({"tools": tools, "temperature": 1, "n": 8, "max_tokens": 120, "logit_bias": bias, "parallel_tool_calls": false});
    for choice in answered(&router, &single).await["choices"]
        .as_array()
        .unwrap()
    {
        let calls = choice["message"]["tool_calls"].as_array();
        assert!(calls.is_none_or(|calls| calls.len() == 1), "{choice}");
    }
    // Stop strings may end the text around calls; tokens that a schema forces are never told beside likelihoods.
    answered(&router, &json!({"tools": tools, "stop": "x"})).await;
    let told = json!({"tools": tools, "logprobs": true});
    assert_eq!(refused(&router, &told).await.0, "tools");
    answered(
        &router,
        &json!({"tools": [tool("sun", false)], "logprobs": true}),
    )
    .await;
    // Where a call is forced, each of several functions keeps its own schema.
    let mut names = std::collections::BTreeSet::new();
    for seed in 1..=4 {
        let forced = json!({"tools": tools, "tool_choice": "required", "temperature": 1, "seed": seed, "n": 8, "max_tokens": 120, "logit_bias": bias});
        for choice in answered(&router, &forced).await["choices"]
            .as_array()
            .unwrap()
        {
            if choice["finish_reason"] == "tool_calls" {
                check_call(&choice["message"]["tool_calls"][0]);
                names.insert(choice["message"]["tool_calls"][0]["function"]["name"].to_string());
            }
        }
    }
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test]
async fn calls_and_results_go_into_the_prompt() {
    let router = with_tools();
    let conversation = |id: &str, arguments: &str| {
        json!({"messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "rain", "arguments": arguments}}]},
            {"role": "tool", "tool_call_id": id, "content": "wet"},
        ]})
    };
    let long = answered(&router, &conversation("call_1", "{\"a\": \"bcdefghi\"}")).await;
    let short = answered(&router, &conversation("call_1", "{}")).await;
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens(&long) > tokens(&short) + 8);
    for (id, arguments, told) in [
        ("call_2", "{}", "no earlier call"),
        ("call_1", "[]", "JSON object"),
        ("call_1", "{", "JSON object"),
    ] {
        let (param, message) = refused(&router, &conversation(id, arguments)).await;
        assert!(
            param.starts_with("messages[") && message.contains(told),
            "{message}"
        );
    }
    // The same turns for a model that knows no functions.
    let without = support::api();
    let (param, message) = refused(
        &casemate_enclave::api::router(without),
        &conversation("call_1", "{}"),
    )
    .await;
    assert!(
        param == "messages[1]" && message.contains("chat template"),
        "{message}"
    );
}

#[tokio::test]
async fn functions_have_limits_and_need_a_template() {
    let plain = router(api());
    let (param, message) = refused(&plain, &json!({"tools": [tool("f", false)]})).await;
    assert!(
        param == "tools" && message.contains("chat template"),
        "{message}"
    );
    let router = with_tools();
    let many: Vec<Value> = (0..129).map(|n| tool(&format!("f{n}"), false)).collect();
    let mut unenforceable = tool("g", true);
    unenforceable["function"]["parameters"]["properties"]["rainy"] =
        json!({"type": "string", "pattern": "x"});
    let large = json!([{"type": "function", "function": {"name": "f", "description": "x".repeat(300_000)}}]);
    for (tools, param) in [
        (json!(many), "tools"),
        (large, "tools"),
        (json!([tool("f", false), tool("f", false)]), "tools[1]"),
        (json!([tool("a b", false)]), "tools[0]"),
        (json!([{"type": "web_search"}]), "tools[0]"),
        (
            json!([tool("f", false), unenforceable]),
            "tools[1].function.parameters",
        ),
        (
            json!([{"type": "function", "function": {"name": "f", "parameters": []}}]),
            "tools[0]",
        ),
    ] {
        assert_eq!(refused(&router, &json!({"tools": tools})).await.0, param);
    }
    let both = json!({"tools": [tool("f", false)], "response_format": {"type": "json_object"}});
    assert_eq!(refused(&router, &both).await.0, "response_format");
    // Shown to the model only where it may call them.
    let free = answered(&router, &json!({"tools": [tool("f", false)]})).await;
    let none = answered(
        &router,
        &json!({"tools": [tool("f", false)], "tool_choice": "none"}),
    )
    .await;
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(tokens(&free) > tokens(&none) + 50);
}

#[tokio::test]
async fn the_seed_that_was_drawn_is_reported_and_repeats_the_answer() {
    let router = router(api());
    let drawn = answered(&router, &json!({"temperature": 1, "max_tokens": 20})).await;
    let seed = drawn["seed"].as_i64().unwrap();
    assert!((0..1 << 53).contains(&seed));
    let again = answered(
        &router,
        &json!({"temperature": 1, "max_tokens": 20, "seed": seed}),
    )
    .await;
    assert_eq!(again["choices"], drawn["choices"]);
    let given = answered(&router, &json!({"seed": -3})).await;
    assert_eq!(given["seed"], -3);
}
