//! API keys and their limits, in front of handlers that show what reaches them, and of a tiny real model.

mod support;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Extension;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode, header};
use axum::routing::any;
use casemate_container::Silent;
use casemate_enclave::access::{Access, Caller};
use casemate_enclave::api::{self, Api};
use casemate_enclave::metrics::Metrics;
use casemate_engine::{Compute, Engine, EngineOptions};
use casemate_release::api_key::{self, ApiKey, ApiKeys, Limits, hash};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// The text of a key; each number another one.
fn text(number: u32) -> String {
    format!("cm-{number:064x}")
}

fn key(name: &str, number: u32, limits: Limits) -> ApiKey {
    ApiKey {
        name: name.into(),
        hash: hash(text(number).as_bytes()),
        limits,
    }
}

fn keyed(keys: Vec<ApiKey>) -> api_key::Access {
    api_key::Access::Keyed(ApiKeys::new(keys).unwrap())
}

fn at_most(number: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(number)
}

struct Door {
    access: Access,
    metrics: Arc<Metrics>,
    milliseconds: Arc<AtomicU64>,
    inside: Router,
}

/// Shows who asks and which fields arrive; the path `/stream` answers without end.
fn mirror() -> Router {
    let show = |Extension(caller): Extension<Caller>, headers: HeaderMap| async move {
        let has_key = headers.contains_key(header::AUTHORIZATION);
        json!({"caller": caller.name(), "authorization": has_key}).to_string()
    };
    let endless = || async {
        Body::from_stream(stream::repeat_with(|| {
            Ok::<_, axum::Error>(Bytes::from("x"))
        }))
    };
    Router::new()
        .route(CHAT, any(show))
        .route("/stream", any(endless))
}

impl Door {
    fn new(keys: Vec<ApiKey>, inside: Router) -> Self {
        Self::granted(&keyed(keys), inside)
    }

    fn granted(access: &api_key::Access, inside: Router) -> Self {
        let milliseconds = Arc::new(AtomicU64::new(5_000_000));
        let clock = Arc::clone(&milliseconds);
        let clock = Arc::new(move || Duration::from_millis(clock.load(Ordering::Relaxed)));
        let metrics = Arc::new(Metrics::default());
        Self {
            access: Access::new(access, clock, Arc::clone(&metrics)),
            metrics,
            milliseconds,
            inside,
        }
    }

    fn pass(&self, milliseconds: u64) {
        self.milliseconds.fetch_add(milliseconds, Ordering::Relaxed);
    }

    async fn send(&self, method: Method, path: &str, keys: &[&str], body: &str) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for key in keys {
            request = request.header(header::AUTHORIZATION, *key);
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        self.access.handle(request, self.inside.clone()).await
    }

    async fn ask(&self, number: u32, body: &str) -> (StatusCode, HeaderMap, Value) {
        let key = format!("Bearer {}", text(number));
        read(self.send(Method::POST, CHAT, &[&key], body).await).await
    }

    fn metric(&self, line: &str) -> bool {
        self.metrics.render(None).lines().any(|found| found == line)
    }
}

async fn read(response: Response<Body>) -> (StatusCode, HeaderMap, Value) {
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, 1 << 20).await.unwrap();
    let json = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    (parts.status, parts.headers, json)
}

