//! Receipts over the real programs: a client's exact bytes, the proxy's bundle, the offline verdict.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{Deployment, Program};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// A deployment whose users have keys, and a proxy that saves receipts.
struct Setup {
    // Before the stage, whose enclave it uses.
    proxy: Program,
    stage: Stage,
    saved: PathBuf,
    alice: String,
    bob: String,
}

struct Exchange {
    id: String,
    request: PathBuf,
    answer: PathBuf,
}

impl Setup {
    fn new() -> Setup {
        let mut stage = Stage::until_enclave().unwrap();
        let (alice, bob) = (new_key(&stage, "alice"), new_key(&stage, "bob"));
        let keys = stage.deployment.keys().unwrap().clone();
        let model = stage.deployment.sealed().unwrap().path.clone();
        let paths = [&keys.data_key, &keys.signing_key, &model].map(|p| p.display().to_string());
        let [data_key, signing_key, model] = &paths;
        let granted = casemate(
            &stage,
            &[
                "grant",
                "--data-key",
                data_key,
                "--signing-key",
                signing_key,
                "--model",
                model,
                "--api-keys",
                "api-keys.toml",
                "--out",
                "keyed.grant",
            ],
        );
        assert!(granted.status.success(), "{}", shown(&granted));
        let grant = stage.path("keyed.grant").display().to_string();
        let resource = format!("default/model/{TINY}");
        let put = [
            "resource",
            "put",
            &resource,
            "--grant",
            &grant,
            "--service",
            TINY,
        ];
        stage.deployment.administer(&put.map(str::as_ref)).unwrap();
        let enclave = stage.deployment.start_enclave().unwrap();
        let saved = stage.path("receipts");
        let proxy = stage
            .deployment
            .launch("casemate-proxy", "casemate")
            .arg("proxy")
            .option("--policy", stage.path("user-policy.toml"))
            .option("--enclave", enclave.url)
            .option("--listen", "127.0.0.1:0")
            .option("--receipts", &saved)
            .serve(&stage.path("logs"), PATIENCE)
            .unwrap();
        Setup {
            proxy,
            stage,
            saved,
            alice,
            bob,
        }
    }

    fn send(
        &self,
        key: Option<&str>,
        path: &str,
        body: Option<&str>,
    ) -> (u16, Option<String>, Vec<u8>) {
        let url = format!("http://{}{path}", self.proxy.address());
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let client = reqwest::Client::builder().no_proxy().build().unwrap();
            let mut request = match body {
                Some(body) => client.post(url).body(body.to_owned()),
                None => client.get(url),
            };
            if let Some(key) = key {
                request = request.bearer_auth(key);
            }
            let response = request.send().await.unwrap();
            let field = response.headers().get("casemate-receipt");
            let id = field.map(|value| value.to_str().unwrap().to_owned());
            (
                response.status().as_u16(),
                id,
                response.bytes().await.unwrap().to_vec(),
            )
        })
    }

    /// Asks in alice's name and keeps both bodies as files.
    fn ask(&self, name: &str, path: &str, body: &str) -> Exchange {
        let (status, id, answer) = self.send(Some(&self.alice), path, Some(body));
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
        let exchange = Exchange {
            id: id.expect("an answer says under which id its receipt is"),
            request: self.stage.path(format!("{name}.request")),
            answer: self.stage.path(format!("{name}.answer")),
        };
        assert!(String::from_utf8_lossy(&answer).contains(&exchange.id));
        fs::write(&exchange.request, body).unwrap();
        fs::write(&exchange.answer, answer).unwrap();
        exchange
    }

    fn fetch(&self, key: Option<&str>, id: &str) -> (u16, Vec<u8>) {
        let (status, _, body) = self.send(key, &format!("/v1/receipts/{id}"), None);
        (status, body)
    }

    /// The bundle that the proxy saved by itself.
    fn bundle(&self, id: &str) -> PathBuf {
        let path = self.saved.join(format!("{id}.json"));
        let start = Instant::now();
        while !path.exists() {
            assert!(start.elapsed() < PATIENCE, "no receipt was saved");
            std::thread::sleep(Duration::from_millis(20));
        }
        path
    }

    fn verify(&self, bundle: &Path, more: &[&str]) -> Output {
        let bundle = bundle.display().to_string();
        let mut arguments = vec!["receipt", "verify", &bundle];
        if !more.contains(&"--policy") {
            arguments.extend(["--policy", "user-policy.toml"]);
        }
        arguments.extend(more);
        casemate(&self.stage, &arguments)
    }

    fn verify_exchange(&self, bundle: &Path, exchange: &Exchange) -> Output {
        let (request, answer) = (&exchange.request, &exchange.answer);
        let files = [request.to_str().unwrap(), answer.to_str().unwrap()];
        let more = ["--request", files[0], "--answer", files[1], "--json"];
        self.verify(bundle, &more)
    }
}

