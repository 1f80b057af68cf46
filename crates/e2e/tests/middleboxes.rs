//! Between the user and two replicas stands nginx, which ends TLS, and somebody who records everything.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use casemate_e2e::search::{Message, holds, messages};
use casemate_e2e::{Stage, TINY};
use casemate_testkit::data;
use casemate_testkit::deployment::{
    CertificateFacts, Deployment, DeploymentError, Recorder, Role, TlsEnds, http_get,
};
use reqwest::Response;
use serde_json::{Value, json};

const GATEWAY_PATH: &str = "/.well-known/ohttp-gateway";
const MEDIA_TYPE: &str = "message/ohttp-chunked-req";

/// Two replicas that serve, or nothing on a machine without nginx.
fn replicas() -> Option<(Stage, Vec<SocketAddr>, CertificateFacts)> {
    replicas_after(|_| {})
}

/// The same, after something else was done.
fn replicas_after(
    prepare: impl FnOnce(&mut Deployment),
) -> Option<(Stage, Vec<SocketAddr>, CertificateFacts)> {
    if !Deployment::has_nginx() {
        data::skip::<()>("nginx-light is not installed");
        return None;
    }
    let mut stage = Stage::until_replicas(2).unwrap();
    prepare(&mut stage.deployment);
    let mut addresses = Vec::new();
    for index in 0..2 {
        let url = stage.deployment.start_replica(index).unwrap().url;
        addresses.push(url.strip_prefix("http://").unwrap().parse().unwrap());
    }
    let certificate = stage.deployment.make_certificate().unwrap();
    Some((stage, addresses, certificate))
}

fn figure(replica: SocketAddr, name: &str) -> f64 {
    let metrics = http_get(&format!("http://{replica}"), "/metrics")
        .unwrap()
        .body;
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}"))
        .parse()
        .unwrap()
}

async fn post(url: &str, body: &Value) -> Response {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(format!("{url}/v1/chat/completions"));
    request.json(body).send().await.unwrap()
}

fn chat(prompt: &str, max_tokens: u32) -> Value {
    let messages = json!([{"role": "user", "content": prompt}]);
    json!({"model": TINY, "temperature": 0, "max_tokens": max_tokens, "messages": messages})
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().unwrap()
}

