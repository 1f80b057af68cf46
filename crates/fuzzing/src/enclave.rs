//! What an enclave reads besides the model: its configuration, and the bodies of decrypted requests.

use std::sync::LazyLock;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use casemate_channel::ohttp::{KEYSET_HINT, RELAYED_MARK};
use casemate_container::signing::SigningKey;
use casemate_container::{DataKey, ModelDigest, SealOptions, SealedFile, Silent, seal};
use casemate_enclave::api::{Api, Extraction, Logprobs, PerturbationKey, router};
use casemate_enclave::config::MeasuredConfig;
use casemate_enclave::relay::{Hint, KeysetList, MAX_KEYSETS};
use casemate_engine::{Compute, Engine, EngineOptions};
use casemate_testkit::models::Tiny;
use http::{HeaderMap, HeaderValue, Request};
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::attest::NOW;
use crate::scratch;

/// A configuration file. What is accepted keeps its bytes: they are what is measured.
pub(crate) fn config(data: &[u8]) {
    match MeasuredConfig::parse(data.to_vec()) {
        Ok(measured) => assert_eq!(measured.bytes, data),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

pub(crate) fn config_seeds() -> Vec<Vec<u8>> {
    let key = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let head = format!(
        "[service]\nname = \"m\"\nlisten = \"127.0.0.1:0\"\n[model]\npath = \"m.casemate\"\ncompute = \"int8\"\n\
         threads = 2\nmax_context = 512\nmax_batch = 4\n[broker]\nurl = \"http://127.0.0.1:1\"\nissuer = \"{key}\"\n\
         provider = \"{key}\"\nresource = \"default/model/m\"\n"
    );
    let tees = [
        "[tee]\nbackend = \"quoting-service\"\nsocket = \"/run/s\"\n",
        "[tee]\nbackend = \"configfs-tsm\"\ncollateral = \"c.json\"\n",
    ];
    let adapter = format!(
        "[[adapter]]\nname = \"a\"\npath = \"a.casemate\"\nresource = \"default/model/a\"\ndigest = \"{}\"\n",
        "ab".repeat(32)
    );
    let mut seeds: Vec<_> = tees.map(|tee| format!("{head}{tee}")).into();
    seeds.push(format!("{head}{}{adapter}", tees[0]));
    seeds.into_iter().map(String::into_bytes).collect()
}

/// What a replica reads from others: a peer's list of keysets, and behind a first byte that is odd, the fields by which a
/// request says whose it is. What is accepted has one form, and no list is longer than what one replica holds.
pub(crate) fn peers(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    if which % 2 == 0 {
        let Some(digests) = KeysetList::digests(bytes) else {
            return;
        };
        assert!(digests.len() <= MAX_KEYSETS);
        let keysets = digests.iter().map(ToString::to_string).collect();
        let list = serde_json::to_vec(&KeysetList { keysets }).expect("a list is written");
        assert_eq!(KeysetList::digests(&list), Some(digests));
        return;
    }
    let mut headers = HeaderMap::new();
    for (line, name) in
        bytes
            .split(|&b| b == b'\n')
            .zip([KEYSET_HINT, RELAYED_MARK, KEYSET_HINT, RELAYED_MARK])
    {
        if let Ok(value) = HeaderValue::from_bytes(line)
            && !line.is_empty()
        {
            headers.append(name, value);
        }
    }
    let Some(hint) = Hint::of(&headers) else {
        return;
    };
    let only = |name: &str| {
        let mut values = headers.get_all(name).iter();
        let first = values
            .next()
            .map(|value| value.to_str().expect("it was read").to_owned());
        assert!(values.next().is_none(), "a repeated field was read");
        first
    };
    assert_eq!(
        only(KEYSET_HINT),
        hint.keyset.map(|digest| digest.to_string())
    );
    assert_eq!(only(RELAYED_MARK).as_deref(), hint.relayed.then_some("1"));
}

pub(crate) fn peers_seeds() -> Vec<Vec<u8>> {
    let digest = "0a".repeat(32);
    let list = |count: usize| {
        let keysets = vec![digest.clone(); count];
        serde_json::to_vec(&KeysetList { keysets }).expect("a list is written")
    };
    let mut seeds = [0, 1, 3, MAX_KEYSETS + 1]
        .map(|count| [&[0], &list(count)[..]].concat())
        .to_vec();
    seeds.push(format!("\x01{digest}\n1").into_bytes());
    seeds.push(b"\x01\n1".to_vec());
    seeds
}

/// A tiny model behind the API.
struct Service {
    runtime: Runtime,
    router: Router,
}

impl Service {
    fn new() -> Self {
        let directory = scratch::directory();
        let path = directory.path().join("tiny.casemate");
        let (data_key, signing_key) = (DataKey::generate(), SigningKey::generate());
        let tiny = Tiny {
            hidden: 32,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            ffn: 32,
            context: 64,
            ..Tiny::default()
        };
        let options = SealOptions {
            version: 1,
            ..SealOptions::default()
        };
        seal(
            &tiny.build(),
            &options,
            &data_key,
            &signing_key,
            &path,
            &Silent,
        )
        .expect("a sealed model");
        let file = SealedFile::open(&path).expect("a sealed model");
        let unlocked = file.unlock(&data_key, &signing_key.verifying_key());
        let model = unlocked
            .and_then(|u| u.load(1, &Silent))
            .expect("a sealed model");
        let options = EngineOptions {
            compute: Compute::F32,
            threads: 1,
            max_context: 64,
            max_batch: 4,
            max_waiting: 16,
            ..EngineOptions::default()
        };
        let engine = Engine::load(model, &options, &Silent).expect("a tiny engine");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        // Everything that a provider may allow, so that there is the most to parse.
        let extraction = Extraction {
            logprobs: Logprobs::Rounded {
                top: 5,
                rounding: 0.1,
                perturbation: Some(0.5),
            },
            logit_bias: true,
        };
        let key = PerturbationKey::derive(&DataKey::from_bytes(&[1; 32]), &ModelDigest([2; 32]));
        let api = Api::new(engine, "tiny".into(), "fp_0".into(), || NOW);
        Service {
            runtime: runtime.expect("a runtime"),
            router: router(api.with_extraction(extraction, key)),
        }
    }
}

/// Answers that are not the service's fault.
const EXPECTED: [u16; 7] = [200, 400, 404, 413, 415, 422, 503];

/// The body of a request; the first byte chooses between chat and completions. The answer is one of the documented
/// ones and JSON or events, in time.
pub(crate) fn api(data: &[u8]) {
    static SERVICE: LazyLock<Service> = LazyLock::new(Service::new);
    let (which, body) = data.split_first().unwrap_or((&0, &[]));
    let path = match which % 2 {
        0 => "/v1/chat/completions",
        _ => "/v1/completions",
    };
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.to_vec()))
        .expect("a plain request");
    let answer = async {
        let response = SERVICE
            .router
            .clone()
            .oneshot(request)
            .await
            .expect("a router answers");
        let (head, body) = response.into_parts();
        (
            head,
            to_bytes(body, 16 << 20).await.expect("a whole answer"),
        )
    };
    let answer = SERVICE
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(30), answer).await });
    let (head, body) = answer.expect("an answer in time");
    assert!(EXPECTED.contains(&head.status.as_u16()), "{}", head.status);
    let events = head
        .headers
        .get("content-type")
        .is_some_and(|t| t == "text/event-stream");
    if events {
        assert!(body.ends_with(b"data: [DONE]\n\n"));
    } else {
        serde_json::from_slice::<serde_json::Value>(&body).expect("a JSON answer");
    }
}

