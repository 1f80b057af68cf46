//! How much of what schemas and functions become is held, for whom, and for how long.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode, header};
use casemate_enclave::access::Caller;
use casemate_enclave::api::{Api, router};
use casemate_enclave::grammars::Share;
use casemate_enclave::metrics::Metrics;
use casemate_engine::Grammar;
use casemate_testkit::models::TOOLS_TEMPLATE;
use serde_json::{Value, json};
use support::{api, api_with, chat};
use tower::ServiceExt;

/// A schema that needs one of the same 40 long values at each of so many places, so that eight of them are more than the
/// context holds.
fn schema(places: usize) -> Value {
    let names: Vec<String> = (0..places).map(|n| format!("p{n}")).collect();
    let property = |name: &String| (name.clone(), json!({"$ref": "#/$defs/e"}));
    let values: Vec<String> = (10..50).map(|n| format!("{n}").repeat(32)).collect();
    json!({
        "type": "object", "additionalProperties": false, "required": names,
        "properties": names.iter().map(property).collect::<serde_json::Map<_, _>>(),
        "$defs": {"e": {"enum": values}},
    })
}

/// What it becomes takes so many bytes.
fn bytes(schema: &Value) -> usize {
    Grammar::from_schema(schema).unwrap().bytes()
}

/// What that counts as.
fn counted(schema: &Value) -> usize {
    bytes(schema).next_power_of_two()
}

/// Asks for answers of any length that follow a schema.
fn following(schema: &Value, choices: u32) -> Value {
    chat(&json!({
        "stream": true, "max_tokens": 100_000, "n": choices,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    }))
}

async fn ask(router: &Router, body: &Value) -> Response<Body> {
    ask_as(router, &Caller::anonymous(), body).await
}

async fn ask_as(router: &Router, caller: &Caller, body: &Value) -> Response<Body> {
    let request = Request::post("/v1/chat/completions")
        .extension(caller.clone())
        .body(Body::from(body.to_string()));
    router.clone().oneshot(request.unwrap()).await.unwrap()
}

/// As many shares of that many bytes as a caller gets.
fn fill(api: &Api, caller: &Caller, each: usize) -> Vec<Share> {
    std::iter::from_fn(|| api.grammars().take(caller.user(), each).ok()).collect()
}

/// Shares of that many bytes for all who have keys, until nobody gets any more.
fn fill_by_all(api: &Api, each: usize) -> Vec<Share> {
    (0..=255)
        .flat_map(|n| fill(api, &holder(n), each))
        .collect()
}

fn holder(n: u8) -> Caller {
    Caller::holder("name", [n; 32])
}

fn is_told_to_come_back(answer: &Response<Body>) {
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.headers()[header::RETRY_AFTER], "1");
}

async fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn nothing_is_held(api: &Api) {
    eventually("something is held", || api.grammars().held() == 0).await;
}

#[tokio::test]
async fn grammars_of_all_requests_have_one_bounded_room() {
    let metrics = Arc::new(Metrics::default());
    let api = api().with_metrics(Arc::clone(&metrics));
    let router = router(api.clone());
    let large = schema(64);
    assert!(bytes(&large) > 128 << 10, "{}", bytes(&large));
    let small = schema(1);

    // Nobody gets room for another large one, which takes none from small ones.
    let mut others = fill_by_all(&api, counted(&large));
    is_told_to_come_back(&ask(&router, &following(&large, 1)).await);
    let answer = ask(&router, &following(&small, 1)).await;
    assert_eq!(answer.status(), StatusCode::OK, "a small one has room");
    drop(answer);
    others.pop();
    let answer = ask(&router, &following(&large, 1)).await;
    assert_eq!(answer.status(), StatusCode::OK);
    drop(answer);

    // Nor is any left for small ones: only who needs it is turned away.
    others.extend(fill_by_all(&api, 1));
    is_told_to_come_back(&ask(&router, &following(&small, 1)).await);
    let any_object = json!({"stream": true, "response_format": {"type": "json_object"}});
    for asked in [any_object, json!({"stream": true, "max_tokens": 1})] {
        assert_eq!(ask(&router, &chat(&asked)).await.status(), StatusCode::OK);
    }
    let shown = metrics.render(None);
    for line in [
        "casemate_denied_total{reason=\"grammars\"} 2",
        "casemate_grammar_bytes_used 67108864",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{shown}");
    }
    drop(others);
    nothing_is_held(&api).await;
}