#[test]
fn two_replicas_behind_nginx_serve_as_one_and_survive_the_death_of_either() {
    let Some((mut stage, addresses, certificate)) = replicas() else {
        return;
    };
    let deployment = &mut stage.deployment;
    let gateway = deployment.start_nginx(&certificate, &addresses).unwrap();
    // Without its authority the gateway is not believed to be one.
    let unknown = deployment.start_proxy_to(&gateway.url);
    assert!(
        matches!(&unknown, Err(DeploymentError::Ended { status, .. }) if status.code() == Some(40))
    );
    let proxy = deployment
        .start_proxy_through(&gateway.url, Some(&certificate.authority))
        .unwrap();

    let runtime = runtime();
    let ask = || {
        runtime.block_on(async {
            let response = post(&proxy.url, &chat("hello", 4)).await;
            let status = response.status();
            let text = response.text().await.unwrap();
            assert_eq!(status, 200, "{text}");
        });
    };
    (0..6).for_each(|_| ask());
    // nginx takes turns, so half of the requests came to the replica that cannot open them.
    let opened = |i: usize| figure(addresses[i], "casemate_requests_total");
    let relayed = |i: usize| figure(addresses[i], "casemate_requests_relayed_total");
    let holder = usize::from(opened(1) > 0.0);
    let other = 1 - holder;
    assert_eq!((opened(holder), opened(other)), (6.0, 0.0));
    assert_eq!((relayed(holder), relayed(other)), (0.0, 3.0));

    // Who hangs up is forgotten, on both ways.
    for _ in 0..2 {
        runtime.block_on(async {
            let mut endless = chat("go on", 100_000);
            endless["stream"] = true.into();
            endless["n"] = 8.into();
            let mut response = post(&proxy.url, &endless).await;
            assert_eq!(response.status(), 200);
            response.chunk().await.unwrap().unwrap();
        });
    }
    let held = || {
        figure(addresses[holder], "casemate_requests_running")
            + figure(addresses[other], "casemate_relays_running")
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while held() > 0.0 {
        assert!(Instant::now() < deadline, "abandoned answers still run");
        std::thread::sleep(Duration::from_millis(20));
    }

    // The replica that holds the proxy's keyset dies. Its user notices nothing: the gateway tries the next, which does
    // not know the keyset and cannot reach who does; the proxy verifies again and sends the request once more.
    let deployment = &mut stage.deployment;
    deployment.program(Role::Replica(holder)).unwrap().kill();
    (0..4).for_each(|_| ask());
    assert_eq!(opened(other), 4.0);
    // It comes back, with other keys, and the other one dies.
    stage.deployment.start_replica(holder).unwrap();
    (0..2).for_each(|_| ask());
    stage
        .deployment
        .program(Role::Replica(other))
        .unwrap()
        .kill();
    (0..4).for_each(|_| ask());
    assert!(opened(holder) >= 4.0);
}

/// By the replica that can open the request, while most of it is still to come: through nginx, and half of the times through
/// the other replica.
#[test]
fn a_wrong_api_key_is_told_through_gateway_and_replica_however_large_the_request_is() {
    let mut alice = String::new();
    let prepared = replicas_after(|deployment| {
        alice = deployment.api_key("alice", &[]).unwrap();
        deployment.admit_model().unwrap();
    });
    let Some((mut stage, addresses, certificate)) = prepared else {
        return;
    };
    let deployment = &mut stage.deployment;
    let gateway = deployment.start_nginx(&certificate, &addresses).unwrap();
    let proxy = deployment
        .start_proxy_through(&gateway.url, Some(&certificate.authority))
        .unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let runtime = runtime();
    let ask = |key: &str, prompt: &str| {
        let request = client.post(format!("{}/v1/chat/completions", proxy.url));
        let request = request.bearer_auth(key).json(&chat(prompt, 1));
        runtime.block_on(async {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        })
    };
    let large = "go ".repeat(1_300_000);
    for _ in 0..6 {
        let (status, text) = ask("cm-a wrong key", &large);
        assert_eq!(status, 401, "{text}");
        assert!(text.contains("invalid_api_key"), "{text}");
    }
    let relayed = |i: usize| figure(addresses[i], "casemate_requests_relayed_total");
    assert_eq!(relayed(0) + relayed(1), 3.0);
    assert_eq!(ask(&alice, "go").0, 200);
}

#[test]
fn a_replica_takes_for_a_peer_only_what_is_a_peers() {
    let mut stage = Stage::until_replicas(2).unwrap();
    let url = stage.deployment.start_replica(0).unwrap().url;
    let second = stage.deployment.start_replica(1).unwrap().url;
    let keysets = |url: &str| {
        let list: Value =
            serde_json::from_str(&http_get(url, "/v1/keysets").unwrap().body).unwrap();
        let keysets = list["keysets"].as_array().unwrap().clone();
        assert_eq!(keysets.len(), 1, "{list}");
        keysets[0].as_str().unwrap().to_owned()
    };
    let (own, peers) = (keysets(&url), keysets(&second));
    assert_ne!(own, peers);
    let nobodys = "ab".repeat(32);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let send = async |media_type: &str, fields: &[(&'static str, &str)]| {
        let mut request = client
            .post(format!("{url}{GATEWAY_PATH}"))
            .header("content-type", media_type)
            .body(vec![0_u8; 2000]);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let (keyset, mark) = ("casemate-keyset", "casemate-relayed");
    runtime().block_on(async {
        // What a replica relayed is never relayed again.
        assert_eq!(
            send(MEDIA_TYPE, &[(keyset, &peers), (mark, "1")]).await.0,
            421
        );
        assert_eq!(
            send(MEDIA_TYPE, &[(keyset, &nobodys), (mark, "1")]).await.0,
            421
        );
        let (status, text) = send(MEDIA_TYPE, &[(keyset, &nobodys)]).await;
        assert!(
            status == 400 && text.contains("#ohttp-key"),
            "{status} {text}"
        );
        assert_eq!(send(MEDIA_TYPE, &[(keyset, "ab")]).await.0, 400);
        assert_eq!(
            send(MEDIA_TYPE, &[(keyset, &own), (keyset, &own)]).await.0,
            400
        );
        assert_eq!(send("application/json", &[(keyset, &peers)]).await.0, 415);
        // Noise of the peer's keyset reaches the peer, which refuses it as it would its own.
        let (status, text) = send(MEDIA_TYPE, &[(keyset, &peers)]).await;
        assert!(
            status == 400 && text.contains("cannot be opened"),
            "{status} {text}"
        );
    });
    let refused = |url: &str| {
        let address = url.strip_prefix("http://").unwrap().parse().unwrap();
        figure(address, "casemate_requests_refused_total")
    };
    assert_eq!(refused(&second), 1.0);
}

#[test]
fn tokens_pass_nginx_one_by_one() {
    let Some((mut stage, addresses, certificate)) = replicas() else {
        return;
    };
    let recorders = [0, 1].map(|i| Recorder::start(addresses[i], None).unwrap());
    let behind = recorders.each_ref().map(Recorder::address);
    let deployment = &mut stage.deployment;
    let gateway = deployment.start_nginx(&certificate, &behind).unwrap();
    let proxy = deployment
        .start_proxy_through(&gateway.url, Some(&certificate.authority))
        .unwrap();
    let hold = |bytes| recorders.iter().for_each(|r| r.hold_answers_after(bytes));
    runtime().block_on(async {
        // Once over the replica that holds the key, once relayed.
        for _ in 0..2 {
            // Room for the head and four frames; an event takes one frame, 537 bytes with the framing of HTTP.
            let mut passing = 2500;
            hold(passing);
            let mut body = chat("go on", 60);
            body["stream"] = true.into();
            let mut response = post(&proxy.url, &body).await;
            assert_eq!(response.status(), 200);
            let mut received = String::new();
            let events = |text: &str| text.matches("data: ").count();
            for _ in 0..20 {
                let before = events(&received);
                // Nothing that nginx or the proxy could wait for comes before this event was received.
                while events(&received) == before {
                    let next = tokio::time::timeout(Duration::from_secs(120), response.chunk());
                    let piece = next
                        .await
                        .expect("the event is held back by nobody we know");
                    received += std::str::from_utf8(&piece.unwrap().unwrap()).unwrap();
                }
                assert!(!received.contains("[DONE]"), "{received}");
                passing += 2 * 537;
                hold(passing);
            }
            recorders.iter().for_each(Recorder::release_answers);
            while let Some(piece) = response.chunk().await.unwrap() {
                received += std::str::from_utf8(&piece).unwrap();
            }
            assert!(received.ends_with("data: [DONE]\n\n"), "{received}");
        }
    });
    let relayed = |i: usize| figure(addresses[i], "casemate_requests_relayed_total");
    assert_eq!(relayed(0) + relayed(1), 1.0);
}

/// What `docs/channel.md` makes of a request whose binary HTTP was padded to `padded` bytes.
fn encapsulated(padded: usize) -> usize {
    let sealed = |plaintext: usize| plaintext + 16;
    let length = |bytes: usize| {
        if bytes < 64 {
            1
        } else if bytes < 16384 {
            2
        } else {
            4
        }
    };
    let chunk = |plaintext: usize| length(sealed(plaintext)) + sealed(plaintext);
    let (whole, rest) = (padded / 16384, padded % 16384);
    let last = 1 + sealed(0);
    7 + 1120 + whole * chunk(16384) + if rest > 0 { chunk(rest) } else { 0 } + last
}

/// The same for an answer of `frames` frames.
fn answered(frames: usize) -> usize {
    16 + frames * (2 + 512 + 16) + 1 + 16
}

/// Exchanges with the encrypted door among everything that was recorded.
fn exchanges(recorder: &Recorder) -> Vec<(Message, Message)> {
    let recordings = recorder.recordings();
    let all = recordings.iter().flat_map(|recording| {
        let requests = messages(&recording.to_server);
        let answers = messages(&recording.to_client);
        assert_eq!(requests.len(), answers.len());
        requests.into_iter().zip(answers)
    });
    all.filter(|(request, _)| request.head.starts_with(&format!("post {GATEWAY_PATH} ")))
        .collect()
}

#[test]
fn a_recorder_in_the_middle_finds_neither_words_nor_lengths() {
    let Some((mut stage, addresses, certificate)) = replicas() else {
        return;
    };
    let behind = [0, 1].map(|i| Recorder::start(addresses[i], None).unwrap());
    let deployment = &mut stage.deployment;
    let gateway = deployment
        .start_nginx(&certificate, &behind.each_ref().map(Recorder::address))
        .unwrap();
    let sealed = Recorder::start(gateway.address, None).unwrap();
    // This one holds the gateway's key.
    let ends = TlsEnds::new(&certificate).unwrap();
    let before = Recorder::start(sealed.address(), Some(ends)).unwrap();
    let proxy = deployment
        .start_proxy_through(
            &format!("https://{}", before.address()),
            Some(&certificate.authority),
        )
        .unwrap();

    let canary = "canary-77e2c4b1";
    // Also what stands in every request and answer.
    let mut words = vec![
        canary.to_owned(),
        "chat.completion".into(),
        "max_tokens".into(),
    ];
    // Sizes of prompts, and tokens of answers.
    let cases = [
        (0, 1),
        (1, 9),
        (40, 2),
        (300, 60),
        (700, 30),
        (1500, 4),
        (9000, 1),
    ];
    runtime().block_on(async {
        for (filler, tokens) in cases {
            let body = chat(&format!("{canary}{}", "x".repeat(filler)), tokens);
            let response = post(&proxy.url, &body).await;
            let status = response.status();
            let answer: Value = response.json().await.unwrap();
            // Longer ones do not fit into the context: errors travel like answers.
            assert_eq!(status, if filler > 400 { 400 } else { 200 }, "{answer}");
            let text = answer["choices"][0]["message"]["content"].as_str();
            // Shorter ones occur in noise.
            words.extend(text.filter(|text| text.len() >= 12).map(str::to_owned));
        }
        let mut body = chat(canary, 20);
        body["stream"] = true.into();
        let text = post(&proxy.url, &body).await.text().await.unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    });
    assert!(
        words.len() > 3,
        "the model says too little to be found: {words:?}"
    );

    let recorders = [&behind[0], &behind[1], &sealed, &before];
    let mut seen = 0;
    for recorder in recorders {
        for recording in recorder.recordings() {
            seen += recording.to_server.len() + recording.to_client.len();
            for word in &words {
                assert!(!holds(&recording.to_server, word), "{word:?} was found");
                assert!(!holds(&recording.to_client, word), "{word:?} was found");
            }
        }
    }
    assert!(seen > 100_000, "only {seen} bytes were recorded");

    let outside = exchanges(&before);
    assert_eq!(outside.len(), cases.len() + 1);
    let inside: Vec<_> = behind.iter().flat_map(exchanges).collect();
    assert_eq!(inside.len(), outside.len());
    let requests: Vec<_> = (10..=23).map(|power| encapsulated(1 << power)).collect();
    let answers: Vec<_> = (3..=16).map(|power| answered(1 << power)).collect();
    for (request, answer) in outside.iter().chain(&inside) {
        assert!(
            requests.contains(&request.body.len()),
            "{} bytes",
            request.body.len()
        );
        assert!(
            answers.contains(&answer.body.len()),
            "{} bytes",
            answer.body.len()
        );
    }
    // Prompts of one bucket look the same to the byte, HTTP included; so do answers, and an error is one of them.
    let request = |i: usize| (outside[i].0.body.len(), outside[i].0.recorded);
    let answer = |i: usize| outside[i].1.body.len();
    assert_eq!(request(0).0, encapsulated(1024));
    assert!((1..4).all(|i| request(i) == request(0)), "{:?}", request(3));
    assert_eq!(request(4).0, encapsulated(1024));
    assert_eq!(request(5).0, encapsulated(2048));
    assert_eq!(request(6).0, encapsulated(16384));
    for i in [1, 2, 3, 5, 6] {
        assert_eq!(answer(i), answered(8), "{i}");
    }
    assert_eq!(answer(0), answered(8));

    // The search finds what travels in clear.
    runtime().block_on(async {
        let refused = post(&format!("http://{}", behind[0].address()), &chat(canary, 1)).await;
        assert_eq!(refused.status(), 403);
    });
    let recordings = behind[0].recordings();
    let last = &recordings.last().unwrap().to_server;
    assert!(holds(last, canary) && holds(last, "max_tokens"));
}
