//! Nothing secret is written anywhere or seen by anybody: prompts, answers, API keys, data keys and weights that can be
//! recognised pass through a deployment at its most talkative, and every byte that its programs wrote or sent is
//! searched for them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use casemate_e2e::canary::Canaries;
use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{Deployment, EnclaveSettings, Recorder, Role, http_get};
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

const PROMPT: &str = "the-prompt-canary-5d1c0a";
const SYSTEM: &str = "the-system-canary-77b2e9";
/// Who asks with a key that is not listed writes it down nowhere, too.
const WRONG_KEY: &str = "the-wrong-key-canary-c01d3f";
const TOOL: &str = "the_tool_canary_8b1d42";
const SCHEMA: &str = "the-schema-canary-f29a60";
const STOP: &str = "the-stop-canary-40e7b3";
const USER: &str = "the-user-canary-9d6c18";
/// A bias. It is a number for the parser, and still to be recognised if that is printed.
const BIAS: &str = "27.182818";
/// In requests that are refused, and nowhere else.
const REFUSED: &str = "the-refused-canary-1ec5d7";
/// Six numbers between 0.007 and 0.25 as little-endian f32.
const WEIGHTS: &[u8; 24] = b"cmw<lea=kca>nar<y5d=1c0>";

/// Somebody before a server's URL, and the URL to go through it.
fn middle(url: &str) -> (Recorder, String) {
    let server = url.trim_start_matches("http://").parse().unwrap();
    let recorder = Recorder::start(server, None).unwrap();
    let url = format!("http://{}", recorder.address());
    (recorder, url)
}

/// A tiny model, one row of whose embedding is [`WEIGHTS`] again and again.
fn model_with_canary(path: &Path) {
    let tiny = Tiny {
        context: 2048,
        ..Tiny::default()
    };
    let mut model = tiny.build();
    model.offer_calls();
    let largest = (0..model.data.len()).max_by_key(|&index| model.data[index].len());
    let data = &mut model.data[largest.unwrap()];
    let row = data.len() - data.len() % 4 - 10 * WEIGHTS.len();
    for place in data[row..].chunks_exact_mut(WEIGHTS.len()) {
        place.copy_from_slice(WEIGHTS);
    }
    gguf::write(&model, path).unwrap();
}

/// Everything up to the enclave's start, with people in the middle of both of its conversations; and the API key that
/// the grant lists.
fn stage() -> (Stage, Recorder, String) {
    let mut stage = Stage::new().unwrap();
    let model = stage.path("tiny.gguf");
    model_with_canary(&model);
    let deployment = &mut stage.deployment;
    deployment.log_everything();
    deployment.start_fake_tee().unwrap();
    let broker = deployment.start_broker().unwrap();
    let (recorder, through) = middle(&broker.url);
    deployment.keygen().unwrap();
    deployment.seal(&model, TINY, 1).unwrap();
    let settings = EnclaveSettings {
        threads: 1,
        extraction: "logprobs = { top = 3, rounding = 0.1 }\nlogit_bias = true",
        ..EnclaveSettings::default()
    };
    let config = deployment.configure_enclave(&settings).unwrap();
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains(&broker.url));
    fs::write(&config, text.replace(&broker.url, &through)).unwrap();
    deployment.measure_enclave().unwrap();
    deployment.write_policies().unwrap();
    // Listed before the grant is made, so its hash is in the grant, the broker's database and the enclave.
    let key = deployment.api_key("somebody", &[]).unwrap();
    deployment.admit_model().unwrap();
    (stage, recorder, key)
}

