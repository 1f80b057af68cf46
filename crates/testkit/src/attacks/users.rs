//! Attacks on users: whoever stands between a user and the service, or pretends to be it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use casemate_channel::keyset::Keyset;
use casemate_channel::ohttp::{
    ANSWER_MEDIA_TYPE, FRAME_BYTES, GATEWAY_PATH, Keyring, REQUEST_MEDIA_TYPE, Recipient,
};
use casemate_channel::tls::ServerKey;
use casemate_channel::verify::{ATTESTATION_PATH, AttestationResponse};
use serde_json::{Value, json};

use super::ground::NAME;
use super::wire::{Message, Middle, exchange};
use super::{By, Ground, Miss, Refusal, Verdict};
use crate::deployment::Role;

const CHAT: &str = "/v1/chat/completions";
/// What a prompt of the attacked user says.
const SECRET: &str = "the merger is signed on the ninth of May";

pub(super) fn older_version(ground: &mut Ground) -> Result<Refusal, Miss> {
    let policy = ground.user_policy("minimum_version = 2", "minimum_version = 3")?;
    ground.refused_verify(&ground.enclave()?, &policy)
}

pub(super) fn no_development_root(ground: &mut Ground) -> Result<Refusal, Miss> {
    let root = ground.deployment.fake_tee()?.root_spki.clone();
    let policy = ground.user_policy(&format!("dangerous_development_root = \"{root}\"\n"), "")?;
    ground.refused_verify(&ground.enclave()?, &policy)
}

/// The stranger's enclave is genuine, of the same image, and serves the same model; the user's policy leaves
/// configuration and arguments to the provider, so that only the credential can tell.
pub(super) fn another_provider(ground: &mut Ground) -> Result<Refusal, Miss> {
    let stranger = ground.stranger()?;
    stranger.start_enclave()?;
    let url = stranger.enclave()?.url.clone();
    let text = fs::read_to_string(ground.policy())?;
    let lenient = text.lines().map(|line| match line.split(" = ").next() {
        Some("mr_config_id") => "dangerous_any_mr_config_id = true",
        // Of the fake TEE: the arguments, which name the configuration.
        Some("rtmr1") => "dangerous_any_rtmr = [1]",
        _ => line,
    });
    let policy = ground.path("policy.toml");
    fs::write(&policy, lenient.collect::<Vec<_>>().join("\n"))?;
    let refusal = ground.refused_verify(&url, &policy);
    ground.stranger()?.stop(Role::Enclave);
    refusal
}

fn attestation(ground: &Ground, nonce: u8) -> Result<Message, Miss> {
    let path = format!("{ATTESTATION_PATH}?nonce={}", hex::encode([nonce; 32]));
    let answer = exchange(&ground.enclave()?, &Message::get(&path))?;
    match answer.status() {
        200 => Ok(answer),
        _ => Err(Miss::Broken(format!("no evidence: {}", answer.text()))),
    }
}

pub(super) fn replayed_to_user(ground: &mut Ground) -> Result<Refusal, Miss> {
    let recorded = attestation(ground, 7)?;
    let middle = Middle::start(&ground.enclave()?, move |request, answer| {
        match request.path().starts_with(ATTESTATION_PATH) {
            true => recorded.clone(),
            false => answer,
        }
    })?;
    ground.refused_verify(&middle.url(), &ground.policy())
}

/// The keyset that users would encrypt to, with the attacker's key in it.
pub(super) fn substituted_key(ground: &mut Ground) -> Result<Refusal, Miss> {
    let own = Keyring::default().generate(u64::MAX)?.encoded;
    let (change, substituted) = substitute(move |keyset| keyset.ohttp_config.clone_from(&own));
    let middle = Middle::start(&ground.enclave()?, change)?;
    refused_substitute(ground, &middle, &substituted)
}

/// The evidence is about the connection between attacker and enclave, and its keyset about the enclave's key.
pub(super) fn tls_ended_between(ground: &mut Ground) -> Result<Refusal, Miss> {
    let own = ServerKey::generate()?;
    let middle = Middle::start_tls(&ground.attested_tls()?, &own, |_, answer| answer)?;
    let refusal = ground.refused_verify(&middle.url(), &ground.policy())?;
    match contains(&middle.seen(), b"\"evidence\"") {
        true => Ok(refusal),
        false => Err(Miss::Broken("no evidence was relayed".into())),
    }
}