#[tokio::test]
async fn only_a_key_of_the_grant_gets_an_answer() {
    let keys = vec![
        key("alice", 1, Limits::default()),
        key("bob", 2, Limits::default()),
    ];
    let door = Door::new(keys, mirror());
    let near = format!("Bearer {}", text(1).replace("01", "11"));
    let right = format!("Bearer {}", text(1));
    let bare = text(1);
    let basic = format!("Basic {}", text(1));
    let longer = format!("Bearer {}0", text(1));
    let refused: [&[&str]; 9] = [
        &[],
        &[""],
        &["Bearer"],
        &["Bearer "],
        &[&near],
        &[&bare],
        &[&basic],
        &[&longer],
        &[&right, &right],
    ];
    for fields in refused {
        for method in [Method::POST, Method::GET] {
            let response = door.send(method, CHAT, fields, "").await;
            let (status, _, body) = read(response).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{fields:?}");
            let error = &body["error"];
            assert_eq!(error["code"], "invalid_api_key", "{body}");
            assert_eq!(error["type"], "invalid_request_error", "{body}");
            assert!(!body.to_string().contains("00000"), "no key in {body}");
        }
    }
    assert!(door.metric("casemate_denied_total{reason=\"key\"} 18"));

    let shown = |name| json!({"caller": name, "authorization": false});
    assert_eq!(door.ask(1, "").await.2, shown("alice"));
    assert_eq!(door.ask(2, "").await.2, shown("bob"));
    let lower = format!("bearer  {}", text(2));
    let (status, _, body) = read(door.send(Method::GET, CHAT, &[&lower], "").await).await;
    assert_eq!((status, body), (StatusCode::OK, shown("bob")));
}

