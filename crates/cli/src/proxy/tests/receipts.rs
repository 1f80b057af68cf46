//! Receipts at the proxy: completed with the right evidence, refused when they do not hold, saved without harm.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use casemate_attest::Policy;
use casemate_channel::receipt::{Bundle, Exchange, RequestBytes, verify_bundle};

use super::*;
use crate::explain::kinds;

/// Asks for an answer with a receipt; returns its id.
async fn ask(setup: &Setup) -> String {
    let url = setup.url("/v1/answer");
    let response = setup
        .client
        .post(url)
        .body("question")
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let id = response.headers()["casemate-receipt"].to_str().unwrap();
    let id = id.to_owned();
    assert_eq!(response.text().await.unwrap(), "answer");
    id
}

fn path(id: &str) -> String {
    format!("/v1/receipts/{id}")
}

/// The bundle proves the exchange under the enclave's policy.
fn assert_proves(setup: &Setup, json: &[u8]) {
    assert_proves_of(setup, json, "/v1/answer");
}

fn assert_proves_of(setup: &Setup, json: &[u8], target: &str) {
    let bundle = Bundle::from_json(json).ok().unwrap();
    let policy = Policy::from_toml(&setup.enclave.policy(MAXIMUM_AGE)).unwrap();
    let request = RequestBytes {
        method: "POST",
        target,
        body: b"question",
    };
    let exchange = Exchange {
        request: Some(request),
        answer: Some(b"answer"),
    };
    let (transcript, outcome) = verify_bundle(&bundle, &exchange, &policy, None);
    assert!(outcome.is_ok(), "{}", transcript.to_table(false));
}

#[tokio::test]
async fn a_receipt_comes_with_the_evidence_of_its_keyset_also_after_another_attestation() {
    let setup = Setup::new().await;
    let id = ask(&setup).await;
    let before = setup.get(&path(&id)).await;
    assert_eq!(before.headers()["content-type"], "application/json");
    let before = before.bytes().await.unwrap();
    assert_proves(&setup, &before);
    // The next attestation shows another keyset.
    setup.enclave.advance(MAXIMUM_AGE);
    let after = setup.get(&path(&id)).await;
    assert_eq!(after.status(), 200);
    assert_eq!(setup.enclave.attestations.load(Ordering::SeqCst), 2);
    assert_eq!(after.bytes().await.unwrap(), before);
    let newer = ask(&setup).await;
    let newer = setup.get(&path(&newer)).await.bytes().await.unwrap();
    assert_proves(&setup, &newer);
    assert_ne!(
        Bundle::from_json(&newer).ok().unwrap().attestation,
        Bundle::from_json(&before).ok().unwrap().attestation
    );
}

#[tokio::test]
async fn a_receipt_whose_evidence_is_not_kept_is_refused_by_name() {
    let setup = Setup::new().await;
    let id = ask(&setup).await;
    for _ in 0..15 {
        setup.enclave.advance(MAXIMUM_AGE);
        assert_eq!(setup.get("/v1/echo").await.status(), 200);
    }
    assert_eq!(setup.get(&path(&id)).await.status(), 200, "16 are kept");
    setup.enclave.advance(MAXIMUM_AGE);
    let expected = (StatusCode::NOT_FOUND, "evidence_not_kept".to_owned());
    assert_eq!(setup.refusal(&path(&id)).await, expected);
}

#[tokio::test]
async fn what_a_bundle_consists_of_is_called_by_its_name() {
    let setup = Setup::new().await;
    let id = ask(&setup).await;
    let bundle: Value = setup.get(&path(&id)).await.json().await.unwrap();
    for (part, name) in [
        (&bundle, "this is a receipt"),
        (&bundle["attestation"], "this is a service's attestation"),
        (&bundle["attestation"]["evidence"], "this is evidence"),
    ] {
        // All three have certificates in them.
        let json = part.to_string();
        assert!(json.contains("-----BEGIN CERTIFICATE"), "{name}");
        let described = kinds::describe(json.as_bytes());
        assert!(described.starts_with(name), "{name}: {described}");
    }
}

#[tokio::test]
async fn receipts_that_do_not_hold_are_not_handed_out() {
    let setup = Setup::new().await;
    for fault in [Fault::OtherReceiptKey, Fault::OtherReceipt] {
        setup.enclave.set_fault(fault);
        let id = ask(&setup).await;
        let expected = (StatusCode::BAD_GATEWAY, "receipt_refused".to_owned());
        assert_eq!(setup.refusal(&path(&id)).await, expected, "{fault:?}");
    }
    // What is no id is not carried; what is unknown is the service's to say.
    let before = setup.enclave.requests.load(Ordering::SeqCst);
    let expected = (StatusCode::NOT_FOUND, "receipt_not_found".to_owned());
    assert_eq!(setup.refusal("/v1/receipts/x").await, expected);
    assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), before);
    let unknown = setup.get(&path(&format!("cmpl-{}", "0".repeat(32)))).await;
    assert_eq!(unknown.status(), 404);
    assert_eq!(unknown.text().await.unwrap(), "no such receipt");
}

/// Two replicas of which the first made a receipt and the second attests now.
async fn turned_to_another_replica() -> (Setup, Arc<Enclave>, String) {
    let first = Enclave::new(NOW);
    let second = first.another();
    let front = Arc::new(AtomicUsize::new(0));
    let replicas = vec![first.clone(), second.clone()];
    let address = Enclave::serve_replicas(replicas, front.clone()).await;
    let setup = Setup::at(first, address, MAXIMUM_AGE, None).await;
    let id = ask(&setup).await;
    front.store(1, Ordering::SeqCst);
    let outdated = setup.session.valid().unwrap();
    setup.session.renew(&outdated).await.unwrap();
    (setup, second, id)
}