/// Requests that are answered and requests that fail in many ways, each with canaries in it; returns the answers.
async fn converse(url: &str, key: &str) -> Vec<String> {
    let client = Client::builder().no_proxy().build().unwrap();
    let chat = |more: Value| {
        let mut body = json!({
            "model": TINY, "max_tokens": 48, "seed": 7, "user": USER,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}],
        });
        let members = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(members);
        body.to_string()
    };
    let send = async |path: &str, key: &str, body: String| {
        let request = client.post(format!("{url}{path}")).bearer_auth(key);
        let request = request
            .header("content-type", "application/json")
            .body(body);
        let response = request.send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    };
    let chat_path = "/v1/chat/completions";
    let mut answers = Vec::new();
    let (status, text) = send(chat_path, key, chat(json!({"temperature": 0}))).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    answers.push(
        answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned(),
    );
    let (status, text) = send(chat_path, key, chat(json!({"stream": true}))).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"));
    let completion = json!({"model": TINY, "prompt": PROMPT, "max_tokens": 32}).to_string();
    let (status, text) = send("/v1/completions", key, completion).await;
    assert_eq!(status, StatusCode::OK, "{text}");

    // Everything else that a user may say. Bound to a schema, an answer spells the canary in it.
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": [SCHEMA],
        "properties": {SCHEMA: {"enum": [SCHEMA]}},
    });
    let tool = |description: &str, parameters: &Value| {
        json!([{"type": "function", "function": {
            "name": TOOL, "description": description, "strict": true, "parameters": parameters,
        }}])
    };
    let format = json!({"type": "json_schema", "json_schema": {"name": TOOL, "schema": schema}});
    let bias: Value = serde_json::from_str(&format!("{{\"5\": -{BIAS}, \"9\": {BIAS}}}")).unwrap();
    for (more, said) in [
        (
            json!({"tools": tool(SCHEMA, &schema), "stop": STOP, "logit_bias": bias}),
            "",
        ),
        (
            json!({"tools": tool(SCHEMA, &schema), "tool_choice": "required", "max_tokens": 300}),
            TOOL,
        ),
        (
            json!({"response_format": format, "max_tokens": 300, "metadata": {"a": USER}}),
            SCHEMA,
        ),
    ] {
        let (status, text) = send(chat_path, key, chat(more)).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        assert!(text.contains(said), "{text}");
    }

    // A refusal tells the requester what was wrong, and the text of it is for nobody else.
    let unknown = json!({"type": "object", REFUSED: 1});
    let bad_tool = tool(REFUSED, &unknown);
    for (path, key, body) in [
        (chat_path, key, chat(json!({"model": REFUSED}))),
        (chat_path, key, chat(json!({"audio": REFUSED}))),
        (chat_path, key, chat(json!({REFUSED: 1}))),
        (chat_path, key, chat(json!({"max_tokens": REFUSED}))),
        (chat_path, key, chat(json!({"tools": bad_tool}))),
        (chat_path, key, chat(json!({"stop": [REFUSED, ""]}))),
        (chat_path, key, chat(json!({"logit_bias": {REFUSED: 1}}))),
        (chat_path, key, chat(json!({"user": REFUSED.repeat(100)}))),
        (
            chat_path,
            key,
            chat(json!({"messages": [{"role": REFUSED, "content": REFUSED}]})),
        ),
        (
            chat_path,
            key,
            chat(json!({"messages": [{"role": "user", "content": REFUSED.repeat(1000)}]})),
        ),
        (
            chat_path,
            key,
            format!("{{\"{REFUSED}\": \"{REFUSED}\", {REFUSED}"),
        ),
        (&format!("/v1/{REFUSED}"), key, REFUSED.to_owned()),
    ] {
        let (status, text) = send(path, key, body).await;
        assert!(
            status == StatusCode::BAD_REQUEST || status == StatusCode::NOT_FOUND,
            "{status} {text}"
        );
    }
    // The key is what opens the door.
    for key in [WRONG_KEY, REFUSED] {
        let (status, text) = send(chat_path, key, chat(json!({"user": REFUSED}))).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{text}");
    }
    // Somebody who leaves in the middle of an answer.
    let endless = chat(json!({"stream": true, "max_tokens": 1500}));
    let request = client.post(format!("{url}{chat_path}")).body(endless);
    let mut response = request.bearer_auth(key).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    response.chunk().await.unwrap();
    answers
}

