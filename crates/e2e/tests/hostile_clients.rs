//! What some clients do to the real enclave, and what others notice of it: nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use casemate_channel::ohttp::{GATEWAY_PATH, REQUEST_MEDIA_TYPE};
use casemate_e2e::watch::quiet;
use casemate_e2e::{Stage, TINY};
use casemate_testkit::deployment::{DeploymentError, EnclaveSettings, Role, http_get};
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Silent connections; several times as many descriptors as a program has at first on most systems.
const SILENT: usize = 1500;
/// Clients that send without end at the same time.
const ENDLESS: usize = 8;

fn chat(stream: bool) -> Value {
    json!({
        "model": TINY, "stream": stream, "max_tokens": 100, "temperature": 0,
        "messages": [{"role": "user", "content": "go on"}],
    })
}

#[test]
fn bodies_without_end_and_silent_connections_leave_others_unharmed() {
    let (stage, proxy) = Stage::complete().unwrap();
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let address: SocketAddr = enclave.trim_start_matches("http://").parse().unwrap();
    let silent: Vec<_> = (0..SILENT)
        .map(|number| {
            let mut stream = TcpStream::connect(address).unwrap();
            if number % 2 == 0 {
                stream
                    .write_all(b"POST /.well-known/ohttp-gateway HT")
                    .unwrap();
            }
            stream
        })
        .collect();
    let endless: Vec<_> = (0..ENDLESS)
        .map(|number| std::thread::spawn(move || send_without_end(address, number)))
        .collect();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{proxy}/v1/chat/completions");
    for _ in 0..5 {
        let answer: Value = runtime.block_on(async {
            let response = client.post(&url).json(&chat(false)).send().await.unwrap();
            assert_eq!(response.status(), 200);
            response.json().await.unwrap()
        });
        assert!(
            answer["choices"][0]["finish_reason"].is_string(),
            "{answer}"
        );
    }
    assert_eq!(http_get(&enclave, "/readyz").unwrap().status, 200);
    for client in endless {
        let (taken, answer) = client.join().unwrap();
        // What is in flight when the refusal comes may be several buffers, but is no gigabyte.
        assert!(taken < 64 << 20, "{taken} bytes were taken");
        assert!(
            answer.starts_with("HTTP/1.1 4") || answer.is_empty(),
            "{answer}"
        );
    }
    drop(silent);
    quiet(&enclave, Duration::from_secs(60)).unwrap();
}

/// Claims and sends a gigabyte; returns how much was taken, and the beginning of the answer.
fn send_without_end(address: SocketAddr, number: usize) -> (u64, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = match number % 2 {
        0 => "content-length: 1073741824",
        _ => "transfer-encoding: chunked",
    };
    let head = format!(
        "POST {GATEWAY_PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {REQUEST_MEDIA_TYPE}\r\n{length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let piece = vec![number as u8; 1 << 16];
    let mut taken = 0;
    while taken < 1 << 30 {
        let sent = match number % 2 {
            0 => stream.write_all(&piece),
            _ => stream
                .write_all(b"10000\r\n")
                .and_then(|()| stream.write_all(&piece))
                .and_then(|()| stream.write_all(b"\r\n")),
        };
        if sent.is_err() {
            break;
        }
        taken += piece.len() as u64;
    }
    let mut answer = [0; 12];
    let read = stream.read(&mut answer).unwrap_or(0);
    (taken, String::from_utf8_lossy(&answer[..read]).into_owned())
}

#[test]
fn an_enclave_that_is_told_to_stop_finishes_running_answers() {
    let mut stage = Stage::new().unwrap();
    // Slow enough for the answer to be running still.
    let model = stage.path("slow.gguf");
    let slow = Tiny {
        hidden: 256,
        layers: 8,
        ffn: 512,
        ..Tiny::default()
    };
    gguf::write(&slow.build(), &model).unwrap();
    let settings = EnclaveSettings {
        threads: 1,
        ..EnclaveSettings::default()
    };
    let proxy = stage.deployment.start_all(&model, TINY, &settings).unwrap();
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let pid = stage.deployment.program(Role::Enclave).unwrap().pid();
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{}/v1/chat/completions", proxy.url);
    runtime.block_on(async {
        let request = client.post(url).json(&chat(true)).send();
        let mut response = request.await.unwrap();
        let mut answer = response.chunk().await.unwrap().unwrap().to_vec();
        assert!(!answer.ends_with(b"data: [DONE]\n\n"), "it is over already");
        kill_process(pid, Signal::TERM).unwrap();
        // Nothing new is taken from now on.
        let deadline = Instant::now() + Duration::from_secs(10);
        while http_get(&enclave, "/readyz").is_ok_and(|reply| reply.status == 200) {
            assert!(Instant::now() < deadline, "still ready");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        while let Some(piece) = response.chunk().await.unwrap() {
            answer.extend_from_slice(&piece);
        }
        assert!(answer.ends_with(b"data: [DONE]\n\n"), "the answer was cut");
    });
    let program = stage.deployment.program(Role::Enclave).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        match program.check() {
            Ok(()) => assert!(Instant::now() < deadline, "it does not end"),
            Err(DeploymentError::Ended { status, .. }) => break status,
            Err(other) => panic!("{other}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}