#[tokio::test]
async fn each_of_many_keys_is_its_holders() {
    let keys = (0..256).map(|n| key(&format!("k{n}"), n, Limits::default()));
    let door = Door::new(keys.collect(), mirror());
    for number in 0..256 {
        let (_, _, body) = door.ask(number, "").await;
        assert_eq!(body["caller"], format!("k{number}"));
    }
    assert_eq!(door.ask(256, "").await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn where_the_grant_is_open_everybody_is_anonymous() {
    let door = Door::granted(&api_key::Access::Open, mirror());
    let (status, _, body) = door.ask(1, "").await;
    let anonymous = json!({"caller": null, "authorization": false});
    assert_eq!((status, body), (StatusCode::OK, anonymous));
    // Until a newer grant closes it, and again from one that opens it.
    door.access
        .replace(&keyed(vec![key("a", 2, Limits::default())]));
    assert_eq!(door.ask(1, "").await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(door.ask(2, "").await.2["caller"], "a");
    door.access.replace(&api_key::Access::Open);
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
}

fn field<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers
        .get(name)
        .map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn requests_beyond_the_minutes_share_wait() {
    let limits = Limits {
        requests_per_minute: at_most(3),
        ..Limits::default()
    };
    let door = Door::new(vec![key("a", 1, limits), key("b", 2, limits)], mirror());
    for left in ["2", "1", "0"] {
        let (status, headers, _) = door.ask(1, "").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(field(&headers, "x-ratelimit-limit-requests"), "3");
        assert_eq!(field(&headers, "x-ratelimit-remaining-requests"), left);
    }
    door.pass(500);
    let (status, headers, body) = door.ask(1, "").await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    assert_eq!(body["error"]["type"], "requests");
    assert_eq!(
        field(&headers, "retry-after"),
        "20",
        "19.5 s, in whole ones"
    );
    assert_eq!(field(&headers, "x-ratelimit-reset-requests"), "60s");
    assert!(!headers.contains_key("x-ratelimit-limit-tokens"));
    assert!(door.metric("casemate_denied_total{reason=\"requests\"} 1"));
    // Others have their own, and looking around is free.
    assert_eq!(door.ask(2, "").await.0, StatusCode::OK);
    let bearer = format!("Bearer {}", text(1));
    let response = door.send(Method::GET, CHAT, &[&bearer], "").await;
    assert_eq!(response.status(), StatusCode::OK);
    door.pass(19_500);
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
    assert_eq!(door.ask(1, "").await.0, StatusCode::TOO_MANY_REQUESTS);
}

#[tokio::test]
async fn the_days_budget_of_requests_is_a_quota() {
    let limits = Limits {
        requests_per_minute: at_most(2),
        requests_per_day: at_most(3),
        ..Limits::default()
    };
    let door = Door::new(vec![key("a", 1, limits), key("b", 2, limits)], mirror());
    for left in ["2", "1"] {
        let (status, headers, _) = door.ask(1, "").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(field(&headers, "x-ratelimit-limit-requests-day"), "3");
        assert_eq!(field(&headers, "x-ratelimit-remaining-requests-day"), left);
    }
    // Whom the minute's limit refuses has used nothing of the day's.
    let (_, headers, body) = door.ask(1, "").await;
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    assert_eq!(field(&headers, "x-ratelimit-remaining-requests-day"), "1");
    door.pass(60_000);
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
    let (status, headers, body) = door.ask(1, "").await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(body["error"]["code"], "insufficient_quota");
    assert_eq!(body["error"]["type"], "insufficient_quota");
    // A third of a day less the minute that has passed.
    assert_eq!(field(&headers, "retry-after"), (28_800 - 60).to_string());
    assert!(door.metric("casemate_denied_total{reason=\"requests\"} 2"));
    assert_eq!(
        door.ask(2, "").await.0,
        StatusCode::OK,
        "others have their own"
    );
    // A newer grant with the same limits is no new day.
    door.access.replace(&keyed(vec![key("renamed", 1, limits)]));
    door.pass(60_000);
    assert_eq!(
        door.ask(1, "").await.2["error"]["code"],
        "insufficient_quota"
    );
    door.pass(28_800_000);
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
}

#[tokio::test]
async fn the_days_budget_of_tokens_counts_prompts_and_answers() {
    let inside = model();
    let free = Door::new(vec![key("a", 1, Limits::default())], inside.clone());
    let (_, _, whole) = free.ask(1, &chat("hello", 8, false)).await;
    let total = u32::try_from(whole["usage"]["total_tokens"].as_u64().unwrap()).unwrap();
    let limits = Limits {
        tokens_per_day: at_most(2 * total),
        ..Limits::default()
    };
    let door = Door::new(vec![key("a", 1, limits)], inside.clone());
    for left in [total, 0] {
        assert_eq!(
            door.ask(1, &chat("hello", 8, false)).await.0,
            StatusCode::OK
        );
        let (_, headers, _) = door.ask(1, "{").await;
        let told = field(&headers, "x-ratelimit-remaining-tokens-day");
        assert_eq!(told, left.to_string());
    }
    let (status, headers, body) = door.ask(1, &chat("hello", 8, false)).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(body["error"]["code"], "insufficient_quota");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("tokens per day"), "{message}");
    assert!(!field(&headers, "retry-after").is_empty());
    // A prompt above the day's budget never passes.
    let limits = Limits {
        tokens_per_day: at_most(2),
        ..Limits::default()
    };
    let few = Door::new(vec![key("a", 1, limits)], inside);
    let (_, headers, body) = few.ask(1, &chat("hello", 8, false)).await;
    assert_eq!(body["error"]["code"], "insufficient_quota");
    assert!(!headers.contains_key(header::RETRY_AFTER));
}

#[tokio::test]
async fn requests_at_the_same_time_are_counted_until_their_answers_end() {
    let limits = Limits {
        concurrency: at_most(2),
        requests_per_minute: at_most(4),
        ..Limits::default()
    };
    let door = Door::new(vec![key("a", 1, limits)], mirror());
    let bearer = format!("Bearer {}", text(1));
    let mut streams = Vec::new();
    for _ in 0..2 {
        let response = door.send(Method::POST, "/stream", &[&bearer], "").await;
        let mut body = response.into_body().into_data_stream();
        body.next().await.unwrap().unwrap();
        streams.push(body);
    }
    assert!(door.metric("casemate_requests_open 2"));
    for _ in 0..3 {
        let (status, headers, body) = door.ask(1, "").await;
        assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        assert_eq!(field(&headers, "retry-after"), "1");
        // It cost none of the minute's requests.
        assert_eq!(field(&headers, "x-ratelimit-remaining-requests"), "2");
    }
    // Who hangs up makes room.
    drop(streams.pop());
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
    drop(streams);
    assert!(door.metric("casemate_requests_open 0"));
}

#[tokio::test]
async fn a_newer_grant_decides_and_forgets_nothing() {
    let limits = |requests| Limits {
        requests_per_minute: at_most(requests),
        ..Limits::default()
    };
    let old = vec![
        key("stays", 1, limits(1)),
        key("goes", 2, limits(1)),
        key("grows", 3, limits(1)),
    ];
    let door = Door::new(old, mirror());
    for number in 1..=3 {
        assert_eq!(door.ask(number, "").await.0, StatusCode::OK);
    }
    let new = vec![
        key("renamed", 1, limits(1)),
        key("grows", 3, limits(2)),
        key("comes", 4, limits(1)),
    ];
    door.access.replace(&keyed(new));
    assert_eq!(door.ask(1, "").await.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(door.ask(2, "").await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(door.ask(3, "").await.0, StatusCode::OK);
    assert_eq!(door.ask(4, "").await.2["caller"], "comes");
    door.pass(60_000);
    assert_eq!(door.ask(1, "").await.2["caller"], "renamed");
}

/// Between a grant that was received and the credential that confirms it: whom it takes out is out, whom it adds is not in.
#[tokio::test]
async fn a_newer_grant_lets_nobody_in_before_it_is_confirmed() {
    let limits = |requests| Limits {
        requests_per_minute: at_most(requests),
        ..Limits::default()
    };
    let old = vec![key("stays", 1, limits(2)), key("goes", 2, limits(2))];
    let new = || keyed(vec![key("stays", 1, limits(9)), key("comes", 3, limits(2))]);
    let door = Door::new(old, mirror());
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
    door.access.withdraw(&api_key::Access::Open);
    assert_eq!(door.ask(3, "").await.0, StatusCode::UNAUTHORIZED);
    door.access.withdraw(&new());
    assert_eq!(door.ask(2, "").await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(door.ask(3, "").await.0, StatusCode::UNAUTHORIZED);
    // With the limits of before, and what was used of them.
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
    assert_eq!(door.ask(1, "").await.0, StatusCode::TOO_MANY_REQUESTS);
    // A list of others leaves nobody.
    door.access.withdraw(&keyed(two_keys()[1..].to_vec()));
    assert_eq!(door.ask(1, "").await.0, StatusCode::UNAUTHORIZED);
    door.access.replace(&new());
    assert_eq!(door.ask(1, "").await.0, StatusCode::OK);
    assert_eq!(door.ask(3, "").await.0, StatusCode::OK);
    // And what was open is open to those of the list alone.
    let open = Door::granted(&api_key::Access::Open, mirror());
    open.access.withdraw(&new());
    assert_eq!(open.ask(2, "").await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(open.ask(3, "").await.0, StatusCode::OK);
}

/// Lines of the log about a grant that takes the place of one with two keys.
fn logged(grant: &api_key::Access) -> Vec<String> {
    let door = Door::new(two_keys(), mirror());
    let file = tempfile::NamedTempFile::new().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Arc::new(file.reopen().unwrap()))
        .finish();
    tracing::subscriber::with_default(subscriber, || door.access.replace(grant));
    let log = std::fs::read_to_string(file.path()).unwrap();
    let lines = log
        .lines()
        .map(|line| line.split_once(" access: ").unwrap().1.to_owned());
    lines.collect()
}

fn two_keys() -> Vec<ApiKey> {
    let limits = Limits {
        requests_per_minute: at_most(3),
        ..Limits::default()
    };
    vec![key("alice", 1, limits), key("bob", 2, limits)]
}

#[test]
fn another_list_is_logged_even_if_it_is_as_long() {
    assert_eq!(logged(&keyed(two_keys())), [""; 0]);
    let changed = |change: fn(&mut ApiKey)| {
        let mut keys = two_keys();
        change(&mut keys[1]);
        logged(&keyed(keys))
    };
    let told = ["2 API keys, changed"];
    assert_eq!(changed(|bob| bob.name = "carol".into()), told);
    assert_eq!(changed(|bob| bob.hash = [9; 32]), told);
    assert_eq!(changed(|bob| bob.limits.concurrency = at_most(1)), told);
    assert_eq!(changed(|bob| bob.limits.requests_per_minute = None), told);
    assert_eq!(
        logged(&keyed(two_keys()[..1].to_vec())),
        ["1 API key, changed"]
    );
    let open = logged(&api_key::Access::Open);
    assert_eq!(open.len(), 1);
    assert!(open[0].starts_with("open to anybody, changed"), "{open:?}");
}

fn model() -> Router {
    model_with(EngineOptions::default().max_waiting)
}

fn model_with(max_waiting: usize) -> Router {
    let options = EngineOptions {
        compute: Compute::F32,
        threads: 1,
        max_context: 256,
        max_batch: 4,
        max_waiting,
        ..EngineOptions::default()
    };
    let engine = Engine::load(support::tiny_model(), &options, &Silent).unwrap();
    api::router(Api::new(engine, "tiny".into(), "fp_0".into(), || 0))
}

fn chat(words: &str, max_tokens: u32, stream: bool) -> String {
    json!({
        "model": "tiny", "messages": [{"role": "user", "content": words}],
        "max_tokens": max_tokens, "temperature": 0, "stream": stream,
    })
    .to_string()
}

/// Who is refused because the service is full, or for what cannot be served, pays no tokens for it: of the minute or of the
/// day.
#[tokio::test]
async fn what_is_refused_after_all_costs_no_tokens() {
    let limits = Limits {
        tokens_per_minute: at_most(1000),
        tokens_per_day: at_most(1000),
        ..Limits::default()
    };
    let door = Door::new(vec![key("a", 1, limits)], model_with(4));
    let answers = |n: u32, words: &str| {
        json!({
            "model": "tiny", "messages": [{"role": "user", "content": words}],
            "max_tokens": 4, "temperature": 0, "n": n,
        })
        .to_string()
    };
    let left = |headers: &HeaderMap| {
        ["", "-day"].map(|of| {
            let name = format!("x-ratelimit-remaining-tokens{of}");
            field(headers, &name).parse::<u32>().unwrap()
        })
    };
    // Five answers at once do not fit a queue of four.
    for _ in 0..50 {
        let (status, headers, body) = door.ask(1, &answers(5, "hello")).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
        assert_eq!(body["error"]["code"], "overloaded");
        assert_eq!(left(&headers), [1000, 1000]);
    }
    // Longer than the context, and shorter than the limit.
    let (status, headers, body) = door.ask(1, &answers(1, &"x ".repeat(300))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
    assert_eq!(left(&headers), [1000, 1000]);
    // What is served is paid.
    let (status, _, body) = door.ask(1, &answers(2, "hello")).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let usage = &body["usage"];
    let [prompt, made] = ["prompt_tokens", "completion_tokens"].map(|n| usage[n].as_u64().unwrap());
    let (_, after, _) = door.ask(1, "{").await;
    let paid = 1000 - u32::try_from(2 * prompt + made).unwrap();
    assert_eq!(left(&after), [paid, paid]);
}

#[tokio::test]
async fn tokens_of_prompts_and_answers_are_counted() {
    let limits = |tokens| Limits {
        tokens_per_minute: at_most(tokens),
        ..Limits::default()
    };
    let inside = model();
    let free = Door::new(vec![key("a", 1, Limits::default())], inside.clone());
    let (_, _, whole) = free.ask(1, &chat("hello", 8, false)).await;
    let usage = &whole["usage"];
    let [prompt, total] = ["prompt_tokens", "total_tokens"].map(|n| usage[n].as_u64().unwrap());
    assert_eq!(total, prompt + 8);

    // Room for the prompt, and for half of the answer.
    let limit = u32::try_from(prompt + 4).unwrap();
    let door = Door::new(vec![key("a", 1, limits(limit))], inside.clone());
    let (status, headers, _) = door.ask(1, &chat("hello", 8, false)).await;
    assert_eq!(status, StatusCode::OK, "what has begun is finished");
    assert_eq!(
        field(&headers, "x-ratelimit-limit-tokens"),
        limit.to_string()
    );
    let (status, headers, body) = door.ask(1, &chat("hello", 8, false)).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    assert_eq!(body["error"]["type"], "tokens");
    assert_eq!(field(&headers, "x-ratelimit-remaining-tokens"), "0");
    assert!(door.metric("casemate_denied_total{reason=\"tokens\"} 1"));
    // Four are owed, and the prompt is wanted.
    let wait = (60_000 * (prompt + 4)).div_ceil(u64::from(limit));
    let retry_after: u64 = field(&headers, "retry-after").parse().unwrap();
    assert_eq!(retry_after, wait.div_ceil(1000));
    door.pass(wait - 1);
    assert_eq!(
        door.ask(1, &chat("hello", 8, false)).await.0,
        StatusCode::TOO_MANY_REQUESTS
    );
    door.pass(1);
    assert_eq!(
        door.ask(1, &chat("hello", 8, false)).await.0,
        StatusCode::OK
    );

    // A prompt above the limit is never possible, so nobody is told to wait.
    let few = Door::new(vec![key("a", 1, limits(2))], inside);
    let (status, headers, body) = few.ask(1, &chat("hello", 8, false)).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{body}");
    assert!(!headers.contains_key(header::RETRY_AFTER));
}

#[tokio::test]
async fn a_prompt_is_counted_for_each_of_its_answers() {
    let inside = model();
    let free = Door::new(vec![key("a", 1, Limits::default())], inside.clone());
    let (_, _, whole) = free.ask(1, &chat("hello", 1, false)).await;
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    let four = chat("hello", 1, false).replacen('{', "{\"n\": 4, ", 1);
    for (tokens, expected) in [
        (4 * prompt - 1, StatusCode::TOO_MANY_REQUESTS),
        (4 * prompt, StatusCode::OK),
    ] {
        let limits = Limits {
            tokens_per_minute: at_most(u32::try_from(tokens).unwrap()),
            ..Limits::default()
        };
        let door = Door::new(vec![key("a", 1, limits)], inside.clone());
        let (status, headers, body) = door.ask(1, &four).await;
        assert_eq!(status, expected, "{body}");
        assert!(!headers.contains_key(header::RETRY_AFTER));
    }
}

/// A tiny model whose prompts are longer than a page of the KV cache.
fn one_that_reuses() -> Api {
    let options = EngineOptions {
        compute: Compute::F32,
        threads: 1,
        max_context: 256,
        max_batch: 4,
        ..EngineOptions::default()
    };
    let engine = Engine::load(support::tiny_model(), &options, &Silent).unwrap();
    Api::new(engine, "tiny".into(), "fp_0".into(), || 0)
}

/// Counted in tokens that were computed, not in time.
#[tokio::test]
async fn only_the_holder_of_the_same_key_reuses_a_prompt() {
    let api = one_that_reuses();
    let keys = vec![
        key("a", 1, Limits::default()),
        key("b", 2, Limits::default()),
    ];
    let door = Door::new(keys, api::router(api.clone()));
    let words = chat(&"the same words ".repeat(8), 4, false);
    let stats = || api.engine().stats();
    let ask = async |holder: u32, body: &str| {
        let before = stats();
        let (status, _, answer) = door.ask(holder, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let usage = &answer["usage"];
        let prompt = usage["prompt_tokens"].as_u64().unwrap();
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        let after = stats();
        let computed = after.prompt_tokens - before.prompt_tokens;
        assert_eq!(after.cached_tokens - before.cached_tokens, cached.unwrap());
        (computed, cached.unwrap(), prompt)
    };
    let (computed, cached, prompt) = ask(1, &words).await;
    assert_eq!((computed, cached), (prompt, 0));
    let whole_pages = (prompt - 1) / 64 * 64;
    assert!(whole_pages > 0, "{prompt}");
    assert_eq!(
        ask(1, &words).await,
        (prompt - whole_pages, whole_pages, prompt)
    );
    // Somebody else with the very same words.
    assert_eq!(ask(2, &words).await, (prompt, 0, prompt));
    // What a caller says about itself makes nobody somebody else.
    let claims = words.replacen('{', "{\"user\": \"a\", ", 1);
    assert_eq!(
        ask(2, &claims).await,
        (prompt - whole_pages, whole_pages, prompt)
    );
    // Where no key is asked for, nobody can be told from anybody.
    let open = api::router(api.clone());
    for _ in 0..2 {
        let before = stats();
        let (_, answer) = support::send(&open, "POST", CHAT, words.clone()).await;
        let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        assert_eq!(*cached, json!(0));
        assert_eq!(stats().prompt_tokens - before.prompt_tokens, prompt);
    }
    // Several answers to one prompt that nobody sent before: they begin together, and each computes it.
    let four = chat(&"other words ".repeat(10), 4, false).replacen('{', "{\"n\": 4, ", 1);
    assert_eq!(ask(1, &four).await.1, 0);
}

#[tokio::test]
async fn a_prompt_counts_as_cached_only_as_far_as_none_of_its_answers_computed_it() {
    let api = one_that_reuses();
    let door = Door::new(
        vec![key("a", 1, Limits::default())],
        api::router(api.clone()),
    );
    // Four run together and compute it. The other four begin when one of those has ended, and find it.
    let eight = chat(&"the same words ".repeat(8), 4, false).replacen('{', "{\"n\": 8, ", 1);
    for again in [false, true] {
        let before = api.engine().stats().cached_tokens;
        let (status, _, answer) = door.ask(1, &eight).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let usage = &answer["usage"];
        let whole_pages = (usage["prompt_tokens"].as_u64().unwrap() - 1) / 64 * 64;
        assert!(whole_pages > 0);
        let (found, told) = if again { (8, whole_pages) } else { (4, 0) };
        let reused = api.engine().stats().cached_tokens - before;
        assert_eq!(reused, found * whole_pages);
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], told);
    }
}

#[tokio::test]
async fn metrics_do_not_tell_whether_a_prompt_came_before() {
    let figures = async |second: &str| {
        let api = one_that_reuses();
        let door = Door::new(
            vec![key("a", 1, Limits::default())],
            api::router(api.clone()),
        );
        let mut usage = Value::Null;
        for words in ["number 1 of them ", second] {
            let (status, _, answer) = door.ask(1, &chat(&words.repeat(8), 4, false)).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            usage = answer["usage"].clone();
        }
        // An answer may arrive a moment before the engine has counted it.
        let stats = || api.engine().stats();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while stats().running > 0
            || stats().kv_bytes_used > 0
            || stats().coarse_completion_tokens < 8
        {
            assert!(std::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        let lengths = (
            usage["prompt_tokens"].clone(),
            usage["completion_tokens"].clone(),
        );
        let text = door.metrics.render(Some(&stats()));
        (cached.unwrap(), lengths, text)
    };
    let (reused, lengths, repeated) = figures("number 1 of them ").await;
    let (found, same_lengths, another) = figures("number 2 of them ").await;
    assert!(reused > found, "{reused} {found}");
    assert_eq!(lengths, same_lengths);
    assert_eq!(repeated, another);
}

#[tokio::test]
async fn who_does_not_read_the_answer_has_used_its_tokens_all_the_same() {
    let limits = Limits {
        tokens_per_minute: at_most(200),
        ..Limits::default()
    };
    let door = Door::new(vec![key("a", 1, limits)], model());
    let bearer = format!("Bearer {}", text(1));
    let body = chat("hello", 100, true);
    let response = door.send(Method::POST, CHAT, &[&bearer], &body).await;
    assert_eq!(response.status(), StatusCode::OK);
    // Not one piece is read, until the engine has made all of them.
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let (_, headers, _) = door.ask(1, "{}").await;
        let left: u32 = field(&headers, "x-ratelimit-remaining-tokens")
            .parse()
            .unwrap();
        if left < 100 {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "{left} tokens are left"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(response);
}

#[tokio::test]
async fn a_name_given_to_another_key_is_another_caller() {
    let show = |Extension(caller): Extension<Caller>| async move {
        let former = Caller::holder("alice", hash(text(1).as_bytes()));
        (caller == former).to_string()
    };
    let inside = Router::new().route(CHAT, any(show));
    let door = Door::new(vec![key("alice", 1, Limits::default())], inside);
    assert_eq!(door.ask(1, "").await.2, json!(true));
    door.access
        .replace(&keyed(vec![key("alice", 2, Limits::default())]));
    assert_eq!(door.ask(2, "").await.2, json!(false));
}
