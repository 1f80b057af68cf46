//! `/readyz` of a proxy whose service dies, comes back, or no longer verifies.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt as _;
use reqwest::StatusCode;
use serde_json::Value;

use super::super::direct_tests;
use super::support::{Enclave, Fault, Mortal, TlsFault};
use super::{MAXIMUM_AGE, NOW, Pace, Setup, service};

const EVER: Duration = Duration::from_secs(3600);
/// Asks each time.
const EAGER: Pace = Pace {
    fresh: Duration::ZERO,
    pause: Duration::ZERO,
    verify_pause: Duration::ZERO,
    patience: Duration::from_secs(60),
};

/// A proxy to an enclave that lives.
async fn setup(pace: Pace) -> Setup {
    let enclave = Enclave::new(NOW);
    let service = service(&enclave, enclave.serve().await, MAXIMUM_AGE);
    Setup::of(enclave, service, None, pace).await
}

impl Setup {
    /// Whether it is ready, and what it says of it: a code and a message, or the text.
    async fn readiness(&self) -> (bool, String, String) {
        let response = self.get("/readyz").await;
        let (status, retry) = (
            response.status(),
            response.headers().get("retry-after").cloned(),
        );
        let text = response.text().await.unwrap();
        if status == StatusCode::OK {
            assert!(text.starts_with("ready\n"), "{text}");
            return (true, String::new(), text);
        }
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
        assert!(retry.is_some());
        let error: Value = serde_json::from_str(&text).unwrap();
        let field = |name: &str| error["error"][name].as_str().unwrap().to_owned();
        (false, field("code"), field("message"))
    }

    fn asked(&self) -> usize {
        self.enclave.requests.load(Ordering::SeqCst)
    }