/// The contents of every file below `directory`.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let kind = fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.extend(files(&path));
        } else if kind.is_file() {
            let contents = fs::read(&path).unwrap();
            found.push((path, contents));
        }
    }
    found
}

/// What a process holds in memory that it can write to; nothing where the system does not let us look.
fn memory(pid: u32) -> io::Result<Vec<u8>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut all = Vec::new();
    for line in maps
        .lines()
        .filter(|line| line.split(' ').nth(1).is_some_and(|m| m.starts_with("rw")))
    {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let (start, end) = range.expect("a range of addresses");
        let parse = |hex: &str| u64::from_str_radix(hex, 16).expect("an address");
        let (start, end) = (parse(start), parse(end));
        // Page by page: what was never touched may not be readable.
        for page in (start..end).step_by(4096) {
            let mut bytes = [0; 4096];
            if memory.read_at(&mut bytes, page).is_ok() && bytes != [0; 4096] {
                all.extend_from_slice(&bytes);
            }
        }
    }
    Ok(all)
}

/// Files that a process has open, apart from devices and kernel interfaces.
fn open_files(pid: u32) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let system = |path: &PathBuf| {
        ["/dev", "/proc", "/sys"]
            .iter()
            .any(|s| path.starts_with(s))
    };
    targets
        .filter(|path| path.is_absolute() && !system(path))
        .collect()
}

fn core_limit(pid: u32) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    line.split_whitespace().nth(4).unwrap().to_owned()
}

fn listing(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    paths
}

