//! The table of fields in `docs/api.md` is true.

mod support;

use std::collections::BTreeSet;

use axum::Router;
use axum::http::StatusCode;
use casemate_enclave::api::{Extraction, Logprobs, router};
use casemate_testkit::models::TOOLS_TEMPLATE;
use serde_json::{Map, Value, json};
use support::{api_with, perturbation_key, post};

struct Row {
    field: String,
    at: String,
    accepted: Vec<Map<String, Value>>,
    refused: Vec<Map<String, Value>>,
}

/// The code spans of a cell, each the inside of a JSON object.
fn examples(cell: &str) -> Vec<Map<String, Value>> {
    let parse = |span: &str| {
        serde_json::from_str(&format!("{{{span}}}")).unwrap_or_else(|e| panic!("{span}: {e}"))
    };
    cell.split('`').skip(1).step_by(2).map(parse).collect()
}

fn table() -> Vec<Row> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/api.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (_, rest) = document.split_once("| field | at |").unwrap();
    rest.lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            Row {
                field: cells[1].trim_matches('`').to_owned(),
                at: cells[2].to_owned(),
                accepted: examples(cells[3]),
                refused: examples(cells[4]),
            }
        })
        .collect()
}

async fn send(
    router: &Router,
    chat: bool,
    extra: &Map<String, Value>,
) -> (StatusCode, String, String) {
    let (path, mut body) = if chat {
        let messages = json!([{"role": "user", "content": "a"}]);
        (
            "/v1/chat/completions",
            json!({"model": "tiny", "messages": messages, "max_tokens": 2}),
        )
    } else {
        (
            "/v1/completions",
            json!({"model": "tiny", "prompt": "a", "max_tokens": 2}),
        )
    };
    for (key, value) in extra {
        body[key] = value.clone();
    }
    let (status, answer) = post(router, path, &body).await;
    let text = |name: &str| answer["error"][name].as_str().unwrap_or("").to_owned();
    (status, text("param"), text("message"))
}

#[tokio::test]
async fn the_documented_fields_behave_as_documented() {
    let policy = Extraction {
        logprobs: Logprobs::Rounded {
            top: 5,
            rounding: 0.1,
            perturbation: Some(0.5),
        },
        logit_bias: true,
    };
    let router = router(
        api_with(Some(TOOLS_TEMPLATE), 512).with_extraction(policy, perturbation_key([1; 32])),
    );
    let rows = table();
    assert!(rows.len() > 40, "{} rows", rows.len());
    for row in &rows {
        let field = &row.field;
        assert!(
            !row.accepted.is_empty() && !row.refused.is_empty(),
            "{field}"
        );
        for chat in [true, false] {
            let here = match row.at.as_str() {
                "both" | "neither" => true,
                "chat" => chat,
                "completions" => !chat,
                other => panic!("{field} is at {other}"),
            };
            for example in &row.accepted {
                let (status, param, message) = send(&router, chat, example).await;
                if here {
                    assert_eq!(status, StatusCode::OK, "{field} {message}");
                } else if !asks_for_nothing(&example[field]) {
                    assert_eq!(
                        (status, &param),
                        (StatusCode::BAD_REQUEST, field),
                        "{message}"
                    );
                }
            }
            for example in row.refused.iter().filter(|_| here) {
                let (status, param, message) = send(&router, chat, example).await;
                assert!(status.is_client_error(), "{field} {status}");
                let named = param == *field || param.starts_with(&format!("{field}["));
                // What is out of range for the engine is told by the engine.
                assert!(
                    named || message.contains(field) || message.contains("token id"),
                    "{field}: {param} {message}"
                );
            }
        }
    }
}

fn asks_for_nothing(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false)) || *value == "none"
}

#[test]
fn no_known_field_is_missing_from_the_document() {
    let documented: BTreeSet<String> = table().into_iter().map(|row| row.field).collect();
    let known: BTreeSet<String> = casemate_enclave::api::known_fields()
        .map(str::to_owned)
        .collect();
    assert_eq!(documented, known);
}
