//! Many clients for a while, and very many at once.

use std::time::Duration;

use casemate_e2e::watch::{metric, quiet, resident_kib};
use casemate_e2e::{Stage, TINY, soak};
use casemate_testkit::deployment::{EnclaveSettings, Role};
use casemate_testkit::gguf;
use casemate_testkit::models::Tiny;
use serde_json::json;

/// Streams that are open at the same time.
const STREAMS: f64 = 1000.0;
/// What all of them together may hold, besides the KV cache.
const MOST: u64 = 100 << 10;

/// The same for longer: `cargo run -p casemate-e2e --bin soak -- --minutes 30`.
#[test]
fn two_minutes_of_mixed_clients_leave_nothing_behind() {
    let report = soak::run(Duration::from_secs(120), |_| ()).unwrap();
    println!("{report}");
}

#[test]
fn a_thousand_idle_streams_hold_less_than_100_mib() {
    let mut stage = Stage::new().unwrap();
    // Slow enough for few to end meanwhile, and one at a time, so that all others wait.
    let model = stage.path("slow.gguf");
    let slow = Tiny {
        hidden: 256,
        layers: 8,
        ffn: 512,
        context: 2048,
        ..Tiny::default()
    };
    gguf::write(&slow.build(), &model).unwrap();
    let settings = EnclaveSettings {
        threads: 1,
        max_batch: 1,
        ..EnclaveSettings::default()
    };
    let started = stage.deployment.start_all(&model, TINY, &settings);
    let proxy = started.unwrap().url;
    let enclave = stage.deployment.enclave().unwrap().url.clone();
    let pid = |stage: &mut Stage, role| stage.deployment.program(role).unwrap().pid();
    let pids = [Role::Enclave, Role::Proxy].map(|role| pid(&mut stage, role));
    let memory = || pids.map(|pid| resident_kib(pid).unwrap());

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async || {
        let body = json!({
            "model": TINY, "stream": true,
            "messages": [{"role": "user", "content": "go on"}],
        });
        let url = format!("{proxy}/v1/chat/completions");
        let mut response = client.post(url).json(&body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        // The opening of the stream; the rest waits for a place in the batch.
        response.chunk().await.unwrap().unwrap();
        response
    };
    // What is made once, for the first requests, is no stream's.
    runtime.block_on(async { drop(tokio::join!(ask(), ask())) });
    quiet(&enclave, Duration::from_secs(60)).unwrap();

    let before = memory();
    let mut streams = Vec::new();
    let open = || metric(&enclave, "casemate_requests_open").unwrap();
    // Those at the front end meanwhile.
    while open() < STREAMS {
        assert!(
            streams.len() < 3000,
            "{} of {} are open",
            open(),
            streams.len()
        );
        runtime.block_on(async {
            for _ in 0..20 {
                streams.push(ask().await);
            }
        });
    }
    let open = open();
    // Reported rounded up to a power of two, so at least half of it.
    let kv = metric(&enclave, "casemate_kv_bytes_used").unwrap() as u64 / 2 / 1024;
    let during = memory();
    let [enclave_kib, proxy_kib] = [0, 1].map(|at| during[at].saturating_sub(before[at]));
    let held = enclave_kib.saturating_sub(kv);
    println!(
        "{open} streams: enclave {} → {} KiB, of which KV {kv}; proxy {} → {} KiB",
        before[0], during[0], before[1], during[1]
    );
    assert!(held < MOST, "the enclave holds {held} KiB");
    assert!(proxy_kib < MOST, "the proxy holds {proxy_kib} KiB");

    drop(streams);
    quiet(&enclave, Duration::from_secs(120)).unwrap();
}