    fn attested(&self) -> usize {
        self.enclave.attestations.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn it_follows_a_service_that_dies_and_comes_back() {
    for tls in [false, true] {
        let enclave = Enclave::new(NOW);
        let mut mortal = Mortal::start(&enclave, tls);
        let service = match tls {
            true => direct_tests::service(&enclave, mortal.address),
            false => service(&enclave, mortal.address, MAXIMUM_AGE),
        };
        let url = service.url().to_string();
        let setup = Setup::of(enclave, service, None, EAGER).await;
        let (ready, _, text) = setup.readiness().await;
        assert!(ready, "{text}");
        assert!(
            text.contains(&url) && text.contains("verified at 2026-"),
            "{text}"
        );

        mortal.kill();
        setup.enclave.advance(7);
        let last = "last answered at 2026-11-18T";
        for _ in 0..3 {
            let (ready, code, message) = setup.readiness().await;
            assert_eq!(
                (ready, code.as_str()),
                (false, "service_unreachable"),
                "{message}"
            );
            for part in [&url, "onnection refused", last] {
                assert!(message.contains(part), "{part}: {message}");
            }
        }
        // Requests name the same cause, and where.
        let response = setup.get("/v1/echo").await;
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
        let text = response.text().await.unwrap();
        assert!(
            text.contains(&url) && text.contains("onnection refused"),
            "{text}"
        );

        // It returns as it was, with the same keys; and nobody but the health check asks.
        mortal.revive();
        assert!(setup.readiness().await.0);
        // It returns as enclaves do, with new ones.
        mortal.kill();
        assert!(!setup.readiness().await.0);
        setup.enclave.rotate();
        mortal.revive();
        let before = setup.attested();
        assert!(setup.readiness().await.0);
        assert_eq!(setup.attested(), before + 1);
        assert_eq!(setup.get("/v1/echo").await.status(), 200);
    }
}

#[tokio::test]
async fn a_service_that_does_not_verify_any_more_is_not_ready() {
    let setup = setup(EAGER).await;
    setup.enclave.set_fault(Fault::OtherService);
    let renew = async || setup.session.renew(&setup.session.latest()).await;
    assert!(renew().await.is_err());
    let (ready, code, message) = setup.readiness().await;
    assert_eq!((ready, code.as_str()), (false, "service_not_verified"));
    assert!(message.contains("credential.service"), "{message}");
    // What was verified before still holds and still answers; that does not make it verify.
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert!(!setup.readiness().await.0);

    setup.enclave.set_fault(Fault::None);
    assert!(setup.readiness().await.0, "it asks for evidence by itself");
}

#[tokio::test]
async fn evidence_that_was_refused_stays_so_while_there_is_no_other() {
    let pace = Pace {
        patience: Duration::from_secs(1),
        ..EAGER
    };
    let setup = setup(pace).await;
    setup.enclave.set_fault(Fault::OtherService);
    let renew = async || setup.session.renew(&setup.session.latest()).await;
    assert!(renew().await.is_err());
    for fault in [Fault::SilentAttestation, Fault::NoAttestation] {
        setup.enclave.set_fault(fault);
        for _ in 0..2 {
            let (ready, code, message) = setup.readiness().await;
            assert_eq!((ready, code.as_str()), (false, "service_not_verified"));
            assert!(message.contains("credential.service"), "{message}");
        }
        // What was verified before still answers.
        assert_eq!(setup.get("/v1/echo").await.status(), 200);
        assert!(setup.session.presence().unverified(), "{fault:?}");
    }
    setup.enclave.set_fault(Fault::None);
    assert!(renew().await.is_ok());
    assert!(!setup.session.presence().unverified());
}

#[tokio::test]
async fn a_new_connection_that_does_not_verify_makes_it_not_ready() {
    let enclave = Enclave::new(NOW);
    let address = enclave.serve_tls(TlsFault::None).await;
    let service = direct_tests::service(&enclave, address);
    let setup = Setup::of(enclave, service, None, EAGER).await;
    // The verified connection is busy, so the next request makes another one.
    let busy = setup.get("/v1/gated").await;
    setup.enclave.set_fault(Fault::OtherService);
    let expected = (
        StatusCode::SERVICE_UNAVAILABLE,
        "service_not_verified".to_owned(),
    );
    assert_eq!(setup.refusal("/v1/echo").await, expected);
    // Now the first would carry a question, and its answer.
    let mut events = busy.bytes_stream();
    for _ in 0..4 {
        setup.enclave.gate.notify_one();
        events.next().await.unwrap().unwrap();
    }
    assert!(events.next().await.is_none());
    let (ready, code, message) = setup.readiness().await;
    assert_eq!((ready, code.as_str()), (false, "service_not_verified"));
    assert!(message.contains("credential.service"), "{message}");
    setup.enclave.set_fault(Fault::None);
    assert!(setup.readiness().await.0);
}

#[tokio::test]
async fn a_verification_that_cannot_be_made_is_no_refused_evidence() {
    let pace = Pace {
        verify_pause: EVER,
        ..EAGER
    };
    for restarted in [true, false] {
        let setup = setup(pace).await;
        // It needs another verification, for a new key or because the last one ran out.
        match restarted {
            true => setup.enclave.rotate(),
            false => setup.enclave.advance(MAXIMUM_AGE),
        }
        setup.enclave.set_fault(Fault::NoAttestation);
        let unreachable = (StatusCode::BAD_GATEWAY, "service_unreachable".to_owned());
        assert_eq!(setup.refusal("/v1/echo").await, unreachable);
        let (ready, code, message) = setup.readiness().await;
        assert_eq!((ready, code.as_str()), (false, "service_unreachable"));
        assert!(message.contains("503 Service Unavailable"), "{message}");
        // So it is asked again at once.
        setup.enclave.set_fault(Fault::None);
        assert!(setup.readiness().await.0);
    }
}

#[tokio::test]
async fn a_verification_that_ran_out_is_made_again() {
    let setup = setup(EAGER).await;
    setup.enclave.advance(MAXIMUM_AGE);
    assert!(setup.readiness().await.0);
    assert_eq!(setup.attested(), 2);
}

#[tokio::test]
async fn who_asks_often_asks_the_service_once() {
    let everybody = async |setup: &Setup| {
        let asking = (0..8).map(|_| setup.readiness());
        let answers = futures::future::join_all(asking).await;
        answers
            .into_iter()
            .map(|answer| answer.0)
            .collect::<Vec<_>>()
    };
    let patient = Pace {
        fresh: EVER,
        pause: EVER,
        verify_pause: EVER,
        ..EAGER
    };
    // It was verified just now.
    let setup = setup(patient).await;
    assert_eq!(everybody(&setup).await, [true; 8]);
    assert_eq!(setup.asked(), 0);
    // Something failed since.
    setup.session.presence().doubt();
    assert_eq!(everybody(&setup).await, [true; 8]);
    assert_eq!(setup.asked(), 1);
    // And again: it answered a question a moment ago, and is not asked another one for each request that fails.
    setup.enclave.set_fault(Fault::HostBroken);
    assert_eq!(
        setup.get("/v1/echo").await.status(),
        StatusCode::BAD_GATEWAY
    );
    assert_eq!(setup.asked(), 2);
    assert_eq!(everybody(&setup).await, [true; 8]);
    assert_eq!(setup.asked(), 2);

    // It does not answer, and was not asked before.
    let setup = self::setup(patient).await;
    setup.enclave.set_fault(Fault::HostBroken);
    assert_eq!(
        setup.get("/v1/echo").await.status(),
        StatusCode::BAD_GATEWAY
    );
    assert_eq!(setup.asked(), 1);
    assert_eq!(everybody(&setup).await, [false; 8]);
    assert_eq!(setup.asked(), 2);
    // A request that is answered is as good as a question.
    setup.enclave.set_fault(Fault::None);
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert_eq!(everybody(&setup).await, [true; 8]);
    assert_eq!(setup.asked(), 3);
    // Its evidence is refused.
    setup.enclave.set_fault(Fault::OtherService);
    let renewed = setup.session.renew(&setup.session.latest()).await;
    assert!(renewed.is_err());
    assert_eq!(everybody(&setup).await, [false; 8]);
    assert_eq!((setup.asked(), setup.attested()), (3, 2));
}

#[tokio::test]
async fn a_host_that_refuses_the_key_does_not_make_health_checks_ask_for_evidence() {
    let pace = Pace {
        verify_pause: EVER,
        ..EAGER
    };
    let setup = setup(pace).await;
    setup.enclave.set_fault(Fault::KeyDenied);
    let refused = async |attested| {
        for _ in 0..3 {
            let (ready, code, message) = setup.readiness().await;
            assert_eq!((ready, code.as_str()), (false, "key_refused"), "{message}");
            assert_eq!(setup.attested(), attested);
        }
    };
    refused(2).await;
    // That it verifies is known, and was not what is wrong.
    let key_refused = (StatusCode::BAD_GATEWAY, "key_refused".to_owned());
    assert_eq!(setup.refusal("/v1/echo").await, key_refused);
    refused(3).await;
    setup.enclave.set_fault(Fault::None);
    assert_eq!(setup.get("/v1/echo").await.status(), 200);
    assert!(setup.readiness().await.0);
}

#[tokio::test]
async fn a_key_that_a_request_found_refused_is_asked_for_before_the_proxy_is_ready() {
    let pace = Pace {
        fresh: EVER,
        ..EAGER
    };
    let setup = setup(pace).await;
    setup.enclave.set_fault(Fault::KeyDenied);
    let key_refused = (StatusCode::BAD_GATEWAY, "key_refused".to_owned());
    assert_eq!(setup.refusal("/v1/echo").await, key_refused);
    let (ready, code, message) = setup.readiness().await;
    assert_eq!((ready, code.as_str()), (false, "key_refused"), "{message}");
}

#[tokio::test]
async fn a_silent_service_is_not_ready() {
    let pace = Pace {
        patience: Duration::from_millis(200),
        ..EAGER
    };
    let setup = setup(pace).await;
    setup.enclave.set_fault(Fault::Silent);
    let (ready, code, message) = setup.readiness().await;
    assert_eq!((ready, code.as_str()), (false, "service_unreachable"));
    assert!(message.contains("no answer in 200ms"), "{message}");
    let kept = Arc::clone(&setup.session);
    setup.enclave.set_fault(Fault::None);
    assert!(setup.readiness().await.0);
    assert!(!kept.presence().unverified());
}