fn processed(enclave: &Enclave) -> usize {
    enclave.processed.load(Ordering::SeqCst)
}

#[tokio::test]
async fn a_receipt_of_the_replica_that_was_used_before_is_found_there() {
    let (setup, second, id) = turned_to_another_replica().await;
    let bundle = setup.get(&path(&id)).await;
    assert_eq!(bundle.status(), 200);
    assert_proves(&setup, &bundle.bytes().await.unwrap());
    assert_eq!((processed(&setup.enclave), processed(&second)), (2, 1));
    // What neither has is not found, in the words of the one that is used.
    let unknown = setup.get(&path(&format!("cmpl-{}", "0".repeat(32)))).await;
    assert_eq!(unknown.status(), 404);
    assert_eq!(unknown.text().await.unwrap(), "no such receipt");
    assert_eq!((processed(&setup.enclave), processed(&second)), (3, 2));
    // Nor is it where that replica is gone.
    setup.enclave.set_fault(Fault::KeyDenied);
    let gone = setup.get(&path(&id)).await;
    assert_eq!(gone.status(), 404);
    assert_eq!(gone.text().await.unwrap(), "no such receipt");
}

#[tokio::test]
async fn a_replica_whose_verification_has_run_out_is_not_asked_for_receipts() {
    let (setup, second, id) = turned_to_another_replica().await;
    setup.enclave.advance(MAXIMUM_AGE);
    second.advance(MAXIMUM_AGE);
    let before = setup.enclave.requests.load(Ordering::SeqCst);
    assert_eq!(setup.get(&path(&id)).await.status(), 404);
    assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), before);
    assert_eq!(processed(&second), 1);
}

fn saver(directory: &Path) -> Option<Saver> {
    Some(Saver::new(directory.to_owned()))
}

#[tokio::test]
async fn a_bundle_is_saved_for_each_answer_and_readable_by_its_owner_alone() {
    let directory = tempfile::tempdir().unwrap();
    let setup = Setup::with(MAXIMUM_AGE, saver(directory.path())).await;
    let id = ask(&setup).await;
    let file = directory.path().join(format!("{id}.json"));
    eventually("the receipt is saved", || file.exists()).await;
    let json = std::fs::read(&file).unwrap();
    assert_proves(&setup, &json);
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // What has no receipt leaves nothing.
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// An answer that has begun and does not end.
async fn begin(setup: &Setup) -> (String, reqwest::Response) {
    let url = setup.url("/v1/gated-answer");
    let request = setup.client.post(url).body("question");
    let response = request.send().await.unwrap();
    let id = response.headers()["casemate-receipt"].to_str().unwrap();
    (id.to_owned(), response)
}

/// Lets it end, and reads what is saved of it.
async fn end(setup: &Setup, id: &str, answer: reqwest::Response, directory: &Path) {
    setup.enclave.gate.notify_one();
    assert_eq!(answer.text().await.unwrap(), "answer");
    let file = directory.join(format!("{id}.json"));
    eventually("the receipt is saved", || file.exists()).await;
    assert_proves_of(setup, &std::fs::read(&file).unwrap(), "/v1/gated-answer");
}

#[tokio::test]
async fn the_receipt_of_an_answer_that_outlives_its_verification_is_saved() {
    let directory = tempfile::tempdir().unwrap();
    let first = Enclave::new(NOW);
    let second = first.another();
    let front = Arc::new(AtomicUsize::new(0));
    let replicas = vec![first.clone(), second.clone()];
    let address = Enclave::serve_replicas(replicas, front.clone()).await;
    let setup = Setup::at(first, address, MAXIMUM_AGE, saver(directory.path())).await;
    let (id, answer) = begin(&setup).await;
    // What is verified meanwhile, and often enough to forget the first evidence, is another replica.
    front.store(1, Ordering::SeqCst);
    for _ in 0..16 {
        setup.enclave.advance(MAXIMUM_AGE);
        second.advance(MAXIMUM_AGE);
        assert_eq!(setup.get("/v1/echo").await.status(), 200);
    }
    end(&setup, &id, answer, directory.path()).await;
    assert_eq!(processed(&second), 16, "it was not asked for the receipt");
    // Who asks later than that is told so, and the former replica is sent nothing.
    let before = setup.enclave.requests.load(Ordering::SeqCst);
    assert_eq!(setup.get(&path(&id)).await.status(), 404);
    assert_eq!(setup.enclave.requests.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn the_receipt_of_an_answer_that_outlives_its_keyset_is_saved() {
    let directory = tempfile::tempdir().unwrap();
    let setup = Setup::with(MAXIMUM_AGE, saver(directory.path())).await;
    for runs_out in [false, true] {
        let (id, answer) = begin(&setup).await;
        setup.enclave.rotate();
        if runs_out {
            setup.enclave.advance(MAXIMUM_AGE);
        }
        end(&setup, &id, answer, directory.path()).await;
    }
}

#[tokio::test]
async fn an_answer_is_whole_though_its_receipt_cannot_be_saved() {
    let directory = tempfile::tempdir().unwrap();
    let gone = directory.path().join("gone");
    let setup = Setup::with(MAXIMUM_AGE, saver(&gone)).await;
    let fetches = |setup: &Setup| setup.enclave.processed.load(Ordering::SeqCst);
    ask(&setup).await;
    eventually("it was tried", || fetches(&setup) == 2).await;
    setup.enclave.set_fault(Fault::OtherReceiptKey);
    ask(&setup).await;
    eventually("it was tried", || fetches(&setup) == 4).await;
    assert!(!gone.exists());
}
