//! What the extraction policy lets users learn and steer.

mod support;

use std::collections::BTreeMap;

use axum::Router;
use axum::http::StatusCode;
use casemate_enclave::api::{Extraction, Logprobs, router};
use casemate_engine::sampler::arg_max;
use casemate_testkit::models::TOOLS_TEMPLATE;
use serde_json::{Value, json};
use support::{api, api_with, chat, events, perturbation_key, post};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn governed(logprobs: Logprobs, logit_bias: bool) -> Router {
    governed_under([1; 32], logprobs, logit_bias)
}

fn governed_under(data_key: [u8; 32], logprobs: Logprobs, logit_bias: bool) -> Router {
    let extraction = Extraction {
        logprobs,
        logit_bias,
    };
    router(api().with_extraction(extraction, perturbation_key(data_key)))
}

fn rounded(top: u8, rounding: f64) -> Logprobs {
    Logprobs::Rounded {
        top,
        rounding,
        perturbation: None,
    }
}

fn perturbed(top: u8, rounding: f64, nats: f64) -> Logprobs {
    Logprobs::Rounded {
        top,
        rounding,
        perturbation: Some(nats),
    }
}

async fn refused(router: &Router, path: &str, body: &Value) -> (String, String, String) {
    let (status, answer) = post(router, path, body).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    let text = |name: &str| answer["error"][name].as_str().unwrap_or("").to_owned();
    (text("param"), text("code"), text("message"))
}

