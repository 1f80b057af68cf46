//! The broker's log and its two HTTP interfaces.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, to_bytes};
use casemate_attest::UnixTime;
use casemate_broker::broker::{Broker, Settings};
use casemate_broker::clock::Clock;
use casemate_broker::log::{Action, ChainCheck, Decision, Entry, Head, Verdict, hash};
use casemate_broker::state::State;
use casemate_broker::{admin, api};
use casemate_container::signing::SigningKey;
use casemate_release::random::SystemRandom;
use casemate_release::{issuance, rcar};
use http::{Method, Request};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::attest::{NOW, honest};
use crate::{Walk, damage, scratch};

fn entry(head: &Head) -> Entry {
    let mut decision = Decision::new(Action::Attest, Verdict::Genuine);
    decision.policy_version = Some(3);
    decision.subject = Some("default/model/smollm2".into());
    Entry::after(head, NOW + head.size, decision)
}

/// An entry, or damage to a chain of them. What is accepted is its own one encoding; a chain, the honest one.
pub(crate) fn log(data: &[u8]) {
    let (which, bytes) = data.split_first().unwrap_or((&0, &[]));
    if which % 2 == 0 {
        if let Some(entry) = Entry::decode(bytes) {
            assert_eq!(entry.encode(), bytes, "a second encoding was accepted");
            serde_json::to_value(&entry).expect("an entry has a JSON form");
        }
        let text = String::from_utf8_lossy(bytes);
        if let Some(anchor) = admin::parse_anchor(&text) {
            let written = format!("{}:{}", anchor.size, hex::encode(anchor.hash.bytes()));
            assert_eq!(admin::parse_anchor(&written), Some(anchor));
        }
        return;
    }
    let issuer = SigningKey::from_seed(&[3; 32]);
    let mut head = Head::empty();
    let honest: Vec<_> = (0..4)
        .map(|_| {
            let encoded = entry(&head).encode();
            let stored = hash(&encoded);
            head = Head {
                size: head.size + 1,
                hash: stored,
            };
            (encoded, stored)
        })
        .collect();
    let (at, edits) = bytes.split_first().unwrap_or((&0, &[]));
    let mut rows = honest.clone();
    let row = &mut rows[usize::from(*at) % 4];
    damage::apply(edits, &mut row.0);
    // Whoever edits the database recomputes the hash beside the entry, too.
    row.1 = hash(&row.0);
    let mut check = ChainCheck::new(&[]);
    let chained = (0..)
        .zip(&rows)
        .try_for_each(|(at, (entry, stored))| check.next(at, entry, *stored));
    let whole =
        chained.and_then(|()| check.finish(&head, &head.sign(&issuer), &issuer.verifying_key()));
    assert_eq!(whole.is_ok(), rows == honest, "{whole:?}");
}

pub(crate) fn walks() -> Vec<Walk> {
    let len = entry(&Head::empty()).encode().len();
    let walk = |what, prefix| Walk {
        target: "broker_log",
        what,
        prefix,
        len,
    };
    vec![
        walk("the first entry of a log", &[1, 0]),
        walk("the last entry of a log", &[1, 3]),
    ]
}

pub(crate) fn log_seeds() -> Vec<Vec<u8>> {
    let encoded = entry(&Head::empty()).encode();
    let anchor = format!("12:{}", "ab".repeat(32));
    let mut seeds = vec![
        [&[0], &encoded[..]].concat(),
        [&[0], anchor.as_bytes()].concat(),
    ];
    seeds.extend(
        damage::seeds_of_parts(4)
            .into_iter()
            .map(|seed| [&[1], &seed[..]].concat()),
    );
    seeds
}

struct Fixed;

impl Clock for Fixed {
    fn now(&self) -> UnixTime {
        UnixTime::from_secs(NOW)
    }
}

/// A broker with a policy and a session that has had its challenge.
struct Rig {
    _directory: TempDir,
    runtime: Runtime,
    public: Router,
    admin: Router,
    cookie: String,
    /// Requests so far: after many the state is thrown away, because refusals are logged.
    used: u32,
}

