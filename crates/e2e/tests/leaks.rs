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
const API_KEY: &str = "the-api-key-canary-c01d3f";
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
    let mut model = Tiny::default().build();
    let largest = (0..model.data.len()).max_by_key(|&index| model.data[index].len());
    let data = &mut model.data[largest.unwrap()];
    let row = data.len() - data.len() % 4 - 10 * WEIGHTS.len();
    for place in data[row..].chunks_exact_mut(WEIGHTS.len()) {
        place.copy_from_slice(WEIGHTS);
    }
    gguf::write(&model, path).unwrap();
}

/// Everything up to the enclave's start, with people in the middle of both of its conversations.
fn stage() -> (Stage, Recorder) {
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
        ..EnclaveSettings::default()
    };
    let config = deployment.configure_enclave(&settings).unwrap();
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains(&broker.url));
    fs::write(&config, text.replace(&broker.url, &through)).unwrap();
    deployment.measure_enclave().unwrap();
    deployment.write_policies().unwrap();
    deployment.admit_model().unwrap();
    (stage, recorder)
}

/// Requests that are answered and requests that fail in many ways, each with canaries in it; returns the answers.
async fn converse(url: &str) -> Vec<String> {
    let client = Client::builder().no_proxy().build().unwrap();
    let chat = |more: Value| {
        let mut body = json!({
            "model": TINY, "max_tokens": 48, "seed": 7,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}],
        });
        let members = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(members);
        body.to_string()
    };
    let send = async |path: &str, body: String| {
        let request = client.post(format!("{url}{path}")).bearer_auth(API_KEY);
        let request = request
            .header("content-type", "application/json")
            .body(body);
        let response = request.send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    };
    let chat_path = "/v1/chat/completions";
    let mut answers = Vec::new();
    let (status, text) = send(chat_path, chat(json!({"temperature": 0}))).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let answer: Value = serde_json::from_str(&text).unwrap();
    answers.push(
        answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned(),
    );
    let (status, text) = send(chat_path, chat(json!({"stream": true}))).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"));
    let completion = json!({"model": TINY, "prompt": PROMPT, "max_tokens": 32}).to_string();
    assert_eq!(send("/v1/completions", completion).await.0, StatusCode::OK);
    for (path, body) in [
        (chat_path, chat(json!({"model": PROMPT}))),
        (chat_path, chat(json!({"audio": PROMPT}))),
        (chat_path, chat(json!({"max_tokens": PROMPT}))),
        (
            chat_path,
            chat(json!({"messages": [{"role": PROMPT, "content": PROMPT}]})),
        ),
        (
            chat_path,
            chat(json!({"messages": [{"role": "user", "content": PROMPT.repeat(1000)}]})),
        ),
        (chat_path, format!("{{\"{PROMPT}\": \"{PROMPT}\", {PROMPT}")),
        ("/v1/the-prompt-canary-5d1c0a", PROMPT.to_owned()),
    ] {
        let (status, text) = send(path, body).await;
        assert!(status.is_client_error(), "{status} {text}");
    }
    // Somebody who leaves in the middle of an answer.
    let endless = chat(json!({"stream": true, "max_tokens": 1500}));
    let request = client.post(format!("{url}{chat_path}")).body(endless);
    let mut response = request.bearer_auth(API_KEY).send().await.unwrap();
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

    let (mut stage, broker_middle) = stage();
    stage.deployment.start_enclave().unwrap();
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let (user_middle, through) = middle(&enclave);
    let proxy = stage.deployment.start_proxy_to(&through).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answers = runtime.block_on(converse(&proxy.url));

    let mut said = Canaries::new();
    said.add("the prompt", PROMPT.as_bytes());
    said.add("the system prompt", SYSTEM.as_bytes());
    said.add("an API key", API_KEY.as_bytes());
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

    // The model as the provider has it, its key, and the grant that carries the key are the only places.
    let told = [
        stage.path("tiny.gguf"),
        keys.data_key.clone(),
        work.join("grant"),
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