async fn answered(router: &Router, path: &str, body: &Value) -> Value {
    let (status, answer) = post(router, path, body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

#[tokio::test]
async fn without_a_policy_nothing_is_shown_or_steered() {
    let router = router(api());
    for (extra, field) in [
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": true, "top_logprobs": 1}), "top_logprobs"),
        (json!({"logit_bias": {"1": 5}}), "logit_bias"),
    ] {
        let (param, code, message) = refused(&router, CHAT, &chat(&extra)).await;
        assert_eq!(
            (param.as_str(), code.as_str()),
            (field, "extraction_policy")
        );
        assert!(message.contains("extraction policy"), "{message}");
    }
    let body = json!({"model": "tiny", "prompt": "a", "logprobs": 0});
    assert_eq!(refused(&router, TEXT, &body).await.1, "extraction_policy");
}

#[tokio::test]
async fn logprobs_are_bounded_rounded_and_the_same_streamed() {
    let router = governed(rounded(3, 0.25), false);
    let (param, code, message) = refused(
        &router,
        CHAT,
        &chat(&json!({"logprobs": true, "top_logprobs": 4})),
    )
    .await;
    assert_eq!(
        (param.as_str(), code.as_str()),
        ("top_logprobs", "extraction_policy")
    );
    assert!(message.contains("at most 3"), "{message}");
    let (param, code, _) = refused(&router, CHAT, &chat(&json!({"top_logprobs": 2}))).await;
    assert_eq!(
        (param.as_str(), code.as_str()),
        ("top_logprobs", "invalid_value")
    );

    let body = chat(&json!({"logprobs": true, "top_logprobs": 3}));
    let whole = answered(&router, CHAT, &body).await;
    let content = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len() as u64, whole["usage"]["completion_tokens"]);
    let text: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(
        String::from_utf8_lossy(&text),
        whole["choices"][0]["message"]["content"].as_str().unwrap()
    );
    for token in content {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the chosen token is the likeliest.
        assert_eq!(token["logprob"], top[0]["logprob"]);
        for entry in top.iter().chain([token]) {
            let value = entry["logprob"].as_f64().unwrap();
            assert!(value <= 0.0 && (value * 4.0).fract() == 0.0, "{value}");
        }
        assert!(top[0]["logprob"].as_f64() >= top[2]["logprob"].as_f64());
    }

    let mut body = body;
    body["stream"] = json!(true);
    let streamed: Vec<Value> = events(&router, CHAT, &body)
        .await
        .iter()
        .filter_map(|event| {
            event["choices"][0]["logprobs"]["content"]
                .as_array()
                .cloned()
        })
        .flatten()
        .collect();
    assert_eq!(&streamed, content);
}

#[tokio::test]
async fn completions_have_logprobs_in_their_own_shape() {
    let router = governed(rounded(2, 0.1), false);
    let body =
        json!({"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 0, "logprobs": 2});
    let whole = answered(&router, TEXT, &body).await;
    let logprobs = &whole["choices"][0]["logprobs"];
    let column = |name: &str| logprobs[name].as_array().unwrap().len();
    assert_eq!(
        ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(column),
        [6; 4]
    );
    assert_eq!(logprobs["text_offset"][0], 0);
    let first = logprobs["tokens"][0].as_str().unwrap();
    assert_eq!(logprobs["text_offset"][1], first.chars().count());
    assert_eq!(
        logprobs["top_logprobs"][0][first],
        logprobs["token_logprobs"][0]
    );
    let mut streaming = body.clone();
    streaming["stream"] = json!(true);
    let streamed: Vec<Value> = events(&router, TEXT, &streaming)
        .await
        .iter()
        .filter_map(|event| {
            event["choices"][0]["logprobs"]["tokens"]
                .as_array()
                .cloned()
        })
        .flatten()
        .collect();
    assert_eq!(&json!(streamed), &logprobs["tokens"]);
    let none = json!({"model": "tiny", "prompt": "ab", "max_tokens": 1, "logprobs": 0});
    let none = answered(&router, TEXT, &none).await;
    assert_eq!(none["choices"][0]["logprobs"]["top_logprobs"], json!([{}]));
}

#[tokio::test]
async fn tokens_of_a_stop_string_are_not_shown() {
    let router = governed(rounded(0, 0.1), false);
    let free = answered(&router, CHAT, &chat(&json!({"logprobs": true}))).await;
    let text = free["choices"][0]["message"]["content"].as_str().unwrap();
    let stop: String = text.chars().skip(2).take(2).collect();
    let cut = answered(
        &router,
        CHAT,
        &chat(&json!({"logprobs": true, "stop": stop})),
    )
    .await;
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    let shown = |answer: &Value| {
        answer["choices"][0]["logprobs"]["content"]
            .as_array()
            .unwrap()
            .len()
    };
    assert!(shown(&cut) < 4 && shown(&cut) < shown(&free), "{cut}");
}

#[tokio::test]
async fn biases_need_a_policy_and_never_go_with_logprobs() {
    let router = governed(rounded(5, 0.1), true);
    let letter = 'Q' as u32 - '!' as u32 + 33;
    let forced = answered(
        &router,
        CHAT,
        &chat(&json!({"logit_bias": {letter.to_string(): 100}})),
    )
    .await;
    assert_eq!(forced["choices"][0]["message"]["content"], "QQQQQQQQ");
    let both = chat(&json!({"logprobs": true, "logit_bias": {"5": 1}}));
    let (param, code, message) = refused(&router, CHAT, &both).await;
    assert_eq!(
        (param.as_str(), code.as_str()),
        ("logit_bias", "extraction_policy")
    );
    assert!(message.contains("never combines"), "{message}");
    let many: serde_json::Map<_, _> = (0..301).map(|n| (n.to_string(), json!(1))).collect();
    for bad in [
        json!({"5": 101}),
        json!({"5": -100.5}),
        json!({"5": "1"}),
        json!({"05": 1}),
        json!({"-1": 1}),
        json!({"100000": 1}),
        json!(many),
        json!([1]),
    ] {
        let (param, code, _) = refused(&router, CHAT, &chat(&json!({"logit_bias": bad}))).await;
        assert_eq!(
            (param.as_str(), code.as_str()),
            ("logit_bias", "invalid_value"),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn schemas_and_forced_calls_never_go_with_logprobs() {
    let extraction = Extraction {
        logprobs: rounded(5, 0.1),
        logit_bias: false,
    };
    let api = api_with(Some(TOOLS_TEMPLATE), 512);
    let router = router(api.with_extraction(extraction, perturbation_key([1; 32])));
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["a"],
        "properties": {"a": {"const": "Q"}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let tool = |strict| {
        let function = json!({"name": "f", "strict": strict, "parameters": schema});
        json!([{"type": "function", "function": function}])
    };
    let named = json!({"type": "function", "function": {"name": "f"}});
    for (steering, field) in [
        (json!({"response_format": format}), "response_format"),
        (
            json!({"tools": tool(true), "tool_choice": "required"}),
            "tool_choice",
        ),
        (
            json!({"tools": tool(false), "tool_choice": named}),
            "tool_choice",
        ),
    ] {
        let mut body = chat(&steering);
        answered(&router, CHAT, &body).await;
        body["logprobs"] = json!(true);
        let (param, code, message) = refused(&router, CHAT, &body).await;
        assert_eq!(
            (param.as_str(), code.as_str()),
            (field, "extraction_policy")
        );
        assert!(message.contains("never combines"), "{message}");
    }
    for free in [
        json!({"response_format": {"type": "json_object"}, "logprobs": true}),
        json!({"tools": tool(false), "tool_choice": "auto", "logprobs": true}),
    ] {
        answered(&router, CHAT, &chat(&free)).await;
    }
}

#[tokio::test]
async fn a_token_that_is_not_among_the_likeliest_has_no_value() {
    for (most, asked) in [(0, 0), (2, 0), (2, 1), (2, 2)] {
        let router = governed(rounded(most, 0.001), false);
        let (mut shown, mut hidden) = (0, 0);
        // What is least likely is made likely, and a free draw besides.
        let steered =
            json!({"messages": [{"role": "user", "content": "QZ"}], "repetition_penalty": 0.01});
        for seed in 0..6 {
            let mut body = chat(&steered);
            body["seed"] = json!(seed);
            body["temperature"] = json!(seed % 3);
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(asked);
            let answer = answered(&router, CHAT, &body).await;
            body["top_logprobs"] = json!(most);
            let wide = answered(&router, CHAT, &body).await;
            let tokens = |answer: &Value| {
                let content = &answer["choices"][0]["logprobs"]["content"];
                content.as_array().unwrap().clone()
            };
            for (token, wide) in tokens(&answer).iter().zip(tokens(&wide)) {
                assert_eq!(token["top_logprobs"].as_array().unwrap().len(), asked);
                assert_eq!(token["logprob"], wide["logprob"]);
                let likeliest = wide["top_logprobs"].as_array().unwrap();
                if token["logprob"] == -9999.0 {
                    assert!(likeliest.iter().all(|l| l["bytes"] != token["bytes"]));
                    hidden += 1;
                } else {
                    let known = |l: &Value| l["bytes"] == token["bytes"];
                    assert!(most == 0 || likeliest.iter().any(known), "{token}");
                    shown += 1;
                }
            }
        }
        assert!(hidden > 0 && shown + hidden > 20, "{shown} and {hidden}");
    }
}

/// The alternatives at each position of a chat, by their bytes or, where a token has none, by name.
fn alternatives(answer: &Value) -> Vec<BTreeMap<String, f64>> {
    let content = answer["choices"][0]["logprobs"]["content"].as_array();
    let by_bytes = |entry: &Value| {
        let name = format!("{} {}", entry["bytes"], entry["token"]);
        (name, entry["logprob"].as_f64().unwrap())
    };
    let top = |token: &Value| token["top_logprobs"].as_array().unwrap().clone();
    let position = |token: &Value| top(token).iter().map(by_bytes).collect();
    content.unwrap().iter().map(position).collect()
}

#[tokio::test]
async fn perturbed_values_lie_within_their_bounds_about_the_models_own() {
    let body = chat(&json!({"logprobs": true, "top_logprobs": 3}));
    let answer = answered(&governed(rounded(3, 0.001), false), CHAT, &body).await;
    let plain = alternatives(&answer);
    let answer = answered(&governed(perturbed(3, 0.001, 0.5), false), CHAT, &body).await;
    let mut moved = Vec::new();
    for (plain, noisy) in plain.iter().zip(&alternatives(&answer)) {
        assert!(plain.keys().eq(noisy.keys()), "{plain:?} {noisy:?}");
        for (plain, noisy) in plain.values().zip(noisy.values()) {
            assert!(
                (noisy - plain).abs() <= 0.502 && *noisy <= 0.0,
                "{plain}: {noisy}"
            );
            moved.push(noisy - plain);
        }
    }
    let far = moved.iter().filter(|by| by.abs() > 0.05).count();
    assert!(moved.len() == 24 && far > 12, "{moved:?}");
    // The chosen token, which the list repeats, has the value it has there.
    for token in answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
    {
        let top = token["top_logprobs"].as_array().unwrap();
        let listed = top.iter().find(|entry| entry["bytes"] == token["bytes"]);
        assert_eq!(listed.unwrap()["logprob"], token["logprob"]);
        let value = |entry: &Value| entry["logprob"].as_f64().unwrap();
        assert!(top.windows(2).all(|two| value(&two[0]) >= value(&two[1])));
    }
}

#[tokio::test]
async fn asking_again_draws_no_other_noise() {
    let noisy = governed(perturbed(3, 0.001, 0.5), false);
    let ask = |prompt: &[u32], tokens: u32, seed: u32, temperature: f64| {
        json!({"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": temperature,
               "seed": seed, "logprobs": 3})
    };
    let shown = |answer: Value| answer["choices"][0]["logprobs"]["top_logprobs"].clone();
    let prompt = [5, 6, 7, 8];
    let first = shown(answered(&noisy, TEXT, &ask(&prompt, 6, 1, 0.0)).await);
    assert_eq!(first.as_array().unwrap().len(), 6);
    // By another draw, and of another replica that has the same data key.
    let replica = governed(perturbed(3, 0.001, 0.5), false);
    for router in [&noisy, &replica] {
        for (seed, temperature) in [(1, 0.0), (2, 0.0), (3, 2.0)] {
            let body = ask(&prompt, 1, seed, temperature);
            assert_eq!(shown(answered(router, TEXT, &body).await)[0], first[0]);
        }
    }
    // With the answer's beginning as the prompt's end.
    let mut likeliest = 0;
    let note = |_, logits: &[f32]| likeliest = arg_max(logits);
    api().engine().evaluate(&prompt, note).unwrap();
    let longer = [&prompt[..], &[likeliest]].concat();
    let rest = shown(answered(&noisy, TEXT, &ask(&longer, 5, 1, 0.0)).await);
    assert_eq!(rest.as_array().unwrap()[..], first.as_array().unwrap()[1..]);
    // Another data key is another noise.
    let other = governed_under([9; 32], perturbed(3, 0.001, 0.5), false);
    let answer = answered(&other, TEXT, &ask(&prompt, 6, 1, 0.0)).await;
    assert_ne!(shown(answer), first);
}