pub(crate) fn api_seeds() -> Vec<Vec<u8>> {
    let chat = r#"{"model":"tiny","messages":[{"role":"system","content":"a"},{"role":"user","content":[{"type":"text",
        "text":"b"}]}],"max_tokens":3,"stream":true,"stream_options":{"include_usage":true},"temperature":0.5,"top_p":0.9,
        "top_k":5,"min_p":0.1,"presence_penalty":1,"frequency_penalty":-1,"repetition_penalty":1.1,"seed":7,"n":2,
        "stop":["x","y"]}"#;
    let tools = r#"{"model":"tiny","messages":[{"role":"user","content":"b"}],"max_completion_tokens":2,"logprobs":true,
        "top_logprobs":2,"logit_bias":{"5":-100},"response_format":{"type":"json_object"},"tools":[{"type":"function",
        "function":{"name":"f","description":"d","parameters":{"type":"object"}}}],"tool_choice":"auto"}"#;
    let shaped = r#"{"model":"tiny","messages":[{"role":"user","content":"b"}],"max_tokens":9,"logprobs":true,
        "top_logprobs":2,"logit_bias":{"5":-100,"7":3.5},"response_format":{"type":"json_object"},"stream":true}"#;
    let called = r#"{"model":"tiny","messages":[{"role":"user","content":"b"},{"role":"assistant","content":null,
        "tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool",
        "tool_call_id":"c","content":"r"}],"max_tokens":2}"#;
    let text = r#"{"model":"tiny","prompt":["a","b"],"max_tokens":2,"stop":"z","logprobs":1,"echo":false}"#;
    let tokens = r#"{"model":"tiny","prompt":[[1,2],[3]],"max_tokens":1}"#;
    [
        (0, chat),
        (0, tools),
        (0, shaped),
        (0, called),
        (1, text),
        (1, tokens),
    ]
    .map(|(which, body)| [&[which], body.as_bytes()].concat())
    .into()
}