/// The attacker's key in the keyset, too; the evidence remains that of another connection and of the genuine keyset.
pub(super) fn substituted_tls_key(ground: &mut Ground) -> Result<Refusal, Miss> {
    let own = ServerKey::generate()?;
    let digest = own.digest();
    let (change, substituted) = substitute(move |keyset| keyset.tls_key_digest = Some(digest));
    let middle = Middle::start_tls(&ground.attested_tls()?, &own, change)?;
    refused_substitute(ground, &middle, &substituted)
}

/// Alters the keyset in each attestation that passes, and says whether one was altered.
fn substitute(
    alter: impl Fn(&mut Keyset) + Send + Sync + 'static,
) -> (
    impl Fn(&Message, Message) -> Message + Send + Sync + 'static,
    Arc<AtomicBool>,
) {
    let substituted = Arc::new(AtomicBool::new(false));
    let done = substituted.clone();
    let change = move |request: &Message, mut answer: Message| {
        if request.path().starts_with(ATTESTATION_PATH)
            && let Some(changed) = altered(&answer.body, &alter)
        {
            answer.body = changed;
            done.store(true, Ordering::SeqCst);
        }
        answer
    };
    (change, substituted)
}

fn altered(answer: &[u8], alter: &impl Fn(&mut Keyset)) -> Option<Vec<u8>> {
    let mut response: Value = serde_json::from_slice(answer).ok()?;
    let encoded = STANDARD.decode(response["keyset"].as_str()?).ok()?;
    let mut keyset = Keyset::decode(&encoded).ok()?;
    alter(&mut keyset);
    response["keyset"] = json!(STANDARD.encode(keyset.encode().ok()?));
    Some(response.to_string().into_bytes())
}

fn refused_substitute(
    ground: &Ground,
    middle: &Middle,
    substituted: &AtomicBool,
) -> Result<Refusal, Miss> {
    let refusal = ground.refused_verify(&middle.url(), &ground.policy())?;
    match substituted.load(Ordering::SeqCst) {
        true => Ok(refusal),
        false => Err(Miss::Broken("the key could not be substituted".into())),
    }
}

fn prompt(stream: bool) -> Vec<u8> {
    json!({
        "model": NAME,
        "stream": stream,
        "max_tokens": 64,
        "temperature": 0,
        "messages": [{"role": "user", "content": SECRET}],
    })
    .to_string()
    .into_bytes()
}

fn ask(url: &str, stream: bool) -> Result<Message, Miss> {
    let request = Message::post(CHAT, "application/json", &prompt(stream));
    Ok(exchange(url, &request)?)
}

/// Nothing is refused here, since nothing was altered: what was recorded must be of no use.
pub(super) fn reading_relay(ground: &mut Ground) -> Result<Refusal, Miss> {
    let middle = Middle::start(&ground.enclave()?, |_, answer| answer)?;
    let proxy = ground.proxy_to(&middle.url())?;
    let answer = ask(&proxy.url, false);
    ground.deployment.stop(Role::Proxy);
    let answer = answer?;
    let said: Value = serde_json::from_slice(&answer.body)?;
    let content = said["choices"][0]["message"]["content"].as_str();
    let content = content.filter(|content| content.len() > 16);
    let content = content.ok_or_else(|| Miss::Broken(format!("no answer: {}", answer.text())))?;
    let seen = middle.seen();
    if !contains(&seen, REQUEST_MEDIA_TYPE.as_bytes()) {
        return Err(Miss::Broken("the request took another way".into()));
    }
    for (what, text) in [
        ("the prompt", SECRET),
        ("the answer", content),
        ("the request's form", "messages"),
        ("the answer's form", "chat.completion"),
    ] {
        if contains(&seen, text.as_bytes()) {
            return Err(Miss::Accepted(format!("{what} can be read in the middle")));
        }
    }
    Ok(Refusal {
        by: By::Encryption,
        class: "unreadable".into(),
        claim: "prompt and answer".into(),
        found: format!("{} bytes of ciphertext and evidence", seen.len()),
        expected: "neither prompt nor answer in any of them".into(),
        verdict: Verdict::Http(answer.status()),
        transcript: String::new(),
    })
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern)
}