fn new_key(stage: &Stage, name: &str) -> String {
    let made = casemate(stage, &["apikey", "new", name, "--json"]);
    assert!(made.status.success(), "{}", shown(&made));
    json_of(&made)["key"].as_str().unwrap().to_owned()
}

fn casemate(stage: &Stage, arguments: &[&str]) -> Output {
    let programs = Deployment::programs_of_this_build().unwrap();
    Command::new(programs.join("casemate"))
        .current_dir(stage.deployment.work_dir())
        .args(arguments)
        .output()
        .unwrap()
}

fn shown(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", shown(output)))
}

/// The verdict is this denial.
#[track_caller]
fn denied(output: &Output, code: i32, claim: &str) {
    assert_eq!(output.status.code(), Some(code), "{}", shown(output));
    let verdict = json_of(output);
    assert_eq!(verdict["denial"]["claim"], claim, "{verdict}");
    assert!(verdict.get("proven").is_none(), "{verdict}");
}

fn flip(path: &Path, at: usize) -> PathBuf {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    let flipped = path.with_extension("flipped");
    fs::write(&flipped, bytes).unwrap();
    flipped
}

const CHAT: &str = "/v1/chat/completions";

#[test]
fn a_users_answer_can_be_proven_offline_and_nothing_near_it() {
    let setup = Setup::new();
    // White space as a client may have it: the bytes are hashed, not the JSON.
    let body = format!(
        "{{ \"model\":\"{TINY}\",\n  \"messages\": [{{\"role\":\"user\",\"content\":\"canary-91ab\"}}], \"max_tokens\":8 }}"
    );
    let whole = setup.ask("whole", CHAT, &body);
    let streamed =
        json!({"model": TINY, "prompt": "go", "stream": true, "max_tokens": 6, "seed": 3});
    let streamed = setup.ask("streamed", "/v1/completions", &streamed.to_string());

    let mut counters = Vec::new();
    for exchange in [&whole, &streamed] {
        let bundle = setup.bundle(&exchange.id);
        let mode = fs::metadata(&bundle).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // What the proxy hands out is what it saved.
        let (status, fetched) = setup.fetch(Some(&setup.alice), &exchange.id);
        assert_eq!(status, 200);
        assert_eq!(fetched, fs::read(&bundle).unwrap());
        assert!(!String::from_utf8(fetched).unwrap().contains("canary"));

        let output = setup.verify_exchange(&bundle, exchange);
        assert_eq!(output.status.code(), Some(0), "{}", shown(&output));
        let verdict = json_of(&output);
        assert_eq!(
            (&verdict["verdict"], &verdict["tee"]),
            (&json!("trusted"), &json!(false))
        );
        let checks = verdict["transcript"]["checks"].as_array().unwrap();
        for name in [
            "report_data",
            "receipt.signature",
            "receipt.model",
            "request",
            "answer",
        ] {
            assert!(
                checks
                    .iter()
                    .any(|c| c["name"] == name && c["status"] == "passed"),
                "{name}: {verdict}"
            );
        }
        let list = |name: &str| verdict[name].to_string();
        assert!(list("proven").contains("exactly this request"), "{verdict}");
        assert!(list("not_proven").contains("not a TEE"), "{verdict}");
        counters.push(verdict["claims"]["receipt"]["counter"].as_u64().unwrap());
    }
    assert_eq!(counters, [1, 2]);

    // Without the files they are skipped, and the text says that it proves less.
    let bundle = setup.bundle(&whole.id);
    let output = setup.verify(&bundle, &[]);
    assert_eq!(output.status.code(), Some(0));
    let text = shown(&output);
    for part in [
        "skipped  request",
        "skipped  answer",
        "NOT A TEE",
        "\nNOT proven\n",
        "Which answer: none was given",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let output = casemate(&setup.stage, &["receipt", "show", bundle.to_str().unwrap()]);
    assert!(
        shown(&output).contains("NOT VERIFIED"),
        "{}",
        shown(&output)
    );
    assert!(shown(&output).contains(&whole.id), "{}", shown(&output));

    // One byte of the request, a cut answer, somebody else's receipt, an altered one, another time.
    let altered = Exchange {
        request: flip(&whole.request, 40),
        ..clone(&whole)
    };
    denied(&setup.verify_exchange(&bundle, &altered), 20, "request");
    let cut = setup.stage.path("cut");
    let answer = fs::read(&whole.answer).unwrap();
    fs::write(&cut, &answer[..answer.len() - 1]).unwrap();
    let altered = Exchange {
        answer: cut,
        ..clone(&whole)
    };
    denied(&setup.verify_exchange(&bundle, &altered), 20, "answer");
    let other = setup.bundle(&streamed.id);
    denied(&setup.verify_exchange(&other, &whole), 20, "request");
    let at = fs::read_to_string(&bundle)
        .unwrap()
        .find("\"receipt\"")
        .unwrap()
        + 300;
    let altered = flip(&bundle, at);
    let code = setup.verify_exchange(&altered, &whole).status.code();
    assert!(matches!(code, Some(10 | 20)), "{code:?}");
    denied(
        &setup.verify(&bundle, &["--at", "2020-01-01T00:00:00Z", "--json"]),
        20,
        "collateral.validity",
    );

    // Policies that do not name this model, this issuer, this root.
    let policy = fs::read_to_string(setup.stage.path("user-policy.toml")).unwrap();
    let deployment = &setup.stage.deployment;
    let digest = &deployment.sealed().unwrap().digest;
    let issuer = &deployment.broker().unwrap().issuer;
    let root = &deployment.fake_tee().unwrap().root_spki;
    for (fact, code, claim) in [
        (digest, 30, "model.digest"),
        (issuer, 30, "credential.issuer"),
        (root, 20, "root_of_trust"),
    ] {
        fs::write(
            setup.stage.path("other.toml"),
            policy.replace(fact, &"ab".repeat(32)),
        )
        .unwrap();
        denied(
            &setup.verify(&bundle, &["--policy", "other.toml", "--json"]),
            code,
            claim,
        );
    }
}

fn clone(exchange: &Exchange) -> Exchange {
    Exchange {
        id: exchange.id.clone(),
        request: exchange.request.clone(),
        answer: exchange.answer.clone(),
    }
}

#[test]
fn another_api_key_gets_no_receipt_and_learns_of_none() {
    let setup = Setup::new();
    let body =
        json!({"model": TINY, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    let exchange = setup.ask("one", CHAT, &body.to_string());
    let unknown = setup.fetch(Some(&setup.bob), &format!("chatcmpl-{}", "0".repeat(32)));
    assert_eq!(unknown.0, 404);
    let error: Value = serde_json::from_slice(&unknown.1).unwrap();
    assert_eq!(error["error"]["code"], "receipt_not_found");
    assert_eq!(setup.fetch(Some(&setup.bob), &exchange.id), unknown);
    assert_eq!(setup.fetch(None, &exchange.id).0, 401);
    assert_eq!(setup.fetch(Some(&setup.alice), &exchange.id).0, 200);
}