#[tokio::test]
async fn who_holds_many_schemas_keeps_nobody_else_from_having_any() {
    let api = api();
    let router = router(api.clone());
    for schema in [schema(1), schema(64)] {
        let taken = fill(&api, &holder(1), counted(&schema));
        let asked = following(&schema, 1);
        is_told_to_come_back(&ask_as(&router, &holder(1), &asked).await);
        for other in [holder(2), Caller::anonymous()] {
            let answer = ask_as(&router, &other, &asked).await;
            assert_eq!(answer.status(), StatusCode::OK, "{other:?}");
        }
        drop(taken);
        nothing_is_held(&api).await;
    }
}

/// Neither to who watches the metrics, nor to who tries how much room is left.
#[tokio::test]
async fn neither_metrics_nor_refusals_tell_more_of_a_schema_than_its_padding() {
    let (shorter, longer) = (schema(15), schema(17));
    assert_eq!(counted(&shorter), counted(&longer));
    assert!(bytes(&longer) - bytes(&shorter) > 4 << 10);
    let found = async |schema: &Value| {
        let metrics = Arc::new(Metrics::default());
        let api = api().with_metrics(Arc::clone(&metrics));
        let answer = ask(&router(api.clone()), &following(schema, 1)).await;
        assert_eq!(answer.status(), StatusCode::OK);
        let mut shares = Vec::new();
        let mut shown = Vec::new();
        while let Ok(share) = api.grammars().take(holder(1).user(), 1) {
            shares.push(share);
            let text = metrics.render(None);
            let mut lines = text.lines();
            let gauge = lines.find(|line| line.starts_with("casemate_grammar_bytes_used "));
            shown.push(gauge.unwrap().to_owned());
        }
        shown
    };
    assert_eq!(found(&shorter).await, found(&longer).await);
}

#[tokio::test]
async fn a_grammar_has_room_once_until_all_its_answers_are_gone() {
    let api = api();
    let router = router(api.clone());
    let schema = schema(8);
    let held = || api.grammars().held();

    // Four are computed at a time, so twelve wait.
    let mut answers = Vec::new();
    for asked in 1..=2 {
        let answer = ask(&router, &following(&schema, 8)).await;
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(held(), asked * counted(&schema));
        answers.push(answer);
    }
    // Sixteen may wait: some of these find no place, and leave nothing behind.
    is_told_to_come_back(&ask(&router, &following(&schema, 8)).await);
    eventually("what was refused is held", || {
        held() == 2 * counted(&schema)
    })
    .await;
    drop(answers);
    nothing_is_held(&api).await;

    // An answer that nobody reads is made to its end, and its grammar kept for whoever may read it.
    let mut short = following(&schema, 1);
    short["max_tokens"] = json!(1);
    let answer = ask(&router, &short).await;
    eventually("it runs", || api.engine().stats().coarse_prompt_tokens > 0).await;
    eventually("it runs", || api.engine().stats().running == 0).await;
    assert_eq!(held(), counted(&schema));
    drop(answer);
    nothing_is_held(&api).await;
}

#[tokio::test]
async fn functions_are_held_too() {
    let api = api_with(Some(TOOLS_TEMPLATE), 512);
    let router = router(api.clone());
    let values: Vec<_> = (0..20).collect();
    let parameters = json!({
        "type": "object", "additionalProperties": false, "properties": {"v": {"enum": values}},
    });
    let tools = |strict: bool| {
        let function = json!({"name": "f", "strict": strict, "parameters": parameters});
        json!([{"type": "function", "function": function}])
    };
    // Their names alone where the model is free, and their grammar where it is not.
    let (one, more) = (bytes(&parameters), bytes(&parameters) + 400);
    for (strict, choice, least, most) in [
        (false, "auto", 1, 1 << 10),
        (true, "auto", one, more),
        (true, "required", one, more),
    ] {
        let asked = json!({"stream": true, "tools": tools(strict), "tool_choice": choice, "n": 2});
        let answer = ask(&router, &chat(&asked)).await;
        assert_eq!(answer.status(), StatusCode::OK, "{choice}");
        let held = api.grammars().held();
        let counted = least.next_power_of_two()..=most.next_power_of_two();
        assert!(counted.contains(&held), "{choice}: {held}");
        drop(answer);
        nothing_is_held(&api).await;
    }
}