#[test]
fn no_secret_is_written_anywhere_or_seen_by_anybody() {
    // As much as we may allow: programs that did not turn cores off would leave them.
    let core = rustix::process::getrlimit(rustix::process::Resource::Core);
    let allowed = rustix::process::Rlimit {
        current: core.maximum,
        maximum: core.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Core, allowed).unwrap();
    let here = std::env::current_dir().unwrap();
    let before = listing(&here);

    let (mut stage, broker_middle, key) = stage();
    stage.deployment.start_enclave().unwrap();
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let (user_middle, through) = middle(&enclave);
    let proxy = stage.deployment.start_proxy_to(&through).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answers = runtime.block_on(converse(&proxy.url, &key));

    let mut said = Canaries::new();
    said.add("the prompt", PROMPT.as_bytes());
    said.add("the system prompt", SYSTEM.as_bytes());
    for (name, secret) in [
        ("a name of a function", TOOL),
        ("a schema", SCHEMA),
        ("a stop string", STOP),
        ("a user's name", USER),
        ("a bias", BIAS),
        ("a refused request", REFUSED),
        ("an unknown API key", WRONG_KEY),
        ("an API key", key.as_str()),
    ] {
        said.add(name, secret.as_bytes());
    }
    let digits = key.strip_prefix("cm-").expect("an API key");
    said.add("an API key's bytes", &hex::decode(digits).unwrap());
    for answer in &answers {
        said.add("an answer", answer.as_bytes());
    }
    let keys = stage.deployment.keys().unwrap().clone();
    let data_key = casemate_container::DataKey::read_file(&keys.data_key).unwrap();
    let mut secrets = Canaries::new();
    secrets.add("the data key", data_key.expose());
    secrets.add("the weights", WEIGHTS);

    let search = |what: &str, bytes: &[u8]| {
        assert_eq!(said.find(bytes), None, "{what}");
        assert_eq!(secrets.find(bytes), None, "{what}");
    };
    // The people in the middle, who have seen something at least.
    let recorders = [
        ("broker and enclave", &broker_middle),
        ("user and enclave", &user_middle),
    ];
    for (what, recorder) in recorders {
        let mut length = 0;
        for seen in recorder.recordings() {
            length += seen.to_server.len().min(seen.to_client.len());
            search(what, &seen.to_server);
            search(what, &seen.to_client);
        }
        assert!(length > 2048, "{length} bytes between {what}");
    }
    // What anybody may ask for.
    let broker = stage.deployment.broker().unwrap().url.clone();
    for url in [&enclave, &broker] {
        let metrics = http_get(url, "/metrics").unwrap();
        assert_eq!(metrics.status, 200);
        search("metrics", metrics.body.as_bytes());
    }
    // The memory of who must not have been told: for the broker, what users said.
    let pid = |stage: &mut Stage, role| stage.deployment.program(role).unwrap().pid();
    for (role, all) in [(Role::FakeTee, true), (Role::Broker, false)] {
        match memory(pid(&mut stage, role)) {
            Err(error) => eprintln!("skipped: the memory of {role:?} cannot be read: {error}"),
            Ok(memory) => {
                assert!(memory.len() > 64 << 10);
                assert_eq!(said.find(&memory), None, "the memory of {role:?}");
                assert!(
                    !all || secrets.find(&memory).is_none(),
                    "the memory of {role:?}"
                );
            }
        }
    }
    // Files: only below the directory that the programs were told, and nothing in them.
    let work = stage.deployment.work_dir().to_path_buf();
    for role in [Role::FakeTee, Role::Broker, Role::Enclave, Role::Proxy] {
        for path in open_files(pid(&mut stage, role)) {
            assert!(
                path.starts_with(&work),
                "{role:?} has {} open",
                path.display()
            );
        }
    }
    // Crashes leave nothing.
    for role in [Role::Proxy, Role::Enclave, Role::Broker] {
        let pid = pid(&mut stage, role);
        let limit = core_limit(pid);
        assert!(
            limit == "1" || limit == "0",
            "{role:?} may write cores of {limit} bytes"
        );
        let raw = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(raw.unwrap(), rustix::process::Signal::ABORT).unwrap();
        let program = stage.deployment.program(role).unwrap();
        let ended = program.wait_until("its end", std::time::Duration::from_secs(20), || false);
        let ended = ended.unwrap_err().to_string();
        assert!(
            ended.contains("signal: 6") && !ended.contains("core dumped"),
            "{ended}"
        );
    }
    assert_eq!(
        listing(&here),
        before,
        "a program wrote into its working directory"
    );

    // The model as the provider has it, its key, and the grant that carries the key are the only places; and for the API
    // key, what `casemate apikey new` printed, which the deployment keeps.
    let told = [
        stage.path("tiny.gguf"),
        keys.data_key.clone(),
        work.join("grant"),
        work.join("logs/casemate-apikey.log"),
    ];
    let mut searched = 0;
    for (path, contents) in files(&work) {
        if !told
            .iter()
            .any(|told| fs::canonicalize(told).is_ok_and(|told| told == path))
        {
            search(&path.display().to_string(), &contents);
            searched += 1;
        }
    }
    assert!(searched >= 12, "only {searched} files");
    // They are found where they are: the search can find.
    assert_eq!(
        secrets.find(&fs::read(&told[0]).unwrap()),
        Some("the weights")
    );
    assert_eq!(
        secrets.find(&fs::read(&told[2]).unwrap()),
        Some("the data key")
    );
    let printed = fs::read(&told[3]).unwrap();
    assert_eq!(said.find(&printed), Some("an API key"));
    assert_eq!(secrets.find(&printed), None);
    assert_eq!(said.find(&fs::read(&told[2]).unwrap()), None, "the grant");
    // And the programs did say what they could.
    let log = fs::read_to_string(work.join("logs/casemate-proxy.log")).unwrap();
    assert!(log.contains("DEBUG") || log.contains("TRACE"), "{log}");
}

/// A real panic of a real program: it cannot print. The message, which could quote anything, is withheld.
#[test]
fn a_panic_of_a_program_says_where_and_not_what() {
    let stage = Stage::new().unwrap();
    let programs = Deployment::programs_of_this_build().unwrap();
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let output = Command::new(programs.join("casemate-broker"))
        .arg("init")
        .arg("--state")
        .arg(stage.path("state"))
        .env_clear()
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{shown}");
    assert!(shown.contains("panicked at"), "{shown}");
    assert!(shown.contains("the message is withheld"), "{shown}");
    assert!(!shown.contains("failed printing"), "{shown}");
}