impl Rig {
    fn new() -> Self {
        let directory = scratch::directory();
        let random = Arc::new(SystemRandom);
        let path = directory.path().join("state");
        let state = State::init(&path, None, random.clone(), Fixed.now());
        let state = state.expect("a new state");
        let broker = Broker::new(state, Arc::new(Fixed), random, Settings::default());
        let broker = Arc::new(broker.expect("a broker"));
        broker
            .set_policy(&honest().policy_text, None)
            .expect("an honest policy");
        let request = rcar::Request::new(casemate_attest::TeeKind::Tdx);
        let request = serde_json::to_vec(&request).expect("a request has a JSON form");
        let (session, _) = broker.auth(&request).expect("a session");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        Rig {
            _directory: directory,
            runtime: runtime.expect("a runtime"),
            public: api::router(broker.clone()),
            admin: admin::router(broker),
            cookie: format!("{}={session}", rcar::SESSION_COOKIE),
            used: 0,
        }
    }
}

/// Method, path, and whether it is the administrator's.
const ROUTES: [(Method, &str, bool); 11] = [
    (Method::POST, rcar::AUTH_PATH, false),
    (Method::POST, rcar::ATTEST_PATH, false),
    (Method::GET, "/kbs/v0/resource/default/model/m", false),
    (Method::POST, issuance::CHALLENGE_PATH, false),
    (Method::POST, issuance::CREDENTIAL_PATH, false),
    (Method::PUT, "/policy", true),
    (Method::PUT, "/resource/default/model/m", true),
    (Method::DELETE, "/resource/default/model/m", true),
    (Method::GET, "/log?from=0&limit=3", true),
    (Method::GET, "/log/verify", true),
    (Method::GET, "/status", true),
];
const REQUESTS_PER_STATE: u32 = 5_000;

/// A request to one of the routes; the first byte chooses, the second whether it comes with a session. Whatever the body
/// is, the broker's storage does not fail, and no session of a stranger obtains a resource.
pub(crate) fn requests(data: &[u8]) {
    static RIG: Mutex<Option<Rig>> = Mutex::new(None);
    let [which, with_session, body @ ..] = data else {
        return;
    };
    let mut rig = RIG.lock().unwrap_or_else(PoisonError::into_inner);
    if rig
        .as_ref()
        .is_none_or(|rig| rig.used == REQUESTS_PER_STATE)
    {
        *rig = Some(Rig::new());
    }
    let rig = rig.as_mut().expect("just made");
    rig.used += 1;
    let (method, path, is_admin) = &ROUTES[usize::from(*which) % ROUTES.len()];
    let mut request = Request::builder().method(method).uri(*path);
    request = request.header("content-type", "application/json");
    if with_session % 2 == 1 {
        request = request.header("cookie", &rig.cookie);
    }
    let request = request
        .body(Body::from(body.to_vec()))
        .expect("a plain request");
    let router = if *is_admin {
        rig.admin.clone()
    } else {
        rig.public.clone()
    };
    let (status, body) = rig.runtime.block_on(async {
        let response = router.oneshot(request).await.expect("a router answers");
        let (head, body) = response.into_parts();
        (
            head.status,
            to_bytes(body, 1 << 20).await.expect("a whole answer"),
        )
    });
    assert_ne!(status.as_u16(), 500, "{}", String::from_utf8_lossy(&body));
    if !is_admin && *path != rcar::AUTH_PATH {
        assert!(!status.is_success(), "{path} succeeds without evidence");
    }
}

pub(crate) fn requests_seeds() -> Vec<Vec<u8>> {
    let json = |value: serde_json::Value| value.to_string().into_bytes();
    let auth = serde_json::to_vec(&rcar::Request::new(casemate_attest::TeeKind::Tdx));
    let policy = serde_json::json!({ "toml": honest().policy_text.replace("version = 1\n", "version = 9\n") });
    let resource =
        serde_json::json!({ "resource": { "opaque": { "bytes": "AQID" } }, "service": null });
    let mut seeds = vec![
        [&[0, 0], &auth.expect("a request has a JSON form")[..]].concat(),
        [&[5, 0], &json(policy)[..]].concat(),
        [&[6, 0], &json(resource)[..]].concat(),
    ];
    let bodies = crate::release::rcar_seeds()
        .into_iter()
        .chain(crate::release::issuance_seeds());
    for body in bodies.filter(|body| body.len() < 16 << 10) {
        seeds.push([&[1, 1], &body[1..]].concat());
        seeds.push([&[4, 1], &body[1..]].concat());
    }
    seeds.extend([2, 3, 7, 8, 9, 10].map(|which| vec![which, 1]));
    seeds
}