/// A request to the enclave, encrypted as any user can.
fn encrypted(ground: &Ground) -> Result<Bytes, Miss> {
    let response = AttestationResponse::from_json(&attestation(ground, 9)?.body)?;
    let keyset = Keyset::decode(&response.keyset)?;
    let recipient = Recipient::from_config(&keyset.ohttp_config)?;
    let request = http::Request::post(format!("http://service{CHAT}"))
        .header("content-type", "application/json")
        .body(Bytes::from(prompt(false)))?;
    Ok(recipient.encapsulate(&request)?.0)
}

fn send(ground: &Ground, encrypted: &[u8]) -> Result<Message, Miss> {
    let request = Message::post(GATEWAY_PATH, REQUEST_MEDIA_TYPE, encrypted);
    Ok(exchange(&ground.enclave()?, &request)?)
}

pub(super) fn replayed_request(ground: &mut Ground) -> Result<Refusal, Miss> {
    let request = encrypted(ground)?;
    let first = send(ground, &request)?;
    if first.status() != 200 || first.fields("content-type").next() != Some(ANSWER_MEDIA_TYPE) {
        return Err(Miss::Broken(format!("not even at first: {}", first.head)));
    }
    problem(send(ground, &request)?)
}

pub(super) fn cut_request(ground: &mut Ground) -> Result<Refusal, Miss> {
    let request = encrypted(ground)?;
    problem(send(ground, &request[..request.len() - 1])?)
}

/// The enclave tells strangers no more than the kind of its refusal.
fn problem(answer: Message) -> Result<Refusal, Miss> {
    if answer.status() == 200 {
        return Err(Miss::Accepted("the enclave answers".into()));
    }
    let problem: Value = serde_json::from_slice(&answer.body)?;
    let title = problem["title"].as_str().unwrap_or("");
    let (class, claim, expected) = match title {
        "the request was sent before" => ("refused", "request.replayed", "each request once"),
        "the request cannot be opened" => (
            "not_authentic",
            "request.sealed",
            "a whole request, encrypted to the attested key",
        ),
        _ => return Err(Miss::Broken(format!("an unknown refusal: {problem}"))),
    };
    Ok(Refusal {
        by: By::Enclave,
        class: class.into(),
        claim: claim.into(),
        found: title.into(),
        expected: expected.into(),
        verdict: Verdict::Http(answer.status()),
        transcript: answer.text(),
    })
}

pub(super) fn cut_answer(ground: &mut Ground) -> Result<Refusal, Miss> {
    cut(ground, FRAME_BYTES * 5 / 2, false)
}

/// The first frame holds the answer's head, so the user's client has begun to read when the end is missing.
pub(super) fn cut_stream(ground: &mut Ground) -> Result<Refusal, Miss> {
    cut(ground, FRAME_BYTES * 5 / 2, true)
}

/// Has the middle keep all but the first bytes of each encrypted answer to itself.
fn cut(ground: &mut Ground, kept: usize, stream: bool) -> Result<Refusal, Miss> {
    let middle = Middle::start(&ground.enclave()?, move |request, mut answer| {
        if request.path() == GATEWAY_PATH && answer.status() == 200 {
            answer.body.truncate(kept);
            answer.complete = false;
        }
        answer
    })?;
    let proxy = ground.proxy_to(&middle.url())?;
    let answer = ask(&proxy.url, stream);
    ground.deployment.stop(Role::Proxy);
    let answer = answer?;
    let expected = "the whole answer, as the enclave encrypted it";
    if answer.status() == 200 {
        if answer.complete {
            return Err(Miss::Accepted("the shortened answer looks whole".into()));
        }
        return Ok(Refusal {
            by: By::Proxy,
            class: "proxy_error".into(),
            claim: "answer_refused".into(),
            found: "the end is missing, so the proxy breaks its own answer off, too".into(),
            expected: expected.into(),
            verdict: Verdict::Unfinished,
            transcript: String::new(),
        });
    }
    let error: Value = serde_json::from_slice(&answer.body)?;
    let text = |name: &str| error["error"][name].as_str().unwrap_or("").to_owned();
    Ok(Refusal {
        by: By::Proxy,
        class: text("type"),
        claim: text("code"),
        found: text("message"),
        expected: expected.into(),
        verdict: Verdict::Http(answer.status()),
        transcript: answer.text(),
    })
}
